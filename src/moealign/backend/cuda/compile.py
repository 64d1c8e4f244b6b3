"""CUDA source -> cubin -> launch.  Knows nothing of MoE.

::

    k = kernel("align.cu", "pairwise", (("E", 256), ("B", 16)), device_index)  # compiled once, then a dict look-up
    k.launch(grid, block, shared_bytes, *args)                    # on the device's current stream, no synchronisation
    k.launch(grid, block, shared_bytes, *args, mode=COOPERATIVE)  # or OVERLAP: programmatic stream serialization
    start = k.prepare(grid, block, shared_bytes, mode)            # once ...
    start(*args)                                                  # ... and for every launch alike
    k.max_blocks(block, shared_bytes)   # CTAs that one multiprocessor holds at once
    k.multiprocessors                   # of the device
    green_multiprocessors(device_index)  # of the current stream's green context, 0 if it has the whole device

CTAs of a cooperative grid are all there at once: it has at most ``max_blocks`` times the multiprocessors that the
current stream has.

Conventions for a ``.cu`` file, which stands beside this one and includes nothing but ``.cuh`` files there, by name:

- Kernels are ``extern "C" __global__``, and **every parameter is 8 bytes**: a pointer or a ``long long``.  `args` are
  Python ints in that order, 0 for a null pointer; a wrong number of them raises ``struct.error``.
- `defines` become macros, and so does ``KERNEL_<name>``: guard each kernel by ``#ifdef KERNEL_<name>``, so that a
  specialisation compiles that kernel alone.
- Clusters are a property of the code (``__cluster_dims__``).  Dynamic shared memory needs no attribute from the caller.

A compiled kernel is kept in the user's cache folder: see :mod:`moealign.backend.cache`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..cache import cache_folder, key_of, read, write

__all__ = [
    "COOPERATIVE", "OVERLAP", "PLAIN", "Kernel", "architectures", "build", "cache_folder", "compiler_version",
    "driver_refuses", "green_multiprocessors", "kernel",
]  # fmt: skip

Defines = tuple[tuple[str, int], ...]

#: How a kernel is launched: alone, with all CTAs resident at once, or before the kernel ahead of it has drained (for
#: which it has to wait itself: griddepcontrol.wait).
PLAIN, COOPERATIVE, OVERLAP = range(3)

_STANDARD = "c++17"


# ---------------------------------------------------------------------------------------------------------- compiling


@functools.cache
def compiler_version() -> str:
    """NVRTC's version.  Raises RuntimeError if it cannot be loaded."""
    from cuda.bindings import nvrtc

    code, major, minor = nvrtc.nvrtcVersion()
    if int(code):
        raise RuntimeError(f"NVRTC: expected its version, got {code}")
    return f"{major}.{minor}"


@functools.cache
def architectures() -> tuple[str, ...]:
    """What NVRTC compiles for: ("sm_75", ...).  Raises RuntimeError if it does not say."""
    from cuda.bindings import nvrtc

    code, found = nvrtc.nvrtcGetSupportedArchs()
    if int(code):
        raise RuntimeError(f"NVRTC: expected the architectures that it knows, got {code}")
    return tuple(f"sm_{each}" for each in found)


def build(source_text: str, name: str, defines: Defines, arch: str) -> bytes:
    """The cubin of kernel `name` for `arch` ("sm_90").  Needs neither a GPU nor a driver; raises what NVRTC says."""
    from cuda.core import Program, ProgramOptions

    macros: list[str | tuple[str, str]] = [(key, str(value)) for key, value in defines]
    options = ProgramOptions(name=name, arch=arch, std=_STANDARD, define_macro=[*macros, (f"KERNEL_{name}", "1")])
    code = Program(source_text, "c++", options).compile("cubin").code
    assert isinstance(code, bytes)
    return code


def cache_key(source_text: str, name: str, defines: Defines, arch: str, version: str) -> str:
    """Names one cubin: it changes with everything that the code depends on."""
    return key_of(source_text, name, *(f"{key}={value}" for key, value in defines), arch, version, _STANDARD)


def cubin(source_text: str, name: str, defines: Defines, arch: str) -> bytes:
    """:func:`build` through the cache on disk."""
    folder = cache_folder()
    if folder is None:
        return build(source_text, name, defines, arch)
    key = cache_key(source_text, name, defines, arch, compiler_version())
    path = folder / f"{key}.cubin"
    code = read(path, key)
    if code is None:
        code = build(source_text, name, defines, arch)
        write(path, key, code)
    return code


# ---------------------------------------------------------------------------------------------------------- launching

# CUlaunchConfig: grid and block in three dimensions each, shared bytes, stream, attributes, number of attributes.
_CONFIG = "7IQQI4x"
_CONFIG_BYTES = struct.calcsize(_CONFIG)
_STREAM, _STREAM_AT = "QQI4x", struct.calcsize("7I4x")  # its part from the stream on

# One CUlaunchAttribute each: id, padding, a union of 64 bytes that holds an int.
_COOPERATIVE = ctypes.create_string_buffer(struct.pack("i4xi60x", 2, 1), 72)
_OVERLAP = ctypes.create_string_buffer(struct.pack("i4xi60x", 6, 1), 72)
_CLUSTER_SIZE = 4
_ATTRIBUTES = ((0, 0), (ctypes.addressof(_COOPERATIVE), 1), (ctypes.addressof(_OVERLAP), 1))

_MOST_LAUNCHES = 1024
_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_*
_STATIC_SHARED_BYTES = 1
_LARGE_CLUSTERS_ALLOWED = 14
_OPT_IN_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_*
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_MULTIPROCESSORS = 1  # CU_DEV_RESOURCE_TYPE_SM
_RESOURCE_BYTES, _RESOURCE_COUNT_AT = 512, 96  # room for a CUdevResource of any later version; its sm.smCount


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


#: What is called here; cuKernelGetParamInfo and the two of green contexts are the newest.
_FUNCTIONS = (
    "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion", "cuFuncLoad", "cuGetErrorName", "cuGreenCtxGetDevResource", "cuKernelGetAttribute",
    "cuKernelGetFunction", "cuKernelGetParamInfo", "cuKernelSetAttribute", "cuLaunchKernelEx", "cuLibraryGetKernel",
    "cuLibraryLoadData", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuOccupancyMaxActiveClusters",
    "cuStreamGetGreenCtx", "cuThreadExchangeStreamCaptureMode",
)  # fmt: skip
_OLDEST_DRIVER = (12, 4)  # of CUDA: the first with all of them


def driver_refuses() -> str | None:
    """Why the installed driver cannot run what NVRTC compiles, and what to do; None if it can.  Raises nothing of its
    own; what :func:`compiler_version` raises passes through."""
    oldest = f"{_OLDEST_DRIVER[0]}.{_OLDEST_DRIVER[1]}"
    remedy = f"install a driver of CUDA {oldest} or later (550 or later), or use backend 'triton'"
    try:
        driver = _driver()
    except OSError as error:
        return f"the NVIDIA driver cannot be loaded ({error}): {remedy}"
    version = ctypes.c_int()
    if hasattr(driver, "cuDriverGetVersion"):
        code = driver.cuDriverGetVersion(ctypes.byref(version))
        if code:
            return f"the NVIDIA driver does not say its version (CUDA error {code}): {remedy}"
        found = (version.value // 1000, version.value % 1000 // 10)
        if found < _OLDEST_DRIVER:
            return f"needs a driver of CUDA {oldest} or later, this one is of CUDA {found[0]}.{found[1]}: {remedy}"
    lacking = [each for each in _FUNCTIONS if not hasattr(driver, each)]
    if lacking:
        return f"the NVIDIA driver has no {', '.join(lacking)}: {remedy}"
    compiler = compiler_version()
    if found[0] < int(compiler.split(".")[0]):
        return (
            f"NVRTC {compiler} compiles for drivers of CUDA {compiler.split('.')[0]}.0 or later, this one is of CUDA "
            f"{found[0]}.{found[1]}: install a newer driver, or an older NVRTC: pip install 'cuda-core[cu{found[0]}]'"
        )
    return None


def _error(code: int) -> str:
    text = ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"CUDA error {code}"


def _call(function: str, *args: Any) -> None:
    code = getattr(_driver(), function)(*args)
    if code:
        raise RuntimeError(f"{function}: expected CUDA_SUCCESS, got {_error(code)}")


def _enter_context(device_index: int) -> None:
    """Make torch's context the thread's own: a thread that has called no CUDA yet has none."""
    current = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        device, primary = ctypes.c_int(), ctypes.c_void_p()
        _call("cuDeviceGet", ctypes.byref(device), device_index)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), device)
        _call("cuCtxSetCurrent", primary)


@functools.cache
def _current_device() -> Callable[[], int]:
    """What says which device is current; with one in sight it is that one."""
    found: Callable[[], int] = torch._C._cuda_getDevice if torch.cuda.device_count() > 1 else lambda: 0
    return found


def green_multiprocessors(device_index: int) -> int:
    """Multiprocessors of the green context that the current stream of cuda:`device_index` belongs to, which for the
    default stream is the one that is current.  0 where there is none: the whole device."""
    if _current_device()() != device_index:
        with torch.cuda.device(device_index):
            return _green_multiprocessors(torch._C._cuda_getCurrentRawStream(device_index))
    return _green_multiprocessors(torch._C._cuda_getCurrentRawStream(device_index))


def _green_multiprocessors(stream: int) -> int:
    green = ctypes.c_void_p()
    if _driver().cuStreamGetGreenCtx(ctypes.c_void_p(stream), ctypes.byref(green)) or not green.value:
        return 0  # an error is that of a thread without any context, or the launch meets it too
    resource = ctypes.create_string_buffer(_RESOURCE_BYTES)
    if _driver().cuGreenCtxGetDevResource(green, resource, _MULTIPROCESSORS):
        return 0  # it parts something else of the device
    count: int = struct.unpack_from("I", resource, _RESOURCE_COUNT_AT)[0]
    return count


class Kernel:
    """One compiled kernel on one device, ready to launch from any thread."""

    def __init__(self, code: bytes, name: str, device_index: int) -> None:
        self.name = name
        self.device_index = device_index
        self.multiprocessors: int = torch.cuda.get_device_properties(device_index).multi_processor_count
        # Loading is forbidden in another thread's or our own strict stream capture, unless this thread says otherwise.
        mode = ctypes.c_int(_RELAXED)
        with torch.cuda.device(device_index):
            _enter_context(device_index)
            _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            try:
                self._load(code)
            finally:
                _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        self._launches: dict[tuple[int, int, int, int], Launch] = {}  # at most _MOST_LAUNCHES

    def _load(self, code: bytes) -> None:
        library, handle, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        device = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(device), self.device_index)
        _call("cuLibraryLoadData", ctypes.byref(library), code, None, None, 0, None, None, 0)
        _call("cuLibraryGetKernel", ctypes.byref(handle), library, self.name.encode())
        # The handle stands for the kernel in whichever context is current, green ones too; launches and questions about
        # occupancy take it for a CUfunction.
        self._library, self._handle = library, handle

        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        self._parameters = 0
        while not _driver().cuKernelGetParamInfo(
            handle, ctypes.c_size_t(self._parameters), ctypes.byref(offset), ctypes.byref(size)
        ):
            if size.value != 8:
                raise RuntimeError(f"{self.name}: expected parameters of 8 bytes, got one of {size.value}")
            self._parameters += 1

        static, most = ctypes.c_int(), ctypes.c_int()
        _call("cuKernelGetAttribute", ctypes.byref(static), _STATIC_SHARED_BYTES, handle, device)
        _call("cuDeviceGetAttribute", ctypes.byref(most), _OPT_IN_SHARED_BYTES, device)
        self.max_shared_bytes: int = most.value - static.value
        _call("cuKernelSetAttribute", _MAX_DYNAMIC_SHARED_BYTES, self.max_shared_bytes, handle, device)
        # Refused where there are no clusters.
        _driver().cuKernelSetAttribute(_LARGE_CLUSTERS_ALLOWED, 1, handle, device)
        # Into the current context now, and not at a launch that a graph may be capturing.
        _call("cuKernelGetFunction", ctypes.byref(function), handle)
        _call("cuFuncLoad", function)

    def prepare(self, grid: int, block: int, shared_bytes: int, mode: int = PLAIN) -> Launch:
        """A launch of `grid` CTAs of `block` threads, to be started with arguments as often as wanted."""
        found = self._launches.get((grid, block, shared_bytes, mode))
        if found is None:
            if len(self._launches) >= _MOST_LAUNCHES:
                self._launches.clear()
            found = self._launches[grid, block, shared_bytes, mode] = Launch(self, grid, block, shared_bytes, mode)
        return found

    def launch(self, grid: int, block: int, shared_bytes: int, *args: int, mode: int = PLAIN) -> None:
        """Start `grid` CTAs of `block` threads on the current stream of the kernel's device.  Raises RuntimeError."""
        self.prepare(grid, block, shared_bytes, mode)(*args)

    def max_blocks(self, block: int, shared_bytes: int) -> int:
        """CTAs of that kind that one multiprocessor holds at once."""
        each = ctypes.c_int()
        with torch.cuda.device(self.device_index):
            _enter_context(self.device_index)
            _call(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                ctypes.byref(each),
                self._handle,
                block,
                ctypes.c_size_t(shared_bytes),
            )
        return each.value

    def max_clusters(self, cluster: int, block: int, shared_bytes: int) -> int:
        """Clusters of so many CTAs that the current context holds at once."""
        found = ctypes.c_int()
        size = ctypes.create_string_buffer(struct.pack("i4x3I52x", _CLUSTER_SIZE, cluster, 1, 1), 72)
        config = struct.pack(_CONFIG, cluster, 1, 1, block, 1, 1, shared_bytes, 0, ctypes.addressof(size), 1)
        with torch.cuda.device(self.device_index):
            _enter_context(self.device_index)
            code = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(found), self._handle, config)
        return 0 if code else found.value


class Launch:
    """A kernel with its grid, ready to be started from any thread: called with the kernel's parameters."""

    def __init__(self, kernel: Kernel, grid: int, block: int, shared_bytes: int, mode: int) -> None:
        self._kernel, self._index, self._handle = kernel, kernel.device_index, kernel._handle
        self._shape = (grid, 1, 1, block, 1, 1, shared_bytes)
        self._attributes = _ATTRIBUTES[mode]
        self._pack = struct.Struct(f"{_STREAM}{kernel._parameters}q").pack_into
        self._thread = threading.local()
        self._launch = _driver().cuLaunchKernelEx
        self._current_device = _current_device()
        self._current_stream = torch._C._cuda_getCurrentRawStream

    def _buffer(self) -> tuple[Any, ctypes.c_void_p, ctypes.c_void_p, Any]:
        """This thread's configuration, parameters and pointers to them; from the stream on written at every launch."""
        count = self._kernel._parameters
        values = ctypes.create_string_buffer(_CONFIG_BYTES + 8 * count)
        struct.pack_into(_CONFIG, values, 0, *self._shape, 0, *self._attributes)
        start = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(*(start + _CONFIG_BYTES + 8 * i for i in range(count)))
        found = (values, ctypes.c_void_p(start), ctypes.c_void_p(ctypes.addressof(pointers)), pointers)
        self._thread.buffer = found
        return found

    def __call__(self, *args: int) -> None:
        """Start it on the current stream of the kernel's device.  Raises RuntimeError."""
        index = self._index
        if self._current_device() != index:
            with torch.cuda.device(index):
                return self(*args)
        try:
            values, config, parameters, _ = self._thread.buffer
        except AttributeError:
            values, config, parameters, _ = self._buffer()
        self._pack(values, _STREAM_AT, self._current_stream(index), *self._attributes, *args)
        code = self._launch(config, self._handle, parameters, None)
        if code == _INVALID_CONTEXT:
            _enter_context(index)
            code = self._launch(config, self._handle, parameters, None)
        if code:
            grid, block, shared_bytes = self._shape[0], self._shape[3], self._shape[6]
            raise RuntimeError(
                f"{self._kernel.name} on cuda:{index} with {grid} CTAs of {block} threads and {shared_bytes} bytes of "
                f"shared memory: expected CUDA_SUCCESS, got {_error(code)} (perhaps of work started earlier)"
            )
        return None


_INCLUDE = re.compile(r'^#include "([a-z_]+\.cuh)"$', re.MULTILINE)


@functools.cache
def _source(name: str) -> str:
    """The text of a file in ``kernels/`` with what it includes, each in the place of its line."""
    text = (Path(__file__).parent / "kernels" / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: _source(found[1]), text)


# Never emptied: a graph may hold any of them.  Keys are what a model fixes; no size that changes from call to call.
_kernels: dict[tuple[str, str, Defines, int], Kernel] = {}
_compiling = threading.Lock()


def kernel(source: str, name: str, defines: Defines, device_index: int) -> Kernel:
    """Kernel `name` of file `source` in ``kernels/``, with `defines` as macros, loaded on cuda:`device_index`."""
    key = (source, name, defines, device_index)
    found = _kernels.get(key)
    if found is None:
        with _compiling:
            found = _kernels.get(key)
            if found is None:
                major, minor = torch.cuda.get_device_capability(device_index)
                code = cubin(_source(source), name, defines, f"sm_{major}{minor}")
                found = _kernels[key] = Kernel(code, name, device_index)
    return found
