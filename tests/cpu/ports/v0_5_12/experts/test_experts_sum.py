"""experts_sum takes over a reduction only where what the experts return is its very buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma4_turbo.instance import ENGINE
from gemma4_turbo.ports.any.decode_step import layer_steps
from tests.cpu.ports.v0_5_12.decode_step import test_forwards as forwards
from tests.cpu.ports.v0_5_12.decode_step.test_forwards import applied, no_grad  # noqa: F401 - fixtures of every test here

NAME = "experts_sum"


def rows_of(x: torch.Tensor, layer: Any, topk: Any) -> torch.Tensor:
    """Every choice's weighted output ``[M, K, N]``, as SGLang's second product leaves it."""
    out = torch.zeros(x.shape[0], topk.topk_ids.shape[1], x.shape[1], dtype=torch.float32)
    for m in range(x.shape[0]):
        for k in range(out.shape[1]):
            expert = int(topk.topk_ids[m, k])
            if expert >= 0:
                gate, up = (layer.w13_weight[expert].float() @ x[m].float()).chunk(2)
                hidden = torch.nn.functional.gelu(gate, approximate="tanh") * up
                out[m, k] = (layer.w2_weight[expert].float() @ hidden) * topk.topk_weights[m, k]
    return out.to(x.dtype).contiguous()


def reduced(
    x: torch.Tensor, layer: Any, topk: Any, after: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """As ``_fused_moe_kernel_sequence`` for few tokens, and what a method does with the result."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    out = torch.full_like(x, torch.nan)
    fused_moe.moe_sum_reduce_torch_compile(rows_of(x, layer, topk), out, 1.0)
    return StandardCombineInput(hidden_states=after(out))


def model_that_ends(after: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """SGLang's unquantised method, whose GPU part is stood in for."""
    model = forwards.build("moe")

    def method(layer: Any, dispatch_output: Any) -> Any:
        return reduced(dispatch_output.hidden_states, layer, dispatch_output.topk_output, after)

    for layer in model.layers:
        layer.moe.experts.quant_method._forward_method = method
    return model


def both(model: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Stock's result, the patched one, and how many calls counted."""
    ENGINE.revert()
    expected = forwards.run(model, tokens=2)
    ENGINE.apply(only=[NAME])
    run = ENGINE.runs[NAME]
    run._decline_reason = ""
    before = run.counters.engaged
    return expected, forwards.run(model, tokens=2), run.counters.engaged - before


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


def test_the_buffer_itself(monkeypatch: pytest.MonkeyPatch):
    launched: list[Any] = []
    launch = layer_steps.layer_tail.kernel.launch_layer_tail
    monkeypatch.setattr(
        layer_steps.layer_tail.kernel,
        "launch_layer_tail",
        lambda *args: launched.append(args) or launch(*args),
    )
    expected, found, engaged = both(model_that_ends(lambda out: out))
    assert engaged == len(launched) == 2
    assert distance(found, expected) < 0.06


@pytest.mark.parametrize(
    "after",
    [lambda out: out + 1.0, lambda out: out.clone(), lambda out: out.T.contiguous().T],
    ids=["added to", "copied", "another layout"],
)
def test_something_else_than_the_buffer(after: Callable[[torch.Tensor], torch.Tensor]):
    """The experts run once more, as stock, and from then on nothing is taken over in the layer."""
    model = model_that_ends(after)
    expected, found, engaged = both(model)
    assert engaged == 0
    assert torch.isfinite(found).all()
    assert distance(found, expected) < 0.06
    assert "goes on with the experts' sum" in ENGINE.runs[NAME].full_reason()
    assert distance(forwards.run(model, tokens=2), expected) < 0.06


@pytest.mark.parametrize("where", ["apply", "combine"])
def test_somebody_adds_to_the_buffer_in_place(where: str):
    """Set on the objects between the reduction and the layer, also when the layer has run."""
    model = model_that_ends(lambda out: out)
    ENGINE.apply(only=[NAME])
    forwards.run(model, tokens=2)
    for layer in model.layers:
        experts = layer.moe.experts
        of = experts.quant_method if where == "apply" else experts.dispatcher
        stock = getattr(of, where)

        def adds(*args: Any, stock: Any = stock, **kwargs: Any) -> Any:
            found = stock(*args, **kwargs)
            (found if isinstance(found, torch.Tensor) else found.hidden_states).add_(1.5)
            return found

        of.__dict__[where] = adds
    expected, found, engaged = both(model)
    assert engaged == 0
    assert distance(found, expected) < 0.06
    assert f"{where} of somebody else's" in ENGINE.runs[NAME].full_reason()


def test_a_call_in_which_nothing_was_taken_is_declined():
    """SGLang's native experts, as Marlin, CUTLASS and DeepGEMM, end in no such reduction."""
    expected, found, engaged = both(forwards.build("moe"))
    assert engaged == 0
    assert "did not end in SGLang's reduction" in ENGINE.runs[NAME].full_reason()
    assert distance(found, expected) < 0.06


@pytest.mark.parametrize("gpu_experts", [64, 128])  # 128: none on the CPU, the control
def test_experts_partly_on_the_cpu(gpu_experts: int, monkeypatch: pytest.MonkeyPatch):
    """SGLang's KTEPWrapperMethod adds theirs to the very buffer, in place: unknown by its type."""
    from sglang.srt.layers.moe import kt_ep_wrapper

    class Gpu:
        def apply(self, layer: Any, dispatch: Any) -> Any:
            return reduced(dispatch.hidden_states, layer, dispatch.topk_output, lambda out: out)

    class Kt(kt_ep_wrapper.KTEPWrapperMethod):  # type: ignore[misc]
        def __init__(self) -> None:
            self.gpu_method, self.num_gpu_experts, self.tp_rank = Gpu(), gpu_experts, 0

        def submit(self, layer: Any, dispatch: Any) -> None:
            ids = dispatch.topk_output.topk_ids
            on_cpu = torch.where(ids >= gpu_experts, ids, torch.full_like(ids, -1))
            topk = dispatch.topk_output._replace(topk_ids=on_cpu)
            self.cpu = rows_of(dispatch.hidden_states, layer, topk)

        def sync(self, x: torch.Tensor) -> torch.Tensor:
            return self.cpu.float().sum(1).to(x.dtype)

    monkeypatch.setattr(
        kt_ep_wrapper,
        "mask_cpu_expert_ids",
        lambda ids, n: torch.where(ids >= n, torch.full_like(ids, -1), ids),
    )
    model = forwards.build("moe")
    for layer in model.layers:
        del layer.moe.experts.quant_method
        layer.moe.experts.quant_method = Kt()
    expected, found, engaged = both(model)
    assert engaged == 0
    assert "KTEPWrapperMethod" in ENGINE.runs[NAME].full_reason() or "Kt" in (
        ENGINE.runs[NAME].full_reason()
    )
    assert distance(found, expected) < 0.02


def test_dependent_launch_counts_layers_in_which_a_kernel_was_launched_so(
    monkeypatch: pytest.MonkeyPatch,
):
    """Not every layer on a GPU that has it."""
    from gemma4_turbo.kernels import pdl

    ENGINE.apply(only=["pdl", "qkv_norm"])
    monkeypatch.setattr(pdl, "supported", lambda device: True)
    monkeypatch.setattr(pdl, "options", lambda like: {"PDL": False})
    run = ENGINE.runs["pdl"]
    run._decline_reason = ""
    before = run.counters.engaged
    model = forwards.build("dense")
    forwards.run(model)
    assert run.counters.engaged == before
    assert "none of the package's kernels" in run.full_reason()

    def counting(like: Any) -> dict[str, Any]:
        pdl.launches += 1
        return {"PDL": False}

    monkeypatch.setattr(pdl, "options", counting)
    forwards.run(model)
    assert run.counters.engaged == before + 2
