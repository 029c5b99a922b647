"""Fast prefill on SGLang's text model, pools and Triton attention, against stock's full prefill."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma4_turbo.engine import states, switches
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.prefill import yoco_batch as patch
from gemma4_turbo.ports.any.prefill import yoco_cut, yoco_graph
from tests.cpu import shared_kv
from tests.cpu.conftest import only_patch, patched_sglang

NAME = "yoco"


@pytest.fixture(scope="module", autouse=True)
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with patched_sglang(tmp_path_factory, only=[NAME]):
        yield


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with only_patch(NAME), torch._dynamo.config.patch(disable=True), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(applied: None) -> Any:
    return shared_kv.build()


def forward(model: Any, batch: Any, **kwargs: Any) -> torch.Tensor:
    return model(batch.input_ids, batch.positions, batch, **kwargs)


def engaged() -> int:
    return ENGINE.runs[NAME].counters.engaged


BATCHES = [
    ({3: 20}, {}),
    ({5: 12, 1: 30, 2: 2}, {}),  # two tokens: less than a window
    ({2: 4, 4: 9, 1: 1}, {2: 11, 4: 3, 1: 13}),  # after a prefix, windows that reach into it
]


@pytest.mark.parametrize(("lengths", "prefixes"), BATCHES)
def test_the_rows_whose_logits_are_wanted_are_stocks(
    model: Any, lengths: Any, prefixes: Any, monkeypatch: pytest.MonkeyPatch
):
    """On the same cache, written by stock; then by the patch, whose cache is stock's bit for bit."""
    hidden, caches = [], []
    for patched in (False, True):
        ENGINE.revert()
        memory = shared_kv.Memory()
        if prefixes:
            forward(model, memory.prefill(prefixes, {}))
        batch = memory.prefill(lengths, prefixes)
        before_call = copy.copy(batch.__dict__)
        metadata = memory.backend.forward_metadata
        kept = {n: copy.copy(v) for n, v in vars(metadata).items() if isinstance(v, torch.Tensor)}
        if patched:
            ENGINE.apply(only=[NAME])
            before = engaged()
            with monkeypatch.context() as counting:
                seen = shared_kv.rows_per_layer(model, counting)
                hidden.append(forward(model, batch))
            assert engaged() == before + 1
            tokens, requests = sum(lengths.values()), len(lengths)
            assert seen == [tokens] * shared_kv.SHARED_FROM + [requests] * 3
            assert all(batch.__dict__[n] is value for n, value in before_call.items())
            assert memory.backend.forward_metadata is metadata
            assert all(torch.equal(getattr(metadata, n), v) for n, v in kept.items())
        else:
            hidden.append(forward(model, batch))
        caches.append([*memory.kv.full_kv_pool.k_buffer, *memory.kv.swa_kv_pool.v_buffer])
    expected, found = hidden
    rows = shared_kv.last_rows(batch)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    shared_kv.assert_near(found[rows], expected[rows])
    others = torch.ones(len(found), dtype=torch.bool)
    others[rows] = False
    assert not found[others].any()
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))


def test_as_the_multimodal_class_calls_it(model: Any):
    """Embeddings and per-layer inputs by name, and no token ids."""
    found = []
    for patched in (False, True):
        ENGINE.revert()
        batch = shared_kv.Memory().prefill({3: 20, 1: 9}, {})
        given = {
            "input_embeds": model.embed_tokens(batch.input_ids),
            "per_layer_inputs": model.get_per_layer_inputs(batch.input_ids),
        }
        if patched:
            ENGINE.apply(only=[NAME])
            before = engaged()
        found.append(model(input_ids=None, forward_batch=batch, positions=batch.positions, **given))
    assert engaged() == before + 1
    rows = shared_kv.last_rows(batch)
    shared_kv.assert_near(found[1][rows], found[0][rows])
    assert not found[1][0].any()


def test_a_picture_that_sees_itself_both_ways(model: Any):
    """Stock's mask over a span up to the last token, behind a prefix longer than the window."""
    found = []
    for patched in (False, True):
        ENGINE.revert()
        memory = shared_kv.Memory()
        forward(model, memory.prefill({2: 11}, {}))
        batch = memory.prefill({2: 12, 1: 5}, {2: 11})
        image = torch.ones(12, 23, dtype=torch.bool).tril(11)
        image[4:, 15:] = True
        text = torch.ones(5, 5, dtype=torch.bool).tril()
        metadata = memory.backend.forward_metadata
        metadata.custom_mask = torch.cat([image.flatten(), text.flatten()])
        metadata.mask_indptr = torch.tensor([0, 12 * 23, 12 * 23 + 25], dtype=torch.int32)
        if patched:
            ENGINE.apply(only=[NAME])
            before = engaged()
        found.append(forward(model, batch)[shared_kv.last_rows(batch)])
    assert engaged() == before + 1
    shared_kv.assert_near(found[1], found[0])


@pytest.mark.parametrize("edge", [0, 1])
def test_the_window_ends_at_stocks_very_token(model: Any, edge: int):
    """The oldest key that stock's last row sees, and the one before it, made huge in turn."""
    found = []
    for patched in (False, True):
        for huge in (False, True):
            ENGINE.revert()
            memory = shared_kv.Memory()
            batch = memory.prefill({1: 20}, {})
            if patched:
                ENGINE.apply(only=[NAME])
            oldest = 19 - shared_kv.WINDOW - edge
            layer = model.layers[shared_kv.SHARED_FROM]
            attend = type(memory.backend).forward

            def poisoned(self, q, k, v, *rest, at=(huge, oldest, memory, attend), **more):
                huge, oldest, memory, attend = at
                if k is None and huge:  # a shared sliding layer reads what was stored
                    slot = self.req_to_token[1, oldest]
                    pool = memory.kv.swa_kv_pool
                    pool.v_buffer[1][memory.allocator.translate_loc_from_full_to_swa(slot)] = 500.0
                return attend(self, q, k, v, *rest, **more)

            assert layer.self_attn.attn.layer_id == 1
            with pytest.MonkeyPatch.context() as patching:
                patching.setattr(type(memory.backend), "forward", poisoned)
                found.append(forward(model, batch)[-1])
    stock, stock_huge, ours, ours_huge = found
    assert torch.equal(stock, stock_huge) == (edge == 1)
    assert torch.equal(ours, ours_huge) == (edge == 1)
    shared_kv.assert_near(ours_huge, stock_huge)


def test_the_rest_of_the_decode_steps_continue(model: Any):
    """Prefill in two chunks, the second a batch with others: as stock's two chunks."""
    found = []
    for patched in (False, True):
        ENGINE.revert()
        if patched:
            ENGINE.apply(only=[NAME])
        memory = shared_kv.Memory()
        forward(model, memory.prefill({1: 16, 2: 9}, {}))
        batch = memory.prefill({1: 10, 4: 5}, {1: 16})
        found.append(forward(model, batch)[shared_kv.last_rows(batch)])
    shared_kv.assert_near(found[1], found[0])


# -- chunks ----------------------------------------------------------------------------------------------


def test_an_unfinished_prompt_costs_nothing_in_the_shared_layers(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    memory = shared_kv.Memory()
    batch = memory.prefill({1: 10, 2: 6, 3: 8}, {})
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, [False, True, False])
    seen = shared_kv.rows_per_layer(model, monkeypatch)
    found = forward(model, batch)
    assert seen == [24] * 3 + [2] * 3
    ENGINE.revert()
    expected = forward(model, shared_kv.Memory().prefill({1: 10, 2: 6, 3: 8}, {}))
    rows = torch.tensor([9, 23])
    shared_kv.assert_near(found[rows], expected[rows])
    assert not found[15].any()


def test_a_batch_of_unfinished_prompts_skips_the_shared_layers(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    """Zeros for every row; the next chunk finds the cache that stock would have written."""
    memory = shared_kv.Memory()
    batch = memory.prefill({1: 12}, {})
    setattr(batch.seq_lens_cpu, yoco_cut.UNFINISHED, [True])
    with monkeypatch.context() as counting:
        seen = shared_kv.rows_per_layer(model, counting)
        assert not forward(model, batch).any()
    assert seen == [12] * 3
    found = forward(model, memory.prefill({1: 7}, {1: 12}))
    ENGINE.revert()
    memory = shared_kv.Memory()
    forward(model, memory.prefill({1: 12}, {}))
    shared_kv.assert_near(found[-1], forward(model, memory.prefill({1: 7}, {1: 12}))[-1])


def worker_batch(**changes: Any) -> Any:
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    prompts = [list(range(10)), list(range(30)), list(range(4))]
    fields = {
        "forward_mode": ForwardMode.EXTEND,
        "seq_lens_cpu": torch.tensor([10, 16, 9]),  # the last one was retracted with five outputs
        "reqs": [SimpleNamespace(origin_input_ids=ids) for ids in prompts],
    }
    return SimpleNamespace(**fields | changes)


def test_which_prompts_are_unfinished():
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    assert patch.unfinished(worker_batch()) == [False, True, False]
    assert patch.unfinished(worker_batch(forward_mode=ForwardMode.DECODE)) is None
    assert patch.unfinished(worker_batch(reqs=None)) is None
    assert patch.unfinished(worker_batch(seq_lens_cpu=None)) is None


def test_the_batch_is_told():
    """Through the constructor that SGLang calls, a class method before and after."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    (swap,) = [s for s in ENGINE.runs[NAME].swaps if s.target == patch.BATCH]
    assert isinstance(vars(ForwardBatch)["init_new"], classmethod)
    made = SimpleNamespace(seq_lens_cpu=torch.tensor([10, 16, 9]))
    run = SimpleNamespace()
    replaced = patch.enable(yoco_cut.YOCO, run, {patch.BATCH: lambda cls, batch, runner: made})[
        patch.BATCH
    ]
    assert replaced(ForwardBatch, worker_batch(), None) is made
    assert getattr(made.seq_lens_cpu, yoco_cut.UNFINISHED) == [False, True, False]
    made.seq_lens_cpu = None
    assert replaced(ForwardBatch, worker_batch(seq_lens_cpu=None), None) is made
    ENGINE.apply(only=[NAME])
    ENGINE.revert()
    assert vars(ForwardBatch)["init_new"] is swap.raw


# -- a decode kernel that is told how many keys a row can have ------------------------------------------


@pytest.mark.parametrize("lengths", [{1: 70}, {2: 68, 1: 66, 4: 5}])
def test_the_decode_kernel_is_given_every_key_of_the_window(
    lengths: Any, monkeypatch: pytest.MonkeyPatch
):
    """A row of the extend step has two keys more than the backend's window: here a split more."""
    monkeypatch.setattr(shared_kv, "WINDOW", 64)
    monkeypatch.setattr(
        shared_kv, "HEAD", {"sliding_attention": 256, "full_attention": 512}
    )  # those that the kernel takes
    wide = shared_kv.build()
    ENGINE.revert()
    batch = shared_kv.Memory().prefill(lengths, {})
    expected = forward(wide, batch)[shared_kv.last_rows(batch)]
    ENGINE.apply(only=[NAME, "decode_attention"])
    before = ENGINE.runs["decode_attention"].counters.engaged
    memory = shared_kv.Memory()
    found = forward(wide, memory.prefill(lengths, {}))[shared_kv.last_rows(batch)]
    assert ENGINE.runs["decode_attention"].counters.engaged == before + 3
    shared_kv.assert_near(found, expected)
    assert memory.backend.sliding_window_size == 63


# -- what is not cut -------------------------------------------------------------------------------------


def algorithm(none: bool) -> Any:
    return SimpleNamespace(is_none=lambda: none)


def refusals() -> list[tuple[str, dict[str, Any]]]:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

    return [
        ("MIXED", {"forward_mode": ForwardMode.MIXED}),
        ("DRAFT_EXTEND", {"forward_mode": ForwardMode.DRAFT_EXTEND}),
        ("SPLIT_PREFILL", {"forward_mode": ForwardMode.SPLIT_PREFILL}),
        ("speculative", {"spec_algorithm": algorithm(False)}),
        ("speculative", {"spec_info": object()}),
        ("hidden states", {"capture_hidden_mode": CaptureHiddenMode.FULL}),
        ("hidden states", {"capture_hidden_mode": CaptureHiddenMode.LAST}),
        ("hidden states", {"return_hidden_states_before_norm": True}),
        ("hidden states", {"return_pooled_hidden_states": True}),
        ("embeddings", {"is_prefill_only": True}),
        ("embeddings", {"dimensions": [8]}),
        ("multi-item", {"multi_item_delimiter_indices": [torch.tensor([1])]}),
        ("logprobs", {"return_logprob": True, "extend_logprob_start_lens_cpu": [3, 6]}),
        ("logprobs", {"return_logprob": True, "extend_logprob_start_lens_cpu": None}),
        ("LoRA", {"lora_ids": [None, "adapter"]}),
        ("data-parallel", {"global_num_tokens_cpu": [11]}),
        ("padded", {"padded_static_len": 8}),
        ("two-batch", {"tbo_split_seq_index": 1}),
        ("context parallelism", {"attn_cp_metadata": object()}),
        ("sparse", {"hisparse_coordinator": object()}),
        ("the KV cache is", {"token_to_kv_pool": SimpleNamespace(dtype=torch.float8_e4m3fn)}),
        ("not on the host", {"seq_lens_cpu": None}),
        ("positions are not", {"positions": torch.arange(12)}),
        ("positions are not", {"positions": torch.arange(33).view(3, 11)}),
        ("not the sequences", {"seq_lens_cpu": torch.tensor([5, 7])}),
        ("without new tokens", {"extend_seq_lens_cpu": [11, 0]}),
    ]


def prefilled(changes: dict[str, Any]) -> Any:
    """A batch of 5 and 6 tokens, changed when its metadata are made already."""
    batch = shared_kv.Memory().prefill({1: 5, 2: 6}, {})
    for name, value in changes.items():
        setattr(batch, name, value)
    return batch


@pytest.mark.parametrize("case", range(26))
def test_every_gate(model: Any, case: int):
    reason, changes = refusals()[case]
    batch = prefilled(changes)
    before = engaged()
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None
    assert engaged() == before
    assert reason in ENGINE.runs[NAME].full_reason()
    allowed = prefilled({})
    assert yoco_cut.cut(model, allowed, allowed.positions, {}) is not None


def test_there_is_a_case_for_every_refusal():
    assert len(refusals()) == 26


@pytest.mark.parametrize(
    "change",
    [
        {"spec_algorithm": "none"},
        {"return_logprob": True, "extend_logprob_start_lens_cpu": [5, 6]},  # outputs' only
        {"lora_ids": [None, None]},
    ],
)
def test_what_looks_alike_and_is_cut(model: Any, change: dict[str, Any]):
    if "spec_algorithm" in change:
        change = {"spec_algorithm": algorithm(True)}
    batch = prefilled(change)
    assert yoco_cut.cut(model, batch, batch.positions, {}) is not None


def test_a_declined_batch_is_stocks_bit_for_bit(model: Any):
    changes = {"return_logprob": True, "extend_logprob_start_lens_cpu": [0, 0]}
    found = forward(model, prefilled(changes))
    ENGINE.revert()
    assert torch.equal(found, forward(model, prefilled(changes)))


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("FlashAttentionBackend", {"__class__": type("FlashAttentionBackend", (), {})}),
        ("deterministic", {"enable_deterministic": True}),
        ("latent", {"use_mla": True}),
    ],
)
def test_other_backends(model: Any, reason: str, change: dict[str, Any]):
    batch = prefilled({})
    if "__class__" in change:
        batch.attn_backend = change["__class__"]()
    else:
        for name, value in change.items():
            setattr(batch.attn_backend, name, value)
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None
    assert reason in ENGINE.runs[NAME].full_reason()


def test_gates_of_model_and_server(model: Any, monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.compilation.piecewise_context_manager import set_forward_context
    from sglang.srt.server_args import get_global_server_args

    run = ENGINE.runs[NAME]

    def reason(**kwargs: Any) -> str:
        monkeypatch.setattr(run, "_decline_reason", "")
        batch = prefilled({})
        assert yoco_cut.cut(model, batch, batch.positions, kwargs) is None
        return run.full_reason()

    assert "get_embedding" in reason(get_embedding=True)
    with monkeypatch.context() as m:
        m.setattr(model, "layers_to_capture", [1])
        assert "captured" in reason()
    for name, value, word in (
        ("enable_lora", True, "LoRA"),
        ("is_embedding", True, "embeddings"),
        ("forward_hooks", [{"name": "steering"}], "hooks"),
        ("debug_tensor_dump_output_folder", "/tmp/dump", "hooks"),
    ):
        with monkeypatch.context() as m:
            m.setattr(get_global_server_args(), name, value)
            assert word in reason()
    with monkeypatch.context() as m:
        m.setattr(yoco_cut.custom_ops, "capturing", lambda: True)
        assert "captured into" in reason()
    with set_forward_context(None, [], None, [], []):
        assert "piecewise" in reason()
    with monkeypatch.context() as m:  # a pipeline stage without the model's end
        m.setattr(model.config, "num_hidden_layers", 7)
        assert "no KV-shared layers" in reason()


def test_a_model_without_shared_layers_and_a_decode_batch(model: Any):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    batch = prefilled({})
    assert yoco_cut.cut(shared_kv.build(shared=0), batch, batch.positions, {}) is None
    assert "no KV-shared layers" in ENGINE.runs[NAME].full_reason()
    batch.forward_mode = ForwardMode.DECODE
    declined = ENGINE.runs[NAME].counters.cells[:]
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None
    assert ENGINE.runs[NAME].counters.cells[:] == declined


def test_single_tokens_gain_nothing(model: Any):
    batch = shared_kv.Memory().prefill({1: 1, 2: 1}, {1: 4, 2: 9})
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None
    assert "every row" in ENGINE.runs[NAME].full_reason()


def test_together_with_the_patches_of_the_layers(model: Any):
    """The norm that a layer makes for the next one is cut as well."""
    ENGINE.apply(only=[NAME, "input_norm", "ple_tail", "layer_norms"])
    from gemma4_turbo.fusions.fusion import Fusion

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Fusion, "_compared", lambda *args: None)  # no stock kernel to compare with
        before = {n: ENGINE.runs[n].counters.engaged for n in (NAME, "input_norm")}
        batch = shared_kv.Memory().prefill({1: 10, 2: 6}, {})
        found = forward(model, batch)
    assert all(ENGINE.runs[n].counters.engaged > count for n, count in before.items())
    ENGINE.revert()
    expected = forward(model, shared_kv.Memory().prefill({1: 10, 2: 6}, {}))
    rows = shared_kv.last_rows(batch)
    shared_kv.assert_near(found[rows], expected[rows])


def test_traced_code_sees_no_cut(model: Any):
    """In a graph that torch.compile makes all rows go through all layers; nothing breaks it."""
    batch = prefilled({})

    def run(x: torch.Tensor) -> torch.Tensor:
        found = yoco_cut.cut(model, batch, x, {})
        return x + (1 if found is None else 2)

    before = engaged()
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(run, fullgraph=True, backend="eager")
        assert torch.equal(compiled(batch.positions), batch.positions + 1)
    assert engaged() == before
    assert run(batch.positions)[0] == batch.positions[0] + 2


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False)])
def test_the_forerunners_variable(value: str, on: bool):
    found = switches.read({"SGLANG_GEMMA4_YOCO": value}).decisions[NAME]
    assert found == (on, f"SGLANG_GEMMA4_YOCO={value}")


# -- who sees the rows -----------------------------------------------------------------------------------


def hooked_parts(model: Any) -> list[Any]:
    last = model.layers[-1]
    return [model, last, last.self_attn, last.mlp.act_fn, model.layers[shared_kv.SHARED_FROM]]


@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("how", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_all_rows_and_changes_them(model: Any, part: int, how: str):
    """On the model, on the layers behind the cut, in them, and on the last norm; also a late one."""
    target = [*hooked_parts(model), model.norm][part]
    prefill = {1: 5, 2: 6}
    forward(model, shared_kv.Memory().prefill(prefill, {}))
    seen: list[int] = []

    def shapes(values: Any) -> None:
        seen.extend(x.shape[0] for x in values if isinstance(x, torch.Tensor))

    def after(module: Any, given: Any, found: Any) -> Any:
        shapes(found if isinstance(found, tuple) else (found,))
        return None if isinstance(found, tuple) else found * 2

    def before(module: Any, given: Any) -> None:
        shapes(given)

    counted = engaged()
    with getattr(target, how)(after if how == "register_forward_hook" else before):
        found = forward(model, shared_kv.Memory().prefill(prefill, {}))
        patched = list(seen)
        seen.clear()
        ENGINE.revert()
        expected = forward(model, shared_kv.Memory().prefill(prefill, {}))
    assert torch.equal(found, expected)
    assert patched == seen
    assert engaged() == counted
    assert "has forward hooks" in ENGINE.runs[NAME].full_reason()


def test_hooks_before_the_cut_change_nothing(model: Any):
    with model.layers[0].register_forward_hook(lambda *given: None):
        batch = prefilled({})
        assert yoco_cut.cut(model, batch, batch.positions, {}) is not None


def test_a_hook_on_all_modules(model: Any):
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda *given: None):
        batch = prefilled({})
        assert yoco_cut.cut(model, batch, batch.positions, {}) is None


@pytest.mark.parametrize("ours", [False, True])
def test_a_forward_that_somebody_has_set(model: Any, ours: bool, monkeypatch: pytest.MonkeyPatch):
    """SGLang sets one itself where it has piecewise graphs: that one runs stock's."""

    def trampoline(*given: Any) -> None: ...

    if ours:
        trampoline.__module__ = "sglang.srt.compilation.compile"
    monkeypatch.setitem(vars(model), "forward", trampoline)
    batch = prefilled({})
    assert (yoco_cut.cut(model, batch, batch.positions, {}) is not None) == ours


def test_a_layer_that_was_exchanged_is_looked_at(model: Any, monkeypatch: pytest.MonkeyPatch):
    batch = prefilled({})
    assert yoco_cut.cut(model, batch, batch.positions, {}) is not None
    norm = copy.deepcopy(model.norm)
    norm.register_forward_hook(lambda *given: None)
    monkeypatch.setitem(model._modules, "norm", norm)
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None


def test_a_hook_on_who_gets_the_result(model: Any):
    """The logits processor is handed all rows, and what comes out of it is stock's either way."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    made = prefilled({})
    note = {patch.BATCH: lambda cls, batch, runner: made}
    build = patch.enable(yoco_cut.YOCO, ENGINE.runs[NAME], note)
    processor = torch.nn.Identity()
    runner = SimpleNamespace(model=SimpleNamespace(logits_processor=processor))
    build[patch.BATCH](ForwardBatch, worker_batch(), runner)
    setattr(made.seq_lens_cpu, yoco_cut.UNFINISHED, None)
    assert yoco_cut.cut(model, made, made.positions, {}) is not None
    with processor.register_forward_pre_hook(lambda *given: None):
        assert yoco_cut.cut(model, made, made.positions, {}) is None
    assert "the logits processor has forward hooks" in ENGINE.runs[NAME].full_reason()


# -- what raises, and what is not known ------------------------------------------------------------------


@pytest.mark.parametrize("where", ["unfit", "plan", "first_shared"])
def test_an_error_of_ours_leaves_all_rows(model: Any, where: str, monkeypatch: pytest.MonkeyPatch):
    tries: list[Any] = []

    def fails(*given: Any) -> Any:
        tries.append(given)
        raise AttributeError("no such thing")

    with monkeypatch.context() as context:
        context.setattr(yoco_cut, where, fails)
        before = engaged()
        outputs = [forward(model, prefilled({})) for _ in range(2)]
    assert len(tries) == 1
    assert engaged() == before
    assert ENGINE.runs[NAME].state == states.FAILED
    ENGINE.revert()
    expected = forward(model, prefilled({}))
    assert all(torch.equal(found, expected) for found in outputs)


@pytest.mark.parametrize("where", [(yoco_cut, "tail"), (yoco_graph, "run")])
def test_an_error_behind_the_cut_sends_all_rows_on(
    model: Any, where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
):
    """The layers before the cut have run already, and are not run again."""

    def fails(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    with monkeypatch.context() as context:
        context.setattr(*where, fails)
        outputs = [forward(model, prefilled({})) for _ in range(2)]
    assert ENGINE.runs[NAME].state == states.FAILED
    ENGINE.revert()
    expected = forward(model, prefilled({}))
    assert all(torch.equal(found, expected) for found in outputs)


def test_requests_that_tell_nothing_are_no_error():
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    made = SimpleNamespace(seq_lens_cpu=torch.tensor([10, 16, 9]))
    run = ENGINE.runs[NAME]
    build = patch.enable(yoco_cut.YOCO, run, {patch.BATCH: lambda cls, batch, runner: made})
    build[patch.BATCH](ForwardBatch, worker_batch(reqs=[SimpleNamespace()] * 3), None)
    assert getattr(made.seq_lens_cpu, yoco_cut.UNFINISHED) is None
    assert run.state == states.FAILED


def test_a_backend_of_the_same_name_is_not_known(model: Any, monkeypatch: pytest.MonkeyPatch):
    batch = prefilled({})
    kind = type(batch.attn_backend)
    monkeypatch.setattr(batch.attn_backend, "__class__", type(kind.__name__, (kind,), {}))
    assert yoco_cut.cut(model, batch, batch.positions, {}) is None
    assert "the attention backend is TritonAttnBackend" in ENGINE.runs[NAME].full_reason()
