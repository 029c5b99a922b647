"""SGLang's own requests, batches and draft inputs on the CPU, as the scheduler makes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

EOS, HIDDEN, VOCAB, STEPS, DRAFT_TOKENS = 3, 8, 16, 3, 4


class Allocator:
    """Stands in for a KV pool's allocator: counts what is freed."""

    def __init__(self) -> None:
        self.freed: list[int] = []

    def free(self, slots: torch.Tensor) -> None:
        self.freed += slots.tolist()


def request(name: str, prompt: int = 5) -> Any:
    """A stock ``Req`` that has been prefilled and ends with the token `EOS`."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    parameters = SamplingParams(max_new_tokens=50, temperature=0)
    parameters.normalize(None)
    made = Req(
        name, "", list(range(4, 4 + prompt)), parameters, eos_token_ids={EOS}, vocab_size=VOCAB
    )
    made.output_ids = [7]
    made.kv_committed_len = made.kv_allocated_len = prompt
    return made


def batch(*names: str, first_slot: int = 0) -> Any:
    """A stock ``ScheduleBatch`` of running requests, its tokens in a table of its own."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from gemma4_turbo.cli.sglang_process import prepare_sglang

    prepare_sglang()
    requests = [request(name) for name in names]
    lengths = torch.tensor([len(r.origin_input_ids) for r in requests])
    table = torch.arange(8 * 32, dtype=torch.int32).view(8, 32)
    model = SimpleNamespace(is_encoder_decoder=False, vocab_size=VOCAB, think_end_id=None)
    made = ScheduleBatch(
        reqs=requests,
        req_to_token_pool=SimpleNamespace(req_to_token=table, device="cpu"),
        token_to_kv_pool_allocator=Allocator(),
        model_config=model,
        device="cpu",
        forward_mode=ForwardMode.DECODE,
        spec_algorithm=SpeculativeAlgorithm.from_string("FROZEN_KV_MTP"),
        req_pool_indices=torch.arange(first_slot, first_slot + len(names)),
        seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        orig_seq_lens=lengths.int(),
        seq_lens_sum=int(lengths.sum()),
    )
    made.sampling_info = SamplingBatchInfo.from_schedule_batch(made, VOCAB)
    return made


def draft_input(rows: int, value: float = 1.0) -> Any:
    """Stock's draft input as the seed step leaves it."""
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftInput

    return FrozenKVMTPDraftInput(
        bonus_tokens=torch.full((rows,), int(value)),
        hidden_states=torch.full((rows, HIDDEN), value),
        topk_p=torch.full((rows, 1), value),
        topk_index=torch.full((rows, 1), int(value)),
    )


def verify_input(running: Any, draft_token: int = 6) -> Any:
    """Stock's verify input for a chain of `DRAFT_TOKENS` per request."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPVerifyInput

    rows = len(running.reqs)
    chain = torch.arange(DRAFT_TOKENS)
    following = torch.cat([chain[1:], torch.tensor([-1])]).expand(rows, -1).clone()
    tokens = rows * DRAFT_TOKENS
    return FrozenKVMTPVerifyInput(
        draft_token=torch.full((tokens,), draft_token),
        custom_mask=torch.ones(tokens, dtype=torch.bool),
        positions=torch.arange(tokens),
        retrieve_index=torch.arange(tokens).view(rows, DRAFT_TOKENS),
        retrieve_next_token=following,
        retrieve_next_sibling=torch.full((rows, DRAFT_TOKENS), -1),
        retrieve_cum_len=None,
        spec_steps=STEPS,
        topk=1,
        draft_token_num=DRAFT_TOKENS,
        capture_hidden_mode=CaptureHiddenMode.FULL,
        seq_lens_sum=running.seq_lens_sum,
        seq_lens_cpu=running.seq_lens_cpu,
    )


def draft_extend_input() -> Any:
    """What stock leaves with DP attention, when no request goes on."""
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
    from sglang.srt.speculative.frozen_kv_mtp_info import FrozenKVMTPDraftExtendInput

    return FrozenKVMTPDraftExtendInput.create_idle_input(
        device="cpu", hidden_size=None, dtype=None, capture_hidden_mode=CaptureHiddenMode.LAST
    )


def finish(running: Any) -> None:
    """Every request of a batch gets its last token."""
    for r in running.reqs:
        r.output_ids.append(EOS)
        r.check_finished()
        assert r.finished()
