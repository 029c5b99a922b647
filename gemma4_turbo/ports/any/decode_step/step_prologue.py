"""`step_prologue`: what precedes the first layer runs through `gemma4_turbo.kernels.step_prologue`.

* ``Gemma4TextModel.get_per_layer_inputs`` and ``project_per_layer_inputs``: one launch each beside
  stock's own GEMM. Their sources are the same in every supported line: here is what replaces them.
* ``Gemma4ForConditionalGeneration.forward`` copies the token ids and replaces the placeholders of
  images, videos and audio by the padding token. Models without per-layer embeddings never read
  that copy, so it is not made; for the others the gather does the replacing as it reads the ids.
  A line has that forward in a ``step_prologue`` of its own, on what is here.

Which RMSNorm stock runs depends on what is installed, on the GPU, and on whether Dynamo traces the
call: `norm_kind` finds it by comparing with stock, once, before the first use.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Optional

import torch

from gemma4_turbo.engine.checks import Check
from gemma4_turbo.engine.run import peer
from gemma4_turbo.fusions import norm_kinds
from gemma4_turbo.fusions.comparison import different_bits, odd_rows
from gemma4_turbo.fusions.stock import followed
from gemma4_turbo.kernels import step_prologue as kernel
from gemma4_turbo.kernels.norms.rmsnorm import Kind
from gemma4_turbo.ports.any.sglang_types import weight_unfit
from gemma4_turbo.ports.any.stock import Embedding, Projection, text_model
from gemma4_turbo.runtime import custom_ops
from gemma4_turbo.runtime.hooks import hooked
from gemma4_turbo.runtime.verdicts import Verdicts

if TYPE_CHECKING:
    from gemma4_turbo.engine.run import PatchRun
    from gemma4_turbo.ports.any import model_protocols as protocols
    from gemma4_turbo.ports.any.model_protocols import (
        MultimodalConfig,
        ScaledWordEmbedding,
        TextModel,
    )

NAME = "step_prologue"
FORWARD = "sglang.srt.models.gemma4_mm:Gemma4ForConditionalGeneration.forward"
GATHER = "sglang.srt.models.gemma4_causal:Gemma4TextModel.get_per_layer_inputs"
PROJECT = "sglang.srt.models.gemma4_causal:Gemma4TextModel.project_per_layer_inputs"
EMBEDDED = "the caller passes embeddings"
NOT_PER_LAYER = "the model has no per-layer inputs"
Function = Callable[..., Any]
EmbeddingUnfit = Callable[["ScaledWordEmbedding", torch.Tensor, int], "str | None"]
NormUnfit = Callable[[Any, torch.Tensor], "str | None"]  # a norm of SGLang's
ProjectArguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None, torch.Tensor | None
]

Key = tuple[torch.device, torch.dtype, bool]  # the last: traced

_verdicts = Verdicts()
_kinds: dict[Key, int] = {}  # where the verdict is None


# -- Gemma4TextModel -------------------------------------------------------------------------------


def gather_method(run: PatchRun, stock: Callable[..., torch.Tensor]) -> Function:
    """What replaces ``Gemma4TextModel.get_per_layer_inputs``."""
    traced = custom_ops.register(
        NAME,
        "gather_per_layer(Tensor input_ids, Tensor weight, float embed_scale, int vocab) -> Tensor",
        _traced_gather,
        lambda input_ids, weight, embed_scale, vocab: weight.new_empty(
            (input_ids.shape[0], weight.shape[1])
        ),
    )
    unfit_of = embedding_unfit()

    def get_per_layer_inputs(self: TextModel, input_ids: torch.LongTensor) -> torch.Tensor:
        embedding = self.embed_tokens_per_layer
        compiling = torch.compiler.is_compiling()
        if embedding is None:
            if compiling:
                custom_ops.not_traced(NAME, NOT_PER_LAYER)
            else:
                run.declined(NOT_PER_LAYER)
            return None  # type: ignore[return-value]  # as stock
        vocab = self.vocab_size_per_layer_input
        reason = unfit_of(embedding, input_ids, vocab)
        if reason is None and compiling:
            rows = traced(input_ids, embedding.weight, embedding.embed_scale, vocab)
            return per_layer(self, rows)
        if reason is None:
            capturing = custom_ops.capturing()
            reason = norm_kind(run, embedding.weight, False, capturing)[1]
            if reason is None:
                run.engaged(capturing)
                return per_layer(
                    self,
                    kernel.launch_gather(input_ids, embedding.weight, embedding.embed_scale, vocab),
                )
        if compiling:
            custom_ops.not_traced(NAME)
        else:
            run.declined(reason)
        return stock(self, input_ids)

    return get_per_layer_inputs


def project_method(
    run: PatchRun, stock: Callable[..., torch.Tensor], unfit: NormUnfit | None = None
) -> Function:
    """What replaces ``Gemma4TextModel.project_per_layer_inputs``.

    Args:
        run: of the patch.
        stock: what is replaced.
        unfit: why the projection's norm does not fit; None: `norm_unfit`.
    """
    traced = custom_ops.register(
        NAME,
        "project_per_layer(Tensor projection, Tensor projection_scale, Tensor weight, float eps,"
        " Tensor? per_layer_inputs, Tensor? input_scale) -> Tensor",
        _traced_project,
        lambda projection, *others: projection.new_empty(
            (projection.shape[0], projection.shape[1] // kernel.WIDTH, kernel.WIDTH)
        ),
    )
    unfit_of = norm_unfit() if unfit is None else unfit

    def project_per_layer_inputs(
        self: TextModel,
        inputs_embeds: torch.Tensor,
        per_layer_inputs: Optional[torch.Tensor] = None,  # noqa: UP045  # stock's annotation
    ) -> torch.Tensor:
        if self.per_layer_model_projection is None:
            return None  # type: ignore[return-value]  # as stock
        norm = self.per_layer_projection_norm
        compiling = torch.compiler.is_compiling()
        capturing = not compiling and custom_ops.capturing()
        reason = unfit_of(norm, inputs_embeds)
        kind = int(Kind.PRECISE)
        if reason is None and not compiling:
            kind, reason = norm_kind(run, inputs_embeds, False, capturing)
        if reason is None:
            projection, _ = self.per_layer_model_projection(inputs_embeds)
            arguments = (
                projection,
                self.per_layer_projection_scale,
                norm.weight,
                norm.variance_epsilon,
                per_layer_inputs,
                None if per_layer_inputs is None else self.per_layer_input_scale,
            )
            reason = kernel.project_unfit(*arguments)
            if reason is None and compiling:
                return traced(*arguments)  # type: ignore[no-any-return]
            if reason is None:
                run.engaged(capturing)
                return kernel.launch_project(*arguments, kind)
            if compiling:
                custom_ops.not_traced(NAME)
            else:
                run.declined(reason)
            return _behind_product(self, projection, inputs_embeds, per_layer_inputs)
        if compiling:
            custom_ops.not_traced(NAME)
        else:
            run.declined(reason)
        return stock(self, inputs_embeds, per_layer_inputs)

    return project_per_layer_inputs


def _behind_product(
    model: TextModel,
    projection: torch.Tensor,
    inputs_embeds: torch.Tensor,
    per_layer_inputs: torch.Tensor | None,
) -> torch.Tensor:
    """Stock's calls behind the product: it is there already, and not cheap."""
    shape = model.config.num_hidden_layers, model.hidden_size_per_layer_input
    scaled = (projection * model.per_layer_projection_scale).reshape(
        *inputs_embeds.shape[:-1], *shape
    )
    normed = model.per_layer_projection_norm(scaled)
    if per_layer_inputs is None:
        return normed
    return (normed + per_layer_inputs) * model.per_layer_input_scale


def per_layer(model: TextModel, rows: torch.Tensor) -> torch.Tensor:
    """``[T, L * D]`` as ``[T, L, D]``."""
    return rows.reshape(
        rows.shape[0], model.config.num_hidden_layers, model.hidden_size_per_layer_input
    )


def embedding_unfit() -> EmbeddingUnfit:
    """What says why the per-layer embedding does not fit. Call it while a patch is built."""
    from sglang.srt.models.gemma3_causal import Gemma3TextScaledWordEmbedding

    def unfit(embedding: ScaledWordEmbedding, input_ids: torch.Tensor, vocab: int) -> str | None:
        """Why the embedding is not a plain scaled look-up that the kernel takes, or None."""
        if type(embedding) is not Gemma3TextScaledWordEmbedding:
            return f"the per-layer embedding is a {type(embedding).__name__}"
        if embedding.max_norm is not None or not isinstance(embedding.embed_scale, float):
            return "the per-layer embedding has a max_norm, or a scale that is no float"
        if embedding._forward_hooks or embedding._forward_pre_hooks:
            return "the per-layer embedding has hooks"
        if not torch.compiler.is_compiling():
            if hooked(embedding):  # those for all modules, and a forward of its own
                return "the per-layer embedding has hooks"
            reason = weight_unfit(embedding.weight)
            if reason is not None:
                return reason
        return kernel.gather_unfit(input_ids, embedding.weight, vocab)

    return unfit


def norm_unfit() -> NormUnfit:
    """What says why the projection's norm does not fit. Call it while a patch is built."""
    from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
    from sglang.srt.layers.layernorm import RMSNorm

    def unfit(norm: protocols.RMSNorm, inputs_embeds: torch.Tensor) -> str | None:
        """Why the norm does not run the kernel that ours stands for, or None. Before the GEMM."""
        if type(norm) is not RMSNorm or norm.variance_size_override is not None:
            return f"the projection's norm is a {type(norm).__name__} with another equation"
        if norm.cast_x_before_out_mul:
            return "the projection's norm rounds before it multiplies with its weight"
        if is_batch_invariant_mode_enabled():
            return "batch-invariant mode has an RMSNorm of its own"
        if norm._forward_hooks or norm._forward_pre_hooks:
            return "the projection's norm has hooks"
        if not torch.compiler.is_compiling():
            if hooked(norm):
                return "the projection's norm has hooks"
            reason = weight_unfit(norm.weight)
            if reason is not None:
                return reason
        if not kernel.INTERPRETED:
            if not isinstance(norm._forward_method, types.MethodType):
                return "the projection's norm runs a function of somebody else's"
            # Its function's name: Dynamo gives the bound method another.
            method = norm._forward_method.__func__.__name__
            if method != "forward_cuda":
                return f"the projection's norm runs {method}"
        if norm.weight.dtype != inputs_embeds.dtype:
            return f"the norm's weight is {norm.weight.dtype}, its input {inputs_embeds.dtype}"
        if not (kernel.INTERPRETED or (inputs_embeds.is_cuda and torch.version.hip is None)):
            return f"inputs_embeds must be on a CUDA device, got {inputs_embeds.device}"
        if inputs_embeds.dim() != 2 or inputs_embeds.dtype not in kernel.DTYPES:
            return f"inputs_embeds must be 2-D bf16 or fp16, got {inputs_embeds.dim()}-D {inputs_embeds.dtype}"
        return None

    return unfit


def _traced_gather(
    input_ids: torch.Tensor, weight: torch.Tensor, embed_scale: float, vocab: int
) -> torch.Tensor:
    """The body of the operator that torch.compile keeps: runs when the compiled code does."""
    if _traced_kind(weight)[1] is None:
        return kernel.launch_gather(input_ids, weight, embed_scale, vocab)
    return kernel.reference_gather(input_ids, weight, embed_scale, vocab)


def _traced_project(
    projection: torch.Tensor,
    projection_scale: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    per_layer_inputs: torch.Tensor | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    arguments = (projection, projection_scale, weight, eps, per_layer_inputs, input_scale)
    kind, unfit = _traced_kind(projection)
    if unfit is not None:
        return kernel.reference_project(_traced_rms_norm(), *arguments)
    return kernel.launch_project(*arguments, kind)


def _traced_kind(like: torch.Tensor) -> tuple[int, str | None]:
    return norm_kind(peer(NAME), like, True, custom_ops.capturing())


# -- what a line's Gemma4ForConditionalGeneration.forward asks -------------------------------------------


def placeholders(config: MultimodalConfig) -> kernel.Placeholders | None:
    """The token ids of a Gemma4Config, None if one is missing."""
    ids: tuple[Any, ...] = (
        config.image_token_id,
        config.video_token_id,
        config.audio_token_id,
        config.text_config.pad_token_id,
    )
    return kernel.Placeholders(*ids) if all(isinstance(i, int) for i in ids) else None


# -- comparison with stock ---------------------------------------------------------------------------


def norm_kind(
    run: PatchRun, like: torch.Tensor, traced: bool, capturing: bool
) -> tuple[int, str | None]:
    """Which `Kind` of RMSNorm stock runs over 256 columns here, and why ours may not run. Cached.

    Args:
        run: of the patch.
        like: a tensor of the device and dtype in question.
        traced: for calls that Dynamo traces: SGLang's RMSNorm takes another kernel there.
        capturing: into a CUDA graph, which forbids the synchronisation of a comparison.
    """
    if not like.is_cuda:  # Triton's interpreter: nothing to compare with
        return Kind.PRECISE, None
    key = (like.device, like.dtype, traced)
    waiting = f"{like.dtype} was not compared with stock before the capture" if capturing else None
    unfit = _verdicts.unfit(run, key, waiting, lambda: _compare(key, like))
    return (Kind.PRECISE, unfit) if unfit is not None else (_kinds[key], None)


def _compare(key: Key, like: torch.Tensor) -> str | None:
    kinds = norm_kinds.find(like, kernel.WIDTH)
    traced = key[-1]
    if (reason := kinds.traced_reason if traced else kinds.reason) is not None:
        return reason
    _kinds[key] = kinds.traced if traced else kinds.eager
    return compare(_traced_rms_norm() if traced else _rms_norm(), _kinds[key], like)


def _rms_norm() -> kernel.RMSNormFunction:
    """What RMSNorm.forward_cuda calls."""
    return followed().eager_norms().rmsnorm


def _traced_rms_norm() -> kernel.RMSNormFunction:
    """What it comes to when Dynamo traces it."""
    return followed().traced_norms().rmsnorm


@torch.no_grad()
def compare(
    rms_norm: kernel.RMSNormFunction, kind: int, like: torch.Tensor, rounds: int = 16
) -> str | None:
    """What of the two kernels differs from stock on this very GPU, or None.

    Every other round leaves the per-layer inputs out, which hide some of a difference.

    Args:
        rms_norm: stock's.
        kind: the one of ours that follows it.
        like: a tensor of the device and dtype in question.
        rounds: of 2 million numbers each.
    """
    generator = torch.Generator(like.device).manual_seed(0)  # the global state stays as it is
    ids, table = gather_inputs(generator, like.dtype)
    gathered = [f(ids, table, 16.0, 40) for f in (kernel.launch_gather, kernel.reference_gather)]
    failure = "embeddings" if different_bits(*gathered) else ""
    for i in range(rounds):
        arguments = project_inputs(generator, like.dtype, 512, 16)
        if i % 2:
            arguments = (*arguments[:4], None, None)
        expected = kernel.reference_project(rms_norm, *arguments)
        count = different_bits(kernel.launch_project(*arguments, kind), expected)
        if count:
            failure = f"{count} of {expected.numel()} numbers"
    if not failure:
        return None
    return (
        f"self-check: {failure} of {like.dtype} differ from stock on "
        f"{torch.cuda.get_device_name(like.device)} with torch {torch.__version__}"
    )


def gather_inputs(
    generator: torch.Generator, dtype: torch.dtype, width: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids in and out of 0 .. 39, and a table of 48 rows, some of them odd."""
    device = generator.device
    ids = torch.arange(-5, 60, device=device)
    table = torch.randn(48, width, generator=generator, device=device, dtype=torch.float32)
    return ids, odd_rows(table).to(dtype)


def project_inputs(
    generator: torch.Generator, dtype: torch.dtype, tokens: int, layers: int
) -> ProjectArguments:
    """The arguments of `kernel.reference_project`: random, with odd rows and odd weights."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)

    projection = randn(tokens * layers, kernel.WIDTH) * randn(tokens * layers, 1).exp() * 20
    weight = randn(kernel.WIDTH) * 2
    weight[:4] = torch.tensor([0.0, -0.0, 1e-39, -1e-39])
    inputs = randn(tokens, layers, kernel.WIDTH) * 16
    inputs[: 1 + 9 // layers] = 0.0  # so that the sum hides nothing of the odd rows
    return (
        odd_rows(projection).to(dtype).reshape(tokens, -1),
        torch.tensor(1536**-0.5, device=generator.device).to(dtype),
        weight.to(dtype),
        1e-6,
        inputs.to(dtype),
        torch.tensor(0.5**0.5, device=generator.device).to(dtype),
    )


def verify(run: PatchRun, device: str) -> list[Check]:
    """Stock's own methods (on a GPU) or the references (without) against the kernels."""
    checks = []
    for dtype in kernel.DTYPES:
        generator = torch.Generator(device).manual_seed(1)
        tokens, layers = (257, 35) if device == "cuda" else (3, 5)
        checks += [
            _check_gather(run, generator, dtype),
            _check_project(run, project_inputs(generator, dtype, tokens, layers)),
        ]
    return checks


@torch.no_grad()
def _check_gather(run: PatchRun, generator: torch.Generator, dtype: torch.dtype) -> Check:
    ids, table = gather_inputs(generator, dtype)
    model = text_model(2, kernel.WIDTH, Embedding(table, 16.0, 40), None)
    expected = _stock(run, GATHER)(model, ids)
    got = per_layer(model, kernel.gather_per_layer(ids, table, 16.0, 40))
    return _check("per-layer embeddings", "stock's method", got, expected)


@torch.no_grad()
def _check_project(run: PatchRun, arguments: tuple[Any, ...]) -> Check:
    projection, scale, weight, eps, inputs, input_scale = arguments
    if not projection.is_cuda:
        kind = int(Kind.PRECISE)
        expected = kernel.reference_project(kernel.reference_rms_norm(kind), *arguments)
        got = kernel.project_per_layer(*arguments, kind=kind)
        return _check("per-layer projection", "the same order in torch", got, expected)
    given = Projection(scale, weight, eps, input_scale)
    model = text_model(inputs.shape[1], kernel.WIDTH, None, given)
    expected = _stock(run, PROJECT)(model, projection, inputs)
    kind, _ = norm_kind(run, projection, False, False)
    got = kernel.project_per_layer(*arguments, kind=kind)
    return _check("per-layer projection", "stock's method on this GPU", got, expected)


def _stock(run: PatchRun, target: str) -> Function:
    (swap,) = (swap for swap in run.swaps if swap.target == target)
    return swap.function  # type: ignore[no-any-return]


def _check(what: str, against: str, got: torch.Tensor, expected: torch.Tensor) -> Check:
    count = different_bits(got, expected)
    inputs = f"{what}, {str(got.dtype).removeprefix('torch.')}, odd rows among them"
    return Check(NAME, inputs, against, got.numel(), count, "not one bit", count == 0)
