"""`yoco_piecewise`: the cut of `yoco` inside SGLang's piecewise CUDA graphs of prefill.

torch.compile traces the model's forward once, and SGLang splits what it traced at the operators of
attention: what lies between two of them becomes one CUDA graph per number of tokens. Here the traced
forward ends before the first KV-shared layer: one operator more stands for all that is behind,
and runs between the graphs, as attention does. It cuts the rows and runs the layers on the tail,
so that neither the graphs nor the tokens pay for them (`gemma4_turbo.ports.any.prefill.yoco_piecewise`).

Whether the operator is traced is decided once, in the eager step that SGLang runs before it compiles.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gemma4_turbo.engine import states
from gemma4_turbo.engine.run import peer
from gemma4_turbo.ports.any.prefill import yoco_cut
from gemma4_turbo.ports.any.prefill.yoco_piecewise import (
    NO_GRAPHS,
    YOCO_PIECEWISE,
    first_behind,
    rows_only,
)
from gemma4_turbo.ports.v0_5_12 import layer_loop
from gemma4_turbo.ports.v0_5_12.prefill import split_ops
from gemma4_turbo.runtime import custom_ops, graphs

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, TextModel
    from gemma4_turbo.ports.v0_5_12.protocols import ForwardContext

NAME = "yoco_piecewise"

SCHEMA = (
    "shared_kv_layers(Tensor hidden_states, Tensor? residual, Tensor? normed, "
    "Tensor? per_layer_inputs, Tensor positions, Tensor(a!) output, int model) -> ()"
)
SPLIT_NAMES = custom_ops.cut_names(SCHEMA)

# On a model: its number below, and its first KV-shared layer.
_CUT = "_gemma4_turbo_traced_cut"
_numbers = itertools.count()
_models: weakref.WeakValueDictionary[int, TextModel] = weakref.WeakValueDictionary()
_ops: dict[str, Callable[..., None]] = {}

OFF = {
    "enable_return_hidden_states": "hidden states are returned",
    "speculative_algorithm": "speculative decoding",
    "enable_mixed_chunk": "mixed chunks look like a plain prefill in these graphs",
    "enable_mis": "multi-item scoring",
    "enable_breakable_cuda_graph": "breakable CUDA graphs",
}
"""Arguments of the server, and what each of them means."""


def register() -> None:
    """The operator, and that a piecewise graph is split at it."""
    _ops["layers"] = custom_ops.register(
        NAME, SCHEMA, shared_layers, lambda *args: None, counted=False
    )
    split_ops.cut_graphs_at(SPLIT_NAMES)


def unregister() -> None:
    """No later graph is split there. Those that exist go on calling the operator."""
    split_ops.cut_graphs_no_more_at(SPLIT_NAMES)


# -- before the trace ---------------------------------------------------------------------------


def prepare(model: TextModel, batch: ForwardBatch, kwargs: dict[str, object]) -> bool:
    """Whether SGLang is about to compile ``model``, which is to be cut then: noted on it."""
    run = YOCO_PIECEWISE.run
    if run is None:
        if hasattr(model, _CUT) and _about_to_compile():  # noted before the patch was taken out
            delattr(model, _CUT)
        return False
    if not _about_to_compile():
        if batch.forward_mode.is_extend() and _none_are_made():
            run.declined(NO_GRAPHS)
        return False
    first = first_behind(run, model, batch, kwargs, unfit)
    if first is None:
        return False
    if not hasattr(model, _CUT):
        number = next(_numbers)
        _models[number] = model
        setattr(model, _CUT, (number, first))
    return True


def _about_to_compile() -> bool:
    from sglang.srt.compilation import piecewise_context_manager as context

    return context.is_in_piecewise_cuda_graph() and context.get_forward_context() is not None


def _none_are_made() -> bool:
    from sglang.srt.server_args import get_global_server_args

    return bool(get_global_server_args().disable_piecewise_cuda_graph)


def unfit(model: TextModel, batch: ForwardBatch, kwargs: dict[str, object]) -> str | None:
    """Why no cut is made inside the graphs of this server, or None."""
    from sglang.srt.distributed import get_tensor_model_parallel_world_size
    from sglang.srt.server_args import get_global_server_args

    if yoco_cut.YOCO.run is None:
        return "`yoco` is off"
    if peer("optional_kv").state != states.ACTIVE:
        return "`optional_kv` is off, without which a batch that is not cut cannot run"
    arguments = get_global_server_args()
    reason = graphs.argument_unfit(arguments, OFF)
    if reason is not None:
        return reason
    if get_tensor_model_parallel_world_size() > 1:
        return "tensor parallelism: the ranks' reductions are not those of a graph"
    return yoco_cut.server_unfit(model, batch, kwargs)


# -- in the trace -------------------------------------------------------------------------------


def first_layer(model: TextModel) -> int | None:
    """The first layer that the operator stands for; None: all layers are traced."""
    noted = getattr(model, _CUT, None)
    return None if noted is None else noted[1]


def call(
    model: TextModel,
    state: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
) -> torch.Tensor:
    """The operator: what the last norm gives, ``[tokens, hidden]``."""
    output = torch.empty_like(state[0])
    _ops["layers"](*state, per_layer_inputs, positions, output, getattr(model, _CUT)[0])
    return output


# -- between the graphs -------------------------------------------------------------------------


def shared_layers(
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
    normed: torch.Tensor | None,
    per_layer_inputs: torch.Tensor | None,
    positions: torch.Tensor,
    output: torch.Tensor,
    model: int,
) -> None:
    """The KV-shared layers and the last norm, for the batch that SGLang runs just now.

    Rows of ``output`` that nobody wants, those of the padding among them, are zeros.
    """
    from sglang.srt.compilation import piecewise_context_manager as piecewise

    if piecewise.is_in_pcg_torch_compile() or piecewise.get_pcg_capture_stream() is not None:
        output.zero_()  # of a made-up batch: nobody reads it
        return
    context: ForwardContext = piecewise.get_forward_context()
    batch = context.forward_batch
    whole = _models[model]
    first = first_layer(whole)
    assert first is not None
    state = hidden_states, residual, normed
    if not rows_only(
        whole, first, batch, state, positions, per_layer_inputs, output, _without_padding
    ):
        rows = layer_loop.run_layers(whole, first, state, positions, per_layer_inputs, batch)
        output.copy_(rows)


def _without_padding(batch: ForwardBatch, positions: torch.Tensor) -> ForwardBatch:
    """The batch as it was before SGLang padded it to the size of a graph."""
    tokens = batch.num_token_non_padded_cpu
    real = copy.copy(batch)
    real.positions = positions[:tokens]
    real.out_cache_loc = batch.out_cache_loc[:tokens]
    if batch.out_cache_loc_swa is not None:
        real.out_cache_loc_swa = batch.out_cache_loc_swa[:tokens]
    return real
