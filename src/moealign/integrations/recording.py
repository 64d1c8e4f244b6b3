"""The recorder behind ``MOEALIGN_TRACE``: the ids that an engine passes to each alignment, written as a routing trace.

One recorder per process.  It copies ids to the host without waiting for the device, reads nothing while a stream is
being captured, and keeps at most ``max_bytes``.  A failure to record is logged, ends the recording, and never reaches
the engine.  :mod:`~moealign.integrations.steps` turns the calls into a trace.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import sys
import threading
from collections import Counter
from multiprocessing import util
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidInput, TraceError
from ..trace import Trace, save_trace
from .steps import Call, assemble

__all__ = ["LIMITS", "Recorder", "limit_of", "recorder_from_environment"]

FIRST_WRITE = 1 << 20  # bytes; the file is rewritten whenever the recording has doubled, in case the process is killed
CALL_BYTES = 512  # of Python and allocator overhead per call, counted towards the limit
#: Functions of vLLM and SGLang that run the model on dummy input at start-up.
START_UP = {"profile_run", "_dummy_run", "capture_model", "capture_one_batch_size", "warmup_torch_compile"}
NOTE = "Replays of CUDA graphs run no Python and are not recorded."
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)

logger = logging.getLogger(__name__)


class Recorder:
    """The calls of one process, and the file that they are written to.

    Args:
        engine: package name of the engine, for the metadata.
        path: the rank, if known, and the process id are inserted before the suffix.
        max_bytes: limit on the memory of the recording; later calls are counted only.
        layers: number of MoE layers in each step; by default, layers are identified by name or by period.
    """

    def __init__(self, engine: str, path: Path, max_bytes: int = 64 << 20, layers: int | None = None) -> None:
        self.engine, self.path, self.max_bytes, self.layers = engine, path, max_bytes, layers
        self._inherited: list[Any] = []
        self._start()
        os.register_at_fork(after_in_child=self._start_in_child)

    def _start(self) -> None:
        self._calls: list[Call] = []
        self._left_out: Counter[str] = Counter()  #: calls that are not recorded, by reason
        self._bytes, self._next_write = 0, FIRST_WRITE
        self._lock, self._write_lock = threading.Lock(), threading.Lock()
        self._failed = self._seen = False
        self._rank: int | None = None
        self._device = ""  #: name of the GPU that the ids are on
        self._sizes: dict[str, dict[str, int]] = {}  #: of an expert, by layer
        self._unwritten = False

    def _start_in_child(self) -> None:
        self._inherited.append(self._calls)  # a forked child must not free the parent's pinned memory and events
        self._start()

    # ---- recording

    def add(self, topk_ids: Tensor, num_experts: int, mapped: bool) -> None:
        """Record one alignment: ids ``[tokens, top_k]`` of any integer dtype, and whether it has an expert map."""
        if self._failed:
            return
        try:
            self._add(topk_ids, num_experts, mapped)
        except Exception as error:
            self._failed = True
            logger.warning("moealign stops recording: %s: %s", type(error).__name__, error)

    def _add(self, topk_ids: Tensor, num_experts: int, mapped: bool) -> None:
        if not self._seen:
            self._begin()
        if type(topk_ids) is not Tensor or topk_ids.dim() != 2 or topk_ids.dtype not in _INTEGERS:
            return self._leave_out("unsupported ids")
        if type(num_experts) is not int or num_experts < 1 or topk_ids.device.type == "meta":
            return self._leave_out("unsupported ids")
        if topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return self._leave_out("graph capture")
        if topk_ids.numel() == 0:
            return None
        found, start_up = _caller(sys._getframe(1))
        if start_up:
            return self._leave_out("start-up")
        layer = None
        if found is not None:
            layer, module = found
            if layer not in self._sizes:
                self._sizes[layer] = _sizes_of(module)
        if topk_ids.is_cuda and not self._device:
            self._device = torch.cuda.get_device_name(topk_ids.device)
        dtype = torch.int16 if num_experts <= 1 << 15 else torch.int32
        size = topk_ids.numel() * dtype.itemsize + CALL_BYTES
        with self._lock:
            full = self._bytes + size > self.max_bytes
            first = full and not self._left_out["limit"]
            if full:
                self._left_out["limit"] += 1
                self._bytes = self.max_bytes  # no smaller call after the gap
            else:
                self._bytes += size
            write = first or (not full and self._bytes >= self._next_write)
            if write:
                self._next_write = 2 * self._bytes
            self._unwritten = True
        if not full:
            ids, copied = _to_host(topk_ids, num_experts, dtype)
            with self._lock:
                self._calls.append(Call(threading.get_ident(), layer, ids, num_experts, mapped, copied))
        if first:
            logger.warning("moealign: the trace has reached its limit of %.4g MiB", self.max_bytes / 2**20)
        if write:
            self._write_or_log()
        return None

    def _begin(self) -> None:
        """At the first call of a process: a process without calls writes nothing."""
        with self._lock:
            if self._seen:
                return
            self._seen = True
            distributed = torch.distributed
            if distributed.is_available() and distributed.is_initialized():
                self._rank = distributed.get_rank()
            # Unlike atexit, this also runs in the children of multiprocessing, which engines use.
            util.Finalize(None, self._write_at_exit, exitpriority=10)

    def _leave_out(self, reason: str) -> None:
        with self._lock:
            self._left_out[reason] += 1
            self._unwritten = True

    # ---- writing

    def file(self) -> Path:
        """The file of this process: ``trace.safetensors`` becomes ``trace.rank0.pid123.safetensors``."""
        suffix = self.path.suffix or ".safetensors"
        rank = "" if self._rank is None else f".rank{self._rank}"
        return self.path.with_name(f"{self.path.stem}{rank}.pid{os.getpid()}{suffix}")

    def write(self) -> Path:
        """Write all calls so far to :meth:`file` and return it.  Waits for the copies to the host.

        Raises:
            TraceError: no complete step of the model is recorded, or the file cannot be written.
        """
        with self._write_lock:
            with self._lock:
                calls, left_out = list(self._calls), Counter(self._left_out)
                self._unwritten = False
            if any(call.copied is not None for call in calls) and torch.cuda.is_current_stream_capturing():
                raise TraceError(f"{self.path}: expected no CUDA graph capture while a trace is written, got one")
            for call in calls:
                if call.copied is not None:
                    call.copied.synchronize()
            path = self.file()
            trace = self._trace(calls, left_out)
            partial = path.with_name(f"{path.name}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_trace(partial, trace)
                os.replace(partial, path)
            except OSError as error:
                raise TraceError(f"{path}: expected a path that can be written, got {error}") from None
            finally:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
            return path

    def _trace(self, calls: list[Call], left_out: Counter[str]) -> Trace:
        recording = assemble(calls, self.layers)
        left_out["incomplete step"] += recording.left_out
        reasons = {reason: count for reason, count in sorted(left_out.items()) if count}
        if recording.topk_ids is None:
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "no calls at all"
            raise TraceError(f"{self.path}: expected at least one complete step of the model, got {counts}. {NOTE}")
        try:
            release = importlib.metadata.version(self.engine)
        except importlib.metadata.PackageNotFoundError:
            release = "of unknown version"
        details = {
            "engine": self.engine,
            "layers": list(recording.layers),
            "layers_from": recording.layers_from,
            "calls": list(recording.tokens),
            "calls_with_expert_map": sum(call.mapped for call in calls),
            "calls_left_out": reasons,
            "pid": os.getpid(),
            "rank": self._rank,
            "note": NOTE,
        }
        if self._device:
            details["device"] = self._device
        sizes = [self._sizes.get(layer, {}) for layer in recording.layers]
        details |= {name: size for name, size in sizes[0].items() if all(each.get(name) == size for each in sizes)}
        name = f"{self.engine} {release}"
        source = f"requests to process {os.getpid()}"
        return Trace(recording.topk_ids, recording.num_experts, f"model in {name}", source, name, details)

    def _write_or_log(self) -> None:
        try:
            logger.info("moealign wrote %s", self.write())
        except Exception as error:
            logger.warning("moealign writes no trace: %s", error)

    def _write_at_exit(self) -> None:
        if self._unwritten:
            self._write_or_log()


def _to_host(ids: Tensor, num_experts: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A copy on the host with -1 for each id outside ``[0, num_experts)``, and the event after which it is valid."""
    wide = ids.detach().to(torch.int64)
    narrow = torch.where((wide >= 0) & (wide < num_experts), wide, -1).to(dtype)
    if not ids.is_cuda:
        return narrow.cpu(), None
    with torch.cuda.device(ids.device):
        host = torch.empty(narrow.shape, dtype=dtype, pin_memory=True)
        host.copy_(narrow, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return host, copied


def _caller(frame: FrameType | None) -> tuple[tuple[str, nn.Module] | None, bool]:
    """The MoE layer that the innermost frame with one belongs to and its name, and whether this is a start-up run."""
    layer = None
    while frame is not None:
        if frame.f_code.co_name in START_UP:
            return layer, True
        if layer is None:
            layer = _layer_of(frame)
        frame = frame.f_back
    return layer, False


def _layer_of(frame: FrameType) -> tuple[str, nn.Module] | None:
    """vLLM's MoE layers have a ``layer_name``, SGLang's a ``layer_id``; the locals of their callees hold them."""
    if not {"layer", "self"}.intersection(frame.f_code.co_varnames):
        return None
    variables = frame.f_locals
    for owner in (variables.get("layer"), variables.get("self")):
        if isinstance(owner, nn.Module):
            name = getattr(owner, "layer_name", None)
            if type(name) is str:
                return name, owner
            number = getattr(owner, "layer_id", None)
            if type(number) is int:
                return f"layer {number}", owner
    return None


def _sizes_of(layer: nn.Module) -> dict[str, int]:
    """``hidden`` and ``intermediate`` of an expert on this rank; {} if neither `layer` nor its config says both."""
    for owner in (layer, getattr(layer, "moe_config", None)):  # newer releases of vLLM have both in a config
        hidden = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
        intermediate = getattr(owner, "intermediate_size_per_partition", None)
        if type(hidden) is int and type(intermediate) is int and hidden > 0 and intermediate > 0:
            return {"hidden": hidden, "intermediate": intermediate}
    return {}


def recorder_from_environment(engine: str) -> Recorder:
    """The recorder that ``MOEALIGN_TRACE``, ``MOEALIGN_TRACE_MB`` and ``MOEALIGN_TRACE_LAYERS`` describe.

    Raises:
        InvalidInput: a variable has an invalid value.
    """
    megabytes, layers = (limit_of(name, os.environ.get(name)) for name in LIMITS)
    limit = 64 << 20 if megabytes is None else int(megabytes * 2**20)
    return Recorder(engine, Path(os.environ["MOEALIGN_TRACE"]).absolute(), limit, layers)


#: Optional variables beside MOEALIGN_TRACE: the type of a value, and what is expected.
LIMITS: dict[str, tuple[Any, str]] = {
    "MOEALIGN_TRACE_MB": (float, "a number of MiB above 0"),
    "MOEALIGN_TRACE_LAYERS": (int, "a whole number of MoE layers above 0"),
}


def limit_of(variable: str, value: str | None) -> Any:
    """The number that `value` of one of `LIMITS` means, None if it is not set.

    Raises:
        InvalidInput: the value is invalid.
    """
    kind, description = LIMITS[variable]
    if not value:
        return None
    try:
        number = kind(value)
    except ValueError:
        number = 0
    if not 0 < number < 1 << 40:
        raise InvalidInput(f"{variable}: expected {description}, got {value!r}")
    return number
