"""What texts on command lines stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable

import typer

from gemma4_turbo.catalogue import BITWISE, CATALOGUE, PATCHES, by_name

EXACT = "exact"


def patches_of(text: str, option: str = "--patches") -> list[str]:
    """As `named`, and the patches that these stand on: without them they would be off."""
    return with_what_they_need(named(text, option))


def with_what_they_need(names: Iterable[str]) -> list[str]:
    """Patches and those that they stand on."""
    found: dict[str, None] = {}
    for name in names:
        found |= dict.fromkeys([*with_what_they_need(by_name(name).requires), name])
    return list(found)


def named(text: str, option: str = "--patches") -> list[str]:
    """Names of a comma list, each once; ``exact`` among them: every bitwise patch that is on by default.

    Raises:
        typer.BadParameter: a name that no patch has. An engine would run without it, and compare stock
            with stock.
    """
    known = {patch.name for patch in CATALOGUE}
    found: dict[str, None] = {}
    for name in filter(None, map(str.strip, text.split(","))):
        if name == EXACT:
            found |= dict.fromkeys(p.name for p in PATCHES if p.numerics == BITWISE and p.default)
        elif name in known:
            found[name] = None
        else:
            raise typer.BadParameter(f"{option}: no patch is named {name!r}")
    return list(found)


def parse_prefill(text: str) -> tuple[int, int, int]:
    """Prompts, their length and the tokens to generate, of ``BATCHxLENGTH[+TOKENS]``."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+))?", text)
    if not found:
        raise typer.BadParameter(f"--prefill must be BATCHxLENGTH[+TOKENS], got {text!r}")
    return int(found[1]), int(found[2]), int(found[3] or 1)
