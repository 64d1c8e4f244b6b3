"""What the numba kernels are built with: the decorators and their disk cache, pointers, atomics, and how threads meet.

Kernels take addresses and sizes, not arrays: unboxing an array costs numba 0.3 us, and making one costs torch 0.5 us.
An address of 0 means that the tensor is absent.
"""

from __future__ import annotations

import os
import pickle
import sys

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.extending import intrinsic

from ..cache import cache_folder, key_of, read, write

__all__ = [
    "ID_WIDTHS",
    "atomic_add",
    "atomic_load",
    "f32_ptr",
    "f64_ptr",
    "i32_ptr",
    "i64_ptr",
    "ids_ptr",
    "int64",
    "joins",
    "kernel",
    "kernel_folder",
    "load_int",
    "prefetch",
    "subroutine",
    "wait_for",
]

ID_WIDTHS = (1, 2, 4, 8)  # bytes
# A helper that starts before the leader polls this many times 64, yielding the processor in between: some milliseconds.
PATIENCE = 4096

int64 = types.int64
_UNSIGNED = {1: types.uint8, 2: types.uint16, 4: types.uint32, 8: types.uint64}
_OPTIONS = {"nogil": True, "error_model": "numpy"}


# ---- Decorators and the disk cache --------------------------------------------------------------------------------


def _source(namespace):
    """The source of the module whose variables are `namespace`, from the loader that imported it."""
    return namespace["__loader__"].get_data(namespace["__file__"])


def kernel_folder():
    """The folder of compiled kernels; None if there is none.  MOEALIGN_CACHE_DIR takes precedence over numba's own
    NUMBA_CACHE_DIR."""
    return cache_folder(os.environ.get("NUMBA_CACHE_DIR"))


class _DiskCache(NullCache):
    """Compiled code in :func:`kernel_folder`, under a key of everything that the machine code depends on."""

    def __init__(self, function, namespaces):
        sources = (_source(each) for each in (globals(), *namespaces))
        cells = [str(cell.cell_contents) for cell in function.__closure__ or ()]
        versions = (numba.__version__, llvmlite.__version__, str(sys.implementation.cache_tag))
        self.ingredients = (*sources, function.__module__, function.__qualname__, *cells, *versions)

    def entry(self, signature, codegen):
        """Path and key; None without a folder.  `codegen` knows the processor."""
        folder = kernel_folder()
        if folder is None:
            return None
        key = key_of(*self.ingredients, str(signature), str(codegen.magic_tuple()))
        return folder / f"{key}.numba", key

    def load_overload(self, signature, target_context):
        target_context.refresh()
        entry = self.entry(signature, target_context.codegen())
        code = entry and read(*entry)
        return code and CompileResult._rebuild(target_context, *pickle.loads(code))

    def save_overload(self, signature, result):
        entry = self.entry(signature, result.codegen)
        if entry is not None:
            write(*entry, dumps(result._reduce()))


def kernel(*namespaces):
    """The decorator of a function that Python calls.  `namespaces` are the variables of every module that it is built
    from, its own included, this one excepted: their sources are part of its key in the disk cache."""

    def decorate(function):
        dispatcher = njit(**_OPTIONS)(function)
        dispatcher._cache = _DiskCache(function, namespaces)
        return dispatcher

    return decorate


def subroutine(function):
    """The decorator of a function that only kernels call."""
    return njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


# ---- Memory -------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def ids_ptr(typingctx, address, width):
    """`address` as a pointer to unsigned integers of `width` bytes; `width` is a constant."""
    result = types.CPointer(_UNSIGNED[width.literal_value])

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, width), codegen


def _pointer_to(dtype):
    result = types.CPointer(dtype)

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(result))

        return result(address), codegen

    return pointer


_i8_ptr, _i16_ptr, i32_ptr, i64_ptr = (_pointer_to(t) for t in (types.int8, types.int16, types.int32, types.int64))
_u8_ptr, _u16_ptr, _u32_ptr = (_pointer_to(t) for t in (types.uint8, types.uint16, types.uint32))
f32_ptr, f64_ptr = _pointer_to(types.float32), _pointer_to(types.float64)


@subroutine
def load_int(address, index, code):
    """One integer of any dtype, saturated to int64; `code` is its width in bytes, negative if unsigned."""
    if code == 8:
        return np.int64(i64_ptr(address)[index])
    if code == 4:
        return np.int64(i32_ptr(address)[index])
    if code == 2:
        return np.int64(_i16_ptr(address)[index])
    if code == 1:
        return np.int64(_i8_ptr(address)[index])
    if code == -4:
        return np.int64(_u32_ptr(address)[index])
    if code == -2:
        return np.int64(_u16_ptr(address)[index])
    if code == -1:
        return np.int64(_u8_ptr(address)[index])
    value = np.int64(i64_ptr(address)[index])
    return value if value >= 0 else np.int64(0x7FFFFFFFFFFFFFFF)


@intrinsic
def prefetch(typingctx, address):
    """A hint that the cache line at `address` is about to be written."""

    def codegen(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        builder.call(function, [builder.inttoptr(args[0], byte), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(address), codegen


# ---- Threads of a call --------------------------------------------------------------------------------------------


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to the int64 at `address`, sequentially consistent; the old value."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, address):
    """The int64 at `address`, with acquire order."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _yield(typingctx):
    """Yield the processor, where the system has sched_yield."""

    def codegen(context, builder, signature, args):
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@subroutine
def wait_for(address, target):
    """Spin until the int64 at `address` is at least `target`."""
    turns = 0
    while atomic_load(address) < target:
        turns += 1
        if turns % 64 == 0:
            _yield()


@subroutine
def joins(begun, leader):
    """Whether this thread takes part in a call.

    The leader sets `begun`.  A helper joins only after that: the leader is then in compiled code, where no exception
    can reach it, and waits for every chunk that was taken.  If the leader never comes, its helpers touch nothing.
    """
    if leader != 0:
        atomic_add(begun, 1)
        return True
    for turn in range(64 * PATIENCE):
        if atomic_load(begun) > 0:
            return True
        if turn % 64 == 63:
            _yield()
    return False
