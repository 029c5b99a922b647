"""What a patch will be, foretold from SGLang's sources, which takes seconds where an import takes a minute."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from gemma4_turbo.cli.modules import NOT_INSTALLED
from gemma4_turbo.cli.report import Progress
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.engine.run import PatchRun, code_of
from gemma4_turbo.instance import ENGINE


def foretold(run: PatchRun, definitions: fingerprints.Definitions) -> tuple[str, str]:
    """State and reason of a patch that waits and is on."""
    if installed_release() is None:
        return states.WAITING, NOT_INSTALLED
    state, reason = ENGINE.outlook(run.patch, definitions)
    for port in run.ports if state == states.ACTIVE else ():
        if port.finds_defect:
            try:  # its code reads the sources as well; what it replaces is not called
                logging.disable(logging.INFO)
                code_of(port).build(run, dict.fromkeys(port.targets, foretold))
            except states.NotNeededError as why:
                return states.UPSTREAMED, str(why)
            except Exception:  # it may want more than the sources: what they say stands
                continue
            finally:
                logging.disable(logging.NOTSET)
    return state, reason


def inactive(names: Iterable[str], progress: Progress) -> dict[str, tuple[str, str]]:
    """State and reason of those of the patches, by name, that cannot be active with this SGLang."""
    definitions = fingerprints.Definitions(fingerprints.installed_source)
    found = {}
    for name in names:
        progress.detail(f"judging {name} by SGLang's sources")
        found[name] = foretold(ENGINE.runs[name], definitions)
    may_be = (states.ACTIVE, states.WAITING)
    return {name: outlook for name, outlook in found.items() if outlook[0] not in may_be}
