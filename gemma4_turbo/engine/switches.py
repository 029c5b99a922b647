"""From the environment to which patches are on.

Read when a target is imported, not at start-up, so that a program may set ``os.environ`` first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from gemma4_turbo.catalogue import BITWISE, CATALOGUE, Patch

MASTER = "GEMMA4_TURBO"
PROFILE = "GEMMA4_TURBO_PROFILE"
STRICT = "GEMMA4_TURBO_STRICT"
LOG = "GEMMA4_TURBO_LOG"
STATE_DIR = "GEMMA4_TURBO_STATE_DIR"
GPU_PROFILE = "GEMMA4_TURBO_GPU_PROFILE"
NO_GPU_PROFILE = "0"
SELECTION = "GEMMA4_TURBO_SELECTION"  # written by apply() and revert() for spawned processes

ON_OFF = ("0", "1")
TRUE_FALSE = ("0", "1", "false", "true")
PROFILES = ("all", "exact")
LOG_LEVELS = ("debug", "info", "warning", "error")


class Selection(NamedTuple):
    """What `gemma4_turbo.apply` was asked for."""

    only: tuple[str, ...] | None = None
    skip: tuple[str, ...] = ()
    reverted: bool = False

    def encode(self) -> str:
        """As the value of ``GEMMA4_TURBO_SELECTION``."""
        if self.reverted:
            return "reverted"
        only = "*" if self.only is None else ",".join(self.only)
        return f"only={only};skip={','.join(self.skip)}"

    @staticmethod
    def decode(value: str) -> Selection:
        """The inverse of `encode`; anything unreadable is the default selection."""
        if value == "reverted":
            return Selection(reverted=True)
        fields = dict(part.partition("=")[::2] for part in value.split(";"))
        names = fields.get("only", "*")
        only = None if names == "*" else tuple(n for n in names.split(",") if n)
        return Selection(only, tuple(n for n in fields.get("skip", "").split(",") if n))


class Decision(NamedTuple):
    """Whether a patch is on, and what decided it."""

    on: bool
    reason: str


class Switches(NamedTuple):
    """The environment, read once."""

    decisions: dict[str, Decision]
    problems: tuple[str, ...]  # one sentence each, naming the variable and the choices
    strict: bool
    log_level: str | None
    stock: bool  # ``GEMMA4_TURBO=0`` or `gemma4_turbo.revert`: nothing of ours is wanted, no word either


def _choice(
    environ: Mapping[str, str], variable: str, choices: tuple[str, ...], problems: list[str]
) -> tuple[str | None, str | None]:
    """``(value, problem)``; an empty variable counts as unset."""
    value = environ.get(variable, "").strip()
    if not value:
        return None, None
    if value.lower() in choices:
        return value.lower(), None
    problem = f"{variable}={value!r} is not one of {', '.join(choices)}"
    problems.append(problem)
    return None, problem


@lru_cache(maxsize=256)
def _misspelt(variable: str, value: str, known: frozenset[str]) -> str | None:
    """The sentence on a variable that is none of ours, None if it does not look like one either.

    What begins as ours do speaks to us, whatever follows. Any other must be close to one of ours.
    """
    if _linked_service(variable, value) and variable.replace("_ENV_", "_") not in known:
        return None
    sentence = f"{variable} is no variable of gemma4_turbo"
    letters = {_letters(name): name for name in known}
    same = letters.get(_letters(variable))
    if same is not None:
        return f"{sentence}; did you mean {same}?"
    import difflib  # here, because it is slow to import and seldom needed

    if variable.startswith(f"{MASTER}_"):
        close = difflib.get_close_matches(variable, known, n=1)
        return f"{sentence}; did you mean {close[0]}?" if close else sentence
    # Nearly our prefix, and nearly one of our names behind it, each by itself: together they would
    # make GEMMA4_MOE_CONFIGS look like ours.
    ours, typed = _letters(MASTER), _letters(variable)
    if typed.startswith("GEMMA") and typed[5:6].isdecimal() and typed[5:6] != "4":
        return None  # another model's
    if difflib.SequenceMatcher(None, typed, ours).ratio() >= 0.95:  # a letter more
        return f"{sentence}; did you mean {MASTER}?"
    alike = {
        end: difflib.SequenceMatcher(None, typed[:end], ours).ratio()
        for end in range(len(ours) - 2, len(ours) + 3)
    }
    cut = max(alike, key=alike.__getitem__)
    if alike[cut] < 0.86:  # one wrong letter, or two that are missing
        return None
    rests = {name.removeprefix(ours): meant for name, meant in letters.items()}
    close = difflib.get_close_matches(typed[cut:], rests, n=1, cutoff=0.8)
    return f"{sentence}; did you mean {rests[close[0]]}?" if close else None


def _letters(variable: str) -> str:
    """Without what separates words, in capitals."""
    return variable.upper().translate({ord(mark): None for mark in "_-. "})


def _linked_service(variable: str, value: str) -> bool:
    """Whether Kubernetes or ``docker --link`` made this of a service's name, gemma4-turbo for one.

    Name and value together tell: GEMMA4_TURBO_PORT=8000 is somebody's slip.
    """
    import re  # here, as difflib above

    address = r"(?:\d+\.\d+\.\d+\.\d+|[0-9a-f]*:[0-9a-f:.]*)"
    url = rf"(?:tcp|udp|sctp)://(?:{address}|\[{address}\]):\d{{1,5}}"
    link = (
        rf"SERVICE_HOST={address}|SERVICE_PORT(?:_[A-Z0-9_]+)?=\d{{1,5}}|PORT={url}"
        rf"|PORT_\d+_(?:TCP|UDP|SCTP)(?:_START|_END)?={url}"
        r"|PORT_\d+_(?:TCP|UDP|SCTP)_PORT(?:_START|_END)?=\d{1,5}"
        rf"|PORT_\d+_(?:TCP|UDP|SCTP)_ADDR={address}"
        r"|PORT_\d+_(?P<protocol>TCP|UDP|SCTP)_PROTO=(?i:(?P=protocol))"
        r"|NAME=/.+/.+|ENV_[^=]+=.*"  # of docker: the container, and its own variables
    )
    return re.fullmatch(rf"[A-Z0-9_.]+?_(?:{link})", f"{variable}={value}", re.DOTALL) is not None


def read(
    environ: Mapping[str, str] | None = None,
    selection: Selection | None = None,
    catalogue: Iterable[Patch] = CATALOGUE,
    measured: Mapping[str, Decision] | None = None,
) -> Switches:
    """Decide for every patch of ``catalogue``.

    The first of these that speaks decides: ``GEMMA4_TURBO=0``, `gemma4_turbo.revert`, the patch's
    own variable, its alias, ``apply(only=, skip=)``, the profile, ``measured``, the patch's default. A
    value that is not allowed switches off what it speaks of.

    Args:
        environ: the environment; None: this process's.
        selection: what `gemma4_turbo.apply` was asked for.
        catalogue: the patches.
        measured: by patch, what the GPU profile says.
    """
    environ = os.environ if environ is None else environ
    selection = selection or Selection()
    catalogue = tuple(catalogue)
    problems: list[str] = []
    master, master_problem = _choice(environ, MASTER, ON_OFF, problems)
    profile, profile_problem = _choice(environ, PROFILE, PROFILES, problems)
    strict, strict_problem = _choice(environ, STRICT, ON_OFF, problems)
    log_level, _ = _choice(environ, LOG, LOG_LEVELS, problems)

    where = environ.get(GPU_PROFILE, "").strip()
    if where and where != NO_GPU_PROFILE and not os.path.isabs(where):
        problems.append(f"{GPU_PROFILE}={where!r} is neither {NO_GPU_PROFILE} nor an absolute path")

    decisions: dict[str, Decision] = {}
    for patch in catalogue:
        own, own_problem = _choice(environ, patch.env, ON_OFF, problems)
        by_alias: Decision | None = None
        for alias in patch.aliases:
            value, problem = _choice(environ, alias.env, TRUE_FALSE, problems)
            if problem:
                by_alias = Decision(False, problem)
            elif value is not None:
                on = (value in ("1", "true")) != alias.disables
                by_alias = Decision(on, f"{alias.env}={value}")
        if master_problem or master == "0":
            decision = Decision(False, master_problem or f"{MASTER}=0")
        elif selection.reverted:
            decision = Decision(False, "revert() was called")
        elif own_problem or own is not None:
            decision = Decision(own == "1", own_problem or f"{patch.env}={own}")
        elif by_alias is not None:
            decision = by_alias
        elif patch.name in selection.skip:
            decision = Decision(False, "apply(skip=...)")
        elif selection.only is not None:
            decision = Decision(patch.name in selection.only, "apply(only=...)")
        elif profile_problem:
            decision = Decision(False, profile_problem)
        elif profile == "exact" and patch.numerics != BITWISE:
            decision = Decision(False, f"{PROFILE}=exact, and {patch.name} is {patch.numerics}")
        else:
            decision = (measured or {}).get(patch.name) or Decision(patch.default, "default")
        decisions[patch.name] = decision

    known = frozenset({MASTER, PROFILE, STRICT, LOG, STATE_DIR, GPU_PROFILE, SELECTION})
    known |= {patch.env for patch in catalogue}
    for variable in environ:
        # Cheap, as every variable of every process comes by: a slip or two leave one of these.
        upper = variable.upper()
        if ("GEM" in upper or "URBO" in upper) and variable not in known:
            problem = _misspelt(variable, environ[variable], known)
            if problem is not None:
                problems.append(problem)
    # A strict mode that cannot be read is meant: fall on the strict side.
    return Switches(
        decisions,
        tuple(problems),
        strict == "1" or strict_problem is not None,
        log_level,
        master == "0" or selection.reverted,
    )
