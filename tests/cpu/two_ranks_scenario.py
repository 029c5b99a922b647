"""Two processes of tensor parallelism over gloo on the CPU, with SGLang's own groups and layers, sharded.

What each of them saw is printed as JSON, a list of two. Kernels run in Triton's interpreter.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
import torch.distributed as dist

from gemma4_turbo.cli import sglang_process
from gemma4_turbo.instance import ENGINE
from gemma4_turbo.kernels import skinny_gemm as product
from gemma4_turbo.runtime import ranks
from tests.cpu.two_processes import both

KINDS = ("dense", "moe", "ple")
STEPS = ("layer_norms", "input_norm", "ple_tail", "mlp_stream")
SHARDED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "experts")
OF_A_LAYER = {"dense": 2, "moe": 3, "ple": 2}
"""Sums over the GPUs: attention's, the dense MLP's, the experts'."""
_sums: list[tuple[list[int], str]] = []


def newest() -> bool:
    """Whether the installed SGLang publishes its arguments to a context, as from 0.5.22 on."""
    from sglang.srt import server_args

    return hasattr(server_args.ServerArgs, "resolve_once")


def join(rank: int, port: int) -> None:
    """This process's place among the two, as a server tells it."""
    from sglang.srt.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        parallel_state,
    )
    from sglang.srt.distributed.device_communicators import pynccl
    from sglang.srt.layers.moe.utils import initialize_moe_config

    pynccl.NCCLLibrary = _no_nccl  # as where there is none
    parallel_state.set_custom_all_reduce(False)

    arguments: tuple[Any, ...] = ()
    widths: dict[str, int] = {}
    if newest():
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import ServerArgs

        given = ServerArgs(model_path="dummy", device="cpu", tp_size=2)
        publish(given, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    else:
        arguments = (sglang_process._arguments({"tp_size": 2}),)
        widths = {"tensor_model_parallel_size": 2}
        import_module("sglang.srt.layers.dp_attention")._ATTN_DP_SIZE = 1  # as a server sets it
    init_distributed_environment(
        world_size=2,
        rank=rank,
        local_rank=rank,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="gloo",
    )
    initialize_model_parallel(**widths)
    initialize_moe_config(*arguments)


def _no_nccl(*args: Any) -> Any:
    raise OSError("no GPU")


def models() -> Any:
    """What builds and runs the line's model."""
    if newest():
        return import_module("tests.cpu.ports.v0_5_23.models")
    return import_module("tests.cpu.ports.v0_5_12.decode_step.test_forwards")


def built(kind: str, rank: int) -> Any:
    """The line's model, its shards different ones, everything else alike."""
    model = models().build(kind)
    for name, parameter in model.named_parameters():
        mine = rank if any(part in name for part in SHARDED) else 0
        generator = torch.Generator().manual_seed(crc32(name.encode()) + mine)
        low, high = (0.5, 2.0) if "norm" in name or "scale" in name else (-0.1, 0.1)
        parameter.data.uniform_(low, high, generator=generator)
    return model


def digest(x: torch.Tensor) -> str:
    """Of a tensor's bits."""
    return hashlib.sha256(x.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def watch_sums() -> None:
    """Keep the shape and the bits of all that goes into a sum over the two."""
    reduce = dist.all_reduce

    def all_reduce(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype == torch.bfloat16:
            _sums.append((list(x.shape), digest(x)))
        return reduce(x, *args, **kwargs)

    dist.all_reduce = all_reduce


def once(model: Any, tokens: int = 2) -> dict[str, Any]:
    """One step: what came out, and what was summed on the way."""
    _sums.clear()
    out = models().run(model, tokens)
    return {
        "out": digest(out),
        "sums": [shape for shape, _ in _sums],
        "parts": [bits for _, bits in _sums],
        "tensor": out,
    }


def told(step: dict[str, Any]) -> dict[str, Any]:
    """Without the tensor."""
    return {name: value for name, value in step.items() if name != "tensor"}


def far(one: dict[str, Any], other: dict[str, Any]) -> float:
    """In parts of the largest."""
    a, b = one["tensor"].float(), other["tensor"].float()
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def applied(*names: str) -> Iterator[None]:
    """These patches, none of their calls declined so far; stock again at the end."""
    for run in ENGINE.runs.values():
        run._decline_reason = ""
    ENGINE.apply(only=[*names])
    yield
    ENGINE.revert()


def engaged(*names: str) -> dict[str, int]:
    """Calls so far."""
    return {name: ENGINE.runs[name].counters.engaged for name in names}


def patched(model: Any, *names: str, tokens: int = 2) -> dict[str, Any]:
    """One step with these patches."""
    with applied(*names):
        before = engaged(*names)
        step = once(model, tokens)
        after = engaged(*names)
        step["engaged"] = {name: after[name] - before[name] for name in names}
        step["reasons"] = {name: ENGINE.runs[name].full_reason() for name in names}
        step["states"] = {name: ENGINE.runs[name].state for name in names}
    return step


def forwards(rank: int) -> dict[str, Any]:
    """Stock, the rewritten forward without a step, and with all of them."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = built(kind, rank)
        stock = once(model)
        with applied("layer_norms"):
            run, layer_steps.LAYER_NORMS.run = layer_steps.LAYER_NORMS.run, None
            bare = once(model)
            layer_steps.LAYER_NORMS.run = run
        every = patched(model, *STEPS, "skinny_gemm")
        few = patched(model, "mlp_few")
        found[kind] = {
            "stock": told(stock),
            "bare": told(bare),
            "patched": {**told(every), "far": far(every, stock)},
            "mlp_few": {**told(few), "far": far(few, stock)},
        }
    return found


def beside(model: Any) -> dict[str, Any]:
    """`mlp_stream` as on a GPU while a graph is captured, its streams written down."""
    order: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            order.append("wait")

    @contextmanager
    def stream(of: Any) -> Iterator[None]:
        order.append("branch")
        yield
        order.append("back")

    stock = once(model)
    reduce = dist.all_reduce

    def all_reduce(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        order.append("sum")
        return reduce(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        cuda = SimpleNamespace(current_stream=Stream, stream=stream, Stream=lambda of: Stream())
        fake = SimpleNamespace(**{**vars(torch), "cuda": cuda})
        patch.setattr(layer_steps, "torch", fake)
        patch.setattr(layer_steps, "capturing", lambda: True)
        patch.setattr(dist, "all_reduce", all_reduce)
        step = patched(model, "mlp_stream")
    layer_steps._streams.clear()
    return {**told(step), "order": order, "stock": told(stock)}


class NoMemoryError(RuntimeError):
    """What is injected."""


def _no_memory(*args: Any) -> Any:
    raise NoMemoryError("out of memory")


def timed_questions(patch: pytest.MonkeyPatch) -> list[float]:
    """Filled with what each question of this process takes from now on."""
    seconds: list[float] = []
    agreed = ranks.agreed

    def timed(*args: Any) -> Any:
        started = time.monotonic()
        found = agreed(*args)
        seconds.append(time.monotonic() - started)
        return found

    patch.setattr(ranks, "agreed", timed)
    return seconds


def wait_again(rank: int) -> None:
    """As if no wait had been in vain: no fault is another's."""
    dist.barrier()
    if rank == 0:
        for patch in ("skinny_gemm/", ""):
            ranks._store().delete_key(f"gemma4_turbo/0-1/{patch}{ranks.IN_VAIN}")
    dist.barrier()


def faults(rank: int) -> dict[str, Any]:
    """Something goes wrong on GPU 1 alone."""
    from gemma4_turbo.fusions import norm_kinds
    from gemma4_turbo.fusions.skinny_gemm import SkinnyGemm

    found: dict[str, Any] = {}
    launch = SkinnyGemm.launch

    def rounded(self: Any, args: Any, kind: int) -> torch.Tensor:
        """Another result of the kernel's, within its bounds: on a CPU it has stock's bits too often."""
        return launch(self, args, kind) * (1 + 2**-7)

    def here(where: Any, what: str, how: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
        if rank == 1:
            patch.setattr(where, what, how)

    with pytest.MonkeyPatch.context() as patch:  # its comparison cannot be made
        here(SkinnyGemm, "like", _no_memory, patch)
        patch.setattr(SkinnyGemm, "launch", rounded)
        found["self-check"] = told(patched(built("ple", rank), "skinny_gemm", "ple_tail"))
    found["afterwards"] = told(patched(built("ple", rank), "skinny_gemm", "ple_tail"))
    with pytest.MonkeyPatch.context() as patch:  # and nobody tells the other one
        here(SkinnyGemm, "like", _no_memory, patch)
        patch.setattr(SkinnyGemm, "launch", rounded)
        patch.setattr(ranks, "_group_of", [])
        patch.setattr(ranks, "told_by", lambda group: None)
        found["alone"] = told(patched(built("ple", rank), "skinny_gemm", "ple_tail"))
    choose = product.choose

    def others(*args: Any, **options: Any) -> product.Config:
        return choose(*args, **options)._replace(split=2)

    with pytest.MonkeyPatch.context() as patch:  # its profile, or its processors, are others
        patch.setattr(ranks, "PATIENCE_S", 0.3)
        here(product, "choose", others, patch)
        found["other tiles"] = told(patched(built("ple", rank), "skinny_gemm", "ple_tail"))
    wait_again(rank)
    model = built("dense", rank)
    with pytest.MonkeyPatch.context() as patch:  # it never comes to the question
        patch.setattr(ranks, "PATIENCE_S", 1.0)
        seconds = timed_questions(patch)
        if rank == 1:
            for layer in model.layers:
                for module in layer.modules():
                    if hasattr(module, "quant_method"):
                        module.register_forward_hook(lambda *args: None)
        found["never asks"] = told(patched(model, "skinny_gemm"))
        found["never asks"]["seconds"] = list(seconds)
        found["asks later"] = told(patched(built("dense", rank), "skinny_gemm"))
    model = built("dense", rank)
    with pytest.MonkeyPatch.context() as patch:  # of a patch with stock's bits: nobody need know
        other = norm_kinds.Kinds(reason="self-check: RMSNorm differs")
        here(norm_kinds, "find", lambda *args: other, patch)
        found["bitwise"] = told(patched(model, "layer_norms"))
    return found


def prefills(rank: int) -> dict[str, Any]:
    """Layers that share KV (0.5.12.post1): stock, the cut, and a tail that fails on GPU 1 alone."""
    from gemma4_turbo.ports.any.prefill import yoco_cut
    from tests.cpu import shared_kv

    model = shared_kv.build()
    run = ENGINE.runs["yoco"]

    def told() -> dict[str, Any]:
        run._decline_reason = ""
        batch = shared_kv.Memory().prefill({1: 5, 2: 6}, {})
        out = model(batch.input_ids, batch.positions, batch)
        return {
            "rows": digest(out[shared_kv.last_rows(batch)]),
            "reason": run.full_reason(),
            "state": run.state,
        }

    found = {"stock": told()}
    with pytest.MonkeyPatch.context() as patch:
        ENGINE.apply(only=["yoco"])
        found["none"] = told()
        if rank == 1:
            patch.setattr(yoco_cut, "tail", _no_memory)
        found["tail"] = told()
        ENGINE.revert()
    return found


def pictures(rank: int) -> dict[str, Any]:
    """Two images in one batch, and an encoder that fails on GPU 1 alone behind its first sum."""
    from tests.cpu import vision

    model = vision.model("triton_attn")
    items = [vision.image(4, 4, seed=seed) for seed in (1, 2)]
    layer = type(model.vision_tower.encoder.layers[0])
    forward = layer.forward
    calls: list[Any] = []

    def fails_once(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if rank == 1 and len(calls) == 2:
            raise NoMemoryError("no such kernel")
        return forward(*args, **kwargs)

    found: dict[str, Any] = {}
    with applied("vision_batch"), pytest.MonkeyPatch.context() as patch:
        before = engaged("vision_batch")["vision_batch"]
        found["together"] = digest(model.get_image_feature(items))
        found["engaged"] = engaged("vision_batch")["vision_batch"] - before
        patch.setattr(layer, "forward", fails_once)
        try:
            found["fails"] = digest(model.get_image_feature(items))
        except Exception as error:
            found["fails"] = str(error)
    return found


def main() -> None:
    """Both processes; the second one is a fork, so that SGLang is imported once."""
    global layer_steps
    folder = Path(sys.argv[1])
    import sglang.srt.models.gemma4_causal  # noqa: F401

    for module in ("attention.triton_backend", "moe.moe_runner.triton_utils.fused_moe"):
        import_module(f"sglang.srt.layers.{module}")
    from gemma4_turbo.ports.any.decode_step import layer_steps as steps

    layer_steps = steps
    port = sglang_process.free_port()

    def found(rank: int) -> dict[str, Any]:
        join(rank, port)
        watch_sums()
        with few_programs(), norms_as_on_a_gpu(), torch.no_grad():
            seen = {"forwards": forwards(rank), "faults": faults(rank)}
            seen["beside"] = beside(built("moe", rank))
            seen["prefills"] = {} if newest() else prefills(rank)
            seen["pictures"] = pictures(rank)  # the last: a sum stays open
        return seen

    both(folder, found)


layer_steps: Any = None


@contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Where the line's stock on a CPU is another than on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if newest():
            models().norms_as_on_a_gpu(patch)
        with torch._dynamo.config.patch(disable=True):
            yield


@contextmanager
def few_programs() -> Iterator[None]:
    """Products in few programs of the interpreter, K split in two."""
    choose = product.choose

    def few(shape: tuple[int, ...], *args: Any, **options: Any) -> product.Config:
        config = choose(shape, *args, **options)
        return config._replace(block_n=min(256, 1 << (shape[0] - 1).bit_length()), split=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "choose", few)
        yield


if __name__ == "__main__":
    main()
