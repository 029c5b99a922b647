"""Whether a GPU profile is as good as the package's own tiles: two patched engines side by side.

    python -m gemma4_turbo tune
    python bench/profiled.py --model e4b

One engine has the package as it is, with no profile but the one that comes with it, if there is one for this
GPU. The other has the profile, and a copy of the package that has never seen a GPU: no compute capability is
known to it, its tables of the fused experts and its profiles are deleted. What it is fast with comes from the
profile alone. With ``--packaged`` it is the package as it is, the profile among those that come with it in the
place of the others: what users get if the file is added. Both engines must fit on the GPU. Rounds alternate
between the two; exit status 1 if the second takes more than ``--at-most`` of the first one's time, in the median of
any quantity.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.common.engines import BENCH, Engine, end_on_sigterm, engines, in_turn  # noqa: E402
from bench.common.options import parse_prefill  # noqa: E402
from bench.common.results import Results  # noqa: E402
from bench.common.variants import ARGUMENTS  # noqa: E402
from gemma4_turbo.engine import gpu_profile  # noqa: E402
from gemma4_turbo.models import geometry  # noqa: E402

SHIPPED, PROFILED, BARE = "shipped", "profile, unseen GPU", "unseen GPU"
PACKAGED = "profile, packaged"
KNOWN = "KNOWN = (9,)"
UNKNOWN = "KNOWN: tuple[int, ...] = ()"
console = Console(width=150)


def copied(folder: Path) -> Path:
    """Put a copy of the package that has no profiles into a folder; the copy."""
    package = folder / "gemma4_turbo"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE.parent / "gemma4_turbo", package, ignore=ignored)
    for profile in (package / "profiles").glob("*.json"):
        profile.unlink()
    return package


def unseen(folder: Path) -> Path:
    """Put a copy of the package that knows no GPU into a folder; the folder.

    ValueError where it knows them otherwise than here.
    """
    package = copied(folder)
    source = package / "kernels" / "measured.py"
    text = source.read_text()
    if text.count(KNOWN) != 1:
        raise ValueError(f"{source.name} must have {KNOWN!r} once")
    source.write_text(text.replace(KNOWN, UNKNOWN))
    tables = list((package / "kernels" / "moe_configs").glob("triton_*"))
    if not tables:
        raise ValueError("kernels/moe_configs must have folders of tables")
    for folder_of_tables in tables:
        shutil.rmtree(folder_of_tables)
    return folder


def with_it(folder: Path, profile: str) -> Path:
    """Put a copy of the package with this profile and no other into a folder; the folder."""
    shutil.copy(profile, copied(folder) / "profiles" / "measured.json")
    return folder


class ProfiledEngine(Engine):
    """A patched engine with another package or profile. Its patches are those of every user."""

    def __init__(
        self, variant: str, package: Path, profile: str, arguments: dict[str, Any], log: Path
    ) -> None:
        self.package, self.profile = package, profile
        super().__init__(variant, [], arguments, log)

    def path(self) -> str:
        """This package comes before the one beside the benchmarks."""
        site, rest = str(BENCH / "site"), super().path()
        return ":".join([site, str(self.package), rest])

    def switches(self, patches: list[str]) -> dict[str, str]:
        """Nothing that comes before the profile."""
        return {"BENCH_PATCHED": "1", "GEMMA4_TURBO_GPU_PROFILE": self.profile}

    def ignored(self) -> str | None:
        """What the log says of a profile that is not used, or None."""
        lines = self.log.read_text(errors="replace").splitlines()
        return next(
            (
                line
                for line in lines
                if "GPU profile" in line and ("is ignored" in line or "is skipped" in line)
            ),
            None,
        )


def main(
    model: Annotated[str, typer.Option(help=" | ".join(geometry.GEOMETRIES))] = "e4b",
    profile: Annotated[str, typer.Option(help="The GPU profile; empty: where `tune` puts it")] = "",
    batches: Annotated[str, typer.Option(help="Decode batch sizes; empty: none")] = "1,8,32",
    prefill: Annotated[
        str, typer.Option(help="Comma list of BATCHxLENGTH; empty: none")
    ] = "4x4096",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    bare: Annotated[
        bool, typer.Option(help="A third engine: without the profile, on the unseen GPU")
    ] = False,
    packaged: Annotated[
        bool, typer.Option(help="As if the profile came with the package, beside its own tiles")
    ] = False,
    at_most: Annotated[float, typer.Option(help="Of the shipped package's time")] = 1.02,
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all")] = 0,
    max_total_tokens: Annotated[int, typer.Option(help="Size of the KV pool")] = 49152,
    mem_fraction: Annotated[float, typer.Option(help="SGLang's mem_fraction_static")] = 0.85,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-profiled.csv"),
) -> None:
    """The package's own tiles against a profile's."""
    where = os.path.abspath(profile or gpu_profile.path() or "")
    try:
        why = gpu_profile.stale(gpu_profile.load(where).key)
    except (FileNotFoundError, gpu_profile.UnfitError):
        raise typer.BadParameter(f"--profile: there is no profile at {where}: tune writes one") from None  # fmt: skip
    if why is not None:
        raise typer.BadParameter(f"--profile: {where} is not for this machine: {why}")
    sizes = [int(size) for size in batches.split(",") if size]
    prefills = [parse_prefill(text) for text in prefill.split(",") if text]
    scratch = Path(tempfile.mkdtemp(prefix="gemma4_turbo-bench-"))
    arguments: dict[str, Any] = {
        "model_path": str(geometry.write_model(scratch / "model", model, layers or None)),
        **ARGUMENTS,
        "disable_radix_cache": True,
        "max_total_tokens": max_total_tokens,
        "mem_fraction_static": mem_fraction,
        "cuda_graph_max_bs": max([*sizes, 1]),
    }
    if geometry.GEOMETRIES[model].kv_shared_layers:  # stock cannot start with them
        arguments["disable_piecewise_cuda_graph"] = True
    nobodys = str(scratch / "none.json")  # 0 would be without the package's own, too
    packages = {SHIPPED: (BENCH.parent, nobodys)}
    if packaged:
        packages[PACKAGED] = (with_it(scratch / "packaged", where), nobodys)
    else:
        packages[PROFILED] = (unseen(scratch / "unseen"), where)
    if bare:
        packages[BARE] = (unseen(scratch / "bare"), "0")
    results = Results(model, layers or None, ["as every user has them"])
    results.pair = (SHIPPED, PACKAGED if packaged else PROFILED)

    def make(variant: str) -> ProfiledEngine:
        log = out.with_name(f"{out.stem}-{variant.replace(', ', '-').replace(' ', '-')}.log")
        log.unlink(missing_ok=True)
        return ProfiledEngine(variant, *packages[variant], arguments, log)

    def measure(one: Engine, round_: int) -> None:
        for size in sizes:
            length = 128 if size == 1 else 512
            value = one("decode", batch=size, length=length, seed=round_)["value"]
            results.add(one.variant, "decode step", size, round_, value, "ms")
        for count, length, new in prefills:
            value = one("prefill", batch=count, length=length, seed=round_, new=new)["value"]
            results.add(one.variant, f"prefill of {length}", count, round_, value, "ms")

    end_on_sigterm()
    try:
        with engines(make, list(packages)) as live:
            for round_ in range(-1, rounds):
                for one in in_turn(live, round_):
                    measure(one, round_)
            why = live[results.pair[1]].ignored()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        results.rows = [row for row in results.rows if row["round"] >= 0]  # the first compiles
        summary = results.summary()
        console.print(summary.to_string(index=False, float_format=lambda v: f"{v:.3f}"))
        results.save(out)
    if why is not None:
        sys.exit(f"profiled.py: {why}")
    worst = summary["ratio"].max()
    console.print(f"at most {worst:.3f} of the shipped package's time, {at_most} is allowed")
    sys.exit(int(worst > at_most))


if __name__ == "__main__":
    typer.run(main)
