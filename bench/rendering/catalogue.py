"""Tables of the catalogue's patches and of the SGLang releases that they fit.

Their families are the pages in ``docs/patches``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bench.rendering.text import markdown
from gemma4_turbo.catalogue import DEFECTS, PATCHES, Patch, by_name
from gemma4_turbo.engine import states
from gemma4_turbo.engine.fingerprints import known_releases

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "decode-step": (
        "Decode step",
        (
            *("step_prologue", "layer_norms", "ple_tail", "input_norm", "qkv_norm", "rope_store"),
            *("qkv_proj", "skinny_gemm", "mlp_few", "mlp_stream", "pdl"),
        ),
    ),
    "attention": (
        "Attention and KV cache",
        ("extend_attention", "decode_attention", "kv_scales", "swa_window", "trtllm_debug"),
    ),
    "prefill": (
        "Prefill and You Only Cache Once",
        ("yoco", "yoco_graph", "yoco_piecewise", "optional_kv", "mm_prefill_graph"),
    ),
    "experts": (
        "Experts",
        (
            "router",
            "router_norm",
            "router_few",
            "moe_align",
            "experts_few",
            "feed_forward_few",
            "experts_sum",
            "moe_configs",
        ),
    ),
    "vision": (
        "Vision",
        (
            *("vision_batch", "vision_positions", "vision_clamps", "vision_masks"),
            *("vision_syncs", "vision_rope", "picture_memory"),
        ),
    ),
    "speculation": (
        "Speculation",
        ("mtp_sync", "mtp_chain", "mtp_seed_graph", "mtp_metadata", "mtp_merge_batch"),
    ),
    "memory": ("Memory and defaults", ("shared_kv_pool", "swa_ratio")),
}
"""By page: its title and its patches. A patch has one family."""

DEFECTS_PAGE = "speculation"  # all of them are of multi-token prediction


def family_of(name: str) -> str:
    """The page of a patch."""
    if name in {patch.name for patch in DEFECTS}:
        return DEFECTS_PAGE
    return next(page for page, (_, names) in FAMILIES.items() if name in names)


def patches(which: Iterable[Patch] = PATCHES) -> str:
    """Every patch in the catalogue's order, linked to its page."""
    rows = [
        [f"[`{patch.name}`]({family_of(patch.name)}.md#{patch.name})", *_described(patch)]
        for patch in which
    ]
    return markdown(["patch", *HEADER], rows)


def defects() -> str:
    """Those that are looked for, linked to their page."""
    return patches(DEFECTS)


HEADER = ["what it does", "numerics", "default", "switch"]


def family(page: str) -> str:
    """The patches of a page."""
    return _here(map(by_name, FAMILIES[page][1]))


def defects_here() -> str:
    """The defects that are looked for, on their page."""
    return _here(DEFECTS)


def _here(which: Iterable[Patch]) -> str:
    rows = [[f"[`{patch.name}`](#{patch.name})", *_described(patch)] for patch in which]
    return markdown(["patch", *HEADER], rows)


def _described(patch: Patch) -> list[str]:
    needs = " and ".join(f"`{name}`" for name in patch.requires)
    default = "on" if patch.default else "off"
    summary = f"{patch.summary}; needs {needs}" if needs else patch.summary
    return [summary, f"`{patch.numerics}`", default, f"`{patch.env}`"]


def families() -> str:
    """The pages, as README links them."""
    rows = [
        [f"[{title}](docs/patches/{page}.md)", ", ".join(f"`{name}`" for name in names)]
        for page, (title, names) in FAMILIES.items()
    ]
    return markdown(["family", "patches"], rows)


# -- releases -------------------------------------------------------------------------------------------

LOOKS = "looks"  # a patch that looks for its defect when SGLang is imported; no verdict before that
SHOWN = {
    states.ACTIVE: "`active`",
    states.UPSTREAMED: "`upstreamed`",
    states.UNSUPPORTED: "`unsupported`",
}
SHOWN_OF_DEFECTS = {
    LOOKS: "looked for when SGLang is imported",
    states.UPSTREAMED: "`upstreamed`, by the sources",
    states.UNSUPPORTED: "`unsupported`: no such function",
}


def spans(wanted: Iterable[str], releases: list[str]) -> str:
    """``0.5.11 to 0.5.12.post1, 0.5.14``: runs of ``releases``, which are in order."""
    asked, found = set(wanted), list[list[str]]()
    for release in releases:
        if release not in asked:
            found.append([])
        else:
            found = found or [[]]
            found[-1].append(release)
    runs = [run for run in found if run]
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs) or "-"


def read(results: Path) -> pd.DataFrame | None:
    """The recorded verdicts, if there are any."""
    path = results / "releases.csv"
    return pd.read_csv(path, dtype=str) if path.exists() else None


def releases(results: Path) -> str | None:
    """A row per patch: on which releases it is in which state."""
    return _releases(results, PATCHES, SHOWN)


def release_defects(results: Path) -> str | None:
    """A row per defect: on which releases it is looked for, and where."""
    return _releases(results, DEFECTS, SHOWN_OF_DEFECTS)


def _releases(results: Path, which: Iterable[Patch], shown: dict[str, str]) -> str | None:
    frame = read(results)
    if frame is None:
        return None
    order = [release for release in known_releases() if release in set(frame["release"])]
    rows = []
    for patch in which:
        state_on = frame[frame["patch"] == patch.name].set_index("release")["state"]
        rows.append(
            [f"`{patch.name}`", *(spans(state_on.index[state_on == s], order) for s in shown)]
        )
    return markdown(["patch", *shown.values()], rows)


def counts(results: Path) -> str | None:
    """A row per release: how many patches are in which state, without the defects looked for."""
    frame = read(results)
    if frame is None:
        return None
    frame = frame[frame["patch"].isin([patch.name for patch in PATCHES])]
    table = pd.crosstab(frame["release"], frame["state"]).reindex(columns=list(SHOWN), fill_value=0)
    rows = [
        [release, *(str(table.loc[release, state]) for state in SHOWN)]
        for release in known_releases()
        if release in table.index
    ]
    return markdown(["SGLang", *SHOWN.values()], rows)
