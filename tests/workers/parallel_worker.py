"""What one rank does; test_parallel.py starts a process for each."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import functools
import inspect
import itertools
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moealign import (
    InvalidInput,
    InvalidType,
    QuantizedWeights,
    RankFailed,
    align,
    align_batched,
    fused_moe,
    grouped_gemm,
    new_error_word,
    raise_for_errors,
)
from moealign.experts.quantized import quantize_rows
from moealign.parallel import (
    ExpertExchange,
    ExpertPlacement,
    batched_moe,
    beside,
    contiguous_moe,
    dispatched_moe,
    move_experts,
    replicated_moe,
)
from moealign.views import group_indices, masked, permute, unpermute

EXPERTS, HIDDEN, INNER, TOP_K = 10, 6, 5, 3
DEVICE = torch.device("cpu")  # with NCCL this rank's GPU


def layer(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator, dtype=dtype)
    return up.to(DEVICE), torch.randn(EXPERTS, HIDDEN, INNER, generator=generator, dtype=dtype).to(DEVICE)


def tokens_of(seed: int, count: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, TOP_K, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, EXPERTS, (count, TOP_K), generator=generator)
    if kind == "one expert":
        ids.fill_(EXPERTS - 1)
    elif kind == "dropped":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, -1, ids)
    elif kind == "nothing":
        ids.fill_(-1)
    return hidden.to(DEVICE), weights.to(DEVICE), ids.to(DEVICE)


def placements(ranks: int) -> dict[str, ExpertPlacement]:
    loads = [float(e * e + 1) for e in range(EXPERTS)]
    return {
        "linear": ExpertPlacement.linear(EXPERTS, ranks),
        "round robin": ExpertPlacement.round_robin(EXPERTS, ranks),
        "balanced": ExpertPlacement.balanced(loads, ranks),
        "replicated": ExpertPlacement.balanced(loads, ranks, replicas=ranks + 1),
    }


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    most = 1e-12 if DEVICE.type == "cpu" else 1e-11
    torch.testing.assert_close(a, b, rtol=most, atol=most)


def shards(placement: ExpertPlacement, rank: int, grad: bool) -> list[torch.Tensor]:
    return [placement.shard(w, rank).requires_grad_(grad) for w in layer()]


def gathered(placement: ExpertPlacement, local: torch.Tensor) -> torch.Tensor:
    """Gradients of the shards, summed into ``[E, ...]``: copies of an expert add up."""
    rows = [torch.empty_like(local) for _ in range(placement.ranks)]
    dist.all_gather(rows, local.contiguous())
    total = local.new_zeros(EXPERTS, *local.shape[1:])
    for rank, part in enumerate(rows):
        for slot, expert in enumerate(placement.table[rank]):
            if expert >= 0:
                total[expert] += part[slot]
    return total


def assert_same_compiled(exchange: ExpertExchange, out: torch.Tensor, *call: torch.Tensor) -> None:
    """In a group of two: each process compiles for seconds, and the graph is the same for any number of ranks."""
    if dist.get_world_size() == 2:
        assert torch.equal(torch.compile(exchange, backend="aot_eager", fullgraph=True)(*call), out)


def check_replicated(rank: int, ranks: int) -> None:
    for placement in placements(ranks).values():
        for kind in ("uniform", "one expert", "dropped", "nothing"):
            hidden, weights, ids = tokens_of(7, 23, kind)
            whole = [t.clone().requires_grad_() for t in (hidden, weights, *layer())]
            expected = fused_moe(whole[0], whole[2], whole[3], whole[1], ids)
            expected.sin().sum().backward()
            mine = [hidden.clone().requires_grad_(), weights.clone().requires_grad_(), *shards(placement, rank, True)]
            out = replicated_moe(mine[0], mine[2], mine[3], mine[1], ids, placement)
            out.sin().sum().backward()
            close(out, expected)
            close(mine[0].grad, whole[0].grad)
            close(mine[1].grad, whole[1].grad)
            for own, full in zip(mine[2:], whole[2:], strict=True):
                close(gathered(placement, own.grad), full.grad)


def check_dispatched(rank: int, ranks: int) -> None:
    for name, placement in placements(ranks).items():
        for kind in ("uniform", "one expert", "dropped", "nothing"):
            # Uneven, and the last rank has none.
            counts = [0 if r == ranks - 1 else 5 + 8 * r for r in range(ranks)]
            parts = [tokens_of(11 + r, counts[r], kind) for r in range(ranks)]
            every = [torch.cat(each) for each in zip(*parts, strict=True)]
            first = sum(counts[:rank])
            whole = [t.clone().requires_grad_() for t in (every[0], every[1], *layer())]
            expected = fused_moe(whole[0], whole[2], whole[3], whole[1], every[2])
            expected.sin().sum().backward()
            span = slice(first, first + counts[rank])
            for chunks in (1, 3):
                mine = [parts[rank][0].clone().requires_grad_(), parts[rank][1].clone().requires_grad_(),
                        *shards(placement, rank, True)]  # fmt: skip
                given = (mine[2], mine[3], mine[1], parts[rank][2], placement)
                out = dispatched_moe(mine[0], *given, chunks=chunks)
                out.sin().sum().backward()
                close(out, expected[span])
                close(mine[0].grad, whole[0].grad[span])
                close(mine[1].grad, whole[1].grad[span])
                for own, full in zip(mine[2:], whole[2:], strict=True):
                    close(gathered(placement, own.grad), full.grad)
                with torch.no_grad():  # the parts overlap
                    again = dispatched_moe(mine[0], *given, chunks=chunks)
                assert torch.equal(again, out), (name, kind, chunks)


def whole_numbers(seed: int, counts: list[int], kind: str) -> tuple[list[tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """Tokens of each rank, and a layer: of whole numbers, so that every order of a sum gives the same bits."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randint(-3, 4, size, generator=generator).double().to(DEVICE)

    experts = [draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)]
    parts = []
    for count in counts:
        ids = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K).indices  # a token's ids differ
        if kind == "one rank":
            ids %= -(-EXPERTS // len(counts))
        elif kind == "dropped":
            ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, -1, ids)
        elif kind == "nothing":
            ids.fill_(-1)
        parts.append((draw(count, HIDDEN), draw(count, TOP_K), ids.to(DEVICE)))
    return parts, experts


def check_exchange(rank: int, ranks: int) -> None:
    """Bit for bit the single layer, with its gradients, whatever is sent where."""
    counts = [0 if r == ranks - 1 else 5 + 8 * r for r in range(ranks)]  # uneven, and the last rank has none
    for name, placement in placements(ranks).items():
        exchange = ExpertExchange(
            placement, capacity=ExpertExchange.max_capacity(placement, max(counts), TOP_K), device=DEVICE
        )
        for kind in ("uniform", "one rank", "dropped", "nothing"):
            parts, experts = whole_numbers(3, counts, kind)
            every = [torch.cat(each) for each in zip(*parts, strict=True)]
            whole = [each.clone().requires_grad_() for each in (every[0], *experts, every[1])]
            expected = fused_moe(*whole, every[2], activation="relu")
            cotangent = torch.arange(expected.numel(), device=DEVICE).view_as(expected).remainder(5).double() - 2
            expected.backward(cotangent)
            span = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            own = [placement.shard(each, rank) for each in experts]
            mine = [each.clone().requires_grad_() for each in (parts[rank][0], *own, parts[rank][1])]
            word = new_error_word(DEVICE)
            out = exchange(*mine, parts[rank][2], activation="relu", error_word=word)
            out.backward(cotangent[span])
            raise_for_errors(word)
            assert torch.equal(out, expected[span]), (name, kind)
            assert torch.equal(mine[0].grad, whole[0].grad[span]), (name, kind)
            assert torch.equal(mine[3].grad, whole[3].grad[span]), (name, kind)
            for local, full in zip(mine[1:3], whole[1:3], strict=True):
                assert torch.equal(gathered(placement, local.grad), full.grad), (name, kind)
            with torch.no_grad():
                again = exchange(*mine, parts[rank][2], activation="relu")
                kept = (*mine, parts[rank][2], placement)
                assert torch.equal(again, out), (name, kind)
                assert torch.equal(dispatched_moe(*kept, capacity=exchange.capacity, activation="relu"), out)
        hidden, weights, ids = tokens_of(5 + rank, 4, "uniform")
        for wrong in (EXPERTS, -2, 2**40):
            ids[0, 1], word = wrong, new_error_word(DEVICE)
            out = exchange(hidden, *shards(placement, rank, False), weights, ids, error_word=word)
            close(out, fused_moe(hidden, *layer(), weights, ids))
            with pytest.raises(InvalidInput, match="topk_ids held an id outside"):
                raise_for_errors(word)


def as_fp8(rows: torch.Tensor) -> torch.Tensor:
    """Rows as they arrive over a wire of FP8."""
    values, scales = quantize_rows(rows, "group")
    return (values.float() * scales.repeat_interleave(128, 1)[:, : rows.shape[1]]).to(rows.dtype)


def check_fp8_on_the_wire(rank: int, ranks: int) -> None:
    """Bit for bit the single layer of rows that were quantised and dequantised; the results travel as they are."""
    counts = [0 if r == ranks - 1 else 5 + 8 * r for r in range(ranks)]
    placement = placements(ranks)["replicated"]
    capacity = ExpertExchange.max_capacity(placement, max(counts), TOP_K)
    exchange = ExpertExchange(placement, capacity=capacity, device=DEVICE, wire="fp8")
    plain = ExpertExchange(placement, capacity=capacity, device=DEVICE)
    hidden = 300  # three groups of columns, the last one not full
    assert exchange.wire_bytes(hidden, torch.bfloat16) < 0.56 * plain.wire_bytes(hidden, torch.bfloat16)
    assert exchange.wire_bytes(hidden, torch.bfloat16, back=True) <= plain.wire_bytes(hidden, torch.bfloat16)
    generator = torch.Generator().manual_seed(2)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    experts = randn(EXPERTS, 2 * INNER, hidden), randn(EXPERTS, hidden, INNER)
    for dtype in (torch.float32, torch.bfloat16):
        every = [(randn(n, hidden).to(dtype), randn(n, TOP_K).abs()) for n in counts]
        x, weights = every[rank]
        ids = torch.rand(len(x), EXPERTS, generator=generator.manual_seed(rank)).topk(TOP_K).indices.to(DEVICE)
        whole = [each.to(dtype) for each in experts]
        own = [placement.shard(each, rank) for each in whole]
        most = 1e-4 if dtype is torch.float32 else 2e-2
        with torch.no_grad():
            out = exchange(x, *own, weights, ids)
            expected = plain(as_fp8(x), *own, weights, ids)
            if DEVICE.type == "cpu":  # the same rows in the same order: the same bits
                assert torch.equal(out, expected), dtype
            assert float((out - expected).norm()) <= most * float(expected.norm()) + 1e-9
            exact = fused_moe(x, *whole, weights, ids)
            assert float((out - exact).norm()) <= 0.08 * float(exact.norm()) + 1e-9
            assert_same_compiled(exchange, out, x, *own, weights, ids)
            assert torch.equal(out, exchange(x, *own, weights, ids))
    with pytest.raises(InvalidInput, match="wire: expected same where gradients are needed, got fp8"):
        exchange(x.requires_grad_(), *own, weights, ids)
    with pytest.raises(InvalidInput, match="wire: expected same or fp8, got 'int8'"):
        ExpertExchange(placement, capacity=1, device=DEVICE, wire="int8")
    # FP8 weights, over either wire.
    data = [each.to(torch.float8_e4m3fn) for each in experts]
    ones = [torch.ones(placement.slots, -(-each.shape[1] // 128), -(-each.shape[2] // 128)).to(DEVICE) for each in data]
    quantized = [
        QuantizedWeights(placement.shard(each.float(), rank).to(torch.float8_e4m3fn), scales)
        for each, scales in zip(data, ones, strict=True)
    ]
    x = x.detach()
    alone = [
        QuantizedWeights(each, torch.ones(EXPERTS, *one.shape[1:]).to(DEVICE))
        for each, one in zip(data, ones, strict=True)
    ]
    want = fused_moe(x, *alone, weights, ids)
    for each in (plain, exchange):
        got = each(x, *quantized, weights, ids)
        assert float((got - want).norm()) <= 3e-2 * float(want.norm()) + 1e-9, each.wire


def check_one_row_per_token(rank: int, ranks: int) -> None:
    """The single layer, with a row for each token and rank: uneven counts, a rank without tokens, all to one rank."""
    counts = [0 if r == ranks - 1 else 5 + 8 * r for r in range(ranks)]
    for name, placement in placements(ranks).items():
        capacity = ExpertExchange.max_capacity(placement, max(counts), TOP_K, rows="token")
        assert capacity == max(counts)
        exchange = ExpertExchange(placement, capacity=capacity, device=DEVICE, rows="token")
        own = shards(placement, rank, False)
        for kind in ("uniform", "one expert", "dropped", "nothing"):  # the ids of a token may be equal
            hidden, weights, ids = tokens_of(11 + rank, counts[rank], kind)
            word = new_error_word(DEVICE)
            out = exchange(hidden, *own, weights, ids, error_word=word)
            raise_for_errors(word)
            close(out, fused_moe(hidden, *layer(), weights, ids))
            assert torch.equal(exchange(hidden, *own, weights, ids), out), (name, kind)
            if kind == "dropped" and placement.replicated:
                assert_same_compiled(exchange, out, hidden, *own, weights, ids)
        lame = ids.clone().fill_(EXPERTS)  # names no expert, and has a weight that must not count
        assert not exchange(hidden, *own, weights * float("nan"), lame).any()
        few, word = torch.tensor([2], dtype=torch.int32, device=DEVICE), new_error_word(DEVICE)
        hidden, weights, ids = tokens_of(5 + rank, 4 + rank, "uniform")
        biases = {
            "gate_up_bias": torch.ones(placement.slots, 2 * INNER),
            "down_bias": torch.ones(placement.slots, HIDDEN),
        }
        biases = {each: bias.to(DEVICE, torch.float64) for each, bias in biases.items()}
        alone = {each: bias[:1].expand(EXPERTS, -1) for each, bias in biases.items()}
        valid = {"num_valid_tokens": few, "activation": "gelu"}
        out = exchange(hidden, *own, weights, ids, error_word=word, **biases, **valid)
        close(out, fused_moe(hidden, *layer(), weights, ids, **alone, **valid))
        assert not out[2:].any()
        ids[0, 1] = 2**40
        out = exchange(hidden, *own, weights, ids, error_word=word)
        close(out, fused_moe(hidden, *layer(), weights, ids))
        with pytest.raises(InvalidInput, match="topk_ids held an id outside"):
            raise_for_errors(word)
        check_a_token_too_many(placement, rank, ranks)
    check_tokens_in_fp8(rank, ranks)


def check_a_token_too_many(placement: ExpertPlacement, rank: int, ranks: int) -> None:
    """Each rank keeps its first tokens for each rank; others lose their experts there, and the error word says so."""
    hidden, weights, ids = tokens_of(3 + rank, 9 - rank, "dropped")
    own = shards(placement, rank, False)
    bins = placement.bins(ids)
    goes_to = torch.where(bins < 0, -1, bins // placement.slots)
    for capacity in (1, 4):
        fits, lost = torch.zeros_like(goes_to, dtype=torch.bool), []
        for other in range(ranks):
            there = goes_to == other
            late = there.any(1).cumsum(0) > capacity
            fits |= there & ~late.unsqueeze(1)
            lost.append(int((there.any(1) & late).sum()))
        expected = fused_moe(hidden, *layer(), weights, ids.where(fits, -1))
        exchange = ExpertExchange(placement, capacity=capacity, device=DEVICE, rows="token")
        word = new_error_word(DEVICE)
        close(exchange(hidden, *own, weights, ids, error_word=word), expected)
        if any(lost):
            with pytest.raises(InvalidInput, match="more routes went to a rank than the exchange has capacity for"):
                raise_for_errors(word)
        raise_for_errors(word)
        arrived, way = exchange.dispatch(hidden, ids, topk_weights=weights)  # by hand
        assert arrived.topk_ids.shape == arrived.topk_weights.shape == (ranks * capacity, TOP_K)
        assert exchange.overflow(way).tolist() == lost
        rows = fused_moe(arrived.hidden_states, *own, *arrived[1:])
        close(exchange.combine(rows, weights, way), expected)
    for call, message in (
        (lambda: exchange.dispatch(hidden, ids), "topk_weights: expected those of the tokens"),
        (lambda: exchange.wire_bytes(8, torch.bfloat16), "top_k: expected the number of choices"),
        (lambda: exchange(hidden.clone().requires_grad_(), *own, weights, ids),
         "rows: expected route where gradients are needed, got token, which has none; call it under"),
        (lambda: exchange(hidden, *own, weights.clone().requires_grad_(), ids), "rows: expected route where gradients"),
        (lambda: ExpertExchange(placement, capacity=1, rows="expert"), "rows: expected route or token, got 'expert'"),
        (lambda: ExpertExchange.max_capacity(placement, 1, 1, rows="all"), "rows: expected route or token, got 'all'"),
        (lambda: ExpertExchange(placement, capacity=1, device=DEVICE).dispatch(hidden, ids, topk_weights=weights),
         "topk_weights: expected None where rows are routes, got a tensor; combine takes it"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            call()


def check_tokens_in_fp8(rank: int, ranks: int) -> None:
    """The exchange of rows that were quantised and dequantised, in other dtypes and with the bytes that it tells."""
    placement, hidden, count = placements(ranks)["replicated"], 300, 6 + rank
    kinds = {"capacity": 6 + ranks, "device": DEVICE, "rows": "token"}
    exchange, plain = ExpertExchange(placement, wire="fp8", **kinds), ExpertExchange(placement, **kinds)
    rows = ranks * exchange.capacity
    assert plain.wire_bytes(hidden, torch.bfloat16, top_k=8) == rows * 704  # 600 + 8 * 4 + 8 * 2 bytes
    assert exchange.wire_bytes(hidden, torch.bfloat16, top_k=8) == rows * 384  # 300 + 3 * 4 + 8 * 4 + 8 * 2 bytes
    assert exchange.wire_bytes(hidden, torch.bfloat16, back=True) == rows * 600
    generator = torch.Generator().manual_seed(2)
    experts = [
        torch.randn(*size, generator=generator).to(DEVICE)
        for size in ((EXPERTS, 2 * INNER, hidden), (EXPERTS, hidden, INNER))
    ]
    generator.manual_seed(rank)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(count, hidden, generator=generator).to(DEVICE, dtype)
        weights = torch.rand(count, TOP_K, generator=generator).to(DEVICE)
        ids = torch.rand(count, EXPERTS, generator=generator).topk(TOP_K).indices.to(DEVICE)
        whole = [each.to(dtype) for each in experts]
        own = [placement.shard(each, rank) for each in whole]
        most = 1e-4 if dtype is torch.float32 else 2e-2
        with torch.no_grad():
            out, expected = exchange(x, *own, weights, ids), plain(as_fp8(x), *own, weights, ids)
            if DEVICE.type == "cpu":
                assert torch.equal(out, expected), dtype
            assert float((out - expected).norm()) <= most * float(expected.norm())
            exact = fused_moe(x, *whole, weights, ids)
            for each, error in ((plain, most), (exchange, 0.08)):
                out = each(x, *own, weights, ids)
                assert out.dtype is dtype
                assert float((out - exact).norm()) <= error * float(exact.norm())
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    low = each(x, *own, weights, ids)
                assert low.dtype is dtype
                assert float((low - out).norm()) <= 0.03 * float(out.norm())
    with torch.no_grad():
        assert_same_compiled(exchange, out, x, *own, weights, ids)


def check_direct(rank: int, ranks: int) -> None:
    """Rows written into other ranks' memory give the bits of a collective: batches of any size, one after the other."""
    experts = layer(4)
    for (name, placement), wire, rows in itertools.product(
        placements(ranks).items(), ("same", "fp8"), ("route", "token")
    ):
        few = {"capacity": 7, "device": DEVICE, "wire": wire, "rows": rows}  # some batches have more
        plain, direct = ExpertExchange(placement, **few), ExpertExchange(placement, transport="direct", **few)
        own = [placement.shard(each, rank) for each in experts]
        for step, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16, torch.float64)):
            mine = [each.to(dtype) for each in own]
            for kind in ("uniform", "one expert", "dropped", "nothing"):
                hidden, weights, ids = tokens_of(7 * step + rank, 0 if step == rank else 3 + 4 * rank, kind)
                call, words = (hidden.to(dtype), *mine, weights, ids), [new_error_word(DEVICE) for _ in range(2)]
                valid = torch.tensor([2 + step], dtype=torch.int32, device=DEVICE) if step else None
                want, got = (
                    each(*call, num_valid_tokens=valid, error_word=word)
                    for each, word in zip((plain, direct), words, strict=True)
                )
                assert torch.equal(got, want), (name, wire, rows, dtype, kind)
                assert torch.equal(direct(*call, num_valid_tokens=valid), want), (name, wire, rows, dtype, kind)
                assert torch.equal(*words)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            call = (hidden.float(), *(each.float() for each in own), weights, ids)
            assert torch.equal(direct(*call), plain(*call)), (name, wire, rows)
        half = {"topk_weights": weights} if rows == "token" else {}
        with torch.no_grad():
            for _ in range(2):  # in two halves
                arrived, way = direct.dispatch(hidden, ids, **half)
                with pytest.raises(InvalidInput, match="dispatch: expected the last batch to be combined first"):
                    direct.dispatch(hidden, ids, **half)
                results = fused_moe(arrived.hidden_states, *own, *arrived[1:])
                assert torch.equal(direct.combine(results, weights, way), plain(hidden, *own, weights, ids))
            if ranks > 2 or name != "replicated" or (wire, rows) not in (("same", "route"), ("fp8", "token")):
                continue
            torch._dynamo.reset()
            compiled = torch.compile(direct, backend="aot_eager", fullgraph=True)
            want = plain(hidden, *own, weights, ids)
            for each in (compiled, direct, compiled, direct if rank else compiled):  # ranks may differ in that
                assert torch.equal(each(hidden, *own, weights, ids), want), (wire, rows)
    with pytest.raises(InvalidInput, match=r"dispatch: expected torch.no_grad\(\) with the direct transport"):
        direct.dispatch(hidden, ids, **half)
    direct = ExpertExchange(placement, capacity=1, device=DEVICE, transport="direct")
    with pytest.raises(InvalidInput, match="transport: expected collective where gradients are needed, got direct"):
        direct(hidden.clone().requires_grad_(), *own, weights, ids)
    with pytest.raises(InvalidInput, match="transport: expected collective or direct, got 'nvlink'"):
        ExpertExchange(placement, capacity=1, device=DEVICE, transport="nvlink")
    if DEVICE.type == "cpu":  # one rank cannot, and all say why
        full = mock.patch.object(os, "posix_fallocate", side_effect=OSError("No space left on device"))
        elsewhere = mock.patch.object(Path, "exists", return_value=False)
        for broken, message in (
            (full, f"room for {96 * ranks} bytes, got No space left"),
            (elsewhere, "ranks of one machine"),
        ):
            with broken if rank == 0 else contextlib.nullcontext(), pytest.raises(InvalidInput, match=message):
                direct(hidden, *own, weights, ids)
        assert direct(hidden, *own, weights, ids).shape == hidden.shape


def check_expected_capacity(rank: int, ranks: int) -> None:
    """What even routing needs, times a factor; a busy rank needs more, and none more than never exceeds."""
    placement = ExpertPlacement.linear(EXPERTS, ranks)
    most = ExpertExchange.max_capacity(placement, 64, TOP_K)
    even = ExpertExchange.expected_capacity(placement, 64, TOP_K, factor=1.0, loads=[1.0] * EXPERTS)
    imbalance = placement.imbalance([1.0] * EXPERTS)
    assert even == -int(-imbalance * 64 * TOP_K / ranks // 1)
    assert even < ExpertExchange.expected_capacity(placement, 64, TOP_K) <= most
    busy = [100.0, *[1.0] * (EXPERTS - 1)]
    assert even < ExpertExchange.expected_capacity(placement, 64, TOP_K, factor=1.0, loads=busy) <= most
    assert ExpertExchange.expected_capacity(placement, 64, TOP_K, factor=100.0) == most
    assert ExpertExchange.expected_capacity(placement, 0, TOP_K) == 1
    with pytest.raises(InvalidInput, match="factor: expected a positive number, got 0"):
        ExpertExchange.expected_capacity(placement, 64, TOP_K, factor=0)
    share = imbalance / ranks
    options = {"factor": 1.0, "rows": "token"}
    tokens = ExpertExchange.expected_capacity(placement, 64, TOP_K, loads=[1.0] * EXPERTS, **options)
    assert tokens == -int(-64 * (1 - (1 - share) ** TOP_K) // 1)
    assert tokens < ExpertExchange.expected_capacity(placement, 64, TOP_K, loads=busy, **options) <= 64
    assert ExpertExchange.expected_capacity(placement, 64, TOP_K, factor=100.0, rows="token") == 64
    # Routes of 64 tokens that are even but for chance: 1.5 times the mean loses none here, half the mean does.
    parts, experts = whole_numbers(21, [64] * ranks, "uniform")
    hidden, weights, ids = parts[rank]
    own = [placement.shard(each, rank) for each in experts]
    for factor, loses in ((1.5, False), (0.5, True)):
        capacity = ExpertExchange.expected_capacity(placement, 64, TOP_K, factor=factor)
        exchange = ExpertExchange(placement, capacity=capacity, device=DEVICE)
        _, way = exchange.dispatch(hidden, ids)
        assert bool(exchange.overflow(way).sum()) == loses
        out = exchange(hidden, *own, weights, ids, activation="relu")
        assert torch.equal(out, fused_moe(hidden, *experts, weights, ids, activation="relu")) != loses


def check_beside(rank: int, ranks: int) -> None:
    """Shared experts and the next router beside an exchange: the bits of one after the other, in a graph too."""
    placement = placements(ranks)["linear"]
    parts, experts = whole_numbers(17, [6] * ranks, "uniform")
    hidden, weights, ids = parts[rank]
    if DEVICE.type == "cuda":  # a dtype that the kernels take, for a graph; whole numbers are exact in it
        hidden, weights, *experts = (each.float() for each in (hidden, weights, *experts))
    own = [placement.shard(each, rank) for each in experts]
    exchange = ExpertExchange(placement, capacity=6 * TOP_K, device=DEVICE)
    shared, router = own[0][0, :HIDDEN], own[0][0].T

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with_shared = beside(lambda x: x @ shared.T, hidden)
        following = beside(lambda x: (x @ router).topk(2), hidden)
        routed = exchange(hidden, *own, weights, ids, activation="relu")
        return routed + with_shared.wait(), following.wait().indices

    expected = fused_moe(hidden, *experts, weights, ids, activation="relu") + hidden @ shared.T
    chosen = (hidden @ router).topk(2).indices
    with torch.no_grad():
        for _ in range(3):
            out, next_ids = step()
            assert torch.equal(out, expected)
            assert torch.equal(next_ids, chosen)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out, next_ids = step()
            graph.replay()
            assert torch.equal(out, expected)
            assert torch.equal(next_ids, chosen)
    x = hidden.clone().requires_grad_()  # gradients as well
    (beside(lambda x: x @ shared.T, x).wait() + x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(hidden) @ shared + 1)


def check_capacity(rank: int, ranks: int) -> None:
    """Each rank keeps the first routes to each rank; the others add nothing, and the error word says so."""
    counts = [9 - 2 * r for r in range(ranks)]
    for name, placement in placements(ranks).items():
        parts, experts = whole_numbers(5, counts, "uniform")
        own = [placement.shard(each, rank) for each in experts]
        hidden, weights, ids = parts[rank]
        goes_to = placement.bins(ids).flatten() // placement.slots
        for capacity in (1, 4, max(counts) * TOP_K):
            fits = torch.zeros_like(goes_to, dtype=torch.bool)
            for other in range(ranks):
                fits[(goes_to == other).nonzero()[:capacity, 0]] = True
            lost = torch.stack([((goes_to == other) & ~fits).sum() for other in range(ranks)])
            expected = fused_moe(hidden, *experts, weights, ids.where(fits.view_as(ids), -1), activation="relu")
            exchange = ExpertExchange(placement, capacity=capacity, device=DEVICE)
            word = new_error_word(DEVICE)
            assert torch.equal(exchange(hidden, *own, weights, ids, activation="relu", error_word=word), expected)
            if lost.sum():
                with pytest.raises(InvalidInput, match="more routes went to a rank than the exchange has capacity for"):
                    raise_for_errors(word)
            raise_for_errors(word)  # it was zeroed, or nothing was lost
            # By hand, with a weight that must not count, and with tokens that are only there on the host.
            arrived, way = exchange.dispatch(hidden, ids)
            assert torch.equal(exchange.overflow(way), lost.int()), (name, capacity)
            rows = fused_moe(arrived.hidden_states, *own, *arrived[1:], activation="relu")
            lame = weights.masked_fill(~fits.view_as(ids), float("nan"))
            assert torch.equal(exchange.combine(rows, lame, way), expected)
        few = torch.tensor([2], dtype=torch.int32, device=DEVICE)
        out = exchange(hidden, *own, weights, ids, activation="relu", num_valid_tokens=few)
        assert torch.equal(out[:2], expected[:2])
        assert not out[2:].any()


def check_exchange_in_every_mode(rank: int, ranks: int) -> None:
    """One graph of torch.compile, with its gradients; lower precision; the bits of the single layer in any dtype."""
    for placement, count in ((placements(ranks)["linear"], 7 - rank), (placements(ranks)["replicated"], 5 + rank)):
        exchange = ExpertExchange(placement, capacity=7 * TOP_K, device=DEVICE)
        wanted, ids, biases = given_to(rank, placement, count)
        inputs = [*wanted, *biases.values()]
        word = new_error_word(DEVICE)

        def layer(x, up, down, weights, up_bias, down_bias):
            options = {"gate_up_bias": up_bias, "down_bias": down_bias}
            return exchange(x, up, down, weights, ids, error_word=word, **options)  # noqa: B023

        out = layer(*inputs)
        close(out, dispatched_moe(*wanted, ids, placement, **biases))
        grads = torch.autograd.grad(out.square().sum(), inputs)
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        close(compiled(*inputs), out)
        for got, want in zip(torch.autograd.grad(compiled(*inputs).square().sum(), inputs), grads, strict=True):
            close(got, want)
        with torch.inference_mode():
            close(layer(*inputs), out)
            close(compiled(*inputs), out)
        raise_for_errors(word)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            low = layer(*(each.float() for each in inputs))
            assert low.dtype is torch.float32
            assert float((low - out).norm()) <= 0.03 * float(out.norm())
        plain = [each.detach() for each in inputs]
        for tracer in (
            lambda: layer(*(each.to("meta") for each in plain)),  # noqa: B023
            lambda: torch.func.grad(lambda x: layer(x, *plain[1:]).sum())(plain[0]),  # noqa: B023
            lambda: torch.fx.experimental.proxy_tensor.make_fx(layer)(*plain),  # noqa: B023
        ):
            with pytest.raises(InvalidInput, match="expected an eager call with plain tensors"):
                tracer()
        for dtype in (torch.float32, torch.bfloat16):
            parts, whole = whole_numbers(9, [count], "uniform")
            x, weights, *whole = (each.to(dtype) for each in (*parts[0][:2], *whole))
            mine = [placement.shard(each, rank) for each in whole]
            alone = fused_moe(x, *whole, weights, parts[0][2], activation="relu")
            got = exchange(x, *mine, weights, parts[0][2], activation="relu")
            assert got.dtype is dtype
            if dtype is torch.float32:
                assert torch.equal(got, alone)
            else:
                assert float((got - alone).double().norm()) < 1e-2 * float(alone.double().norm())


class DeepEP:
    """What DeepEP's buffer documents of shapes and values, over gloo: each rank sees the tokens of all."""

    def __init__(self, ranks: int, rank: int) -> None:
        self.ranks, self.rank, self.local = ranks, rank, EXPERTS // ranks

    def _gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        every: list[torch.Tensor | None] = [None] * self.ranks
        dist.all_gather_object(every, tensor.cpu())
        return [each.to(tensor.device) for each in every]

    def low_latency_dispatch(self, x, topk_idx, most, experts):
        """recv_x [local experts, ranks * most, H], garbage after recv_count [local experts]; handle."""
        recv_x = torch.full((self.local, self.ranks * most, x.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
        count, handle = [0] * self.local, []
        for source, (rows, ids) in enumerate(zip(self._gathered(x), self._gathered(topk_idx), strict=True)):
            for token, choice in (ids // self.local == self.rank).nonzero().tolist():
                expert = int(ids[token, choice]) % self.local
                recv_x[expert, count[expert]] = rows[token]
                handle.append((source, token, choice, expert, count[expert]))
                count[expert] += 1
        return recv_x, torch.tensor(count, dtype=torch.int32, device=x.device), handle

    def low_latency_combine(self, x, topk_idx, topk_weights, handle):
        """[T, H]: the results of each token's experts, weighted."""
        back = [[] for _ in range(self.ranks)]
        for source, token, choice, expert, row in handle:
            back[source].append((token, choice, x[expert, row].cpu()))
        every: list[object] = [None] * self.ranks
        dist.all_gather_object(every, back)
        out = x.new_zeros(topk_idx.shape[0], x.shape[2])
        for part in every:
            for token, choice, row in part[self.rank]:
                out[token] += topk_weights[token, choice] * row.to(out.device)
        return out

    def dispatch(self, x, topk_idx, topk_weights):
        """recv_x [rows, H], recv_topk_idx [rows, k] of local experts or -1, recv_topk_weights [rows, k]; handle."""
        rows, ids, weights, handle = [], [], [], []
        parts = (self._gathered(each) for each in (x, topk_idx, topk_weights))
        for source, (of_x, of_ids, of_weights) in enumerate(zip(*parts, strict=True)):
            for token in (of_ids // self.local == self.rank).any(1).nonzero()[:, 0].tolist():
                here = of_ids[token] // self.local == self.rank
                rows.append(of_x[token])
                ids.append(torch.where(here, of_ids[token] % self.local, -1))
                weights.append(of_weights[token])
                handle.append((source, token))
        return torch.stack(rows), torch.stack(ids), torch.stack(weights), handle

    def combine(self, x, tokens, handle):
        every: list[object] = [None] * self.ranks
        dist.all_gather_object(every, [(*way, row.cpu()) for way, row in zip(handle, x, strict=True)])
        out = x.new_zeros(tokens, x.shape[1])
        for part in every:
            for source, token, row in part:
                if source == self.rank:
                    out[token] += row.to(out.device)
        return out


def check_deepep(rank: int, ranks: int) -> None:
    """Both layouts of DeepEP, computed here between its exchange there and its exchange back."""
    counts = [6 + 3 * r for r in range(ranks)]
    parts, experts = whole_numbers(4, counts, "dropped")
    hidden, weights, ids = parts[rank]
    expected = fused_moe(hidden, *experts, weights, ids, activation="relu")
    local = EXPERTS // ranks
    own = [each[local * rank : local * (rank + 1)] for each in experts]
    buffer = DeepEP(ranks, rank)
    most = max(counts) * TOP_K
    recv_x, recv_count, handle = buffer.low_latency_dispatch(hidden, ids, most, EXPERTS)
    out = batched_moe(recv_x, recv_count, *own, activation="relu")
    assert torch.equal(buffer.low_latency_combine(out, ids, weights, handle), expected)
    # The same through the layout of align_batched and two products, and contiguous with m_indices.
    layout = align_batched(
        recv_count, max_tokens_per_batch=recv_x.shape[1], block_size=4, positions=True, block_rows=True
    )
    rows = recv_x.nan_to_num().flatten(0, 1)
    rows = grouped_gemm(grouped_gemm(rows, own[0], layout, top_k=1, activation="relu_mul"), own[1], layout, top_k=1)
    assert torch.equal(rows.view(out.shape), out)
    sorted_rows = permute(recv_x.flatten(0, 1), layout, top_k=1)
    results = contiguous_moe(sorted_rows.nan_to_num(), group_indices(layout), *own, activation="relu")
    assert torch.equal(unpermute(results, layout.positions, top_k=1).view(out.shape), out)
    recv_x, recv_ids, recv_weights, handle = buffer.dispatch(hidden, ids, weights)
    rows = fused_moe(recv_x, *own, recv_weights, recv_ids, activation="relu")
    assert torch.equal(buffer.combine(rows, len(ids), handle), expected)
    # And ours in the form of its low latency mode: a matrix for each expert.
    exchange = ExpertExchange(ExpertPlacement.linear(EXPERTS, ranks), capacity=most, device=DEVICE)
    arrived, way = exchange.dispatch(hidden, ids)
    extras = {"expert_counts": True, "expert_offsets": True, "positions": True}
    layout = align(arrived.topk_ids, block_size=1, num_experts=local, **extras)
    rows, counts_of, positions = masked(layout, ranks * most)
    batches = permute(arrived.hidden_states, layout, top_k=1, rows=rows)
    results = batched_moe(batches, counts_of, *own, activation="relu")
    results = unpermute(results.flatten(0, 1), positions, top_k=1)
    assert torch.equal(exchange.combine(results, weights, way), expected)
    for call, error, message in (
        (lambda: batched_moe(rows, recv_count, *own), InvalidInput, r"rows: expected \[E, M, H\], got"),
        (lambda: batched_moe(out, recv_count[1:], *own), InvalidInput, "expert_num_tokens: expected"),
        (lambda: batched_moe(out, recv_count.float(), *own), InvalidType, "expert_num_tokens: expected an integer"),
        (lambda: contiguous_moe(out, recv_count, *own), InvalidInput, r"rows: expected \[R, H\]"),
        (lambda: contiguous_moe(out[0], recv_count, *own), InvalidInput, "m_indices: expected"),
    ):
        with pytest.raises(error, match=message):
            call()


def check_moves(rank: int, ranks: int) -> None:
    """Weights in any dtype reach their new ranks bit for bit, some at a time, and no step before the last sees it."""
    every = [*layer(), torch.arange(EXPERTS, dtype=torch.uint8, device=DEVICE), layer()[0].to(torch.float8_e4m3fn)]
    hidden, weights, ids = tokens_of(rank, 6, "uniform")
    expected = fused_moe(hidden, *every[:2], weights, ids)
    loads = [float(e * e + 1) for e in range(EXPERTS)]
    spare = np.full((ranks, 12), -1)
    spare[:, :EXPERTS] = np.where(np.arange(EXPERTS) % ranks == np.arange(ranks)[:, None], np.arange(EXPERTS), -1)
    fewer = ExpertPlacement(np.roll(spare, 2, axis=1), EXPERTS)
    every_placement = placements(ranks)
    for old, new in (
        (every_placement["linear"], every_placement["round robin"]),
        (every_placement["linear"], every_placement["linear"].rebalanced(loads)),
        (every_placement["replicated"], every_placement["replicated"].rebalanced(loads[::-1])),
        (ExpertPlacement(spare, EXPERTS), fewer),  # inside the ranks, from and into empty slots
        (fewer, fewer),
    ):
        for most in (None, 1, 2):
            own = [old.shard(each.view(torch.uint8), rank).view(each.dtype) for each in every]
            before = [each.clone() for each in own]
            close(dispatched_moe(hidden, *own[:2], weights, ids, old), expected)
            move = move_experts(own, old, new, experts_per_step=most)
            for turn in range(1, move.steps + 1):
                assert same_bits(own, before)
                assert move.step() is (turn == move.steps)
            assert move.step()
            assert same_bits(own, [new.shard(each.view(torch.uint8), rank).view(each.dtype) for each in every])
            close(dispatched_moe(hidden, *own[:2], weights, ids, new), expected)
            came = max(len(set(after) - set(now)) for after, now in zip(new.table, old.table, strict=True))
            assert move.steps >= (1 if most is None else -(-came // most))
            assert most or move.steps == 1
    up, down = shards(fewer, rank, False)
    for call, message in (
        (lambda: move_experts([up], fewer, every_placement["linear"]), "new: expected a placement of 10 experts on"),
        (lambda: move_experts([up], fewer, fewer, experts_per_step=0), "experts_per_step: expected an int of at least"),
        (lambda: move_experts([up[1:]], fewer, fewer), "weights: expected contiguous tensors of 12 experts, got"),
        (lambda: move_experts([down.transpose(1, 2)], fewer, fewer), "weights: expected contiguous tensors"),
    ):
        with pytest.raises(InvalidInput, match=message):
            call()


def same_bits(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(some, others, strict=True))


def check_exchange_refusals(rank: int, ranks: int) -> None:
    placement = ExpertPlacement.linear(EXPERTS, ranks)
    hidden, weights, ids = tokens_of(0, 4, "uniform")
    own = shards(placement, rank, False)
    exchange = ExpertExchange(placement, capacity=5, device=DEVICE)
    arrived, way = exchange.dispatch(hidden, ids)
    for call, message in (
        (lambda: ExpertExchange(placement, capacity=0), "capacity: expected an int of at least 1, got 0; .*max_capac"),
        (lambda: ExpertExchange(placement, capacity=2**30), f"capacity: expected at most .* for each of {ranks} ranks"),
        (lambda: ExpertExchange(ExpertPlacement.linear(EXPERTS, ranks + 1), capacity=1), "placement: expected one of"),
        (lambda: ExpertExchange(ExpertPlacement.linear(2**16 * ranks, ranks), capacity=1), "at most 32767 experts"),
        (lambda: exchange(hidden, *layer(), weights, ids), "gate_up_proj: expected this rank's"),
        (lambda: exchange(hidden, *own, weights[:2], ids), r"topk_weights: expected a floating \[4, 3\] like"),
        (lambda: exchange(hidden, *own, weights.long(), ids), r"topk_weights: .* got torch.int64"),
        (lambda: exchange(hidden, *own, weights, ids[:3]), r"topk_ids: expected \[4, k\]"),
        (lambda: exchange(hidden.bfloat16()[:, :1], *own, weights, ids), "hidden_states: expected .* at least 4 bytes"),
        (lambda: exchange(hidden, *own, weights, ids, out=hidden.clone()), "out: expected None in an exchange"),
        (lambda: exchange(hidden, *own, weights, ids, expert_map=ids[0]), "expert_map: expected None in an exchange"),
        (lambda: exchange.dispatch(hidden.to(torch.float8_e4m3fn), ids), "hidden_states: expected a floating dtype"),
        (lambda: exchange.dispatch(hidden.to("meta"), ids), "expected an eager call with plain tensors"),
        (lambda: exchange.combine(arrived.hidden_states[1:], weights, way), "rows: expected a floating"),
        (lambda: exchange.combine(arrived.hidden_states, weights[1:], way), "topk_weights: expected a floating"),
        (lambda: dispatched_moe(hidden, *own, weights, ids, placement, chunks=2, capacity=3), "chunks: expected 1"),
        (lambda: dispatched_moe(hidden, *own, weights, ids, placement, error_word=new_error_word("cpu")),
         "error_word: expected one only with a capacity"),
    ):  # fmt: skip
        with pytest.raises((InvalidInput, InvalidType), match=message):
            call()


def check_mesh(rank: int, ranks: int) -> None:
    mesh = dist.device_mesh.init_device_mesh(DEVICE.type, (ranks,))
    placement = ExpertPlacement.linear(EXPERTS, ranks)
    hidden, weights, ids = tokens_of(3, 9, "uniform")
    up, down = shards(placement, rank, False)
    given, expected = (hidden, up, down, weights, ids, placement), fused_moe(hidden, *layer(), weights, ids)
    close(replicated_moe(*given, group=mesh), expected)
    close(dispatched_moe(*given, group=mesh, capacity=9 * TOP_K), expected)


def check_a_subgroup(rank: int, ranks: int) -> None:
    group = dist.new_group([0, 1])
    if rank < 2:
        placement = ExpertPlacement.round_robin(EXPERTS, 2)
        hidden, weights, ids = tokens_of(rank, 4 + rank, "uniform")
        up, down = shards(placement, rank, False)
        for options in ({}, {"capacity": 5 * TOP_K}):
            out = dispatched_moe(hidden, up, down, weights, ids, placement, group=group, **options)
            close(out, fused_moe(hidden, *layer(), weights, ids))


def check_refusals(rank: int, ranks: int) -> None:
    hidden, weights, ids = tokens_of(0, 4, "uniform")
    up, down = layer()
    for call, message in (
        (lambda: replicated_moe(hidden, up, down, weights, ids, ExpertPlacement.linear(EXPERTS, ranks + 1)),
         f"placement: expected one of {ranks} ranks"),
        (lambda: dispatched_moe(hidden, up, down, weights, ids, ExpertPlacement.linear(EXPERTS, ranks)),
         "gate_up_proj: expected this rank's"),
        (lambda: dispatched_moe(hidden, *shards(ExpertPlacement.linear(EXPERTS, ranks), rank, False), weights, ids,
                                ExpertPlacement.linear(EXPERTS, ranks), chunks=0), "chunks: expected"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            call()


def given_to(
    rank: int, placement: ExpertPlacement, count: int
) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """A rank's rows, shards and weights, its ids, and biases of its experts; all but the ids want gradients."""
    hidden, weights, ids = tokens_of(rank, count, "uniform")
    wanted = [hidden.requires_grad_(), *shards(placement, dist.get_rank(), True), weights.requires_grad_()]
    generator = torch.Generator().manual_seed(dist.get_rank())
    biases = {
        name: torch.randn(placement.slots, size, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
        for name, size in (("gate_up_bias", 2 * INNER), ("down_bias", HIDDEN))
    }
    return wanted, ids, biases


def check_modes(rank: int, ranks: int) -> None:
    """Compiled, in lower precision and without autograd, with biases and with no tokens on the last rank."""
    for function, own in ((replicated_moe, 0), (dispatched_moe, rank)):
        few = 0 if function is dispatched_moe and rank == ranks - 1 else 7
        for count in (few, 0):
            placement = ExpertPlacement.linear(EXPERTS, ranks)
            check_modes_of(function, placement, *given_to(own, placement, count))


def check_modes_of(function, placement, wanted, ids, biases) -> None:
    inputs = [*wanted, *biases.values()]

    def layer(x, up, down, weights, up_bias, down_bias):
        return function(x, up, down, weights, ids, placement, gate_up_bias=up_bias, down_bias=down_bias)

    out = layer(*inputs)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")(*inputs)
    close(compiled, out)
    for got, want in zip(torch.autograd.grad(compiled.square().sum(), inputs), grads, strict=True):
        close(got, want)
    with torch.inference_mode():
        close(layer(*inputs), out)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        low = layer(*(each.float() for each in inputs))
        assert low.dtype is torch.float32
        assert float((low - out).norm()) <= 0.03 * float(out.norm())
    plain = [each.detach() for each in inputs]
    for tracer in (
        lambda: layer(*(each.to("meta") for each in plain)),
        lambda: torch.jit.trace(layer, tuple(plain), check_trace=False),
        lambda: torch.func.grad(lambda x: layer(x, *plain[1:]).sum())(plain[0]),
        lambda: torch.fx.experimental.proxy_tensor.make_fx(layer)(*plain),
    ):
        with pytest.raises(InvalidInput, match="expected an eager call with plain tensors"):
            tracer()


class Layer(torch.nn.Module):
    """Experts that every rank holds, as data parallelism has them."""

    def __init__(self) -> None:
        super().__init__()
        up, down = layer(dtype=torch.float32)
        self.up, self.down = torch.nn.Parameter(up), torch.nn.Parameter(down)
        generator = torch.Generator().manual_seed(1)
        self.up_bias = torch.nn.Parameter(torch.randn(EXPERTS, 2 * INNER, generator=generator).to(DEVICE))
        self.down_bias = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, generator=generator).to(DEVICE))

    def forward(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        biases = {"gate_up_bias": self.up_bias, "down_bias": self.down_bias}
        return fused_moe(hidden, self.up, self.down, weights, ids, **biases)


def check_data_parallel(rank: int, ranks: int) -> None:
    """DDP and FSDP with a rank that has no tokens: its gradients are zeros, and nobody waits in vain."""
    from torch.distributed.fsdp import fully_shard

    parts = [tokens_of(r, 0 if r == ranks - 1 else 6 + r, "uniform") for r in range(ranks)]
    parts = [(hidden.float(), weights.float(), ids) for hidden, weights, ids in parts]
    alone = Layer()
    sum(alone(*part).square().sum() for part in parts).backward()
    want = {name: each.grad / ranks for name, each in alone.named_parameters()}
    replicated = torch.nn.parallel.DistributedDataParallel(Layer())
    sharded = fully_shard(Layer(), mesh=dist.device_mesh.init_device_mesh(DEVICE.type, (ranks,)))
    for wrapped in (replicated, sharded):
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(*parts[rank]).square().sum().backward()
        for name, parameter in wrapped.named_parameters():
            grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
            torch.testing.assert_close(grad, want[name.removeprefix("module.")], rtol=1e-4, atol=1e-5)
    outside = next(each for name, each in sharded.named_parameters() if name == "up")
    with pytest.raises(InvalidType, match="gate_up_proj: expected a plain tensor, got DTensor; pass its local part"):
        fused_moe(parts[0][0], outside, alone.down, *parts[0][1:])


def check_half_precision(rank: int, ranks: int) -> None:
    """The kernels' own dtype and sizes that they take, against one rank's layer; the one wait is counted."""
    experts, hidden, inner, top_k = 16, 256, 128, 4
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * size[-1] ** -0.5).to(DEVICE, torch.bfloat16)

    up, down = randn(experts, 2 * inner, hidden), randn(experts, hidden, inner)
    placement = ExpertPlacement.balanced(torch.arange(experts) + 1, ranks, replicas=ranks)
    mine = (placement.shard(up, rank), placement.shard(down, rank))
    for tokens in (1, 16, 300):
        x = randn(tokens, hidden) * 16
        weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
        ids = torch.rand(tokens, experts, generator=generator).topk(top_k).indices.to(DEVICE)
        expected = fused_moe(x, up, down, weights, ids).double()
        scale = float(expected.norm())
        got = replicated_moe(x, *mine, weights, ids, placement).double()
        assert float((got - expected).norm()) < 1e-2 * scale, tokens
        span = slice(tokens * rank // ranks, tokens * (rank + 1) // ranks)
        for chunks in (1, 2):
            own = (x[span], *mine, weights[span], ids[span], placement)
            dispatched_moe(*own, chunks=chunks)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                got = dispatched_moe(*own, chunks=chunks)
                torch.cuda.set_sync_debug_mode("default")
            waits = [
                each for each in seen if "synchroniz" in str(each.message) and "prototype" not in str(each.message)
            ]
            where = [f"{each.filename}:{each.lineno}: {each.message}" for each in waits]
            assert len(waits) <= 1, (tokens, chunks, where)
            assert float((got.double() - expected[span]).norm()) < 1e-2 * scale, (tokens, chunks)


def check_exchange_in_a_graph(rank: int, ranks: int) -> None:
    """Captured once and replayed with other tokens, ids and numbers of valid tokens; the host waits for nothing."""
    experts, hidden, inner, top_k, tokens = 16, 256, 128, 4, 32
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=generator) * size[-1] ** -0.5).to(DEVICE, torch.bfloat16)

    up, down = randn(experts, 2 * inner, hidden), randn(experts, hidden, inner)
    both = ExpertPlacement.linear(experts, ranks), ExpertPlacement.balanced([3.0, *[1.0] * 15], ranks, 2)
    for placement, rows, transport in itertools.product(both, ("route", "token"), ("collective", "direct")):
        mine = (placement.shard(up, rank), placement.shard(down, rank))
        capacity = ExpertExchange.max_capacity(placement, tokens, top_k, rows=rows)
        exchange = ExpertExchange(placement, capacity=capacity, rows=rows, transport=transport)
        x, weights = randn(tokens, hidden), torch.rand(tokens, top_k, generator=generator).to(DEVICE)
        ids = torch.zeros(tokens, top_k, dtype=torch.int64, device=DEVICE)
        valid = torch.full((1,), tokens, dtype=torch.int32, device=DEVICE)
        word = new_error_word(DEVICE)

        def call() -> torch.Tensor:
            return exchange(x, *mine, weights, ids, num_valid_tokens=valid, error_word=word)  # noqa: B023

        with torch.no_grad():
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(2):
                    call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = call()
            for turn, count in enumerate((tokens, 7, 0, tokens)):
                parts = [torch.rand(tokens, experts, generator=generator).topk(top_k).indices for _ in range(ranks)]
                ids.copy_(parts[rank] % (2 if turn == 3 else experts))  # at last all to one rank, twice a token
                x.copy_(randn(tokens, hidden) * 16)
                valid.fill_(count)
                graph.replay()
                expected = fused_moe(x, up, down, weights, ids, num_valid_tokens=valid).double()
                assert float((out.double() - expected).norm()) <= 1e-2 * float(expected.norm()), (turn, count)
                raise_for_errors(word)
                replayed = out.clone()
                graph.replay()
                assert torch.equal(out, replayed)
            torch.cuda.set_sync_debug_mode("error")
            call()
            torch.cuda.set_sync_debug_mode("default")


def transformers_mesh(ranks: int) -> object:
    """What `maybe_distribute_model` takes: from 5.19 on a pair of meshes, before it one mesh."""
    import transformers

    if "mesh_manager" not in inspect.signature(transformers.PreTrainedModel.maybe_distribute_model).parameters:
        return dist.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    from transformers.distributed.utils import TransformersDeviceMesh

    dense, expert = (
        dist.device_mesh.init_device_mesh("cpu", (1, 1, 1, ranks), mesh_dim_names=("pp", "dp_replicate", *names))
        for names in (("fsdp", "tp"), ("efsdp", "ep"))
    )
    return TransformersDeviceMesh(dense, expert)


@contextlib.contextmanager
def counted(owner: type, name: str) -> Iterator[list[object]]:
    """The calls of a method while the context lasts."""
    calls: list[object] = []
    method = getattr(owner, name)

    def call(*args, **options):
        calls.append(args)
        return method(*args, **options)

    setattr(owner, name, call)
    try:
        yield calls
    finally:
        setattr(owner, name, method)


def check_transformers_own_plan(rank: int, ranks: int) -> None:
    """Whole models under Transformers' expert-parallel plan, in each of its ways, against one process."""
    import transformers
    from transformers.distributed import DistributedConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import moealign
    import moealign.integrations.transformers as integration

    small = {
        "vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    }  # fmt: skip
    seen: list[tuple[int, int, bool]] = []

    def forward(module, x, ids, weights):
        foreign = ids == module.num_experts
        seen.append((module.num_experts, module.gate_up_proj.shape[0], bool(foreign.any())))
        # Transformers gives these a weight of zero: with NaN only a route that is really dropped adds nothing.
        return integration.experts_forward(module, x, ids, weights.masked_fill(foreign, float("nan")))

    integration.install()
    ALL_EXPERTS_FUNCTIONS.register(integration.NAME, forward)
    mesh = transformers_mesh(ranks)
    fields = inspect.signature(DistributedConfig).parameters
    size = {"ep_size": ranks} if "ep_size" in fields else {"enable_expert_parallel": True}
    ways = ["all_reduce", "all_to_all", integration.NAME] if "ep_implementation" in fields else [None]
    text = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    for config in (
        transformers.MixtralConfig(**small, num_local_experts=6),
        transformers.Qwen3MoeConfig(**small, num_experts=8, moe_intermediate_size=24, head_dim=8),
    ):
        for way, routers in itertools.product(ways, (False, True)):
            torch.manual_seed(0)  # the same model on every rank
            model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
            with moealign.capture(model) as one, torch.no_grad():
                expected = model(text).logits
            model.set_experts_implementation(integration.NAME)
            if routers:
                assert integration.replace_routers(model) == config.num_hidden_layers
            plan = DistributedConfig(
                tp_size=ranks, tp_plan="auto", **size, **({"ep_implementation": way} if way else {})
            )
            model = type(model).maybe_distribute_model(model, plan, mesh)
            seen.clear()
            with moealign.capture(model) as all_, torch.no_grad(), counted(ExpertExchange, "dispatch") as exchanges:
                got = model(text).logits
            assert len(exchanges) == (config.num_hidden_layers if way == integration.NAME else 0), way
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            local = config.num_experts // ranks
            assert [each[:2] for each in seen] == [(local, local)] * config.num_hidden_layers, seen
            for name, ids in all_.topk_ids.items():
                whole = one.topk_ids[name].sort(1).values
                if all_.num_experts[name] == config.num_experts:  # the hook stands before the ids become local
                    assert torch.equal(ids.sort(1).values, whole), (way, name)
                else:
                    own = torch.where(whole // local == rank, whole % local, -1)
                    assert torch.equal(ids.sort(1).values, own.sort(1).values), (way, name)


def check_a_rank_that_never_comes(rank: int, ranks: int) -> None:
    """The last rank stays away until the others have noticed, which they do when the group's timeout ends."""
    missed(rank, ranks, dispatched_moe)


def check_a_rank_that_leaves_an_exchange(rank: int, ranks: int) -> None:
    """The same with a capacity, where gloo's host sees it; under NCCL the watchdog does."""
    exchange = ExpertExchange(ExpertPlacement.linear(EXPERTS, ranks), capacity=12, device=DEVICE, transport="direct")
    missed(rank, ranks, lambda *args: exchange(*args[:-1]), functools.partial(dispatched_moe, capacity=4 * TOP_K))


def missed(rank: int, ranks: int, *calls: Callable[..., torch.Tensor]) -> None:
    placement = ExpertPlacement.linear(EXPERTS, ranks)
    hidden, weights, ids = tokens_of(0, 4, "uniform")
    own = (*shards(placement, rank, False), weights, ids, placement)
    for call in calls:
        call(hidden, *own)  # the ranks have met
    lose_patience()
    noticed = [Path(f"{sys.argv[3]}.noticed{each}") for each in range(ranks - 1)]
    if rank == ranks - 1:
        while not all(each.exists() for each in noticed):  # the watchdog of main() ends a wait in vain
            time.sleep(0.1)
        return
    for call in calls:
        with pytest.raises(RankFailed, match=f"rank {rank} of {ranks}: .* is late, has stopped"):
            call(hidden, *own)
    noticed[rank].touch()


def check_nccl_s_watchdog(rank: int, ranks: int) -> None:
    """The last rank leaves; NCCL's watchdog ends the processes of the others, in either mode."""
    placement = ExpertPlacement.linear(EXPERTS, ranks)
    hidden, weights, ids = tokens_of(0, 4, "uniform")
    own = (*shards(placement, rank, False), weights, ids, placement)
    replicated_moe(hidden, *own).sum().item()  # the ranks have met
    lose_patience()
    if rank == ranks - 1:
        time.sleep(30)
        return
    replicated_moe(hidden, *own).sum().item()
    print("came back")


def lose_patience() -> None:
    """Wait two seconds for others from here on; not before, for a busy machine starts its processes when it can."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))


def main() -> None:
    global DEVICE
    rank, ranks, store, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    backend = sys.argv[5] if len(sys.argv) > 5 else "gloo"
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(50 if backend == "nccl" else 200, exit=True)  # where it hangs
    if backend == "nccl":
        DEVICE = torch.device("cuda", rank)
        torch.cuda.set_device(DEVICE)
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience)
    try:
        for each in name.split(","):
            globals()[each](rank, ranks)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # Not a clean shutdown: the others need not wait for it.
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
