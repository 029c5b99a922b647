"""The state of the patches as lines for a terminal or a pipe, and as JSON.

On a terminal lines break between words only, what follows is indented. In a pipe no line breaks at all,
so that each patch is one line for ``grep``.
"""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import rich.console
from rich.console import ConsoleOptions
from rich.text import Text

from gemma4_turbo.catalogue import CATALOGUE, by_name
from gemma4_turbo.engine import states, summary
from gemma4_turbo.engine.run import DECLINED, WAITING
from gemma4_turbo.version import __version__

if TYPE_CHECKING:
    from gemma4_turbo.engine.states import PatchStatus

ORDER = (
    *(states.ACTIVE, states.UPSTREAMED, states.OFF, states.WAITING, states.UNSUPPORTED),
    *(states.DRIFTED, states.CONFLICT, states.FAILED),
)
STYLES = {states.ACTIVE: "green"} | dict.fromkeys(states.REFUSED_WHEN_STRICT, "red")
NOT_EXERCISED = "not exercised here"
_INSTALLED = "installed"
_NAME, _NUMERICS = 18, 11  # columns


def versions() -> dict[str, str | None]:
    """Versions of everything that decides what the patches do; None where not installed."""
    found: dict[str, str | None] = {
        "gemma4_turbo": __version__,
        "python": platform.python_version(),
    }
    for package in ("sglang", "torch", "triton", "wrapt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            module = sys.modules.get(package)
            found[package] = getattr(module, "__version__", None)
    return found


def torch_problem() -> str | None:
    """Why PyTorch cannot be used, None if it can. Imports it."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        return f"PyTorch is not installed: {error}"
    except Exception as error:  # a library that is missing is an OSError, an ABI anything
        return f"PyTorch cannot be imported: {type(error).__name__}: {error}"
    return None


def device() -> str | None:
    """The first GPU by name, None without one. Imports torch."""
    if torch_problem() is not None:
        return None
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def as_records(rows: Iterable[PatchStatus]) -> list[dict[str, Any]]:
    """One JSON-ready object per patch."""
    records = []
    for row in rows:
        patch = by_name(row.name)
        records.append(
            {
                "name": row.name,
                "summary": patch.summary,
                "env": patch.env,
                "default": "on" if patch.default else "off",
                "state": row.state,
                "reason": row.reason,
                "numerics": patch.numerics,
                "targets": list(row.targets),
                "engaged": row.engaged,
                "origin": patch.origin,
            }
        )
    return records


# -- lines ----------------------------------------------------------------------------------------


def plain(text: object, style: str = "") -> Text:
    """For the terminal as it is: what comes from data may hold brackets, colons, half characters."""
    return Text(str(text).encode(errors="backslashreplace").decode(), style)


class Console(rich.console.Console):
    """A terminal or a pipe, which may be closed: BrokenPipeError then, not rich's exit with 1."""

    def on_broken_pipe(self) -> None:
        raise


class Listing:
    """Lines that break between words only."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, str]] = []  # text, indentation of what follows, style

    def add(self, text: object, hang: int = 0, style: str = "") -> Listing:
        """One line more."""
        self.lines.append((plain(text).plain.replace("\n", " "), hang, style))
        return self

    def broken(self, width: int | None) -> Iterator[Text]:
        """The lines for a terminal of that width; None: unbroken."""
        for text, hang, style in self.lines:
            indent = len(text) - len(text.lstrip())
            parts = [text]
            if width is not None and len(text) > width:
                parts = textwrap.wrap(
                    text.strip(),
                    width,
                    initial_indent=" " * indent,
                    subsequent_indent=" " * hang,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            for part in parts:
                yield Text(part, style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from self.broken(options.max_width)


def show(console: Console, *listings: Listing) -> None:
    """Print at once: words are whole, whatever their length, and in a pipe lines are."""
    for listing in listings:
        for line in listing.broken(console.width if console.is_terminal else None):
            console.print(line, soft_wrap=True)


def table(
    rows: Iterable[PatchStatus | Mapping[str, Any]],
    title: str = "",
    calls: bool = True,
    everything: bool = False,
    idle: str = "",
) -> Listing:
    """The rows, a line each, by state; a cause that several share is told once.

    Defects that were looked for and not found are one line at the end.

    Args:
        rows: `PatchStatus`, or records that hold the same.
        title: a line above.
        calls: tell how often each patch's code has run; False where nothing is run.
        everything: what each patch does, its switch and its origin as well.
        idle: why active patches may have counted no call; their names are one line then.
    """
    listing = Listing()
    if title:
        listing.add(title, 2, "bold")
    notes: list[str] = []
    absent: list[Mapping[str, Any]] = []
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        record = dict(row) if isinstance(row, Mapping) else row._asdict()
        record["reason"], told, why = record["reason"].partition(f"; {states.ALONE}: ")
        if told and (note := told.removeprefix("; ") + why) not in notes:
            notes.append(note)
        if _is_absent(record):
            absent.append(record)
            continue
        by_reason = groups.setdefault(record["state"], {})
        by_reason.setdefault(record["reason"], []).append(record)
    for state in sorted(groups, key=_rank):
        silent: list[Mapping[str, Any]] = []
        if state == states.ACTIVE and idle:
            silent = _take_idle(groups[state])
        shared = {why: found for why, found in groups[state].items() if len(found) > 1}
        own = [found[0] for why, found in groups[state].items() if why not in shared]
        for head, found in _alike(own).items() if state == states.UPSTREAMED else ():
            listing.add(f"{state} ({len(found)}): {head}", 2, STYLES.get(state, "bold"))
            for one in found:
                _add_row(listing, one, one["reason"].removeprefix(f"{head}: "), calls, everything)
                own.remove(one)
        for why, found in shared.items():
            cause = why.removeprefix(_INSTALLED).removeprefix("; ")
            told = f": {cause}" if cause else ""
            listing.add(f"{state} ({len(found)}){told}", 2, STYLES.get(state, "bold"))
            for one in found:
                _add_row(listing, one, "", calls, everything)
        if own:
            listing.add(f"{state} ({len(own)})", 2, STYLES.get(state, "bold"))
            for one in own:
                why = one["reason"].removeprefix(_INSTALLED).removeprefix("; ")
                _add_row(listing, one, why, calls, everything)
        if silent:
            _add_idle(listing, silent, idle)
    if absent:
        _add_absent(listing, absent, calls, everything)
    for note in notes:
        listing.add(note, 2, "yellow")
    return listing


def _alike(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Those whose reasons begin alike, up to a colon, by that beginning."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        head, colon, _ = record["reason"].partition(": ")
        if colon:
            found.setdefault(head, []).append(record)
    return {head: alike for head, alike in found.items() if len(alike) > 1}


def _take_idle(by_reason: dict[str, list[Mapping[str, Any]]]) -> list[Mapping[str, Any]]:
    """Those that counted no call, out of the others."""
    found = []
    for reason, records in list(by_reason.items()):
        found += [one for one in records if not one["engaged"]]
        by_reason[reason] = [one for one in records if one["engaged"]]
        if not by_reason[reason]:
            del by_reason[reason]
    return found


def _add_idle(listing: Listing, records: Sequence[Mapping[str, Any]], cause: str) -> None:
    """Names in one line; a row for each that says why it took stock's path."""
    head = f"{states.ACTIVE}, {NOT_EXERCISED} ({len(records)}): {cause}"
    listing.add(head, 2, STYLES[states.ACTIVE])
    if silent := [one["name"] for one in records if one["reason"] == _INSTALLED]:
        listing.add(f"  {joined(silent)}", 2)
    for one in records:
        if one["reason"] != _INSTALLED:
            _add_row(listing, one, one["reason"].rpartition(f"{DECLINED}: ")[2], False, False)


def _rank(state: str) -> int:
    return ORDER.index(state) if state in ORDER else len(ORDER)


def _is_absent(record: Mapping[str, Any]) -> bool:
    return summary.is_absent(record["name"], record["state"], record["engaged"])


def _add_absent(
    listing: Listing, absent: Sequence[Mapping[str, Any]], calls: bool, everything: bool
) -> None:
    line = f"{summary.looked_for(len(absent))}: none found"
    if not everything:
        listing.add(f"{line} ({joined([record['name'] for record in absent])})", 2)
        return
    listing.add(line, 2, "bold")
    for record in absent:
        _add_row(listing, record, record["reason"], calls, everything)


def _add_row(
    listing: Listing, record: Mapping[str, Any], why: str, calls: bool, everything: bool
) -> None:
    patch = next((patch for patch in CATALOGUE if patch.name == record["name"]), None)
    # A server may run another version of this package.
    parts = [f"  {record['name']:<{_NAME}}{patch.numerics if patch else '?':<{_NUMERICS}}"]
    if calls and record["state"] == states.ACTIVE:
        parts.append(_calls(record))
    if why:
        parts.append(why)
    listing.add((parts[0] + "; ".join(parts[1:])).rstrip(), 6)
    if everything and patch is not None:
        listing.add(f"      {patch.summary}", 6)
        origin = f"; from {patch.origin}" if patch.origin else ""
        listing.add(f"      {patch.env}=0 or 1{origin}", 6)


def _calls(record: Mapping[str, Any]) -> str:
    if not record["engaged"]:
        return NOT_EXERCISED
    told = f"{record['engaged']} call" + ("" if record["engaged"] == 1 else "s")
    captured = record.get("captured")
    return f"{told} ({captured} into CUDA graphs)" if captured else told


def process_table(
    patches: Sequence[Mapping[str, Any]], title: str, everything: bool = False
) -> Listing:
    """Another process's patches: what most of them have in common after the title, rows for the rest.

    Patches are alike that have state and reason in common and have counted no call. Drifted, in
    conflict or failed, each has its row unless all are so.

    Args:
        patches: records as a process writes them.
        title: which process it is.
        everything: a row for each.
    """
    kinds = Counter((one["state"], one["reason"]) for one in patches if not one["engaged"])
    common, count = kinds.most_common(1)[0] if kinds else (("", ""), 0)
    whole = count == len(patches)
    most = 2 * count > len(patches) and common[0] not in states.REFUSED_WHEN_STRICT
    if everything or count < 2 or not (whole or most):
        return table(patches, title)
    of = "" if whole else f" of {len(patches)}"
    listing = Listing().add(f"{title}: {_in_common(*common)}, {count}{of} patches", 2, "bold")
    rest = [one for one in patches if one["engaged"] or (one["state"], one["reason"]) != common]
    listing.lines += table(rest).lines
    return listing


def _in_common(state: str, reason: str) -> str:
    if (state, reason) == (states.WAITING, WAITING):
        return "waiting for SGLang's import"
    if (state, reason) == (states.ACTIVE, _INSTALLED):
        return f"{state}, {NOT_EXERCISED}"
    return f"{state}: {reason}" if reason else state


def counts(rows: Iterable[PatchStatus | Mapping[str, Any]]) -> dict[str, int]:
    """How many patches are in which state, in the order of the listing."""
    found = Counter(row["state"] if isinstance(row, Mapping) else row.state for row in rows)
    return {state: found[state] for state in sorted(found, key=_rank)}


def verdict(rows: Iterable[PatchStatus | Mapping[str, Any]]) -> str:
    """Every patch by its state, in one line: ``34 active, 3 upstreamed, 3 off``."""
    return ", ".join(f"{count} {state}" for state, count in counts(rows).items()) or "no patch"


def closing(rows: Iterable[PatchStatus | Mapping[str, Any]]) -> str:
    """As the listing has it, in one line: ``34 active, 3 off; 3 defects looked for, none found``."""
    records = [row if isinstance(row, Mapping) else row._asdict() for row in rows]
    rest = [record for record in records if not _is_absent(record)]
    absent = len(records) - len(rest)
    parts = [verdict(rest)] if rest or not absent else []
    if absent:
        parts.append(f"{summary.looked_for(absent)}, none found")
    return "; ".join(parts)


def joined(names: Sequence[str]) -> str:
    """Names for a sentence."""
    return ", ".join(names)


# -- progress -------------------------------------------------------------------------------------


class Progress:
    """What is being done, on stderr: a moving line on a terminal, a line each in a pipe."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""
        if not self._moving(text):
            self._console.print(plain(text), soft_wrap=True)

    def detail(self, text: str) -> None:
        """A step of it; in a pipe it is not told."""
        self._moving(text)

    def _moving(self, text: str) -> bool:
        # SGLang's log goes to the same terminal, and would run into a moving line.
        if not self._console.is_terminal or os.environ.get("TERM") == "dumb":
            return False
        if self._status is None:
            self._status = self._console.status(plain(text))
            self._status.start()
        else:
            self._status.update(plain(text))
        return True
