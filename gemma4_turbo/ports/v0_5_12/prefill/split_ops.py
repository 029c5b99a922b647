"""Operators at which SGLang cuts what Dynamo traced into piecewise CUDA graphs."""

from __future__ import annotations


def cut_graphs_at(names: tuple[str, ...]) -> None:
    """Piecewise graphs that SGLang makes from here on are cut at these operators too."""
    from sglang.srt.compilation.compilation_config import SPLIT_OPS

    SPLIT_OPS.extend(name for name in names if name not in SPLIT_OPS)


def cut_graphs_no_more_at(names: tuple[str, ...]) -> None:
    """Graphs that exist go on calling the operators."""
    from sglang.srt.compilation.compilation_config import SPLIT_OPS

    SPLIT_OPS[:] = [name for name in SPLIT_OPS if name not in names]
