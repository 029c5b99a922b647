"""The patches against real SGLang releases, as the package registry serves them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest

from bench import releases
from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.cli import releases as commands
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.fingerprints import Definitions
from gemma4_turbo.engine.port import Port
from gemma4_turbo.instance import PORTS, every_port
from tests.cpu.conftest import REPOSITORY
from tests.releases import BASELINE

CACHE = REPOSITORY / ".wheels"  # git-ignored
(ROUTER,) = PORTS["router"]
TARGET, RELIES_ON = ROUTER.sources

EDITS = [
    (TARGET, "torch.topk(gating_output, k=topk, dim=-1)", "torch.topk(gating_output, k=topk)"),
    (
        TARGET,
        "topk_weights.to(torch.float32), topk_ids",
        "topk_weights.to(torch.float64), topk_ids",
    ),
    (TARGET, "            custom_routing_function=routing_function,\n", ""),
    (
        RELIES_ON,
        "sm_first=not self.topk_config.renormalize",
        "sm_first=self.topk_config.renormalize",
    ),
]


@cache
def wheel(release: str) -> Path:
    """SGLang's wheel of that release; downloaded once, a failure if that is not possible."""
    for _ in range(2):
        found = sorted(CACHE.glob(f"sglang-{release}-*.whl"))
        if found:
            return found[0]
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(CACHE)]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, f"sglang=={release}"],
            check=True,
            timeout=300,
        )
    raise FileNotFoundError(f"pip download left no wheel of sglang {release} in {CACHE}")


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("0.5.11", states.ACTIVE),
        (BASELINE, states.ACTIVE),
        ("0.5.13", states.UPSTREAMED),
        ("0.5.23", states.UPSTREAMED),
    ],
)
def test_router_on_a_release(release: str, state: str) -> None:
    """Written for the old ones, needless from the release that ships its own."""
    definitions = Definitions(fingerprints.wheel_source(wheel(release)))
    verdict = fingerprints.judge([ROUTER], release, definitions)
    assert verdict.state == state
    assert f"SGLang {release}" in verdict.reason
    if state == states.UPSTREAMED:
        assert ROUTER.superseded_since in verdict.reason


@pytest.mark.parametrize("release", ["0.5.13", "0.5.23"])
def test_no_patch_drifts_on_a_release_that_is_known(release: str) -> None:
    """A later release is recognised: its own patch, or none for it. Strict mode starts there."""
    definitions = Definitions(fingerprints.wheel_source(wheel(release)))
    found = {
        patch.name: fingerprints.judge(PORTS[patch.name], release, definitions).state
        for patch in CATALOGUE
    }
    assert set(found.values()) <= {states.ACTIVE, states.UPSTREAMED, states.UNSUPPORTED}
    upstreamed = {name for name, state in found.items() if state == states.UPSTREAMED}
    assert upstreamed >= {"router", "router_norm"}


# The oldest release that a user is told to install, and the newest.
@pytest.mark.parametrize("release", [BASELINE, "0.5.23"])
def test_a_supported_release_needs_no_work(release: str) -> None:
    """``release`` exits with 0: what has no port there says why, or is for later releases."""
    found = {need.patch: need for need in commands.needs(commands.opened(wheel(release)))}
    assert {name for name, need in found.items() if need.what not in commands.DONE} == set()
    debug = found["trtllm_debug"]
    assert debug.what == (commands.SAME if release == BASELINE else commands.NEEDLESS)
    assert debug.reason.startswith(f"SGLang {release}: ") == (release != BASELINE)


@pytest.mark.parametrize("release", ["0.5.11", BASELINE, "0.5.13", "0.5.23"])
def test_the_table_is_what_the_wheels_hold(release: str) -> None:
    """The tables were made from these very files."""
    recorded = fingerprints.record_release(fingerprints.wheel_source(wheel(release)), every_port())
    assert recorded == fingerprints.known_releases()[release]
    assert recorded


@pytest.mark.parametrize("release", ["0.5.11", BASELINE, "0.5.13", "0.5.23"])
def test_the_documented_states_are_what_the_wheels_give(release: str) -> None:
    """`bench/results/releases.csv`, of which the documentation's table is made."""
    recorded = pd.read_csv(releases.RECORD, dtype=str)
    rows = recorded[recorded["release"] == release].to_dict("records")
    assert rows == releases.judged(wheel(release))


def test_the_documented_states_are_complete_and_as_the_fingerprints_say() -> None:
    """A patch is active where all of its sources are those of a release that it was written for."""
    table = fingerprints.known_releases()
    recorded = pd.read_csv(releases.RECORD, dtype=str).set_index(["release", "patch"])["state"]
    assert set(recorded.index) == {
        (release, patch.name) for release in table for patch in CATALOGUE
    }
    for patch in CATALOGUE:
        for release, prints in table.items():
            fits = any(_is_source_of(port, prints, table) for port in PORTS[patch.name])
            assert (recorded[release, patch.name] == states.ACTIVE) == fits, (release, patch.name)


def _is_source_of(port: Port, prints: dict[str, str], table: dict[str, dict[str, str]]) -> bool:
    found = [prints.get(target) for target in port.sources]
    return found in [[table[known].get(t) for t in port.sources] for known in port.written_for]


def test_every_release_that_a_patch_is_written_for_is_in_the_table() -> None:
    """With all of its sources: a record that names an absent release would never be active."""
    table = fingerprints.known_releases()
    for port in every_port():
        for release in port.written_for:
            assert set(port.sources) <= set(table[release]), (port.module, release)


def test_the_tables_are_no_command() -> None:
    """Who types their old name is told the new one, in a line."""
    done = subprocess.run(
        [sys.executable, "-m", "gemma4_turbo.fingerprints"], capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "python -m gemma4_turbo release" in line


def test_the_installed_release_is_on_record() -> None:
    """Found without importing SGLang, and equal to the registry's."""
    installed = fingerprints.record_release(fingerprints.installed_source, every_port())
    assert installed == fingerprints.known_releases()[metadata.version("sglang")]


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """The baseline's two files that the router looks at, as an installation has them."""
    with zipfile.ZipFile(wheel(BASELINE)) as archive:
        for source in ROUTER.sources:
            archive.extract(source.partition(":")[0].replace(".", "/") + ".py", tmp_path)
    return tmp_path


def judged(root: Path, release: str | None = BASELINE) -> fingerprints.Verdict:
    """The verdict over an unpacked copy."""
    return fingerprints.judge([ROUTER], release, Definitions(fingerprints.folder_source(root)))


def edit(root: Path, target: str, old: str, new: str) -> None:
    """Change one place of the target's file."""
    path = root / (target.partition(":")[0].replace(".", "/") + ".py")
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def test_unpacked_and_untouched(unpacked: Path) -> None:
    """The counterpart of the edits below."""
    assert judged(unpacked).state == states.ACTIVE


@pytest.mark.parametrize(("target", "old", "new"), EDITS)
def test_one_edited_line_is_drifted(unpacked: Path, target: str, old: str, new: str) -> None:
    """The verdict names the source that changed, and only that."""
    edit(unpacked, target, old, new)
    verdict = judged(unpacked)
    assert verdict.state == states.DRIFTED
    assert target in verdict.reason
    (other,) = {TARGET, RELIES_ON} - {target}
    assert other not in verdict.reason


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("            # Fold per_expert_scale into routing weights\n", ""),
        ("# always True for Gemma4;", "# renormalisation is always on;"),
        ("Gemma4 routing: softmax over ALL experts", "How it routes"),
        ("topk_output = self.topk(hidden_states, router_logits)", "topk_output = None"),
    ],
)
def test_an_edited_comment_is_not(unpacked: Path, old: str, new: str) -> None:
    """Nor code outside the targets."""
    edit(unpacked, TARGET, old, new)
    assert judged(unpacked).state == states.ACTIVE


@pytest.mark.parametrize("release", ["9.9.9", "0.5.12.dev3+gabc", None])
def test_the_source_decides_not_the_number(unpacked: Path, release: str | None) -> None:
    """A release that nobody has heard of, with the baseline's source."""
    assert judged(unpacked, release).state == states.ACTIVE


def test_a_known_number_with_unknown_source_is_drifted(unpacked: Path) -> None:
    """The other way round."""
    edit(unpacked, TARGET, *EDITS[0][1:])
    assert judged(unpacked, "0.5.11").state == states.DRIFTED


@pytest.mark.parametrize("target", [TARGET, RELIES_ON])
def test_an_absent_module_is_unsupported(unpacked: Path, target: str) -> None:
    """As in releases from before Gemma 4."""
    (unpacked / (target.partition(":")[0].replace(".", "/") + ".py")).unlink()
    verdict = judged(unpacked)
    assert verdict.state == states.UNSUPPORTED
    assert target in verdict.reason


def test_an_absent_sglang_is_unsupported(tmp_path: Path) -> None:
    """Nothing there at all."""
    verdict = judged(tmp_path, None)
    assert verdict.state == states.UNSUPPORTED
    assert "this SGLang" in verdict.reason
