"""The real, stock SGLang that is installed: patched, reverted, and in spawned processes.

Importing its models takes long, so few processes do it and print all that the tests look at.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.engine import fingerprints
from gemma4_turbo.instance import PORTS, every_port
from tests.cpu.conftest import REPOSITORY, state_by_default, warm

RELEASE = metadata.version("sglang")
ALONE = "decode_attention"
"""A patch that is active on every line and shares its target with no other."""

SWITCH = "GEMMA4_TURBO_DECODE_ATTENTION"
TARGET = "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode"
OPTIONAL = {patch.env: "1" for patch in CATALOGUE if not patch.default}
SWITCHED_ON = {patch.name: state_by_default(patch._replace(default=True)) for patch in CATALOGUE}
REPLACED = {  # by the patches that are active when every one is switched on
    target
    for patch in CATALOGUE
    if SWITCHED_ON[patch.name] == "active"
    for port in PORTS[patch.name]
    if RELEASE in port.written_for
    for target in port.targets
}
_DEFINITIONS = fingerprints.Definitions(fingerprints.installed_source)
TARGETS = sorted(  # of the ports for this release; of those that look at any, what it has
    {
        target
        for port in every_port()
        if RELEASE in port.written_for or port.finds_defect
        for target in port.targets
        if RELEASE in port.written_for or _DEFINITIONS.node(target) is not None
    }
)
MODULES = sorted(
    {name for port in every_port() if RELEASE in port.written_for for name in port.modules}
    | {target.partition(":")[0] for target in TARGETS}
)

LOOK = f"""
import importlib, json, multiprocessing, os, sys

def look(modules={MODULES!r}, named={TARGETS!r}):
    import gemma4_turbo
    for name in modules:
        importlib.import_module(name)
    from gemma4_turbo.instance import ENGINE
    ENGINE.give_up_waiting()  # as a server does when its model stands
    rows = {{row.name: row for row in gemma4_turbo.status()}}
    alone = rows[{ALONE!r}]
    targets = {{}}
    for target in named:
        module, _, qualname = target.partition(":")
        owner = module = sys.modules[module]
        *scopes, name = qualname.split(".")
        for scope in scopes:
            owner = vars(owner)[scope]
        value = vars(owner)[name]
        files, inner = [], getattr(value, "__func__", value)
        while inner is not None:  # some of stock's are decorated, one with functools.lru_cache
            if hasattr(inner, "__code__"):
                files.append(inner.__code__.co_filename)
            inner = getattr(inner, "__wrapped__", None)
        ours = any("/gemma4_turbo/" in file for file in files)
        assert ours or module.__file__ in files, (target, files)
        targets[target] = [id(value), ours]
    return {{
        "state": alone.state,
        "reason": alone.reason,
        "engaged": alone.engaged,
        "states": {{name: [row.state, row.reason] for name, row in rows.items()}},
        "targets": targets,
    }}
"""

# What SGLang does in each process that it spawns, before it imports any model.
CHILD = f"""
ALONE = {ALONE!r}

def child(results, begin, done, *of):
    from sglang.srt.plugins import load_plugins
    assert "gemma4_turbo" not in sys.modules
    begin.wait(300)  # until the parent has looked at itself: the states of children outweigh its own
    load_plugins()
    found = look(*of)
    from gemma4_turbo.instance import ENGINE
    if found["state"] == "active":
        ENGINE.runs[ALONE].engaged(False)
    results.put(found)
    done.wait(300)
"""

PARENT = f"""{LOOK}{CHILD}
if __name__ == "__main__":
    import gemma4_turbo
    found = {{}}
    from gemma4_turbo.catalogue import CATALOGUE
    os.environ.update({{patch.env: "0" for patch in CATALOGUE}})
    found["first apply"] = [row.state for row in gemma4_turbo.apply()]
    found["switched off"] = look()
    gemma4_turbo.revert()
    for patch in CATALOGUE:
        del os.environ[patch.env]
    os.environ.update({OPTIONAL!r})
    found["applied after the import"] = (gemma4_turbo.apply(), look())[1]
    found["applied twice"] = (gemma4_turbo.apply(), look())[1]
    context = multiprocessing.get_context("spawn")
    begin, done = context.Event(), context.Event()
    patched, reverted = context.Queue(), context.Queue()
    children = [context.Process(target=child, args=(patched, begin, done), daemon=True)]
    children[0].start()
    gemma4_turbo.revert()
    found["reverted"] = look()
    os.environ[{SWITCH!r}] = "0"
    gemma4_turbo.apply()
    found["switched off after the import"] = look()
    del os.environ[{SWITCH!r}]
    gemma4_turbo.revert()
    of = [{TARGET.partition(":")[0]!r}], [{TARGET!r}]  # the one that is looked at
    children.append(context.Process(target=child, args=(reverted, begin, done, *of), daemon=True))
    children[1].start()
    gemma4_turbo.apply()
    found["applied again"] = look()
    begin.set()
    found["child"] = patched.get(timeout=300)
    found["child of a reverted process"] = reverted.get(timeout=300)
    found["with children"] = look()
    done.set()
    for process in children:
        process.join(30)
    print(json.dumps(found))
"""

SITE = f"""{LOOK}
from sglang.srt.plugins import load_plugins
bootstrapped = "gemma4_turbo.engine.installer" in sys.modules
load_plugins()
print(json.dumps(look() | {{"bootstrapped": bootstrapped}}))
"""


@pytest.fixture(scope="module")
def found(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the processes saw, by the moment at which they looked."""
    folder: Path = tmp_path_factory.mktemp("stock")
    common = environment | {"GEMMA4_TURBO_STATE_DIR": str(folder / "state")}
    site = common | {
        **OPTIONAL,
        "PYTHONPATH": f"{REPOSITORY / 'sitecustomize_example'}:{REPOSITORY}",
        "SGLANG_PLUGINS": "another_plugin",  # so that only sitecustomize can have done it
        "GEMMA4_TURBO_STATE_DIR": str(folder / "site state"),
    }
    scripts = {"parent": PARENT, "site": SITE}
    for name, code in scripts.items():
        (folder / f"{name}.py").write_text(code)
    # They and what they spawn are forks that have the libraries under SGLang, and nothing of SGLang.
    processes = {
        name: warm(environment).start(
            **{"script": str(folder / f"{name}.py"), "arguments": [], "spawns": True},
            **{"env": variables, "cwd": str(folder), "timeout": 500},
            files=[str(folder / f"{name}.{stream}") for stream in ("out", "err")],
        )
        for name, variables in (("parent", common), ("site", site))
    }
    results = {}
    for name, process in processes.items():
        code = process.wait()
        assert code == 0, (folder / f"{name}.err").read_text()
        results[name] = json.loads((folder / f"{name}.out").read_text().splitlines()[-1])
    return {**results["parent"], "sitecustomize": results["site"]}


@pytest.mark.parametrize(
    "moment", ["applied after the import", "applied again", "child", "sitecustomize"]
)
def test_active(found: dict[str, dict[str, Any]], moment: str) -> None:
    """In this process, after a revert, in a spawned child by the entry point, by sitecustomize."""
    assert found[moment]["state"] == "active"
    assert found[moment]["reason"] == "installed"
    assert {name: state for name, (state, _) in found[moment]["states"].items()} == SWITCHED_ON
    replaced = {target for target, (_, ours) in found[moment]["targets"].items() if ours}
    assert replaced == REPLACED


@pytest.mark.parametrize(
    ("moment", "reason"),
    [
        ("switched off", f"{SWITCH}=0"),
        ("switched off after the import", f"{SWITCH}=0"),
        ("reverted", "revert() was called"),
        ("child of a reverted process", "revert() was called"),
    ],
)
def test_stock(found: dict[str, dict[str, Any]], moment: str, reason: str) -> None:
    """Switched off before and after the import, reverted, and spawned by a reverted process."""
    assert found[moment]["state"] == "off"
    assert found[moment]["reason"] == reason
    assert not found[moment]["targets"][TARGET][1]


def test_the_very_same_object(found: dict[str, dict[str, Any]]) -> None:
    """Stock's function never leaves the process; a second apply does not wrap ours."""
    at = {moment: seen["targets"][TARGET][0] for moment, seen in found.items() if "targets" in seen}
    stock = at["switched off"]
    assert at["reverted"] == stock
    assert at["switched off after the import"] == stock
    assert at["applied after the import"] != stock
    assert at["applied twice"] == at["applied after the import"]


def test_the_very_same_objects_of_every_patch(found: dict[str, dict[str, Any]]) -> None:
    """Each target, shared or not, is stock's again after a revert, and ours only in between."""
    stock = found["switched off"]["targets"]
    assert sorted(stock) == TARGETS
    assert not any(ours for _, ours in stock.values())
    assert found["reverted"]["targets"] == stock
    applied = found["applied after the import"]["targets"]
    assert {target for target in stock if applied[target][0] != stock[target][0]} == REPLACED
    assert found["applied twice"]["targets"] == applied
    states = {state for state, _ in found["switched off"]["states"].values()}
    states |= {state for state, _ in found["reverted"]["states"].values()}
    assert states == {"off"}


def test_one_switched_off_leaves_the_others_on(found: dict[str, dict[str, Any]]) -> None:
    """After the import, this one alone."""
    states = found["switched off after the import"]["states"]
    assert states[ALONE] == ["off", f"{SWITCH}=0"]
    assert {name: state for name, (state, _) in states.items()} == SWITCHED_ON | {ALONE: "off"}


def test_apply_before_the_import(found: dict[str, dict[str, Any]]) -> None:
    """The reason is known before SGLang is."""
    assert found["first apply"] == ["off"] * len(CATALOGUE)


def test_sitecustomize_was_there_first(found: dict[str, dict[str, Any]]) -> None:
    """Before SGLang's own plugin loader."""
    assert found["sitecustomize"]["bootstrapped"]


def test_a_child_s_calls_are_counted_in_the_parent(found: dict[str, dict[str, Any]]) -> None:
    """The launcher's status tells what its children did, and that they work."""
    assert found["applied again"]["engaged"] == 0
    assert found["with children"]["engaged"] == 1
    assert found["with children"]["state"] == "active"
