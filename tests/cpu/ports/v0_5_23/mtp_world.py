"""SGLang's MTP draft worker and its graph runner over real Triton backends, on the CPU.

What cannot exist without a GPU is stood in for: the assistant, and the CUDA graphs, each of which runs
its function again, into the tensors of its capture.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cpu.ports.v0_5_23.triton_world import LONGEST, WINDOW, World

STEPS, DRAFT_TOKENS = 3, 4
HIDDEN, VOCAB = 8, 16
SIZES = [1, 2, 4]  # batch sizes of the graphs
OWN_POOL = SimpleNamespace(name="the draft's own pool")


class Assistant:
    """A recurrent model whose output depends on token, state, position and the slots it is shown."""

    def __init__(self, backend: Any, pool: Any) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.embed, self.mix = randn(VOCAB, HIDDEN), randn(HIDDEN, HIDDEN)
        self.head, self.reading = randn(HIDDEN, VOCAB) * 3, randn(HIDDEN) * 5
        self.backend, self.pool = backend, pool
        self.runs = 0
        self.fails = False

    def forward(self, batch: Any) -> Any:
        """As ``ModelRunner.forward``."""
        from sglang.srt.model_executor.forward_context import get_attn_backend

        self.runs += 1
        assert get_attn_backend() is self.backend
        assert self.backend.token_to_kv_pool is self.pool
        if self.fails:
            raise RuntimeError("no such kernel")
        state, metadata = batch.spec_info.hidden_states, self.backend.forward_metadata
        rows = len(state)
        assert len(batch.input_ids) == len(batch.positions) == rows
        ends = metadata.kv_indptr.tolist()
        slots = [metadata.kv_indices[a:b].double().sum() for a, b in itertools.pairwise(ends)]
        x = self.embed[batch.input_ids] + state @ self.mix
        seen = torch.sin(batch.positions.double() * 3 + torch.stack(slots)[:rows] / 7)
        hidden = torch.tanh(x + seen[:, None] * self.reading)
        output = SimpleNamespace(next_token_logits=hidden @ self.head, hidden_states=hidden)
        return SimpleNamespace(logits_output=output)


class Graphs:
    """Stands in for the backend of a graph runner."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.captured: dict[Any, tuple[Any, Callable[[], Any], Any]] = {}

    def can_run(self, batch: Any, key: Any) -> bool:
        return key in self.captured

    def capture_one(self, key: Any, run_once: Callable[[], Any], **_: Any) -> None:
        self.captured[key] = (self.attention.forward_metadata, run_once, run_once())

    def replay(self, key: Any, batch: Any) -> Any:
        metadata, run_once, outputs = self.captured[key]
        self.attention.forward_metadata = metadata
        for output, value in zip(outputs, run_once(), strict=True):
            output.copy_(value)
        return outputs


def tree_kernel_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """SGLang's Triton kernel for the tree, which it has for XPUs."""
    from sglang.kernels.ops.speculative import spec_tree

    patch.setattr(spec_tree, "_is_cpu", False)
    patch.setattr(spec_tree, "_is_xpu", True)


class Speculation:
    """A target's backend with the buffers of its graphs, a draft's worker, batches."""

    def __init__(self, graphs: bool, buffers: bool = True, rows: int = 4, **changed: Any) -> None:
        """``rows``: for how many requests the target's buffers are; ``buffers``: it has them."""
        from sglang.srt.layers.attention import verify_mask
        from sglang.srt.speculative.eagle_utils import TreeMaskMode
        from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPContext
        from sglang.srt.speculative.frozen_kv_mtp_worker_v2 import FrozenKVMTPDraftWorker
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        self.world = World()
        self.target = self.world.backend
        if buffers:
            with pytest.MonkeyPatch.context() as patch:
                mode = TreeMaskMode.FULL_MASK  # as on a GPU
                patch.setattr(verify_mask, "default_tree_mask_mode", lambda: mode)
                self.target.init_cuda_graph_state(rows, rows * DRAFT_TOKENS)
            self.target._verify_mask.buffer.fill_(7)  # what nobody has written
        attention = self.world.make_backend(WINDOW)
        attention.is_draft_runner, attention.token_to_kv_pool = True, OWN_POOL
        self.assistant = Assistant(attention, self.world.pool)
        algorithm = SpeculativeAlgorithm.from_string("FROZEN_KV_MTP")
        model_runner = SimpleNamespace(
            forward=self.assistant.forward,
            model=SimpleNamespace(backbone_hidden_size=HIDDEN),
            is_draft_worker=True,
            device="cpu",
            dtype=torch.float64,
            attn_backend=attention,
            kv_index_translator=self.world.translator,
            lora_manager=None,
            ngram_embedding_manager=SimpleNamespace(enabled=False),
            spec_algorithm=algorithm,
            device_timer=None,
            model_config=SimpleNamespace(
                requires_mm_token_modalities=False, model_is_mrope=False, is_matryoshka=False
            ),
        )
        self.worker: Any = object.__new__(FrozenKVMTPDraftWorker)
        vars(self.worker).update(
            topk=1,
            speculative_num_steps=STEPS,
            speculative_num_draft_tokens=DRAFT_TOKENS,
            device="cpu",
            target_worker=SimpleNamespace(
                device="cuda", model_runner=SimpleNamespace(attn_backend=self.target)
            ),
            draft_attn_backend=attention,
            kv_context=FrozenKVMTPContext(self.world.pool, {0: 0}),
            cuda_graph_runner=None,
            _model_runner=model_runner,
            _specialized_graph_memory_usage={},
            _specialized_graph_time_usage={},
        )
        vars(self.worker).update(changed)
        if graphs:
            self.worker.cuda_graph_runner = self._runner()

    def _runner(self) -> Any:
        from sglang.srt.speculative import frozen_kv_mtp_cuda_graph_runner as runners

        class Runner(runners.FrozenKVMTPCudaGraphRunner):  # type: ignore[misc]
            """Stock's, but for what is CUDA's."""

            def capture(self) -> None:
                for size in reversed(self.capture_bs):
                    self.capture_one_shape(size, None)

            def model_context(self) -> Any:
                return contextlib.nullcontext()

        spec = SimpleNamespace(
            speculative_num_steps=self.worker.speculative_num_steps,
            speculative_eagle_topk=self.worker.topk,
        )
        stands_in = {
            "get_spec": lambda: spec,
            "resolve_num_tokens_per_req": lambda phase: 1,
            "get_batch_sizes_to_capture": lambda *_: (list(SIZES), []),
            "resolve_decode_backend": lambda runner: Graphs(runner.draft_attn_backend),
            "model_capture_mode": contextlib.nullcontext,
            "maybe_flashinfer_autotune_speculative_draft": lambda *_, **__: None,
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stands_in.items():
                patch.setattr(runners, name, value)
            patch.setattr(runners.FrozenKVMTPInputBuffers, "share_buffers", lambda self: None)
            runner = Runner(self.worker)
        self.assistant.runs = 0
        return runner

    def batch(self, lengths: list[int], on_host: bool = False, reserved: int = 8) -> Any:
        """A batch in front of its draft; without ``on_host``, as the overlap schedule leaves it."""
        from sglang.srt.managers.schedule_batch import Req, ReqKvInfo, ScheduleBatch
        from sglang.srt.model_executor.forward_batch_info import ForwardMode
        from sglang.srt.sampling.sampling_params import SamplingParams
        from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftInput
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        rows = len(lengths)
        requests = []
        for row, length in enumerate(lengths):
            request = Req(
                str(row), "", [4, 5], SamplingParams(), eos_token_ids={3}, vocab_size=VOCAB
            )
            slots = min(length + reserved, LONGEST)
            request.kv = ReqKvInfo(req_pool_idx=row, kv_allocated_len=slots)
            requests.append(request)
        made = ScheduleBatch(
            reqs=requests,
            req_to_token_pool=SimpleNamespace(req_to_token=self.world.table, device="cpu"),
            model_config=SimpleNamespace(is_encoder_decoder=False, vocab_size=VOCAB),
            device="cpu",
            forward_mode=ForwardMode.DECODE,
            spec_algorithm=SpeculativeAlgorithm.from_string("FROZEN_KV_MTP"),
            req_pool_indices=torch.arange(rows),
            seq_lens=torch.tensor(lengths),
            seq_lens_cpu=torch.tensor(lengths) if on_host else None,
            seq_lens_sum=sum(lengths) if on_host else None,
        )
        made.spec_info = FrozenKVMTPDraftInput(
            bonus_tokens=torch.arange(rows) + 2,
            hidden_states=torch.sin(torch.arange(rows * HIDDEN).double() + sum(lengths)).view(
                rows, -1
            ),
            topk_p=torch.zeros(rows, 1),
            topk_index=torch.zeros(rows, 1, dtype=torch.int64),
        )
        return made

    def read_mask(self, batch: Any, verification: Any, in_graph: bool) -> torch.Tensor:
        """What the target's attention reads of the mask, byte by byte, after its metadata are made."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        rows = len(batch.seq_lens)
        made = SimpleNamespace(
            forward_mode=ForwardMode.TARGET_VERIFY,
            batch_size=rows,
            req_pool_indices=batch.req_pool_indices,
            seq_lens=batch.seq_lens,
            seq_lens_sum=batch.seq_lens_sum,
            spec_info=verification,
            out_cache_loc=None,
        )
        self.world.translator.own_plan(made).bind(made, self.world.translator)
        if in_graph:
            self.target.init_forward_metadata_out_graph(made)
            bytes_, starts = self.target._verify_mask.buffer, self.target.mask_indptr
        else:
            self.target.init_forward_metadata(made)
            bytes_ = self.target.forward_metadata.custom_mask
            starts = self.target.forward_metadata.mask_indptr
        widths = (batch.seq_lens + DRAFT_TOKENS) * DRAFT_TOKENS
        expected = [0, *widths.cumsum(0).tolist()]
        assert starts[: rows + 1].tolist() == expected
        return bytes_[: expected[-1]].to(torch.uint8)


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """Reads of a tensor's value by the host, which on a GPU wait for it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "_local_scalar_dense" in str(func):
                found.append(str(func))
            return func(*args, **(kwargs or {}))

    with Reads():
        yield found
