"""`yoco_piecewise` in this line: the cut of `yoco` inside SGLang's breakable CUDA graphs of prefill.

Such a graph is recorded in segments, and between two of them a function runs eagerly, on the batch at
hand: each layer's attention. Here the model that is recorded ends before the first layer that shares
KV. One more such function stands for all that is behind: it cuts the rows and runs the layers on the
tail, so that neither the graphs nor the tokens pay for them (`gemma4_turbo.ports.any.prefill.yoco_piecewise`).
"""

from __future__ import annotations

import copy
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
from gemma4_turbo.ports.v0_5_23 import layer_loop
from gemma4_turbo.runtime import graphs

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import TextModel
    from gemma4_turbo.ports.v0_5_23.protocols import LayerBatch

OFF = {
    "enable_return_hidden_states": "hidden states are returned",
    "return_hidden_states_mode": "hidden states are returned",
    "speculative_algorithm": "speculative decoding",
    "enable_mixed_chunk": "mixed chunks look like a plain prefill in these graphs",
    "enable_mis": "multi-item scoring",
    "debug_cuda_graph": "SGLang debugs its CUDA graphs",
}
"""Arguments of the server, and what each of them means."""

_between: list[Callable[..., None]] = []


def load() -> None:
    """The function between two graphs. Its arguments are those of the recorded call at each replay."""
    from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import eager_on_graph

    _between[:] = [eager_on_graph(shared_layers, capture_stub=_while_recorded)]


# -- while a graph is made ----------------------------------------------------------------------------


def first_layer(model: TextModel, batch: LayerBatch, kwargs: dict[str, object]) -> int | None:
    """The first layer that the function stands for; None: no graph is made, or one of all layers."""
    from sglang.srt.model_executor.runner_utils import prefill_graph

    run = YOCO_PIECEWISE.run
    if run is None:
        return None
    if not prefill_graph.is_in_prefill_graph_scope():
        if batch.forward_mode.is_extend() and _none_are_made():
            run.declined(NO_GRAPHS)
        return None
    return first_behind(run, model, batch, kwargs, unfit)


def _none_are_made() -> bool:
    from sglang.srt.model_executor import cuda_graph_config

    phase, disabled = cuda_graph_config.Phase.PREFILL, cuda_graph_config.Backend.DISABLED
    return bool(cuda_graph_config.check_cuda_graph_backend(phase, disabled))


def unfit(model: TextModel, batch: LayerBatch, kwargs: dict[str, object]) -> str | None:
    """Why no cut is made inside the graphs of this server, or None."""
    from sglang.srt.model_executor.runner_backend_utils import breakable_cuda_graph
    from sglang.srt.model_executor.runner_utils import prefill_graph

    if yoco_cut.YOCO.run is None:
        return "`yoco` is off"
    if peer("optional_kv").state != states.ACTIVE:
        return "`optional_kv` is off, which knows whose graphs are right"
    if prefill_graph.is_in_full_prefill_graph() or not (
        breakable_cuda_graph.is_in_breakable_cuda_graph()
    ):
        return "the prefill graph has no breaks"
    line = yoco_cut.line()
    reason = graphs.argument_unfit(line.arguments(), OFF) or line.layout_unfit(batch)
    return reason or yoco_cut.server_unfit(model, batch, kwargs)


def call(
    model: TextModel,
    first: int,
    state: layer_loop.State,
    positions: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
) -> torch.Tensor:
    """What the last norm gives, ``[tokens, hidden]``, in memory of the graph's."""
    hidden_states, _, normed = state
    output = torch.empty_like(hidden_states)
    _between[0](hidden_states, normed, per_layer_inputs, positions, output, model, first)
    return output


def _while_recorded(
    hidden_states: torch.Tensor,
    normed: torch.Tensor | None,
    per_layer_inputs: torch.Tensor | None,
    positions: torch.Tensor,
    output: torch.Tensor,
    model: TextModel,
    first: int,
) -> None:
    output.zero_()  # of a made-up batch: nobody reads it


# -- between two graphs -------------------------------------------------------------------------------


def shared_layers(
    hidden_states: torch.Tensor,
    normed: torch.Tensor | None,
    per_layer_inputs: torch.Tensor | None,
    positions: torch.Tensor,
    output: torch.Tensor,
    model: TextModel,
    first: int,
) -> None:
    """The KV-shared layers and the last norm, for the batch that SGLang runs just now.

    Rows of ``output`` that nobody wants, those of the padding among them, are zeros.
    """
    from sglang.srt.layers.layer_boundary.residual import batch as residual
    from sglang.srt.model_executor.runner_utils.forward_batch import get_forward_batch

    batch: LayerBatch = get_forward_batch()
    state = hidden_states, None, normed
    if not rows_only(
        model, first, batch, state, positions, per_layer_inputs, output, _without_padding
    ):
        residual.set_written(hidden_states, batch)  # the stream, as the layer before left it
        rows = layer_loop.run_layers(model, first, state, positions, per_layer_inputs, batch)
        output.copy_(rows)


def _without_padding(batch: LayerBatch, positions: torch.Tensor) -> LayerBatch | None:
    """The batch as it was before SGLang padded it to the size of a graph; None before one is recorded."""
    from sglang.srt.model_executor.runner_utils.prefill_graph import get_prefill_raw_num_tokens

    tokens = get_prefill_raw_num_tokens()
    if tokens is None:
        return None
    real = copy.copy(batch)
    real.positions = positions[:tokens]
    real.out_cache_loc = batch.out_cache_loc[:tokens]
    return real
