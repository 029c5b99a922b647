"""Compiles the kernels for GPUs that are not here, and says what each of them takes.

    python -m tests.cpu.kernels.compile_scenario 80:plain,products 90:products

A process of its own: Triton compiles or interprets, decided when it is imported. The kernels are launched
as ever, on tensors of the CPU; Triton is told of a GPU and stops before it would load what it compiled.
One line of JSON for each case and GPU, and one before them for what every kernel compiles anew for.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gemma4_turbo import kernels as package
from gemma4_turbo.kernels import (
    experts_few,
    feed_forward_few,
    mlp_few,
    moe_align,
    pdl,
    qkv,
    router,
    router_few,
    skinny_gemm,
    step_prologue,
    vision_rope,
)
from gemma4_turbo.kernels.attention import decode, extend, extend_tiles, window
from gemma4_turbo.kernels.gpu import Gpu
from gemma4_turbo.kernels.norms import layer_norms, layer_tail, ple_tail, router_norm
from gemma4_turbo.kernels.skinny_gemm import Epilogue

KIB = 1024
GPUS = {
    80: Gpu((8, 0), 108, 163 * KIB),
    86: Gpu((8, 6), 84, 99 * KIB),
    89: Gpu((8, 9), 142, 99 * KIB),
    90: Gpu((9, 0), 132, 227 * KIB),
    100: Gpu((10, 0), 148, 227 * KIB),
    120: Gpu((12, 0), 170, 99 * KIB),
}
EPS, HIDDEN = 1e-6, 2816
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def between() -> Any:
    w, x = rows(HIDDEN), rows(8, HIDDEN)
    given = layer_norms.Router(w, rows(1), EPS, w, EPS)
    return layer_norms.launch_layer_norms(x, x, w, EPS, w, EPS, given, 0)


def tail() -> Any:
    w, x = rows(HIDDEN), rows(8, HIDDEN)
    experts = layer_tail.Experts(rows(8, 8, HIDDEN), w, EPS, w, EPS, True)
    following = layer_tail.NextNorm(w, EPS, 0)
    return layer_tail.launch_layer_tail(x, w, EPS, x, rows(1), experts, following)


def heads(size: int) -> Any:
    store = qkv.Store(ints(8, dtype=torch.int64), rows(64, 2, size), rows(64, 2, size))
    rope = qkv.Rope(ints(8, dtype=torch.int64), rows(64, size, dtype=torch.float32))
    whole = rows(8, 12 * size)
    q, k, v = whole.split([8 * size, 2 * size, 2 * size], dim=-1)
    return qkv.launch_qkv(q, k, v, rows(size), rows(size), EPS, size, rope, store)


def product(rows_of_x: int, epilogue: Epilogue, gpu: Gpu) -> Any:
    weight, memory = rows(4224, HIDDEN), gpu.shared_memory
    config = skinny_gemm.choose(
        tuple(weight.shape), epilogue, gpu.processors, rows_of_x, shared_memory=memory
    )
    arrived = ints(skinny_gemm.tiles(weight, epilogue, config))
    x = rows(rows_of_x, HIDDEN)
    return skinny_gemm.launch_skinny_gemm(x, weight, config, epilogue, None, arrived)


def decoding(batch: int, kv_heads: int, size: int) -> None:
    q, pool = rows(batch, 16, size), rows(64, kv_heads, size)
    config = decode.choose(batch, kv_heads, 16 // kv_heads, size)
    decode.launch_decode_attention(
        q, pool, pool, ints(batch + 1), ints(64, dtype=torch.int64), 1.0, config, 4096,
        ints(batch * kv_heads), torch.empty_like(q),
    )  # fmt: skip


def few_experts(tokens: int) -> Any:
    x, w13, w2 = rows(tokens, HIDDEN), rows(8, 1408, HIDDEN), rows(8, HIDDEN, 704)
    factors, ids = rows(tokens, 8, dtype=torch.float32), ints(tokens, 8)
    tiles = experts_few.choose(8)
    return experts_few.launch_experts_few(x, w13, w2, factors, ids, None, tiles)


def feed_forward(tokens: int) -> Any:
    weights = feed_forward_few.Weights(
        rows(4224, HIDDEN), rows(HIDDEN, 2112), rows(128, HIDDEN), rows(128), rows(8, 1408, HIDDEN),
        rows(8, HIDDEN, 704),
    )  # fmt: skip
    inputs = feed_forward_few.Inputs(*(rows(tokens, HIDDEN) for _ in range(3)))
    counts = ints(feed_forward_few.COUNTS)
    tiles = feed_forward_few.choose(8)
    return feed_forward_few.launch_feed_forward_few(inputs, weights, 8, counts, tiles)


def projected() -> Any:
    return step_prologue.launch_project(
        rows(8, 42 * 256), rows(1), rows(256), EPS, rows(8, 42, 256), rows(1), 0
    )


def rotated(dtype: torch.dtype) -> Any:
    return vision_rope.launch_vision_rope(
        rows(64, 16, 72, dtype=dtype), *(rows(64, 1, 72, dtype=dtype) for _ in range(2))
    )


def extending(size: int, custom: bool, longest: int = 64) -> None:
    q, kv = rows(longest, 16, size), rows(longest, 8 if size == 256 else 2, size)
    masked = {
        "custom_mask": ints(4096, dtype=torch.uint8) if custom else None,
        "mask_indptr": ints(2) if custom else None,
        "window_kv_offsets": ints(2) if custom else None,
        "skip_prefix_custom_mask": True,
        "mask_query_block": 0,
    }
    extend.launch_extend(
        q, kv, kv, kv, kv, ints(2), ints(2), ints(8, dtype=torch.int64), longest, sm_scale=1.0,
        is_causal=True, sliding_window_size=1024 if size == 256 else -1, **masked,
        out=torch.empty_like(q),
    )  # fmt: skip


def plain(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """One pass over some rows."""
    scale, w = rows(1), rows(2560)
    return {
        "layer_norms": between,
        "layer_tail": tail,
        "norm_add": lambda: ple_tail.launch_norm_add(
            rows(8, 2560), w, EPS, rows(8, 2560), scale, w, EPS, 0
        ),
        "qkv": lambda: heads(512),
        "router": lambda: router.launch_routing(rows(8, 128), rows(128), 8),
        "moe_align": lambda: moe_align.launch_align(ints(32, 8), 16, 128),
        "window": lambda: window.launch_window(
            ints(5), ints(4, 2048), 1024, ints(4), ints(4), None, None
        ),
        "gather": lambda: step_prologue.launch_gather(
            ints(8, dtype=torch.int64), rows(64, 2560), 1.0, 64
        ),
        "gelu_mul": lambda: ple_tail.launch_gelu_mul(rows(8, 256), rows(8, 256)),
        "router_norm": lambda: router_norm.launch_router_norm(
            rows(8, HIDDEN), rows(HIDDEN), rows(1), EPS, 0
        ),
        "router_few": lambda: router_few.launch_router_few(
            rows(4, HIDDEN), rows(128, HIDDEN), rows(128), 8, ints(1)
        ),
        "project": projected,
        "vision_rope": lambda: rotated(torch.bfloat16),
        "vision_rope, fp16": lambda: rotated(torch.float16),
        "experts_few": lambda: few_experts(4),
    }


def whole(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """Half a layer in one launch: no tiles, and the longest to compile of those without."""
    mlp = rows(4224, HIDDEN), rows(HIDDEN, 2112), ints(mlp_few.COUNTS)
    return {
        "feed_forward_few": lambda: feed_forward(4),
        "mlp_few": lambda: mlp_few.launch_mlp_few(rows(2, HIDDEN), *mlp, mlp_few.TILES),
    }


def products(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """Whose tiles depend on the GPU."""
    return {
        "skinny_gemm 16": lambda: product(16, Epilogue.NONE, gpu),
        "skinny_gemm 64": lambda: product(64, Epilogue.GELU_AND_MUL, gpu),
        "decode 256": lambda: decoding(8, 8, 256),
        "decode 512": lambda: decoding(32, 2, 512),
        "decode 512, one": lambda: decoding(1, 2, 512),  # with a second launch
    }


def smaller(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """Extend's tiles of the smaller heads, of plain prompts: one kernel."""
    return {"extend 256": lambda: extending(256, False)}


def largest(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """Those of the larger heads, which take the longest to compile."""
    return {"extend 512": lambda: extending(512, False)}


def pictures(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """With a mask there are two kernels: by intervals, and by the mask's bytes. Of the heads that need more."""
    return {"pictures 512": lambda: extending(512, True)}


def few(gpu: Gpu) -> dict[str, Callable[[], Any]]:
    """Few tokens over many keys."""
    return {f"few {size}": lambda size=size: extending(size, False, 4) for size in (256, 512)}  # type: ignore[misc]


KINDS = {
    "plain": plain,
    "whole": whole,
    "products": products,
    "smaller": smaller,
    "largest": largest,
    "pictures": pictures,
    "few": few,
}


# -- Triton without a GPU ---------------------------------------------------------------------------


class Driver:
    """As much of a driver as compiling asks for. Its devices are numbered by their capability."""

    device = 90

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.device, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def compiled(case: Callable[[], Any]) -> list[Any]:
    """The kernels of a launch, compiled and not run."""
    kept: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kept.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kept[-1]

    JITFunction.run = compile_only
    try:
        case()
    finally:
        JITFunction.run = run
    return kept


def resources(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes of it in local memory (spills), and shared memory of a CTA.

    And how many products there are, with a sum in the same instruction and without; and how many instructions
    that fetch into the L2 cache.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, _, local = (int(number) for number in RESOURCES.search(told).groups())  # type: ignore[union-attr]
    shared = kernel.metadata.shared  # what a launch asks for; the binary has the static part only
    ptx = kernel.asm["ptx"]
    products = {"fused": ptx.count("fma"), "products": ptx.count("mul")}
    return {
        "registers": registers,
        "spilled": stack + local,
        "shared": shared,
        **products,
    }


def specialised() -> dict[str, list[str]]:
    """By kernel, the arguments of which a value can be a kernel of its own."""
    found = {}
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[name] = [
                    p.name for p in value.params if not p.is_constexpr and not p.do_not_specialize
                ]
    return found


def main(wanted: list[str]) -> None:
    """Each is a compute capability and kinds of cases."""
    print(json.dumps({"specialised": specialised()}), flush=True)
    driver.set_active(Driver())  # type: ignore[arg-type]
    decode.gpu = extend.gpu = extend_tiles.gpu = lambda device: GPUS[Driver.device]
    pdl.supported = lambda device: Driver.device >= 90
    for one in wanted:
        capability, _, kinds = one.partition(":")
        Driver.device = int(capability)
        pdl.wanted = Driver.device >= 90
        cases = {}
        for kind in kinds.split(","):
            cases |= KINDS[kind](GPUS[Driver.device])
        for name, case in cases.items():
            row: dict[str, Any] = {"capability": Driver.device, "case": name}
            try:
                kernels = compiled(case)
                row["kernels"] = [[kernel.metadata.name, resources(kernel)] for kernel in kernels]
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).strip()[-300:]}"
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
