"""align_lora: every segment is the layout of one adapter's tokens."""

from __future__ import annotations

import pytest
import torch

from moealign import InvalidInput, InvalidType, align, align_lora, grouped_gemm
from moealign.lora import adapters_of_requests

E, K, B, SLOTS = 6, 2, 4, 3


def case(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, E + 1, (tokens, K), generator=generator)
    return ids, torch.randint(-1, SLOTS + 1, (tokens,), generator=generator)


@pytest.mark.parametrize("tokens", [0, 1, 7, 60])
@pytest.mark.parametrize("enabled", [None, torch.tensor([1, 0, 1]), torch.tensor([True, True, False])])
@pytest.mark.parametrize("expert_map", [None, torch.tensor([2, -1, 0, 1, -1, 5])])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8])
def test_a_segment_is_the_layout_of_its_tokens(tokens, enabled, expert_map, dtype):
    ids, mapping = case(tokens)
    options = {"block_size": B, "num_experts": E}
    got = align_lora(ids.to(dtype), mapping, max_loras=SLOTS, adapter_enabled=enabled, expert_map=expert_map, **options)
    for slot in range(SLOTS):
        taken = (mapping == slot) & (enabled is None or bool(enabled[slot]))
        alone = torch.where(taken.unsqueeze(1), ids, -1)
        mapped = {} if expert_map is None else {"expert_map": expert_map, "ignore_invalid_experts": True}
        want = align(alone, **options, **mapped, backend="reference")
        assert all(map(torch.equal, got.adapter(slot), want))


def test_an_adapters_product():
    ids, mapping = case(20)
    ids = ids.clamp(0, E - 1)
    x, weights = torch.randn(20, 5), torch.randn(SLOTS, E, 3, 5)
    layout = align_lora(ids, mapping, max_loras=SLOTS, block_size=16, num_experts=E)
    got = sum(grouped_gemm(x, weights[slot], layout.adapter(slot), top_k=K) for slot in range(SLOTS))
    for route in range(20 * K):
        slot, expert = int(mapping[route // K]), int(ids.flatten()[route])
        want = weights[slot, expert] @ x[route // K] if 0 <= slot < SLOTS else torch.zeros(3)
        torch.testing.assert_close(got[route], want)


@pytest.mark.parametrize(
    ("ends", "slots"),
    [([0, 2, 2, 5], [1, 0, 2]), ([0, 5], [0]), ([1, 3, 4], [2, -1]), ([0], []), ([0, 0, 9], [1, 2]), ([7, 9], [1])],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_adapters_of_requests(ends, slots, dtype):
    want = [-1] * 6
    for request, slot in enumerate(slots):
        for token in range(ends[request], min(ends[request + 1], 6)):
            want[token] = slot
    given = torch.tensor(ends, dtype=dtype), torch.tensor(slots, dtype=dtype)
    for function in (adapters_of_requests, torch.compile(adapters_of_requests, backend="eager", fullgraph=True)):
        got = function(*given, 6)
        assert got.dtype is torch.int32
        assert got.tolist() == want
    assert adapters_of_requests(*given, 0).shape == (0,)


@pytest.mark.parametrize(
    ("ends", "slots", "tokens", "error", "message"),
    [
        (torch.zeros(2), torch.zeros(1).int(), 3, InvalidType, "seg_indptr: expected an integer dtype"),
        (torch.zeros(2).int(), [0], 3, InvalidType, "req_to_lora: expected a torch.Tensor"),
        (torch.zeros(2).int(), torch.zeros(2).int(), 3, InvalidInput, r"expected \[R \+ 1\] and \[R\], got \[2\]"),
        (torch.zeros(2).int(), torch.zeros(1).int(), -1, InvalidInput, "num_tokens: expected an int of at least 0"),
        (torch.zeros(2).int(), torch.zeros(1).int(), 2.5, InvalidInput, "num_tokens: expected an int of at least 0"),
    ],
)
def test_refused_requests(ends, slots, tokens, error, message):
    with pytest.raises(error, match=message):
        adapters_of_requests(ends, slots, tokens)


def test_it_compiles_to_one_graph():
    compiled = torch.compile(align_lora, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9):
        ids, mapping = case(tokens)
        options = {"max_loras": SLOTS, "block_size": B, "num_experts": E}
        for one, other in zip(
            compiled(ids, mapping, **options)[:3], align_lora(ids, mapping, **options)[:3], strict=True
        ):
            assert torch.equal(one, other)


IDS, MAPPING = case(5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"topk_ids": IDS.float()}, InvalidType, "topk_ids: expected an integer dtype"),
        ({"topk_ids": [1]}, InvalidType, "topk_ids: expected a torch.Tensor"),
        ({"topk_ids": IDS[0]}, InvalidInput, r"topk_ids: expected \[tokens, top_k\], got \[2\]"),
        ({"token_lora_mapping": MAPPING[:3]}, InvalidInput, r"token_lora_mapping: expected \[5\], got \[3\]"),
        ({"token_lora_mapping": MAPPING > 0}, InvalidType, "token_lora_mapping: expected an integer dtype"),
        ({"adapter_enabled": torch.ones(2)}, InvalidType, "adapter_enabled: expected an integer dtype"),
        ({"adapter_enabled": torch.ones(2).int()}, InvalidInput, r"adapter_enabled: expected \[3\], got \[2\]"),
        ({"expert_map": torch.zeros(2).int()}, InvalidInput, r"expert_map: expected \[6\], got \[2\]"),
        ({"max_loras": 0}, InvalidInput, "max_loras: expected an int of at least 1, got 0"),
        ({"max_loras": 2**30}, InvalidInput, "max_loras: expected at most"),
        ({"block_size": 0}, InvalidInput, "block_size: expected an int of at least 1"),
    ],
)
def test_refusals(changed, error, message):
    call = {"topk_ids": IDS, "token_lora_mapping": MAPPING, "max_loras": SLOTS, "block_size": B, "num_experts": E}
    with pytest.raises(error, match=message):
        align_lora(**{**call, **changed})
