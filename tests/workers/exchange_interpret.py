"""The kernels of an exchange under Triton's interpreter against torch.  test_exchange_triton.py runs it in a process.

TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/workers/exchange_interpret.py
"""

from __future__ import annotations

import itertools
import sys

import torch
import torch.distributed as dist
from helpers import failures, patch_interpreter

import moealign
from moealign.experts import launch, packed
from moealign.parallel import ExpertExchange, ExpertPlacement, wire, wire_fp8, wire_tokens


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
        yield f"FP8: {what}", wrong(fp8(rows, call, top_k, capacity))
        for some in (wire, wire_fp8):
            word, most = moealign.new_error_word("cpu"), int((call[4][1:] - call[4][:-1]).max())
            some.pack(rows, *call, *sizes, error_word=word)
            yield f"overflow: {what}", wrong(int(word) != 16 * (most > capacity))
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


def fp8(rows: torch.Tensor, call: tuple[torch.Tensor, ...], top_k: int, capacity: int) -> int:
    """Bytes, maps, rows and slots of a wire in FP8 that differ from torch's; rows of many sizes, and zeros."""
    tokens, hidden = rows.shape
    sizes = torch.exp2(torch.arange(tokens * hidden, dtype=torch.float32).remainder(29) - 16).view(tokens, hidden)
    rows = (rows.float() * sizes).to(rows.dtype)
    rows[:1] = -0.0
    ranks, pitch = call[4].shape[0] - 1, wire_fp8.pitch_of(hidden)
    sizes_ = (top_k, capacity, wire.header_rows(capacity, pitch // 2))
    got, want = wire_fp8.pack(rows, *call, *sizes_), wire_fp8.pack_in_torch(rows, *call, *sizes_)
    parts = [each.view(ranks, -1, pitch) for each in (got[0], want[0])]
    first = 4 * -(-hidden // 4)
    spans = [slice(0, hidden), slice(first, first + 4 * -(-hidden // 128))]
    differ = sum(int((parts[0][:, :capacity, span] != parts[1][:, :capacity, span]).sum()) for span in spans)
    differ += sum(int((one != other).sum()) for one, other in zip(got[1:], want[1:], strict=True))
    given = (want[0], ranks, capacity, hidden, rows.dtype)
    (out, slots), (expected, of) = wire_fp8.unpack(*given), wire_fp8.unpack_in_torch(*given)
    there = of[:, 0] >= 0
    bits = torch.int32 if rows.dtype.itemsize == 4 else torch.int16
    steps = (out[there].view(bits).int() - expected[there].view(bits).int()).abs()
    last_bit = rows.dtype is torch.bfloat16  # which the interpreter cuts off where GPUs round
    headers = [each.view(ranks, -1)[:, capacity * pitch :] for each in (got[0], want[0])]
    return differ + int((slots != of).sum()) + int((steps > last_bit).sum()) + int((headers[0] != headers[1]).sum())


def tokens_to_ranks():
    """(what, what differs or None) of one row for each token and rank."""
    generator = torch.Generator().manual_seed(3)
    for tokens, top_k, ranks, slots, hidden, capacity, dtype, ids_dtype in (
        (5, 3, 2, 4, 7, 5, torch.float32, torch.int64),
        (9, 8, 4, 3, 5, 4, torch.float16, torch.int32),  # overflow
        (70, 1, 3, 5, 300, 40, torch.bfloat16, torch.int16),  # three groups of columns
        (300, 3, 3, 2, 2, 40, torch.bfloat16, torch.uint8),  # four programs of places
        (2, 8, 1, 8, 2100, 1, torch.bfloat16, torch.int64),  # two blocks of columns
        (0, 2, 2, 2, 8, 4, torch.float32, torch.int64),
    ):
        what = f"{tokens} tokens of {top_k} to {ranks} ranks, {capacity} rows each, {dtype}"
        rows = torch.randn(tokens, 2 * hidden, generator=generator).to(dtype)[:, :hidden]
        low = -2 if ids_dtype.is_signed else 0
        ids = torch.randint(low, ranks * slots + 2, (top_k, tokens), generator=generator).to(ids_dtype).T
        weights = torch.rand(tokens, 2 * top_k, generator=generator)[:, ::2]
        weights = weights.masked_fill((ids < 0) | (ids >= ranks * slots), float("nan"))  # must not be read
        experts = torch.arange(ranks * slots)
        of, table = (experts // slots).to(torch.int32), (experts % slots).to(torch.int16)
        table[-1] = of[-1] = -1  # an empty slot
        first = wire_tokens.first_of_ranks(ids, of)
        yield f"first: {what}", wrong(int((first != wire_tokens.first_in_torch(ids, of)).sum()))
        layout = moealign.align(
            first, block_size=1, num_experts=ranks, ignore_invalid_experts=True, expert_offsets=True, positions=True,
            backend="reference",
        )  # fmt: skip
        call = (weights, ids, of, table, layout.sorted_token_ids, layout.positions, layout.expert_offsets, capacity)
        over = int((call[6][1:] - call[6][:-1]).max()) > capacity
        for fp8 in (False, True):
            wanted = wire_tokens.pack_in_torch(rows, *call, fp8)
            got, word = tuple(poisoned(each) for each in wanted), moealign.new_error_word("cpu")
            one = wire_tokens.pack_launch(rows, *call, fp8, out=got, error_word=word)
            launch.run([one], rows.device)
            parts = [wire_tokens._parts(each[0], hidden, dtype, top_k, fp8) for each in (got, wanted)]
            pairs = [*zip(*parts, strict=True), *zip(got[1:], wanted[1:], strict=True)]
            if fp8:  # but the bytes between values and scales
                gap = slice(hidden, 4 * -(-hidden // 4))
                pairs[0] = tuple(each.clone() for each in pairs[0])
                pairs[0][0][:, gap] = pairs[0][1][:, gap]
            bad = sum(int((one != other).sum()) for one, other in pairs) + (int(word) != 16 * over)
            yield f"{'FP8' if fp8 else 'same'}: {what}", wrong(bad)
        out, expected = (
            each(wanted[0], hidden, dtype, top_k) for each in (wire_tokens._unpack, wire_tokens.unpack_in_torch)
        )
        there = (expected[2] >= 0).any(1)
        bits = torch.int32 if dtype.itemsize == 4 else torch.int16
        steps = (out[0][there].view(bits).int() - expected[0][there].view(bits).int()).abs()
        bad = int((steps > (dtype is torch.bfloat16)).sum())  # whose last bit the interpreter cuts off
        bad += sum(int((one != other).sum()) for one, other in zip(out[1:], expected[1:], strict=True))
        yield f"unpacking {what}", wrong(bad)


def direct():
    """(what, what differs or None) of kernels that write into, and read from, the memory of several ranks."""
    generator = torch.Generator().manual_seed(5)
    ranks, slots, tokens, top_k = 3, 4, 9, 2
    for hidden, dtype, capacity in ((6, torch.float32, 3), (5, torch.float16, 7), (300, torch.bfloat16, 9)):
        experts, pitch = torch.arange(ranks * slots), wire_fp8.pitch_of(hidden)
        of, table = (experts // slots).to(torch.int32), (experts % slots).to(torch.int16)
        alike: dict[str, list[tuple[torch.Tensor, ...]]] = {}
        arrived: dict[str, list[torch.Tensor]] = {}
        for rank in range(ranks):
            rows = torch.randn(tokens, hidden, generator=generator).to(dtype)
            ids = torch.rand(tokens, ranks * slots, generator=generator).topk(top_k).indices
            ids[rank, 0] = -1
            weights = torch.rand(tokens, top_k, generator=generator)
            headers = [wire.header_rows(capacity, each) for each in (wire.words_of(hidden, dtype.itemsize), pitch // 2)]
            for name, module, sizes in (
                ("routes", wire, (capacity, headers[0])),
                ("routes in FP8", wire_fp8, (capacity, headers[1])),
                ("tokens", wire_tokens, (capacity, False)),
                ("tokens in FP8", wire_tokens, (capacity, True)),
            ):
                by_token = module is wire_tokens
                layout = moealign.align(
                    wire_tokens.first_in_torch(ids, of) if by_token else ids, block_size=1,
                    num_experts=ranks if by_token else len(of), expert_map=None if by_token else of,
                    ignore_invalid_experts=True, expert_offsets=True, positions=True, backend="reference",
                )  # fmt: skip
                listed = (layout.sorted_token_ids, layout.positions, layout.expert_offsets[: ranks + 1])
                call = (weights, ids, of, table, *listed) if by_token else (ids, table, *listed, top_k)
                wanted = module.pack_in_torch(rows, *call, *sizes)
                alike.setdefault(name, []).append(wanted)
                here = arrived.setdefault(name, [poisoned(wanted[0]) for _ in range(ranks)])
                parts = parts_of(here, rank)
                got = module.pack(rows, *call, *sizes, memory=lambda *_, to=here[rank], parts=parts: (to, parts))
                maps = sum(int((one != other).sum()) for one, other in zip(got[1:], wanted[1:], strict=True))
                yield f"{name}, direct: maps of {dtype}", wrong(maps)
                if name == "routes":  # the results of all ranks, as each of them reads them
                    offered = [torch.randn(wanted[0].shape, generator=generator).to(dtype) for _ in range(ranks)]
                    out, to = torch.empty(tokens, hidden, dtype=dtype), parts_of(offered, rank)
                    launch.run([wire.combine_launch(offered[rank], weights, got[2], out, to)], rows.device)
                    back = torch.cat([each.view(ranks, -1, hidden)[rank] for each in offered])
                    same = wire.combine(back, weights, *got[1:])
                    yield f"combining from other ranks in {dtype}", wrong(int((out != same).sum()))
        for name, wires in alike.items():
            differ = 0
            for rank in range(ranks):
                kept = [each[0].view(ranks, -1, each[0].shape[1])[rank].view(torch.uint8) for each in wires]
                came = arrived[name][rank].view(torch.uint8).view(ranks, *kept[0].shape)
                for one, other, maps in zip(came, kept, wires, strict=True):
                    filled = (maps[1].view(ranks, -1)[rank] < tokens * top_k).unsqueeze(1)
                    if "tokens" in name:  # weights and slots are written in every row
                        form = wire_tokens.format_of(hidden, dtype, top_k, "FP8" in name)
                        ends = slice(form.weights, form.slots + 2 * top_k)
                        differ += int((one[:, ends] != other[:, ends]).sum())
                    else:
                        differ += int((one[capacity:] != other[capacity:]).sum())
                    values = hidden if "FP8" in name else hidden * dtype.itemsize
                    differ += int(((one != other) & filled)[:capacity, :values].sum())
                    differ += int(((one != 1) & ~filled)[:capacity, :values].sum())
            yield f"{name}, direct: what arrives of {dtype}", wrong(differ)


def parts_of(buffers: list[torch.Tensor], rank: int) -> wire.Parts:
    """The parts of `rank` in the buffers of all ranks, for kernels on it."""
    part = buffers[0].numel() * buffers[0].element_size() // len(buffers)
    mine = [each.data_ptr() + rank * part for each in buffers]
    return wire.Parts.between(mine, buffers[rank].data_ptr(), torch.device("cpu"))


def poisoned(like: torch.Tensor) -> torch.Tensor:
    """Memory whose values no result has."""
    return torch.zeros_like(like).view(torch.uint8).fill_(1).view(like.dtype)


def layers():
    """A whole exchange of one rank, again after what its first call checked."""
    generator = torch.Generator().manual_seed(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    up, down = (torch.randint(-2, 3, size, generator=generator).float() for size in ((4, 16, 16), (4, 16, 8)))
    x, weights = torch.randint(-2, 3, (5, 16), generator=generator).float(), torch.ones(5, 2)
    ids = torch.rand(5, 4, generator=generator).topk(2).indices
    want = moealign.fused_moe(x, up, down, weights, ids)
    placement = ExpertPlacement.linear(4, 1)
    # Whole numbers below 16 travel in e4m3 without loss, but for the scale.
    for kind, rows, way in itertools.product(("same", "fp8"), ("route", "token"), ("collective", "direct")):
        exchange = ExpertExchange(placement, capacity=10, wire=kind, rows=rows, transport=way)
        first, again = exchange(x, up, down, weights, ids), exchange(x, up, down, weights, ids)
        what = f"{kind}, {rows}, {way}"
        yield f"{what}: the first call", wrong(int((~torch.isclose(first, want, rtol=1e-5)).sum()))
        yield f"{what}: a call without checks", wrong(int((first != again).sum()) + (not exchange._passed))
    dist.destroy_process_group()


def wrong(elements: int) -> str | None:
    return f"{elements} elements differ" if elements else None


if __name__ == "__main__":
    patch_interpreter()
    sys.exit(failures([*cases(), *tokens_to_ranks(), *direct(), *layers()]))
