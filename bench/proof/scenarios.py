"""Which servers on which models, and what is expected of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench.common.variants import PATCHED
from bench.proof.surroundings import EXACT, HOSTILE, SQUATTED


class Scenario(NamedTuple):
    """Servers on one model: stock, and patched in so many surroundings."""

    name: str
    model: str
    runs: tuple[str, ...] = (PATCHED,)
    arguments: tuple[str, ...] = ()
    bitwise: tuple[str, ...] = ()  # runs that must equal stock bit for bit
    engages: bool = False  # some patch must have run, or nothing was tested
    architecture: str = ""  # every patch stands aside for it


SCENARIOS = (
    Scenario(
        "moe", "moe", (PATCHED, EXACT, HOSTILE, SQUATTED), (), (EXACT, HOSTILE, SQUATTED), True
    ),
    Scenario("hooks", "moe", (PATCHED, EXACT), (), (EXACT,), True),
    Scenario("fp8", "moe", arguments=("--quantization", "fp8")),
    Scenario("awq", "awq", arguments=("--quantization", "awq", "--dtype", "float16")),
    Scenario("llama", "llama", bitwise=(PATCHED,), architecture="LlamaForCausalLM"),
    Scenario("marlin", "marlin"),
)
# Compiled while the first servers start, instead of while one is waited for.
MARLIN = """
import torch
try:
    from sglang.jit_kernel import awq_marlin_repack, gptq_marlin
except ImportError:  # later releases
    from sglang.kernels.ops.gemm import gptq_marlin
    from sglang.kernels.ops.quantization import awq_marlin_repack
awq_marlin_repack._jit_awq_marlin_repack_module()
gptq_marlin._jit_gptq_marlin_module(torch.bfloat16)
"""


def write_models(name: str, folder: Path) -> Path:
    """The checkpoint of this name; written once."""
    from bench.models import checkpoints

    return {
        "moe": lambda: checkpoints.write_gemma(folder),
        "awq": lambda: checkpoints.write_awq(folder, checkpoints.MOE, "float16"),
        "marlin": lambda: checkpoints.write_awq(folder, checkpoints.DENSE, "bfloat16"),
        "llama": lambda: checkpoints.write_llama(folder),
    }[name]()
