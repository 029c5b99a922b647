"""Every patch as data, one record each.

A record is all that the rest of the package knows of a patch. Its code is in
``patches/<name>.py``, its kernel in ``kernels/<name>.py``, its tests in ``tests/*/test_<name>.py``,
and the fingerprints of its targets, release by release, in ``releases.json``.
"""

from __future__ import annotations

from typing import NamedTuple

BITWISE = "bitwise"  # stock's bits on every input it accepts
TOLERANCE = "tolerance"  # bounded distance from stock; the bounds are in the kernel's docstring
BEHAVIOUR = "behaviour"  # no arithmetic


class Alias(NamedTuple):
    """Another variable that switches a patch, as the patch's forerunner named it."""

    env: str
    disables: bool  # True: a true value switches the patch off


class Patch(NamedTuple):
    """One patch."""

    name: str
    summary: str
    targets: tuple[str, ...]  # "module:qualname", replaced
    relies_on: tuple[str, ...]  # "module:qualname", not replaced, but its source must be known
    written_for: tuple[str, ...]  # releases whose source of all of these the patch was written for
    superseded_when: tuple[str, str]  # (target, name): stock has it if the target uses the name
    superseded_since: str  # first release for which that holds, "" if none
    numerics: str
    traced: bool  # torch.compile may trace the replacement
    default: bool
    origin: str
    aliases: tuple[Alias, ...] = ()

    @property
    def env(self) -> str:
        """The patch's own switch."""
        return f"GEMMA4_TURBO_{self.name.upper()}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Everything whose source decides whether the patch fits."""
        return self.targets + self.relies_on

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that hold `sources`."""
        return tuple(sorted({target.partition(":")[0] for target in self.sources}))


CATALOGUE: tuple[Patch, ...] = (
    Patch(
        name="router",
        summary="Expert routing of Gemma 4's MoE (top-k, softmax, scale, casts) in one launch",
        targets=("sglang.srt.models.gemma4_causal:Gemma4MoE.__init__",),
        relies_on=("sglang.srt.layers.moe.topk:TopK.forward_cuda",),
        written_for=("0.5.11", "0.5.12", "0.5.12.post1"),
        superseded_when=(
            "sglang.srt.models.gemma4_causal:Gemma4MoE.__init__",
            "gemma4_fused_routing",
        ),
        superseded_since="0.5.13",
        numerics=BITWISE,
        # torch.compile may reach the routing function on the decode path, not the replaced
        # constructor; the routing function hides its kernel behind a custom op there.
        traced=True,
        default=True,
        origin="pyc96/sglang#1; upstream sgl-project/sglang#26502",
        aliases=(Alias("SGLANG_GEMMA4_DISABLE_FUSED_ROUTER", disables=True),),
    ),
)


def by_name(name: str) -> Patch:
    """The record called ``name``; KeyError if there is none."""
    for patch in CATALOGUE:
        if patch.name == name:
            return patch
    raise KeyError(name)
