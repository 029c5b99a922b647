"""SGLang's piecewise compilation on the CPU: traced, split and run piece by piece, but not recorded."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@contextlib.contextmanager
def stocks_operator() -> Iterator[None]:
    """SGLang registers its attention for CUDA alone; here the very function of its source, for the CPU."""
    from sglang.srt.compilation.compilation_config import SPLIT_OPS
    from sglang.srt.layers import radix_attention
    from sglang.srt.utils import custom_op

    kept = list(SPLIT_OPS)
    spec = importlib.util.spec_from_file_location("plain_radix_attention", radix_attention.__file__)
    assert spec is not None
    assert spec.loader is not None
    plain: Any = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(custom_op, "register_custom_op", lambda **options: lambda f: f)
        spec.loader.exec_module(plain)
    SPLIT_OPS[:] = kept
    library = torch.library.Library("sglang", "IMPL")
    library.impl("unified_attention_with_output", plain.unified_attention_with_output, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """SGLang's runner and backend import a kernel that exists on GPUs only; recording needs it."""
    name = "sglang.srt.compilation.weak_ref_tensor"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(weak_ref_tensors=None))
        yield


def runner(model: Any, memory: Any, sizes: tuple[int, ...], embedded: bool = False) -> Any:
    """SGLang's own runner over a text model: its steps before and after the compilation, no recording.

    ``embedded``: the model is handed embeddings, as by the class that takes pictures. Call it, and
    what it returns, within `importable`.
    """
    from sglang.srt.compilation import backend as compilation
    from sglang.srt.compilation import piecewise_context_manager as context
    from sglang.srt.compilation.compilation_config import CompilationConfig
    from sglang.srt.compilation.compile import install_torch_compiled
    from sglang.srt.model_executor import piecewise_cuda_graph_runner as stock

    most = max(sizes)

    def forward(input_ids: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        if not embedded:
            return model(input_ids, positions, batch)  # type: ignore[no-any-return]
        return model(  # type: ignore[no-any-return]
            None,
            positions,
            batch,
            input_embeds=model.embed_tokens(input_ids),
            per_layer_inputs=model.get_per_layer_inputs(input_ids),
        )

    class Runner(stock.PiecewiseCudaGraphRunner):
        pieces: list[Any]  # of the traced graph, as SGLang's splitter made them

        def __init__(self) -> None:
            self.device, self.text = "cpu", model
            self.capture_num_tokens = sorted(sizes)
            self.is_multimodal = self.capture_return_pooled_hidden_states = False
            self.buffers = stock.PrefillInputBuffers(
                input_ids=torch.zeros(most, dtype=torch.int64),
                out_cache_loc=torch.zeros(most, dtype=torch.int64),
                out_cache_loc_swa=torch.zeros(most, dtype=torch.int64),
                mamba_track_indices=None,
                mamba_track_mask=None,
                mamba_track_seqlens=None,
                positions=torch.zeros(most, dtype=torch.int64),
                input_embeds=None,
                mrope_positions=None,
            )
            self.attention_layers = [layer.self_attn.attn for layer in model.layers]
            self.quant_config = None
            self.moe_layers = self.moe_fusions = [None] * len(model.layers)
            self.model_runner = SimpleNamespace(
                model=SimpleNamespace(forward=forward),
                req_to_token_pool=memory.requests,
                token_to_kv_pool=memory.kv,
                token_to_kv_pool_allocator=memory.allocator,
                attn_backend=memory.backend,
            )
            with context.enable_piecewise_cuda_graph():
                self.warmup_compile(num_tokens=self.capture_num_tokens[0])
                config = CompilationConfig([])  # of no size: every piece runs as it was traced
                install_torch_compiled(
                    model, fullgraph=True, compile_config=config, graph_pool=(0, 0)
                )
                with context.enable_piecewise_cuda_graph_compile(), self.watched():
                    for size in reversed(self.capture_num_tokens):
                        self.warmup_compile(num_tokens=size)

        def between(self) -> list[str]:
            """The operators that run between graphs."""
            return [
                str(node.target).removesuffix(".default")
                for piece in self.pieces
                if piece.is_splitting_graph
                for node in piece.graph.graph.nodes
                if node.op == "call_function"
            ]

        @contextlib.contextmanager
        def watched(self) -> Iterator[None]:
            """Keep what SGLang's splitter made."""
            split = compilation.split_graph

            def split_graph(*given: Any) -> Any:
                whole, pieces = split(*given)
                self.pieces = pieces
                return whole, pieces

            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(compilation, "split_graph", split_graph)
                yield

        def prefill(self, batch: Any) -> torch.Tensor:
            """The hidden states of all tokens, the padding's too, as `replay` has them made.

            Nothing may be traced anew: SGLang could not record it any more, and gives up.
            """
            with (
                context.enable_piecewise_cuda_graph(),
                torch._dynamo.config.patch(error_on_recompile=True),
            ):
                padded = self.replay_prepare(batch)
                others = self.attention_layers, None, self.moe_layers, self.moe_fusions
                with context.set_forward_context(padded, *others):
                    memory.backend.init_forward_metadata(batch)
                    return forward(padded.input_ids, padded.positions, padded)

    return Runner()
