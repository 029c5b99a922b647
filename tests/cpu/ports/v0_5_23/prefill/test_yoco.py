"""The cut in this line's text model, over its pools and Triton attention, against stock's full prefill.

What does not depend on the line is tested in `tests.cpu.ports.v0_5_12.prefill.test_yoco`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import yoco_batch, yoco_cut, yoco_graph
from gemma4_turbo.ports.v0_5_23.prefill import yoco
from tests.cpu import interpreted, shared_kv
from tests.cpu.conftest import only_patch, patched_sglang
from tests.cpu.ports.v0_5_23 import sharing

NAME = "yoco"
pytestmark = interpreted.MARKS
LENGTHS, PREFIXES = {2: 3, 4: 9, 1: 1}, {2: 9, 4: 3, 1: 13}  # windows that reach into a prefix


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched(applied: None) -> Iterator[None]:
    with only_patch(NAME), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(applied: None) -> Any:
    return sharing.build()


def filled(kernels: bool = False) -> sharing.Memory:
    return sharing.Memory(kernels).fill()


def engaged() -> int:
    return ENGINE.runs[NAME].counters.engaged


def reason() -> str:
    return ENGINE.runs[NAME].full_reason()


def test_the_rows_whose_logits_are_wanted_are_stocks(model: Any, monkeypatch: pytest.MonkeyPatch):
    """The cache is stock's bit for bit, and batch, metadata and backend are as they were."""
    found, caches = [], []
    for patched in (False, True):
        ENGINE.revert()
        if patched:
            ENGINE.apply(only=[NAME])
        memory = filled(kernels=True)
        batch = memory.prefill(LENGTHS, PREFIXES)
        given = {name: copy.copy(value) for name, value in vars(batch).items()}
        metadata, state = memory.backend.forward_metadata, dict(vars(memory.backend))
        kept = {n: v.clone() for n, v in vars(metadata).items() if isinstance(v, torch.Tensor)}
        before = engaged()
        with monkeypatch.context() as counting:
            seen = shared_kv.rows_per_layer(model, counting)
            found.append(memory.run(model, batch))
        caches.append(memory.buffers())
        if patched:
            assert engaged() == before + 1
            assert seen == [13] * shared_kv.SHARED_FROM + [3] * 3
            assert vars(memory.backend) == state
            assert all(torch.equal(getattr(metadata, n), v) for n, v in kept.items())
            assert batch.residual_stream is None
            for name, value in given.items():
                now = getattr(batch, name)
                same = torch.equal(now, value) if isinstance(now, torch.Tensor) else True
                assert same, name
            assert batch.forward_mode == given["forward_mode"]
    expected, ours = found
    rows = shared_kv.last_rows(batch)
    shared_kv.assert_near(ours[rows], expected[rows])
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    others = torch.ones(len(ours), dtype=torch.bool)
    others[rows] = False
    assert not ours[others].any()
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


def test_as_the_multimodal_class_calls_it(model: Any):
    """Embeddings and per-layer inputs by name, no token ids; and a picture that sees itself both ways."""
    found = []
    for patched in (False, True):
        ENGINE.revert()
        memory = filled(kernels=True)
        batch = memory.prefill({2: 8, 1: 3}, {2: 11})
        image = torch.ones(8, 19, dtype=torch.bool).tril(11)
        image[2:, 13:] = True
        text = torch.ones(3, 3, dtype=torch.bool).tril()
        metadata = memory.backend.forward_metadata
        metadata.custom_mask = torch.cat([image.flatten(), text.flatten()])
        metadata.mask_indptr = torch.tensor([0, 8 * 19, 8 * 19 + 9])
        given = {
            "input_ids": None,
            "input_embeds": model.embed_tokens(batch.input_ids),
            "per_layer_inputs": model.get_per_layer_inputs(batch.input_ids),
        }
        if patched:
            ENGINE.apply(only=[NAME])
            before = engaged()
        found.append(memory.run(model, batch, **given))
    assert engaged() == before + 1
    rows = shared_kv.last_rows(batch)
    shared_kv.assert_near(found[1][rows], found[0][rows])
    assert not found[1][0].any()


def test_the_window_ends_at_stocks_very_token(model: Any):
    """The oldest key that stock's last row sees, in the prefix, and the one before it, made huge."""
    own = shared_kv.WINDOW - 1  # keys before a token's own, in a layer of this line
    new, prefix = own, 12
    oldest = prefix + new - 1 - own
    assert oldest == prefix - 1
    shared = model.layers[shared_kv.SHARED_FROM].self_attn.attn
    assert (shared.layer_id, shared.sliding_window_size) == (1, own)
    found: dict[tuple[bool, int | None], torch.Tensor] = {}
    for patched in (False, True):
        ENGINE.revert()
        if patched:
            ENGINE.apply(only=[NAME])
        for key in (None, oldest, oldest - 1):
            memory = filled(kernels=True)
            batch = memory.prefill({1: new}, {1: prefix})
            kind = type(memory.backend)
            attend = kind.forward

            def poisoned(self, q, k, v, *rest, at=(key, memory, attend), **more):
                key, memory, attend = at
                if k is None and key is not None:  # behind the layers that read it as their own
                    slot = memory.allocator.full_to_swa_index_mapping[memory.table[1, key].long()]
                    memory.pool.swa_kv_pool.v_buffer[1][slot] = 500.0
                return attend(self, q, k, v, *rest, **more)

            with pytest.MonkeyPatch.context() as context:
                context.setattr(kind, "forward", poisoned)
                found[patched, key] = memory.run(model, batch)[-1].clone()
    for patched in (False, True):
        assert torch.equal(found[patched, None], found[patched, oldest - 1])
        assert not torch.equal(found[patched, None], found[patched, oldest])
    shared_kv.assert_near(found[True, oldest], found[False, oldest])


def test_prompts_that_go_on_in_a_later_chunk(model: Any, monkeypatch: pytest.MonkeyPatch):
    memory = filled()
    batch = memory.prefill({1: 4, 2: 3}, {})
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, [False, True])
    seen = shared_kv.rows_per_layer(model, monkeypatch)
    found = memory.run(model, batch)
    assert seen == [7] * 3 + [1] * 3
    assert found[3].any()
    assert not found[4:].any()
    seen.clear()
    batch = memory.prefill({1: 4}, {})
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, [True])
    assert not memory.run(model, batch).any()
    assert seen == [4] * 3
    assert batch.residual_stream is None


def test_the_batch_is_told():
    """Through the constructor that SGLang calls, with its keywords."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    (swap,) = [s for s in ENGINE.runs[NAME].swaps if s.target == yoco_batch.BATCH]
    made = SimpleNamespace(seq_lens_cpu=torch.tensor([10, 16]))
    given: dict[str, Any] = {}

    def init(cls: Any, batch: Any, runner: Any, **more: Any) -> Any:
        given.update(more)
        return made

    run = SimpleNamespace()
    replaced = yoco_batch.enable((yoco_cut.YOCO,), run, {yoco_batch.BATCH: init})[yoco_batch.BATCH]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        seq_lens_cpu=made.seq_lens_cpu,
        reqs=[SimpleNamespace(origin_input_ids=range(n)) for n in (10, 30)],
    )
    assert replaced(ForwardBatch, batch, None, return_hidden_states_before_norm=False) is made
    assert given == {"return_hidden_states_before_norm": False}
    assert getattr(made.seq_lens_cpu, yoco_cut.UNFINISHED) == [False, True]
    ENGINE.revert()
    assert vars(ForwardBatch)["init_new"] is swap.raw


def test_the_decode_kernel_is_given_every_key_of_the_window(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    """Ours takes the backend's window for the most keys of a row; stock's extend step has one more."""
    memory = filled()
    seen: list[int | None] = []
    kind = type(memory.backend)
    decode = kind.forward_decode

    def watched(self: Any, *given: Any, **more: Any) -> Any:
        seen.append(self.sliding_window_size)
        assert self.enable_lean_attention is False
        return decode(self, *given, **more)

    monkeypatch.setattr(kind, "forward_decode", watched)
    memory.backend.enable_lean_attention = None
    memory.run(model, memory.prefill({1: 9}, {}))
    assert seen == [shared_kv.WINDOW] * 3
    assert memory.backend.sliding_window_size == shared_kv.WINDOW - 1
    assert memory.backend.enable_lean_attention is None


# -- what is not cut -------------------------------------------------------------------------------------


def cut(model: Any, memory: Any, batch: Any, **kwargs: Any) -> Any:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    with forward_context(ForwardContext(attn_backend=memory.backend), forward_batch=batch):
        return yoco_cut.cut(model, batch, batch.positions, kwargs)


def algorithm(none: bool) -> Any:
    return SimpleNamespace(is_none=lambda: none)


def refusals() -> list[tuple[str, dict[str, Any]]]:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

    return [
        ("MIXED", {"forward_mode": ForwardMode.MIXED}),
        ("speculative", {"spec_algorithm": algorithm(False)}),
        ("hidden states", {"capture_hidden_mode": CaptureHiddenMode.LAST}),
        ("hidden states", {"return_hidden_states_before_norm": True}),
        ("hidden states", {"return_pooled_hidden_states": True}),
        ("embeddings", {"is_prefill_only": True}),
        ("embeddings", {"token_indices_to_pool": [torch.tensor([1])]}),
        ("embeddings", {"decision_layouts": [[1]]}),
        ("multi-item", {"multi_item_delimiter_indices": [torch.tensor([1])]}),
        ("logprobs", {"return_logprob": True, "extend_logprob_start_lens_cpu": [3, 6]}),
        ("LoRA", {"lora_ids": [None, "adapter"]}),
        ("data-parallel", {"global_num_tokens_cpu": [11]}),
        ("two-batch", {"tbo_split_seq_index": 1}),
        ("context parallelism", {"attn_cp_metadata": object()}),
        ("spread over several GPUs", {"attn_dcp_metadata": object()}),
        ("spread over several GPUs", {"attn_tp_sequence_sharded": True}),
        ("sparse", {"hisparse_coordinator": object()}),
        ("not on the host", {"seq_lens_cpu": None}),
        ("positions are not", {"positions": torch.arange(12)}),
    ]


def test_every_gate_of_a_batch(model: Any, monkeypatch: pytest.MonkeyPatch):
    memory, run = sharing.Memory(), ENGINE.runs[NAME]
    for word, changes in refusals():
        monkeypatch.setattr(run, "_decline_reason", "")
        batch = memory.prefill({1: 5, 2: 6}, {})
        for name, value in changes.items():
            setattr(batch, name, value)
        assert cut(model, memory, batch) is None, word
        assert word in run.full_reason()
    assert run.state == states.ACTIVE
    batch = memory.prefill({1: 5, 2: 6}, {})
    assert cut(model, memory, batch) is not None


BACKENDS = [
    ("FlashAttentionBackend", {"__class__": type("FlashAttentionBackend", (), {})}),
    ("deterministic", {"enable_deterministic": True}),
    ("latent", {"use_mla": True}),
    ("DCP", {"dcp_size": 2}),
    ("diffusion", {"dllm_attention": object()}),
    ("KV pool is a SimpleNamespace", {"token_to_kv_pool": SimpleNamespace()}),
    ("translated by a", {"kv_index_translator": SimpleNamespace()}),
]


def test_other_backends(model: Any, monkeypatch: pytest.MonkeyPatch):
    run = ENGINE.runs[NAME]
    for word, changes in BACKENDS:
        monkeypatch.setattr(run, "_decline_reason", "")
        memory = sharing.Memory()
        batch = memory.prefill({1: 5, 2: 6}, {})
        for name, value in changes.items():
            if name == "__class__":
                memory.backend = value()
            else:
                monkeypatch.setattr(memory.backend, name, value, raising=False)
        assert cut(model, memory, batch) is None, word
        assert word in run.full_reason()
    assert run.state == states.ACTIVE


SERVER = [
    ("LoRA", "lora", "enable_lora", True),
    ("embeddings", "model", "is_embedding", True),
    ("hooks", "observability", "forward_hooks", [{"name": "steering"}]),
    ("hooks", "observability", "debug_tensor_dump_output_folder", "/tmp/dump"),
]


def test_gates_of_model_and_server(model: Any, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.model_executor.runner_utils.prefill_graph import prefill_graph_scope
    from sglang.srt.runtime_context import get_context

    memory, run = sharing.Memory(), ENGINE.runs[NAME]
    batch = memory.prefill({1: 5, 2: 6}, {})

    def why(**kwargs: Any) -> str:
        monkeypatch.setattr(run, "_decline_reason", "")
        assert cut(model, memory, batch, **kwargs) is None
        return run.full_reason()

    assert "get_embedding" in why(get_embedding=True)
    for word, bag, name, value in SERVER:
        with get_context().config_bag(bag).override(**{name: value}):
            assert word in why()
    with prefill_graph_scope(full_graph=False):
        assert "breakable CUDA graph" in why()
    with monkeypatch.context() as context:
        context.setattr(yoco, "_gpus", lambda: 2)
        assert "several GPUs" in why()
    with monkeypatch.context() as context:
        context.setattr(type(memory.backend), "shared_read_ends", None, raising=False)
        assert "the scheduler may write" in why()
    with monkeypatch.context() as context:
        context.setattr(model, "layers_to_capture", [1])
        assert "captured" in why()
    monkeypatch.setattr(run, "_decline_reason", "")
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None  # outside of a forward
    assert "no attention backend" in run.full_reason()
    assert cut(model, memory, batch) is not None


def test_a_forward_that_was_set_on_the_model(model: Any, monkeypatch: pytest.MonkeyPatch):
    """SGLang's graph runner leaves the one that was there; somebody else's sees all rows."""
    memory = sharing.Memory()
    batch = memory.prefill({1: 5, 2: 6}, {})
    monkeypatch.setitem(vars(model), "forward", model.forward)
    assert cut(model, memory, batch) is not None
    monkeypatch.setitem(vars(model), "forward", lambda *given: None)
    assert cut(model, memory, batch) is None
    assert "set the text model's forward" in reason()


@pytest.mark.parametrize("where", [(yoco_cut, "tail"), (yoco_graph, "run")])
def test_an_error_behind_the_cut_sends_all_rows_on(model: Any, where: tuple[Any, str]):
    """The layers before the cut have run already, and are not run again."""

    def fails(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    memory = filled()
    with pytest.MonkeyPatch.context() as context:
        context.setattr(*where, fails)
        seen = shared_kv.rows_per_layer(model, context)
        found = memory.run(model, memory.prefill({1: 3}, {}))
    assert seen == [3] * 6
    assert ENGINE.runs[NAME].state == states.FAILED
    ENGINE.revert()
    memory = filled()
    assert torch.equal(found, memory.run(model, memory.prefill({1: 3}, {})))


def test_metadata_that_want_more_send_all_rows_on(model: Any):
    """A field that no release has."""
    import dataclasses

    from sglang.srt.layers.attention import triton_backend

    kind = triton_backend.ForwardMetadata
    wider = dataclasses.make_dataclass(kind.__name__, [("more", int)], bases=(kind,), kw_only=True)
    memory = filled()
    batch = memory.prefill({1: 3}, {})
    with pytest.MonkeyPatch.context() as context:
        context.setattr(triton_backend, kind.__name__, wider)
        found = memory.run(model, batch)
    assert ENGINE.runs[NAME].state == states.FAILED
    assert "'more'" in ENGINE.runs[NAME].reason
    ENGINE.revert()
    memory = filled()
    assert torch.equal(found, memory.run(model, memory.prefill({1: 3}, {})))


def test_together_with_the_patches_of_the_layers(model: Any, monkeypatch: pytest.MonkeyPatch):
    """The norm that a layer makes for the next one is cut as well."""
    from gemma4_turbo.fusions.fusion import Fusion

    names = [NAME, "input_norm", "ple_tail", "layer_norms"]
    ENGINE.apply(only=names)
    monkeypatch.setattr(Fusion, "_compared", lambda *args: None)  # no stock kernel to compare with
    before = {name: ENGINE.runs[name].counters.engaged for name in names}
    memory = filled()
    batch = memory.prefill({1: 3, 2: 2}, {})
    found = memory.run(model, batch)
    assert all(ENGINE.runs[n].counters.engaged > count for n, count in before.items())
    ENGINE.revert()
    memory = filled()
    batch = memory.prefill({1: 3, 2: 2}, {})
    rows = shared_kv.last_rows(batch)
    shared_kv.assert_near(found[rows], memory.run(model, batch)[rows])
