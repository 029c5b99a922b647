"""`step_prologue` in this line's ``Gemma4ForConditionalGeneration.forward``.

What it is, and what replaces the text model's methods, is in `gemma4_turbo.ports.any.decode_step.step_prologue`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

from gemma4_turbo.kernels import step_prologue as kernel
from gemma4_turbo.ports.any.decode_step import step_prologue as shared
from gemma4_turbo.ports.any.decode_step.step_prologue import FORWARD, GATHER, PROJECT, Function
from gemma4_turbo.ports.v0_5_12.stock import STOCK as STOCK  # whose norms ours follow
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any.model_protocols import MultimodalModel

verify = shared.verify


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The three replacements."""
    return {
        FORWARD: multimodal_forward(run, stock[FORWARD]),
        GATHER: shared.gather_method(run, stock[GATHER]),
        PROJECT: shared.project_method(run, stock[PROJECT]),
    }


def multimodal_forward(run: PatchRun, stock: Function) -> Function:
    """What replaces ``Gemma4ForConditionalGeneration.forward``."""
    module = sys.modules[FORWARD.partition(":")[0]]
    unfit_of = shared.embedding_unfit()

    @torch.no_grad()
    def forward(
        self: MultimodalModel,
        input_ids: torch.LongTensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor = None,  # type: ignore[assignment]  # stock's annotation
        **kwargs: object,
    ) -> LogitsProcessor:
        given = input_ids is None or input_embeds is not None
        if given or torch.compiler.is_compiling():
            if torch.compiler.is_compiling():
                custom_ops.not_traced(shared.NAME)
            else:
                run.declined(shared.EMBEDDED)
            return stock(self, input_ids, positions, forward_batch, input_embeds, **kwargs)
        text = self.language_model
        embedding = text.embed_tokens_per_layer
        capturing = custom_ops.capturing()
        placeholders = None
        if embedding is not None:
            placeholders = shared.placeholders(self.config)
            reason = (
                "a placeholder's token id is not set"
                if placeholders is None
                else unfit_of(embedding, input_ids, text.vocab_size_per_layer_input)
                or shared.norm_kind(run, embedding.weight, False, capturing)[1]
            )
            if reason is not None:
                run.declined(reason)
                return stock(self, input_ids, positions, forward_batch, input_embeds, **kwargs)

        run.engaged(capturing)
        positions += 1
        per_layer_inputs = None
        if embedding is not None:
            rows = kernel.launch_gather(
                input_ids,
                embedding.weight,
                embedding.embed_scale,
                text.vocab_size_per_layer_input,
                placeholders,
            )
            per_layer_inputs = shared.per_layer(text, rows)

        extend = forward_batch.forward_mode == module.ForwardMode.EXTEND
        if extend and forward_batch.contains_image_inputs():
            self.prepare_attn_masks(forward_batch, input_ids, mask_dtype=torch.bool)
        hidden_states = module.general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=text,
            data_embedding_funcs={
                module.Modality.IMAGE: self.get_image_feature,
                module.Modality.VIDEO: self.get_video_feature,
                module.Modality.AUDIO: self.get_audio_feature,
            },
            positions=positions,
            per_layer_inputs=per_layer_inputs,
            **kwargs,
        )
        aux_hidden_states = None
        if self.capture_aux_hidden_states:
            hidden_states, aux_hidden_states = hidden_states
        return self.logits_processor(
            input_ids, hidden_states, text.embed_tokens, forward_batch, aux_hidden_states
        )

    return forward
