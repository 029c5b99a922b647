"""Steps of SGLang's real ``FrozenKVMTPWorker`` on the CPU, printed as JSON for the tests.

Run in a process of its own: the worker's module needs sgl_kernel, whose library wants NVIDIA's
driver only to be there. A library of the same name with the functions that it names lets it load.
What cannot exist without a GPU is stood in for: the two models and the kernel of the tree's
verification. The worker, the batches, the requests and the verification around it are stock's.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DRIVER_FUNCTIONS = (
    "cuGetErrorString",
    "cuMemAddressFree",
    "cuMemGetAddressRange_v2",
    "cuMemRelease",
    "cuMemRetainAllocationHandle",
    "cuMemSetAccess",
    "cuMemUnmap",
    "cuPointerGetAttribute",
)


def load_driver_stub(folder: Path) -> None:
    """Load a ``libcuda.so.1`` whose every function fails, unless there is a real one."""
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        return
    except OSError:
        pass
    source, library = folder / "stub.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void){{return 100;}}\n" for name in DRIVER_FUNCTIONS))
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True
    )
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def greedy_tree(
    predicts: Any,
    accept_index: Any,
    accept_token_num: Any,
    candidates: Any,
    retrieve_index: Any,
    target_predict: Any,
    **_: Any,
) -> tuple[Any, Any, Any]:
    """Greedy verification of one chain per request, which stock does in a CUDA kernel."""
    for row, index in enumerate(retrieve_index.tolist()):
        accept_index[row, 0], accepted = index[0], 0
        while (
            accepted + 1 < len(index)
            and candidates[row, accepted + 1] == target_predict[row, accepted]
        ):
            accepted += 1
            accept_index[row, accepted] = index[accepted]
        accept_token_num[row] = accepted
        for place in range(accepted + 1):
            predicts[index[place]] = target_predict[row, place]
    return predicts, accept_index, accept_token_num


def worker(predictions: list[int], data_parallel: bool) -> Any:
    """A stock worker around models that answer ``predictions``, one token per request."""
    import torch
    from sglang.srt.speculative import frozen_kv_mtp_worker as stock

    from tests.cpu import mtp_batches as made

    def forward(batch: Any, is_verify: bool) -> Any:
        logits = torch.zeros(len(predictions) * made.DRAFT_TOKENS, made.VOCAB)
        for row, token in enumerate(predictions):
            logits[row * made.DRAFT_TOKENS : (row + 1) * made.DRAFT_TOKENS, token] = 1
        hidden = torch.ones(len(logits), made.HIDDEN)
        output = SimpleNamespace(next_token_logits=logits, hidden_states=hidden)
        return SimpleNamespace(logits_output=output, can_run_cuda_graph=False)

    def seed(batch: Any, last_token_ids: Any, last_hidden_states: Any, **_: Any) -> None:
        batch.spec_info = made.draft_input(len(last_token_ids), value=9)

    runner = SimpleNamespace(
        hybrid_gdn_config=None, mamba2_config=None, hybrid_lightning_config=None
    )
    built = object.__new__(stock.FrozenKVMTPWorker)
    vars(built).update(
        server_args=SimpleNamespace(enable_dp_attention=data_parallel),
        target_worker=SimpleNamespace(forward_batch_generation=forward, model_runner=runner),
        token_to_kv_pool_allocator=made.Allocator(),
        page_size=1,
        topk=1,
        device="cpu",
        speculative_num_steps=made.STEPS,
        speculative_num_draft_tokens=made.DRAFT_TOKENS,
        draft_tp_context=stock.empty_context,
        draft=made.verify_input,
        _run_assistant_seed_step=seed,
        _model_runner=SimpleNamespace(
            tp_group=None, model=SimpleNamespace(backbone_hidden_size=made.HIDDEN)
        ),
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    return built


def step(predictions: list[int], data_parallel: bool) -> dict[str, Any]:
    """Two requests decode one step, then a prefilled third is merged as the scheduler does."""
    import torch
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    from tests.cpu import mtp_batches as made

    running, fresh = made.batch("a", "b"), made.batch("c", first_slot=2)
    running.spec_info, fresh.spec_info = made.draft_input(2), made.draft_input(1, value=5)

    def prepare(self: Any, batch: Any, page_size: int) -> None:
        batch.input_ids = self.draft_token
        batch.out_cache_loc = torch.arange(len(self.draft_token))

    EagleVerifyInput.prepare_for_verify = prepare  # it allocates from a KV pool
    done = worker(predictions, data_parallel).forward_batch_generation(running)
    found = {
        "left": type(running.spec_info).__name__,
        "correct drafts": done.num_correct_drafts_per_req_cpu,
        "error": "",
    }
    try:
        running.merge_batch(fresh)
        running.filter_batch(v1_spec_info_filtered=True)
        found["running"] = [r.rid for r in running.reqs]
        found["seed rows"] = len(running.spec_info.topk_index)
    except AttributeError as error:
        found["error"] = f"AttributeError: {error}"
    return found


def main(folder: Path) -> None:
    """Every scenario, stock first."""
    load_driver_stub(folder)
    from sglang.srt.managers import scheduler  # noqa: F401  (imports the worker's module rightly)
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.speculative import eagle_info, frozen_kv_mtp_worker

    import gemma4_turbo
    from tests.cpu import mtp_batches as made

    eagle_info.verify_tree_greedy_func = greedy_tree
    frozen_kv_mtp_worker.FrozenKVMTPWorker.model_runner = property(lambda self: self._model_runner)
    batch_class = frozen_kv_mtp_worker.ScheduleBatch
    batch_class.get_model_worker_batch = lambda self, **_: SimpleNamespace(  # read by a model only
        capture_hidden_mode=forward_batch_info.CaptureHiddenMode.FULL
    )
    idle = batch_class.prepare_for_idle

    def idle_on_cpu(self: Any) -> None:  # a copied batch has the default device, a GPU
        self.device = "cpu"
        idle(self)

    batch_class.prepare_for_idle = idle_on_cpu
    found = {}
    for name in ("stock", "patched"):
        if name == "patched":
            rows = gemma4_turbo.apply(only=["mtp_merge_batch"])
            assert "active" in {row.state for row in rows}, rows
        found[f"{name}, plain"] = step([made.EOS, made.EOS], False)
        found[f"{name}, data parallel"] = step([made.EOS, made.EOS], True)
        found[f"{name}, one goes on"] = step([made.EOS, 6], False)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
