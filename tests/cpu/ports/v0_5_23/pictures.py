"""A small E2B or E4B that takes pictures, recorded and replayed by SGLang's own prefill runner, on the CPU.

The language model is `sharing.build`'s, with per-layer inputs and KV-shared layers, over `sharing`'s
pools. A picture's embeddings are given: the encoder runs outside of the graphs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from tests.cpu import shared_kv, vision
from tests.cpu.ports.v0_5_23 import sharing

SIZES = (8, 16)
HIDDEN = 256
PLACEHOLDERS = {"image_token_id": 60, "video_token_id": 61, "audio_token_id": 62}
FIRST_PAD_VALUE = 1_000_000  # SGLang's ids of a picture's tokens: no token of any vocabulary


def model() -> Any:
    """SGLang's class that takes pictures."""
    like = vision.model("sdpa")
    made = object.__new__(type(like))
    vars(made).update({**vars(like), "_modules": {**like._modules}})
    made._modules["language_model"] = sharing.build()
    made.config = copy.deepcopy(like.config)
    for name, value in PLACEHOLDERS.items():
        setattr(made.config, name, value)
    made.config.text_config.pad_token_id = 0
    made.get_image_feature = lambda items: torch.cat([item.feature for item in items])
    return made


def exact_products(patch: pytest.MonkeyPatch) -> None:
    """Products in float64, rounded once: a row's does not depend on how many others there are."""

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = x.double() @ weight.double().t()
        return (found if bias is None else found + bias.double()).to(x.dtype)

    patch.setattr(torch.nn.functional, "linear", linear)


class Prompt(NamedTuple):
    """So many new tokens of a request, after others that are in the pool."""

    tokens: int
    prefix: int = 0
    pictures: tuple[tuple[int, int], ...] = ()  # first and last place of each in the whole prompt
    placeholders: tuple[int, ...] = ()  # places of ids that SGLang left as they are


def _items(request: int, pictures: tuple[tuple[int, int], ...]) -> Any:
    from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputs

    made = []
    for number, (first, last) in enumerate(pictures):
        generator = torch.Generator().manual_seed(100 * request + number)
        feature = torch.randn(last - first + 1, HIDDEN, generator=generator).to(shared_kv.DTYPE)
        item = MultimodalDataItem(modality=Modality.IMAGE, feature=feature, offsets=[(first, last)])
        item.set_pad_value()
        item.pad_value = FIRST_PAD_VALUE + 100 * request + number
        item.pad_values = (item.pad_value,)
        made.append(item)
    return MultimodalInputs(mm_items=made)


class Server:
    """A model runner that has recorded its prefill graphs, as far as the runner's code asks for it."""

    def __init__(self) -> None:
        from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.model_executor.model_runner_components import cuda_graph_setup
        from sglang.srt.runtime_context import get_exec
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils import common

        self.memory, self.model = sharing.Memory(), model()
        self.runner: Any = ModelRunner.__new__(ModelRunner)
        fields = {
            "model": self.model,
            "server_args": ServerArgs(model_path="dummy", device="cpu"),
            "model_config": SimpleNamespace(is_multimodal=True, context_len=128),
            "is_draft_worker": False,
            "spec_algorithm": SimpleNamespace(is_eagle=lambda: False),
            "lora_manager": None,
            "req_to_token_pool": SimpleNamespace(size=sharing.REQUESTS),
            "layer_info": SimpleNamespace(start_layer=0, end_layer=len(shared_kv.TYPES)),
            "attn_backend": self.memory.backend,
            "kv_index_translator": self.memory.translator,
            "pp_group": self.model.pp_group,
            "device": "cpu",
            "gpu_id": 0,
            "graph_shared_output": None,
            "eager_runner": "eager",
        }
        for name, value in fields.items():
            object.__setattr__(self.runner, name, value)
        config = CudaGraphConfig()
        config.prefill.backend, config.prefill.bs = "breakable", list(SIZES)
        with (
            get_exec().graph.override(cuda_graph_config=config),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(gc, "collect", lambda: 0)  # of all that SGLang is takes seconds
            for module in (cuda_graph_setup, common):
                patch.setattr(module, "get_available_gpu_memory", lambda *args: 100.0)
            patch.setattr(cuda_graph_setup, "PrefillCudaGraphRunner", self._recorder)
            found = cuda_graph_setup.capture_prefill_graph(
                model_runner=self.runner,
                eager_runner=self.runner.eager_runner,
            )
        self.graphs: Any = found.runner
        self.runner.prefill_cuda_graph_runner = found.runner

    def _recorder(self, model_runner: Any) -> Any:
        """SGLang's runner without what of it needs a GPU."""
        from sglang.srt.model_executor.cuda_graph_buffer_registry import build_prefill_registry
        from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
        from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import (
            PrefillCudaGraphRunner,
        )

        made: Any = object.__new__(PrefillCudaGraphRunner)
        vars(made).update(
            model_runner=model_runner,
            layer_model=model_runner.model.language_model,
            backend=Backend(),
            prefill_backend_name="breakable",
            capture_num_tokens=list(SIZES),
            max_num_tokens=max(SIZES),
            max_context_size=None,
            max_seq_len=None,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            capture_return_pooled_hidden_states=False,
            pp_size=1,
            buffers=SimpleNamespace(pp_proxy_tensors=None),
            attention_layers=model_runner.attention_layers,
            mha_companion_layers=model_runner.mha_companion_layers,
            static_draft_hidden_states=None,
            _prefill_static_buffers=None,
            quant_config=None,
            dsa_indexers=None,
            moe_layers=[],
            moe_fusions=[],
            _input_embeds_arg_idx=3,
        )
        for name in (
            "_is_full_backend",
            "_qwen_bcg_hc_sidechannel",
            "_qwen_bcg_mtp_draft",
            "_capture_chunked_prefix",
            "is_dsv41_model",
            "enable_cp_bcg_capture",
            "enable_lora",
            "has_mha_companion_layers",
            "prefer_eager_mixed_prefill",
            "use_captured_attn_metadata",
        ):
            setattr(made, name, False)
        made.buffer_registry = build_prefill_registry(
            device=torch.device("cpu"),
            max_bs=sharing.REQUESTS,
            max_num_token=max(SIZES),
            cache_loc_dtype=torch.int64,
            is_multimodal=True,
            hidden_size=HIDDEN,
            embed_dtype=shared_kv.DTYPE,
            share_pool=False,
        )
        for size in reversed(SIZES):
            batch = self.memory.prefill({0: size}, {})
            for name in ("input_ids", "positions", "out_cache_loc", "input_embeds"):
                slot = made.buffer_registry.get_slot(name).slice_for(1, size)
                setattr(batch, name, slot)
            batch.dp_padding_mode = _padding()
            self.memory.backend.init_forward_metadata(batch)
            made.backend.capture_one(size, lambda b=batch, n=size: made._run_forward(b, n))
        return made

    # -- prefills ------------------------------------------------------------------------------------

    def batch(self, prompts: dict[int, Prompt], **changes: Any) -> Any:
        """SGLang's batch of these requests; a forward changes it: one for each."""
        made = self.memory.prefill(
            {request: prompt.tokens for request, prompt in prompts.items()},
            {request: prompt.prefix for request, prompt in prompts.items()},
        )
        start = 0
        for request, prompt in prompts.items():
            ids = made.input_ids[start : start + prompt.tokens]
            for number, (first, last) in enumerate(prompt.pictures):
                places = slice(
                    min(max(first - prompt.prefix, 0), prompt.tokens),
                    min(max(last + 1 - prompt.prefix, 0), prompt.tokens),
                )
                ids[places] = FIRST_PAD_VALUE + 100 * request + number
            for place, value in zip(prompt.placeholders, PLACEHOLDERS.values(), strict=False):
                ids[place] = value
            start += prompt.tokens
        if any(prompt.pictures for prompt in prompts.values()):
            made.mm_inputs = [
                _items(request, prompt.pictures) if prompt.pictures else None
                for request, prompt in prompts.items()
            ]
        made.extend_start_loc = torch.tensor(made.extend_seq_lens_cpu).cumsum(0)
        made.extend_start_loc -= made.extend_seq_lens
        made.dp_padding_mode = _padding()
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    def eager(self, batch: Any) -> torch.Tensor:
        """Hidden states of all rows as SGLang computes them without a graph."""
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

        context = ForwardContext(attn_backend=self.memory.backend)
        with _pictures(), forward_context(context, forward_batch=batch):
            found: torch.Tensor = self.model(batch.input_ids, batch.positions, batch)
        return found

    def runs(self, batch: Any) -> bool:
        """Whether SGLang would replay a graph."""
        return bool(self.graphs.can_run_graph(batch))

    def replay(self, batch: Any) -> torch.Tensor:
        """Hidden states of all rows and the padding's, through SGLang's `load_batch` and replay."""
        from sglang.srt.model_executor.runner_backend_utils import breakable_cuda_graph as stock

        with _pictures(), sharing.graphs_on_the_cpu(), stock.enable_breakable_cuda_graph():
            static, _ = self.graphs.load_batch(batch)
            tokens = len(static.input_ids)
            key = self.graphs._shape_key(tokens, batch)
            found: torch.Tensor = self.graphs._execute_body_capture(
                batch, static, tokens, len(batch.input_ids), key
            )
        return found


class Backend:
    """SGLang's breakable graphs, of `sharing.Recorded` segments."""

    def __init__(self) -> None:
        self.graphs: dict[int, Any] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.cleaned = False

    def capture_one(self, size: int, forward_fn: Any) -> None:
        """Two runs to warm up, and a capture."""
        from sglang.srt.model_executor.runner_backend_utils import breakable_cuda_graph as stock

        graph = stock.BreakableCUDAGraph()
        with sharing.graphs_on_the_cpu(), stock.enable_breakable_cuda_graph():
            for _ in range(2):
                forward_fn()
            with stock.BreakableCUDAGraphCapture(graph):
                self.outputs[size] = forward_fn()
        self.graphs[size] = graph

    def replay(self, shape_key: Any, static_forward_batch: Any) -> torch.Tensor:
        self.graphs[shape_key.size].replay()
        return self.outputs[shape_key.size]

    def cleanup(self) -> None:
        self.cleaned = True


def _padding() -> Any:
    from sglang.srt.layers.dp_attention import DpPaddingMode

    return DpPaddingMode.SUM_LEN


@contextlib.contextmanager
def _pictures() -> Iterator[None]:
    """No embedding of an earlier prefill is kept; the logits are the hidden states."""
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.managers import mm_schedule
    from sglang.srt.utils import common

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "is_pin_memory_available", lambda *args: False)
        patch.setattr(mm_schedule, "embedding_cache", None)
        mm_schedule.init_mm_embedding_cache(1 << 20)
        patch.setattr(LogitsProcessor, "forward", lambda self, ids, hidden, *more: hidden.clone())
        yield
