"""The table of `quality.py`: answers of trained models, stock against patched."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bench.table_text import markdown, newest_rows, origins

STOCK, DEFAULT, JUDGE = "stock", "default", "transformers, fp32"


def newest_runs(results: Path) -> list[tuple[str, str, pd.DataFrame]]:
    """Release, model and rows of the newest run of each; none where nothing is measured."""
    path = results / "quality.csv"
    if not path.exists():
        return []
    frame = pd.read_csv(path)
    return [
        (str(release), str(model), newest_rows(of_model))
        for (release, model), of_model in frame.groupby(["sglang", "model"], sort=False)
    ]


def headline(results: Path) -> str | None:
    """One line: how many questions stock and all default patches answer; None where nothing is measured."""
    told = []
    for release, model, run in newest_runs(results):
        values = run.set_index(["variant", "quantity"])[["value", "x"]]
        right = {name: values.loc[name, "answered exactly"] for name in (STOCK, DEFAULT)}
        p = values.loc[(DEFAULT, "McNemar's p"), "value"]
        counts = f"stock {right[STOCK]['value']:,.0f}, patched {right[DEFAULT]['value']:,.0f}"
        told.append(f"`{model}` on {release} {counts} of {right[STOCK]['x']:,.0f} (p {p:.2g})")
    if not told:
        return None
    return f"Questions that trained models answer exactly: {'; '.join(told)}."


def quality(results: Path) -> str | None:
    """A row for each engine of each model's newest run on a release; None where nothing is measured."""
    rows, used = [], []
    for release, model, run in newest_runs(results):
        used.append(run)
        values = run.set_index(["variant", "quantity"])[["value", "x"]]
        for variant in dict.fromkeys(run["variant"]):
            rows.append([release, model, named(variant), *cells(variant, values)])
    if not used:
        return None
    header = ["SGLang", "model", "engine", "answered exactly", "only this, only stock", "p"]
    header += ["answers unlike stock's", "perplexity", "KL from fp32, prompt", "generated"]
    header += ["beyond stock's, prompt", "generated "]
    steps = ", ".join(f"{run.iloc[0]['model']} {run.iloc[0]['trained_steps']:,}" for run in used)
    return (
        f"{markdown(header, rows)}\n\nTrained models, greedy answers, KL divergence in 10^-6 nats with its "
        "standard error. p: McNemar's exact test of the questions that one of the two engines answered. "
        f"Steps of training: {steps}. {origins(pd.concat(used))}."
    )


def named(variant: str) -> str:
    """Patches as code, engines as words."""
    plain = variant.startswith(STOCK) or variant in (JUDGE, "exact", DEFAULT)
    return variant if plain else f"`{variant}` alone"


def cells(variant: str, values: pd.DataFrame) -> list[str]:
    """The measurements of one engine; "-" for what it has not."""

    def value(quantity: str) -> float | None:
        key = (variant, quantity)
        return float(values.loc[key, "value"]) if key in values.index else None

    def divergence(quantity: str, form: str) -> str:
        mean, error = value(quantity), value(f"{quantity}, standard error")
        if mean is None or error is None:
            return "-"
        return f"{1e6 * mean:{form}} ± {1e6 * error:.2g}"

    only, stock, p = (
        value(name)
        for name in ("right where stock is wrong", "wrong where stock is right", "McNemar's p")
    )
    asked = values.loc[(variant, "answered exactly"), "x"]
    differing, perplexity = value("answers that differ from stock's"), value("perplexity")
    return [
        f"{value('answered exactly'):,.0f} of {asked:,.0f}",
        "-" if only is None or stock is None else f"{only:.0f}, {stock:.0f}",
        "-" if p is None else f"{p:.2g}",
        "-" if differing is None else f"{differing:,.0f}",
        "-" if perplexity is None else f"{perplexity:.4f}",
        divergence("KL divergence from fp32, prompt", ".3g"),
        divergence("KL divergence from fp32, generated", ".3g"),
        divergence("KL divergence beyond stock's, prompt", "+.2g"),
        divergence("KL divergence beyond stock's, generated", "+.2g"),
    ]
