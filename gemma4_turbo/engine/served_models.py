"""Which models this process runs: patches are for SGLang's Gemma 4 only.

Text, multimodal and unified models and MTP assistants are told by the module that defines their
class, exactly: a subclass, another model beside them, or Gemma 4 through another implementation, is
not known.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Container, Iterable
from typing import Any

_REASON = "the model is a "


class Models:
    """Those that SGLang has built here, as long as they live."""

    def __init__(self, own: str, kinds: Container[str] | None = None) -> None:
        """No model is known yet.

        Args:
            own: how the modules begin that belong to the models that the patches are for.
            kinds: what follows in those that define such a model; None: anything.
        """
        self._prefix = own
        self._kinds = kinds
        self._own: weakref.WeakSet[Any] = weakref.WeakSet()
        self._foreign: weakref.WeakSet[Any] = weakref.WeakSet()

    def made(self, model: Any) -> None:
        """A model has been built."""
        if len(self._foreign):
            gc.collect()  # one that was let go may live on in a reference cycle
        module = type(model).__module__
        own = module.startswith(self._prefix)
        if own and self._kinds is not None:
            own = module.removeprefix(self._prefix) in self._kinds
        (self._own if own else self._foreign).add(model)

    def unfit(self, targets: Iterable[str]) -> str | None:
        """Why a patch may not be in, or None.

        Beside a Gemma 4 another model may run, a draft: patches of functions that it uses as well
        stand aside then, those inside Gemma 4's own modules stay.
        """
        foreign = next(iter(self._foreign), None)
        if foreign is None or (len(self._own) and not self._shared(targets)):
            return None
        return f"{_REASON}{type(foreign).__name__}"

    def _shared(self, targets: Iterable[str]) -> bool:
        """Whether other models use one of the functions."""
        return any(not target.startswith(self._prefix) for target in targets)

    @staticmethod
    def is_reason(reason: str) -> bool:
        """Whether a reason came from `unfit`."""
        return reason.startswith(_REASON)
