"""Gates for what the patches have to know of: models that are built, weights that are written.

SGLang writes weights while it loads a model and in each of ``update_weights_from_*``.
"""

from __future__ import annotations

from gemma4_turbo.engine import gates
from gemma4_turbo.engine.gates import Call, guarded
from gemma4_turbo.runtime import weights

BUILT = "sglang.srt.model_loader.loader:_initialize_model"
_RUNNER = "sglang.srt.model_executor.model_runner"
_UPDATER = f"{_RUNNER}_components.weight_updater"
WRITERS = (  # a release that does not have one is left alone
    f"{_RUNNER}:ModelRunner.update_weights_from_disk",
    f"{_RUNNER}:ModelRunner.update_weights_from_distributed",
    f"{_RUNNER}:ModelRunner.update_weights_from_tensor",
    f"{_RUNNER}:ModelRunner.update_weights_from_ipc",
    f"{_RUNNER}:_model_load_weights_direct",
    f"{_UPDATER}:WeightUpdater.update_weights_from_disk",
    f"{_UPDATER}:WeightUpdater.load_weights_from_distributed",
    f"{_UPDATER}:WeightUpdater.update_weights_from_tensor",
    f"{_UPDATER}:WeightUpdater.update_weights_from_ipc",
    f"{_UPDATER}:WeightUpdater.end_weight_update",
    f"{_UPDATER}:_model_load_weights_direct",
)


def _weights_are_written(call: Call) -> list[str]:
    weights.written()
    return []


def _model_is_built(call: Call) -> list[str]:
    call.engine.model_made(call.result)
    return []


def _neighbours(call: Call) -> list[str]:
    call.engine.look_at_neighbours()
    return []


WHEN_LOADED: list[gates.Check] = [_weights_are_written, _neighbours]


def add_gates() -> None:
    """Where models are built and weights are written."""
    gates.add(BUILT, guarded(after=[_model_is_built]))
    for target in WRITERS:
        # Before as well: a write that fails half-way has written.
        gates.add(target, guarded(before=[_weights_are_written], after=[_weights_are_written]))
