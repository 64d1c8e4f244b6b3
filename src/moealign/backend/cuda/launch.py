"""Load cubins and launch kernels through the CUDA driver.  Knows nothing of MoE.

::

    k = kernel("pairwise.cu", "pairwise", (("EXPERTS", 256), ("BLOCK", 16)), device_index)  # compiled once, then cached
    k.launch(grid, block, shared_bytes, *args)                    # on the device's current stream, no synchronisation
    k.launch(grid, block, shared_bytes, *args, mode=COOPERATIVE)  # or OVERLAP: programmatic dependent launch
    start = k.prepare(grid, block, shared_bytes, mode)            # once ...
    start(*args)                                                  # ... then for every launch
    k.max_blocks(block, shared_bytes)    # CTAs resident on one multiprocessor
    k.multiprocessors                    # of the device
    green_multiprocessors(device_index)  # of the current stream's green context, 0 if it has the whole device

`args` are Python ints in the order of the kernel's parameters, 0 for a null pointer; a wrong number of them raises
``struct.error``.  All CTAs of a cooperative launch are resident at once, so its grid is at most ``max_blocks`` times
the multiprocessors of the current stream.  Dynamic shared memory needs no attribute from the caller.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from .compile import Defines, compiler_version, cubin, source

__all__ = [
    "COOPERATIVE", "OVERLAP", "PLAIN", "Kernel", "Launch", "driver_refuses", "green_multiprocessors", "kernel",
]  # fmt: skip

#: Modes of a launch: plain; with all CTAs resident at once; or before the kernel ahead in the stream has ended, for
#: which the kernel itself waits (griddepcontrol.wait).
PLAIN, COOPERATIVE, OVERLAP = range(3)

# CUlaunchConfig: grid (3), block (3), shared bytes, stream, address and number of attributes.
_CONFIG = "7IQQI4x"
_CONFIG_BYTES = struct.calcsize(_CONFIG)
_STREAM, _STREAM_AT = "QQI4x", struct.calcsize("7I4x")  # the part from the stream on

# A CUlaunchAttribute each: id, padding, a union of 64 bytes that holds an int.
_COOPERATIVE = ctypes.create_string_buffer(struct.pack("i4xi60x", 2, 1), 72)
_OVERLAP = ctypes.create_string_buffer(struct.pack("i4xi60x", 6, 1), 72)
_CLUSTER_SIZE = 4
_ATTRIBUTES = ((0, 0), (ctypes.addressof(_COOPERATIVE), 1), (ctypes.addressof(_OVERLAP), 1))

_MAX_LAUNCHES = 1024
_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_*
_STATIC_SHARED_BYTES = 1
_LARGE_CLUSTERS_ALLOWED = 14
_OPT_IN_SHARED_BYTES = 97  # CU_DEVICE_ATTRIBUTE_*
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_MULTIPROCESSORS = 1  # CU_DEV_RESOURCE_TYPE_SM
_RESOURCE_BYTES, _RESOURCE_COUNT_AT = 512, 96  # of a CUdevResource, with room for later versions; sm.smCount


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


#: The driver functions that this module calls; cuKernelGetParamInfo and the two for green contexts are the newest.
_FUNCTIONS = (
    "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain",
    "cuDriverGetVersion", "cuFuncLoad", "cuGetErrorName", "cuGreenCtxGetDevResource", "cuKernelGetAttribute",
    "cuKernelGetFunction", "cuKernelGetParamInfo", "cuKernelSetAttribute", "cuLaunchKernelEx", "cuLibraryGetKernel",
    "cuLibraryLoadData", "cuOccupancyMaxActiveBlocksPerMultiprocessor", "cuOccupancyMaxActiveClusters",
    "cuStreamGetGreenCtx", "cuThreadExchangeStreamCaptureMode",
)  # fmt: skip
_MIN_DRIVER = (12, 4)  # of CUDA: the first version with all of them


def driver_refuses() -> str | None:
    """Why the installed driver cannot run NVRTC's cubins, and what to install; None if it can.  Raises nothing but the
    errors of :func:`compiler_version`."""
    minimum = f"{_MIN_DRIVER[0]}.{_MIN_DRIVER[1]}"
    remedy = f"install a driver of CUDA {minimum} or later (550 or later), or use backend 'triton'"
    try:
        driver = _driver()
    except OSError as error:
        return f"the NVIDIA driver cannot be loaded ({error}): {remedy}"
    version = ctypes.c_int()
    if hasattr(driver, "cuDriverGetVersion"):
        code = driver.cuDriverGetVersion(ctypes.byref(version))
        if code:
            return f"the NVIDIA driver does not say its version (CUDA error {code}): {remedy}"
        major, minor = version.value // 1000, version.value % 1000 // 10
        if (major, minor) < _MIN_DRIVER:
            return f"needs a driver of CUDA {minimum} or later, this one is of CUDA {major}.{minor}: {remedy}"
    missing = [name for name in _FUNCTIONS if not hasattr(driver, name)]
    if missing:
        return f"the NVIDIA driver has no {', '.join(missing)}: {remedy}"
    compiler = compiler_version()
    if major < int(compiler.split(".")[0]):
        return (
            f"NVRTC {compiler} compiles for drivers of CUDA {compiler.split('.')[0]}.0 or later, this one is of CUDA "
            f"{major}.{minor}: install a newer driver, or an older NVRTC: pip install 'cuda-core[cu{major}]'"
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
    """Make torch's context current in this thread: a thread without earlier CUDA calls has none."""
    current = ctypes.c_void_p()
    _call("cuCtxGetCurrent", ctypes.byref(current))
    if not current.value:
        device, primary = ctypes.c_int(), ctypes.c_void_p()
        _call("cuDeviceGet", ctypes.byref(device), device_index)
        _call("cuDevicePrimaryCtxRetain", ctypes.byref(primary), device)
        _call("cuCtxSetCurrent", primary)


@functools.cache
def _current_device() -> Callable[[], int]:
    """A function that returns the current device; with a single device, a constant."""
    current: Callable[[], int] = torch._C._cuda_getDevice if torch.cuda.device_count() > 1 else lambda: 0
    return current


def green_multiprocessors(device_index: int) -> int:
    """Multiprocessors of the green context of the current stream of cuda:`device_index`; 0 if it has none, and with it
    the whole device.  The default stream belongs to the current context."""
    if _current_device()() != device_index:
        with torch.cuda.device(device_index):
            return _green_multiprocessors(torch._C._cuda_getCurrentRawStream(device_index))
    return _green_multiprocessors(torch._C._cuda_getCurrentRawStream(device_index))


def _green_multiprocessors(stream: int) -> int:
    green = ctypes.c_void_p()
    if _driver().cuStreamGetGreenCtx(ctypes.c_void_p(stream), ctypes.byref(green)) or not green.value:
        return 0  # an error means that the thread has no context, or the launch reports it too
    resource = ctypes.create_string_buffer(_RESOURCE_BYTES)
    if _driver().cuGreenCtxGetDevResource(green, resource, _MULTIPROCESSORS):
        return 0  # it does not partition multiprocessors
    count: int = struct.unpack_from("I", resource, _RESOURCE_COUNT_AT)[0]
    return count


class Kernel:
    """One compiled kernel on one device, ready to launch from any thread."""

    def __init__(self, code: bytes, name: str, device_index: int) -> None:
        self.name = name
        self.device_index = device_index
        self.multiprocessors: int = torch.cuda.get_device_properties(device_index).multi_processor_count
        # A strict stream capture, in any thread, forbids loading unless this thread relaxes its mode.
        mode = ctypes.c_int(_RELAXED)
        with torch.cuda.device(device_index):
            _enter_context(device_index)
            _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
            try:
                self._load(code)
            finally:
                _call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        self._launches: dict[tuple[int, int, int, int], Launch] = {}  # at most _MAX_LAUNCHES

    def _load(self, code: bytes) -> None:
        library, handle, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        device = ctypes.c_int()
        _call("cuDeviceGet", ctypes.byref(device), self.device_index)
        _call("cuLibraryLoadData", ctypes.byref(library), code, None, None, 0, None, None, 0)
        _call("cuLibraryGetKernel", ctypes.byref(handle), library, self.name.encode())
        # The handle is valid in every context, green ones too, and is accepted where a CUfunction is expected.
        self._library, self._handle = library, handle

        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        self._parameters = 0
        while not _driver().cuKernelGetParamInfo(
            handle, ctypes.c_size_t(self._parameters), ctypes.byref(offset), ctypes.byref(size)
        ):
            if size.value != 8:
                raise RuntimeError(f"{self.name}: expected parameters of 8 bytes, got one of {size.value}")
            self._parameters += 1

        static, limit = ctypes.c_int(), ctypes.c_int()
        _call("cuKernelGetAttribute", ctypes.byref(static), _STATIC_SHARED_BYTES, handle, device)
        _call("cuDeviceGetAttribute", ctypes.byref(limit), _OPT_IN_SHARED_BYTES, device)
        self.max_shared_bytes: int = limit.value - static.value
        _call("cuKernelSetAttribute", _MAX_DYNAMIC_SHARED_BYTES, self.max_shared_bytes, handle, device)
        # Fails on devices without clusters.
        _driver().cuKernelSetAttribute(_LARGE_CLUSTERS_ALLOWED, 1, handle, device)
        # Load into the current context now: the first launch may be inside a graph capture.
        _call("cuKernelGetFunction", ctypes.byref(function), handle)
        _call("cuFuncLoad", function)

    def prepare(self, grid: int, block: int, shared_bytes: int, mode: int = PLAIN) -> Launch:
        """A launch of `grid` CTAs of `block` threads, to be called with the kernel's arguments any number of times."""
        launch = self._launches.get((grid, block, shared_bytes, mode))
        if launch is None:
            if len(self._launches) >= _MAX_LAUNCHES:
                self._launches.clear()
            launch = self._launches[grid, block, shared_bytes, mode] = Launch(self, grid, block, shared_bytes, mode)
        return launch

    def launch(self, grid: int, block: int, shared_bytes: int, *args: int, mode: int = PLAIN) -> None:
        """Launch `grid` CTAs of `block` threads on the current stream of the kernel's device.  Raises RuntimeError."""
        self.prepare(grid, block, shared_bytes, mode)(*args)

    def max_blocks(self, block: int, shared_bytes: int) -> int:
        """The number of CTAs that are resident on one multiprocessor."""
        blocks = ctypes.c_int()
        with torch.cuda.device(self.device_index):
            _enter_context(self.device_index)
            _call(
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
                ctypes.byref(blocks),
                self._handle,
                block,
                ctypes.c_size_t(shared_bytes),
            )
        return blocks.value

    def max_clusters(self, cluster: int, block: int, shared_bytes: int) -> int:
        """The number of clusters of `cluster` CTAs that are resident in the current context; 0 if they cannot run."""
        clusters = ctypes.c_int()
        size = ctypes.create_string_buffer(struct.pack("i4x3I52x", _CLUSTER_SIZE, cluster, 1, 1), 72)
        config = struct.pack(_CONFIG, cluster, 1, 1, block, 1, 1, shared_bytes, 0, ctypes.addressof(size), 1)
        with torch.cuda.device(self.device_index):
            _enter_context(self.device_index)
            code = _driver().cuOccupancyMaxActiveClusters(ctypes.byref(clusters), self._handle, config)
        return 0 if code else clusters.value


class Launch:
    """A kernel with its grid.  Call it with the kernel's arguments, from any thread."""

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
        """This thread's launch configuration and parameters; every launch overwrites them from the stream on."""
        count = self._kernel._parameters
        values = ctypes.create_string_buffer(_CONFIG_BYTES + 8 * count)
        struct.pack_into(_CONFIG, values, 0, *self._shape, 0, *self._attributes)
        start = ctypes.addressof(values)
        pointers = (ctypes.c_void_p * count)(*(start + _CONFIG_BYTES + 8 * i for i in range(count)))
        buffer = (values, ctypes.c_void_p(start), ctypes.c_void_p(ctypes.addressof(pointers)), pointers)
        self._thread.buffer = buffer
        return buffer

    def __call__(self, *args: int) -> None:
        """Launch on the current stream of the kernel's device.  Raises RuntimeError."""
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


# Never emptied: a graph may hold any of them.  Keys contain no size that changes from call to call, so they are few.
_kernels: dict[tuple[str, str, Defines, int], Kernel] = {}
_compiling = threading.Lock()


def kernel(file: str, name: str, defines: Defines, device_index: int) -> Kernel:
    """Kernel `name` of `file` in ``kernels/``, with `defines` as macros, compiled and loaded on cuda:`device_index`."""
    key = (file, name, defines, device_index)
    loaded = _kernels.get(key)
    if loaded is None:
        with _compiling:
            loaded = _kernels.get(key)
            if loaded is None:
                major, minor = torch.cuda.get_device_capability(device_index)
                code = cubin(source(file), name, defines, f"sm_{major}{minor}")
                loaded = _kernels[key] = Kernel(code, name, device_index)
    return loaded
