"""Which forward each fusion is a step of: a row for each patch that needs no more code than this.

A row is a port's code (`gemma4_turbo.engine.run.PatchModule`), named ``wiring:<patch>`` in `sources`.
Patches share the rewritten forwards, which live as long as one of them is in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import linear
from gemma4_turbo.ports.any.decode_step import attention as attention_steps
from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.any.decode_step import mlp_few as dense
from gemma4_turbo.ports.any.prefill import yoco_batch as batch
from gemma4_turbo.ports.any.prefill import yoco_cut as cut
from gemma4_turbo.ports.any.prefill import yoco_graph as graph
from gemma4_turbo.ports.any.prefill import yoco_piecewise as in_graphs
from gemma4_turbo.ports.any.wired import (
    Fusions,
    Replacements,
    Wired,
    launch_as_usual,
    launch_early,
    nothing,
)
from gemma4_turbo.ports.v0_5_12 import text_model
from gemma4_turbo.ports.v0_5_12.decode_step import attention, decoder_layer
from gemma4_turbo.ports.v0_5_12.prefill import piecewise, tail

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun


def _layer(fusions: Fusions, run: PatchRun, stock: dict[str, Any]) -> Replacements:
    return decoder_layer.enable(fusions, run)


def _model(fusions: Fusions, run: PatchRun, stock: dict[str, Any]) -> Replacements:
    cut.use_line(tail.LINE)
    for fusion in fusions:
        fusion.enable(run)
    return {text_model.TARGET: text_model.forward}


def _cut_no_more() -> None:
    piecewise.unregister()
    in_graphs.forget()


layer_norms = Wired((layer_steps.LAYER_NORMS,), (_layer,))
ple_tail = Wired((layer_steps.PLE_TAIL,), (_layer,))
input_norm = Wired((layer_steps.INPUT_NORM, layer_steps.PLE_INPUT_NORM), (_layer, _model))
mlp_stream = Wired((layer_steps.MLP_STREAM,), (_layer,))
pdl = Wired((layer_steps.PDL,), (_layer,), launch_early, launch_as_usual)
qkv_norm = Wired((attention_steps.QKV_NORM,), (attention.enable,))
qkv_proj = Wired((attention_steps.QKV_PROJ,), (attention.enable,))
rope_store = Wired((attention_steps.ROPE_STORE,), (attention.enable,))
skinny_gemm = Wired((linear.SKINNY_GEMM,), (attention.enable, _layer))
mlp_few = Wired((dense.MLP_FEW,), (_layer,))
yoco = Wired((cut.YOCO,), (_model, batch.enable), nothing, cut.forget)
yoco_graph = Wired((graph.YOCO_GRAPH,), (_model,), nothing, graph.drop_all)
yoco_piecewise = Wired((in_graphs.YOCO_PIECEWISE,), (_model,), piecewise.register, _cut_no_more)
