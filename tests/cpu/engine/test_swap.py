"""Replacing an attribute and putting the very same object back."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import wrapt

from gemma4_turbo.engine import fingerprints
from gemma4_turbo.engine.swap import NotStockError, Swap
from tests.cpu.synthetic import World


def first_line(world: World, target: str) -> int:
    """Where the source on disk defines the target."""
    node: Any = fingerprints.Definitions(fingerprints.folder_source(world.root)).node(target)
    assert node is not None
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


@pytest.mark.parametrize(
    ("qualname", "kind"),
    [
        ("Model.forward", types.FunctionType),
        ("Model.scale", staticmethod),
        ("Model.name", classmethod),
    ],
)
def test_a_class_s_attribute_comes_back_as_the_very_same_object(
    world: World, qualname: str, kind: type
) -> None:
    """The raw ``__dict__`` value, not what attribute access makes of it."""
    model = world.imported().Model
    name = qualname.rpartition(".")[2]
    stock = vars(model)[name]
    assert type(stock) is kind
    swap = Swap(world.target(qualname))
    swap.install(lambda *args: "replaced")
    assert type(vars(model)[name]) is kind
    assert getattr(model(), name)(*([1] if qualname != "Model.name" else [])) == "replaced"
    assert swap.in_place
    assert swap.restore()
    assert vars(model)[name] is stock
    assert not swap.in_place


def test_a_static_method_s_replacement_gets_no_self(world: World) -> None:
    """The wrapper that the class had is kept."""
    model = world.imported().Model
    swap = Swap(world.target("Model.scale"))
    swap.install(lambda x: ("ours", x))
    assert model.scale(3) == model().scale(3) == ("ours", 3)
    assert swap.function(3) == 30


def test_an_inherited_attribute_is_refused(world: World) -> None:
    """Setting it on the subclass would hide the parent's from then on."""
    world.imported().Child = type("Child", (world.imported().Model,), {})
    with pytest.raises(AttributeError, match=r"Child\.forward is inherited"):
        Swap(world.target("Child.forward"))


def test_a_missing_attribute_is_refused(world: World) -> None:
    """There is nothing to replace."""
    world.imported()
    with pytest.raises(AttributeError):
        Swap(world.target("Model.backward"))


def test_restore_leaves_alone_what_another_put_there(world: World) -> None:
    """False, and nothing done."""
    leaf = world.imported()
    swap = Swap(world.target("answer"))
    swap.install(lambda x: -x)
    leaf.answer = theirs = lambda x: "theirs"
    assert not swap.in_place
    assert not swap.restore()
    assert leaf.answer is theirs


def test_aliases_follow_on_install_and_on_restore(world: World) -> None:
    """``from leaf import answer``, before and after the swap."""
    world.write(
        "early", f"from {world.leaf} import answer\nfrom {world.leaf} import answer as other"
    )
    world.write("late", f"from {world.leaf} import answer")
    leaf, early = world.imported(), world.imported("early")
    stock = leaf.answer
    swap = Swap(world.target("answer"))
    swap.install(replacement := lambda x: -x)
    late = world.imported("late")
    assert early.answer is early.other is late.answer is replacement
    early.other = theirs = lambda x: "theirs"
    assert swap.restore()
    assert leaf.answer is early.answer is late.answer is stock
    assert early.other is theirs


@pytest.mark.parametrize("name", ["trace", "cuda.users"])
def test_a_user_s_module_may_have_a_library_s_name(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies where no library does; in a namespace it may lie beside one."""
    spec: Any = importlib.util.spec_from_file_location(
        name, world.write("users", f"from {world.leaf} import answer")
    )
    users = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, users)
    spec.loader.exec_module(users)
    stock = world.imported().answer
    swap = Swap(world.target("answer"))
    swap.install(replacement := lambda x: -x)
    assert users.answer is replacement
    assert swap.restore()
    assert users.answer is stock


def test_a_module_that_is_yet_to_be_loaded_is_not_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds no name yet, and its load may fail."""
    path = world.write("later", f"from {world.leaf} import answer\nanswer(1) == 2 or 1 / 0")
    spec: Any = importlib.util.spec_from_file_location(f"{world.package}.later", path)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    later = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, later)
    spec.loader.exec_module(later)
    world.imported()
    swap = Swap(world.target("answer"))
    swap.install(lambda x: -x)
    assert swap.restore()
    assert later.answer(1) == 2


def test_a_holder_that_refuses_ours_leaves_stock_everywhere(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes out again what did not go in."""

    class Sealed(types.ModuleType):
        def __setattr__(self, name: str, value: object) -> None:
            raise TypeError("sealed")

    module = world.imported()
    stock = module.answer
    others = [types.ModuleType("before"), Sealed("sealed"), types.ModuleType("behind")]
    for other in others:
        vars(other)["answer"] = stock
        monkeypatch.setitem(sys.modules, other.__name__, other)
    swap = Swap(world.target("answer"))
    with pytest.raises(TypeError, match="sealed"):
        swap.install(lambda x: "ours")
    assert module.answer is stock
    assert [vars(other)["answer"] for other in others] == [stock] * 3
    assert not swap.in_place
    monkeypatch.delitem(sys.modules, "sealed")
    swap.install(lambda x: "ours")
    assert module.answer(1) == "ours"
    assert swap.restore()
    assert module.answer is stock


def test_a_second_name_in_the_same_module_follows_too(world: World) -> None:
    """``old_name = answer`` below the definition is an alias like any other."""
    world.write("leaf", (world.root / world.package / "leaf.py").read_text() + "\nold = answer\n")
    leaf = world.imported()
    stock = leaf.answer
    swap = Swap(world.target("answer"))
    swap.install(replacement := lambda x: -x)
    assert leaf.old is replacement
    assert swap.restore()
    assert leaf.old is leaf.answer is stock


@pytest.mark.parametrize("qualname", ["answer", "Model.forward", "Model.scale", "Model.name"])
def test_stock_s_own_function_is_recognised(world: World, qualname: str) -> None:
    """Decorators such as staticmethod count into its first line."""
    world.imported()
    target = world.target(qualname)
    Swap(target).require_stock(first_line(world, target))


def _elsewhere(x: int) -> int:
    return x


@pytest.mark.parametrize(
    ("replace", "told"),
    [
        (lambda stock: _elsewhere, r"replaced before us by the function at .*test_swap\.py:\d+"),
        (lambda stock: wrapt.FunctionWrapper(stock, lambda w, i, a, k: w(*a, **k)), "not stock's"),
        (lambda stock: print, "not stock's function"),
    ],
)
def test_another_s_replacement_is_told(
    world: World, replace: Callable[[Any], Any], told: str
) -> None:
    """A function from elsewhere, a proxy that claims to be stock's, a builtin."""
    leaf = world.imported()
    target = world.target("answer")
    leaf.answer = replace(leaf.answer)
    with pytest.raises(NotStockError, match=told):
        Swap(target).require_stock(first_line(world, target))


def test_another_function_of_the_same_file_is_not_stock_s(world: World) -> None:
    """The line decides."""
    leaf = world.imported()
    leaf.answer = leaf.Model.scale
    target = world.target("answer")
    with pytest.raises(NotStockError, match="replaced before us"):
        Swap(target).require_stock(first_line(world, target))


# -- torch.compile ------------------------------------------------------------------------------

TRACED = """\
import torch


def inner(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def model(x: torch.Tensor) -> torch.Tensor:
    return inner(x) + 1
"""


@pytest.fixture
def dynamo() -> Iterator[Any]:
    """Dynamo with empty caches and counters."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo
    torch._dynamo.reset()


def test_dynamo_traces_a_swapped_plain_function(world: World, dynamo: Any) -> None:
    """With ``fullgraph=True`` the replacement is in the compiled code, without a graph break."""
    world.write("traced", TRACED)
    module = world.imported("traced")

    def inner(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + 100

    x = torch.arange(4.0)
    swap = Swap(world.target("inner", "traced"))
    swap.install(inner)
    compiled = torch.compile(module.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), x * 2 + 101)
    assert not dynamo.utils.counters["graph_break"]
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1

    assert swap.restore()
    torch.testing.assert_close(compiled(x), x * 2 + 1)  # its guard saw the function change
    assert not dynamo.utils.counters["graph_break"]


def test_contrast_dynamo_traces_past_a_wrapt_proxy(world: World, dynamo: Any) -> None:
    """Why traced code gets plain functions: compiled, the proxy's wrapper silently does not run.

    If this fails after an upgrade of torch or wrapt, the rule may be relaxed.
    """
    world.write("traced", TRACED)
    module = world.imported("traced")

    def add_100(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs) + 100

    x = torch.arange(4.0)
    module.inner = wrapt.FunctionWrapper(module.inner, add_100)
    torch.testing.assert_close(module.model(x), x * 2 + 101)
    compiled = torch.compile(module.model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), x * 2 + 1)
    assert not dynamo.utils.counters["graph_break"]


def test_the_stand_in_leaves_no_module_behind(world: World) -> None:
    """The tests of this file do not see each other's packages."""
    assert [name for name in sys.modules if name.startswith("standin")] == []
