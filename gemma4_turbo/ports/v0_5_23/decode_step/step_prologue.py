"""`step_prologue` in this line's ``Gemma4ForConditionalGeneration.forward``.

What it is, and what replaces the text model's methods, is in `gemma4_turbo.ports.any.decode_step.step_prologue`.
A model that is split over pipeline ranks runs stock's way.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Optional, Union

import torch

from gemma4_turbo.kernels import step_prologue as kernel
from gemma4_turbo.ports.any.decode_step import step_prologue as shared
from gemma4_turbo.ports.any.decode_step.step_prologue import (
    FORWARD,
    GATHER,
    PROJECT,
    Function,
    NormUnfit,
)
from gemma4_turbo.ports.v0_5_23 import classes
from gemma4_turbo.ports.v0_5_23.stock import STOCK as STOCK  # whose norms ours follow
from gemma4_turbo.runtime import custom_ops

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors

    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.v0_5_23.protocols import MultimodalModel, RMSNorm

verify = shared.verify


def build(run: PatchRun, stock: dict[str, Any]) -> dict[str, Any]:
    """The three replacements."""
    return {
        FORWARD: multimodal_forward(run, stock[FORWARD]),
        GATHER: shared.gather_method(run, stock[GATHER]),
        PROJECT: shared.project_method(run, stock[PROJECT], norm_unfit()),
    }


def norm_unfit() -> NormUnfit:
    """What says why the projection's norm does not fit; this line chooses its function at a call."""
    from sglang.srt.layers.layernorm import RMSNorm as StocksNorm

    classes.load()
    unfit_of = shared.norm_unfit()
    stocks_forward = StocksNorm.forward_cuda

    def unfit(norm: RMSNorm, inputs_embeds: torch.Tensor) -> str | None:
        """Why the norm does not run the kernel that ours stands for, or None. Before the GEMM."""
        if type(norm) is not StocksNorm:
            return unfit_of(norm, inputs_embeds)
        if norm._quant_linear is not None:
            return "the projection's norm may quantise what it returns"
        reason = classes.now_unfit()
        if reason is not None:
            return reason
        if not (torch.compiler.is_compiling() or kernel.INTERPRETED):
            function = getattr(classes.running(norm), "__func__", None)
            foreign = getattr(function, "__name__", "") == "forward_cuda"
            if foreign and function is not stocks_forward:
                return "the projection's norm runs a forward_cuda of somebody else's"
        return unfit_of(norm, inputs_embeds)

    return unfit


def multimodal_forward(run: PatchRun, stock: Function) -> Function:
    """What replaces ``Gemma4ForConditionalGeneration.forward``."""
    module = sys.modules[FORWARD.partition(":")[0]]
    stocks_gather = module.Gemma4ForConditionalGeneration.get_per_layer_inputs
    unfit_of = shared.embedding_unfit()

    def model_unfit(model: MultimodalModel) -> str | None:
        """Why its forward is not the one below, or None."""
        if model.pp_group.world_size != 1:
            return "the model is split over pipeline ranks"
        text = model.language_model
        if type(text) is not module.Gemma4TextModel:
            return f"the text model is a {type(text).__name__}"
        if "get_per_layer_inputs" in vars(text) or "get_per_layer_inputs" in vars(model):
            return "the model has a get_per_layer_inputs of its own"
        if type(model).get_per_layer_inputs is not stocks_gather:
            return f"a {type(model).__name__} has a get_per_layer_inputs of its own"
        return None

    @torch.no_grad()
    def forward(
        self: MultimodalModel,
        input_ids: torch.LongTensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor = None,  # type: ignore[assignment]  # stock's annotation
        pp_proxy_tensors: Optional[PPProxyTensors] = None,  # noqa: UP045  # stock's annotation
        **kwargs: object,
    ) -> Union[LogitsProcessor, PPProxyTensors]:  # noqa: UP007  # stock's annotation
        theirs = (self, input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if torch.compiler.is_compiling():
            custom_ops.not_traced(shared.NAME)
            return stock(*theirs, **kwargs)
        text = self.language_model
        capturing = custom_ops.capturing()
        placeholders = shared.placeholders(self.config)
        embedding = reason = None
        if input_ids is None or input_embeds is not None:
            reason = shared.EMBEDDED
        elif pp_proxy_tensors is not None:
            reason = "the call has another pipeline rank's tensors"
        elif placeholders is None:  # stock compares with them in a model that embeds nothing, too
            reason = "a placeholder's token id is not set"
        else:
            reason = model_unfit(self)
        if reason is None:
            embedding = text.embed_tokens_per_layer
            if embedding is not None:
                vocab = text.vocab_size_per_layer_input
                reason = (
                    unfit_of(embedding, input_ids, vocab)
                    or shared.norm_kind(run, embedding.weight, False, capturing)[1]
                )
        if reason is not None:
            run.declined(reason)
            return stock(*theirs, **kwargs)

        run.engaged(capturing)
        if module.envs.SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION.get():
            positions = positions + 1
        else:
            positions += 1
        per_layer_inputs = None
        if embedding is not None:
            rows = kernel.launch_gather(
                input_ids, embedding.weight, embedding.embed_scale, vocab, placeholders
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
            pp_proxy_tensors=pp_proxy_tensors,
            **kwargs,
        )
        aux_hidden_states = None
        if self.capture_aux_hidden_states:
            hidden_states, aux_hidden_states = hidden_states
        head = text.embed_tokens if self.lm_head_is_tied else self.lm_head
        return self.logits_processor(
            input_ids, hidden_states, head, forward_batch, aux_hidden_states
        )

    return forward
