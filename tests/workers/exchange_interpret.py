"""The kernels of an exchange under Triton's interpreter against torch.  test_exchange_triton.py runs it in a process.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/exchange_interpret.py
"""

from __future__ import annotations

import sys

import torch
from helpers import failures, patch_interpreter

import moealign
from moealign.experts import packed
from moealign.parallel import wire


def cases():
    """(what, what differs or None) of packing and combining."""
    generator = torch.Generator().manual_seed(0)
    for tokens, top_k, ranks, slots, hidden, capacity, dtype, ids_dtype in (
        (5, 3, 2, 4, 6, 15, torch.float32, torch.int64),
        (9, 2, 4, 3, 5, 3, torch.float16, torch.int32),  # overflow; rows of an odd number of bytes times two
        (300, 2, 3, 5, 2, 40, torch.bfloat16, torch.int16),  # many rows of a header, two programs of places
        (1, 1, 1, 1, 2100, 1, torch.bfloat16, torch.uint8),  # two blocks of columns
        (0, 2, 2, 2, 8, 4, torch.float32, torch.int64),  # no tokens
    ):
        what = f"{tokens} tokens to {ranks} ranks, {capacity} rows each, {dtype}"
        rows = torch.randn(tokens, 2 * hidden, generator=generator).to(dtype)[:, :hidden]  # a stride of its own
        ids = torch.randint(0, ranks * slots + (ids_dtype is not torch.uint8), (tokens, top_k), generator=generator)
        ids = ids.to(ids_dtype)
        experts = torch.arange(ranks * slots)
        table = (experts % slots).to(torch.int16)
        layout = moealign.align(
            ids, block_size=1, num_experts=ranks * slots, expert_map=experts // slots, ignore_invalid_experts=True,
            expert_offsets=True, positions=True, backend="reference",
        )  # fmt: skip
        call = (ids, table, layout.sorted_token_ids, layout.positions, layout.expert_offsets[: ranks + 1])
        sizes = (top_k, capacity, wire.header_rows(capacity, wire.words_of(hidden, dtype.itemsize)))
        got, want = wire.pack(rows, *call, *sizes), wire.pack_in_torch(rows, *call, *sizes)
        bits = [(each.view(torch.int16), other.view(torch.int16)) for each, other in zip(got, want, strict=True)]
        yield f"packing {what}", wrong(sum(int((one != other).sum()) for one, other in bits))
        result = torch.randn(got[0].shape, generator=generator).to(dtype)
        weights = torch.rand(top_k, tokens, generator=generator).T
        weights = weights.masked_fill((got[2] < 0).view(tokens, top_k), float("nan"))  # must not be read
        summed = wire.combine(result, weights, *got[1:])
        wanted = packed.weighted_sum(packed.scatter(result, *got[1:]), weights, got[2])
        near = torch.isclose(summed, wanted, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)
        yield f"combining {what}", wrong(int((~near).sum()))
    # Values that cannot be: nothing may be read or written out of bounds, and such routes are dropped.
    lies, table = torch.tensor([7, -3, 9, 2**30], dtype=torch.int32), torch.zeros(2, dtype=torch.int16)
    offsets = torch.tensor([0, 3, 2**30], dtype=torch.int32)
    ids = torch.tensor([[-5, 9], [2**40, 3]])
    wire_, routes, places = wire.pack(torch.ones(2, 4), ids, table, lies, lies, offsets, 2, 2, 1)
    yield "routes that cannot be", wrong(int((routes != 4).sum()) + int((wire_[:2] != 0).sum()))
    yield "places that cannot be", wrong(int((places >= wire_.shape[0]).sum()))


def wrong(elements: int) -> str | None:
    return f"{elements} elements differ" if elements else None


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures(cases()))
