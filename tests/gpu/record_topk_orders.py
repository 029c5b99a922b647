"""Record the order of ties of ``torch.topk`` on this GPU, for the tests of the numpy oracle.

python -m tests.gpu.record_topk_orders > tests/cpu/cuda_topk_orders.json
"""

from __future__ import annotations

import json

import torch

SIZES = [(8, 2), (8, 3), (16, 4), (40, 5), (60, 6), (64, 8), (128, 8), (128, 12), (128, 16)]
SIZES += [(40, 17), (40, 31), (128, 32)]


def main() -> None:
    """Print rows of small integers with the indices that topk returned for them."""
    generator = torch.Generator("cuda").manual_seed(11)
    cases = []
    for experts, topk in SIZES:
        for high in (1, 2, 4):
            x = torch.randint(0, high, (3, experts), device="cuda", generator=generator)
            ids = x.bfloat16().topk(topk, dim=-1)[1]
            assert torch.equal(ids, x.float().topk(topk, dim=-1)[1])
            cases.append({"topk": topk, "rows": x.tolist(), "ids": ids.tolist()})
    device = torch.cuda.get_device_name()
    print(json.dumps({"gpu": device, "torch": torch.__version__, "cases": cases}))


if __name__ == "__main__":
    main()
