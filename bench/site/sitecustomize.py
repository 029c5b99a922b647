"""For benchmark engines: a wider range of random weights, the same in stock and patched processes.

SGLang's and vLLM's ``load_format="dummy"`` draw from +-1e-3, which sends nearly all tokens to few experts and
flatters decoding. ``BENCH_WEIGHT_RANGE`` is used instead. ``BENCH_PATCHED=1`` also registers the
patches; without it nothing of gemma4_turbo is imported here, nor wrapt where there is none.

``BENCH_POOL_GIB`` is the memory for KV, whatever else lies on the GPU: pools of one size, run after run.

K and V share their weights where a checkpoint has one projection for both. Scales of quantised weights and
of KV caches are 1: 0.5.12.post1 draws after it has quantised, scales of both signs among the rest.

In a model that takes pictures dummy weights would hide them: the bounds of activations are drawn
too, upper and lower the same number, and norms near zero damp what comes from the images.

``BENCH_UNIT_NORMS=1`` gives every model such norms, so that what attention reads decides about tokens.

``BENCH_KV_SCALES=K:V`` gives layers that own a KV cache these scales, as a checkpoint would: layers that read
another's have none, nor has an MTP assistant.

``BENCH_CHECKPOINT=FOLDER`` keeps some weights of the first layer there as a checkpoint's file, for
`soak.py` to load again.

``BENCH_EXACT_ATTENTION=1``: attention in fp32, see `bench.inside.exact_attention`.

``BENCH_STEPS=1``: the scheduler captures its decode graphs anew and times them, see `bench.inside.steps`.

For ``mtp.py``: ``BENCH_AGREEING=FRACTION:SEED:WIDTH`` makes target and assistant agree as
`bench.inside.agreeing` says. ``BENCH_RANGES=1`` names the parts of a speculative step in traces.
"""

from __future__ import annotations

import importlib
import os

TYPE_CHECKING = False  # typing would be imported for it in every process of an engine
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

try:
    _hooks = importlib.import_module("wrapt")
except ImportError:  # another engine's environment
    _hooks = importlib.import_module("after_import")
register_post_import_hook = _hooks.register_post_import_hook


def _widen(loader: Any) -> None:
    bound = float(os.environ.get("BENCH_WEIGHT_RANGE", "3e-2"))
    draw = loader.initialize_dummy_weights

    def initialize_dummy_weights(model: Any) -> None:
        draw(model, low=-bound, high=bound)
        for name, tensor in model.state_dict().items():
            if name.endswith(("weight_scale", ".k_scale", ".v_scale")):
                tensor.fill_(1.0)
        if hasattr(model, "vision_tower") or os.environ.get("BENCH_UNIT_NORMS") == "1":
            for name, tensor in model.state_dict().items():
                _let_images_through(name, tensor)
        if getattr(model, "token_ordering", None) is not None:
            _order_tokens(model.token_ordering)
        if os.environ.get("BENCH_AGREEING"):
            _agree(model, *os.environ["BENCH_AGREEING"].split(":"))
        for module in model.modules():
            _tie_values_to_keys(module)
        if os.environ.get("BENCH_KV_SCALES") and not hasattr(model, "backbone_hidden_size"):
            k, v = os.environ["BENCH_KV_SCALES"].split(":")
            _scale_caches(model, float(k), float(v))
        if os.environ.get("BENCH_CHECKPOINT"):
            _keep(model, os.environ["BENCH_CHECKPOINT"])

    loader.initialize_dummy_weights = initialize_dummy_weights


NARROW = 1.1e-3  # what vLLM draws by itself lies below


def _widen_vllm(utils: Any) -> None:
    """Of each function that draws; the older one has bounds, in others they are fixed."""
    import inspect

    bound = float(os.environ.get("BENCH_WEIGHT_RANGE", "3e-2"))

    def widened(draw: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(draw)
        bounds = {"low", "high"} <= set(signature.parameters)

        def drawn(what: Any, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(what, *args, **kwargs)
            if bounds:
                given.arguments |= {"low": -bound, "high": bound}
                return draw(*given.args, **given.kwargs)
            draw(*given.args, **given.kwargs)
            for tensor in what.state_dict().values() if hasattr(what, "state_dict") else [what]:
                if tensor.is_floating_point() and tensor.numel() and tensor.abs().max() < NARROW:
                    tensor.data.mul_(bound / 1e-3)

        return drawn

    for name in ("initialize_dummy_weights", "initialize_single_dummy_weight"):
        if hasattr(utils, name):
            setattr(utils, name, widened(getattr(utils, name)))


def _let_images_through(name: str, tensor: Any) -> None:
    """Infinite bounds; norms and scales around one; attention's logits of ordinary size."""
    if name.endswith(("put_min", "put_max")):
        tensor.fill_(float("-inf" if name.endswith("min") else "inf"))
    elif "q_norm" in name or "k_norm" in name:
        tensor.add_(tensor.numel() ** -0.25)
    elif "norm" in name or name.endswith(("layer_scalar", "std_scale")):
        tensor.add_(1)


def _tie_values_to_keys(module: Any) -> None:
    """Where a checkpoint has one projection for both, SGLang's loader fills both with it."""
    config = getattr(module, "config", None)
    one = getattr(config, "attention_k_eq_v", False) and hasattr(module, "qkv_proj")
    full = getattr(module, "sliding_window", None) in (None, -1)  # -1 in later releases
    if one and full and not module.is_kv_shared_layer:
        weight, first = module.qkv_proj.weight.data, module.q_size
        if weight.element_size() == 1:  # quantised before it was drawn: [in, out]
            weight = weight.t()
        weight[first + module.kv_size :] = weight[first : first + module.kv_size]


def _scale_caches(model: Any, k: float, v: float) -> None:
    """Parameters and floats, as SGLang has both where a checkpoint has scales."""
    import torch

    device = next(model.parameters()).device
    for module in model.modules():
        shared = getattr(module, "is_kv_shared_layer", None)
        if shared is None or not hasattr(module, "attn"):
            continue
        for name, scale in (("k_scale", k), ("v_scale", v)):
            value = torch.tensor(1.0 if shared else scale, dtype=torch.float32, device=device)
            setattr(module.attn, name, torch.nn.Parameter(value, requires_grad=False))
            setattr(module.attn, f"{name}_float", value.item())


KEPT = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "layer_scalar")


def _keep(model: Any, folder: str) -> None:
    """Small weights that norms, scales and graphs of patches follow, by a checkpoint's names."""
    from safetensors.torch import save_file

    ends = tuple(f"layers.0.{name}{end}" for name in KEPT for end in (".weight", ""))
    kept = {
        name if name.startswith("model.") else f"model.{name}": tensor.cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.endswith(ends) and "vision" not in name
    }
    os.makedirs(folder, exist_ok=True)
    save_file(kept, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def _size_pools(module: Any) -> None:
    size = int(float(os.environ["BENCH_POOL_GIB"]) * 2**30)
    for name in ("ModelRunnerKVCacheMixin", "KVCacheConfigurator"):  # the latter in later releases
        owner = vars(module).get(name)
        if owner is not None:
            owner._profile_available_bytes = lambda self, before: size


def _order_tokens(ordering: Any) -> None:
    """Each token once: whole numbers are not drawn."""
    import torch

    drawn = torch.randperm(len(ordering), generator=torch.Generator().manual_seed(0))
    ordering.copy_(drawn)


def _agree(model: Any, fraction: str, seed: str, seen_width: str) -> None:
    from bench.inside import agreeing

    agreement = agreeing.Agreement(model.config.vocab_size, float(fraction), int(seed))
    if hasattr(model, "backbone_hidden_size"):
        agreeing.fill_assistant(model, agreement)
    else:
        agreeing.fill_target(model, agreement, int(seen_width))


def _named(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    import functools

    import torch

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            return method(*args, **kwargs)

    return call


def _name_parts(module: Any) -> None:
    """Draft, verification and seed step as ranges in a profiler's trace."""
    worker = module.FrozenKVMTPWorker
    for method, name in (
        ("draft", "mtp draft"),
        ("verify", "mtp verify"),
        ("forward_draft_extend_after_decode", "mtp seed"),
    ):
        setattr(worker, method, _named(getattr(worker, method), name))


def _name_parts_ahead(module: Any) -> None:
    """The same where the worker runs ahead of the GPU; its draft is a function that a patch replaces."""
    import contextlib

    import torch

    span, names = module.spec_stage_span, {"draft": "mtp draft", "draft_extend": "mtp seed"}

    @contextlib.contextmanager
    def spec_stage_span(name: str) -> Iterator[None]:
        with span(name), torch.profiler.record_function(names.get(name, name)):
            yield

    module.spec_stage_span = spec_stage_span
    worker = module.FrozenKVMTPWorkerV2
    worker.verify = _named(worker.verify, "mtp verify")


def _exact_attention(module: Any) -> None:
    from bench.inside import exact_attention

    exact_attention.install(module)


def _steps(module: Any) -> None:
    from bench.inside import steps

    steps.install(module)


if "BENCH_PATCHED" in os.environ:
    register_post_import_hook(_widen, "sglang.srt.model_loader.loader")
    register_post_import_hook(_widen_vllm, "vllm.model_executor.model_loader.weight_utils")
    if os.environ.get("BENCH_POOL_GIB"):
        for module in (
            "sglang.srt.model_executor.model_runner_kv_cache_mixin",
            "sglang.srt.mem_cache.kv_cache_configurator",
        ):
            register_post_import_hook(_size_pools, module)
    if os.environ.get("BENCH_RANGES") == "1":
        worker = "sglang.srt.speculative.frozen_kv_mtp_worker"
        register_post_import_hook(_name_parts, worker)
        register_post_import_hook(_name_parts_ahead, f"{worker}_v2")
    if os.environ.get("BENCH_EXACT_ATTENTION") == "1":
        for kernel in ("extend_attention", "decode_attention"):
            for package in (
                "sglang.srt.layers.attention.triton_ops",
                "sglang.kernels.ops.attention",
            ):
                register_post_import_hook(_exact_attention, f"{package}.{kernel}")
    if os.environ.get("BENCH_STEPS") == "1":
        register_post_import_hook(_steps, "sglang.srt.managers.scheduler")
    if os.environ["BENCH_PATCHED"] == "1":
        import gemma4_turbo

        gemma4_turbo.bootstrap()
