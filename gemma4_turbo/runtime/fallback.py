"""Stock in place of a call of ours that raises: nothing of ours ends a server.

A kernel may not compile on this GPU, want more shared memory than there is, or SGLang may lack a
symbol; a first launch is often the first try. What the arguments are to blame for, stock raises too:
then that is what is raised, and the patch has not failed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

from gemma4_turbo.engine import states
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

logger = logging.getLogger("gemma4_turbo")
T = TypeVar("T")


class DeclinedError(Exception):
    """Raised by a call of ours: why stock's path runs, which is no failure."""


class Fallback:
    """One kind of call: what has failed once is not tried again."""

    def __init__(self, what: str) -> None:
        """``what``: the subject of the reason, e.g. ``the launch``."""
        self._what = what
        self._failed: dict[Hashable, str] = {}

    def clear(self) -> None:
        """The next call is tried again."""
        self._failed.clear()

    def unfit(self, key: Hashable = None) -> str | None:
        """What went wrong with an earlier call of this key, or None."""
        return self._failed.get(key) if self._failed else None

    def failed(self, run: PatchRun, key: Hashable, error: BaseException) -> str:
        """Note it: the patch is `failed`. Returns the reason."""
        reason = f"{self._what} could not be done: {one_line(error)}"
        self._failed[key] = reason
        run.set(states.FAILED, reason)
        return reason

    def prepared(self, run: PatchRun, function: Callable[[], T]) -> T:
        """``function()``, inside ``ours`` of a call where nearly all is let ``through``.

        Several GPUs come to the same in it, by the request and the model alone: a failure is all of theirs,
        before they wait for each other. Raises `DeclinedError` then, the patch being `failed`.
        """
        try:
            return function()
        except DeclinedError:
            raise
        except Exception as error:
            raise DeclinedError(self.failed(run, None, error.with_traceback(None))) from None

    def call(
        self,
        run: PatchRun,
        ours: Callable[[], T],
        stock: Callable[[], T],
        key: Hashable = None,
        through: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> T:
        """``ours()``, counted as engaged when it is done, or ``stock()``, counted as declined.

        Args:
            run: of the patch.
            ours: leaves the arguments as stock can still take them, if it raises.
            stock: the same with SGLang's own code.
            key: what decides whether the call can be done, e.g. types and shapes.
            through: what is raised as it is; a `DeclinedError` is not.
        """
        reason = self.unfit(key)
        failure: Exception | None = None
        if reason is None:
            try:
                found = ours()
            except DeclinedError as declined:
                reason = str(declined)
            except through:
                raise
            except Exception as error:
                logger.debug("gemma4_turbo: %s", self._what, exc_info=True)
                failure = error.with_traceback(None)  # whose frames hold the call's tensors
            else:
                run.engaged(custom_ops.capturing())
                return found
        if failure is None:
            run.declined(str(reason))
            return stock()
        result = stock()
        run.declined(self.failed(run, key, failure))
        return result
