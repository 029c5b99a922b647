"""Every bitwise fusion: kernel, stock's calls and the reference say the same, as far as a CPU can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma4_turbo.fusions import fusion as fusions
from gemma4_turbo.fusions import layer_tail, router_norm
from gemma4_turbo.fusions.fusion import Fusion, Tensors
from gemma4_turbo.fusions.norm_kinds import Kinds
from gemma4_turbo.fusions.site import Site
from gemma4_turbo.fusions.stock import Functions
from gemma4_turbo.kernels import qkv
from gemma4_turbo.kernels.norms.rmsnorm import Kind, reference_rmsnorm
from tests.fusion_cases import EPS, NAMES, Draw, case, tail

each_case = pytest.mark.parametrize("name", NAMES)


class Stock:
    """Stock's calls in plain torch, rounding where stock rounds."""

    def eager_norms(self) -> Functions:
        """The two norms."""

        def fused_add(x: torch.Tensor, r: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
            total = x.float() + r.float()
            r.copy_(total)
            scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
            x.copy_(total * scale * weight.float())

        return Functions(reference_rmsnorm, fused_add)

    def qkv_rmsnorm(self, q: Any, k: Any, v: Any, qw: Any, kw: Any, *rest: Any) -> None:
        """In place, as stock."""
        *_, head_dim, eps = rest
        normed = qkv.reference_qkv(q, k, v, qw, kw, eps, head_dim)
        for tensor, result in zip((q, k, v), normed, strict=True):
            if tensor is not None:
                tensor.copy_(result)

    def rotate(self, positions: Any, q: Any, k: Any, cache: Any) -> None:
        """In place, as stock."""
        cos, sin = cache[positions][:, None].chunk(2, dim=-1)
        for x in (q, k):
            a, b = x.float().chunk(2, dim=-1)
            x.copy_(torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1))

    def norm_residual(self, x: Any, weight: Any, residual: Any, scalar: Any, eps: float) -> Any:
        """Rounded once."""
        return self._rounded(self._norm(x.float(), weight, eps), residual, scalar)

    def dual_norm_residual(self, *args: Any) -> Any:
        """Rounded once."""
        mlp, w1, experts, w2, weight, residual, scalar, (eps1, eps2, eps) = args
        both = self._norm(mlp.float(), w1, eps1) + self._norm(experts.float(), w2, eps2)
        return self._rounded(self._norm(both, weight, eps), residual, scalar)

    def sum_experts(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """One choice after the other."""
        out.copy_(sum(x[:, k].float() for k in range(x.shape[1])))  # type: ignore[arg-type]

    @staticmethod
    def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()

    @staticmethod
    def _rounded(x: torch.Tensor, residual: Any, scalar: Any) -> torch.Tensor:
        return ((x + residual.float()) * scalar.float()).bfloat16()


def computed(name: str, by: str) -> Tensors:
    """All that one of the three computes."""
    fusion, args = case(name, "cpu")
    if by == "kernel":
        return fusion.written(args, fusion.launch(args, Kind.PRECISE))
    if by == "reference":
        return fusion.written(args, fusion.reference(args))
    return fusion.written(args, fusion.theirs(Stock(), args))  # type: ignore[arg-type]


def differ(ours: Tensors, theirs: Tensors) -> list[int]:
    """Results that differ by more than the order of a sum explains, an ulp of bf16 or two."""
    pairs = list(zip(ours, theirs, strict=True))
    assert all((a is None) == (b is None) for a, b in pairs)
    slack = 2 * torch.finfo(torch.bfloat16).eps
    return [
        i
        for i, (a, b) in enumerate(pairs)
        if a is not None
        and b is not None
        and not torch.allclose(a.float(), b.float(), rtol=slack, atol=slack)
    ]


@each_case
@pytest.mark.parametrize("by", ["stock", "reference"])
def test_the_kernel_computes_what_stock_does(name: str, by: str):
    assert differ(computed(name, "kernel"), computed(name, by)) == []


class Made(TorchDispatchMode):
    """Counts tensors of stock's own that a call fills or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.ops.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(op in ("ones_like", "empty_like") for op in self.ops)


@each_case
def test_a_repeated_call_is_stocks(name: str):
    """What stock makes once is made before: a benchmark times the calls alone."""
    fusion, args = case(name, "cpu")
    call = fusion.repeated(Stock(), args)  # type: ignore[arg-type]
    with Made() as made:
        found = fusion.written(args, call())
    assert made.ops
    assert made.count == 0
    assert differ(found, computed(name, "stock")) == []
    once = {"layer_norms, router": 1, "router_norm": 1, "experts_sum": 1}.get(name, 0)
    fusion, args = case(name, "cpu")
    with Made() as made:
        fusion.theirs(Stock(), args)  # type: ignore[arg-type]
    assert made.count == once


def test_a_shared_keys_zeros_are_of_its_heads():
    """They are what stock rotates."""
    fusion, args = case("rope_store, shared KV", "cpu")
    turned: list[Any] = []

    class Rotated(Stock):
        def rotate(self, positions: Any, q: Any, k: Any, cache: Any) -> None:
            turned.append(k)

    for heads in (1, 2):
        fusion.theirs(Rotated(), args, heads)  # type: ignore[arg-type, call-arg]
    assert [k.shape for k in turned] == [(3, 1, 128), (3, 2, 128)]
    assert not any(k.any() for k in turned)


@each_case
def test_its_arguments_fit(name: str):
    fusion, args = case(name, "cpu")
    assert fusion.unfit(args) is None


@each_case
def test_what_a_self_check_draws(name: str):
    """The same every time, though a call overwrites it; for the kernel; this call's weights."""
    fusion, args = case(name, "cpu")
    first = fusion.drawn(args)
    ours = {
        field: value
        for field, value in first._asdict().items()
        if isinstance(value, torch.Tensor) and value is not getattr(args, field)
    }
    kept = {field: value.clone() for field, value in ours.items()}
    assert kept
    for value in ours.values():
        value.fill_(7.0)  # as a launch would, which takes a second for as many rows
    second, third = fusion.drawn(args), fusion.drawn(args)
    assert fusion.unfit(second) is None
    for field, a, b in zip(second._fields, second, third, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field
            assert torch.equal(a, kept.get(field, a)), field
        if "weight" in field:
            assert a is getattr(args, field)


def test_the_next_norm_is_compared_alike_whoever_calls_first():
    """Layers share a verdict: one whose experts nobody has summed yet compares what the others do."""
    fusion = layer_tail.LayerTail("input_norm")
    every = [fusion.drawn(tail(Draw("cpu"), 512, how, True)) for how in ("summed", "unsummed")]
    for drawn in every:
        assert drawn.residual.shape == (96, 512)
        assert drawn.experts is not None
        assert drawn.experts.output.shape == (96, 512)


@each_case
def test_a_self_check_sees_one_wrong_number(name: str, monkeypatch: pytest.MonkeyPatch):
    """With stock's calls in the kernel's place it finds nothing; with one number changed, that one."""
    fusion, args = case(name, "cpu")
    monkeypatch.setattr(fusions, "followed", Stock)
    monkeypatch.setattr("gemma4_turbo.fusions.qkv.followed", Stock)
    wrong: list[int] = []

    def launch(args: Any, kind: int) -> Any:
        result = fusion.theirs(Stock(), args)  # type: ignore[arg-type]
        for tensor in fusion.written(args, result)[: len(wrong)]:
            assert tensor is not None
            tensor[1, 3] += tensor[1, 3].abs() + 1
        return result

    monkeypatch.setattr(fusion, "launch", launch)
    if isinstance(fusion, fusions.Fusion) and fusion.patch in ("qkv_norm", "rope_store"):
        monkeypatch.setattr(qkv, "launch_qkv", lambda *args: launch(type(second)(*args[:9]), 0))
    second = fusion.drawn(args)
    assert fusion.differing(args, Kind.PRECISE) == 0
    wrong.append(1)
    times = 2 if fusion.patch in ("qkv_norm", "rope_store") else 1  # one head a program, several
    assert fusion.differing(args, Kind.PRECISE) == times


def every_fusion() -> list[Fusion[Any, Any]]:
    """The instances that the ports' forwards call."""
    from gemma4_turbo.ports.any import linear
    from gemma4_turbo.ports.any.decode_step import attention, layer_steps, mlp_few
    from gemma4_turbo.ports.any.experts import feed_forward_few, router_few
    from gemma4_turbo.ports.v0_5_12.experts import router_norm

    modules = (attention, feed_forward_few, layer_steps, linear, mlp_few, router_few, router_norm)
    every = {id(x): x for module in modules for x in vars(module).values()}
    return [x for x in every.values() if isinstance(x, Fusion)]


@pytest.mark.parametrize(
    "fusion", every_fusion(), ids=lambda fusion: f"{type(fusion).__name__} of {fusion.patch}"
)
def test_verify_compares_every_fusion(fusion: Fusion[Any, Any]):
    """A port's row in a wiring table has no comparison of its own: it is the fusion's."""
    checks = fusion.checks("cpu")
    assert checks
    assert [check for check in checks if not check.passed] == []
    assert {check.patch for check in checks} == {fusion.patch}
    assert all(check.compared for check in checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_what_stands_for_weights_that_say_nothing_overflows_in_no_dtype(
    fill: float, dtype: torch.dtype
):
    """A layer whose weights come later: its verdict would be every layer's of the shape."""
    from gemma4_turbo.fusions import router_few, skinny_gemm
    from gemma4_turbo.kernels.skinny_gemm import ROWS, Epilogue, cut

    zeros = torch.zeros(4096, dtype=torch.int32)
    x, scale = torch.ones(1, 1024, dtype=dtype), torch.ones(128, dtype=dtype)
    weight = torch.full((128, 1024), fill, dtype=dtype)
    for epilogue in Epilogue:
        extra = torch.ones(1, 128, dtype=dtype) if epilogue is Epilogue.GELU_TIMES else None
        cuts = tuple(cut(weight, epilogue, rows) for rows in ROWS)
        of_skinny = skinny_gemm.Args(x, weight, cuts, epilogue, extra, zeros)
        assert skinny_gemm.SkinnyGemm("skinny_gemm").differing(of_skinny, 0) == 0
    of_router = router_few.Args(x, weight, scale, 8, zeros)
    assert router_few.RouterFew("router_few").differing(of_router, 0) == 0


def test_a_kernel_without_a_traced_form_is_not_in_traced_code():
    """Stock's calls are made there; nothing is asked of the class that it does not have."""
    site = Site((), None)
    site.kinds = Kinds()
    site.router_norm = None  # type: ignore[attr-defined]

    class Eager(Fusion[Any, Any]):
        """Has a `launch` alone."""

    assert router_norm.RouterNorm("router_norm").fits_traced(site, None)
    assert not Eager("router_norm").fits_traced(site, None)


def test_verify_sees_one_wrong_number(monkeypatch: pytest.MonkeyPatch):
    """And says so if a kernel does not take what is drawn for it."""
    fusion = router_norm.RouterNorm("router_norm")
    launch = fusion.launch

    def wrong(args: Any, kind: int) -> torch.Tensor:
        found = launch(args, kind)
        found[1, 3] += found[1, 3].abs() + 1
        return found

    monkeypatch.setattr(fusion, "launch", wrong)
    assert [check.passed for check in fusion.checks("cpu")] == [False]
    monkeypatch.setattr(fusion, "unfit", lambda args: "not these")
    with pytest.raises(ValueError, match="not these"):
        fusion.checks("cpu")


def test_every_bitwise_fusion_is_here():
    """Each fusion of the ports that is compared with stock's bits has a case."""
    from gemma4_turbo.fusions.projection import QProjection
    from gemma4_turbo.fusions.skinny_gemm import SkinnyGemm
    from gemma4_turbo.ports.any import linear
    from gemma4_turbo.ports.any.decode_step import attention, layer_steps
    from gemma4_turbo.ports.v0_5_12.experts import router_norm

    modules = (attention, layer_steps, linear, router_norm)
    kinds = {type(value) for module in modules for value in vars(module).values()}
    bitwise = {
        kind for kind in kinds if issubclass(kind, Fusion) and kind not in (QProjection, SkinnyGemm)
    }
    assert bitwise == {type(case(name, "cpu")[0]) for name in NAMES}


def test_epsilons_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    """Each norm is given its own, in kernel and stock alike."""
    for name in ("layer_norms, router", "input_norm, experts", "ple_tail, next norm"):
        fusion, args = case(name, "cpu")
        fields = [field for field in args._fields if field.endswith("eps")]
        assert fields
        for place, field in enumerate(fields):
            fusion, args = case(name, "cpu")
            _, others = case(name, "cpu")
            eps = EPS + 0.5 * (place + 1)
            ours = fusion.written(args, fusion.launch(args._replace(**{field: eps}), Kind.PRECISE))
            theirs = fusion.theirs(Stock(), others._replace(**{field: eps}))  # type: ignore[arg-type]
            assert differ(ours, fusion.written(others, theirs)) == [], (name, field)
            plain = computed(name, "kernel")
            assert differ(ours, plain) != [], (name, field)
