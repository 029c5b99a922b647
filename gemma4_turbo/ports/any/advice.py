"""What a user should know about an installation, beyond the patches."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata
from pathlib import Path

# The first FlashInfer whose TRT-LLM kernel verifies more tokens with heads of 512 rightly.
FLASHINFER_FOR_LONG_DRAFTS = (0, 6, 14)
LONGEST_DRAFT = 4
TRANSFORMERS_FOR_ASSISTANTS = "5.8.1"
_BACKENDS = (
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "speculative_draft_attention_backend",
)


def installed(package: str) -> str | None:
    """Version of an installed package, None without it. Imports nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """``0.6.11.post1`` as ``(0, 6, 11)``."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def on_launch(server_args: object) -> list[str]:
    """One sentence for each thing in stock's ``ServerArgs`` that is known to go wrong."""
    drafted = getattr(server_args, "speculative_num_draft_tokens", None) or 0
    backends = {getattr(server_args, name, None) for name in _BACKENDS}
    flashinfer = installed("flashinfer-python")
    if (
        "trtllm_mha" not in backends
        or drafted <= LONGEST_DRAFT
        or flashinfer is None
        or release(flashinfer) >= FLASHINFER_FOR_LONG_DRAFTS
    ):
        return []
    needed = ".".join(map(str, FLASHINFER_FOR_LONG_DRAFTS))
    return [
        f"--speculative-num-draft-tokens {drafted} with trtllm_mha gives wrong tokens or an illegal "
        f"address with FlashInfer {flashinfer}: use at most {LONGEST_DRAFT}, triton, or FlashInfer "
        f"{needed}"
    ]


def on_installation() -> list[str]:
    """One sentence for each part of the installation that keeps SGLang from what it could do."""
    from gemma4_turbo.engine.fingerprints import installed_source

    transformers = installed("transformers")
    if transformers is None or installed_source("sglang.srt.models.gemma4_mtp") is None:
        return []
    spec = importlib.util.find_spec("transformers")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if any(Path(folder, "models", "gemma4_assistant").is_dir() for folder in folders):
        return []
    return [
        f"transformers {transformers} cannot read the configuration of an MTP assistant "
        f"(gemma4_assistant): speculative decoding needs transformers {TRANSFORMERS_FOR_ASSISTANTS}"
    ]
