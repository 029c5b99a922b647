"""A patch's code for one release line, as data: where it is, and what of SGLang it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ALL = ".*"  # at the end of a class's name: all that it defines, by name


class Lacks(NamedTuple):
    """A class, and names that it does not define: its bases' run, whatever else it comes to define."""

    target: str
    names: tuple[str, ...]
    bases: str  # as the source has them: another one could define the names


class Port(NamedTuple):
    """One patch in one release line. Functions are named ``"module:qualname"``."""

    targets: tuple[str, ...]  # replaced
    # Of ours, or "module:attribute", see `gemma4_turbo.engine.run.PatchModule`; "" where there is no code.
    module: str = ""
    relies_on: tuple[str, ...] = ()  # not replaced, but the source must be known
    # Classes of which it relies on what they do not define: their bases' methods run. Of these the bases and
    # the names of all that they define must be known, not the bodies. Read from disk, not waited for.
    methods_of: tuple[str, ...] = ()
    lacks: tuple[Lacks, ...] = ()
    # What is only read from, with the names that are read: the rest of its body may change.
    reads: tuple[tuple[str, tuple[str, ...]], ...] = ()
    written_for: tuple[str, ...] = ()  # releases whose source of all of these it was written for
    # (target, name): stock has it if the target uses the name; None: no release has it
    superseded_when: tuple[str, str] | None = None
    superseded_since: str = ""  # first release for which that holds, "" if none
    tells_only: bool = False  # there is no code: it tells by superseded_when that SGLang has it
    # Why this line, told by its targets, has no use for the patch; there is no code then.
    needless: str = ""
    # It mends a defect and looks for it by itself, whatever the release; no fingerprint decides.
    finds_defect: bool = False
    # Modules of relies_on that SGLang imports only when it builds the model: not waited for, their
    # source is read from disk.
    lazy: tuple[str, ...] = ()
    # Modules of targets that SGLang imports only where it reads the server's arguments, while the
    # patch has work to do where a model is loaded, too: imported there before it is.
    decides: tuple[str, ...] = ()
    # Functions that it does not call, or calls on something else than stock does: whoever has wrapped
    # one of them would be bypassed. Those of relies_on are looked at as well.
    goes_round: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything whose source decides whether the port fits; ``module:Class.*``: of `methods_of`."""
        return self.targets + self.relies_on + tuple(name + ALL for name in self.methods_of)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold what is replaced, relied on and read, and are waited for."""
        read = tuple(target for target, _ in self.reads)
        holding = {target.partition(":")[0] for target in self.targets + self.relies_on + read}
        return tuple(sorted(holding - set(self.lazy)))


Ports = Mapping[str, tuple[Port, ...]]
"""By the patch's name: its ports, one per release line, the newest line first."""
