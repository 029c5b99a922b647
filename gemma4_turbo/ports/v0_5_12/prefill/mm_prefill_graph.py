"""`mm_prefill_graph`: piecewise CUDA graphs for the language model of models that take pictures.

Stock records piecewise graphs of prefill for text-only models and switches them off for every
multimodal one. This lifts that one rule for Gemma 4; all of SGLang's other rules stand. The vision
encoder, the embeddings and the image masks run before the graphs, as without them.

A graph reads its inputs where they lay when it was recorded. Of Gemma 4's, the embeddings lie in a
buffer of SGLang's runner. The positions do as well, but the model adds one to them in place; the
per-layer inputs are made anew at every step. Both are copied into buffers that stay, and the
runner's positions are put back.

The server's arguments are read in another process than the one that records. There it is looked
again whether all that the graphs need is in place, and a server whose graphs cannot be recorded, or
leave too little memory, runs without them, as stock does.

Stock calls every module of the language model at every prefill. As soon as one of them has a hook,
also one that was registered when the graphs were there, the graphs are dropped.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import peer
from gemma4_turbo.ports.any import architectures
from gemma4_turbo.ports.any.prefill import mm_prefill_graph as common
from gemma4_turbo.ports.any.prefill.late_targets import LateTargets
from gemma4_turbo.ports.any.prefill.mm_prefill_graph import LANGUAGE_MODEL, recorded
from gemma4_turbo.ports.any.sglang_types import is_a
from gemma4_turbo.runtime import custom_ops, graphs, hooks
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, ServerArgs, TextModel
    from gemma4_turbo.ports.v0_5_12.protocols import MultimodalRunner

logger = logging.getLogger("gemma4_turbo")

TARGET = "sglang.srt.server_args:ServerArgs._handle_piecewise_cuda_graph"
# Both are replaced when their modules have been imported, long after the server's arguments were read.
ROUTINE = "sglang.srt.managers.mm_utils:general_mm_embed_routine"
START = "sglang.srt.model_executor.model_runner:ModelRunner.init_piecewise_cuda_graphs"
OCCASIONS = (
    "sglang.srt.managers.mm_utils",
    "sglang.srt.models.gemma4_mm",
    "sglang.srt.model_executor.model_runner",
)
ARCHITECTURE = "Gemma4ForConditionalGeneration"
MODEL = ("sglang.srt.models.gemma4_mm", ARCHITECTURE)
LEFT_GB = 2.0  # of memory, beside the graphs: for pictures, and prefills that run without one
Function = Callable[..., Any]

OFF = {
    "disable_cuda_graph": "CUDA graphs are switched off",
    "enable_breakable_cuda_graph": "breakable CUDA graphs",
    "enable_mixed_chunk": "mixed chunks: a graph would take them for prefill alone and mask their "
    "images",
    "speculative_algorithm": "speculative decoding, whose prefill SGLang never runs in these graphs",
    "enable_return_hidden_states": "hidden states are returned, which these graphs never run for",
    "enable_deterministic_inference": "deterministic inference",
    "rl_on_policy_target": "deterministic inference, for reinforcement learning",
    "forward_hooks": "hooks see what the layers compute",
    "debug_tensor_dump_output_folder": "tensors are dumped, which is for eager steps",
    "msprobe_dump_config": "tensors are dumped, which is for eager steps",
    "enable_layerwise_nvtx_marker": "markers of every layer, which cannot be traced",
}
"""Arguments of the server, and what each of them means. Stock needs no rule for them: no model that
takes pictures has these graphs."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The decision on the server's arguments; what the graphs need comes with its modules."""
    decide = stock[TARGET]
    LATE.put_in(run)

    def _handle_piecewise_cuda_graph(self: ServerArgs) -> None:
        if self.enforce_piecewise_cuda_graph or self.disable_piecewise_cuda_graph:
            run.declined("piecewise CUDA graphs were asked for or refused on the command line")
            return decide(self)  # type: ignore[no-any-return]
        try:
            reason = unfit(self)
        except Exception as error:  # stock's decision is always there
            reason = one_line(error)
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
        return None

    return {TARGET: _handle_piecewise_cuda_graph}


def undo(run: PatchRun) -> None:
    """Stock's functions again, and its eager prefill: a graph would read positions of before."""
    common.forget_all(_forget_graphs)
    LATE.take_out()


# -- which servers get them ------------------------------------------------------------------------


def unfit(arguments: ServerArgs) -> str | None:
    """Why stock's rule stays, or None."""
    config = arguments.get_model_config()
    sizes = arguments.piecewise_cuda_graph_max_tokens, arguments.piecewise_cuda_graph_tokens

    def own_unfit() -> str | None:
        reason = server_unfit(arguments)
        if reason is None and arguments.tp_size > 1:
            return "tensor parallelism: its tokens were not compared with stock's"
        return reason

    return architectures.unfit(config, (ARCHITECTURE,)) or common.unfit(
        arguments,
        config,
        sizes != (None, None),
        own_unfit,
        functools.partial(common.shared_kv_unfit, _on),
    )


def server_unfit(arguments: ServerArgs) -> str | None:
    """Those of the reasons that SGLang may still bring about after the decision."""
    from sglang.srt.utils.common import _ENABLE_TORCH_INFERENCE_MODE

    if _ENABLE_TORCH_INFERENCE_MODE:
        return "torch.inference_mode: SGLang traces without it, and would have to trace again"
    return graphs.argument_unfit(arguments, OFF)


def _on(name: str) -> bool:
    """Whether a patch is switched on and fits this SGLang, imported or not."""
    return peer(name).will_run()


# -- where they are recorded -----------------------------------------------------------------------


def start(run: PatchRun, stock: Function) -> Function:
    """What replaces ``ModelRunner.init_piecewise_cuda_graphs``."""

    def init_piecewise_cuda_graphs(self: MultimodalRunner) -> None:
        arguments = self.server_args
        if self.is_draft_worker:  # a draft model has no graphs of ours
            return stock(self)  # type: ignore[no-any-return]
        elsewhere = stocks(self)
        if elsewhere is not None:
            run.declined(elsewhere)
            return stock(self)  # type: ignore[no-any-return]
        enforced = arguments.enforce_piecewise_cuda_graph
        try:
            reason = None if enforced else process_unfit(self)
        except Exception as error:
            reason = common.failed(run, error)
        if reason is None:
            reason = _record(run, self, stock, enforced)
            if reason is None:
                if self.piecewise_cuda_graph_runner is None:
                    run.declined("SGLang records no graphs of prefill here")
                else:
                    _watch(run, self)
                    run.engaged(True)
                return None
            _forget_graphs(self)
        run.declined(reason)
        self.piecewise_cuda_graph_runner = None
        arguments.disable_piecewise_cuda_graph = True
        return None

    return init_piecewise_cuda_graphs


def stocks(runner: MultimodalRunner) -> str | None:
    """Why no graphs of ours are about to be recorded, or None."""
    if not is_a(runner.model, MODEL):
        return f"the model is a {type(runner.model).__name__}"
    if not runner.is_multimodal:
        return "the model is served without its encoders"
    if runner.server_args.disable_piecewise_cuda_graph:
        return "piecewise CUDA graphs are switched off"
    return None


def _record(run: PatchRun, runner: MultimodalRunner, stock: Function, enforced: bool) -> str | None:
    """Why there are to be no graphs, or None: they are there."""
    try:
        stock(runner)
    except Exception as error:
        if enforced or run.is_strict():  # a server without them is not wanted
            raise
        return common.failed(run, error)
    return None if enforced else memory_unfit(runner)


def process_unfit(runner: MultimodalRunner) -> str | None:
    """What keeps this process from recording, though the arguments were fine, or None."""
    reason = server_unfit(runner.server_args)
    if reason is not None:
        return reason
    if not LATE.in_place(ROUTINE):
        return f"{ROUTINE} is not ours in the process that records"
    model = runner.model
    if graphs.Watched([model.language_model]).hooked():
        return hooks.HOOKED.format("a layer")
    shares = getattr(model.config.text_config, "num_kv_shared_layers", 0)
    if shares and peer("optional_kv").state != states.ACTIVE:
        return f"KV-shared layers: `optional_kv` is {peer('optional_kv').state}"
    return None


def _watch(run: PatchRun, runner: MultimodalRunner) -> None:
    """From here on a graph that would read old weights, or pass hooks by, does not run."""
    common.watch(runner)
    model = runner.model.language_model
    made = runner.piecewise_cuda_graph_runner
    if hasattr(made, "can_run"):  # asked before SGLang pads the batch
        made.can_run = functools.partial(_can_run, run, weakref.ref(model), made.can_run)


def _can_run(
    run: PatchRun,
    model: weakref.ref[TextModel],
    can_run: Callable[[ForwardBatch], bool],
    forward_batch: ForwardBatch,
) -> bool:
    """Stock's answer, unless the graphs have just been dropped."""
    if not can_run(forward_batch):
        run.declined("SGLang runs this prefill without a graph")
        return False
    return not _dropped(run, cast("TextModel", model()))  # its runner holds it


def _dropped(run: PatchRun, model: TextModel) -> bool:
    """Whether the graphs of a language model had to go: this prefill is to run eagerly as well."""
    graphs_of = recorded.get(model)
    if graphs_of is None:
        return False
    reason = None
    if graphs_of.watched.moved():
        reason = common.MOVED
    # Its own forward is SGLang's switch to what was compiled.
    elif model._forward_hooks or model._forward_pre_hooks or graphs_of.inner.hooked():
        reason = hooks.HOOKED.format("the language model")
    if reason is None:
        return False
    run.declined(reason)
    _forget_graphs(graphs_of.runner())
    return True


def memory_unfit(runner: MultimodalRunner) -> str | None:
    """Why the graphs that were recorded take too much, or None."""
    if runner.piecewise_cuda_graph_runner is None:
        return None
    return common.memory_unfit(runner, LEFT_GB)


def _forget_graphs(runner: MultimodalRunner | None) -> None:
    """No graph, no mark that a recording is under way, and the memory free again."""
    from sglang.srt.compilation import piecewise_context_manager as context

    if runner is None:
        return
    runner.piecewise_cuda_graph_runner = None
    context._in_pcg_torch_compile = False
    context._pcg_capture_stream = None
    graphs.settle()
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a graph may be running
    model = runner.model.language_model
    vars(model).pop("forward", None)  # SGLang's switch to what was compiled, which holds the graphs
    torch._dynamo.eval_frame.remove_from_cache(type(model).forward.__code__)
    _inputs.pop(model, None)
    recorded.pop(model, None)
    common.free_memory()


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


_inputs: weakref.WeakKeyDictionary[TextModel, Inputs] = weakref.WeakKeyDictionary()


def most_tokens() -> int:
    """Tokens of the largest graph."""
    from sglang.srt.server_args import get_global_server_args

    return int(max(get_global_server_args().piecewise_cuda_graph_tokens))


def routine(run: PatchRun, stock: Function) -> Function:
    """What replaces ``general_mm_embed_routine``."""
    from sglang.srt.compilation.piecewise_context_manager import is_in_piecewise_cuda_graph

    def general_mm_embed_routine(
        input_ids: torch.Tensor,
        forward_batch: ForwardBatch,
        language_model: TextModel,
        *others: object,
        **kwargs: Any,
    ) -> object:
        positions = kwargs.get("positions")
        if (
            positions is None
            or torch.compiler.is_compiling()
            or not is_in_piecewise_cuda_graph()
            or not is_a(language_model, LANGUAGE_MODEL)
            or _dropped(run, language_model)
        ):
            return stock(input_ids, forward_batch, language_model, *others, **kwargs)
        kept = _inputs.setdefault(language_model, Inputs())
        theirs = kwargs.get("per_layer_inputs")
        ours = {}
        try:
            ours["positions"] = kept.keep("positions", positions)
            if theirs is not None:
                ours["per_layer_inputs"] = kept.keep("per_layer_inputs", theirs)
        except Exception as error:
            graphs_of = recorded.get(language_model)
            if graphs_of is None:  # while they are recorded: there are to be none
                raise
            common.failed(run, error)
            _forget_graphs(graphs_of.runner())
            return stock(input_ids, forward_batch, language_model, *others, **kwargs)
        positions.sub_(1)  # the model has just added one
        found = stock(input_ids, forward_batch, language_model, *others, **kwargs | ours)
        run.engaged(custom_ops.capturing())
        return found

    return general_mm_embed_routine


LATE = LateTargets({ROUTINE: routine, START: start}, OCCASIONS)
