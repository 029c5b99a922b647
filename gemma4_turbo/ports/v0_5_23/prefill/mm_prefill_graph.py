"""`mm_prefill_graph`: breakable CUDA graphs of prefill for the language model of models that take pictures.

Stock records prefill in graphs that end at each attention, and switches them off for the multimodal
models that it has not tried. This lifts that one rule for Gemma 4; all of SGLang's other rules stand.
Vision encoder, embeddings and image masks run before the graphs, as without them.

What stock would record of Gemma 4 does not run: it gives the language model token ids and embeddings
both, which that refuses, and no per-layer inputs (E2B, E4B), which its graphs would not see. So while
stock records, the language model takes the embeddings, and per-layer inputs out of a buffer that
stays; where stock copies a prefill's embeddings to the graph's, its per-layer inputs are copied too.
They are of the token ids with pictures' placeholders replaced, which the model looks up before the
graphs. Their projection is recorded.

The layers of E2B and E4B that share KV come in by `optional_kv`, which is told whose language model is
recorded with per-layer inputs (`common.recording`). `yoco_piecewise` cuts them off as it does for a
text-only model.

Several GPUs: a rank whose capture fails (its memory is not that of the others) leaves the others in
SGLang's barrier, and one that goes without graphs would reduce other sizes than they do. No rank can
be told, so there are none.

The positions lie in a buffer of stock's. The model adds one to them in place, where the graph reads
them; told to make new ones (``SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION``), it would be read by none.

The server's arguments are read in another process than the one that records. There it is looked again
whether all that the graphs need is in place, and a server whose graphs cannot be recorded, or leave too
little memory, runs without them, as stock does.

Stock calls every module of the language model at every prefill. As soon as one of them has a hook,
also one that was registered when the graphs were there, the graphs are dropped.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import peer
from gemma4_turbo.ports.any import architectures
from gemma4_turbo.ports.any.prefill import mm_prefill_graph as common
from gemma4_turbo.ports.any.prefill.late_targets import LateTargets
from gemma4_turbo.ports.any.prefill.mm_prefill_graph import LANGUAGE_MODEL, recorded
from gemma4_turbo.ports.any.sglang_types import is_a
from gemma4_turbo.runtime import graphs, hooks
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import (
        EagerRunner,
        GraphCapture,
        GraphedBatch,
        GraphedRunner,
        GraphedTextModel,
        PrefillCudaGraphRunner,
        ResolvingArguments,
    )

logger = logging.getLogger("gemma4_turbo")

_HOOK = "sglang.srt.arg_groups.cuda_graph_hook"
_SETUP = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
TARGET = f"{_HOOK}:disable_breakable_cudagraph_if_incompatible"
RECORD = f"{_SETUP}:capture_prefill_graph"
OCCASIONS = (_SETUP, "sglang.srt.model_executor.model_runner")
MODELS = {
    "Gemma4ForConditionalGeneration": "sglang.srt.models.gemma4_mm",
    "Gemma4UnifiedForConditionalGeneration": "sglang.srt.models.gemma4_unified",
}
BACKEND = ("sglang.srt.layers.attention.triton_backend", "TritonAttnBackend")
# GB of memory beside the graphs: for decode's, which come after, pictures, and eager prefills.
LEFT_GB = 3.0
LIVE = "per_layer_inputs"
Function = Callable[..., Any]

OFF = {
    "enable_mixed_chunk": "mixed chunks: a graph would take them for prefill alone and mask their "
    "images",
    "speculative_algorithm": "speculative decoding: its tokens were not compared with stock's",
    "enable_lora": "LoRA: its tokens were not compared with stock's",
    "lora_paths": "LoRA: its tokens were not compared with stock's",
    "enable_return_hidden_states": "hidden states are returned: they were not compared with stock's",
    "enable_deterministic_inference": "deterministic inference",
    "rl_on_policy_target": "deterministic inference, for reinforcement learning",
    "enable_dp_attention": "DP attention: its ranks agree on a graph for each step",
    "enable_two_batch_overlap": "two batches that overlap",
    "enable_mis": "multi-item scoring: it was not compared with stock's",
    "enable_pdmux": "prefill and decode run on two streams",
    "enable_memory_saver": "the memory saver takes memory away from graphs",
    "enable_torch_compile": "torch.compile",
    "debug_cuda_graph": "SGLang debugs its CUDA graphs",
    "language_only": "the encoders are in another process",
    "encoder_only": "the language model is in another process",
    "forward_hooks": "hooks see what the layers compute",
    "debug_tensor_dump_output_folder": "tensors are dumped, which is for eager steps",
    "msprobe_dump_config": "tensors are dumped, which is for eager steps",
    "enable_layerwise_nvtx_marker": "markers of every layer, which graphs do not show",
}
"""Arguments of the server, and what each of them means. Stock needs no rule for most of them: no Gemma 4
that takes pictures has these graphs."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The decision on the server's arguments; what records comes with its module."""
    decide = stock[TARGET]
    LATE.put_in(run)

    def disable_breakable_cudagraph_if_incompatible(server_args: object) -> None:
        from sglang.srt.arg_groups import overrides

        try:
            reason = unfit(server_args)
        except Exception as error:  # stock's decision is always there
            reason = one_line(error)
        if reason is not None:
            run.declined(reason)
            decide(server_args)
            return
        config = overrides.model_config_of(server_args)
        config.is_multimodal_breakable_cuda_graph_supported = True  # the one rule that is lifted
        try:
            decide(server_args)
        finally:
            config.is_multimodal_breakable_cuda_graph_supported = False
        phase = overrides.resolving_view(server_args).cuda_graph_config.prefill
        if phase.backend != overrides.Backend.BREAKABLE:
            run.declined("another of SGLang's rules switches CUDA graphs of prefill off")
        else:
            logger.info(
                "gemma4_turbo: breakable CUDA graphs of prefill for a model that takes pictures"
            )

    return {TARGET: disable_breakable_cudagraph_if_incompatible}


def undo(run: PatchRun) -> None:
    """Stock's functions again, and its eager prefill."""
    common.forget_all(_forget_graphs)
    LATE.take_out()


# -- which servers get them ------------------------------------------------------------------------


def unfit(server_args: object) -> str | None:
    """Why stock's rule stays, or None. Asked while SGLang makes up its mind about the arguments."""
    from sglang.srt.arg_groups import overrides

    arguments: ResolvingArguments = overrides.resolving_view(server_args)
    config = overrides.model_config_of(server_args)
    reason = architectures.unfit(config, MODELS, alone=True)
    if reason is not None:
        return reason
    if config.is_multimodal and config.is_multimodal_breakable_cuda_graph_supported:
        return "SGLang has these graphs for the model by itself"
    prefill = arguments.cuda_graph_config.prefill
    sized = bool(prefill.max_bs or prefill.bs)
    return common.unfit(
        arguments,
        config,
        sized,
        functools.partial(server_unfit, arguments),
        functools.partial(common.shared_kv_unfit, lambda name: peer(name).will_run()),
    )


def server_unfit(arguments: ResolvingArguments) -> str | None:
    """Those of the reasons that SGLang may still bring about after the decision."""
    if moved_positions():
        return (
            "SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION: a graph would read positions one too low"
        )
    reason = graphs.argument_unfit(arguments, OFF)
    if reason is not None:
        return reason
    if arguments.disaggregation_mode != "null":
        return "disaggregation: prefill and decode are in two processes"
    if arguments.tp_size > 1 or arguments.pp_size > 1:
        return "several GPUs: where one fails to record, the others would wait for it"
    return None


def moved_positions() -> bool:
    """Whether the model makes new positions instead of changing those that it is given."""
    from sglang.srt.environ import envs

    return bool(envs.SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION.get())


# -- where they are recorded -----------------------------------------------------------------------


def record(run: PatchRun, stock: Function) -> Function:
    """What replaces ``capture_prefill_graph``."""

    def capture_prefill_graph(
        *,
        model_runner: GraphedRunner,
        eager_runner: EagerRunner,
        force_for_draft_worker: bool = False,
    ) -> GraphCapture:
        theirs = functools.partial(
            stock,
            model_runner=model_runner,
            eager_runner=eager_runner,
            force_for_draft_worker=force_for_draft_worker,
        )
        if model_runner.is_draft_worker:  # a draft model has no graphs of ours
            return theirs()  # type: ignore[no-any-return]
        try:
            elsewhere = stocks(model_runner)
        except Exception as error:  # stock's recording is always there
            elsewhere = one_line(error)
        if elsewhere is not None:
            run.declined(elsewhere)
            return theirs()  # type: ignore[no-any-return]
        asked_for = forced(model_runner.server_args)
        try:
            reason = model_unfit(model_runner) or (
                None if asked_for else process_unfit(model_runner)
            )
        except Exception as error:
            reason = common.failed(run, error)
        if reason is not None and asked_for:  # as stock, which ends here
            run.declined(reason)
            return theirs()  # type: ignore[no-any-return]
        if reason is None:
            made, reason = _record(run, model_runner, theirs, asked_for)
            if made is not None:
                return made
        run.declined(reason or "")
        return _without(theirs)

    return capture_prefill_graph


def stocks(model_runner: GraphedRunner) -> str | None:
    """Why no graphs of ours are about to be recorded, or None.

    Where the user chose how prefill is recorded, and with pipeline parallelism, the decision on the
    server's arguments was not asked for: nobody has said it yet.
    """
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.runtime_context import get_exec

    if not _takes_pictures(model_runner.model):
        return f"the model is a {type(model_runner.model).__name__}"
    if not model_runner.model_config.is_multimodal:
        return "the model is served without its encoders"
    chosen = get_exec().graph.cuda_graph_config.prefill.backend
    if chosen != Backend.BREAKABLE:
        return f"CUDA graphs of prefill are {chosen}"
    return None


def forced(server_args: object) -> bool:
    """Whether the user chose how prefill is recorded: then stock asks none of its rules."""
    return ("prefill", "backend") in (getattr(server_args, "_cuda_graph_config_locked", None) or ())


def model_unfit(model_runner: GraphedRunner) -> str | None:
    """What a graph would compute wrongly, whoever asked for it, or None."""
    if moved_positions():
        return (
            "SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION: a graph would read positions one too low"
        )
    if not is_a(model_runner.model.language_model, LANGUAGE_MODEL):
        return f"the language model is a {type(model_runner.model.language_model).__name__}"
    if model_runner.model.language_model.pp_group.world_size > 1:
        return "the model is split over pipeline ranks"
    return None


def process_unfit(model_runner: GraphedRunner) -> str | None:
    """What keeps this process from recording, though the arguments were fine, or None."""
    from sglang.srt.arg_groups import overrides

    reason = server_unfit(overrides.resolving_view(model_runner.server_args))
    if reason is not None:
        return reason
    model = model_runner.model.language_model
    if not is_a(model_runner.attn_backend, BACKEND):
        return f"attention backend {type(model_runner.attn_backend).__name__}"
    if hooks.Watched(list(model.children())).hooked():
        return hooks.HOOKED.format("a layer")
    if "forward" in vars(model) and not _left_behind(model):
        return "the language model has a forward of its own"
    if model.layers_to_capture:
        return "hidden states of layers are captured"
    if getattr(model.config, "num_kv_shared_layers", 0):
        return common.shared_kv_unfit(lambda name: peer(name).state == states.ACTIVE)
    return None


def _record(
    run: PatchRun, model_runner: GraphedRunner, theirs: Callable[[], GraphCapture], asked_for: bool
) -> tuple[GraphCapture | None, str | None]:
    """What stock made of it, or None and why there are to be no graphs."""
    inputs = Inputs(model_runner.model.language_model)
    try:
        with inputs.as_recorded():
            made = theirs()
        runner: Any = getattr(
            made, "runner", None
        )  # where no size fits SGLang returns the eager one
        if not hasattr(runner, "_fill_input_embeds_slot"):
            return None, "SGLang records no graphs of prefill here"
        reason = "" if asked_for else common.memory_unfit(model_runner, LEFT_GB) or ""
        if not reason:
            _watch(run, model_runner, runner, inputs)
            run.engaged(True)
            return made, None
        runner.backend.cleanup()
        del made, runner
    except Exception as error:
        if asked_for or run.is_strict():  # a server without them is not wanted
            raise
        reason = common.failed(run, error)
    _settle()
    return None, reason


def _without(theirs: Callable[[], GraphCapture]) -> GraphCapture:
    """What stock returns where the server's arguments want none: its own result, made by itself."""
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.runtime_context import get_exec

    graph = get_exec().graph
    config = copy.deepcopy(graph.cuda_graph_config)
    config.prefill.backend = Backend.DISABLED
    with graph.override(cuda_graph_config=config):
        return theirs()


def _takes_pictures(model: object) -> bool:
    name = type(model).__name__
    return name in MODELS and is_a(model, (MODELS[name], name))


# -- what a graph reads ----------------------------------------------------------------------------


class Inputs:
    """What a language model is given while it is recorded, and by whom it is filled afterwards."""

    def __init__(self, model: GraphedTextModel) -> None:
        self._model = weakref.ref(model)
        self.per_layer: torch.Tensor | None = None  # for as many tokens as the largest graph has

    @contextlib.contextmanager
    def as_recorded(self) -> Iterator[None]:
        """In here the model takes embeddings where it is given token ids too, as stock's runner does."""
        model = self._model()
        assert model is not None  # its runner holds it
        theirs = model.forward

        @functools.wraps(theirs)  # its parameters are asked for by name
        def forward(
            input_ids: torch.Tensor | None,
            positions: torch.Tensor,
            forward_batch: GraphedBatch,
            input_embeds: torch.Tensor | None = None,
            **others: object,
        ) -> object:
            if input_ids is not None and input_embeds is not None:
                rows = self.rows(input_ids)
                if rows is not None:
                    others[LIVE] = rows
                input_ids = None
            return theirs(input_ids, positions, forward_batch, input_embeds=input_embeds, **others)

        before = vars(model).get("forward")
        vars(model)["forward"] = common.recording[model] = forward
        try:
            yield
        finally:
            del common.recording[model]
            if before is None:
                vars(model).pop("forward", None)
            else:
                vars(model)["forward"] = before

    def rows(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """The buffer's front for these tokens, None for a model without per-layer inputs.

        The largest graph is recorded first, after two eager runs: no capture makes the buffer.
        """
        tokens = len(input_ids)
        if self.per_layer is None:
            model = self._model()
            like = None if model is None else model.get_per_layer_inputs(input_ids[:1])
            if like is None:
                return None
            with torch.inference_mode(False):  # so that it is filled in and out of it
                self.per_layer = torch.zeros(
                    (tokens, *like.shape[1:]), dtype=like.dtype, device=like.device
                )
        if tokens > len(self.per_layer):
            raise ValueError(f"{tokens} tokens do not fit into a graph of {len(self.per_layer)}")
        return self.per_layer[:tokens]

    def fill(self, given: dict[str, Any], tokens: int) -> None:
        """Copy a prefill's per-layer inputs, out of the language model's arguments, to the graph's.

        ``tokens``: of the graph. SGLang has the model look up the padding's too; rows that it should
        leave out are zero, so that nothing of an earlier prefill is in them.
        """
        if self.per_layer is None:
            return
        live: torch.Tensor = given[LIVE]
        self.per_layer[: len(live)].copy_(live)
        self.per_layer[len(live) : tokens].zero_()


# -- while they serve ------------------------------------------------------------------------------


def _watch(
    run: PatchRun, model_runner: GraphedRunner, runner: PrefillCudaGraphRunner, inputs: Inputs
) -> None:
    """From here on graphs get what they read, and none runs that would read old weights or pass hooks by."""
    common.watch(model_runner)
    model = model_runner.model.language_model
    # On this runner alone: whatever else SGLang records goes by stock's.
    runner.can_run_graph = functools.partial(  # type: ignore[method-assign]
        _can_run, run, weakref.ref(model), runner.can_run_graph
    )
    runner._fill_input_embeds_slot = functools.partial(  # type: ignore[method-assign]
        _fill, inputs, runner._fill_input_embeds_slot
    )


def _can_run(
    run: PatchRun,
    model: weakref.ref[GraphedTextModel],
    can_run: Callable[[GraphedBatch], bool],
    forward_batch: GraphedBatch,
) -> bool:
    """Stock's answer, unless the graphs have just been dropped. Asked before the batch is padded."""
    if not can_run(forward_batch):
        run.declined("SGLang runs this prefill without a graph")
        return False
    found = model()
    if found is None or _dropped(run, found):
        return False
    run.engaged(False)
    return True


def _fill(
    inputs: Inputs, theirs: Function, args: Any, layer_kwargs: dict[str, Any], tokens: int
) -> None:
    theirs(args, layer_kwargs, tokens)
    inputs.fill(layer_kwargs, tokens)


def _dropped(run: PatchRun, model: GraphedTextModel) -> bool:
    """Whether the graphs of a language model are gone: this prefill is to run eagerly as well."""
    graphs_of = recorded.get(model)
    if graphs_of is None:
        return True
    if graphs_of.watched.moved():
        reason = common.MOVED
    # Hooks of its own run as ever: stock's replay calls it.
    elif graphs_of.inner.hooked():
        reason = hooks.HOOKED.format("the language model")
    elif moved_positions():
        reason = "SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION was set"
    else:
        return False
    run.declined(reason)
    _forget_graphs(graphs_of.runner())
    return True


def _forget_graphs(model_runner: GraphedRunner | None) -> None:
    """No graph, and the memory free again."""
    if model_runner is None:
        return
    runner: Any = model_runner.prefill_cuda_graph_runner
    model_runner.prefill_cuda_graph_runner = model_runner.eager_runner
    model = model_runner.model.language_model
    recorded.pop(model, None)
    if _left_behind(model):
        vars(model).pop("forward")
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a graph may be running
    if runner is not None and hasattr(runner, "_fill_input_embeds_slot"):
        runner.backend.cleanup()
    del runner
    _settle()


def _left_behind(model: GraphedTextModel) -> bool:
    """Whether the model's forward is what stock's replays leave there: the class's, bound."""
    method = vars(model).get("forward")
    return isinstance(method, types.MethodType) and method.__self__ is model


def _settle() -> None:
    """After graphs are gone, or a capture broke off."""
    graphs.settle()
    common.free_memory()


LATE = LateTargets({RECORD: record}, OCCASIONS)
