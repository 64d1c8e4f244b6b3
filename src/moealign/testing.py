"""The plain-loop oracle and what a test of a backend needs.  Ships, so that a user can check his own machine.

The oracle reads the contract and nothing else: Python ints and lists, no code in common with any backend.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .alignment import align, align_batched
from .layout import EXTRAS, OUTPUTS, BlockLayout, Capacity, capacity, capacity_batched, cdiv
from .router_oracle import oracle_route

__all__ = [
    "argsort_align",
    "assert_same_layout",
    "check_backend",
    "difference",
    "expected_layout",
    "oracle_align",
    "oracle_align_batched",
    "oracle_route",
    "poisoned",
]

Expected = dict[str, list[int]]


def _nested_to_flat(values: Any) -> list[int]:
    if not isinstance(values, list):
        return [values]
    flat: list[int] = []
    for value in values:
        flat.extend(_nested_to_flat(value))
    return flat


def oracle_align(
    topk_ids: Tensor,
    *,
    block_size: int,
    num_experts: int,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
    num_valid_tokens: Tensor | int | None = None,
) -> Expected:
    """Every output of :func:`moealign.align` by its name, and ``error_word``, as lists of ints.  For tests: slow."""
    ids = _nested_to_flat(topk_ids.tolist())
    n, size, experts = len(ids), block_size, num_experts
    top_k = topk_ids.shape[-1] if topk_ids.dim() > 1 else 1
    rows = n // top_k if top_k else 0
    error = 0
    valid = rows
    if num_valid_tokens is not None:
        valid = int(num_valid_tokens)
        if valid < 0 or valid > rows:
            error |= 4
            valid = min(max(valid, 0), rows)
    local = None
    if expert_map is not None:
        local = []
        for value in expert_map.tolist():
            if value == -1 or 0 <= value < experts:
                local.append(value)
            else:
                error |= 2
                local.append(-1)

    bins: list[list[int]] = [[] for _ in range(experts)]
    for i, expert in enumerate(ids):
        if i >= valid * top_k:
            break
        if expert < 0 or expert >= experts:
            if expert != -1:
                error |= 1
            continue
        if local is not None and ignore_invalid_experts:
            expert = local[expert]
            if expert == -1:
                continue
        bins[expert].append(i)

    length = n + experts * (size - 1)
    if pad_sorted_ids:
        length = -(-length // size) * size
    if n < experts:
        length = min(n * size, length)

    def name_of(expert: int) -> int:
        return expert if local is None or ignore_invalid_experts else local[expert]

    expected = _lay_out(bins, size, length, n, name_of)
    expected["scatter_idx"] = [i if row >= 0 else -1 for i, row in enumerate(expected["positions"])]
    expected["error_word"] = [error]
    return expected


def oracle_align_batched(expert_num_tokens: Tensor, *, max_tokens_per_batch: int, block_size: int) -> Expected:
    """Every output of :func:`moealign.align_batched` by its name, and ``error_word``, as lists of ints."""
    slots, error = max_tokens_per_batch, 0
    bins = []
    for b, count in enumerate(expert_num_tokens.tolist()):
        if count < 0 or count > slots:
            error = 8
        bins.append([b * slots + j for j in range(min(max(count, 0), slots))])
    length = len(bins) * -(-slots // block_size) * block_size
    expected = _lay_out(bins, block_size, length, len(bins) * slots, lambda b: b)
    expected["error_word"] = [error]
    return expected


def _lay_out(bins: list[list[int]], size: int, length: int, sentinel: int, name_of: Any) -> Expected:
    rows: list[int] = []
    names: list[int] = []
    block_rows: list[int] = []
    offsets = [0]
    ends: list[int] = []
    positions = [-1] * sentinel
    kept = 0
    for expert, routes in enumerate(bins):
        for start in range(0, len(routes), size):
            part = routes[start : start + size]
            for route in part:
                positions[route] = len(rows)
                rows.append(route)
            rows.extend([sentinel] * (size - len(part)))
            names.append(name_of(expert))
            block_rows.append(len(part))
        offsets.append(len(rows))
        kept += len(routes)
        ends.append(kept)
    total, blocks = len(rows), -(-length // size)
    return {
        "sorted_token_ids": rows + [sentinel] * (length - total),
        "expert_ids": names + [-1] * (blocks - len(names)),
        "num_tokens_post_padded": [total],
        "expert_counts": [len(routes) for routes in bins],
        "expert_offsets": offsets,
        "group_ends": ends,
        "positions": positions,
        "block_rows": block_rows + [0] * (blocks - len(block_rows)),
    }


def expected_layout(
    ids: np.ndarray,
    *,
    block_size: int,
    num_experts: int,
    length: int,
    expert_map: np.ndarray | None = None,
    ignore: bool = False,
) -> dict[str, np.ndarray]:
    """The fast oracle: every output of :func:`moealign.align` by its name, computed by a stable argsort in numpy.

    Args:
        ids: flat expert ids; an id outside ``[0, num_experts)`` is dropped.
        block_size: rows of a block.
        num_experts: number of bins.
        length: of ``sorted_token_ids``.
        expert_map: local expert of each global one, -1 for none.
        ignore: ``ignore_invalid_experts``.

    Returns:
        The outputs, and ``bins``: the expert under which each route is listed, -1 if it is dropped.
    """
    n = len(ids)
    bins = np.where((ids >= 0) & (ids < num_experts), ids.astype(np.int64), -1)
    local = None
    if expert_map is not None:
        local = np.where((expert_map >= 0) & (expert_map < num_experts), expert_map.astype(np.int64), -1)
        if ignore:
            bins = np.where(bins >= 0, local[bins], -1)
    kept = bins >= 0
    keys = np.where(kept, bins, num_experts)
    if num_experts < 2**15:  # numpy sorts 16 bits by radix
        keys = keys.astype(np.int16)
    order = np.argsort(keys, kind="stable")[: int(kept.sum())]
    counts = np.bincount(bins[kept], minlength=num_experts)
    blocks = -(-counts // block_size)
    offsets = np.concatenate(([0], np.cumsum(blocks * block_size)))
    ends = np.cumsum(counts)
    bin_of = bins[order]
    rows = offsets[bin_of] + np.arange(len(order)) - (ends - counts)[bin_of]

    sorted_ids = np.full(length, n)
    sorted_ids[rows] = order
    positions = np.full(n, -1)
    positions[order] = rows
    used, unused = int(blocks.sum()), cdiv(length, block_size) - int(blocks.sum())
    experts = np.repeat(np.arange(num_experts), blocks)  # of each used block
    earlier = np.arange(used) - np.repeat(np.cumsum(blocks) - blocks, blocks)  # blocks of the same expert before it
    block_rows = np.minimum(block_size, np.repeat(counts, blocks) - earlier * block_size)
    return {
        "sorted_token_ids": sorted_ids,
        "expert_ids": np.concatenate((experts if local is None or ignore else local[experts], np.full(unused, -1))),
        "num_tokens_post_padded": offsets[-1:],
        "expert_counts": counts,
        "expert_offsets": offsets,
        "group_ends": ends,
        "positions": positions,
        "block_rows": np.concatenate((block_rows, np.zeros(unused, dtype=np.int64))),
        "scatter_idx": np.where(kept, np.arange(n), -1),
        "bins": bins if local is None or ignore else np.where(kept, local[bins], -1),
    }


def difference(layout: BlockLayout | Mapping[str, Tensor], expected: Expected) -> str | None:
    """The first element in which `layout` is not what the oracle says, in words; None if there is none."""
    for name in OUTPUTS:
        tensor = layout.get(name) if isinstance(layout, Mapping) else getattr(layout, name)
        if tensor is None:
            continue
        if tensor.dtype is not torch.int32:
            return f"{name}: expected torch.int32, got {tensor.dtype}"
        want = expected[name]
        shape = [len(want), 1] if name == "scatter_idx" else [len(want)]
        if list(tensor.shape) != shape:
            return f"{name}: expected shape {shape}, got {list(tensor.shape)}"
        got = tensor.reshape(-1).tolist()
        if got != want:
            at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
            wrong = sum(a != b for a, b in zip(got, want, strict=True))
            return f"{name}[{at}]: expected {want[at]}, got {got[at]} ({wrong} of {len(want)} elements differ)"
    return None


def assert_same_layout(layout: BlockLayout | Mapping[str, Tensor], expected: Expected) -> None:
    """AssertionError unless every tensor of `layout` that is there equals the oracle's, element for element."""
    found = difference(layout, expected)
    assert found is None, found


def poisoned(
    sizes: Capacity, extras: tuple[str, ...] | list[str], device: torch.device | str, value: int
) -> BlockLayout:
    """Buffers for ``out=`` filled with `value`; two runs with different values expose an element left unwritten."""

    def buffer(name: str) -> Tensor:
        shape = (sizes.scatter_idx, 1) if name == "scatter_idx" else (getattr(sizes, name),)
        return torch.full(shape, value, dtype=torch.int32, device=device)

    wanted = [name for name in OUTPUTS if name not in EXTRAS or name in extras]
    return BlockLayout(**{name: buffer(name) for name in wanted})  # type: ignore[arg-type]


def argsort_align(topk_ids: Tensor, block_size: int, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The layout by a stable argsort in torch, as one would write it without this library: what speed is compared to.

    Takes ids in ``[0, num_experts)`` only.  Waits for nothing, launches about ten kernels on a GPU.
    """
    ids = topk_ids.reshape(-1)
    n = ids.numel()
    sizes = capacity(n, block_size=block_size, num_experts=num_experts)
    order = torch.argsort(ids, stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids.to(torch.int64), torch.ones_like(ids, dtype=torch.int64))
    ends = torch.cumsum((counts + block_size - 1) // block_size * block_size, 0)
    shift = ends - (counts + block_size - 1) // block_size * block_size - (torch.cumsum(counts, 0) - counts)
    rows = torch.arange(n, device=ids.device) + shift[ids[order].to(torch.int64)]
    sorted_ids = torch.full((sizes.sorted_token_ids,), n, dtype=torch.int32, device=ids.device)
    sorted_ids[rows] = order.to(torch.int32)
    first = torch.arange(sizes.expert_ids, device=ids.device) * block_size
    expert_ids = torch.searchsorted(ends, first, right=True)
    expert_ids = torch.where(expert_ids < num_experts, expert_ids, -1).to(torch.int32)
    return sorted_ids, expert_ids, ends[-1:].to(torch.int32)


_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def _cast(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values`, each wrapped into `dtype` where it does not fit."""
    bits = torch.iinfo(dtype).bits
    low = [value & (2**bits - 1) for value in values]
    signed = [value - 2**bits if value >> (bits - 1) else value for value in low]
    same_width = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[bits]
    return torch.tensor(signed, dtype=same_width).view(dtype).to(device)


def check_backend(
    name: str, device: torch.device | str | None = None, cases: int = 200, seed: int = 0
) -> Iterator[tuple[str, str | None]]:
    """Random cases of both functions, on buffers poisoned before: yields (the case in words, None or the difference).

    Sizes from 0 to some thousand routes, 1 to 5,000 experts, every dtype, maps, dropped ids, valid counts, extras.
    """
    draw = random.Random(seed)
    if device is None:
        device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    for case in range(cases):
        poison = draw.choice((-7, 0x5A5A5A5A))
        extras = tuple(extra for extra in EXTRAS if draw.random() < 0.5)
        size = draw.choice((1, 2, 7, 16, 64, 100, 128))
        word = torch.zeros(1, dtype=torch.int32, device=device)
        if case % 5 == 4:
            extras = tuple(extra for extra in extras if extra != "scatter_idx")
            batches, slots = draw.choice((0, 1, 5, 33, 300)), draw.choice((0, 1, 17, 128))
            dtype = draw.choice(_SIGNED + _UNSIGNED)
            counts = _cast([draw.randint(-2, slots + 2) for _ in range(batches)], dtype, device)
            said = f"align_batched: {batches} batches of {slots}, blocks of {size}, {dtype}, extras {extras}"
            expected = oracle_align_batched(counts, max_tokens_per_batch=slots, block_size=size)
            out = poisoned(capacity_batched(slots, block_size=size, num_batches=batches), extras, device, poison)
            wanted = dict.fromkeys(extras, True)
            align_batched(
                counts,
                max_tokens_per_batch=slots,
                block_size=size,
                error_word=word,
                out=out,
                backend=name,
                **wanted,  # type: ignore[arg-type]
            )
        else:
            experts = draw.choice((1, 3, 8, 60, 64, 128, 256, 257, 1000, 5000))
            tokens, top_k = draw.choice((0, 1, 1, 2, 7, 33, 128, 500)), draw.choice((1, 2, 3, 8))
            dtype = draw.choice(_SIGNED + _UNSIGNED)
            highest = draw.choice((experts - 1, experts - 1, experts + 3, 0))
            ids = _cast([draw.randint(-1, highest) for _ in range(tokens * top_k)], dtype, device)
            ids = ids.reshape(tokens, top_k)
            if draw.random() < 0.2:
                ids = ids.T.contiguous().T
            expert_map, ignore = None, draw.random() < 0.3
            if draw.random() < 0.4:
                values = [draw.randint(-2, experts) for _ in range(experts)]
                expert_map = torch.tensor(values, dtype=draw.choice((torch.int32, torch.int64)), device=device)
                if not ignore:
                    extras = tuple(extra for extra in extras if extra != "scatter_idx")
            valid = None
            if draw.random() < 0.3:
                valid = torch.tensor([draw.randint(-1, tokens + 1)], dtype=torch.int32, device=device)
            pad = draw.random() < 0.3
            said = (
                f"align: {tokens} x {top_k} routes, {experts} experts, blocks of {size}, {dtype}, "
                f"map {expert_map is not None}, ignore {ignore}, valid {valid is not None}, extras {extras}"
            )
            call: dict[str, Any] = {
                "block_size": size,
                "num_experts": experts,
                "expert_map": expert_map,
                "pad_sorted_ids": pad,
                "ignore_invalid_experts": ignore,
                "num_valid_tokens": valid,
            }
            expected = oracle_align(ids, **call)
            sizes = capacity(tokens * top_k, block_size=size, num_experts=experts, pad_sorted_ids=pad)
            out = poisoned(sizes, extras, device, poison)
            align(ids, **call, **dict.fromkeys(extras, True), error_word=word, out=out, backend=name)  # type: ignore[arg-type]
        found = difference(out, expected)
        if found is None and word.tolist() != expected["error_word"]:
            found = f"error_word: expected {expected['error_word'][0]}, got {word.item()}"
        yield said, found
