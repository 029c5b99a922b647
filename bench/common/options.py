"""What texts on command lines stand for."""

from __future__ import annotations

import re

import typer

from gemma4_turbo.catalogue import BITWISE, PATCHES


def patches_of(text: str) -> list[str]:
    """Names of a comma list; ``exact``: of every bitwise patch that is on by default."""
    if text == "exact":
        return [patch.name for patch in PATCHES if patch.numerics == BITWISE and patch.default]
    return [name for name in text.split(",") if name]


def parse_prefill(text: str) -> tuple[int, int, int]:
    """Prompts, their length and the tokens to generate, of ``BATCHxLENGTH[+TOKENS]``."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:\+(\d+))?", text)
    if not found:
        raise typer.BadParameter(f"--prefill must be BATCHxLENGTH[+TOKENS], got {text!r}")
    return int(found[1]), int(found[2]), int(found[3] or 1)
