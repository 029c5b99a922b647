"""`mm_prefill_graph`: what is asked, kept and said of a language model's prefill graphs in every line."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.runtime import graphs, hooks
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ModelConfig

LANGUAGE_MODEL = ("sglang.srt.models.gemma4_causal", "Gemma4TextModel")
MOVED = "a weight update put other parameters in the place of those in the graphs"
# Without the cut a long prompt would lose more than a short one gains.
NO_CUT = "`yoco` saves more, which cuts nothing in these graphs without `yoco_piecewise`"
NO_SHARED_KV = "KV-shared layers run in these graphs with `optional_kv` only"


# -- which servers get them ------------------------------------------------------------------------


class Arguments(Protocol):
    """What a line calls the server's arguments, while they are decided upon."""

    model_impl: str
    chunked_prefill_size: int | None
    attention_backend: str | None
    prefill_attention_backend: str | None


def unfit(
    arguments: Arguments,
    config: ModelConfig,
    sized: bool,
    server_unfit: Callable[[], str | None],
    shared_kv_unfit: Callable[[], str | None],
) -> str | None:
    """Why a Gemma 4 that takes pictures is left to stock's rule, or None.

    Args:
        arguments: of the server.
        config: of the model.
        sized: whether the size of the largest graph was given.
        server_unfit: the line's own reasons.
        shared_kv_unfit: and those of models whose layers share KV.
    """
    if not config.is_multimodal:
        return "the model is served without its encoders"
    if arguments.model_impl not in ("auto", "sglang"):
        return f"another implementation of the model: {arguments.model_impl}"
    if arguments.chunked_prefill_size == -1 and not sized:
        return "prompts are not cut into chunks, whose size would be that of the largest graph"
    reason = server_unfit()
    if reason is not None:
        return reason
    for given in (arguments.attention_backend, arguments.prefill_attention_backend):
        if given not in (None, "triton"):
            return f"attention backend {given}"
    if getattr(config.hf_text_config, "num_kv_shared_layers", 0):
        return shared_kv_unfit()
    return None


def shared_kv_unfit(works: Callable[[str], bool]) -> str | None:
    """Why KV-shared layers (E2B, E4B) keep a server out of these graphs, or None.

    Args:
        works: whether a patch of this name does its work, or will.
    """
    if not works("optional_kv"):
        return NO_SHARED_KV
    return NO_CUT if works("yoco") and not works("yoco_piecewise") else None


# -- where they are recorded -----------------------------------------------------------------------


class Recorded(NamedTuple):
    """The graphs of a language model."""

    runner: weakref.ref[Any]  # SGLang's ModelRunner
    watched: graphs.Watched  # weights that they read
    inner: hooks.Watched  # every module inside the language model


recorded: weakref.WeakKeyDictionary[Any, Recorded] = weakref.WeakKeyDictionary()
"""By language model."""

recording: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()
"""By language model that is being recorded with its per-layer inputs: the forward that sees to it."""


def watch(runner: Any) -> None:
    """Note that a model runner's language model has graphs, and what they read.

    SGLang writes new weights over the old ones, or, where it works on them after loading, puts new
    parameters in their place: any of them, as a checkpoint may have quantised only some. Tokens are
    looked up before the graphs, in the two embeddings.
    """
    model = runner.model.language_model
    parts = list(model.children())
    before = model.embed_tokens, model.embed_tokens_per_layer
    watched = graphs.Watched(part for part in parts if all(part is not each for each in before))
    recorded[model] = Recorded(weakref.ref(runner), watched, hooks.Watched(parts))


def forget_all(forget: Callable[[Any], None]) -> None:
    """``forget`` of every model runner that has graphs; of one that is gone it gets None."""
    for graphs_of in list(recorded.values()):
        forget(graphs_of.runner())


def memory_unfit(runner: Any, least: float) -> str | None:
    """Why the graphs that were recorded take too much, or None. ``least``: GB of memory beside them."""
    from sglang.srt.utils import common

    left = common.get_available_gpu_memory(runner.device, runner.gpu_id)
    if left >= least:
        return None
    return f"{left:.1f} GB of memory would be left beside the graphs, less than {least:.0f}"


def failed(run: PatchRun, error: Exception) -> str:
    """What went wrong: there are no graphs, and the server goes on."""
    reason = one_line(error)
    run.set(states.FAILED, f"prefill runs without graphs: {reason}")
    return reason


def free_memory() -> None:
    """Of what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
