"""What `yoco` notes on a batch.

Which of its prompts go on in a later chunk: their last rows are wanted by nobody. And to whom SGLang
hands the model's result, as a hook there would see the rows that are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma4_turbo.engine import states
from gemma4_turbo.fusions.fusion import Step
from gemma4_turbo.ports.any.prefill import yoco_cut
from gemma4_turbo.runtime.attempts import one_line

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import ForwardBatch, ModelRunner, ScheduleBatch

BATCH = "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new"


def enable(fusions: tuple[Step, ...], run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The batch's constructor, which notes it."""
    init = stock[BATCH]

    def init_new(
        cls: type[ForwardBatch], batch: ScheduleBatch, model_runner: ModelRunner, **more: Any
    ) -> ForwardBatch:
        made: ForwardBatch = init(cls, batch, model_runner, **more)
        if made.seq_lens_cpu is not None:
            processor = getattr(getattr(model_runner, "model", None), "logits_processor", None)
            try:
                chunks = unfinished(batch)
            except Exception as error:  # then every prompt's last row is kept
                chunks = None
                run.set(states.FAILED, f"unfinished prompts are not known: {one_line(error)}")
            setattr(made.seq_lens_cpu, yoco_cut.UNFINISHED, chunks)
            setattr(made.seq_lens_cpu, yoco_cut.LOGITS, processor)
        return made

    return {BATCH: init_new}


def unfinished(batch: ScheduleBatch) -> list[bool] | None:
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
