"""`mlp_few` in a layer without experts: one launch computes its dense MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gemma4_turbo.fusions import mlp_few
from gemma4_turbo.fusions.site import UNPROVEN, Site, eager_site_of
from gemma4_turbo.kernels import mlp_few as kernel
from gemma4_turbo.ports.any import linear, sglang_types
from gemma4_turbo.runtime.custom_ops import TRACED

if TYPE_CHECKING:
    from gemma4_turbo.ports.any.model_protocols import MLP

MLP_FEW = mlp_few.MlpFew("mlp_few")
NAME = "mlp_few"

TOO_MANY_TOKENS = f"more than {mlp_few.MOST_TOKENS} tokens"
BESIDE_EXPERTS = "the layer has experts, which run beside its dense MLP"


class MlpSite(Site):
    """What a dense MLP allows, looked at once."""

    def __init__(self, module: MLP) -> None:
        products = module.gate_up_proj, module.down_proj
        reasons = (linear.module_unfit(product) for product in products)
        self.mlp_few: str | None = next(filter(None, reasons), UNPROVEN)
        key: tuple[object, ...] = ()
        if self.mlp_few is UNPROVEN:
            weights = [product.weight for product in products]
            key = (*(tuple(w.shape) for w in weights), weights[0].dtype, str(weights[0].device))
            self.sum = sglang_types.rules().sum_of(module.down_proj)  # over GPUs
        super().__init__(key, None)
        self.cover(NAME, module, *products, module.act_fn)
        self.depends_on(*((module, name) for name in ("gate_up_proj", "down_proj", "act_fn")))
        for product in products:
            self.depends_on(*sglang_types.linear_parts(product))


def mlp(module: MLP, x: torch.Tensor) -> torch.Tensor:
    """The dense MLP of a layer without experts."""
    found = None if MLP_FEW.run is None else _at_once(module, x)
    return linear.mlp(module, x) if found is None else found


def _at_once(module: MLP, x: torch.Tensor) -> torch.Tensor | None:
    """Its output, or None: nothing done, and counted as declined."""
    if torch.compiler.is_compiling():
        MLP_FEW.declined(TRACED)
        return None
    if not 0 < x.shape[0] <= mlp_few.MOST_TOKENS:  # every prefill: no time for more
        MLP_FEW.declined(TOO_MANY_TOKENS if x.shape[0] else "no tokens")
        return None
    reason = linear.mlp_unfit(module)
    if reason is not None:
        MLP_FEW.declined(reason)
        return None
    site = eager_site_of(module, MlpSite)
    if MLP_FEW.settled(site):
        return None
    gate_up, down = module.gate_up_proj.weight, module.down_proj.weight
    counts = linear.zeros_of(module, kernel.COUNTS, x.device)
    args = mlp_few.Args(x, gate_up, down, counts)
    found = MLP_FEW(site, args, sglang_types.batch_invariant_unfit())
    return found if found is None or site.sum is None else site.sum(found)
