"""For benchmark engines: a wider range of random weights, the same in stock and patched processes.

SGLang's ``load_format="dummy"`` draws from +-1e-3, which sends nearly all tokens to few experts and
flatters decoding. ``BENCH_WEIGHT_RANGE`` is used instead. It also draws the bounds of the vision
encoder's activations, all the same number, which would make every image the same: they are infinite
here. ``BENCH_PATCHED=1`` also registers the patches; without it nothing of gemma4_turbo is imported
here.
"""

import os

import wrapt


def _widen(loader):
    bound = float(os.environ.get("BENCH_WEIGHT_RANGE", "3e-2"))
    draw = loader.initialize_dummy_weights

    def initialize_dummy_weights(model):
        draw(model, low=-bound, high=bound)
        for module in model.modules():
            if type(module).__name__.startswith("Clippable"):
                for name, buffer in module.named_buffers(recurse=False):
                    buffer.fill_(float("-inf" if name.endswith("_min") else "inf"))

    loader.initialize_dummy_weights = initialize_dummy_weights


if "BENCH_PATCHED" in os.environ:
    wrapt.register_post_import_hook(_widen, "sglang.srt.model_loader.loader")
    if os.environ["BENCH_PATCHED"] == "1":
        import gemma4_turbo

        gemma4_turbo.bootstrap()
