"""Which of SGLang's processes compute a layer together, for `gemma4_turbo.runtime.ranks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma4_turbo.runtime import ranks

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_turbo.ports.any.model_protocols import Group


def load(tp_group: Callable[[], Group]) -> None:
    """Tell it. While a patch is built, never in traced code.

    ``tp_group``: SGLang's group of tensor parallelism, as the line has it.
    """
    ranks.told_by(lambda: _group(tp_group))


def gpus() -> int:
    """Of tensor parallelism, which wait for each other inside a layer."""
    from sglang.srt.distributed import parallel_state  # later packages do not hand its getters on

    return int(parallel_state.get_tensor_model_parallel_world_size())


def through() -> type[Exception] | tuple[type[Exception], ...]:
    """What a call whose sums over GPUs have begun must raise as it is, for a `Fallback`.

    One GPU alone must not begin anew: the others wait for its part, and would take a sum of the second try
    for one of the first. What ends SGLang's process ends the server; what hangs ends it later, or not.
    """
    try:
        return Exception if gpus() > 1 else ()
    except (AssertionError, RuntimeError, ValueError):  # before a server has made the group
        return ()


def _group(tp_group: Callable[[], Group]) -> ranks.Group | None:
    """Of tensor parallelism, or None: one process, none yet, or batches of their own (DP attention)."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled

    try:
        found = tp_group()
    except (AssertionError, RuntimeError, ValueError):  # before a server has made it
        return None
    if found.world_size == 1 or is_dp_attention_enabled():
        return None
    name = "-".join(str(rank) for rank in found.ranks)
    return ranks.Group(name, found.rank_in_group, found.world_size)
