"""How many bits of the fused router differ from stock's own closure, over many rows. On a GPU.

    python bench/exact.py --rows 10000000

One row of a CSV per dtype, number of experts, K and kind of logits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common.provenance import provenance
from bench.common.results import append
from gemma4_turbo.cli import lines
from tests.router_inputs import KINDS, bits_differ, logits

WIDTHS = (0.1, 1.0, 10.0)


@torch.no_grad()
def main(
    rows: Annotated[
        int, typer.Option(help="Random rows in all; as many adversarial ones / 20")
    ] = 10_000_000,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-exact.csv"),
) -> None:
    """Fused router against stock's closure, bit by bit."""
    if not torch.cuda.is_available():
        raise SystemExit("bench/exact.py: needs a CUDA device")
    if (reason := lines.patch_unfit("router")) is not None:
        raise SystemExit(f"bench/exact.py: {reason}")
    from gemma4_turbo.kernels.router import LOGIT_DTYPES, fused_routing

    stock = lines.stock()
    generator = torch.Generator("cuda").manual_seed(2026)
    cases = [(d, e, k) for d in LOGIT_DTYPES for e in (64, 128, 256) for k in (1, 4, 8)]
    base = provenance()
    found = []
    for dtype, experts, topk in track(cases, description="router"):
        scale = (torch.randn(experts, device="cuda", generator=generator) * 2).to(dtype)
        per_width = -(-rows // (len(cases) * len(WIDTHS)))
        per_kind = -(-rows // (20 * len(cases) * len(KINDS)))
        batches = [
            (
                f"random x {width}",
                (torch.randn(per_width, experts, device="cuda", generator=generator) * width).to(
                    dtype
                ),
            )
            for width in WIDTHS
        ] + [(kind, logits(kind, per_kind, experts, topk, dtype, generator)) for kind in KINDS]
        for kind, x in batches:
            poison = torch.full((32 << 20,), 0x7B, dtype=torch.uint8, device="cuda")
            del poison  # outputs that are not written show
            differing = bits_differ(fused_routing(x, scale, topk), stock.routing(x, scale, topk))
            found.append(
                {
                    **base,
                    "dtype": str(dtype).removeprefix("torch."),
                    "experts": experts,
                    "topk": topk,
                    "kind": kind,
                    "rows": len(x),
                    "rows_differing": differing,
                }
            )
    frame = pd.DataFrame(found)
    append(frame, out)
    frame["kind"] = frame["kind"].where(~frame["kind"].str.startswith("random"), "random")
    print(frame.groupby(["dtype", "kind"])[["rows", "rows_differing"]].sum().to_string())
    print(frame[["rows", "rows_differing"]].sum().to_string())
    raise typer.Exit(int(frame["rows_differing"].sum() > 0))


if __name__ == "__main__":
    typer.run(main)
