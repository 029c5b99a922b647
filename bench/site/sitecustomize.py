"""For benchmark engines: a wider range of random weights, the same in stock and patched processes.

SGLang's ``load_format="dummy"`` draws from +-1e-3, which sends nearly all tokens to few experts and
flatters decoding. ``BENCH_WEIGHT_RANGE`` is used instead. ``BENCH_PATCHED=1`` also registers the
patches; without it nothing of gemma4_turbo is imported here.

``BENCH_POOL_GIB`` is the memory for KV, whatever else lies on the GPU: pools of one size, run after run.

``BENCH_UNPROVEN=1`` lets `mm_prefill_graph` take every model, to find out which come out right.

In a model that takes pictures dummy weights would hide them: the bounds of activations are drawn
too, upper and lower the same number, and norms near zero damp what comes from the images.
"""

import os

import wrapt


def _widen(loader):
    bound = float(os.environ.get("BENCH_WEIGHT_RANGE", "3e-2"))
    draw = loader.initialize_dummy_weights

    def initialize_dummy_weights(model):
        draw(model, low=-bound, high=bound)
        if hasattr(model, "vision_tower"):
            for name, tensor in model.state_dict().items():
                _let_images_through(name, tensor)

    loader.initialize_dummy_weights = initialize_dummy_weights


def _let_images_through(name, tensor):
    """Infinite bounds; norms and scales around one; attention's logits of ordinary size."""
    if name.endswith(("put_min", "put_max")):
        tensor.fill_(float("-inf" if name.endswith("min") else "inf"))
    elif "q_norm" in name or "k_norm" in name:
        tensor.add_(tensor.numel() ** -0.25)
    elif "norm" in name or name.endswith(("layer_scalar", "std_scale")):
        tensor.add_(1)


def _size_pools(module):
    size = int(float(os.environ["BENCH_POOL_GIB"]) * 2**30)
    module.ModelRunnerKVCacheMixin._profile_available_bytes = lambda self, before: size


def _take_every_model(patch):
    patch.unproven = lambda text: None


if "BENCH_PATCHED" in os.environ:
    wrapt.register_post_import_hook(_widen, "sglang.srt.model_loader.loader")
    if os.environ.get("BENCH_POOL_GIB"):
        mixin = "sglang.srt.model_executor.model_runner_kv_cache_mixin"
        wrapt.register_post_import_hook(_size_pools, mixin)
    if os.environ.get("BENCH_UNPROVEN") == "1":
        wrapt.register_post_import_hook(_take_every_model, "gemma4_turbo.patches.mm_prefill_graph")
    if os.environ["BENCH_PATCHED"] == "1":
        import gemma4_turbo

        gemma4_turbo.bootstrap()
