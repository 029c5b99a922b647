"""Triton's interpreter without the work that it throws away: the same numbers, in much less time."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

RELEASES = ("3.6.0", "3.8.0")  # whose interpreter it was read in; another one is left as it is
MOST_KEPT = 4096  # elements of a number that is kept as a block
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
    _see_what_is_alike(interpreter)
    _shift_bfloat16(interpreter)


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

    stock, core = interpreter._patch_lang, tl.core
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

    def direct(value: Any) -> Any:
        """Stock's own function with the interpreter's semantics; its wrappers look for them each time."""
        member = (getattr(value, "__kwdefaults__", None) or {}).get("member")
        if not (core.is_builtin(member) and hasattr(member, "__wrapped__")):
            return value
        inner, semantic = member.__wrapped__, interpreter.interpreter_semantic

        def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
            return inner(*args, _semantic=semantic, **kwargs)

        return call

    def patch_lang(fn: Any) -> Scope:
        if not changes:
            everything = {"tl": tl, "core": tl.core}
            scope = stock(SimpleNamespace(__globals__=everything))
            names = dict.fromkeys((id(thing), name) for thing, name, _ in scope._changes)
            things = {id(thing): thing for thing, _, _ in scope._changes}
            for number, name in names:
                value = inspect.getattr_static(things[number], name)
                changes.append((things[number], name, direct(value)))
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
        sizes = tuple([getattr(size, "value", size) for size in shape])
        key = element_ty.name, sizes
        known = blocks.get(key)
        if known is None or [size for size in sizes if type(size) is not int]:
            block_init(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known

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


def _see_what_is_alike(interpreter: Any) -> None:
    """Operands of one type need neither a common type nor a common shape; a handle is checked once."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    core = tl.core
    check, broadcast = (
        TritonSemantic.binary_op_type_checking_impl,
        TritonSemantic.broadcast_impl_value,
    )
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    never_widened = frozenset(("fp32", "fp64", "int1", "int32", "int64"))
    plain = never_widened | {"fp16", "bf16"}  # which are divided as fp32
    holders = (core.constexpr, core.tuple, list, tuple)  # of what is to be unwrapped
    holds: dict[type, bool] = {}

    numbers: dict[Any, Any] = {}  # by the other operand's type: as a block, which nobody writes to

    def binary_op_type_checking(self: Any, lhs: Any, rhs: Any, *how: Any, **more: Any) -> Any:
        left, right = type(lhs), type(rhs)
        if left is right is core.tensor:
            if lhs.type.name == rhs.type.name:
                divides = len(how) > 3 or "div_or_mod" in more
                if lhs.dtype.name in (never_widened if divides else plain):
                    return lhs, rhs
        elif right in (int, float) and left is core.tensor:
            key = lhs.type.name, right, rhs, how, *more.items()
            if key in numbers:
                return lhs, numbers[key]
            one, other = check(self, lhs, rhs, *how, **more)
            if one is lhs:
                keep(key, other)
            return one, other
        elif left in (int, float) and right is core.tensor:
            key = left, lhs, rhs.type.name, how, *more.items()
            if key in numbers:
                return numbers[key], rhs
            one, other = check(self, lhs, rhs, *how, **more)
            if other is rhs:
                keep(key, one)
            return one, other
        return check(self, lhs, rhs, *how, **more)

    def keep(key: Any, number: Any) -> None:
        data = number.handle.data
        if data.size <= MOST_KEPT and data.flags.owndata:
            data.flags.writeable = False
            numbers[key] = number

    plans: dict[tuple[str, str], Any] = {}  # by both types: what each becomes, if it changes

    def broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
        names = lhs.type.name, rhs.type.name
        if names[0] == names[1]:
            return lhs, rhs
        plan = plans.get(names)
        if plan is not None:
            return wide(self, lhs, plan[0]), wide(self, rhs, plan[1])
        found = broadcast(self, lhs, rhs)
        ranks = {len(one.type.shape) for one in (lhs, rhs) if one.type.is_block()}
        if len(ranks) == 1:  # another axis is stock's to put in
            plans[names] = tuple(
                None if new is old else (new.type, new.type.to_ir(self.builder), [*new.type.shape])
                for old, new in zip((lhs, rhs), found, strict=True)
            )
        return found

    def wide(self: Any, value: Any, to: Any) -> Any:
        if to is None:
            return value
        kind, of_builder, shape = to
        if value.type.is_block():
            return self.tensor(self.builder.create_broadcast(value.handle, shape), kind)
        return self.tensor(self.builder.create_splat(of_builder, value.handle), kind)

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        if kind not in holds:
            holds[kind] = issubclass(kind, holders)
        return unwrap(value) if holds[kind] else value

    def equal_types(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def init_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        bits = 8 * data.itemsize
        if bits > 8 and not isinstance(dtype, tl.pointer_type) and bits > dtype.primitive_bitwidth:
            self.__post_init__()  # which says so

    _swap(TritonSemantic, "binary_op_type_checking_impl", binary_op_type_checking)
    _swap(TritonSemantic, "broadcast_impl_value", broadcast_value)
    _swap(core, "_unwrap_if_constexpr", unwrap_if_constexpr)
    _swap(core.dtype, "__eq__", equal_types)
    _swap(interpreter.TensorHandle, "__init__", init_handle)


def _shift_bfloat16(interpreter: Any) -> None:
    """bf16 is the upper half of fp32; stock takes the numbers apart, and only subnormals need that."""
    import numpy as np

    stock = interpreter._convert_float
    # By the types' names: as what both are read, what is no sign, and the first normal number.
    kinds = {
        ("bf16", "fp32"): (np.uint16, 0x7FFF, 0x0080),
        ("fp32", "bf16"): (np.uint32, 0x7FFFFFFF, 0x00800000),
    }

    def convert_float(given: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        kind = kinds.get((input_dtype.name, output_dtype.name)) if rounding_mode is None else None
        if kind is not None and given.itemsize == np.dtype(kind[0]).itemsize:
            bits = np.ascontiguousarray(given).view(kind[0])
            # One less than zero is the largest number: what remains are the subnormals.
            if not ((bits & kind[1]) - kind[0](1) < kind[0](kind[2] - 1)).any():
                if kind[0] is np.uint16:
                    return (bits.astype(np.uint32) << 16).reshape(given.shape)
                return (bits >> 16).astype(np.uint16).reshape(given.shape)
        return stock(given, input_dtype, output_dtype, rounding_mode)

    _swap(interpreter, "_convert_float", convert_float)
