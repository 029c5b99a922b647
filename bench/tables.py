"""Tables of README and docs, written between markers: measurements, patches, releases.

python bench/tables.py            # rewrite README.md and the pages in docs/
python bench/tables.py --check    # exit 1 if one of them differs

Measurements come from the CSV files in ``bench/results``, patches from the catalogue.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.rendering import catalogue, engines, kernels, peers, quality, router, steps

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str | None]] = {
    "headline": lambda: steps.headline(RESULTS),
    "engine": lambda: router.engine(RESULTS),
    "decode-engine": lambda: steps.decode_engine(RESULTS),
    "step-shares": lambda: steps.step_shares(RESULTS),
    "quantised-engine": lambda: steps.quantised_engine(RESULTS),
    "equality": lambda: router.equality(RESULTS),
    "exact": lambda: router.exact(RESULTS),
    "kernels": lambda: router.kernels(RESULTS),
    "decode-kernels": lambda: kernels.decode_kernels(RESULTS),
    "extend-attention": lambda: kernels.extend_attention(RESULTS),
    "decode-attention": lambda: kernels.decode_attention(RESULTS),
    "moe": lambda: kernels.moe(RESULTS),
    "yoco": lambda: engines.yoco(RESULTS),
    "vision": lambda: engines.vision(RESULTS),
    "images": lambda: engines.images(RESULTS),
    "serving": lambda: engines.serving(RESULTS),
    "short": lambda: engines.short_prompts(RESULTS),
    "pools": lambda: engines.pools(RESULTS),
    "divergence": lambda: engines.divergence(RESULTS),
    "divergence-ratios": lambda: engines.divergence_ratios(RESULTS),
    "mtp": lambda: engines.mtp(RESULTS),
    "quality-line": lambda: quality.headline(RESULTS),
    "quality": lambda: quality.quality(RESULTS),
    "quality-quantised": lambda: quality.quality(RESULTS, quantised=True),
    "quality-calls": lambda: quality.calls(RESULTS),
    "quality-mtp": lambda: quality.speculation(RESULTS),
    "quality-mtp-times": lambda: quality.speculation_times(RESULTS),
    "peers": lambda: peers.peers(RESULTS),
    "peers-plot": lambda: peers.plot(RESULTS),
    "releases": lambda: catalogue.releases(RESULTS),
    "release-defects": lambda: catalogue.release_defects(RESULTS),
    "release-counts": lambda: catalogue.counts(RESULTS),
    "patches": catalogue.patches,
    "defects": catalogue.defects,
    "patches-defects": catalogue.defects_here,
    "families": catalogue.families,
    **{f"patches-{page}": functools.partial(catalogue.family, page) for page in catalogue.FAMILIES},
}


WITHOUT_A_WORD = ("peers-plot", "quality-line", "release-defects")
"""Of these, nothing is said where there is nothing: README has them, or there are no defects."""


def pages(root: Path = ROOT) -> list[Path]:
    """README and every page of the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def render(texts: Iterable[str]) -> list[str]:
    """The pages with every table between its markers made anew.

    A table may be on several pages and is on one at least; where nothing is measured, a page says so.
    A marker without a table, or a table without a marker, ends the program.
    """
    made: dict[str, str] = {}

    def between(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise SystemExit(f"bench/tables.py: a page has a marker for the unknown table {name!r}")
        if name not in made:
            table = TABLES[name]()
            # The empty lines end the comments, which are HTML to Markdown.
            if table is None and name not in WITHOUT_A_WORD:
                table = "Not measured yet."
            made[name] = "" if table is None else f"\n{table}\n\n"
        return found[1] + made[name] + found[3]

    after = [MARKED.sub(between, text) for text in texts]
    lacking = TABLES.keys() - made
    if lacking:
        raise SystemExit(f"bench/tables.py: no page has a marker for {', '.join(sorted(lacking))}")
    return after


def main(check: Annotated[bool, typer.Option(help="Only compare")] = False) -> None:
    """Write the tables, or compare them."""
    paths = pages()
    before = [path.read_text(encoding="utf-8") for path in paths]
    changed = [
        (path, after)
        for path, text, after in zip(paths, before, render(before), strict=True)
        if text != after
    ]
    for path, after in changed:
        if check:
            print(f"{path.relative_to(ROOT)} is out of date: make tables")
        else:
            path.write_text(after, encoding="utf-8")
    sys.exit(check and bool(changed))


if __name__ == "__main__":
    typer.run(main)
