"""Triton's interpreter without the work that it throws away: the same numbers, in much less time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

RELEASES = ("3.6.0", "3.8.0")  # whose interpreter it was read in; another one is left as it is
_swaps: list[tuple[Any, str, Any, Any]] = []  # owner, name, stock's and ours


def quicken() -> None:
    """Change what Python works out around the arrays, and no array."""
    import triton
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if _swaps:
        return  # ours is no base to change again
    if triton.__version__ not in RELEASES or builder.options.debug:
        return
    # Each sum of integers is made again in 64 bits, for an assertion that is on with `debug` only.
    _swap(builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
    _patch_the_language_by_heart(interpreter)
    _remember_types(interpreter)


def _swap(owner: Any, name: str, ours: Any) -> None:
    _swaps.append((owner, name, getattr(owner, name), ours))
    setattr(owner, name, ours)


@contextlib.contextmanager
def as_triton_has_it() -> Iterator[None]:
    """Stock's interpreter, slow as it is."""
    for owner, name, stock, _ in _swaps:
        setattr(owner, name, stock)
    yield
    for owner, name, _, ours in _swaps:
        setattr(owner, name, ours)


def _patch_the_language_by_heart(interpreter: Any) -> None:
    """Stock looks through all names of the language at each launch, and at each call inside of it."""
    import triton.language as tl

    stock = interpreter._patch_lang
    changes: list[tuple[Any, str, Any]] = []
    opened: list[Any] = []

    class Scope:
        """Stock's changes; only the outermost scope makes them and takes them back."""

        def __init__(self) -> None:
            self.kept: list[tuple[Any, str, Any]] = []
            if not opened:
                for thing, name, value in changes:
                    self.kept.append((thing, name, getattr(thing, name, interpreter._MISSING)))
                    setattr(thing, name, value)
            opened.append(self)

        def restore(self) -> None:
            opened.remove(self)
            for thing, name, value in reversed(self.kept):
                if value is interpreter._MISSING:
                    delattr(thing, name)
                else:
                    setattr(thing, name, value)

    def patch_lang(fn: Any) -> Scope:
        if not changes:
            everything = {"tl": tl, "core": tl.core}
            scope = stock(SimpleNamespace(__globals__=everything))
            names = dict.fromkeys((id(thing), name) for thing, name, _ in scope._changes)
            things = {id(thing): thing for thing, _, _ in scope._changes}
            for number, name in names:
                value = inspect.getattr_static(things[number], name)
                changes.append((things[number], name, value))
            scope.restore()
        return Scope()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error
        finally:
            scope.restore()

    _swap(interpreter, "_patch_lang", patch_lang)
    _swap(interpreter.InterpretedFunction, "__call__", call)


def _remember_types(interpreter: Any) -> None:
    """Stock makes the type of an array, and the tuples of its shape, anew for each result."""
    import triton.language as tl

    core = tl.core
    block_init, np_dtype = core.block_type.__init__, interpreter._get_np_dtype
    blocks: dict[Any, tuple[Any, int, str]] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    dtypes: dict[str, Any] = {}
    integers = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = element_ty.name, sizes
        if key not in blocks or any(type(size) is not int for size in sizes):
            block_init(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in shapes:
            count = 1
            for size in sizes:
                count *= size
            shapes[sizes] = core.constexpr(count), core.tuple([core.constexpr(s) for s in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shapes[sizes]

    def get_np_dtype(tt_dtype: Any) -> Any:
        name = tt_dtype.name
        if name not in dtypes:
            dtypes[name] = np_dtype(tt_dtype)
        return dtypes[name]

    _swap(core.block_type, "__init__", init_block)
    _swap(core.tensor, "__init__", init_tensor)
    _swap(core.dtype, "is_int", lambda self: self.name in integers)
    _swap(interpreter, "_get_np_dtype", get_np_dtype)
