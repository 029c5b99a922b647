"""Arguments of SGLang's server, under the names that the installed release has for them."""

from __future__ import annotations

import re

from gemma4_turbo.engine.fingerprints import installed_source

RENAMED = {  # of 0.5.12.post1, and what later releases call them
    "cuda_graph_max_bs": "cuda_graph_max_bs_decode",
    "cuda_graph_bs": "cuda_graph_bs_decode",
    "disable_piecewise_cuda_graph": "disable_prefill_cuda_graph",
}


def flag(name: str, source: str | None = None) -> str:
    """``cuda_graph_max_bs`` as ``--cuda-graph-max-bs``, or what took its place.

    SGLang's source is read, not imported: that takes half a minute.

    Args:
        name: as 0.5.12.post1 has it.
        source: of `sglang.srt.server_args` in another environment; None: of the installed release.
    """
    if source is None:
        source = installed_source("sglang.srt.server_args") or ""
    if name in RENAMED and not re.search(rf"\b{name}\b", source):
        name = RENAMED[name]
    return "--" + name.replace("_", "-")
