"""What a patch or a cut saves of a decode step's GPU time: one engine, its CUDA graphs captured anew for each.

    python bench/steps.py --model 26b-a4b --layers 18 --variant stock --variant all+feed_forward_few
    python bench/steps.py --model e4b --each                    # every patch left out in turn
    python bench/steps.py --model e2b --fetch 0,2,8,16          # blocks of a weight fetched ahead
    python bench/steps.py --model 31b --layers 30 --variant all --variant all@$HOME/.config/gemma4_turbo/gpu_profile.json

One model in one process: the same weights at the same addresses, so that variants differ in nothing else. A
variant is ``stock``, ``all`` or a comma list of patches, with ``+PATCH`` and ``-PATCH`` behind it, and ``@`` with the
absolute path of a GPU profile: its tiles, without its decisions on patches. Other variants have no profile's tiles.
`PATCHES` are those of a decode step, all others are off. The first variant is the baseline, ``all`` unless others are
named. It is captured once more in each round, as ``control``: its ratio says how far two captures of one
variant are apart. In every second round the order is the other one. What is timed is the graph on the GPU,
replayed back to back: no host, no sampling, no prefill; of five readings the shortest. `engine.py` measures
whole steps.

``--fetch`` tries numbers of blocks that `skinny_gemm` fetches into the L2 cache while the kernel before it
runs, for each weight of a layer in turn; the others keep the package's. The last variant has the best number of
each weight, chosen by the first batch size.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import pandas as pd  # noqa: E402
import typer  # noqa: E402

from bench.common.engines import Engine, console, end_on_sigterm  # noqa: E402
from bench.common.options import named, with_what_they_need  # noqa: E402
from bench.common.results import Results, append  # noqa: E402
from bench.common.variants import ARGUMENTS, PATCHED, STOCK  # noqa: E402
from bench.rendering.catalogue import FAMILIES  # noqa: E402
from gemma4_turbo.catalogue import by_name  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

PATCHES = [*FAMILIES["decode-step"][1], *FAMILIES["experts"][1], "decode_attention"]
ALL, CONTROL, BEST = "all", "control", "fetch the best"
QUANTITY = "decode graph on the GPU"


class Variant(NamedTuple):
    """What a capture is asked for."""

    patches: list[str]
    fetched: dict[str, int] = {}  # noqa: RUF012 - never written
    profile: str = ""


class StepsEngine(Engine):
    """With the commands of `workers.steps`, and without a reason to end for a patch that is out."""

    script = "workers/steps.py"

    def switches(self, patches: list[str]) -> dict[str, str]:
        """With `bench.inside.steps` in the scheduler."""
        return super().switches(patches) | {"BENCH_STEPS": "1", "GEMMA4_TURBO_STRICT": "0"}


def parsed(text: str) -> Variant:
    """A variant as the command line has it; `typer.BadParameter` for what is none."""
    what, at, profile = text.partition("@")
    if at and not Path(profile).is_file():
        raise typer.BadParameter(f"--variant: there is no GPU profile at {profile!r}")
    base, *changes = re.split(r"(?=[+-])", what.replace(" ", ""))
    if base == STOCK:
        chosen = []
    elif base == ALL:
        chosen = [name for name in PATCHES if by_name(name).default]
    else:
        chosen = named(base, "--variant")
    for change in changes:
        for name in named(change[1:], "--variant"):
            chosen = [one for one in chosen if one != name]
            if change[0] == "+":
                chosen.append(name)
    strange = sorted(set(chosen) - set(PATCHES))
    if strange:
        raise typer.BadParameter(f"--variant: {strange[0]} is no patch of a decode step")
    if not base or not (chosen or base == STOCK) or not all(change[1:] for change in changes):
        raise typer.BadParameter(f"--variant must be stock, all or a list of patches, got {text!r}")
    if not any(change[0] == "-" for change in changes):
        chosen = with_what_they_need(chosen)
    return Variant(chosen, profile=str(Path(profile).absolute()) if at else "")


def numbers(text: str, option: str) -> list[int]:
    """Of a comma list; `typer.BadParameter` for what is none."""
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise typer.BadParameter(f"{option} must be a comma list of whole numbers, got {text!r}")
    return [int(number) for number in text.split(",") if number]


def weights(model: str) -> list[str]:
    """The weights of a layer that `skinny_gemm` takes, as ``8192x2816``."""
    from gemma4_turbo.cli.tuning import linear

    found = {f"{one.n}x{one.k}": None for one in linear.layers(geometry.GEOMETRIES[model])}
    return list(found)


class Session:
    """Captures and their times."""

    def __init__(self, engine: Any, results: Results, batches: list[int], length: int) -> None:
        self.engine, self.results = engine, results
        self.batches, self.length = batches, length
        self.idle: dict[str, dict[str, str]] = {}
        """By patch and variant: why none of its calls ran."""
        self.asked: dict[str, set[str]] = {}
        """By patch: the variants that have it."""

    def measure(self, name: str, variant: Variant, round_: int) -> None:
        """Capture a variant and time a step of each batch size. What goes wrong is said, and is no row."""
        found = self.engine("capture", **variant._asdict())
        if "error" in found:
            console.print(f"{name}: not captured: {found['error']}")
            return
        for patch in variant.patches:
            row = found[patch]
            self.asked.setdefault(patch, set()).add(name)
            if not row["ran"]:
                why = f"{row['state']}: {row['reason']}"
                self.idle.setdefault(patch, {})[name] = why
        for batch in self.batches:
            asked = {"batch": batch, "length": self.length, "seed": 1, "count": 20, "times": 5}
            step = self.engine("step", **asked)
            if "error" in step:
                console.print(f"{name}, batch {batch}: {step['error']}")
                continue
            self.results.add(name, QUANTITY, batch, round_, min(step["ms"]), "ms")

    def tell_idle(self) -> None:
        """The patches that did not run, where they were asked for."""
        for patch, variants in self.idle.items():
            where = "" if set(variants) == self.asked[patch] else f" in {', '.join(variants)}"
            console.print(f"{patch} did not run{where}: {next(iter(variants.values()))}")

    def best(self, tried: dict[str, dict[int, str]], usual: str) -> dict[str, int]:
        """By weight, the number of blocks whose variant was fastest; without those that none beat ``usual`` at."""
        frame = self.results.frame()
        frame = frame[frame["x"] == self.batches[0]]
        medians = frame.groupby("variant")["value"].median()
        found = {}
        for weight, variants in tried.items():
            there = {blocks: medians[name] for blocks, name in variants.items() if name in medians}
            if there and usual in medians:
                blocks = min(there, key=lambda number: there[number])
                if there[blocks] < medians[usual]:
                    found[weight] = blocks
        return found


def table(frame: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Medians by variant and batch size, in the order measured, with ratios to the baseline."""
    medians = frame.pivot_table(index="variant", columns="x", values="value", aggfunc="median")
    medians = medians.loc[list(dict.fromkeys(frame["variant"]))]
    found = pd.DataFrame(index=medians.index)
    for batch in medians.columns:
        found[f"batch {batch}, ms"] = medians[batch]
        if baseline in medians.index:
            found[f"{batch} / {baseline}"] = medians[batch] / medians[batch][baseline]
    return found.reset_index()


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "26b-a4b",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all")] = 0,
    batches: Annotated[str, typer.Option(help="Decode batch sizes")] = "1,2,8",
    length: Annotated[int, typer.Option(min=1, help="Tokens of each prompt")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    variant: Annotated[list[str] | None, typer.Option(help="Repeated; the first: baseline")] = None,
    each: Annotated[bool, typer.Option(help="Also all without each patch in turn")] = False,
    fetch: Annotated[str, typer.Option(help="Blocks to fetch of each weight in turn")] = "",
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.85,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-steps.csv"),
) -> None:
    """A decode step's graph with patches and cuts in turn."""
    end_on_sigterm()
    if model not in geometry.GEOMETRIES:
        raise typer.BadParameter(f"--model must be one of {', '.join(geometry.GEOMETRIES)}")
    sizes = numbers(batches, "--batches")
    if not sizes or min(sizes) < 1:
        raise typer.BadParameter(f"--batches must be positive numbers, got {batches!r}")
    variants = {text: parsed(text) for text in variant or [ALL]}
    baseline = next(iter(variants))
    everything = parsed(ALL)
    if each:
        variants |= {f"{ALL}-{name}": parsed(f"{ALL}-{name}") for name in everything.patches}
    tried: dict[str, dict[int, str]] = {}
    if fetch:
        variants.setdefault(ALL, everything)
        for weight in weights(model):
            tried[weight] = {n: f"fetch {n} of {weight}" for n in numbers(fetch, "--fetch")}
            variants |= {
                name: Variant(everything.patches, {weight: blocks})
                for blocks, name in tried[weight].items()
            }
    os.environ.setdefault("BENCH_WEIGHT_RANGE", "0.03")
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    try:
        folder = geometry.write_model(scratch / "model", model, layers or None)
    except ValueError as error:
        raise typer.BadParameter(f"--layers: {error}") from None
    arguments: dict[str, Any] = {
        "model_path": str(folder),
        **ARGUMENTS,
        "disable_radix_cache": True,
        "max_total_tokens": max(16384, 2 * max(sizes) * (length + 16)),
        "mem_fraction_static": mem_fraction,
        "cuda_graph_bs": sorted(set(sizes)),
        "disable_piecewise_cuda_graph": True,  # a graph of a prefill would be taken for a step's
    }
    results = Results(model, layers or None, ["decode step"])
    log = out.with_name(f"{out.stem}-{model}.log").resolve()
    engine = StepsEngine(PATCHED, PATCHES, arguments, log)
    session = Session(engine, results, sizes, length)
    try:
        for round_ in range(rounds):
            turn = list(variants.items())
            for name, one in turn if round_ % 2 == 0 else turn[::-1]:
                session.measure(name, one, round_)
            session.measure(CONTROL, variants[baseline], round_)
        if tried:
            best = session.best(tried, ALL)
            console.print(f"{BEST}: {best or 'none'}")
            for round_ in range(rounds if best else 0):
                session.measure(BEST, Variant(everything.patches, best), round_)
                session.measure(ALL, everything, rounds + round_)
    finally:  # where a limit on its time cuts a run off, what there is still counts
        engine.stop()
        session.tell_idle()
        if results.rows:
            frame = results.frame()
            print(table(frame, baseline).to_string(index=False, float_format="{:.4f}".format))
            append(frame, out)


if __name__ == "__main__":
    typer.run(main)
