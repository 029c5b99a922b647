"""Tensor parallelism: two processes with SGLang's own groups, over gloo. See `tests.cpu.two_ranks_scenario`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cpu.conftest import run_scenario
from tests.cpu.two_ranks_scenario import KINDS, OF_A_LAYER
from tests.releases import BASELINE, is_another

LAYERS = 2
SKINNY = {"dense": 3, "moe": 4, "ple": 5}
"""Of a layer: QKV, output, gate and up; the router; gate and projection. The down projection is too narrow."""


@pytest.fixture(scope="module")
def ranks(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the two has seen. Neither waits for the other for ever, or this ends in a timeout."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    found: list[Any] = run_scenario(
        "tests.cpu.two_ranks_scenario", {**environment, "OMP_NUM_THREADS": "1"}, folder, 900
    )
    return found


def of(ranks: list[Any], *path: str) -> list[Any]:
    """The same thing of both."""
    found = ranks
    for name in path:
        found = [one[name] for one in found]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_differ_and_stock_agrees_on_the_rest(ranks: list[Any], kind: str):
    one, other = of(ranks, "forwards", kind, "stock")
    assert one["out"] == other["out"]
    assert len(one["sums"]) == LAYERS * OF_A_LAYER[kind]
    assert not set(one["parts"]) & set(other["parts"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_rewritten_forward_alone_has_stocks_bits_in_every_sum(ranks: list[Any], kind: str):
    for rank in of(ranks, "forwards", kind):
        assert rank["bare"] == rank["stock"]


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_step_the_same_sums_are_made_and_both_go_on_alike(ranks: list[Any], kind: str):
    found = of(ranks, "forwards", kind)
    for rank in found:
        patched = rank["patched"]
        assert patched["sums"] == rank["stock"]["sums"]
        assert patched["far"] < 0.06  # the order of a CPU's sums; bits are compared on a GPU
        assert patched["engaged"]["layer_norms"] == LAYERS, patched["reasons"]
        assert patched["engaged"]["input_norm"] == LAYERS, patched["reasons"]
        assert patched["engaged"]["skinny_gemm"] == LAYERS * SKINNY[kind], patched["reasons"]
        assert patched["engaged"]["ple_tail"] == (LAYERS if kind == "ple" else 0)
    assert found[0]["patched"]["out"] == found[1]["patched"]["out"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_mlp_in_one_launch_is_summed_once(ranks: list[Any], kind: str):
    """On 0.5.12.post1 by the patch, in the down projection's place; on 0.5.23 by the layer."""
    found = of(ranks, "forwards", kind)
    for rank in found:
        few = rank["mlp_few"]
        assert few["engaged"]["mlp_few"] == (0 if kind == "moe" else LAYERS), few["reasons"]
        assert few["sums"] == rank["stock"]["sums"]
        assert few["far"] < 0.06
    assert found[0]["mlp_few"]["out"] == found[1]["mlp_few"]["out"]


def test_two_streams_meet_before_their_branches_are_summed(ranks: list[Any]):
    """On 0.5.12.post1 the sums are in the branches: there is one stream."""
    for rank in of(ranks, "beside"):
        assert rank["sums"] == rank["stock"]["sums"]
        assert rank["parts"] == rank["stock"]["parts"]
        assert rank["out"] == rank["stock"]["out"]
        if is_another():
            layer = ["sum", "wait", "branch", "back", "wait", "sum", "sum"]
            assert rank["order"] == layer * LAYERS
            assert rank["engaged"]["mlp_stream"] == LAYERS
        else:
            assert rank["order"] == ["sum"] * 3 * LAYERS, BASELINE
            assert "several GPUs" in rank["reasons"]["mlp_stream"]


def test_a_self_check_that_fails_on_one_is_the_others_as_well(ranks: list[Any]):
    one, other = of(ranks, "faults", "self-check")
    for rank in (one, other):
        assert rank["engaged"]["skinny_gemm"] == 0
        assert rank["engaged"]["ple_tail"] == LAYERS
        assert "GPU 1 of 2" in rank["reasons"]["skinny_gemm"] or rank is other
    assert one["states"]["skinny_gemm"] == "active"
    assert other["states"]["skinny_gemm"] == "failed"
    assert "out of memory" in other["reasons"]["skinny_gemm"]
    assert one["out"] == other["out"]
    assert one["sums"] == other["sums"]


def test_they_ask_again_once_the_patch_is_put_in_again(ranks: list[Any]):
    one, other = of(ranks, "faults", "afterwards")
    assert one["engaged"] == other["engaged"]
    assert one["engaged"]["skinny_gemm"] == LAYERS * SKINNY["ple"]
    assert one["out"] == other["out"]


def test_if_they_did_not_tell_each_other_they_would_go_on_from_other_numbers(ranks: list[Any]):
    """That the fault is one: what the tests above would see without `gemma4_turbo.runtime.ranks`."""
    one, other = of(ranks, "faults", "alone")
    assert one["engaged"]["skinny_gemm"] > 0
    assert other["engaged"]["skinny_gemm"] == 0
    assert one["sums"] == other["sums"]
    assert one["out"] != other["out"]


@pytest.mark.parametrize("when", ["never asks", "asks later"])
def test_one_that_does_not_come_to_the_question_is_not_waited_for(ranks: list[Any], when: str):
    one, other = of(ranks, "faults", when)
    assert one["engaged"]["skinny_gemm"] == other["engaged"]["skinny_gemm"] == 0
    why = "waited 1 s" if when == "never asks" else "a GPU did not come to an earlier question"
    assert why in one["reasons"]["skinny_gemm"]
    assert one["out"] == other["out"]


def test_all_questions_of_a_patch_are_waited_for_once(ranks: list[Any]):
    one, other = of(ranks, "faults", "never asks", "seconds")
    assert len(one) >= 3
    assert not other
    assert max(one) >= 1
    assert sum(one) < 2


def test_one_with_other_tiles_is_not_alone_with_them(ranks: list[Any]):
    """Of a layer that both compute as a whole the order of the sums would be another."""
    for rank in of(ranks, "faults", "other tiles"):
        assert rank["engaged"] == {"skinny_gemm": 0, "ple_tail": LAYERS}
        assert rank["states"]["skinny_gemm"] == "active"
        assert "GPU" in rank["reasons"]["skinny_gemm"]


def test_of_a_bitwise_patch_one_may_run_alone(ranks: list[Any]):
    """Both make the same sums, of parts that on a GPU have the same bits."""
    one, other = of(ranks, "faults", "bitwise")
    assert one["engaged"]["layer_norms"] == LAYERS
    assert other["engaged"]["layer_norms"] == 0
    assert one["sums"] == other["sums"]


@pytest.mark.skipif(is_another(), reason="0.5.23 has the gate in its own tests of yoco")
@pytest.mark.parametrize("fault", ["none", "tail"])
def test_no_rows_are_cut_on_one_alone(ranks: list[Any], fault: str):
    """The tail may run out of memory on one: it would sum all rows, the other two."""
    for rank in of(ranks, "prefills"):
        assert "several GPUs" in rank[fault]["reason"]
        assert rank[fault]["state"] == "active"
        assert rank[fault]["rows"] == ranks[0]["prefills"]["stock"]["rows"]


def test_a_batch_of_images_that_fails_on_one_alone_does_not_begin_anew(ranks: list[Any]):
    """The other would add its second layer to this one's first. As under stock, the error is the server's."""
    one, other = of(ranks, "pictures")
    assert one["engaged"] == other["engaged"] == 1
    assert one["together"] == other["together"]
    assert other["fails"] == "no such kernel"
    assert "Connection" in one["fails"] or "timeout" in one["fails"]
