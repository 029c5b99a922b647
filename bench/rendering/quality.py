"""Tables of `quality.py` and `quality_mtp.py`: answers of trained models, stock against patched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from bench.rendering.text import markdown, newest_rows, origins

STOCK, EXACT, DEFAULT, JUDGE = "stock", "exact", "default", "transformers, fp32"
PLAIN, PATCHED = "no speculation", "patched"
FORMATS = ("fp8", "w4a16")
CUT, UNUSED = "not measured", "its code never ran"
RUNNING, AT_ONCE = "running", 64  # requests at once, at most, and their usual number


def in_order(variants: Iterable[str]) -> list[str]:
    """Each once: stock and its floors, profiles, patches alone, stock with other chunks, the judge."""
    first = [STOCK, f"{STOCK}, once more", f"{STOCK}, other batches", EXACT, DEFAULT]

    def rank(variant: str) -> int:
        if variant in first:
            return first.index(variant)
        return len(first) + variant.startswith(STOCK) + 2 * (variant == JUDGE)

    return sorted(dict.fromkeys(variants), key=rank)


def newest_runs(path: Path) -> list[tuple[str, str, pd.DataFrame]]:
    """Release, model and rows of the newest run of each; none where nothing is measured.

    Runs with other numbers of requests at once stand beside each other, that of the most first: it decides
    which patches meet their numbers of tokens.
    """
    if not path.exists():
        return []
    frame = pd.read_csv(path)
    each = ["sglang", "model"]
    if RUNNING in frame:
        frame = frame.sort_values(RUNNING, ascending=False, kind="stable")
        each.append(RUNNING)
    groups = {key: newest_rows(rows) for key, rows in frame.groupby(each, sort=False)}
    order = list(dict.fromkeys(frame.sort_index().groupby(each[:2], sort=False).groups))
    return [
        (str(key[0]), str(key[1]), rows)
        for pair in order
        for key, rows in groups.items()
        if key[:2] == pair
    ]


def asked_of(run: pd.DataFrame) -> str:
    """The model of a run, and how many requests were answered at once, where they were few."""
    model, running = str(run.iloc[0]["model"]), run.iloc[0].get(RUNNING, AT_ONCE)
    return model if running == AT_ONCE else f"{model}, {running} at once"


def is_quantised(model: str) -> bool:
    """Whether a model's name is that of a folder of `quantise_small.py`."""
    return model.endswith(tuple(f"-{name}" for name in FORMATS))


def headline(results: Path) -> str | None:
    """One line: how many questions stock and all default patches answer; None where nothing is measured."""
    told = []
    for release, model, run in newest_runs(results / "quality.csv"):
        values = run.set_index(["variant", "quantity"])[["value", "x"]]
        if is_quantised(model) or (DEFAULT, "McNemar's p") not in values.index:
            continue
        if asked_of(run) != model:
            continue
        right = {name: values.loc[name, "answered exactly"] for name in (STOCK, DEFAULT)}
        p = values.loc[(DEFAULT, "McNemar's p"), "value"]
        counts = f"stock {right[STOCK]['value']:,.0f}, patched {right[DEFAULT]['value']:,.0f}"
        told.append(f"`{model}` on {release} {counts} of {right[STOCK]['x']:,.0f} (p {p:.2g})")
    if not told:
        return None
    return f"Questions that trained models answer exactly: {'; '.join(told)}."


def quality(results: Path, quantised: bool = False) -> str | None:
    """A row for each engine of each model's newest run on a release; None where nothing is measured."""
    rows, used = [], []
    for release, model, run in newest_runs(results / "quality.csv"):
        if is_quantised(model) != quantised:
            continue
        used.append(run)
        values = run.set_index(["variant", "quantity"])[["value", "x"]]
        for variant in in_order([STOCK, *run["variant"]]):
            rows.append([release, asked_of(run), named(variant), *cells(variant, values)])
    if not used:
        return None
    header = ["SGLang", "model", "engine", "answered exactly", "only this, only stock", "p"]
    header += ["answers unlike stock's", "perplexity", "KL from fp32, prompt", "generated"]
    header += ["beyond stock's, prompt", "generated "]
    steps = ", ".join(
        f"{model} {count:,}"
        for model, count in {
            run.iloc[0]["model"]: run.iloc[0]["trained_steps"] for run in used
        }.items()
    )
    return (
        f"{markdown(header, rows)}\n\nTrained models, greedy answers, KL divergence in 10^-6 nats with its "
        "standard error. p: McNemar's exact test of the questions that one of the two engines answered. "
        f"Steps of training: {steps}. {origins(pd.concat(used))}."
    )


def calls(results: Path) -> str | None:
    """Which patches ran on quantised weights, `default` engines; None where nothing is measured."""
    runs = [run for run in newest_runs(results / "quality.csv") if is_quantised(run[1])]
    columns: dict[str, dict[str, float]] = {}
    for release, model, run in runs:
        counted = run[(run["variant"] == DEFAULT) & run["quantity"].str.startswith("calls of ")]
        names = counted["quantity"].str.removeprefix("calls of ")
        columns[f"{release}, {model}"] = dict(zip(names, counted["value"], strict=True))
    called = sorted({name for column in columns.values() for name in column if column[name]})
    if not called:
        return None
    rows = [
        [f"`{name}`", *(f"{column.get(name, 0):,.0f}" for column in columns.values())]
        for name in called
    ]
    used = origins(pd.concat([run for _, _, run in runs]))
    return (
        f"{markdown(['patch', *columns], rows)}\n\nCalls of each patch's code on the host in the `default` "
        f"engines, of all processes, eager and recorded; patches that were never called have no row. {used}."
    )


def speculation(results: Path) -> str | None:
    """A row for each quantity of each model's newest run with an assistant; None where nothing is measured."""
    runs = newest_runs(results / "quality-mtp.csv")
    if not runs:
        return None
    header = ["SGLang", "model", "asked", "how", "accept length, stock", "patched"]
    header += ["answered exactly, no speculation", "stock", "patched "]
    header += [
        "answers unlike: stock and patched MTP",
        "stock MTP and none",
        "patched MTP and none",
    ]
    header += ["alone and in batches: none", "stock MTP", "patched MTP"]
    rows = []
    for release, model, run in runs:
        values = run.set_index(["variant", "quantity"])[["value", "x"]]
        for kind in ("text", "questions"):
            for how in ("alone", "in batches of 8"):
                rows.append([release, model, kind, how, *_speculated(values, kind, how)])
    return (
        f"{markdown(header, rows)}\n\nGreedy; accept length: tokens a verify step brings, 3 steps, 4 draft "
        f"tokens: `python bench/quality_mtp.py`. {origins(pd.concat([run for _, _, run in runs]))}."
    )


def _speculated(values: pd.DataFrame, kind: str, how: str) -> list[str]:
    def cell(variant: str, quantity: str, form: str, of: bool = False) -> str:
        if (variant, quantity) not in values.index:
            return "-"
        row = values.loc[(variant, quantity)]
        return f"{row['value']:{form}}" + (f" of {row['x']:,.0f}" if of else "")

    made = [cell(name, f"accept length, {kind}, {how}", ".3f") for name in (STOCK, PATCHED)]
    engines = (PLAIN, STOCK, PATCHED)
    exactly = f"answered exactly, {how}" if kind == "questions" else ""
    made += [cell(name, exactly, ",.0f", True) for name in engines]
    for one, other in ((STOCK, PATCHED), (PLAIN, STOCK), (PLAIN, PATCHED)):
        made.append(cell(f"{one} vs {other}", f"answers that differ, {kind}, {how}", ",.0f", True))
    for name in engines:  # the same for both rows: it compares them
        pair = f"{name}, alone vs in batches of 8"
        made.append(cell(pair, f"answers that differ, {kind}", ",.0f", True))
    return made


def speculation_times(results: Path) -> str | None:
    """Tokens a second and milliseconds a step with their ranges; None where nothing is measured."""
    names: list[tuple[str, tuple[str, ...], int]] = [("tokens a second", ("tokens a second",), 0)]
    names += [("a step, ms", ("verify step", "decode step"), 2)]
    engines = {PLAIN: PLAIN, STOCK: "stock MTP", PATCHED: "patched MTP"}
    return _times(results / "quality-mtp.csv", engines, names)


def _times(
    path: Path,
    engines: dict[str, str],
    quantities: list[tuple[str, tuple[str, ...], int]],
) -> str | None:
    header = ["SGLang", "model", "requests", "", *engines.values()]
    rows, used = [], []
    for release, model, run in newest_runs(path):
        values = run.set_index(["variant", "quantity"])["value"].to_dict()
        for size in (1, 8):
            for what, names, digits_ in quantities:
                line = []
                for variant in engines:
                    found = [f"{name}, batch {size}" for name in names]
                    name = next((one for one in found if (variant, one) in values), None)
                    if name is None:
                        line.append("-")
                        continue
                    value, spread = values[variant, name], values[variant, f"{name}, range"]
                    line.append(f"{value:,.{digits_}f} ({spread:,.{digits_}f})")
                if set(line) != {"-"}:
                    rows.append([release, model, str(size), what, *line])
                    used.append(run)
    if not rows:
        return None
    return (
        f"{markdown(header, rows)}\n\nMedians of rounds in which engines take turns; in brackets from the "
        f"least to the greatest of the rounds. {origins(pd.concat(used))}."
    )


def named(variant: str) -> str:
    """Patches as code, engines as words."""
    plain = variant.startswith(STOCK) or variant in (JUDGE, EXACT, DEFAULT)
    return variant if plain else f"`{variant}` alone"


def digits(value: float, form: str) -> str:
    """In a form such as ".2g", without an exponent where it is large."""
    made = f"{value:{form}}"
    return f"{float(made):{form[:-2].rstrip('.')},.0f}" if "e+" in made else made


def cells(variant: str, values: pd.DataFrame) -> list[str]:
    """The measurements of one engine; "-" for what it has not, and for all of a patch that never ran."""

    def value(quantity: str) -> float | None:
        key = (variant, quantity)
        return float(values.loc[key, "value"]) if key in values.index else None

    def divergence(quantity: str, form: str) -> str:
        mean, error = value(quantity), value(f"{quantity}, standard error")
        if mean is None or error is None:
            return "-"
        return f"{digits(1e6 * mean, form)} ± {digits(1e6 * error, '.2g')}"

    only, stock, p = (
        value(name)
        for name in ("right where stock is wrong", "wrong where stock is right", "McNemar's p")
    )

    def of_all(quantity: str) -> str:
        """A count, and of how many if not of all questions."""
        found = value(quantity)
        if found is None:
            return "-"
        of, most = values.loc[(variant, quantity), "x"], values.xs(quantity, level=1)["x"].max()
        return f"{found:,.0f}" + (f" of {of:,.0f}" if of < most else "")

    if value(f"calls of {variant}") == 0:  # stock under a patch's name
        return [UNUSED] + 8 * ["-"]
    right = value("answered exactly")
    asked = 0 if right is None else values.loc[(variant, "answered exactly"), "x"]
    perplexity = value("perplexity")
    return [
        CUT if right is None else f"{right:,.0f} of {asked:,.0f}",
        "-" if only is None or stock is None else f"{only:.0f}, {stock:.0f}",
        "-" if p is None else f"{p:.2g}",
        of_all("answers that differ from stock's"),
        "-" if perplexity is None else f"{perplexity:.4f}",
        divergence("KL divergence from fp32, prompt", ".3g"),
        divergence("KL divergence from fp32, generated", ".3g"),
        divergence("KL divergence beyond stock's, prompt", "+.2g"),
        divergence("KL divergence beyond stock's, generated", "+.2g"),
    ]
