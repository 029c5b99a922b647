"""`swa_ratio`: a default of ``swa_full_tokens_ratio`` that fits Gemma 4's MoE models.

Stock's 0.8 gives sliding layers KV memory for 0.8 tokens per token of the full layers, though they
never need more than their window. With 0.15 the full layers, which long prompts exhaust first, get
more. Dense models keep stock's default. A value that the user gives is never touched, also when it
equals the default: the default itself is marked, and only the mark is replaced.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

from gemma4_turbo.ports.any import architectures
from gemma4_turbo.ports.any.memory import swa_ratio
from gemma4_turbo.ports.any.memory.swa_ratio import FIELD, RATIO
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ServerArgs as Arguments

logger = logging.getLogger("gemma4_turbo")

TARGET = "sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments"
ARCHITECTURES = ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration")


class Unset(float):
    """Stock's default, where nobody gave a value. Equal to it; plain once the model is known."""

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        """Pickled as the number: another process need not know this class."""
        return float, (float(self),)


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's adjustments, then ours; and the mark on the default."""
    from sglang.srt.server_args import ServerArgs

    adjust = stock[TARGET]
    _set_default(ServerArgs, Unset(getattr(ServerArgs, FIELD)))

    def _handle_model_specific_adjustments(self: Arguments) -> None:
        adjust(self)
        given = getattr(self, FIELD)
        if not isinstance(given, Unset):
            run.declined(swa_ratio.given(given))
            return
        try:
            reason = unfit(self)
        except Exception as error:  # stock's default is always there
            reason = one_line(error)
        if reason is not None:
            setattr(self, FIELD, float(given))
            run.declined(reason)
            return
        setattr(self, FIELD, RATIO)
        logger.info("gemma4_turbo: %s is %s instead of %s", FIELD, RATIO, float(given))
        run.engaged(False)

    return {TARGET: _handle_model_specific_adjustments}


def unfit(arguments: Arguments) -> str | None:
    """Why stock's default stays, or None."""
    from sglang.srt.connector import ConnectorType
    from sglang.srt.utils.common import parse_connector_type

    if parse_connector_type(arguments.model_path) == ConnectorType.INSTANCE:
        return "the model comes from another instance"
    config = arguments.get_model_config()
    return architectures.unfit(config, ARCHITECTURES) or swa_ratio.unfit(arguments, config)


def _set_default(arguments: Any, value: float) -> None:
    """The default of the field, for keyword arguments and for the command line's parser."""
    init = arguments.__init__
    names = [
        name
        for name, parameter in inspect.signature(init).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    ]
    defaults = list(init.__defaults__)
    if len(names) != len(defaults):
        raise TypeError("ServerArgs has keyword-only fields")
    defaults[names.index(FIELD)] = value
    init.__defaults__ = tuple(defaults)
    setattr(arguments, FIELD, value)


def undo(run: PatchRun) -> None:
    """A plain default again."""
    from sglang.srt.server_args import ServerArgs

    _set_default(ServerArgs, float(getattr(ServerArgs, FIELD)))
