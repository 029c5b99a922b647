"""What a module of SGLang's allows the fusions that go round it, looked at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.runtime.hooks import FOR_ALL, HOOKED

UNPROVEN = "not compared with stock on this GPU yet"
NOT_COMPARED = norm_kinds.Kinds(reason=UNPROVEN, traced_reason=UNPROVEN)
SITE = "_gemma4_turbo_site"  # on a module
T = TypeVar("T", bound="Site")


class Site:
    """A place where fusions run: an attribute per patch, None or why not (`UNPROVEN`: to be compared).

    It holds for the parts that it was made for: `site_of` makes another when one of them is replaced.
    """

    def __init__(self, key: tuple[Any, ...], norm: Any) -> None:
        self.key = key  # sites of equal key share a comparison, which is about code, not data
        self.norm = norm  # one of the module's norms
        self.kinds = NOT_COMPARED
        # The modules that each patch goes round, and the classes that they were of.
        self.covers: dict[str, tuple[tuple[Any, type], ...]] = {}
        self._parts: tuple[tuple[dict[str, Any], str, Any], ...] = ()
        self.of: Any = None  # the module: a shallow copy of one brings its site along

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """A deep copy of a module has none: it would hold for copies of parts that the module lacks."""
        return type(None), ()

    def depends_on(self, *parts: tuple[Any, str]) -> None:
        """Attributes, ``(object, name)``, whose replacement ends the site; more of them at each call.

        None and others without attributes of their own are passed over: nothing can be set on them.
        """
        self._parts += tuple(_place(of, name) for of, name in parts if hasattr(of, "__dict__"))

    def moved(self) -> bool:
        """Whether a part is another object than when the site was made."""
        for store, name, part in self._parts:  # noqa: SIM110 - a generator takes three times as long
            if store.get(name) is not part:
                return True
        return False

    def cover(self, name: str, *modules: Any) -> None:
        """The modules that a patch goes round, or calls on something else than stock does."""
        self.covers[name] = tuple((m, type(m)) for m in modules if isinstance(m, torch.nn.Module))

    def hooks_unfit(self, name: str) -> str | None:
        """Why the modules that a patch goes round have to be called, or None. Asked at every call."""
        for module, kind in self.covers.get(name, ()):
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or "forward" in module.__dict__
                or module._compiled_call_impl is not None
            ):
                return HOOKED.format(f"a {kind.__name__}")
            if type(module) is not kind:  # in place, as parametrisations and FSDP do it
                return f"a {kind.__name__} has become a {type(module).__name__}"
        return HOOKED.format("every module") if FOR_ALL[0] or FOR_ALL[1] else None


def _place(of: Any, name: str) -> tuple[dict[str, Any], str, Any]:
    """Where an object keeps an attribute, and the attribute: a module finds its own but slowly."""
    for store in (getattr(of, "_modules", {}), getattr(of, "_parameters", {}), vars(of)):
        if name in store:  # also None: a bias that comes later is set there
            return store, name, store[name]
    return vars(of), name, None


def site_of(module: Any, make: Callable[..., T], *more: Any) -> T:
    """The module's site; a new one, ``make(module, *more)``, when a part of it was replaced."""
    site: T | None = module.__dict__.get(SITE)
    if site is None or (
        not torch.compiler.is_compiling() and (site.of is not module or site.moved())
    ):
        site = renewed(module, make, *more)
    return site


def eager_site_of(module: Any, make: Callable[..., T], *more: Any) -> T:
    """`site_of` in code that is never traced: bound by CPU overhead."""
    site: T | None = module.__dict__.get(SITE)
    if site is None or site.of is not module or site.moved():
        site = renewed(module, make, *more)
    return site


def renewed(module: Any, make: Callable[..., T], *more: Any) -> T:
    """The module's site, made anew."""
    site = make(module, *more)
    site.of = module
    module.__dict__[SITE] = site
    return site


def eps_of(norm: Any) -> float:
    """A norm's epsilon."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def first_unfit(reasons: list[str | None]) -> str | None:
    """The first reason; `UNPROVEN` if there is none."""
    return next((reason for reason in reasons if reason is not None), UNPROVEN)
