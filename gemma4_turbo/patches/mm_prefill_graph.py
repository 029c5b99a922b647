"""`mm_prefill_graph`: piecewise CUDA graphs for the language model of models that take pictures.

Stock records piecewise graphs of prefill for text-only models and switches them off for every
multimodal one. This lifts that one rule where the model is known to come out right; all of SGLang's
other rules stand. The vision encoder, the embeddings and the image masks run before the graphs, as
without them.

A graph reads its inputs where they lay when it was recorded. Of Gemma 4's, the embeddings lie in a
buffer of SGLang's runner. The positions do as well, but the model adds one to them in place; the
per-layer inputs are made anew at every step. Both are copied into buffers that stay, and the
runner's positions are put back.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo import states
from gemma4_turbo.checks import Check

if TYPE_CHECKING:
    from gemma4_turbo.patching import PatchRun
    from gemma4_turbo.swap import Swap

logger = logging.getLogger("gemma4_turbo")

TARGET = "sglang.srt.server_args:ServerArgs._handle_piecewise_cuda_graph"
# Replaced when the first of these has been imported, which is long after the server's arguments were
# read. Those that are half imported as we come are missed: never all of them.
ROUTINE = "sglang.srt.managers.mm_utils:general_mm_embed_routine"
OCCASIONS = (
    "sglang.srt.managers.mm_utils",
    "sglang.srt.models.gemma4_mm",
    "sglang.srt.model_executor.model_runner",
)
ARCHITECTURE = "Gemma4ForConditionalGeneration"
LANGUAGE_MODEL = "Gemma4TextModel"
Function = Callable[..., Any]


class _Late:
    """The replacement of `ROUTINE`, if it is in."""

    run: PatchRun | None = None
    swap: Swap | None = None


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The decision on the server's arguments; what the graphs need comes with its module."""
    import wrapt

    decide = stock[TARGET]
    module = sys.modules.get(OCCASIONS[0])
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _replace_routine(run)
    for name in OCCASIONS:  # at once for those that are there, also by half: nothing to do then
        wrapt.register_post_import_hook(_on_import, name)
    _Late.run = run

    def _handle_piecewise_cuda_graph(self: Any) -> None:
        if self.enforce_piecewise_cuda_graph or self.disable_piecewise_cuda_graph:
            run.declined("piecewise CUDA graphs were asked for or refused on the command line")
            return decide(self)  # type: ignore[no-any-return]
        try:
            reason = refusal(self)
        except Exception as error:  # stock's decision is always there
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            run.declined(reason)
            return decide(self)  # type: ignore[no-any-return]
        config = self.get_model_config()
        config.is_multimodal = False  # the one rule that is lifted
        try:
            decide(self)
        finally:
            config.is_multimodal = True
        if self.disable_piecewise_cuda_graph:
            run.declined("another of SGLang's rules switches piecewise CUDA graphs off")
        else:
            logger.info("gemma4_turbo: piecewise CUDA graphs for %s", ARCHITECTURE)
            run.engaged(False)
        return None

    return {TARGET: _handle_piecewise_cuda_graph}


def undo(run: PatchRun) -> None:
    """Stock's routine again. Graphs that exist keep what they recorded."""
    _Late.run = None
    if _Late.swap is not None:
        _Late.swap.restore()
        _Late.swap = None


def refusal(arguments: Any) -> str | None:
    """Why stock's rule stays, or None."""
    config = arguments.get_model_config()
    architectures = getattr(config.hf_config, "architectures", None) or []
    if ARCHITECTURE not in architectures:
        return f"the model is {', '.join(architectures) or 'unknown'}"
    if not config.is_multimodal:
        return "the model is served without its encoders"
    if arguments.enable_breakable_cuda_graph:
        return "breakable CUDA graphs"
    if arguments.enable_mixed_chunk:
        return "mixed chunks: a graph would take them for prefill alone and mask their images"
    if arguments.speculative_algorithm is not None:
        return "speculative decoding, whose prefill SGLang never runs in these graphs"
    for given in (arguments.attention_backend, arguments.prefill_attention_backend):
        if given not in (None, "triton"):
            return f"attention backend {given}"
    return unproven(config.hf_text_config)


def unproven(text: Any) -> str | None:
    """Why this language model was not shown to come out right, or None."""
    if getattr(text, "hidden_size_per_layer_input", 0) or getattr(text, "num_kv_shared_layers", 0):
        return "E2B and E4B were not shown to come out right"
    if not (getattr(text, "num_experts", 0) or 0) > 0:
        return "dense models were not shown to come out right"
    return None


# -- what a graph reads ----------------------------------------------------------------------------


class Inputs:
    """Buffers at one address for as long as the language model lives."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A copy of ``value`` in the buffer of that name, at the front of it."""
        buffer = self._buffers.get(name)
        if buffer is None:
            with torch.inference_mode(False):  # to be written to within that mode and without
                buffer = torch.empty(
                    (most_tokens(), *value.shape[1:]), dtype=value.dtype, device=value.device
                )
            self._buffers[name] = buffer
        if len(value) > len(buffer):
            raise ValueError(f"{len(value)} tokens do not fit into a graph of {len(buffer)}")
        return buffer[: len(value)].copy_(value)


_inputs: weakref.WeakKeyDictionary[Any, Inputs] = weakref.WeakKeyDictionary()


def most_tokens() -> int:
    """Tokens of the largest graph."""
    from sglang.srt.server_args import get_global_server_args

    return int(max(get_global_server_args().piecewise_cuda_graph_tokens))


def routine(run: PatchRun, stock: Function) -> Function:
    """What replaces ``general_mm_embed_routine``."""
    from sglang.srt.compilation.piecewise_context_manager import is_in_piecewise_cuda_graph

    def general_mm_embed_routine(
        input_ids: torch.Tensor,
        forward_batch: Any,
        language_model: Any,
        *others: Any,
        **kwargs: Any,
    ) -> Any:
        positions = kwargs.get("positions")
        if (
            positions is None
            or torch.compiler.is_compiling()
            or not is_in_piecewise_cuda_graph()
            or type(language_model).__name__ != LANGUAGE_MODEL
        ):
            return stock(input_ids, forward_batch, language_model, *others, **kwargs)
        kept = _inputs.setdefault(language_model, Inputs())
        kwargs["positions"] = kept.keep("positions", positions)
        positions.sub_(1)  # the model has just added one
        per_layer = kwargs.get("per_layer_inputs")
        if per_layer is not None:
            kwargs["per_layer_inputs"] = kept.keep("per_layer_inputs", per_layer)
        run.engaged(False)
        return stock(input_ids, forward_batch, language_model, *others, **kwargs)

    return general_mm_embed_routine


def _replace_routine(run: PatchRun) -> None:
    """Put `routine` in. `NotStockError` if somebody else's is there."""
    from gemma4_turbo import fingerprints
    from gemma4_turbo.swap import Swap

    swap = Swap(ROUTINE)
    node: Any = fingerprints.Definitions(fingerprints.installed_source).node(ROUTINE)
    swap.require_stock(node.lineno)
    swap.install(routine(run, swap.function))
    _Late.swap = swap


def _on_import(module: Any) -> None:
    """Called by wrapt for each of `OCCASIONS`, and again for every `build`."""
    if _Late.run is None or _Late.swap is not None:
        return
    try:
        _replace_routine(_Late.run)
    except Exception as error:  # never into SGLang's import
        _Late.run.set(states.CONFLICT, str(error))


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing: no arithmetic."""
    return []
