"""The gates where this release's servers begin otherwise."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gemma4_turbo.engine import gates
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.launch import routes

RUNTIME = "sglang.srt.disaggregation.encoder.runtime"


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[None]:
    monkeypatch.setenv("GEMMA4_TURBO_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("GEMMA4_TURBO_STRICT", "1")
    ENGINE.apply(only=[])
    yield
    ENGINE.revert()


def test_replicas_of_an_encoder_are_refused_before_one_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the function that SGLang's HTTP server calls; a sitecustomize would reach them."""
    runtime = importlib.import_module(RUNTIME)
    server = importlib.import_module("sglang.srt.disaggregation.encoder.http_server")
    assert server.launch_dp_runtime is runtime.launch_dp_runtime
    monkeypatch.setattr(routes, "bootstrap_routes", lambda: [routes.ENTRY_POINT])
    with pytest.raises(gates.StrictModeError, match="--dp-size 2: every encoder would be stock"):
        server.launch_dp_runtime(SimpleNamespace(dp_size=2))
