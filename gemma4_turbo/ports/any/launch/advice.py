"""What a user should know about an installation, beyond the patches."""

from __future__ import annotations

import copy
import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import ModelConfig

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

# How SGLang records prefill outside the parts that it traces, and of which models it cannot.
RECORDED = ("breakable", "full")
TAKE_PICTURES = ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration")
GEMMA4 = ("Gemma4ForCausalLM", *TAKE_PICTURES)
ONLY_ONE = "You must specify exactly one of input_ids or inputs_embeds"
ENDS = (
    "--cuda-graph-backend-prefill {} with a Gemma 4 that takes pictures ends the server as it starts "
    f"({ONLY_ONE}): leave the option out; mm_prefill_graph, switched on, records breakable graphs"
)
SHARED_KV = (
    "--cuda-graph-backend-prefill {} with a Gemma 4 whose layers share KV (E2B, E4B) ends the server as it "
    "starts (invalid or duplicate attention layer_id): leave the option out, or switch optional_kv on"
)
SHARED_KV_TEXT = (
    "CUDA graphs of prefill ({}) with a Gemma 4 without pictures whose layers share KV (E2B, E4B) end the "
    "server as it starts (invalid or duplicate attention layer_id): set GEMMA4_TURBO_OPTIONAL_KV=1, or "
    "--disable-prefill-cuda-graph"
)
TOKENIZERS = (
    "--tokenizer-worker-num {}: the workers would be stock, and each keeps 2 MiB of GPU memory for every "
    "request with pictures: SGLang starts them without its plugins; a sitecustomize on PYTHONPATH would "
    "reach them, for picture_memory"
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
    return [
        *_long_drafts(server_args),
        *_graphs_that_end(server_args),
        *_graphs_of_text_that_end(server_args),
        *_tokenizers_without_us(server_args),
    ]


def _long_drafts(server_args: object) -> list[str]:
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


def _graphs_that_end(server_args: object) -> list[str]:
    """Graphs of prefill that the user chose, of a model for which recording them ends the server."""
    from gemma4_turbo.engine.run import peer

    chosen = chosen_for_prefill(server_args)
    if chosen not in RECORDED or not hands_over_both():
        return []
    try:
        if not _takes_pictures(server_args):
            return []
        if getattr(_config(server_args).hf_text_config, "num_kv_shared_layers", 0):
            ends = [] if peer("optional_kv").will_run() else [SHARED_KV.format(chosen)]
        else:
            served = chosen == "breakable" and _lent_a_hand(server_args)
            ends = [] if served else [ENDS.format(chosen)]
    except Exception:  # SGLang itself will say what is wrong with them
        return []
    return ends


def _graphs_of_text_that_end(server_args: object) -> list[str]:
    """Graphs of prefill of a model without pictures, which are the default, where layers share KV.

    The model's configuration is read only where `optional_kv` would not help.
    """
    from gemma4_turbo.engine.run import peer

    if not hasattr(server_args, "model_path") or not hands_over_both():
        return []
    if peer("optional_kv").will_run():
        return []
    try:
        config = _config(server_args)
        named = set(getattr(config.hf_config, "architectures", None) or [])
        shares = getattr(config.hf_text_config, "num_kv_shared_layers", 0)
        if not shares or config.is_multimodal or not named & set(GEMMA4):
            return []
        kind = resolved_for_prefill(server_args)
    except Exception:  # SGLang itself will say what is wrong with them
        return []
    return [SHARED_KV_TEXT.format(kind)] if kind in RECORDED else []


def _tokenizers_without_us(server_args: object) -> list[str]:
    """Tokenizer workers that run the image processor and that no way leads into."""
    from gemma4_turbo.engine.run import peer
    from gemma4_turbo.ports.any.launch import routes

    workers = getattr(server_args, "tokenizer_worker_num", None)
    if not isinstance(workers, int) or workers < 2 or not peer("picture_memory").will_run():
        return []
    if routes.SITECUSTOMIZE in routes.bootstrap_routes():
        return []
    try:
        pictures = _takes_pictures(server_args)
    except Exception:  # SGLang itself will say what is wrong with them
        return []
    return [TOKENIZERS.format(workers)] if pictures else []


def chosen_for_prefill(server_args: object) -> str | None:
    """How the user wants prefill to be recorded, None if that is left to SGLang."""
    config = getattr(server_args, "cuda_graph_config", None)
    phase = config.get("prefill") if isinstance(config, dict) else None
    explicit = phase.get("backend") if isinstance(phase, dict) else None
    return explicit or getattr(server_args, "cuda_graph_backend_prefill", None)


def resolved_for_prefill(server_args: object) -> str:
    """How SGLang will record prefill, by the functions that decide it. The arguments stay as they are."""
    from sglang.srt.arg_groups import cuda_graph_hook, overrides

    chosen = chosen_for_prefill(server_args)
    if chosen is not None:
        return chosen
    found = overrides.resolving_view(server_args).cuda_graph_config
    if not hasattr(found, "prefill"):  # nothing was decided yet
        tried = copy.deepcopy(server_args)
        cuda_graph_hook.parse_cuda_graph_config(tried)
        cuda_graph_hook.apply_cuda_graph_compatibility(tried)
        found = overrides.resolving_view(tried).cuda_graph_config
    kind: str = found.prefill.backend
    return kind


def hands_over_both() -> bool:
    """Whether this SGLang records a language model with token ids and embeddings, and Gemma 4's refuses.

    So do 0.5.22 and 0.5.23; by the sources, nothing is imported.
    """
    from gemma4_turbo.engine.fingerprints import installed_source

    recorder = installed_source("sglang.srt.model_executor.runner.prefill_cuda_graph_runner") or ""
    model = installed_source("sglang.srt.models.gemma4_causal") or ""
    return "_build_layer_model_forward_kwargs(" in recorder and ONLY_ONE in model


def _config(server_args: object) -> ModelConfig:
    from sglang.srt.arg_groups import overrides

    before = getattr(server_args, "_model_config", None)
    config: ModelConfig = overrides.model_config_of(server_args)
    if before is None:  # SGLang makes its own when it has completed the arguments
        del server_args._model_config, server_args._model_config_built_from  # type: ignore[attr-defined]
    return config


def _takes_pictures(server_args: object) -> bool:
    config = _config(server_args)
    architectures = getattr(config.hf_config, "architectures", None) or []
    return bool(config.is_multimodal and set(architectures) & set(TAKE_PICTURES))


def _lent_a_hand(server_args: object) -> bool:
    """Whether `mm_prefill_graph` makes them run."""
    from sglang.srt.environ import envs

    from gemma4_turbo.engine.run import peer

    return (
        peer("mm_prefill_graph").will_run()
        and not envs.SGLANG_GEMMA_OUT_OF_PLACE_POSITION_MUTATION.get()
        and getattr(server_args, "pp_size", 1) == 1
    )


def on_installation() -> list[str]:
    """One sentence for each part of the installation that keeps SGLang from what it could do."""
    return [*_no_assistants(), *_no_graphs()]


def _no_graphs() -> list[str]:
    from gemma4_turbo.engine.run import peer

    if not hands_over_both() or peer("mm_prefill_graph").will_run():
        return []
    return [ENDS.format("breakable")]


def _no_assistants() -> list[str]:
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
