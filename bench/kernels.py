"""Kernels against the stock code they replace, one row of a CSV per measurement.

    python bench/kernels.py router

Times are those of the kernels on the GPU (torch profiler, medians, summed over all launches of one
call) and of a call's share of a replayed CUDA graph, which has the gaps between launches in it.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gemma4_turbo import report

Call = Callable[[], object]


def kernel_us(call: Call, calls: int = 40) -> tuple[float, int]:
    """Microseconds of GPU work and number of launches of one call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.device_time)
    launches = sum(len(times) for times in found.values())
    return sum(median(times) * len(times) / calls for times in found.values()), round(
        launches / calls
    )


def graph_us(call: Call, calls: int = 50, replays: int = 21) -> float:
    """Microseconds per call inside a replayed CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return median(times[1:])


def router_cases() -> list[tuple[str, int, Call, Call]]:
    """(case, tokens, fused, stock's own closure) for 26B-A4B's router: 128 experts, top-8."""
    from sglang.srt.models.gemma4_causal import Gemma4MoE

    from gemma4_turbo.kernels.router import fused_routing
    from gemma4_turbo.patches.router import stock_routing

    construct: Any = Gemma4MoE.__init__
    cases: list[tuple[str, int, Call, Call]] = []
    for dtype in (torch.bfloat16, torch.float32):
        scale = torch.rand(128, device="cuda").to(torch.bfloat16) + 0.5
        stock = stock_routing(getattr(construct, "__wrapped__", construct), scale)
        for tokens in (1, 8, 32, 64, 256, 1024, 4096, 16384):
            x = torch.randn(tokens, 128, device="cuda").to(dtype)
            cases.append(
                (
                    str(dtype).removeprefix("torch."),
                    tokens,
                    lambda x=x, scale=scale: fused_routing(x, scale, 8),
                    lambda x=x, stock=stock: stock(x, x, 8, True),
                )
            )
    return cases


CASES = {"router": router_cases}


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Kernel time over tokens, fused and stock, a panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(frame.groupby("case"))
    figure, axes = plt.subplots(1, len(cases), figsize=(5 * len(cases), 4), squeeze=False)
    for panel, (case, part) in zip(axes[0], cases, strict=True):
        panel.loglog(part["tokens"], part["stock_us"], "o-", label="stock")
        panel.loglog(part["tokens"], part["fused_us"], "o-", label="fused")
        panel.set(title=f"{frame.iloc[0]['kernel']}, {case}", xlabel="tokens", ylabel="us")
        panel.legend()
    figure.suptitle(frame.iloc[0]["gpu"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@torch.no_grad()
def main(
    kernel: Annotated[str, typer.Argument(help=" | ".join(CASES))] = "router",
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-kernels.csv"),
) -> None:
    """Fused against stock."""
    if kernel not in CASES:
        raise typer.BadParameter(f"choose from {', '.join(CASES)}", param_hint="kernel")
    if not torch.cuda.is_available():
        raise SystemExit("bench/kernels.py: needs a CUDA device")
    base = {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": report.device(),
        **report.versions(),
        "kernel": kernel,
    }
    rows = []
    for case, tokens, fused, stock in track(CASES[kernel](), description=kernel):
        fused_us, fused_launches = kernel_us(fused)
        stock_us, stock_launches = kernel_us(stock)
        rows.append(
            {
                **base,
                "case": case,
                "tokens": tokens,
                "fused_us": fused_us,
                "stock_us": stock_us,
                "fused_launches": fused_launches,
                "stock_launches": stock_launches,
                "fused_graph_us": graph_us(fused),
                "stock_graph_us": graph_us(stock),
            }
        )
    frame = pd.DataFrame(rows)
    frame["ratio"] = frame["fused_us"] / frame["stock_us"]
    frame.to_csv(out, mode="a", header=not out.exists(), index=False)
    plot(frame, out.with_suffix(".png"))
    shown = ["case", "tokens", "fused_us", "stock_us", "ratio", "fused_launches", "stock_launches"]
    print(frame[[*shown, "fused_graph_us", "stock_graph_us"]].round(2).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
