"""Floors: what no alignment can be faster than."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from ..timing import device_us
from .candidates import POISON, Candidate, exact_difference
from .cases import Case

KERNELS = r"""
extern "C" __global__ void floor_empty() {}
extern "C" __global__ void floor_chain(const int* in, int* out, int n) {
  __shared__ int held[1024];
  int t = threadIdx.x;
  held[t] = t < n ? in[t] : -1;
  __syncthreads();
  out[t] = held[(t + 1) % blockDim.x];
}
"""


class Floors:
    """An empty kernel, and one that does the minimum of any alignment: load, barrier, store."""

    def __init__(self) -> None:
        from cuda.core import Device, LaunchConfig, Program, ProgramOptions, Stream, launch

        Device(torch.cuda.current_device()).set_current()
        major, minor = torch.cuda.get_device_capability()
        options = ProgramOptions(arch=f"sm_{major}{minor}", std="c++17")
        code = Program(KERNELS, "c++", options).compile("cubin")
        self._empty, self._chain = code.get_kernel("floor_empty"), code.get_kernel("floor_chain")
        self._launch, self._config = launch, LaunchConfig
        self._streams: dict[int, Any] = {}
        self._from_handle = Stream.from_handle
        self.bytes_per_us = copy_bandwidth(torch.arange(2**28, dtype=torch.int32, device="cuda"))

    def _stream(self) -> Any:
        handle = torch.cuda.current_stream().cuda_stream
        if handle not in self._streams:
            self._streams[handle] = self._from_handle(handle)
        return self._streams[handle]

    def candidates(self, case: Case) -> list[Candidate]:
        threads = next(each for each in (32, 256, 1024) if each >= min(case.routes, 1024))
        outs = [torch.full((threads,), POISON, dtype=torch.int32, device=case.device) for _ in case.inputs]
        flat = [tensor.view(-1) for tensor in case.inputs]
        count = np.int32(flat[0].numel())
        warp, block = self._config(grid=1, block=32), self._config(grid=1, block=threads)

        def empty(slot: int) -> None:
            self._launch(self._stream(), warp, self._empty)

        def chain(slot: int) -> None:
            self._launch(self._stream(), block, self._chain, flat[slot].data_ptr(), outs[slot].data_ptr(), count)

        def check(slot: int) -> str | None:
            loaded = np.full(threads, -1)
            values = flat[slot].cpu().numpy()[:threads]
            loaded[: len(values)] = values
            return exact_difference({"out": outs[slot]}, {"out": np.roll(loaded, -1)})

        return [Candidate("floor-empty", empty), Candidate("floor-chain", chain, check, [[out] for out in outs])]

    def bytes_us(self, case: Case) -> float:
        """Microseconds to read every input once and write every output once, at the bandwidth of a large copy."""
        elements = case.inputs[0].numel() + sum(case.capacity[:3])
        return elements * 4 / self.bytes_per_us


def copy_bandwidth(source: torch.Tensor) -> float:
    """Bytes read and written a microsecond by copies of `source`: the median of ten after two to warm up."""
    target = torch.empty_like(source)
    times = [device_us(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * source.nbytes / statistics.median(times[2:])
