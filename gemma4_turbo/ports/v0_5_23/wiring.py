"""Which forward each fusion is a step of: a row for each patch that needs no more code than this.

A row is a port's code (`gemma4_turbo.engine.run.PatchModule`), named ``wiring:<patch>`` in `sources`.
Patches share the rewritten forwards, which live as long as one of them is in.
"""

from __future__ import annotations

from gemma4_turbo.ports.any import linear
from gemma4_turbo.ports.any.decode_step import attention as attention_steps
from gemma4_turbo.ports.any.decode_step import layer_steps
from gemma4_turbo.ports.any.decode_step import mlp_few as dense
from gemma4_turbo.ports.any.experts import feed_forward_few as feed_forward
from gemma4_turbo.ports.any.experts import router_few as routers
from gemma4_turbo.ports.any.prefill import yoco_batch as batch
from gemma4_turbo.ports.any.prefill import yoco_cut as cut
from gemma4_turbo.ports.any.prefill import yoco_graph as graph
from gemma4_turbo.ports.any.prefill import yoco_piecewise as in_graphs
from gemma4_turbo.ports.any.wired import Wired, launch_as_usual, launch_early, nothing
from gemma4_turbo.ports.v0_5_23 import text_model
from gemma4_turbo.ports.v0_5_23.decode_step import attention, decoder_layer
from gemma4_turbo.ports.v0_5_23.experts import experts_few, routing
from gemma4_turbo.ports.v0_5_23.prefill import yoco_piecewise as piecewise

layer = decoder_layer.enable

layer_norms = Wired((layer_steps.LAYER_NORMS,), (layer,))
ple_tail = Wired((layer_steps.PLE_TAIL,), (layer,))
input_norm = Wired((layer_steps.INPUT_NORM, layer_steps.PLE_INPUT_NORM), (layer, text_model.enable))
mlp_stream = Wired((layer_steps.MLP_STREAM,), (layer,))
pdl = Wired((layer_steps.PDL,), (layer,), launch_early, launch_as_usual)
qkv_proj = Wired((attention_steps.QKV_PROJ,), (attention.enable,))
rope_store = Wired((attention_steps.ROPE_STORE,), (attention.enable,))
skinny_gemm = Wired((linear.SKINNY_GEMM,), (attention.enable, layer))
mlp_few = Wired((dense.MLP_FEW,), (layer,))
router_few = Wired((routers.ROUTER_FEW,), (layer, routing.enable))
feed_forward_few = Wired(
    (feed_forward.FEED_FORWARD_FEW,), (layer, routing.enable, experts_few.enable)
)
yoco = Wired((cut.YOCO,), (text_model.enable_cut, batch.enable), nothing, cut.forget)
yoco_graph = Wired((graph.YOCO_GRAPH,), (text_model.enable_cut,), nothing, graph.drop_all)
yoco_piecewise = Wired(
    (in_graphs.YOCO_PIECEWISE,), (text_model.enable_cut,), piecewise.load, in_graphs.forget
)
