"""The kernels of an exchange: interpreted, and compiled ahead for GPUs that are not in this machine."""

from __future__ import annotations

import pytest
import torch
from helpers import TARGETS, WORKERS, assert_passes, compile_ahead, signature_of

from moealign.parallel import wire, wire_fp8, wire_tokens

pytest.importorskip("triton")


def test_interpreted_they_equal_torch():
    assert_passes(WORKERS / "exchange_interpret.py", interpreted=True)


def launches(hidden: int, dtype: torch.dtype, ids_dtype: torch.dtype):
    tokens, top_k, ranks, capacity, slots = 64, 8, 8, 128, 16
    new = lambda *size, dtype=torch.int32: torch.empty(size, dtype=dtype)  # noqa: E731
    sizes = (top_k, capacity, wire.header_rows(capacity, wire.words_of(hidden, dtype.itemsize)))
    span, count = sizes[1] + sizes[2], tokens * top_k
    out = (new(ranks * span, hidden, dtype=dtype), new(ranks * span), new(count))
    table = new(ranks * slots, dtype=torch.int16)
    rows, ids = new(tokens, hidden, dtype=dtype), new(tokens, top_k, dtype=ids_dtype)
    call = (rows, ids, table, new(count), new(count), new(ranks + 1), *sizes)
    yield wire.pack_launch(*call, out=out)
    yield wire.pack_launch(*call, out=out, error_word=new(1))
    parts = wire.Parts(new(ranks, dtype=torch.int64), 16 if hidden % 8 == 0 else 2)
    yield wire.pack_launch(*call, out=out, error_word=new(1), parts=parts)
    packed = (new(ranks * span, wire_fp8.pitch_of(hidden), dtype=torch.uint8), *out[1:])
    yield wire_fp8.pack_launch(*call, out=packed, error_word=new(1))
    yield wire_fp8.pack_launch(*call, out=packed, error_word=new(1), parts=parts)
    arrived = (new(ranks * span, hidden, dtype=dtype), new(ranks * span, 1, dtype=torch.int16))
    yield wire_fp8.unpack_launch(packed[0], ranks, capacity, arrived)
    weights = new(tokens, top_k, dtype=torch.float32)
    ranks_of = new(ranks * slots)
    yield wire_tokens.first_launch(ids, ranks_of, new(tokens, top_k))
    call = (rows, weights, ids, ranks_of, table, new(count), new(count), new(ranks + 1), capacity)
    for fp8 in (False, True):
        pitch = wire_tokens.format_of(hidden, dtype, top_k, fp8).pitch
        packed = (new(ranks * capacity, pitch, dtype=torch.uint8), new(ranks * capacity), new(count))
        yield wire_tokens.pack_launch(*call, fp8, out=packed, error_word=new(1))
        yield wire_tokens.pack_launch(*call, fp8, out=packed, error_word=new(1), parts=parts)
    arrived = [
        new(ranks * capacity, columns, dtype=kind)
        for columns, kind in ((hidden, dtype), (top_k, torch.float32), (top_k, torch.int16))
    ]
    yield wire_tokens.unpack_launch(packed[0], arrived)
    for each in (wire.HERE, parts):
        yield wire.combine_launch(out[0], weights, out[2], new(tokens, hidden, dtype=dtype), each)


@pytest.mark.targets
@pytest.mark.parametrize("target", TARGETS, ids=[str(each[1]) for each in TARGETS])
@pytest.mark.parametrize(
    ("hidden", "dtype", "ids_dtype"),
    [(7168, torch.bfloat16, torch.int64), (33, torch.float16, torch.int32), (2048, torch.float32, torch.int16)],
)
def test_the_kernels_compile_ahead(target, hidden, dtype, ids_dtype):
    from moealign.experts import row_kernels

    for one in launches(hidden, dtype, ids_dtype):
        function = getattr(row_kernels, one.kernel)
        signature, constants = signature_of(function, one.arguments, one.constants)
        attributes = {}
        for index, (name, argument) in enumerate(zip(function.arg_names, one.arguments, strict=False)):
            if isinstance(argument, int) and argument == 1:
                signature[name], constants[name] = "constexpr", 1
            elif isinstance(argument, torch.Tensor) or (argument is not None and argument % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
        assert list(compile_ahead(function, signature, constants, attributes, [target], **options))
