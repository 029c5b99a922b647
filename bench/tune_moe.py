"""Tune SGLang's fused experts' kernel for Gemma 4's experts on this GPU.

    python bench/tune_moe.py --width 704            # 26B-A4B; 352: its experts on two GPUs

Writes the tables of `gemma4_turbo.kernels.moe_tables` (up and down projection, equal BLOCK_SIZE_M) and a CSV with
every measurement. How they are measured: `gemma4_turbo.cli.tuning.moe`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

# Scripts have their folder on the path, and transformers looks for a package called kernels.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402

from bench.common.provenance import provenance  # noqa: E402
from gemma4_turbo.cli.report import Console  # noqa: E402
from gemma4_turbo.cli.tuning.moe import DOWN, EXPERTS, TOKENS, UP, Tile, prepare_sglang, tune  # noqa: E402
from gemma4_turbo.kernels import moe_tables  # noqa: E402


def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Chosen against stock, per width and number of tokens."""
    frame = pd.DataFrame(rows)
    keys = ["width", "tokens"]
    ours = frame[frame.chosen == 1].groupby(keys).us.sum()
    stock = frame[frame.stock == 1].groupby(keys).us.sum()
    found = pd.DataFrame({"stock_us": stock, "us": ours, "ratio": (ours / stock).round(3)})
    for projection in (UP, DOWN):
        best = frame[(frame.chosen == 1) & (frame.projection == projection)].set_index(keys)
        names = list(Tile._fields)
        found[projection] = best[names].astype(str).agg("/".join, axis=1)
    return found.reset_index()


def main(
    width: Annotated[str, typer.Option(help="Comma list: 704, 352 on two GPUs")] = "704",
    tokens: Annotated[str, typer.Option(help="Comma list")] = ",".join(map(str, TOKENS)),
    workers: Annotated[int, typer.Option(help="Processes that compile")] = 14,
    replays: Annotated[int, typer.Option(help="Readings per measurement")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="For the tables; the package's by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="CSV of every measurement")] = Path("moe-tuning.csv"),
) -> None:
    """Tune."""
    console = Console(stderr=True)
    widths = [int(value) for value in width.split(",")]
    counts = sorted({int(value) for value in tokens.split(",")})
    if not counts or counts[0] < 1:
        raise typer.BadParameter("numbers of tokens start at 1", param_hint="--tokens")
    prepare_sglang()
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for value in widths:
            pair, measured = tune(value, counts, workers, replays, console)
            rows += measured
            key = moe_tables.Key(EXPERTS, value, torch.cuda.get_device_name().replace(" ", "_"))
            for path in moe_tables.save(key, pair, folder):
                console.print(f"wrote {path}")
            frame = pd.DataFrame(rows)
            for name, text in provenance().items():
                frame[name] = text
            frame.to_csv(out, index=False)
            torch.cuda.empty_cache()
    print(summary(rows).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
