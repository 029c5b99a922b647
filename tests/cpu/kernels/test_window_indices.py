"""The sliding window's slots in Triton's interpreter against plain torch."""

from __future__ import annotations

import pytest
import torch

from gemma4_turbo.kernels.attention import window as kernel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter")

POISON = -777


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("window", [1, 3, 16, 1023])
@pytest.mark.parametrize("lens", [[1], [0, 5, 0], [3, 4, 2, 16, 17, 40, 0], [1500, 1023, 1024, 7]])
def test_slots(lens, window, mapped):
    """Everything equal; beyond the windows nothing is written."""
    generator = torch.Generator().manual_seed(window)
    batch = len(lens)
    req_to_token = torch.randint(0, 5000, (9, 1600), generator=generator, dtype=torch.int32)
    req_to_token[:, 2] = -1
    mapping = torch.randint(0, 900, (5001,), generator=generator) if mapped else None
    requests = torch.randperm(9, generator=generator)[:batch]
    seq_lens = torch.tensor(lens, dtype=torch.int64 if window % 2 else torch.int32)
    indptr = torch.full((12,), POISON, dtype=torch.int32)
    indptr[0] = 0
    indices = torch.full((batch * window + 5,), POISON)
    got = kernel.window_indices(indptr, req_to_token, window, seq_lens, requests, mapping, indices)
    expected = kernel.reference_window(req_to_token, window, seq_lens, requests, mapping)
    assert torch.equal(got[0].long(), expected[0])
    assert torch.equal(got[1][: len(expected[1])], expected[1])
    assert (got[1][len(expected[1]) :] == POISON).all()
    assert torch.equal(got[2], expected[2])
    assert torch.equal(got[3], expected[3])
    assert got[2].dtype == got[3].dtype == seq_lens.dtype
    assert (indptr[batch + 1 :] == POISON).all()
    assert got[1] is indices


def test_room_for_every_window():
    """Without a buffer, one as long as all windows can be."""
    seq_lens = torch.tensor([2, 90])
    indptr = torch.zeros(3, dtype=torch.int32)
    table = torch.arange(200, dtype=torch.int32).view(2, 100)
    got = kernel.window_indices(indptr, table, 7, seq_lens, torch.tensor([1, 0]))
    assert got[1].shape == (14,)
    assert got[1][:9].tolist() == [100, 101, 83, 84, 85, 86, 87, 88, 89]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window": 0}, "window must"),
        ({"seq_lens": torch.empty(0, dtype=torch.int64)}, "seq_lens"),
        ({"seq_lens": torch.ones(2)}, "seq_lens must be 1-D int32 or int64"),
        ({"req_pool_indices": torch.zeros(4, dtype=torch.int64)[::2]}, "req_pool_indices"),
        ({"mapping": torch.ones(4)}, "mapping"),
        ({"req_to_token": torch.zeros(4, 6, dtype=torch.int32).T}, "req_to_token"),
        ({"window_indptr": torch.zeros(2, dtype=torch.int32)}, "window_indptr"),
    ],
)
def test_errors_name_the_argument(changes, told):
    named = {
        "window_indptr": torch.zeros(3, dtype=torch.int32),
        "req_to_token": torch.zeros(4, 6, dtype=torch.int32),
        "window": 3,
        "seq_lens": torch.ones(2, dtype=torch.int64),
        "req_pool_indices": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=told):
        kernel.window_indices(**(named | changes))
