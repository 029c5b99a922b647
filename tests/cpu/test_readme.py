"""README and docs: generated parts are in step, links resolve, what they name exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from bench import tables
from bench.rendering import catalogue as tables_catalogue
from gemma4_turbo.__main__ import app
from gemma4_turbo.catalogue import CATALOGUE, DEFECTS, PATCHES
from gemma4_turbo.engine import states, switches
from gemma4_turbo.engine.fingerprints import known_releases

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*tables.pages(), ROOT / "CONTRIBUTING.md"]
EVERYTHING = "\n".join(page.read_text() for page in PAGES)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_tables_are_those_of_the_measurements_and_of_the_catalogue():
    done = subprocess.run(
        [sys.executable, "bench/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# -- links ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    words = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s+", "-", heading) for heading in words}


def dangling(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    found = []
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path):
    assert dangling(page) == []


def test_a_link_that_does_not_resolve_is_found(tmp_path: Path):
    (tmp_path / "b.md").write_text("# B\n\n## `its_part` of it\n")
    page = tmp_path / "a.md"
    page.write_text("# A\n[](b.md#its_part-of-it) [](#a) [](c.md) [](b.md#other) [](https://x)")
    assert dangling(page) == ["c.md", "b.md#other"]


# -- names ----------------------------------------------------------------------------------------------


def test_every_patch_has_one_family_and_a_section_there():
    placed = [name for _, names in tables_catalogue.FAMILIES.values() for name in names]
    assert sorted(placed) == sorted(patch.name for patch in PATCHES)
    for page, (title, names) in tables_catalogue.FAMILIES.items():
        text = (DOCS / "patches" / f"{page}.md").read_text()
        assert text.startswith(f"# {title}\n")
        assert re.findall(r"^## `(\w+)`$", text, flags=re.MULTILINE) == list(names)
        below = [patch.name for patch in DEFECTS if tables_catalogue.family_of(patch.name) == page]
        assert re.findall(r"^### `(\w+)`$", text, flags=re.MULTILINE) == below


def test_defects_looked_for():
    """Their number in README; on the other pages, the releases that are known."""
    told = (ROOT / "README.md").read_text()
    number = {3: "Three"}[len(DEFECTS)]
    assert f"{number} more look for [defects]" in told
    first, *_, last = known_releases()
    for page in ("patches/index.md", "patches/speculation.md", "supported-releases.md"):
        text = (DOCS / page).read_text().partition("# Defects looked for\n")[2]
        assert text.startswith(f"\nNo release from {first} to {last} has them;")
    comment = (ROOT / "gemma4_turbo" / "catalogue.py").read_text()
    assert f"no release from {first} to {last} has one" in comment


@pytest.mark.parametrize("patch", CATALOGUE, ids=lambda patch: patch.name)
def test_a_summary_is_one_line_of_a_table(patch):
    assert re.fullmatch(r"[A-Z0-9][^|\n]{20,119}[^.|\n ]", patch.summary)


def test_every_switch_and_state_is_documented():
    told = (DOCS / "switches.md").read_text()
    aliases = [alias.env for patch in CATALOGUE for alias in patch.aliases]
    names = (switches.PROFILE, switches.STRICT, switches.LOG, switches.STATE_DIR)
    names += (switches.GPU_PROFILE,)
    for variable in (switches.MASTER, *names, *aliases):
        assert f"`{variable}" in told
    for choice in (*switches.PROFILES, *switches.LOG_LEVELS):
        assert f"`{choice}`" in told
    reports = (DOCS / "reports.md").read_text()
    for state in states.STATES:
        assert f"\n| `{state}` |" in reports
    for numerics in {patch.numerics for patch in CATALOGUE}:
        assert f"\n| `{numerics}` |" in (DOCS / "patches" / "index.md").read_text()


def test_what_is_off_by_default_is_told():
    (told,) = re.findall(r"Off by default: (.+)\.\n", (ROOT / "README.md").read_text())
    off = {patch.name for patch in CATALOGUE if not patch.default}
    assert set(re.findall(r"`(\w+)`", told)) == off


def test_variables_commands_and_scripts_exist():
    """Those that a page names."""
    known = {patch.env for patch in CATALOGUE} | {switches.STATE_DIR, switches.PROFILE}
    known |= {switches.STRICT, switches.LOG, switches.GPU_PROFILE}
    misspelt_on_purpose = {"GEMMA4_TURBO_ROUTR", "GEMMA4_TURBO_PORT"}
    known |= {"GEMMA4_TURBO_EXAMPLE", "GEMMA4_TURBO_FIRST_NORM"}  # of the page on adding a patch
    named = set(re.findall(r"GEMMA4_TURBO_[A-Z_]+[A-Z]", EVERYTHING))
    assert named - misspelt_on_purpose <= known
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"-m gemma4_turbo (\w+)", EVERYTHING)) == set(commands)
    for script in set(re.findall(r"bench/\w+\.py", EVERYTHING)):
        assert (ROOT / script).is_file(), script
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?:`|^)make (\w+)(?:`| +#)", EVERYTHING, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)
