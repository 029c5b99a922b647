"""`mtp_moe_runner`: the automatic choice of a MoE runner heeds whether the weights are quantised.

Some source trees choose FlashInfer's runner for every Gemma 4 MoE on a GPU that has it, though it
takes quantised weights only. Such a choice is taken back to ``auto`` where the weights are not
quantised; what the user asked for stays. Where the source has no such choice, stock stays as it is.
"""

from __future__ import annotations

import ast
import functools
import re
from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.runtime.attempts import told

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

TARGET = "sglang.srt.server_args:ServerArgs._handle_model_specific_adjustments"
_HEEDS_QUANTISATION = re.compile(r"quant|modelopt|fp4|fp8")


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """Stock's adjustments, its choice of a runner checked; `NotNeededError` without a defect."""
    if not chooses_blindly(run.definitions().node(TARGET)):
        raise states.NotNeededError(
            "this source chooses no FlashInfer runner for Gemma 4 without looking at the weights"
        )
    adjust = stock[TARGET]

    @functools.wraps(adjust)
    def _handle_model_specific_adjustments(self: Any) -> None:
        asked = self.moe_runner_backend
        adjust(self)
        if asked == "auto" and str(self.moe_runner_backend).startswith("flashinfer"):
            try:
                blind = is_unquantised_gemma4(self)
            except Exception as error:  # never in the way of a server that stock can start
                run.declined(told(error))
                return
            if blind:
                self.moe_runner_backend = asked
                run.engaged(False)

    return {TARGET: _handle_model_specific_adjustments}


def chooses_blindly(node: ast.AST | None) -> bool:
    """Whether a branch for Gemma 4 sets a FlashInfer runner with no word of quantisation.

    Args:
        node: the definition of the adjustments.
    """
    return node is not None and any(
        "Gemma4" in ast.unparse(branch.test) and _sets_flashinfer(branch.body)
        for branch in ast.walk(node)
        if isinstance(branch, ast.If)
    )


def _sets_flashinfer(body: list[ast.stmt]) -> bool:
    """In these statements, or below an ``if`` of theirs that does not ask for quantisation."""
    for statement in body:
        if isinstance(statement, ast.If):
            if _HEEDS_QUANTISATION.search(ast.unparse(statement.test)):
                continue
            if _sets_flashinfer(statement.body) or _sets_flashinfer(statement.orelse):
                return True
        elif isinstance(statement, ast.Assign):
            sets = any(getattr(to, "attr", "") == "moe_runner_backend" for to in statement.targets)
            if sets and "flashinfer" in ast.unparse(statement.value):
                return True
    return False


def is_unquantised_gemma4(server_args: Any) -> bool:
    """Whether stock's ``ServerArgs`` are for a Gemma 4 whose weights are not quantised."""
    model_config = server_args.get_model_config()
    architectures = getattr(model_config.hf_config, "architectures", None) or ()
    return (
        any(name.startswith("Gemma4") for name in architectures)
        and server_args.quantization is None
        and getattr(model_config, "quantization", None) is None
    )
