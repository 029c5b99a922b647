"""For benchmark engines: a wider range of random weights, the same in stock and patched processes.

SGLang's ``load_format="dummy"`` draws from +-1e-3, which sends nearly all tokens to few experts and
flatters decoding. ``BENCH_WEIGHT_RANGE`` is used instead. ``BENCH_PATCHED=1`` also registers the
patches; without it nothing of gemma4_turbo is imported here.
"""

import functools
import os

import wrapt


def _widen(loader):
    bound = float(os.environ.get("BENCH_WEIGHT_RANGE", "3e-2"))
    loader.initialize_dummy_weights = functools.partial(
        loader.initialize_dummy_weights, low=-bound, high=bound
    )


if "BENCH_PATCHED" in os.environ:
    wrapt.register_post_import_hook(_widen, "sglang.srt.model_loader.loader")
    if os.environ["BENCH_PATCHED"] == "1":
        import gemma4_turbo

        gemma4_turbo.bootstrap()
