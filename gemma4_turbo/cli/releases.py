"""``record WHEEL...`` and ``release WHEEL``: what a release of SGLang holds, read from its wheel."""

from __future__ import annotations

import ast
import difflib
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from email import message_from_string
from pathlib import Path
from typing import Any, NamedTuple

from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.cli import report
from gemma4_turbo.cli.modules import CannotRunError
from gemma4_turbo.cli.report import Console
from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.fingerprints import Definitions, SourceOf
from gemma4_turbo.engine.imports import installed_release
from gemma4_turbo.engine.port import ALL, Port
from gemma4_turbo.instance import PORTS, every_port

SAME, UPSTREAMED, NEEDLESS, LATER, MOVED, CHANGED, GONE, MISTAKE = ORDER = (
    *("same", "upstreamed", "needless", "later", "moved", "changed", "gone", "mistake"),
)
DONE = (SAME, UPSTREAMED, NEEDLESS, LATER)  # need no work
MEANS = {
    SAME: "fits as it is",
    UPSTREAMED: "SGLang has it itself, or has not the defect",
    NEEDLESS: "of no use with this source",
    LATER: "written for later releases alone",
    MOVED: "the same source in another module: a port with the new names",
    CHANGED: "another source: a port to read again (--diff PATCH)",
    GONE: "nothing of this name: a port to write anew",
    MISTAKE: "the patch's own record is wrong",
}
_MANY = 30  # modules that define a name: then it is a common one


class Wheel(NamedTuple):
    """A wheel of SGLang."""

    path: Path
    release: str
    source_of: SourceOf


def opened(path: Path) -> Wheel:
    """The wheel at ``path``; `CannotRunError`, naming it, if it is none of SGLang's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
            if len(names) != 1:
                raise CannotRunError(f"{path} is no wheel: it holds no .dist-info/METADATA")
            metadata = message_from_string(archive.read(names[0]).decode("utf-8", "replace"))
    except zipfile.BadZipFile:
        raise CannotRunError(f"{path} is no wheel: it is no zip file") from None
    except IsADirectoryError:
        raise CannotRunError(f"{path} is no wheel: it is a folder") from None
    except NotADirectoryError:
        raise CannotRunError(
            f"{path} is inside another file, of which it must be taken out first"
        ) from None
    except OSError as error:
        raise CannotRunError(f"{path} cannot be read: {error.strerror or error}") from None
    if metadata["Name"] != "sglang" or not metadata["Version"]:
        raise CannotRunError(f"{path} is a wheel of {metadata['Name']}, not of sglang")
    return Wheel(path, str(metadata["Version"]), fingerprints.wheel_source(path))


# -- record ---------------------------------------------------------------------------------------


def record(wheels: Sequence[Path], out: Path | None, as_json: bool) -> int:
    """The command: write a file of fingerprints for each wheel's release."""
    folder = _tables() if out is None else out
    written: list[dict[str, Any]] = []
    for wheel in [opened(path) for path in wheels]:  # all of them can be read, or none is written
        prints = _recorded(wheel)
        path = folder / f"{wheel.release}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            path.write_text(json.dumps(prints, indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CannotRunError(f"{path} cannot be written: {error}") from None
        written.append(
            {
                "release": wheel.release,
                "file": str(path),
                "fingerprints": len(prints),
                "was": "absent" if before is None else "same" if before == prints else "different",
            }
        )
    if as_json:
        print(json.dumps({"written": written}, indent=1))
        return 0
    lines = report.Listing()
    words = {"absent": "new", "same": "as before", "different": "it was another one before"}
    for one in written:
        lines.add(f"{one['file']}: {one['fingerprints']} fingerprints, {words[one['was']]}", 2)
    releases = ", ".join(one["release"] for one in written)
    report.show(Console(), lines.add(f"record: {releases}"))
    return 0


def _tables() -> Path:
    if not isinstance(fingerprints.TABLES, Path):
        raise CannotRunError(
            f"{fingerprints.TABLES} is inside a zip and cannot be written: name a folder (--out)"
        )
    return fingerprints.TABLES


def _recorded(wheel: Wheel) -> dict[str, str]:
    try:
        return fingerprints.record_release(wheel.source_of, every_port())
    except (SyntaxError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise CannotRunError(f"{wheel.path} cannot be read: {error}") from None


# -- release --------------------------------------------------------------------------------------


class Need(NamedTuple):
    """What one patch needs for a release."""

    patch: str
    what: str  # of ORDER
    reason: str
    moved: dict[str, str]  # function: where it is now
    changed: list[str]
    gone: list[str]
    port: Port | None

    def told(self) -> str:
        """In a line: one function of each kind, and how many more."""
        parts = [self.reason] if self.reason else []
        for word, names in self.functions():
            more = f" +{len(names) - 1}" if len(names) > 1 else ""
            parts.append(f"{word}: {names[0].partition(':')[2]}{more}")
        return "; ".join(parts)

    def functions(self) -> list[tuple[str, list[str]]]:
        """All of them, by what happened to them."""
        moved = [f"{old} -> {new}" for old, new in self.moved.items()]
        found = ((GONE, self.gone), (CHANGED, self.changed), (MOVED, moved))
        return [(word, names) for word, names in found if names]


def needs(wheel: Wheel, progress: report.Progress | None = None) -> list[Need]:
    """Of every patch, in the catalogue's order."""
    elsewhere = _Elsewhere(wheel)
    definitions = Definitions(wheel.source_of)
    found = []
    for patch in CATALOGUE:
        if progress is not None:
            progress.detail(f"looking for what {patch.name} stands on")
        verdict = fingerprints.judge(PORTS[patch.name], wheel.release, definitions)
        if verdict.state in (states.ACTIVE, states.UPSTREAMED, states.FAILED):
            what = {states.ACTIVE: SAME, states.UPSTREAMED: UPSTREAMED}.get(verdict.state, MISTAKE)
            reason = "" if what == SAME else verdict.reason
            found.append(Need(patch.name, what, reason, {}, [], [], verdict.port))
            continue
        if verdict.port is not None:  # that says why the line has no use for the patch
            found.append(Need(patch.name, NEEDLESS, verdict.reason, {}, [], [], verdict.port))
            continue
        if _is_later(PORTS[patch.name], wheel.release):
            found.append(Need(patch.name, LATER, "", {}, [], [], None))
            continue
        compared = [
            _compare(patch.name, port, definitions, elsewhere) for port in PORTS[patch.name]
        ]
        found.append(min(compared, key=lambda need: len(need.gone) * 1000 + len(need.changed)))
    return found


def _is_later(ports: Sequence[Port], release: str) -> bool:
    """Whether this is a release on record, and every port was written for later ones."""
    known = list(fingerprints.known_releases())  # oldest first
    written = [other for port in ports for other in port.written_for]
    return release in known and all(known.index(release) < known.index(one) for one in written)


def _compare(name: str, port: Port, definitions: Definitions, elsewhere: _Elsewhere) -> Need:
    """With the release that most of the port's sources are the same as in."""
    table = fingerprints.known_releases()
    here = {target: definitions.fingerprint(target) for target in port.sources}
    written = [table[release] for release in port.written_for if release in table]
    known = max(
        reversed(written or list(table.values())),
        key=lambda prints: sum(here[target] == prints.get(target) for target in here),
    )
    moved, changed, gone = dict[str, str](), list[str](), list[str]()
    for target, value in here.items():
        if value is not None and value == known.get(target):
            continue
        place = elsewhere.find(target, known.get(target))
        if place is not None:
            moved[target] = place
        elif value is None:
            gone.append(target)
        else:
            changed.append(target)
    for target, names in port.reads:
        if definitions.node(target) is None:
            gone.append(target)
        elif not all(definitions.mentions(target, name) for name in names):
            changed.append(target)
    for target, names, bases in port.lacks:
        found, own = definitions.members(target) or (bases, frozenset())
        changed += [f"{target}.{name}" for name in names if name in own]
        if found != bases:
            changed.append(target + ALL)
    what = GONE if gone else CHANGED if changed else MOVED
    return Need(name, what, "", moved, changed, gone, port)


class _Elsewhere:
    """Definitions of SGLang's modules by fingerprint; a module is parsed when a name may be in it."""

    def __init__(self, wheel: Wheel) -> None:
        with zipfile.ZipFile(wheel.path) as archive:
            self._sources = {
                name: archive.read(name).decode("utf-8", "replace")
                for name in archive.namelist()
                if name.startswith("sglang/srt/") and name.endswith(".py")
            }
        self._found: dict[str, list[tuple[str, ast.AST]]] = {}

    def find(self, target: str, value: str | None) -> str | None:
        """Where else the source with this fingerprint is."""
        if value is None:
            return None
        own, _, qualname = target.partition(":")
        all_of = ALL if qualname.endswith(ALL) else ""
        qualname = qualname.removesuffix(all_of)
        within, _, word = qualname.rpartition(".")
        paths = [
            path
            for path, source in self._sources.items()
            if f"def {word}(" in source or f"class {word}" in source
        ]
        if len(paths) > _MANY:  # forward, __init__: only where the class is called so, too
            paths = [path for path in paths if f"class {within}" in self._sources[path]]
        for path in paths:
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for place, node in self._definitions(path):
                if (
                    place.rpartition(".")[2] == word
                    and (module, place) != (own, qualname)
                    and fingerprints.fingerprint_of(place + all_of, node) == value
                ):
                    return f"{module}:{place}{all_of}"
        return None

    def _definitions(self, path: str) -> list[tuple[str, ast.AST]]:
        if path not in self._found:
            self._found[path] = list(_definitions(_tree(self._sources[path])))
        return self._found[path]


def _tree(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or for a newer Python
        return ast.Module([], [])


def _definitions(scope: ast.AST, within: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield within + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{within}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(node, within)


def diff(need: Need, wheel: Wheel, against: Wheel | None) -> list[str]:
    """The lines of what changed of a patch's sources; `CannotRunError` without something older."""
    old_release = against.release if against else installed_release()
    old_source = against.source_of if against else fingerprints.installed_source
    if old_release is None:
        raise CannotRunError("--diff: SGLang is not installed: name an older wheel (--against)")
    lines: list[str] = []
    lacks = need.port.lacks if need.port else ()
    new = {f"{lack.target}.{name}" for lack in lacks for name in lack.names}
    for target in [*need.changed, *need.gone]:
        before = _text(old_source, target)
        if not before and target not in new:
            raise CannotRunError(
                f"--diff: SGLang {old_release} has no {target}: name another wheel (--against)"
            )
        after = _text(wheel.source_of, target)
        names = (f"{old_release}/{target}", f"{wheel.release}/{target}")
        lines += difflib.unified_diff(before, after, *names, lineterm="")
    return lines


def _text(source_of: SourceOf, target: str) -> list[str]:
    module, _, qualname = target.partition(":")
    source = source_of(module)
    name = qualname.removesuffix(ALL)
    node: Any = None if source is None else fingerprints.find_definition(_tree(source), name)
    if source is None or node is None:
        return []
    if name != qualname:
        return fingerprints.methods_of(node)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return source.splitlines()[first - 1 : node.end_lineno]


def release(
    wheel_path: Path, patch: str | None, against: Path | None, everything: bool, as_json: bool
) -> int:
    """The command: 0 no patch needs work, 1 some do."""
    if patch is not None and patch not in PORTS:
        raise CannotRunError(f"--diff names no patch: {patch!r}; choose from {', '.join(PORTS)}")
    if against is not None and patch is None:
        raise CannotRunError("--against goes with --diff PATCH")
    wheel = opened(wheel_path)
    older = None if against is None else opened(against)
    try:
        with report.Progress() as progress:
            found = needs(wheel, progress)
    except (SyntaxError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise CannotRunError(f"{wheel.path} cannot be read: {error}") from None
    needed = next((need for need in found if need.patch == patch), None)
    lines = [] if needed is None else diff(needed, wheel, older)
    if as_json:
        records = [
            {k: v for k, v in need._asdict().items() if k != "port"} | {"means": MEANS[need.what]}
            for need in found
        ]
        answer = {"release": wheel.release, "patches": records, "verdict": _verdict(found, wheel)}
        print(json.dumps(answer | ({"diff": lines} if needed else {}), indent=1))
    elif needed is not None:
        listing = report.Listing()
        for line in lines or [
            f"{needed.patch}: {needed.what}: {needed.told() or MEANS[needed.what]}"
        ]:
            listing.lines.append((report.plain(line).plain, 0, _DIFF.get(line[:1], "")))
        # As it is: a broken line would be no diff.
        for text in listing.broken(None):
            Console().print(text, soft_wrap=True)
    else:
        report.show(Console(), _listing(found, wheel, everything))
    return 0 if all(need.what in DONE for need in found) else 1


_DIFF = {"+": "green", "-": "red", "@": "cyan"}


def _listing(found: Iterable[Need], wheel: Wheel, everything: bool) -> report.Listing:
    known = "" if wheel.release in fingerprints.known_releases() else ", not recorded yet"
    lines = report.Listing().add(f"SGLang {wheel.release}{known}", 2, "bold")
    groups: dict[str, list[Need]] = {}
    for need in found:
        groups.setdefault(need.what, []).append(need)
    for what in sorted(groups, key=ORDER.index):
        style = "green" if what in DONE else "bold"
        lines.add(f"{what} ({len(groups[what])}): {MEANS[what]}", 2, style)
        if what in (SAME, LATER):
            lines.add(f"  {', '.join(need.patch for need in groups[what])}", 2)
            continue
        for need in groups[what]:
            lines.add(f"  {need.patch:<18}{need.told()}", 6)
            for word, names in need.functions() if everything else ():
                for name in names:
                    lines.add(f"      {word}: {name}", 8)
    return lines.add(_verdict(found, wheel))


def _verdict(found: Iterable[Need], wheel: Wheel) -> str:
    counted = [(sum(need.what == what for need in found), what) for what in ORDER]
    return f"release {wheel.release}: " + ", ".join(f"{n} {what}" for n, what in counted if n)
