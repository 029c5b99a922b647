"""`mtp_launch`: two things without which some source trees cannot load an MTP assistant.

The assistant's constructor does not run that of its base class, so what the base class sets there
and reads elsewhere is missing: the pipeline group. And its configuration has no number of experts,
of which a base class that names weights expert by expert wants a number. Each is mended only where
the source has the defect; where it has neither, stock stays as it is.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import attempt, told

if TYPE_CHECKING:
    from gemma4_turbo.engine.fingerprints import Definitions
    from gemma4_turbo.engine.run import PatchRun

logger = logging.getLogger("gemma4_turbo")

BASE = "sglang.srt.models.gemma4_causal:Gemma4ForCausalLM"
ASSISTANT = "sglang.srt.models.gemma4_mtp:Gemma4AssistantForCausalLM"
CONSTRUCT, LOAD = f"{ASSISTANT}.__init__", f"{ASSISTANT}.load_weights"
NO_PP_GROUP = "the assistant has no pp_group, which its base class reads"
NO_EXPERTS = "num_experts may be None where the base class counts to it"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Mend what is wrong in the imported source; `NotNeededError` if nothing is."""
    found = defects(run.definitions())
    if not found:
        raise states.NotNeededError(
            "this source has neither defect: pp_group is there or unread, num_experts is a number "
            "where it is counted to"
        )
    logger.info("gemma4_turbo: mtp_launch: %s", "; ".join(found))
    replacements = dict(stock)
    if NO_PP_GROUP in found:
        replacements[CONSTRUCT] = _construct(run, stock[CONSTRUCT])
    if NO_EXPERTS in found:
        replacements[LOAD] = _load(run, stock[LOAD])
    return replacements


def defects(definitions: Definitions) -> list[str]:
    """Which of the two the source has."""
    found = []
    if definitions.uses(BASE, "pp_group") and not definitions.uses(CONSTRUCT, "pp_group"):
        found.append(NO_PP_GROUP)
    load = definitions.node(f"{BASE}.load_weights")
    if definitions.uses(f"{BASE}.load_weights", "make_expert_params_mapping") and not any(
        _gives_a_number(node) for node in ast.walk(load or ast.Module([], []))
    ):
        found.append(NO_EXPERTS)
    return found


def _gives_a_number(node: ast.AST) -> bool:
    """``num_experts = ... or ...``, also as a conditional expression."""
    return (
        isinstance(node, ast.Assign)
        and any(isinstance(to, ast.Name) and to.id == "num_experts" for to in node.targets)
        and any(isinstance(part, ast.BoolOp | ast.IfExp) for part in ast.walk(node.value))
    )


def _construct(run: PatchRun, construct: Any) -> Any:
    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        def mend() -> None:
            from sglang.srt.distributed import get_pp_group

            # Into the instance itself: before its constructor has run, a Module takes no attribute.
            vars(self)["pp_group"] = get_pp_group()

        _, problem = attempt(run, "the pipeline group", mend)
        if problem is None:
            run.engaged(False)
        else:
            run.declined(problem)
        construct(self, *args, **kwargs)

    return __init__


def _load(run: PatchRun, load: Any) -> Any:
    @functools.wraps(load)
    def load_weights(self: Any, weights: Any) -> Any:
        with without_experts(run, self.config):
            return load(self, weights)

    return load_weights


@contextlib.contextmanager
def without_experts(run: PatchRun, config: Any) -> Iterator[None]:
    """A configuration that has no number of experts has 0 for the length of this."""
    missing = object()
    kept = getattr(config, "num_experts", missing)
    if kept is not missing and kept is not None:
        yield
        return
    try:
        config.num_experts = 0
    except Exception as error:  # a configuration that does not change
        run.set(states.FAILED, told(error))
        run.declined(told(error))
        yield
        return
    run.engaged(False)
    try:
        yield
    finally:
        if kept is missing:
            del config.num_experts
        else:
            config.num_experts = kept
