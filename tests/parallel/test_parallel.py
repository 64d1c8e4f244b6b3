"""Expert parallelism with gloo: every rank is a process of its own, started here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import WORKERS
from processes import Process, environment

from moealign import InvalidInput, InvalidType, QuantizedWeights
from moealign.parallel import ExpertPlacement, dispatched_moe, replicated_moe

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")

CHECKS = "check_replicated,check_dispatched,check_mesh,check_a_subgroup,check_refusals"
EXCHANGE = "check_exchange,check_capacity,check_exchange_refusals,check_moves"
WIRE = "check_fp8_on_the_wire,check_expected_capacity,check_beside"
TOKENS = "check_one_row_per_token"
DIRECT = "check_direct"


def run(ranks: int, name: str, tmp_path: Path, backend: str = "gloo") -> None:
    """Fails with the output of the first rank that failed."""
    wrong = [text for code, text in outcomes(ranks, name, tmp_path, backend) if code]
    assert not wrong, wrong[0][-3000:]


def outcomes(ranks: int, name: str, tmp_path: Path, backend: str = "gloo") -> list[tuple[int, str]]:
    """Each rank's exit status and output."""
    variables = environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    if backend == "nccl":
        variables |= {"NCCL_NVLS_ENABLE": "0"}
        if name == "check_a_rank_that_never_comes":  # an error, where NCCL's watchdog would end the process
            variables |= {"TORCH_NCCL_BLOCKING_WAIT": "1"}
    script, store = WORKERS / "parallel_worker.py", tmp_path / "store"
    group = [Process(script, rank, ranks, store, name, backend, env=variables) for rank in range(ranks)]
    try:
        done = [each.finish(240 if backend == "gloo" else 90) for each in group]
    finally:
        for each in group:
            each.kill()
    return [(each.returncode, each.stdout + each.stderr) for each in done]


@pytest.mark.parametrize(("ranks", "more"), [(2, ",check_deepep"), (4, "")])
def test_modes_exchanges_and_layouts_are_the_single_layer(ranks, more, tmp_path):
    """In the processes of one group, for starting them takes as long as most checks."""
    run(ranks, f"{CHECKS},{EXCHANGE},{WIRE},{TOKENS},{DIRECT}{more}", tmp_path)


def test_the_modes_of_pytorch_and_data_parallel_with_a_rank_without_tokens(tmp_path):
    run(2, "check_modes,check_exchange_in_every_mode,check_data_parallel", tmp_path)


@pytest.mark.parametrize("check", ["check_a_rank_that_never_comes", "check_a_rank_that_leaves_an_exchange"])
def test_a_rank_that_never_comes_is_noticed(check, tmp_path):
    run(2, check, tmp_path)


def test_transformers_own_expert_parallel_plan(tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.PreTrainedModel, "maybe_distribute_model"):
        pytest.skip("this Transformers applies no plan to a model that is there")
    run(2, "check_transformers_own_plan", tmp_path)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")


@two_gpus
def test_both_modes_are_the_single_layer_with_nccl(tmp_path):
    run(2, CHECKS, tmp_path, "nccl")


@two_gpus
def test_the_modes_of_pytorch_with_nccl(tmp_path):
    run(2, "check_modes,check_data_parallel", tmp_path, "nccl")


@two_gpus
@pytest.mark.parametrize("checks", [EXCHANGE, WIRE, TOKENS, DIRECT, "check_exchange_in_every_mode"])
def test_an_exchange_of_fixed_size_with_nccl(checks, tmp_path):
    run(2, checks, tmp_path, "nccl")


@two_gpus
def test_an_exchange_in_a_cuda_graph_with_nccl(tmp_path):
    run(2, "check_exchange_in_a_graph", tmp_path, "nccl")


@two_gpus
def test_half_precision_and_the_one_wait_with_nccl(tmp_path):
    run(2, "check_half_precision", tmp_path, "nccl")


@two_gpus
def test_a_rank_that_never_comes_is_noticed_with_nccl(tmp_path):
    run(2, "check_a_rank_that_never_comes", tmp_path, "nccl")


@two_gpus
def test_nccl_s_watchdog_ends_a_rank_that_waits_in_vain(tmp_path):
    (code, said), _ = outcomes(2, "check_nccl_s_watchdog", tmp_path, "nccl")
    assert code != 0, said[-3000:]
    assert "came back" not in said
    assert re.search("Watchdog caught collective operation timeout", said), said[-3000:]


# ----------------------------------------------------------------------------------------------------------- placement


def test_a_placement_says_who_has_what():
    placement = ExpertPlacement(np.array([[0, 2, 3], [1, 3, -1]]), 4)
    assert (placement.ranks, placement.slots, placement.replicated) == (2, 3, True)
    assert placement.expert_map(0).tolist() == [0, -1, 1, 2]
    assert placement.expert_map(1).tolist() == [-1, 0, -1, 1]
    assert placement.owners(3) == [(0, 2), (1, 1)]
    assert placement.owners(1) == [(1, 0)]
    weights = torch.arange(8.0).view(4, 2)
    assert placement.shard(weights, 1).tolist() == [[2, 3], [6, 7], [0, 0]]


def test_routes_to_copies_take_turns_by_token():
    placement = ExpertPlacement(np.array([[0, 1], [1, -1]]), 2)
    ids = torch.tensor([[0, 1], [1, 0], [1, -1], [1, 2]])
    assert placement.bins(ids).tolist() == [[0, 1], [2, 0], [1, -1], [2, -1]]


def test_what_a_placement_says_on_every_call_is_looked_up_once(monkeypatch):
    placement = ExpertPlacement(np.array([[0, 1], [1, -1]]), 2)
    ids = torch.tensor([[0, 1], [1, 0]])
    want, map_of_0 = placement.bins(ids), placement.expert_map(0)
    monkeypatch.setattr(ExpertPlacement, "owners", lambda *_: pytest.fail("a search of the table at every call"))
    assert torch.equal(placement.bins(ids), want)
    assert placement.expert_map(0) is map_of_0


def test_a_balanced_placement_is_flatter_and_copies_make_it_flatter_still():
    loads = torch.tensor([100.0, 60, 50, 10, 5, 3, 2, 1])
    linear, balanced = ExpertPlacement.linear(8, 4), ExpertPlacement.balanced(loads, 4)
    copied = ExpertPlacement.balanced(loads, 4, replicas=4)
    assert linear.imbalance(loads) > balanced.imbalance(loads) > copied.imbalance(loads) >= 1
    assert not linear.replicated
    assert copied.replicated


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0, 1], "table: expected \\[ranks, slots\\]"),
        ([[0, 1], [2, 4]], "table: expected experts below 4, got 4"),
        ([[0, 1], [2, -1]], "expert 3 is on none"),
        ([[0, 0], [1, 2], [3, -1]], "rank 0 holds \\[.*0.*0.*\\]"),
    ],
)
def test_an_impossible_placement_is_refused(table, message):
    with pytest.raises(InvalidInput, match=message):
        ExpertPlacement(np.array(table), 4)


def test_without_a_group_the_call_says_what_to_do():
    placement = ExpertPlacement.linear(2, 1)
    with pytest.raises(InvalidInput, match=r"torch\.distributed to be initialized"):
        replicated_moe(
            torch.zeros(1, 2),
            torch.zeros(2, 2, 2),
            torch.zeros(2, 2, 1),
            torch.ones(1, 1),
            torch.zeros(1, 1, dtype=torch.int64),
            placement,
        )


@pytest.mark.parametrize("layer", [replicated_moe, dispatched_moe])
def test_fp8_weights_are_refused(layer):
    data, scales = torch.zeros(2, 2, 2).to(torch.float8_e4m3fn), torch.ones(2, 1, 1)
    weights = QuantizedWeights(data, scales)
    with pytest.raises(InvalidType, match=r"_moe: expected torch\.Tensors, got QuantizedWeights; FP8 weights are for"):
        layer(
            torch.zeros(1, 2), weights, weights, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64),
            ExpertPlacement.linear(2, 1),
        )  # fmt: skip
