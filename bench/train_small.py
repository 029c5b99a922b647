"""Small Gemma 4 models that know something, trained in minutes on one GPU.

    python bench/train_small.py --out small-models
    python bench/train_small.py --out small-models --model moe --minutes 5

Trains transformers' own Gemma 4 classes (`bench.models.small_models` has the sizes) on Python's sources and on
generated questions (`bench.models.small_tasks`), and writes one checkpoint folder a model, which stock SGLang
loads. Weights are bf16 with fp32 masters in the optimizer, as transformers' grouped experts do not
follow autocast. An auxiliary loss spreads tokens over experts.

``--minutes`` decides how many steps there are: the first ones are timed. The number goes into the
folder's training.json; with it as ``--steps``, and the same seed and Python, data, order and schedule are
the same. The held-out text goes into the folder, too. Exit 1 if a model is no better than a bigram model.
"""

from __future__ import annotations

import functools
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.models import small_models, small_tasks  # noqa: E402

console = Console(width=150)
HELD_OUT = "held_out.txt"


class Settings(NamedTuple):
    """Of one training."""

    minutes: float = 5.0
    steps: int = 0  # 0: as many as the minutes allow
    seed: int = 0
    batch: int = 32
    length: int = small_tasks.LENGTH
    rate: float = 1.5e-3
    text_share: float = 0.4  # of rows and of the loss
    balance: float = 0.01  # weight of the auxiliary loss
    rows: int = 98_304  # of questions, made beforehand
    most_text: int = 0  # bytes; 0: all
    pieces: int = 64  # of held-out text, for the loss at the end
    questions: int = 600  # at the end


TINY = Settings(
    0, 6, batch=4, length=96, rows=64, most_text=1_500_000, pieces=2, questions=12, rate=5e-3
)
TINY_SIZES = {
    "moe": small_models.SIZES["moe"]._replace(mlp=64, kinds="sf", heads=2, kv_sliding=1),
    "ple": small_models.SIZES["ple"]._replace(
        hidden=256, mlp=64, kinds="sfsf", heads=2, per_layer=256, shared=2
    ),
}
"""For a CPU: the real head sizes, numbers of experts and kinds of layers, and as little else as goes."""


@functools.cache
def questions(count: int, seed: int) -> small_tasks.Rows:
    """Rows of questions, made once for all models."""
    return small_tasks.rows(count, seed)


class Data:
    """Text and rows of questions on the device, drawn from by a generator."""

    def __init__(self, settings: Settings, corpus: small_tasks.Corpus, device: str) -> None:
        self.settings = settings
        made = questions(settings.rows, settings.seed)
        self.text = torch.frombuffer(bytearray(corpus.train), dtype=torch.uint8).to(device)
        self.tokens = torch.from_numpy(made.tokens.astype("int16")).to(device)
        self.answers = torch.from_numpy(made.answers).to(device)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def _draw(self, below: int, count: int) -> torch.Tensor:
        return torch.randint(below, (count,), generator=self.generator).to(self.text.device)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens ``[batch, length + 1]``, which of them are to be learned, and how many rows are text."""
        s = self.settings
        texts = round(s.batch * s.text_share)
        starts = self._draw(len(self.text) - s.length, texts)
        at = torch.arange(s.length, device=self.text.device)
        text = self.text[starts[:, None] + at].long() + small_tasks.FIRST_BYTE
        text = torch.nn.functional.pad(text, (1, 0), value=small_tasks.BOS)
        rows = self._draw(len(self.tokens), s.batch - texts)
        asked = self.tokens[rows, : s.length + 1].long()
        learned = self.answers[rows, : s.length + 1]
        everything = torch.ones_like(text, dtype=torch.bool)
        return torch.cat([text, asked]), torch.cat([everything, learned]), texts


class Balance:
    """What the routers of a model chose in a forward: the loss that spreads tokens over experts.

    ``E sum_e f_e p_e`` with f_e the part of the choices that fell on expert e and p_e its mean
    probability (Switch Transformer, Fedus et al. 2021): 1 where all experts get the same.
    """

    def __init__(self, model: Any) -> None:
        self.parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hooks = [
            module.register_forward_hook(self._hook)
            for name, module in model.named_modules()
            if name.split(".")[-1] == "router"
        ]

    def _hook(self, module: Any, inputs: Any, found: Any) -> None:
        probabilities, _, chosen = found
        # In bf16 a count of ones ends at 256.
        counts = chosen.flatten().bincount(minlength=probabilities.shape[-1]).float()
        self.parts.append((counts / chosen.numel(), probabilities.float().mean(0)))

    def take(self) -> torch.Tensor | float:
        """The mean over the layers since the last call; 0 without experts."""
        parts, self.parts = self.parts, []
        if not parts:
            return 0.0
        return torch.stack([len(f) * (f.detach() * p).sum() for f, p in parts]).mean()

    def remove(self) -> list[torch.Tensor]:
        """End; what part of the choices fell on each expert, by layer and forward since `take`."""
        for hook in self.hooks:
            hook.remove()
        return [part.cpu() for part, _ in self.parts]


class Masters:
    """AdamW on fp32 copies of a model's weights."""

    def __init__(self, model: Any, rate: float) -> None:
        named = list(model.named_parameters())
        self.weights = [tensor for _, tensor in named]
        self.copies = [tensor.detach().float().clone() for tensor in self.weights]
        for copy in self.copies:
            copy.grad = torch.zeros_like(copy)
        decays = [t.dim() > 1 and "embed" not in name and "router" not in name for name, t in named]
        groups = [
            {
                "params": [c for c, decay in zip(self.copies, decays, strict=True) if decay == on],
                "weight_decay": 0.1 if on else 0.0,
            }
            for on in (True, False)
        ]
        on_gpu = self.weights[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=on_gpu)

    def step(self, rate: float) -> torch.Tensor:
        """One step; returns the gradient's norm before it was clipped to one."""
        gradients = [w.grad if w.grad is not None else torch.zeros_like(w) for w in self.weights]
        own = [copy.grad for copy in self.copies]
        torch._foreach_copy_(own, gradients)
        norm = torch.nn.utils.clip_grad_norm_(self.copies, 1.0, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.copies)
        for weight in self.weights:
            weight.grad = None
        return norm


WARM = 200  # steps in which the learning rate rises


def schedule(step: int, steps: int, highest: float) -> float:
    """The learning rate: up, then down along a cosine to a fiftieth.

    While it rises it does not depend on the number of steps, which is not known then.
    """
    warm = min(WARM, max(1, steps // 2))
    if step < warm:
        return highest * (step + 1) / warm
    part = (step - warm) / max(1, steps - warm)
    return highest * (0.02 + 0.98 * (1 + math.cos(math.pi * min(1.0, part))) / 2)


def losses(
    model: Any, batch: tuple[torch.Tensor, torch.Tensor, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats a token: of the text, and of the questions' answers."""
    ids, learned, texts = batch
    found = small_models.logits(model, ids[:, :-1]).float()
    nats = torch.nn.functional.cross_entropy(
        found.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(ids.shape[0], -1)
    counted = learned[:, 1:].float()
    means = [
        (nats[part] * counted[part]).sum() / counted[part].sum().clamp(min=1)
        for part in (slice(texts), slice(texts, None))
    ]
    return means[0], means[1]


def experts_that_run(device: str) -> str:
    """Transformers' fastest experts that this PyTorch can train with.

    Builds of PyTorch differ in their grouped products; experts one after the other always run.
    """
    if device == "cpu":
        return "eager"
    try:
        given: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
        x, up, down = (torch.randn(s, **given) for s in ((64, 256), (4, 64, 256), (4, 256, 64)))
        ends = torch.tensor([8, 8, 40, 64], device=device, dtype=torch.int32)
        product = torch.nn.functional.grouped_mm
        both = product(product(x, up.mT, offs=ends), down.mT, offs=ends)
        both.square().sum().backward()  # an expanded gradient, as of a sum alone, is not taken
        torch.cuda.synchronize()
    except (RuntimeError, AttributeError) as error:
        console.print(f"experts one after the other: {str(error).splitlines()[0]}")
        return "eager"
    return "grouped_mm"


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came: what is trained by then is saved."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TIMED = range(10, 40)  # steps that say how long one takes


def fit(
    model: Any, data: Data, settings: Settings, stopped: Callable[[], bool], started: float
) -> dict[str, Any]:
    """Train in place; how many steps were done of how many, and the last losses.

    ``started``: when the minutes began, by ``time.monotonic``.
    """
    balance = Balance(model)
    masters = Masters(model, settings.rate)
    steps = settings.steps or 10_000_000  # until the first ones are timed
    begun = told = time.monotonic()
    last: dict[str, float] = {}
    step = 0

    def now() -> float:
        if data.text.is_cuda:
            torch.cuda.synchronize()
        return time.monotonic()

    while step < steps and not stopped():
        if not settings.steps and step == TIMED.start:
            begun = now()
        if not settings.steps and step == TIMED.stop:
            each = (now() - begun) / len(TIMED)
            left = settings.minutes * 60 - (time.monotonic() - started)
            steps = step + max(1, int(left / each))
            console.print(f"{1e3 * each:.1f} ms a step, so {steps:,} steps")
        rate = schedule(step, steps, settings.rate)
        text, asked = losses(model, data.batch())
        spread = balance.take()
        share = settings.text_share
        (share * text + (1 - share) * asked + settings.balance * spread).backward()
        norm = masters.step(rate)
        step += 1
        if time.monotonic() - told > 10 or step == steps:
            told = time.monotonic()
            means = {"text": text, "questions": asked, "balance": torch.as_tensor(spread)}
            last = {name: value.item() for name, value in means.items()}
            parts = ", ".join(f"{name} {value:.3f}" for name, value in last.items())
            console.print(
                f"step {step:,} of {steps if steps < 10_000_000 else '?'}, "
                f"{time.monotonic() - started:.0f} s: {parts}, gradient {norm.item():.2f}"
            )
            if not math.isfinite(last["text"] + last["questions"]):
                raise SystemExit(f"train_small.py: the loss is {last} at step {step}")
    balance.remove()
    return {"steps": step, "planned": steps, "last": last}


def numbers(model: Any) -> dict[str, int]:
    """How many there are, and how many work for a token."""
    total = sum(tensor.numel() for tensor in model.parameters())
    experts = sum(t.numel() for name, t in model.named_parameters() if ".experts." in name)
    c = model.config
    part = c.top_k_experts / c.num_experts if experts else 0
    return {"numbers": total, "active": total - experts + int(experts * part)}


def judged(model: Any, corpus: small_tasks.Corpus, settings: Settings) -> dict[str, Any]:
    """Held-out text beside a bigram model, and questions answered exactly, by kind."""
    pieces = small_tasks.windows(corpus.held_out, settings.pieces, settings.length)
    asked = small_tasks.questions(settings.questions, settings.seed, settings.length)
    right, nats = small_models.answered(model, asked)
    balance = Balance(model)
    found: dict[str, Any] = {
        "held-out text, nats a byte": small_models.text_loss(model, pieces, len(pieces)),
        "bigram model, nats a byte": small_tasks.bigram_loss(corpus.train, pieces),
        "answers, nats a byte": nats,
        "answered exactly": sum(right) / len(right),
    }
    loads = balance.remove()
    for kind in small_tasks.KINDS:
        of_kind = [r for r, question in zip(right, asked, strict=True) if question.kind == kind]
        if of_kind:
            found[f"answered exactly, {kind}"] = sum(of_kind) / len(of_kind)
    if loads:
        found["busiest expert's part of a layer's choices"] = max(x.max().item() for x in loads)
        found["experts that no token chose"] = sum(int((load == 0).sum()) for load in loads)
    return found


def train(
    name: str, size: small_models.Size, settings: Settings, out: Path, device: str
) -> dict[str, Any]:
    """One model: trained, judged, saved below ``out``; returns what training.json says."""
    import transformers

    started = time.monotonic()
    console.print(f"[bold]{name}[/]: reading text, making {settings.rows:,} rows of questions")
    corpus = small_tasks.corpus(most=settings.most_text)
    data = Data(settings, corpus, device)
    fields = small_models.published(size)
    model = small_models.build(fields, experts_that_run(device))
    small_models.initialise(model, settings.seed)
    model = model.to(device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    console.print(f"{name}: {numbers(model)}, data after {time.monotonic() - started:.0f} s")
    with stoppable() as stopped:
        model.train()
        done = fit(model, data, settings, stopped, started)
    trained = time.monotonic() - started
    model.eval()
    small_models.as_saved(model)
    notes = {
        "model": name,
        **settings._asdict(),
        **done,
        "seconds": round(trained, 1),
        "tokens": done["steps"] * settings.batch * settings.length,
        **numbers(model),
        "experts": model.config._experts_implementation,
        "corpus": corpus.digest,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none",
        "found": judged(model, corpus, settings),
    }
    folder = out / name
    small_models.save(folder, model, fields, notes)
    (folder / HELD_OUT).write_bytes(corpus.held_out)
    bytes_ = sum(path.stat().st_size for path in folder.iterdir())
    console.print(f"{folder}: {bytes_ / 1e6:.1f} MB")
    if bytes_ > small_models.MOST_BYTES:
        raise SystemExit(f"train_small.py: {folder} has {bytes_:,} bytes")
    return notes


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint folders")],
    model: Annotated[str, typer.Option(help="moe | ple | both")] = "both",
    minutes: Annotated[float, typer.Option(help="For each model, data and start included")] = 5.0,
    steps: Annotated[int, typer.Option(help="So many steps instead; 0: by the minutes")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, data and order")] = 0,
    batch: Annotated[int, typer.Option(min=2, help="Rows of 1024 tokens in a step")] = 32,
    rate: Annotated[float, typer.Option(help="Highest learning rate")] = Settings().rate,
    tiny: Annotated[bool, typer.Option(help="Seconds on a CPU, to try the script")] = False,
) -> None:
    """Train the small models and write their checkpoint folders."""
    sizes = TINY_SIZES if tiny else small_models.SIZES
    if model not in (*sizes, "both"):
        raise typer.BadParameter(f"--model must be moe, ple or both, got {model!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise SystemExit("train_small.py: needs a CUDA device; --tiny trains on a CPU")
    settings = TINY if tiny else Settings(minutes, steps, batch=batch, rate=rate)
    settings = settings._replace(seed=seed)
    found = {
        name: train(name, sizes[name], settings, out, device)
        for name in (sizes if model == "both" else [model])
    }
    table = Table("", *found)
    for line in dict.fromkeys(key for notes in found.values() for key in notes["found"]):
        cells = (notes["found"].get(line) for notes in found.values())
        table.add_row(line, *("-" if cell is None else f"{cell:.4g}" for cell in cells))
    console.print(table)
    for name, notes in found.items():
        text, bigram = (
            notes["found"][f"{what}, nats a byte"] for what in ("held-out text", "bigram model")
        )
        console.print(f"{name}: {text:.3f} nats a byte, a bigram model {bigram:.3f}")
        if not tiny and text >= bigram:
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
