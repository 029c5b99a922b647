"""GPU tests and benchmarks of the installed release line without a GPU: imported, collected, some called.

What is called gets CPU tensors where it asks for a GPU's; kernels run in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

REPOSITORY = Path(__file__).resolve().parents[2]
GPU_TESTS, BENCH = REPOSITORY / "tests" / "gpu", REPOSITORY / "bench"


class Collection:
    """A pytest plugin: what of the GPU tests is collected, skipped, or cannot be imported."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Against the folder's own rule, which wants a GPU."""
        return False if collection_path.is_relative_to(GPU_TESTS) else None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Of a module."""
        name = Path(report.nodeid).name
        if report.failed:
            self.failed[name] = str(report.longrepr)
        elif report.skipped:
            self.skipped[name] = str(report.longrepr[2])  # type: ignore[index]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many tests a module has."""
        for item in session.items:
            name = item.path.name
            self.counts[name] = self.counts.get(name, 0) + 1


class OnCPU(TorchFunctionMode):
    """What asks for a GPU gets a CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        args = tuple("cpu" if isinstance(arg, str) and arg == "cuda" else arg for arg in args)
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def imports() -> dict[str, str]:
    """Of each module of the benchmarks, why it cannot be imported, or nothing."""
    found = {}
    for path in sorted(BENCH.rglob("*.py")):
        name = path.relative_to(BENCH).with_suffix("")
        if path.stem == "__init__":
            continue
        try:
            importlib.import_module(".".join(("bench", *name.parts)))
            found[f"{name}.py"] = ""
        except BaseException:
            found[f"{name}.py"] = traceback.format_exc()
    return found


# -- what can be called ---------------------------------------------------------------------------


def module(name: str) -> ModuleType:
    return importlib.import_module(f"tests.gpu.{name}")


def windows() -> None:
    module("test_extend_attention").test_window_slots_are_stocks(3, 15)


def stocks_extend_attention() -> None:
    tests = module("test_extend_attention")
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"heads": 2, "kv_heads": 1, "dtype": torch.float16}
    batch = tests.make(generator, [5, 1], [3, 20], head_dim=64, window=9, **options)
    exact = tests.kernel.reference_extend_attention(*batch.positional, **batch.keywords)
    found = tests.by_stock(batch)
    assert tests.relative_error(found[: batch.rows], exact[: batch.rows]) < 2e-3
    assert tests.query_block(256) >= 16


def stocks_decode_attention() -> None:
    tests = module("test_decode_attention")
    arguments = tests.operands((1, 20), 4, 2, 64, torch.float16)
    assert tests.error(tests.stock(arguments, 2), tests.exact(arguments)) < 2e-3


def alignment() -> None:
    """The lengths are stock's for this line, which a stand-in has to have for its CUDA kernels."""
    tests = module("test_moe_align")
    kernel = tests.kernel

    def stock(ids: torch.Tensor, block: int, experts: int, *others: Any, **more: Any) -> Any:
        return kernel.reference_align(ids.int(), block, experts, tests.MULTIPLE)

    generator = torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tests, "STOCK", stock)
        tests.test_every_topk(3, generator)
        tests.test_no_tokens()
        tests.test_everything_else_takes_stocks_path(None, generator)
        run = tests.make_run()
        ids = torch.arange(tests.OWN_SLOTS + 8, dtype=torch.int32).view(-1, 8) % 128
        before = run.engaged_count()
        found = tests.replacement(run)(ids, 16, 128)
        assert kernel.difference(found, stock(ids, 16, 128), 16) is None
        assert run.engaged_count() == before + 1, run.full_reason()


def arguments_of_the_experts() -> None:
    """What stock's look-up of a configuration, and the layer around it, read."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as config

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(config, "get_device_name", lambda: "none")
        module("lines").give_arguments(patched)
        found = config.try_get_optimal_moe_config((8, 64, 32), (8, 32, 32), 2, None, 4)
    assert found["BLOCK_SIZE_M"] >= 16


def step_prologue() -> None:
    tests = module("test_step_prologue")
    for ple in (True, False):
        launches = iter([1, 1 + tests.launches_for_ids() + (6 if ple else 0)])
        with pytest.MonkeyPatch.context() as patched:
            counted = lambda call, left=launches: (call(), next(left))[1]  # noqa: E731
            patched.setattr(tests, "launches", counted)
            patched.setattr(tests, "STEP", 17)  # the interpreter takes its time for each token
            tests.test_multimodal_forward(ple, torch.Generator().manual_seed(20))
    generator = torch.Generator().manual_seed(20)
    tests.test_gather(torch.bfloat16, 2, 7, generator)
    tests.test_everything_else_takes_stocks_path(generator)


def a_projections_norm_engages() -> None:
    """The line's own way to look at a norm that was never called."""
    tests = module("test_step_prologue")
    generator = torch.Generator().manual_seed(20)
    run, text = tests.make_run(), tests.model(generator, 35)
    projection, inputs = tests.projection_of(generator, 2, 35, torch.bfloat16)
    before = run.counters.engaged
    tests.replaced(run)[tests.patch.PROJECT](text, projection, inputs)
    assert run.counters.engaged == before + 1, run.full_reason()


CALLS: tuple[Callable[[], None], ...] = (
    windows,
    stocks_extend_attention,
    stocks_decode_attention,
    alignment,
    arguments_of_the_experts,
    step_prologue,
    a_projections_norm_engages,
)


class Generator(torch.Generator):
    """A CPU's, whatever it is asked for."""

    def __new__(cls, device: object = None) -> Any:
        """Of torch's own class."""
        return STOCK_GENERATOR.__new__(STOCK_GENERATOR, "cpu")


STOCK_GENERATOR = torch.Generator


def calls() -> Iterator[tuple[str, str]]:
    """Each with its traceback, or nothing."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "Generator", Generator)
        for call in CALLS:
            try:
                with OnCPU(), torch.no_grad():
                    call()
                yield call.__name__, ""
            except BaseException:
                yield call.__name__, traceback.format_exc()


def line() -> dict[str, Any]:
    """What `gemma4_turbo.cli.lines` says."""
    from gemma4_turbo.cli import lines

    lines.stock()
    from gemma4_turbo.fusions.stock import followed

    said = SimpleNamespace(
        package=lines.package(),
        followed=type(followed()).__module__,
        folded=lines.router_scale_is_folded(),
        skipped=lines.skipped_slot(),
        multiple=lines.align_multiple(),
        own=[lines.slots_of_stocks(), lines.experts_of_stocks()],
        from_zero=lines.rules().sums_from_zero(),
        absent={
            name: lines.patch_unfit(name)
            for name in ("router", "router_few", "router_norm", "picture_memory", "yoco_graph")
        },
    )
    return vars(said)


def main() -> None:
    """Print all of it as JSON."""
    collection = Collection()
    arguments = ["--collect-only", "-qq", "-p", "no:cacheprovider", "-p", "no:xdist"]
    pytest.main([*arguments, "--rootdir", str(REPOSITORY), str(GPU_TESTS)], plugins=[collection])
    found = {
        "counts": collection.counts,
        "skipped": collection.skipped,
        "failed": collection.failed,
        "imports": imports(),
        "line": line(),
        "calls": dict(calls()),
    }
    print()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
