"""The one line for the server's log."""

from __future__ import annotations

import pytest

from gemma4_turbo.catalogue import DEFECTS
from gemma4_turbo.engine import states
from gemma4_turbo.engine.states import PatchStatus
from gemma4_turbo.engine.summary import is_absent, summary_line
from gemma4_turbo.version import __version__

START = f"gemma4_turbo {__version__}: installed: "
NAMES = [patch.name for patch in DEFECTS]
ABSENT = [PatchStatus(name, states.UPSTREAMED, f"no {name}", (), 0) for name in NAMES]
ROUTER = PatchStatus("router", states.ACTIVE, "installed", (), 0)
NONE_FOUND = f"3 defects looked for: none found ({', '.join(NAMES)})"


def test_defects_that_are_not_there_are_named_once() -> None:
    """Without the reasons, which are as many as defects."""
    assert summary_line([ROUTER, *ABSENT]) == f"{START}router; {NONE_FOUND}"
    off = PatchStatus("swa_ratio", states.OFF, "default", (), 0)
    assert summary_line([ROUTER, off, *ABSENT]) == (
        f"{START}router; standing aside: swa_ratio off (default); {NONE_FOUND}"
    )
    alone = f"{states.ALONE}: a file"
    noted = [row._replace(reason=f"{row.reason}; {alone}") for row in [ROUTER, *ABSENT]]
    assert summary_line(noted) == f"{START}router; {NONE_FOUND}; {alone}"


def test_one_that_is_found_is_named_as_a_patch() -> None:
    first, second, third = ABSENT
    found = first._replace(state=states.ACTIVE, reason="installed")
    assert summary_line([ROUTER, found, second, third]) == (
        f"{START}router, {first.name}; "
        f"2 defects looked for: none found ({second.name}, {third.name})"
    )
    failed = first._replace(state=states.FAILED, reason="why")
    assert summary_line([ROUTER, failed, second]) == (
        f"{START}router; standing aside: {first.name} failed (why); "
        f"1 defect looked for: none found ({second.name})"
    )


def test_a_patch_that_sglang_has_itself_is_no_defect() -> None:
    """It stands aside with its reason, as ever."""
    row = ROUTER._replace(state=states.UPSTREAMED, reason="SGLang has it")
    assert summary_line([row]) == f"{START}none; standing aside: router upstreamed (SGLang has it)"


@pytest.mark.parametrize("state", states.STATES)
def test_absent_is_what_was_looked_for_and_not_found(state: str) -> None:
    """Not what could not be looked for, and not what has run in some process."""
    assert is_absent(NAMES[0], state, 0) is (state == states.UPSTREAMED)
    assert not is_absent(NAMES[0], state, 1)
    assert not is_absent("router", state, 0)
