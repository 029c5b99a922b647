"""`optional_kv`: prefill graphs for models whose last layers share KV, with which stock does not start.

Stock makes a table of a model's attention by layer number, and refuses two of one number. A layer that
shares KV has the number of the layer whose KV it reads. Nothing reads the table of a Gemma 4: in a
breakable graph each layer's attention runs between two graphs, on itself and the batch at hand. So the
table of such a model stays as it is, by position.

That holds for a text-only model, whose graph looks up per-layer inputs by token, and for one that takes
pictures while `mm_prefill_graph` records it with its per-layer inputs. Elsewhere the graphs are not known
to be right: the model starts without them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import sglang_types
from gemma4_turbo.ports.any.prefill import mm_prefill_graph

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import TextModel
    from gemma4_turbo.ports.v0_5_23.protocols import ModelRunner

_SETUP = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
LAYERS = "sglang.srt.model_executor.model_runner:ModelRunner.get_cuda_graph_layers"
TABLE = f"{_SETUP}:index_attention_layers_by_global_id"

OTHER_TABLE = "SGLang's table is not one of all layers' attention"

Layers = list[Any]

_runners: weakref.WeakKeyDictionary[TextModel, weakref.ref[ModelRunner]] = (
    weakref.WeakKeyDictionary()
)
"""By text model: whose graphs are being made."""


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Who asks for a model's layers, and the table that is made of them."""
    layers_of, table_of = stock[LAYERS], stock[TABLE]

    def get_cuda_graph_layers(self: ModelRunner, layer_model: TextModel) -> Any:
        if sharing(layer_model):
            _runners[layer_model] = weakref.ref(self)
        return layers_of(self, layer_model)

    def index_attention_layers_by_global_id(
        attention_layers: Layers,
        mha_companion_layers: Layers,
        layer_model: TextModel | None = None,
    ) -> tuple[Layers, Layers]:
        tables = attention_layers, mha_companion_layers
        shared = [] if layer_model is None else sharing(layer_model)
        elsewhere = None if shared else "the model has no KV-shared layers"
        if layer_model is not None and shared:
            elsewhere = _table_unfit(*tables, layer_model)
        if elsewhere is not None or layer_model is None:
            run.declined(str(elsewhere))
            found: tuple[Layers, Layers] = table_of(*tables, layer_model)
            return found
        known = _runners.pop(layer_model, None)
        reason = unfit(None if known is None else known(), layer_model)
        if reason is None:
            run.engaged(False)
            return tables
        run.declined(f"{reason}: the model runs without prefill graphs")
        # Fewer layers in the table than in the model: stock makes no graphs of it.
        own = [i for i, attention in enumerate(attention_layers) if attention not in shared]
        without: tuple[Layers, Layers] = table_of(
            [attention_layers[i] for i in own], [mha_companion_layers[i] for i in own]
        )
        return without

    return {
        LAYERS: get_cuda_graph_layers,
        TABLE: index_attention_layers_by_global_id,
    }


def sharing(model: TextModel) -> list[object]:
    """Attention of the KV-shared layers, in SGLang's own Gemma 4 text model; none in another."""
    from sglang.srt.models.gemma4_causal import Gemma4TextModel

    if type(model) is not Gemma4TextModel:
        return []
    parts = [getattr(layer, "self_attn", None) for layer in model.layers]
    return [part.attn for part in parts if part is not None and part.is_kv_shared_layer]


def _table_unfit(attention: Layers, companions: Layers, model: TextModel) -> str | None:
    """Why the table is not one of all layers' attention, each with the number of its KV; or None."""
    parts = [layer.self_attn for layer in model.layers]
    if len(attention) != len(parts) or any(part is not None for part in companions):
        return OTHER_TABLE
    others = any(
        found is not part.attn
        or found.layer_id != (part.kv_shared_layer_index if part.is_kv_shared_layer else number)
        for number, (found, part) in enumerate(zip(attention, parts, strict=True))
    )
    return OTHER_TABLE if others else None


def unfit(runner: ModelRunner | None, layer_model: TextModel) -> str | None:
    """Why no graphs are made of this runner's model, whose layers are ``layer_model``'s; or None."""
    from sglang.srt.models.gemma4_causal import Gemma4ForCausalLM
    from sglang.srt.runtime_context import get_exec, get_parallel

    if runner is None:
        return "somebody else asked for the model's layers"
    if type(runner.model) is not Gemma4ForCausalLM and (
        layer_model not in mm_prefill_graph.recording
    ):
        return f"the graphs of a {type(runner.model).__name__} lose its per-layer inputs"
    if runner.is_draft_worker:
        return "a draft model"
    kind = get_exec().graph.cuda_graph_config.prefill.backend
    if kind != "breakable":
        return f"prefill graphs are {kind}, not breakable"
    if not sglang_types.is_triton_backend(runner.attn_backend):
        return f"the attention backend is {type(runner.attn_backend).__name__}"
    if get_parallel().pp_group.world_size > 1:
        return "pipeline parallelism"
    return None
