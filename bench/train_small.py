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

import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import typer  # noqa: E402
from rich.table import Table  # noqa: E402

from bench.models import small_models, small_tasks  # noqa: E402
from bench.models.training import (  # noqa: E402
    TIMED,
    Data,
    Masters,
    Settings,
    console,
    experts_that_run,
    schedule,
    stoppable,
)

HELD_OUT = "held_out.txt"
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
