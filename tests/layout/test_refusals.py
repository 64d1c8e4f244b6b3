"""Everything that is refused at the door, with its message: the argument, what was expected, what came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import moealign
from moealign import BackendUnavailable, InvalidInput, InvalidType, align, align_batched, capacity, moe_align_block_size
from moealign.testing import poisoned

IDS = torch.zeros(4, 2, dtype=torch.int32)
SIZES = {"block_size": 4, "num_experts": 5}
COUNTS = torch.zeros(3, dtype=torch.int32)


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


ALIGN = [
    ("block size 0", IDS, {"block_size": 0}, InvalidInput, r"block_size: expected an int of at least 1, got 0"),
    ("block size -4", IDS, {"block_size": -4}, InvalidInput, r"block_size: expected .* at least 1, got -4"),
    ("no experts", IDS, {"num_experts": 0}, InvalidInput, r"num_experts: expected an int of at least 1, got 0"),
    ("float block size", IDS, {"block_size": 4.0}, InvalidType, r"block_size: expected an int, got 4.0 of type float"),
    ("bool experts", IDS, {"num_experts": True}, InvalidType, r"num_experts: expected an int, got True of type bool"),
    ("string", IDS, {"block_size": "4"}, InvalidType, r"block_size: expected an int, got '4' of type str"),
    ("None", IDS, {"num_experts": None}, InvalidType, r"num_experts: expected an int, got None"),
    ("a tensor size", IDS, {"block_size": torch.tensor(4)}, InvalidType, r"block_size: expected an int, got tensor"),
    ("a list of ids", [[1, 2]], {}, InvalidType, r"topk_ids: expected a torch.Tensor, got list"),
    ("an array of ids", np.zeros((2, 2)), {}, InvalidType, r"topk_ids: expected a torch.Tensor, got ndarray"),
    ("float ids", IDS.float(), {}, InvalidType, r"topk_ids: expected an integer dtype.*got torch.float32"),
    ("bool ids", IDS.bool(), {}, InvalidType, r"topk_ids: expected an integer dtype.*got torch.bool"),
    ("complex ids", IDS.to(torch.complex64), {}, InvalidType, r"topk_ids: expected an integer dtype.*complex64"),
    ("map as list", IDS, {"expert_map": [0] * 5}, InvalidType, r"expert_map: expected a torch.Tensor, got list"),
    ("float map", IDS, {"expert_map": torch.zeros(5)}, InvalidType, r"expert_map: expected an integer dtype.*float32"),
    (
        "short map",
        IDS,
        {"expert_map": torch.zeros(4, dtype=torch.int32)},
        InvalidInput,
        r"expert_map: expected shape \[num_experts\] = \[5\], got \[4\]",
    ),
    (
        "2-d map",
        IDS,
        {"expert_map": torch.zeros(5, 1, dtype=torch.int32)},
        InvalidInput,
        r"expert_map: expected shape .*got \[5, 1\]",
    ),
    ("map elsewhere", IDS, {"expert_map": meta(5)}, InvalidInput, r"expert_map: expected a tensor on cpu.*got meta"),
    (
        "scatter index with a map",
        IDS,
        {"expert_map": torch.zeros(5, dtype=torch.int32), "scatter_idx": True},
        InvalidInput,
        r"scatter_idx: expected ignore_invalid_experts=True together with an expert_map, got False",
    ),
    ("valid as int", IDS, {"num_valid_tokens": 3}, InvalidType, r"num_valid_tokens: expected an int32 tensor.*got int"),
    (
        "valid as int64",
        IDS,
        {"num_valid_tokens": torch.tensor([3])},
        InvalidType,
        r"num_valid_tokens: expected an int32 tensor.*got torch.int64",
    ),
    (
        "two valid counts",
        IDS,
        {"num_valid_tokens": torch.zeros(2, dtype=torch.int32)},
        InvalidInput,
        r"num_valid_tokens: expected one element, got shape \(2,\)",
    ),
    ("valid elsewhere", IDS, {"num_valid_tokens": meta(1)}, InvalidInput, r"num_valid_tokens: expected .*on cpu.*meta"),
    ("error word as int", IDS, {"error_word": 0}, InvalidType, r"error_word: expected an int32 tensor.*got int"),
    (
        "float error word",
        IDS,
        {"error_word": torch.zeros(1)},
        InvalidType,
        r"error_word: expected an int32 tensor.*got torch.float32; moealign.new_error_word",
    ),
    ("error word elsewhere", IDS, {"error_word": meta(1)}, InvalidInput, r"error_word: expected .*on cpu.*got meta"),
    (
        "no such backend",
        IDS,
        {"backend": "tpu"},
        BackendUnavailable,
        r"backend: expected one of .*reference, got 'tpu'",
    ),
    (
        "length past int32",
        torch.zeros(1, dtype=torch.int32).expand(2**30),
        {"block_size": 2**10, "num_experts": 2**21},
        InvalidInput,
        r"topk_ids and block_size: expected at most 2\*\*31 - 1 .*got \d+",
    ),
    (
        "routes past int32",
        torch.zeros(1, dtype=torch.int32).expand(2**31),
        {"block_size": 1},
        InvalidInput,
        r"expected at most 2\*\*31 - 1 .*got 2147483648",
    ),
    ("blocks past int32", IDS, {"block_size": 2**31}, InvalidInput, r"block_size: expected at most 2\*\*31 - 1"),
    ("blocks past int32, no routes", IDS[:0], {"block_size": 2**70}, InvalidInput, r"block_size: expected at most 2\*"),
    ("experts past int32", IDS, {"block_size": 1, "num_experts": 2**31 - 1}, InvalidInput, r"num_experts: expected at"),
]


@pytest.mark.parametrize(
    ("ids", "changed", "error", "message"), [case[1:] for case in ALIGN if case[3]], ids=[c[0] for c in ALIGN if c[3]]
)
def test_align_refuses(ids, changed, error, message):
    with pytest.raises(error, match=message) as caught:
        align(ids, **{**SIZES, **changed})
    assert isinstance(caught.value, TypeError if error is InvalidType else ValueError)
    if set(changed) <= {"block_size", "num_experts", "expert_map"}:
        call = {**SIZES, **changed}
        with pytest.raises(error, match=message):
            moe_align_block_size(ids, call["block_size"], call["num_experts"], call.get("expert_map"))


def test_a_refusal_is_the_same_after_a_call_that_was_right():
    align(IDS, block_size=1, num_experts=1)
    with pytest.raises(InvalidType, match="block_size: expected an int, got True"):
        align(IDS, block_size=True, num_experts=1)


@pytest.mark.parametrize(
    ("counts", "changed", "error", "message"),
    [
        ([1, 2], {}, InvalidType, r"expert_num_tokens: expected a torch.Tensor, got list"),
        (COUNTS.float(), {}, InvalidType, r"expert_num_tokens: expected an integer dtype.*got torch.float32"),
        (COUNTS.view(3, 1), {}, InvalidInput, r"expert_num_tokens: expected shape \[num_batches\], got \[3, 1\]"),
        (COUNTS, {"max_tokens_per_batch": -1}, InvalidInput, r"max_tokens_per_batch: expected .*at least 0, got -1"),
        (COUNTS, {"max_tokens_per_batch": 1.5}, InvalidType, r"max_tokens_per_batch: expected an int, got 1.5"),
        (COUNTS, {"block_size": 0}, InvalidInput, r"block_size: expected an int of at least 1, got 0"),
        (COUNTS[:0], {"block_size": 2**32}, InvalidInput, r"block_size: expected at most 2\*\*31 - 1"),
        (COUNTS, {"max_tokens_per_batch": 2**30}, InvalidInput, r"max_tokens_per_batch.*at most 2\*\*31 - 1"),
        (COUNTS, {"error_word": torch.zeros(2, dtype=torch.int32)}, InvalidInput, r"error_word: expected one element"),
        (COUNTS, {"backend": "gpu"}, BackendUnavailable, r"backend: expected one of .*got 'gpu'"),
    ],
)
def test_align_batched_refuses(counts, changed, error, message):
    with pytest.raises(error, match=message):
        align_batched(counts, **{"max_tokens_per_batch": 8, "block_size": 4, **changed})


def buffers(**changed):
    out = {
        name: tensor
        for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded", "positions")
        if (tensor := getattr(poisoned(capacity(8, **SIZES), ("positions",), "cpu", 7), name)) is not None
    }
    out.update(changed)
    return {name: tensor for name, tensor in out.items() if tensor is not None}


SHARED = torch.zeros(64, dtype=torch.int32)
SORTED = capacity(8, **SIZES).sorted_token_ids


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (buffers(expert_ids=None), InvalidInput, r"out: expected a buffer for expert_ids, got none; moealign.capacity"),
        (buffers(positions=None), InvalidInput, r"out: expected a buffer for positions, got none"),
        (buffers(nonsense=SHARED), InvalidInput, r"out: expected names among sorted_token_ids.*got 'nonsense'"),
        (buffers(block_rows=SHARED), InvalidInput, r"out: .*got block_rows without block_rows=True"),
        (buffers(positions=torch.zeros(8)), InvalidType, r"out: expected an int32 tensor for positions.*float32"),
        (buffers(positions=SHARED[:9]), InvalidInput, r"out: expected shape \[8\] for positions, got \[9\]"),
        (buffers(positions=SHARED[:7]), InvalidInput, r"out: expected shape \[8\] for positions, got \[7\]"),
        (buffers(positions=SHARED[:16:2]), InvalidInput, r"out: expected a contiguous tensor for positions"),
        (buffers(positions=meta(8)), InvalidInput, r"out: expected positions on cpu like the input, got meta"),
        (buffers(positions=[0] * 8), InvalidType, r"out: expected a tensor for positions, got list"),
        (
            buffers(sorted_token_ids=SHARED[:SORTED], positions=SHARED[SORTED - 1 : SORTED + 7]),
            InvalidInput,
            r"share no memory, got sorted_token_ids and positions overlapping",
        ),
        (buffers(positions=IDS.view(-1)), InvalidInput, r"share no memory, got .*an input"),
        ([SHARED], InvalidType, r"out: expected a BlockLayout or a mapping.*got list"),
    ],
)
def test_out_refuses_and_writes_nothing(out, error, message):
    before = (
        {name: value.clone() for name, value in out.items() if hasattr(value, "clone")} if type(out) is dict else {}
    )
    with pytest.raises(error, match=message):
        align(IDS, **SIZES, positions=True, out=out)
    for name, value in before.items():
        assert value.is_meta or torch.equal(value, out[name]), name


def test_touching_buffers_are_fine():
    slab = torch.zeros(200, dtype=torch.int32)
    room = capacity(8, **SIZES)
    first, second = room.sorted_token_ids, room.sorted_token_ids + room.expert_ids
    out = {
        "sorted_token_ids": slab[:first],
        "expert_ids": slab[first:second],
        "num_tokens_post_padded": slab[second : second + 1],
    }
    layout = align(IDS, **SIZES, out=out)
    assert layout.num_tokens_post_padded.item() == 8


def test_a_backend_asked_for_by_name_never_falls_back():
    for name, reason in moealign.backends().items():
        if reason is None:
            continue
        with pytest.raises(BackendUnavailable, match=f"got '{name}'"):
            align(IDS, **SIZES, backend=name)


def test_numbers_that_are_ints_are_taken():
    layout = align(IDS, block_size=np.int64(4), num_experts=np.int32(5))
    assert layout.num_tokens_post_padded.item() == 8
