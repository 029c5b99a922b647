"""Fingerprints of the patch targets' source, read without importing SGLang.

A fingerprint is a hash over the target's syntax tree without docstrings, comments and layout. It is
the same under every Python from 3.11 on, because the tree is written out by our own walk: empty
fields are left out, and so are fields that say nothing of behaviour or that only newer Pythons
have. ``fingerprints/<release>.json`` holds those of a known release; ``gemma4-turbo record`` adds one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gemma4_turbo.engine import states
from gemma4_turbo.engine.port import ALL, Port

T = TypeVar("T")

logger = logging.getLogger("gemma4_turbo")

FOLDER = "fingerprints"
RECORD = "gemma4-turbo record WHEEL"
TABLES = resources.files("gemma4_turbo") / FOLDER  # in a zip, if the package is
_SKIPPED_FIELDS = ("ctx", "kind", "type_comment", "type_params", "type_ignores")

SourceOf = Callable[[str], str | None]
"""From a module's name to its source, None if it is not there."""


class Verdict(NamedTuple):
    """Whether a patch fits a release: ``active``, ``upstreamed``, ``drifted`` or ``unsupported``.

    ``failed``: its record in the catalogue, or the table of fingerprints, is wrong.
    """

    state: str
    reason: str
    # That fits, where the state is ``active``, or says that the line has no use for the patch.
    port: Port | None = None


@cache
def known_releases() -> dict[str, dict[str, str]]:
    """``{release: {target: fingerprint}}``, a file per release; absent targets are left out."""
    table: dict[str, dict[str, str]] = {}
    for file in TABLES.iterdir():
        if file.name.endswith(".json"):
            prints = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(prints, dict):
                raise ValueError(f"{file.name} holds no object")
            table[file.name.removesuffix(".json")] = prints
    return dict(sorted(table.items(), key=lambda item: release_key(item[0])))


def installed_source(module: str) -> str | None:
    """Source of a module of the installed SGLang, None if it cannot be had. Imports nothing."""
    root = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(root)
        # One that is loaded by a finder of its own may be anywhere; a namespace has several places.
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
    except Exception as error:  # whatever finders there are, and folders that nobody may search
        _tell(f"{root} cannot be looked for: {error}")
        return None
    sources = (folder_source(Path(place).parent)(module) for place in places)
    return next((source for source in sources if source is not None), None)


def folder_source(root: Path) -> SourceOf:
    """Sources below ``root``, the folder that holds ``sglang/``; it may be inside a zip."""

    def source(module: str) -> str | None:
        stem = root.joinpath(*module.split("."))
        for path in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
            try:
                return file_source(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except Exception as error:
                _tell(f"{path} cannot be read: {type(error).__name__}: {error}")
        return None

    return source


@cache  # once: every patch looks into the same few files
def _tell(what: str) -> None:
    logger.warning("gemma4_turbo: %s", what)


def file_source(path: str | Path) -> str:
    """Source in a file, or in one inside a zip, where Python's importer finds modules too."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except NotADirectoryError:
        archive = next(parent for parent in path.parents if parent.exists())
        if not zipfile.is_zipfile(archive):
            raise
        with zipfile.ZipFile(archive) as opened:
            try:
                content = opened.read(path.relative_to(archive).as_posix())
            except KeyError:
                raise FileNotFoundError(f"{path} is not in the zip") from None
    return importlib.util.decode_source(content)


def wheel_source(wheel: Path) -> SourceOf:
    """Sources inside a wheel."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())

    def source(module: str) -> str | None:
        stem = module.replace(".", "/")
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if name in names:
                return archive.read(name).decode("utf-8")
        return None

    return source


def find_definition(tree: ast.Module, qualname: str) -> ast.AST | None:
    """The last definition of ``A.b`` in a module, also below ``if`` and ``try``."""
    scope: ast.AST | None = tree
    for name in qualname.split("."):
        scope = _defined_in(scope).get(name) if scope is not None else None
    return scope


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _defined_in(scope: ast.AST) -> dict[str, _Definition]:
    """The last definition of each name in a module, class or function, not those further in."""
    return {node.name: node for node in _statements(scope) if isinstance(node, _Definition)}


def _statements(scope: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module, class or function does, below ``if`` and ``try`` as well, in order."""
    pending = list(ast.iter_child_nodes(scope))[::-1]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            pending += list(ast.iter_child_nodes(node))[::-1]
        else:
            yield node


def _write(value: object, out: list[str]) -> None:
    if isinstance(value, ast.AST):
        out.append(f"({type(value).__name__}")
        body = getattr(value, "body", None)
        for field, child in ast.iter_fields(value):
            if field in _SKIPPED_FIELDS or child is None or child == []:
                continue
            if field == "body" and isinstance(body, list) and _has_docstring(value):
                child = body[1:]
            if isinstance(value, ast.JoinedStr) and field == "values":
                # Some Pythons put empty strings between the parts of an f-string.
                child = [part for part in value.values if getattr(part, "value", None) != ""]
            out.append(f" {field}=")
            _write(child, out)
        out.append(")")
    elif isinstance(value, list):
        out.append("[")
        for child in value:
            _write(child, out)
            out.append(",")
        out.append("]")
    else:
        out.append(f"{type(value).__name__}:{value!r}")


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    first = node.body[0]
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def fingerprint(node: ast.AST) -> str:
    """16 hexadecimal digits for a syntax tree, docstrings aside."""
    out: list[str] = []
    _write(node, out)
    return _digits("".join(out))


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_of(qualname: str, node: ast.AST) -> str:
    """Of a definition as `Port.sources` names it."""
    return _digits("\n".join(methods_of(node))) if qualname.endswith(ALL) else fingerprint(node)


def methods_of(node: ast.AST) -> list[str]:
    """Of a class: the line that names its bases, and what it defines, sorted; nothing of another definition.

    Methods, classes and plain assignments, which may be a method's other name. Annotated fields are none.
    """
    if not isinstance(node, ast.ClassDef):
        return []
    bases, defined = _members(node)
    return [f"class {node.name}({bases}):", *sorted(defined)]


def _targets(statement: ast.AST, annotated: bool) -> list[ast.expr]:
    """What a statement assigns to."""
    if isinstance(statement, ast.Assign):
        return statement.targets
    return [statement.target] if annotated and isinstance(statement, ast.AnnAssign) else []


def _members(node: ast.ClassDef, annotated: bool = False) -> _Members:
    """``annotated``: names with an annotation too, as a dataclass's fields are, with a value or without."""
    assigned = {
        name.id
        for statement in _statements(node)
        for target in _targets(statement, annotated)
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
    return bases, frozenset(assigned | _defined_in(node).keys())


class _Place(NamedTuple):
    """Where a definition stands in its source."""

    first: int  # line, from 1, decorators included
    last: int
    is_nested: bool  # and so indented


_Names = tuple[frozenset[str], frozenset[str]]
"""In a definition: names and attributes that it uses; parameters, functions and classes in it."""
_NO_NAMES: _Names = (frozenset(), frozenset())
_Members = tuple[str, frozenset[str]]
"""Of a class: its bases, as the source has them, and what it defines, assignments included."""


class _Outline:
    """What is kept of a source once it was parsed: a tree takes a hundred times the room."""

    def __init__(self, tree: ast.Module) -> None:
        self.places = dict(_places(tree))
        self.imports = tuple(_imports(tree))  # (name here, module, name there)
        self.fingerprints: dict[str, str] = {}  # of those that were asked for
        self.names: dict[str, _Names] = {}  # likewise
        self.members: dict[str, _Members] = {}  # of classes, likewise


def _places(scope: ast.Module | _Definition, within: str = "") -> Iterator[tuple[str, _Place]]:
    for name, node in _defined_in(scope).items():
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        is_nested = bool(within) or node not in scope.body
        yield within + name, _Place(first, node.end_lineno or node.lineno, is_nested)
        yield from _places(node, f"{within}{name}.")


def _imports(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Of every ``from module import name``; expressions, which hold none, are not walked."""
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ImportFrom):
            if node.module and not node.level:
                for alias in node.names:
                    yield alias.asname or alias.name, node.module, alias.name
        else:
            for field in _BLOCKS:
                pending += getattr(node, field, ())


_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
_outlines: dict[bytes, _Outline] = {}  # by the source's hash, so that an edited file is read anew


def _outline(source: str) -> _Outline:
    """Of a source, each parsed once in a process: the patches look into the same few dozen modules."""
    key = hashlib.sha256(source.encode()).digest()
    if key not in _outlines:
        _outlines[key] = _Outline(ast.parse(source))
    return _outlines[key]


class _Module:
    """A module's source, of which only the definitions that are asked for are parsed again."""

    def __init__(self, source: str) -> None:
        self.outline = _outline(source)
        self._source = source

    @cached_property
    def _lines(self) -> list[str]:
        return self._source.replace("\r\n", "\n").replace("\r", "\n").split("\n")

    def node(self, qualname: str) -> ast.AST | None:
        """As `find_definition` in the whole tree, line numbers included."""
        place = self.outline.places.get(qualname)
        if place is None:
            return None
        # In its own lines, under something that holds what is indented: a line is there for it.
        head = ["if 1:"] if place.is_nested else []
        above = [""] * (place.first - 1 - len(head))
        lines = [*above, *head, *self._lines[place.first - 1 : place.last]]
        try:
            body = ast.parse("\n".join(lines)).body
        except SyntaxError:
            body = []
        if place.is_nested and len(body) == 1 and isinstance(body[0], ast.If):
            body = body[0].body
        if len(body) == 1 and isinstance(body[0], _Definition):
            return body[0]
        return find_definition(ast.parse(self._source), qualname)  # as with "@(" on its own line


class Definitions:
    """Definitions found through a `SourceOf`, each module read once."""

    def __init__(self, source_of: SourceOf) -> None:
        self._source_of = source_of
        self._modules: dict[str, _Module | None] = {}

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            source = self._source_of(name)
            self._modules[name] = None if source is None else _Module(source)
        return self._modules[name]

    def has(self, target: str) -> bool:
        """Whether there is a definition of ``module:qualname``."""
        name, _, qualname = target.partition(":")
        module = self._module(name)
        return module is not None and qualname in module.outline.places

    def node(self, target: str) -> ast.AST | None:
        """The definition of ``module:qualname``, None if there is none."""
        name, _, qualname = target.partition(":")
        module = self._module(name)
        return None if module is None else module.node(qualname)

    def _read(
        self,
        target: str,
        kept: Callable[[_Outline], dict[str, T]],
        read: Callable[[ast.AST], T | None],
    ) -> T | None:
        """What ``read`` says of the definition of ``target``, each asked once in a process; None if there is none."""
        name, _, qualname = target.partition(":")
        module = self._module(name)
        if module is None:
            return None
        known = kept(module.outline)
        if qualname not in known:
            node = module.node(qualname.removesuffix(ALL))
            found = None if node is None else read(node)
            if found is None:
                return None
            known[qualname] = found
        return known[qualname]

    def fingerprint(self, target: str) -> str | None:
        """Of ``module:qualname``, None if there is none; of ``module:Class.*`` that of `methods_of`."""
        read = partial(fingerprint_of, target.partition(":")[2])
        return self._read(target, lambda outline: outline.fingerprints, read)

    def members(self, target: str) -> tuple[str, frozenset[str]] | None:
        """Of the class ``module:qualname``: its bases and what it defines, annotated or not; None if there is none."""

        def read(node: ast.AST) -> _Members | None:
            return _members(node, annotated=True) if isinstance(node, ast.ClassDef) else None

        return self._read(target, lambda outline: outline.members, read)

    def origins(self, module: str, name: str) -> list[tuple[str, str]]:
        """From which modules, and under which names there, a module imports ``name``."""
        read = self._module(module)
        imports = () if read is None else read.outline.imports
        return [(origin, there) for here, origin, there in imports if here == name]

    def mentions(self, target: str, name: str) -> bool:
        """As `uses`, or a parameter or something that it defines is called so."""
        used, defined = self._names(target)
        return name in used or name in defined

    def uses(self, target: str, name: str) -> bool:
        """Whether the definition of ``target`` mentions ``name``."""
        return name in self._names(target)[0]

    def _names(self, target: str) -> _Names:
        """Those in the definition of ``target``."""
        return self._read(target, lambda outline: outline.names, _names_in) or _NO_NAMES


def _names_in(node: ast.AST) -> _Names:
    used, defined = set(), set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            used.add(child.id)
        elif isinstance(child, ast.Attribute):
            used.add(child.attr)
        elif isinstance(child, ast.arg):
            defined.add(child.arg)
        elif isinstance(child, _Definition):
            defined.add(child.name)
    return frozenset(used), frozenset(defined)


def judge(ports: Sequence[Port], release: str | None, definitions: Definitions) -> Verdict:
    """Which of a patch's ports fits the SGLang with these definitions, or why none does.

    The source decides, not the release number: an unknown release with known source is fine, a known
    release with edited source is ``drifted``. The number only words the reason. Where no port fits,
    the verdict is the one that says most: of the port whose source is nearest.
    """
    problem = mistake(ports)
    if problem is not None:
        return Verdict(states.FAILED, problem)
    verdicts = [_judge(port, release, definitions) for port in ports]
    found = min(verdicts, key=lambda verdict: _NEAREST.index(verdict.state))
    if found.state in (states.DRIFTED, states.UNSUPPORTED):
        needless = next((verdict for verdict in verdicts if verdict.port is not None), None)
        if needless is not None:
            return needless
    if found.state in (states.DRIFTED, states.UNSUPPORTED) and len(ports) > 1:
        return found._replace(reason="; ".join([found.reason, *_nearness(ports, definitions)]))
    return found


def _nearness(ports: Sequence[Port], definitions: Definitions) -> list[str]:
    """Which of the lines' ports a port for this source could come from."""
    table, told = known_releases(), []
    for port in ports:
        if port.tells_only or port.needless or not port.written_for:
            continue
        known = table.get(port.written_for[-1], {})
        prints = [(target, definitions.fingerprint(target)) for target in port.sources]
        same = sum(value is not None and value == known.get(target) for target, value in prints)
        told.append(f"{same} of {len(prints)} sources are {port.written_for[-1]}'s")
    return [", ".join(told)] if told else []


def _few(names: Sequence[str]) -> str:
    """Names for a reason that is read in a terminal."""
    told = ", ".join(names[:2])
    return told if len(names) < 3 else f"{told} and {len(names) - 2} more"


_NEAREST = (states.ACTIVE, states.UPSTREAMED, states.FAILED, states.DRIFTED, states.UNSUPPORTED)


def any_there(ports: Iterable[Port], source_of: SourceOf) -> bool:
    """Whether SGLang has every module and every target of one of the ports.

    A module of that name may be another one: what it is waited for is not in it then.
    """
    definitions = Definitions(source_of)
    return any(
        all(source_of(module) is not None for module in port.modules)
        and all(map(definitions.has, port.targets))
        for port in ports
    )


def _judge(port: Port, release: str | None, definitions: Definitions) -> Verdict:
    label = f"SGLang {release}" if release else "this SGLang"
    prints = {target: definitions.fingerprint(target) for target in port.sources}
    if port.needless and None not in prints.values():
        return Verdict(states.UNSUPPORTED, f"{label}: {port.needless}", port)
    table = known_releases()
    candidates = [table[r] for r in port.written_for if r in table]

    def is_source_of(known: dict[str, str]) -> bool:
        return all(value is not None and value == known.get(t) for t, value in prints.items())

    if any(map(is_source_of, candidates)):
        for target, names in port.reads:
            if definitions.fingerprint(target) is None:
                return Verdict(states.UNSUPPORTED, f"{label} has no {target}")
            gone = [name for name in names if not definitions.mentions(target, name)]
            if gone:
                return Verdict(states.DRIFTED, f"{label}: {target} has no {', '.join(gone)}")
        for target, names, bases in port.lacks:
            members = definitions.members(target)
            if members is None:
                return Verdict(states.UNSUPPORTED, f"{label} has no class {target}")
            own = [name for name in names if name in members[1]]
            if own:
                told = f"{label}: {target} has its own {', '.join(own)}"
                return Verdict(states.DRIFTED, told)
            if members[0] != bases:
                told = f"{label}: {target} has other bases: {members[0] or 'none'}"
                return Verdict(states.DRIFTED, told)
        return Verdict(states.ACTIVE, f"written for the source that {label} has", port)
    if port.superseded_when is not None and definitions.uses(*port.superseded_when):
        target, name = port.superseded_when
        if port.finds_defect:
            return Verdict(
                states.UPSTREAMED,
                f"{label} does not have the defect: {target.partition(':')[2]} uses {name}",
            )
        since = f", since {port.superseded_since}" if port.superseded_since else ""
        return Verdict(states.UPSTREAMED, f"{label} has it itself: {name}{since}")
    missing = [target for target, value in prints.items() if value is None]
    nowhere = [t for t in missing if not any(t in known for known in table.values())]
    if nowhere:  # only of a patch that looks for a defect: of the others it is a mistake
        return Verdict(
            states.FAILED, f"misspelt: neither {label} nor any known one has {nowhere[0]}"
        )
    if missing:
        return Verdict(states.UNSUPPORTED, f"{label} has no {_few(missing)}")
    if port.finds_defect:
        return Verdict(states.ACTIVE, "looks for the defect in the source at hand", port)
    if any(map(is_source_of, table.values())):
        return Verdict(
            states.UNSUPPORTED, f"written for {', '.join(port.written_for)}, not for {label}"
        )
    unrecorded = [
        _unrecorded(target, written, table)
        for written in port.written_for
        for target in prints
        if target not in table.get(written, {})
    ]
    if unrecorded:  # the source may well be the one that the patch was written for
        return Verdict(states.FAILED, unrecorded[0])
    unknown = [t for t in prints if not any(prints[t] == known.get(t) for known in candidates)]
    what = _few(unknown) if unknown else f"a mix of {_few(list(prints))}"
    return Verdict(
        states.DRIFTED, f"{label}: source of {what} is not that of {', '.join(port.written_for)}"
    )


def mistake(ports: Sequence[Port]) -> str | None:
    """What is wrong with a patch's ports, or with the tables they need, whatever SGLang is there."""
    if not ports:
        return "the patch has no port: no sources.py names it"
    try:
        table = known_releases()
    except Exception as error:  # unreadable, no JSON, or not of this shape
        return f"{FOLDER} cannot be used: {type(error).__name__}: {error}"
    return next(filter(None, (_mistake(port, table) for port in ports)), None)


def _mistake(port: Port, table: dict[str, dict[str, str]]) -> str | None:
    read = tuple(target for target, _ in port.reads)
    holding = {target.partition(":")[0] for target in port.sources + read}
    if not port.sources:
        return "the patch names no target"
    for module in port.lazy:
        if module not in holding:
            return f"lazy names a module that holds none of the patch's sources: {module}"
    if port.needless or port.tells_only:
        if port.module:
            return (
                f"there is no code to find in {port.module}: needless and tells_only name no module"
            )
        told = port.needless or port.superseded_when
        return None if told else "tells_only without superseded_when tells nothing"
    if not port.module:
        return "the port names no module with its code"
    if port.finds_defect:
        return None  # fingerprints do not decide
    if not port.written_for:
        return "written_for names no release, and the patch does not look for a defect"
    for target in port.sources:
        if not any(target in known for known in table.values()):
            unrecorded = _unrecorded(target, port.written_for[-1], table)
            return f"{unrecorded}, or the name is misspelt"
    return None


def _unrecorded(target: str, release: str, table: dict[str, dict[str, str]]) -> str:
    if release in table:
        return f"{FOLDER}/{release}.json has no fingerprint of {target}: {RECORD}"
    return f"there is no {FOLDER}/{release}.json: {RECORD}"


def record_release(source_of: SourceOf, ports: Iterable[Port]) -> dict[str, str]:
    """Fingerprints of everything that the ports name, for ``fingerprints/<release>.json``."""
    definitions = Definitions(source_of)
    targets = sorted({target for port in ports for target in port.sources})
    prints = {target: definitions.fingerprint(target) for target in targets}
    return {target: value for target, value in prints.items() if value is not None}


def imported_source(module: str) -> str | None:
    """Source of an imported module, from the very file that it was loaded from.

    Of one that is not imported yet: from the file that it would be loaded from.
    """
    loaded = sys.modules.get(module)
    if loaded is None:
        return installed_source(module)
    path = getattr(loaded, "__file__", None)
    return file_source(path) if path else None


def release_key(release: str) -> tuple[int, ...]:
    """For sorting; what is no number counts as nothing."""
    return tuple(int(part) for part in re.findall(r"\d+", release))
