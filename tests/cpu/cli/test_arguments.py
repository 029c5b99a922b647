"""Arguments of SGLang's server, as the installed release calls them."""

from __future__ import annotations

import pytest

from gemma4_turbo.cli import arguments


@pytest.mark.parametrize("name", arguments.RENAMED)
def test_sglang_has_the_flag(name: str):
    from sglang.srt.server_args import prepare_server_args

    flag = arguments.flag(name)
    value = [] if name.startswith("disable") else ["3"]
    given = prepare_server_args(
        ["--model-path", "none", "--load-format", "dummy", "--device", "cpu", flag, *value]
    )
    field = flag.removeprefix("--").replace("-", "_")
    expected: object = True
    if value:
        expected = 3 if "max" in name else [3]
    assert getattr(given, field) == expected


@pytest.mark.parametrize("name", arguments.RENAMED)
def test_the_source_decides(name: str, monkeypatch: pytest.MonkeyPatch):
    """Not the release's number; an argument that was never renamed keeps its name."""
    monkeypatch.setattr(arguments, "installed_source", lambda module: f"    {name}: int = 1\n")
    assert arguments.flag(name) == "--" + name.replace("_", "-")
    monkeypatch.setattr(arguments, "installed_source", lambda module: f"    {name}_decode: int\n")
    assert arguments.flag(name) == "--" + arguments.RENAMED[name].replace("_", "-")
    assert arguments.flag("max_total_tokens") == "--max-total-tokens"
