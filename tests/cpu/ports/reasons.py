"""What a patch's row says, and whose says nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from gemma4_turbo.cli.modules import require_targets
from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any import handover, layer_steps, mlp_few, step_prologue
from tests.cpu.ports.counted import counted

OF_LAYERS = frozenset(
    {
        *("layer_norms", "ple_tail", "input_norm", "experts_sum", "mlp_stream", "pdl"),
        *("router_few", "skinny_gemm", "mlp_few", "qkv_proj", "rope_store"),
        *("router_norm", "step_prologue", "yoco", "yoco_graph"),
    }
)
"""Patches that every step of a text model comes by."""


def of(name: str) -> str:
    """A patch's reason."""
    return ENGINE.runs[name].full_reason()


def forget() -> None:
    """What was said so far."""
    for run in ENGINE.runs.values():
        run._decline_reason = ""


def silent(step: Callable[[], object], names: Collection[str]) -> list[str]:
    """Those of the patches that do not count a call of one step; all are switched on."""
    ENGINE.apply(only=[*names, "qkv_norm", "optional_kv"])
    require_targets(names=names)
    forget()
    for name in names:
        assert ENGINE.runs[name].state == states.ACTIVE, of(name)
    before = {name: counted(name) for name in names}
    step()
    found = []
    for name in sorted(names):
        now = counted(name)
        engaged = now.engaged > before[name].engaged
        if not engaged and (now.declined == before[name].declined or of(name) == "installed"):
            found.append(name)
    return found


def check_absent(kind: str) -> None:
    """What the reasons are on a small model of this kind."""
    experts = layer_steps.EAGER if kind == "moe" else layer_steps.NO_EXPERTS
    assert of("mlp_stream").endswith(experts)
    for name in ("experts_sum", "router_few"):
        if ENGINE.runs[name].state != states.ACTIVE:
            continue  # not on every line
        assert of(name).endswith(layer_steps.NO_EXPERTS) is (kind != "moe")
    if kind == "moe":
        assert of("mlp_few").endswith(mlp_few.BESIDE_EXPERTS)
    if kind != "ple":
        assert of("ple_tail").endswith(layer_steps.NOT_PER_LAYER)
        assert of("step_prologue").endswith(step_prologue.NOT_PER_LAYER)
    assert "makes no CUDA graphs of prefill" in of("yoco_piecewise")
    assert "no rows are cut: the model has no layers" in of("yoco_graph")


def check_between(model: Any, run: Callable[[Any, int], object]) -> None:
    """What `input_norm` says without `ple_tail`, and of layers with hooks; ``model`` has per-layer embeddings."""
    ENGINE.apply(only=["input_norm"])
    run(model, 2)
    assert layer_steps.NO_PLE_TAIL in of("input_norm")
    forget()
    handles = [layer.register_forward_hook(lambda *given: None) for layer in model.layers]
    run(model, 2)
    assert handover.NOT_DIRECT in of("input_norm")
    for handle in handles:
        handle.remove()
