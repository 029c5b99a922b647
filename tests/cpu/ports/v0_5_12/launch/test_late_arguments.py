"""SGLang's own ServerArgs, made before and after the patches of them were in."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.engine import gates
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.launch import late_arguments, launch_gates, routes
from tests.cpu.conftest import patched_sglang
from tests.cpu.ports.v0_5_12.memory.test_swa_ratio import folder, from_keywords

NAMES = ["swa_ratio", "mm_prefill_graph"]


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang's modules."""
    with patched_sglang(tmp_path_factory, only=NAMES):
        yield


@pytest.fixture(autouse=True)
def stock() -> Iterator[None]:
    """A test starts without us."""
    ENGINE.revert()
    yield
    ENGINE.revert()


def launch(server_args: Any) -> Any:
    """Through the gate."""
    calls: list[Any] = []
    launch_gates._before_launch(ENGINE)(calls.append, None, (server_args,), {})
    return calls


def had_no_say(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of it."""
    return [line for line in caplog.messages if "had no say" in line]


def test_made_after_us(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing to say, and nothing more in what other processes and the log see."""
    plain = from_keywords(folder(tmp_path))
    ENGINE.apply(only=NAMES)
    assert "__post_init__" in late_arguments.MADE
    arguments = from_keywords(folder(tmp_path))
    assert late_arguments.without_a_say(ENGINE, arguments) == {}
    assert late_arguments.without_a_say(ENGINE, dataclasses.replace(arguments)) == {}
    assert late_arguments.without_a_say(ENGINE, pickle.loads(pickle.dumps(arguments))) == {}
    assert launch(arguments) == [arguments]
    assert not had_no_say(caplog)
    assert dataclasses.asdict(arguments).keys() == dataclasses.asdict(plain).keys()
    assert "had_a_say" not in repr(arguments)


def test_made_before_us(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Told by name; made again, they have their say."""
    arguments = from_keywords(folder(tmp_path))
    ENGINE.apply(only=NAMES)
    assert launch(arguments) == [arguments]
    (line,) = had_no_say(caplog)
    assert "swa_ratio" in line
    assert "mm_prefill_graph" in line
    assert arguments.swa_full_tokens_ratio == 0.8  # not ours to change any more
    assert late_arguments.without_a_say(ENGINE, dataclasses.replace(arguments)) == {}


def test_made_between_two_calls_of_apply(tmp_path: Path) -> None:
    """Only what came after them had no say."""
    ENGINE.apply(only=["mm_prefill_graph"])
    arguments = from_keywords(folder(tmp_path))
    ENGINE.apply(only=NAMES)
    assert late_arguments.without_a_say(ENGINE, arguments) == {"swa_ratio": True}


@pytest.mark.parametrize(
    ("only", "experts", "given", "refused"),
    [
        (["swa_ratio"], 128, {}, True),
        (["swa_ratio"], 0, {}, False),  # dense: stock's default is right
        (["swa_ratio"], 128, {"swa_full_tokens_ratio": 0.3}, False),
        (["mm_prefill_graph"], 128, {}, False),  # a text model
        (["vision_batch"], 128, {}, False),  # switched off, both
    ],
)
def test_strict_refuses_where_it_would_have_mattered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    only: list[str],
    experts: int,
    given: dict[str, Any],
    refused: bool,
) -> None:
    """The others are only told, and one that is off is not."""
    monkeypatch.setattr(routes, "bootstrap_routes", lambda: [routes.ENTRY_POINT])
    monkeypatch.setattr(gates, "launch_problems", lambda engine: [])
    arguments = from_keywords(folder(tmp_path, experts=experts), **given)
    ENGINE.apply(only=only)
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")
    if refused:
        with pytest.raises(gates.StrictModeError, match="swa_ratio had no say"):
            launch(arguments)
    else:
        assert launch(arguments) == [arguments]
    assert bool(had_no_say(caplog)) is (only != ["vision_batch"])


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where graphs would have been recorded and now are not."""
    arguments = from_keywords(folder(tmp_path, multimodal=True))
    ENGINE.apply(only=["mm_prefill_graph"])
    code: Any = ENGINE.runs["mm_prefill_graph"].code
    for reason, acts in ((None, True), ("another attention backend", False)):
        monkeypatch.setattr(code, "unfit", lambda arguments, reason=reason: reason)
        assert late_arguments.without_a_say(ENGINE, arguments) == {"mm_prefill_graph": acts}
    arguments.enforce_piecewise_cuda_graph = True
    monkeypatch.setattr(code, "unfit", lambda arguments: None)
    assert late_arguments.without_a_say(ENGINE, arguments) == {"mm_prefill_graph": False}


def test_a_patch_that_cannot_tell_would_not_have_acted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It declines at once where it cannot read the model."""
    arguments = from_keywords(folder(tmp_path))
    ENGINE.apply(only=["swa_ratio"])

    def broken(arguments: Any) -> str:
        raise OSError("no such model")

    monkeypatch.setattr(ENGINE.runs["swa_ratio"].code, "unfit", broken)
    assert late_arguments.without_a_say(ENGINE, arguments) == {"swa_ratio": False}


def test_what_is_no_server_args(tmp_path: Path) -> None:
    """Has nothing to say."""
    ENGINE.apply(only=NAMES)
    for other in (None, 1, object()):
        assert late_arguments.without_a_say(ENGINE, other) == {}


def test_every_patch_of_server_args_is_known_here() -> None:
    """A new one needs its line."""
    found = {
        run.patch.name
        for run in ENGINE.runs.values()
        for port in run.ports
        if any(target.startswith(late_arguments._CLASS) for target in port.targets)
    }
    assert found == set(late_arguments._ACTS)
