"""Which forward each fusion is a step of: a row for each patch that needs no more code than this.

A row is a port's code (`gemma4_turbo.engine.run.PatchModule`), named ``wiring:<patch>`` in `sources`.
Patches share the rewritten forwards, which live as long as one of them is in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from gemma4_turbo.fusions.fusion import Step, forget
from gemma4_turbo.kernels import pdl as launches
from gemma4_turbo.ports.v0_5_12 import attention, checks, decoder_layer, linear, text_model
from gemma4_turbo.ports.v0_5_12.yoco import batch, cut, graph, piecewise

if TYPE_CHECKING:
    from gemma4_turbo.engine.checks import Check
    from gemma4_turbo.engine.run import PatchRun

Replacements = dict[str, Any]
Fusions = tuple[Step, ...]
Enable = Callable[[Fusions, "PatchRun", dict[str, Any]], Replacements]


def _nothing() -> None:
    pass


class Wired(NamedTuple):
    """The fusions of one patch, and the forwards that they are part of."""

    fusions: Fusions
    forwards: tuple[Enable, ...]
    compare: Callable[[str], list[Check]] | None = None  # None: no arithmetic of its own
    before: Callable[[], object] = _nothing  # when it goes in
    after: Callable[[], object] = _nothing  # when it has come out

    def build(self, run: PatchRun, stock: dict[str, Any]) -> Replacements:
        """The shared forwards, with these fusions on."""
        self.before()
        replaced: Replacements = {}
        for enable in self.forwards:
            replaced |= enable(self.fusions, run, stock)
        return replaced

    def undo(self, run: PatchRun) -> None:
        """Switch them off; their verdicts are asked again. CUDA graphs keep what they captured."""
        for fusion in self.fusions:
            fusion.run = None
        forget(run.patch.name)
        self.after()

    def verify(self, run: PatchRun, device: str) -> list[Check]:
        """Kernel against stock."""
        return [] if self.compare is None else self.compare(device)


def _layer(fusions: Fusions, run: PatchRun, stock: dict[str, Any]) -> Replacements:
    return decoder_layer.enable(fusions, run)


def _model(fusions: Fusions, run: PatchRun, stock: dict[str, Any]) -> Replacements:
    for fusion in fusions:
        fusion.enable(run)
    return {text_model.TARGET: text_model.forward}


def _launch_early() -> None:
    launches.wanted = True


def _launch_as_usual() -> None:
    launches.wanted = False


def _cut_no_more() -> None:
    piecewise.unregister()
    piecewise.forget()


layer_norms = Wired((decoder_layer.LAYER_NORMS,), (_layer,), checks.layer_norms)
ple_tail = Wired((decoder_layer.PLE_TAIL,), (_layer,), checks.ple_tails)
input_norm = Wired(
    (decoder_layer.INPUT_NORM, decoder_layer.PLE_INPUT_NORM), (_layer, _model), checks.input_norm
)
mlp_stream = Wired((decoder_layer.MLP_STREAM,), (_layer,))
pdl = Wired((decoder_layer.PDL,), (_layer,), None, _launch_early, _launch_as_usual)
qkv_norm = Wired((attention.QKV_NORM,), (attention.enable,), checks.qkv_norm)
qkv_proj = Wired((attention.QKV_PROJ,), (attention.enable,), checks.qkv_proj)
rope_store = Wired((attention.ROPE_STORE,), (attention.enable,), checks.rope_store)
skinny_gemm = Wired((linear.SKINNY_GEMM,), (attention.enable, _layer), checks.skinny_gemm)
yoco = Wired((cut.YOCO,), (_model, batch.enable), None, _nothing, cut.forget)
yoco_graph = Wired((graph.YOCO_GRAPH,), (_model,), None, _nothing, graph.drop_all)
yoco_piecewise = Wired(
    (piecewise.YOCO_PIECEWISE,), (_model,), None, piecewise.register, _cut_no_more
)
