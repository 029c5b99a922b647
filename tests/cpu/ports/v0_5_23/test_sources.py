"""Which edits of SGLang's layer boundaries and metadata a patch drifts with."""

from __future__ import annotations

import pytest

from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.ports.v0_5_23.sources import PORTS

LAYERS = "sglang.srt.layers"
STAGE = f"{LAYERS}.layer_boundary.stage"
BOUNDARY = f"{LAYERS}.layer_boundary.boundary"
BACKEND = f"{LAYERS}.attention.triton_backend"
STREAM = f"{LAYERS}.layer_boundary.residual.stream"
ADD_NORM = f"{LAYERS}.layer_boundary.residual.add_norm"
POOLS = "sglang.srt.model_executor.pool_configurator"


@pytest.mark.parametrize(
    ("patch", "module", "old", "new", "state"),
    [
        # What no layer of Gemma 4's runs, or whose value is asked for when the layer is looked at.
        ("layer_norms", STAGE, "def from_pp(self, tensors", "def from_pp(self, given", "active"),
        ("layer_norms", STREAM, "return hidden.clone()", "return hidden + 0", "active"),
        ("layer_norms", ADD_NORM, "fp8_input: Optional[Fp8Input] = None", "more = None", "active"),
        ("shared_kv_pool", POOLS, "def _max_unified_full_tokens", "def _most_tokens", "active"),
        # What they run.
        ("layer_norms", STAGE, "stream.write(residual)", "stream.residual = residual", "drifted"),
        ("layer_norms", STREAM, "self.residual = residual\n        self.pending", "self.pending",
         "drifted"),
        ("layer_norms", BOUNDARY, "self._bind if self.inner.bind is not None else None",
         "self._bind", "drifted"),
        ("layer_norms", BOUNDARY, "return _TransformedRead(self.inner.bind(",
         "return _TransformedRead(self.outer.bind(", "drifted"),
        ("layer_norms", BOUNDARY, "            read=edge.need.read,\n            expected_sum",
         "            read=edge.need.other,\n            expected_sum", "drifted"),
        # What a class took from another one until now, and one with another parent.
        ("shared_kv_pool", POOLS, "class SWARequestCapPoolConfigurator(HybridSWAPoolConfigurator):",
         "class SWARequestCapPoolConfigurator(HybridSWAPoolConfigurator):\n"
         "    def _solve_pool_sizes(self): ...", "drifted"),
        ("yoco", BACKEND, "class TritonAttnBackend(AttentionBackend):",
         "class TritonAttnBackend(AttentionBackend):\n    def forward(self): ...", "drifted"),
        ("rope_store", BACKEND, "class TritonAttnBackend(AttentionBackend):",
         "class TritonAttnBackend(AttentionBackend):\n    def of_its_own(self): ...", "active"),
        ("yoco", BACKEND, "class TritonAttnBackend(AttentionBackend):",
         "class TritonAttnBackend(AttentionBackend):\n    def shared_read_ends(self, fm): ...",
         "drifted"),
        ("kv_scales", f"{LAYERS}.quantization.quark.quark",
         "class QuarkKVCacheMethod(BaseKVCacheMethod):",
         "class QuarkKVCacheMethod(BaseKVCacheMethod):\n"
         "    def process_weights_after_loading(self, layer): ...", "drifted"),
        # A name that is read, and gone.
        ("layer_norms", ADD_NORM, "    applied_at_exit = True", "    at_exit = True", "drifted"),
        ("layer_norms", f"{LAYERS}.layer_boundary.contracts", "input_move:", "moved:", "drifted"),
    ],
)  # fmt: skip
def test_edits(patch: str, module: str, old: str, new: str, state: str):
    def edited(name: str) -> str | None:
        source = fingerprints.installed_source(name)
        if name == module:
            assert source is not None
            assert old in source
            source = source.replace(old, new)
        return source

    verdict = fingerprints.judge([PORTS[patch]], "0.5.23", fingerprints.Definitions(edited))
    assert verdict.state == getattr(states, state.upper()), verdict.reason
