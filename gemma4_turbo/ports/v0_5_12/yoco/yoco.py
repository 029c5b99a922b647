"""`yoco`: in a prefill, layers that share KV see only the rows whose logits are wanted.

The cut is a step of the shared forward of the text model. A batch is also told which of its prompts
go on in a later chunk: their last rows are wanted by nobody. And it is told to whom SGLang hands the
model's result, as a hook there would see the rows that are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.engine.checks import Check
from gemma4_turbo.ports.v0_5_12.yoco import row_cut
from gemma4_turbo.runtime.attempts import told

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun

BATCH = "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new"


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The model's loop, and the batch's constructor that notes unfinished prompts."""
    from gemma4_turbo.ports.v0_5_12 import text_model

    init = stock[BATCH]

    def init_new(cls: Any, batch: Any, model_runner: Any) -> Any:
        made = init(cls, batch, model_runner)
        if made.seq_lens_cpu is not None:
            processor = getattr(getattr(model_runner, "model", None), "logits_processor", None)
            try:
                chunks = unfinished(batch)
            except Exception as error:  # then every prompt's last row is kept
                chunks = None
                run.set(states.FAILED, f"unfinished prompts are not known: {told(error)}")
            setattr(made.seq_lens_cpu, row_cut.UNFINISHED, chunks)
            setattr(made.seq_lens_cpu, row_cut.LOGITS, processor)
        return made

    row_cut.YOCO.run = run
    return {text_model.TARGET: text_model.forward, BATCH: init_new}


def unfinished(batch: Any) -> list[bool] | None:
    """Per request, whether its prompt is longer than what this prefill ends with; None: unknown."""
    if not batch.forward_mode.is_extend() or batch.seq_lens_cpu is None or not batch.reqs:
        return None
    lengths = batch.seq_lens_cpu.tolist()
    if len(lengths) != len(batch.reqs):
        return None
    return [
        length < len(request.origin_input_ids)
        for length, request in zip(lengths, batch.reqs, strict=True)
    ]


def undo(run: PatchRun) -> None:
    """Switch the step off; the shared forward may live on for other patches."""
    row_cut.YOCO.run = None
    row_cut.forget()


def verify(run: PatchRun, device: str) -> list[Check]:
    """Nothing without a model: the rows go through SGLang's own layers."""
    return []
