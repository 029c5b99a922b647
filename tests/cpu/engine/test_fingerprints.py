"""What changes a fingerprint, and what does not."""

from __future__ import annotations

import ast
import gc
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gemma4_turbo.engine import fingerprints, states
from gemma4_turbo.engine.fingerprints import Definitions, find_definition, fingerprint, judge
from gemma4_turbo.engine.port import Lacks
from tests.cpu.synthetic import LEAF, RELEASE, World, record, returning

STOCK = '''\
@decorate(1)
def route(self, logits: Tensor, topk: int = 8, *, scale: float = 1.0) -> Tensor:
    """Top-k, then softmax."""
    # renormalised below
    weights = softmax(logits[:, :topk], dim=-1)
    if self.scaled and topk > 1:
        weights = weights * scale
    for name in ("a", b"b"):
        self.seen[name] += 1
    return weights
'''


def of(source: str, qualname: str = "route") -> str:
    """The fingerprint of a definition in ``source``."""
    node = find_definition(ast.parse(source), qualname)
    assert node is not None
    return fingerprint(node)


def edited(old: str, new: str) -> str:
    """Stock's source with one place changed."""
    assert STOCK.count(old) == 1
    return STOCK.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    # renormalised below\n", ""),
        ("    # renormalised below\n", "    # weights = 0\n\n\n"),
        (
            "weights = softmax(logits[:, :topk], dim=-1)",
            "weights = (softmax(logits[:,:topk],\n        dim=-1))",
        ),
        ('"""Top-k, then softmax."""', '"""Something else."""'),
        ('    """Top-k, then softmax."""\n', ""),
        ("    return weights", "    return weights  # done"),
        ('("a", b"b")', "('a', b'b')"),
        ("def route(self,", "def route(\n    self,\n   "),
    ],
)
def test_comments_layout_and_docstrings_do_not_count(old: str, new: str) -> None:
    """What a formatter or a writer of comments may change."""
    assert of(edited(old, new)) == of(STOCK)


def test_the_place_in_the_file_does_not_count() -> None:
    """Further down, and below an ``if``."""
    assert of("import x\n\n\n" + STOCK) == of(STOCK)
    assert of("if FLAG:\n" + textwrap.indent(STOCK, "    ")) == of(STOCK)
    assert of("try:\n" + textwrap.indent(STOCK, "    ") + "except E:\n    pass\n") == of(STOCK)


def test_a_fallback_definition_is_found() -> None:
    """``except ImportError:`` is where modules define what an optional package lacks."""
    fallback = "try:\n    import x\nexcept ImportError:\n" + textwrap.indent(STOCK, "    ")
    assert of(fallback) == of(STOCK)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dim=-1", "dim=1"),
        ("dim=-1", "dim=-1.0"),
        ("dim=-1", "axis=-1"),
        ("topk > 1", "topk >= 1"),
        ("self.scaled and", "self.scaled or"),
        ("weights = weights * scale", "weights *= scale"),
        ("weights = weights * scale", "weights = scale * weights"),
        ("weights = weights * scale", "pass"),
        ("[:, :topk]", "[:, topk:]"),
        ("topk: int = 8", "topk: int = 4"),
        ("topk: int = 8", "topk: int"),
        ("scale: float = 1.0", "scale: float = 1"),
        ("logits: Tensor", "logits"),
        ("*, scale", "scale"),
        (") -> Tensor", ")"),
        ("@decorate(1)\n", ""),
        ("@decorate(1)", "@decorate(2)"),
        ("def route", "async def route"),
        ('b"b"', '"b"'),
        ('"a"', '"A"'),
        ("    return weights", "    return (weights,)"),
        ("    return weights", "    return weights\n    return None"),
        ("    # renormalised below\n", '    "a string, but not the first"\n'),
        ("self.seen[name] += 1", "self.seen[name] -= 1"),
    ],
)
def test_every_change_of_the_code_counts(old: str, new: str) -> None:
    """Operators, constants and their types, order, signature, decorators, statements."""
    assert of(edited(old, new)) != of(STOCK)


def test_a_fingerprint_is_the_same_for_every_python() -> None:
    """Written down once, under Python 3.11: an equal value elsewhere keeps the tables valid."""
    assert of("def route(x: int) -> list[str]:\n    return [f'{x!r:>{4}}']\n") == "0ad244a71f4408fd"


CLASS = """\
class B(A, metaclass=M):
    \'\'\'Text.\'\'\'
    field: int = 3
    if FLAG:
        def g(self): return 1
    def f(self): return 2
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("return 1", "return 3", True),
        ("    field: int = 3\n", "", True),
        ("'''Text.'''", "pass", True),
        ("def f(self): return 2", "async def f(self, x): return 2", True),
        ("return 2", "return 2\n    def h(self): return 3", False),
        ("return 2", "return 2\n    h = C.h", False),
        ("return 2", "return 2\n    h, k = C.h, None", False),
        ("    def f(self): return 2\n", "", False),
        ("B(A,", "B(C, A,", False),
        ("=M", "=N", False),
    ],
)
def test_what_a_class_defines_by_name(old: str, new: str, same: bool) -> None:
    """What hides a base's method counts, and the bases; bodies and fields do not."""
    assert CLASS.count(old) == 1
    before, after = (
        Definitions({"m": source}.get).fingerprint("m:B.*")
        for source in (CLASS, CLASS.replace(old, new))
    )
    assert (before == after) is same
    assert before not in (None, Definitions({"m": CLASS}.get).fingerprint("m:B"))
    assert Definitions({"m": CLASS}.get).fingerprint("m:C.*") is None


def test_find_definition() -> None:
    """The last definition counts, as at run time; nothing is found inside functions."""
    tree = ast.parse("def f(): return 1\ndef f(): return 2\nclass A:\n    def g(self): pass\n")
    second = find_definition(tree, "f")
    assert isinstance(second, ast.FunctionDef)
    assert second.lineno == 2
    assert isinstance(find_definition(tree, "A.g"), ast.FunctionDef)
    assert isinstance(find_definition(tree, "A"), ast.ClassDef)
    for missing in ("g", "A.f", "B.g", "f.g"):
        assert find_definition(tree, missing) is None
    assert find_definition(ast.parse("def f():\n    def g(): pass"), "g") is None


def test_sources_of_a_folder_and_of_a_wheel_agree(tmp_path: Path) -> None:
    """Modules and packages, present and absent."""
    files = {"pkg/__init__.py": "a = 1\n", "pkg/leaf.py": LEAF, "pkg/sub/__init__.py": "b = 2\n"}
    with zipfile.ZipFile(tmp_path / "pkg-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
            archive.writestr(name, text)
    folder = fingerprints.folder_source(tmp_path)
    wheel = fingerprints.wheel_source(tmp_path / "pkg-1.0-py3-none-any.whl")
    for module in ("pkg", "pkg.leaf", "pkg.sub", "pkg.absent", "absent"):
        assert folder(module) == wheel(module)
    assert folder("pkg.leaf") == LEAF
    assert folder("pkg.absent") is None


def test_definitions_use() -> None:
    """Names and attributes, in the definition and nowhere else."""
    source = "def f():\n    return new(a.attr)\n\n\ndef g():\n    return other\n"
    definitions = Definitions(lambda module: source if module == "m" else None)
    assert definitions.uses("m:f", "new")
    assert definitions.uses("m:f", "attr")
    assert not definitions.uses("m:f", "other")
    assert not definitions.uses("m:absent", "new")
    assert not definitions.uses("absent:f", "new")
    assert definitions.fingerprint("absent:f") is None


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is parsed from here on."""
    texts: list[str] = []

    def parse(text: str, *rest: Any, **options: Any) -> ast.AST:
        texts.append(text)
        return real(text, *rest, **options)

    real = ast.parse
    monkeypatch.setattr(ast, "parse", parse)
    return texts


LAYOUTS = '''\
import this
if True:
    @one
    @two(
        3)
    def below(x): return """
no indentation
"""
else:
    def below(x): return 2
class Tabs:
\tif True:
\t\tasync def method(self): pass; return 1
class Outer:
    """Text."""
    def method(self):
        def inner():
            pass
    @(
        wrapped
    )
    def apart(self): pass
    @\\
    continued
    def after_a_backslash(self): pass

\x0cdef after_a_form_feed(): pass
try:
    class Outer2: pass
except E:
    def excepted(): pass
with a as b: pass
def last(): return 1'''


def same_place(source: str) -> set[str]:
    """The names of all definitions, each cut out as it is in the whole tree."""
    definitions, tree = Definitions(lambda module: source), ast.parse(source)
    names = set(fingerprints._outline(source).places)
    for name in names:
        whole: Any = find_definition(tree, name)
        node: Any = definitions.node(f"m:{name}")
        shown = ast.dump(node, include_attributes=True)
        assert shown == ast.dump(whole, include_attributes=True), name
        assert definitions.fingerprint(f"m:{name}") == fingerprint(whole)
    return names


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_definition_is_cut_out_whatever_the_layout(end: str, parsed: list[str]) -> None:
    """Indented by tabs or not, decorated over several lines, the last of two of its name."""
    source = LAYOUTS.replace("\n", end)
    fingerprints._outlines.clear()
    names = (
        "below Tabs Tabs.method Outer Outer.method Outer.method.inner Outer.apart "
        "Outer.after_a_backslash after_a_form_feed Outer2 excepted last"
    )
    assert same_place(source) == set(names.split())
    # By the test, for the outline, and for two that cannot be cut out, each as node and fingerprint.
    assert parsed.count(source) == 1 + 1 + 2 * 2


@pytest.mark.parametrize("module", ["models.gemma4_mm", "models.gemma4_causal", "layers.layernorm"])
def test_a_definition_of_sglangs_is_cut_out(module: str, parsed: list[str]) -> None:
    """All of them, so that none needs the whole source again."""
    source = fingerprints.installed_source(f"sglang.srt.{module}")
    assert source is not None
    fingerprints._outlines.clear()
    assert len(same_place(source)) > 10
    assert parsed.count(source) == 1 + 1  # by the test, and for the outline


def test_where_a_name_is_imported_from() -> None:
    """At any depth of statements; relative imports and plain ones do not count."""
    source = (
        "from a import x\nimport x\nfrom . import x\nfrom .b import x\n"
        "class A:\n    def f(self):\n        for i in j:\n            from c import y as x\n"
        "match z:\n    case 1:\n        from d import x\n"
        "try:\n    pass\nexcept E:\n    from e import x\nelse:\n    from f import x\n"
        "finally:\n    from g import x, y\n"
    )
    definitions = Definitions(lambda module: source if module == "m" else None)
    assert sorted(definitions.origins("m", "x")) == [
        *[("a", "x"), ("c", "y"), ("d", "x"), ("e", "x"), ("f", "x"), ("g", "x")]
    ]
    assert definitions.origins("m", "y") == [("g", "y")]
    assert definitions.origins("absent", "x") == []


def test_patches_of_the_same_source_parse_it_once(world: World, parsed: list[str]) -> None:
    """And keep no tree of it; installing them again parses no source as a whole."""
    names = ("answer", "Model.forward", "Model.name")
    patches = [
        (record(f"of_{i}", world.target(name)), returning(0)) for i, name in enumerate(names)
    ]
    engine = world.engine(*patches)
    source = (world.root / world.package / "leaf.py").read_text()
    world.write("leaf", f"{source}\n# {world.package}: no other test has parsed this")
    gc.collect()
    trees = _statements()
    engine.apply()
    world.imported()
    assert {row.state for row in engine.status()} == {states.ACTIVE}
    assert sum("no other test" in text for text in parsed) == 1
    engine.revert()
    engine.apply()
    assert {row.state for row in engine.status()} == {states.ACTIVE}
    assert sum("no other test" in text for text in parsed) == 1
    gc.collect()
    assert _statements() == trees


def _statements() -> int:
    return sum(issubclass(type(found), ast.stmt) for found in gc.get_objects())


def test_a_source_that_changed_is_read_again(world: World, parsed: list[str]) -> None:
    """Between two looks; within one it is as it was at first. What is known is not parsed again."""
    source = fingerprints.folder_source(world.root)
    target = world.target("answer")
    once = Definitions(source)
    before = once.fingerprint(target)
    world.edit("x * 2", "x * 4")
    assert once.fingerprint(target) == before
    after = Definitions(source).fingerprint(target)
    assert after != before
    world.edit("x * 4", "x * 2")
    parsed.clear()
    assert Definitions(source).fingerprint(target) == before
    assert parsed == []


def test_a_mix_of_two_releases_is_drifted(world: World) -> None:
    """Each source is known, but not the two together."""
    target, basis = world.target("answer"), world.target("Model.forward")
    ports = record("one", target, relies_on=(basis,), written_for=("1.0", "2.0")).ports
    source = fingerprints.folder_source(world.root)
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    world.edit("x * 2", "x * 4")
    world.edit("x + 1", "x + 4")
    world.table["2.0"] = fingerprints.record_release(source, ports)
    assert judge(ports, "2.0", Definitions(source)).state == states.ACTIVE
    world.edit("x + 4", "x + 1")
    verdict = judge(ports, "2.0", Definitions(source))
    assert verdict.state == states.DRIFTED
    assert f"a mix of {target}, {basis}" in verdict.reason


def test_a_release_that_the_patch_was_not_written_for_does_not_count(world: World) -> None:
    """Knowing a release's fingerprint is not the same as having been written for it."""
    ports = record("one", world.target("answer"), written_for=("0.9",)).ports
    source = fingerprints.folder_source(world.root)
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    verdict = judge(ports, RELEASE, Definitions(source))
    assert verdict.state == states.UNSUPPORTED
    assert verdict.reason == f"written for 0.9, not for SGLang {RELEASE}"


def test_of_two_lines_it_is_told_which_is_nearer(world: World) -> None:
    """A port for a release between them begins with the one or the other."""
    target, basis = world.target("answer"), world.target("Model.forward")
    source = fingerprints.folder_source(world.root)
    ports = [
        record("one", target, relies_on=(basis,), written_for=(release,)).ports[0]
        for release in ("2.0", RELEASE)
    ]
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    world.edit("x * 2", "x * 4")
    world.edit("x + 1", "x + 4")
    world.table["2.0"] = fingerprints.record_release(source, ports)
    assert judge(ports, "2.0", Definitions(source)).reason.startswith("written for")
    world.edit("x + 4", "x + 5")
    verdict = judge(ports, "1.5", Definitions(source))
    assert verdict.state == states.DRIFTED
    assert verdict.reason.endswith("; 1 of 2 sources are 2.0's, 0 of 2 sources are 1.0's")
    assert "sources are" not in judge(ports[:1], "1.5", Definitions(source)).reason


def test_reasons_name_few_of_many(world: World) -> None:
    """They are read in a terminal."""
    names = ("answer", "Model.forward", "Model.scale", "Model.name")
    targets = [world.target(name) for name in names]
    ports = record("one", targets[0], relies_on=tuple(targets[1:])).ports
    source = fingerprints.folder_source(world.root)
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    verdict = judge(ports, RELEASE, Definitions(lambda module: ""))
    assert verdict.state == states.UNSUPPORTED
    assert verdict.reason.endswith(f"has no {targets[0]}, {targets[1]} and 2 more")


def test_what_is_only_read_may_change_but_for_the_names_that_are_read(world: World) -> None:
    """A contract on names instead of a fingerprint; the target's own fingerprint stays."""
    read = ((world.target("Model"), ("forward", "x")),)
    ports = record("one", world.target("answer"), reads=read).ports
    source = fingerprints.folder_source(world.root)
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    assert world.target("Model") not in world.table[RELEASE]
    assert judge(ports, RELEASE, Definitions(source)).port is ports[0]
    world.edit("x + 1", "x + 4")
    assert judge(ports, RELEASE, Definitions(source)).state == states.ACTIVE
    world.edit("def forward", "def forwards")
    verdict = judge(ports, RELEASE, Definitions(source))
    assert verdict.state == states.DRIFTED
    assert verdict.reason.endswith(f"{world.target('Model')} has no forward")
    world.edit("class Model", "class Modell")
    verdict = judge(ports, RELEASE, Definitions(source))
    assert verdict.state == states.UNSUPPORTED
    assert world.target("Model") in verdict.reason
    world.edit("x * 2", "x * 4")
    assert judge(ports, RELEASE, Definitions(source)).state == states.DRIFTED


def test_a_class_may_define_more_but_not_what_its_base_is_relied_on_for(world: World) -> None:
    lacks = (Lacks(world.target("Model"), ("load", "run"), ""),)
    ports = record("one", world.target("answer"), lacks=lacks).ports
    source = fingerprints.folder_source(world.root)
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    assert judge(ports, RELEASE, Definitions(source)).state == states.ACTIVE
    world.edit("    def forward", "    def loads(self): ...\n\n    def forward")
    assert judge(ports, RELEASE, Definitions(source)).state == states.ACTIVE
    world.edit("    def loads", "    def load")
    verdict = judge(ports, RELEASE, Definitions(source))
    assert verdict.state == states.DRIFTED
    assert verdict.reason.endswith(f"{world.target('Model')} has its own load")
    world.edit("    def load(self): ...", "    load = len")  # by another name
    assert judge(ports, RELEASE, Definitions(source)) == verdict
    for field in ("load: object = len", "load: object"):  # the latter is a field of a dataclass
        world.edit("    load = len", f"    {field}")
        assert judge(ports, RELEASE, Definitions(source)) == verdict, field
        world.edit(f"    {field}", "    load = len")
    world.edit("    load = len", "    other: int = 1")
    assert judge(ports, RELEASE, Definitions(source)).state == states.ACTIVE
    world.edit("class Model", "class Modell")
    verdict = judge(ports, RELEASE, Definitions(source))
    assert verdict.state == states.UNSUPPORTED
    assert verdict.reason.endswith(f"has no class {world.target('Model')}")


def test_another_base_may_define_what_a_class_does_not(world: World) -> None:
    lacks = (Lacks(world.target("Model"), ("load",), ""),)
    ports = record("one", world.target("answer"), lacks=lacks).ports
    source = fingerprints.folder_source(world.root)
    world.table[RELEASE] = fingerprints.record_release(source, ports)
    world.edit("class Model:", "class Model(dict):")
    verdict = judge(ports, RELEASE, Definitions(source))
    assert verdict.state == states.DRIFTED
    assert verdict.reason.endswith(f"{world.target('Model')} has other bases: dict")


def test_the_port_whose_source_is_there_is_chosen(world: World) -> None:
    """Of two release lines, whichever comes first; neither: the verdict of the nearer one."""
    old = record("one", world.target("answer"), written_for=("0.9",)).ports[0]
    new = record("one", world.target("answer"), module="new", written_for=("1.0",)).ports[0]
    elsewhere = record("one", world.target("nowhere"), written_for=("0.9",)).ports[0]
    source = fingerprints.folder_source(world.root)
    world.table["0.9"] = {world.target("answer"): "0" * 16, world.target("nowhere"): "0" * 16}
    world.table["1.0"] = fingerprints.record_release(source, [new])
    for ports in ((old, new), (new, old), (elsewhere, new)):
        assert judge(ports, RELEASE, Definitions(source)).port is new
    world.edit("x * 2", "x * 4")
    for ports in ((elsewhere, new), (new, elsewhere)):
        verdict = judge(ports, RELEASE, Definitions(source))
        assert verdict.state == states.DRIFTED
        assert verdict.port is None
