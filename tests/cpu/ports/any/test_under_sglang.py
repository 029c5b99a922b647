"""What a replacement of a module's function is not looked for in."""

from __future__ import annotations

import sys
from types import ModuleType

from gemma4_turbo.cli.modules import import_targets
from gemma4_turbo.engine.swap import UNDER_SGLANG
from gemma4_turbo.instance import PORTS


def holders() -> dict[str, set[str]]:
    """Modules that hold a function that a patch replaces, by their package."""
    import_targets()
    targets = {target for ports in PORTS.values() for port in ports for target in port.targets}
    functions = set()
    for target in targets:
        module, _, name = target.partition(":")
        functions.add(id(getattr(sys.modules.get(module), name, None)))
    functions.discard(id(None))
    found: dict[str, set[str]] = {}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and functions & {id(v) for v in vars(module).values()}:
            found.setdefault(name.partition(".")[0], set()).add(name)
    return found


def test_nobody_but_sglang_holds_its_functions() -> None:
    """Neither libraries under it, nor others, which the fixture `few_modules` leaves out."""
    found = holders()
    assert len(found["sglang"]) > 5  # of either release
    assert found.keys() == {"sglang"}, found
    assert "sglang" not in UNDER_SGLANG
    assert {name.partition(".")[0] for name in sys.modules} & UNDER_SGLANG >= {"torch", "triton"}
