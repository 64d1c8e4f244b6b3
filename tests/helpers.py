"""What tests of several folders share: values, the Triton kernels' specialisations, and processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import processes
import pytest
import torch

_T = TypeVar("_T")
ROOT = Path(__file__).resolve().parents[1]
WORKERS = ROOT / "tests" / "workers"

POISONS = (-7, 0x5A5A5A5A)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(low: int, high: int, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Random integers in ``[low, high)``."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(0)`` to ``work(count - 1)``, each in a thread of its own, at once; none may raise."""
    with ThreadPoolExecutor(count) as pool:
        barrier = threading.Barrier(count)
        list(pool.map(lambda number: (barrier.wait(), work(number)), range(count)))


# ---- processes ---------------------------------------------------------------------------------------------------


def run_python(code: str, *paths: Path | str, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, in the :func:`environment` of the other arguments; it must succeed."""
    done = processes.run("-c", code, env=processes.environment(*paths, **variables))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def assert_passes(script: Path | str, *, interpreted: bool) -> None:
    """`script` succeeds in a process of its own: Triton reads TRITON_INTERPRET when it decorates a kernel."""
    env = processes.environment(TRITON_INTERPRET="1" if interpreted else None)
    limit = 900 if interpreted else 1800
    run = processes.run(script, env=env, timeout=limit)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def failures(cases: Iterable[tuple[str, str | None]]) -> int:
    """Print each (case, difference) whose difference is not None, then a summary; 1 if any failed or none ran."""
    import triton

    done = failed = 0
    for case, difference in cases:
        done += 1
        if difference is not None:
            failed += 1
            print(f"{case}: {difference}")
    print(f"triton {triton.__version__}: {done} cases, {failed} failures")
    return 1 if failed or not done else 0


# ---- Triton ------------------------------------------------------------------------------------------------------

KIB = 1024
#: `make test-targets` compiles every configuration of the kernels for every architecture, `make test` one in six of
#: each kernel for that of the measured GPUs.
EVERY_TARGET = os.environ.get("MOEALIGN_TARGETS") == "all"
#: (backend, architecture, threads of a warp, bytes of shared memory).
TARGETS = [("cuda", 90, 32, 227 * KIB)]
if EVERY_TARGET:
    TARGETS += [
        ("cuda", 80, 32, 99 * KIB),
        ("cuda", 89, 32, 99 * KIB),
        ("cuda", 100, 32, 227 * KIB),
        ("hip", "gfx942", 64, 64 * KIB),
    ]


def compiled_here(configurations: Iterable[_T], kernel: Callable[[_T], object]) -> list[_T]:
    """Those that this run compiles: all of them, or one in six of each `kernel`, and one at least."""
    by_kernel: dict[object, list[_T]] = {}
    for each in configurations:
        by_kernel.setdefault(kernel(each), []).append(each)
    share, chance = 1 if EVERY_TARGET else 6, random.Random(0)
    return [one for some in by_kernel.values() for one in chance.sample(some, -(-len(some) // share))]


def specialisation(function, one):
    """What Triton compiles a kernel for: kinds of arguments, values 1 and multiples of 16, addresses of 16 bytes."""
    kinds = []
    for parameter, argument in zip(function.params, one.arguments, strict=False):
        kind = getattr(argument, "base", argument)
        aligned = None
        if isinstance(kind, torch.Tensor):
            fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
            aligned = None if fixed else kind.data_ptr() % 16 == 0
            kind = (type(argument).__name__, kind.dtype, getattr(argument, "block_shape", None))
        elif isinstance(kind, int):
            wide = not -(2**31) <= kind < 2**31
            aligned = None if parameter.do_not_specialize else (kind == 1, kind % 16 == 0)
            kind = ("int", wide)
        kinds.append((parameter.name, repr(kind), aligned))
    return (one.kernel, *kinds, *one.constants.items(), one.num_warps, getattr(one, "num_stages", None))


def cut(*sizes, shift=0):
    """int32 tensors of these sizes, one behind the other in one allocation, as outputs of a call on a GPU are."""
    return torch.empty(sum(sizes) + shift, dtype=torch.int32)[shift:].split(sizes)


_NAMES = {
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


def kind_of(argument: object) -> str:
    """The type by which Triton compiles for an argument: tensors as pointers, descriptors, numbers, None."""
    if argument is None:
        return "constexpr"
    if isinstance(argument, torch.Tensor):
        return "*" + _NAMES[argument.dtype]
    if hasattr(argument, "block_shape"):
        return f"tensordesc<{_NAMES[argument.base.dtype]}{argument.block_shape}>".replace(" ", "")
    return "fp32" if isinstance(argument, float) else "i32"


def signature_of(function, arguments, constants):
    """(type by parameter, value by constant parameter) with which :func:`compile_ahead` compiles a call."""
    given = dict(zip(function.arg_names, arguments, strict=False))
    signature = {name: kind_of(argument) for name, argument in given.items()} | dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(function.arg_names)
    return signature, {**constants, **{name: None for name, argument in given.items() if argument is None}}


def compile_ahead(function, signature, constants, attributes=None, targets=TARGETS, **options):
    """Compile a kernel for machines that are not here: (architecture, binary); each fits in its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for backend, arch, warp, limit in targets:
        source = ASTSource(function, signature, constants, attributes)
        binary = triton.compile(source, target=GPUTarget(backend, arch, warp), options=options)
        used = binary.metadata.shared
        assert used <= limit, f"{function.__name__} {constants}: {used} bytes of {limit} on {arch}"
        yield arch, binary


def compile_launch(function, one, targets=TARGETS):
    """Compile a prepared launch, specialised as Triton would: (architecture, binary)."""
    signature, constants = signature_of(function, one.arguments, one.constants)
    attributes = {}
    fixed = {each.name for each in function.params if each.do_not_specialize}
    anywhere = {each.name for each in function.params if each.do_not_specialize_on_alignment}
    for index, (name, argument) in enumerate(zip(function.arg_names, one.arguments, strict=False)):
        specialised = isinstance(argument, int) and name not in fixed
        if specialised and argument == 1:
            signature[name], constants[name] = "constexpr", 1
        elif name not in anywhere and (isinstance(argument, torch.Tensor) or (specialised and argument % 16 == 0)):
            attributes[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages}
    yield from compile_ahead(function, signature, constants, attributes, targets, **options)


def compile_in_processes(compile_one: Callable[[int], None], distinct: Callable[[], list[Any]]) -> None:
    """``compile_one(number)`` of each of `distinct`, which is enumerated once: the processes are forked after that."""
    count = len(distinct())
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(compile_one, range(count)))


def patch_interpreter() -> None:
    """Make Triton's interpreter right where it is not, and twice as fast.

    Triton 3.6.0 turns one-element arrays into ints in a way that NumPy 2.4 refuses; 3.7.0 does as here.  A product is
    summed in the order of k: how NumPy rounds a row depends on where it stands in the matrix.  Products of
    FP8 multiply bytes, casts to it do not round to even, and a fused multiplication and addition rounds twice.

    The time goes into what is always the same: at every call of a function by a kernel the interpreter looks for the
    language's operations and replaces them again, every value describes its shape anew, operands of one type and shape
    are compared in all their parts, and the check of a sum for overflow takes nine operations of the language.
    """
    import inspect
    import math

    import numpy as np
    from triton.runtime import interpreter

    original, is_builtin = interpreter._patch_lang_tensor, interpreter.tl.core.is_builtin
    operations: dict[object, list[str]] = {}  # by module or class, from before its first change

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def values(handle):
        if handle.dtype.scalar.name != "fp8e4nv":
            return handle.data
        return torch.from_numpy(handle.data).view(torch.float8_e4m3fn).float().numpy()

    def create_dot(self, a, b, d, *options):
        total = np.zeros_like(d.data)
        left, right = values(a), values(b)
        for k in range(left.shape[-1]):
            total += left[..., k, None].astype(total.dtype) * right[..., k, None, :].astype(total.dtype)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def patch_builtin(owner, builder, scope):
        if owner not in operations:
            operations[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        for name in operations[owner]:
            if is_builtin(member := getattr(owner, name)):
                interpreter._patch_attr(owner, name, member, builder, scope)

    dtype_of, dtypes = interpreter._get_np_dtype, {}

    def np_dtype(kind):
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    patch_lang, replaced = interpreter._patch_lang, set()

    def patch_once(function):
        """What a kernel and its functions see is replaced once a launch."""
        scope, seen = interpreter._LangPatchScope(), id(function.__globals__)
        if seen not in replaced:
            replaced.add(seen)
            scope = patch_lang(function)
            restore = scope.restore
            scope.restore = lambda: (replaced.clear(), restore())
        return scope

    core = interpreter.tl.core
    describe, names, shapes = core.block_type.__init__, {}, {}

    def described(shape):
        """Of a shape: itself as block types have it, its number of elements, and both as tensors have them."""
        if shape not in shapes:
            numbers = core.tuple([core.constexpr(each) for each in shape])
            shapes[shape] = None, None, core.constexpr(math.prod(shape)), numbers
        return shapes[shape]

    def block_type(self, element_ty, shape):
        shape = (*(each.value if isinstance(each, core.constexpr) else each for each in shape),)
        if (element_ty.name, shape) not in names:
            describe(self, element_ty, list(shape))
            names[element_ty.name, shape] = self.name
            if described(shape)[0] is None:
                shapes[shape] = self.shape, self.numel, *shapes[shape][2:]
        self.element_ty, self.name, self.described = element_ty, names[element_ty.name, shape], shapes[shape]
        self.shape, self.numel = self.described[:2]

    scalar = described(())

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, _, self.numel, self.shape = type.described if isinstance(type, core.block_type) else scalar

    meaning = type(interpreter.interpreter_semantic)
    check_types, broadcast = meaning.binary_op_type_checking_impl, meaning.broadcast_impl_value

    def same_types(self, lhs, rhs, left_pointer=False, right_pointer=False, arithmetic=True, division=False):
        alike = type(lhs) is core.tensor is type(rhs) and lhs.dtype == rhs.dtype and not lhs.dtype.is_ptr()
        if alike and not division:
            return self.broadcast_impl_value(lhs, rhs)
        return check_types(self, lhs, rhs, left_pointer, right_pointer, arithmetic, division)

    def same_shapes(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def no_overflow(self, lhs, rhs, operation):
        one, other = lhs.handle.data, rhs.handle.data
        if one.dtype.kind in "iu" and one.dtype.itemsize < 8 and one.size:
            found, bounds = exact[operation.__name__](one, other, dtype=np.int64), np.iinfo(one.dtype)
            fits = bounds.min <= found.min() and found.max() <= bounds.max
            assert fits, f"{lhs.dtype} overflows in {operation.__name__}"

    meaning.binary_op_type_checking_impl, meaning.broadcast_impl_value = same_types, same_shapes
    meaning.binary_op_sanitize_overflow_impl = no_overflow
    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = np_dtype
    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar.name != "fp8e4nv" or src.dtype.scalar.name != "fp32":
            return to_fp(self, src, dst_type, rounding_mode)
        data = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(data.view(torch.uint8).numpy(), dst_type.scalar)

    def with_bool_mask(operation, at):
        """3.9 refuses a mask of a block and a scalar, whose data are int32."""

        def masked(self, *args):
            mask = interpreter.TensorHandle(args[at].data.astype(bool), args[at].dtype.scalar)
            return operation(self, *args[:at], mask, *args[at + 1 :])

        return masked

    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = with_bool_mask(builder.create_masked_load, 1)
    builder.create_masked_store = with_bool_mask(builder.create_masked_store, 2)
    to_fp = builder.create_fp_to_fp
    builder.create_fp_to_fp, builder.create_dot, builder.create_fma = create_fp_to_fp, create_dot, create_fma
    interpreter._patch_lang_tensor = patched


def shuffle(items: list[pytest.Item], seed: int) -> None:
    """Files in random order, and in each its tests, which stay together for the sake of its fixtures."""
    chance = random.Random(seed)
    files = list(dict.fromkeys(item.path for item in items))
    chance.shuffle(files)
    chance.shuffle(items)
    items.sort(key=lambda item: files.index(item.path))
