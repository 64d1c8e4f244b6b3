"""How an exchange's rows travel: by a collective of the group, or directly into the memory of other ranks.

Directly, each rank has two buffers that all ranks of the group reach.  Into *arrivals* every rank writes its part of
what a rank computes; from *results* every rank reads its part of what that has computed.  A barrier stands between
writing and reading, in each direction.  A batch that has been dispatched is combined before the next one, so these two
are enough: whoever writes arrivals again has passed the barrier of the results, to which their owner came after it had
read them; whoever writes results again has passed the next barrier of the arrivals, to which their readers came after
reading.

On GPUs this is torch's symmetric memory: rows cross NVLink (or PCIe, where GPUs reach each other) without a collective,
and only rows that are there.  On CPUs it is a file of each rank that the processes of one machine map.
"""

from __future__ import annotations

import datetime
import itertools
import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .. import modes
from ..errors import InvalidInput, RankFailed
from ..experts import launch
from . import wire
from .collectives import Group, collective, swap

__all__ = ["Transport", "transport_of"]


class Transport(Protocol):
    """The way of rows to the ranks of their experts, and of results back."""

    def begin(self, alone: bool) -> None:
        """Before a batch is sent; `alone` by a call that does not combine it too."""

    def send(
        self, module: Any, rows: Tensor, args: tuple[Any, ...], error_word: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``module.pack`` of :mod:`moealign.parallel.wire` or its kin gives, but the wire is what came in."""

    def results(self, rows: Tensor) -> Tensor | None:
        """Where a layer best puts the results of `rows` that came; None for anywhere."""

    def combine(self, rows: Tensor, weights: Tensor, routes: Tensor, places: Tensor) -> Tensor:
        """:func:`moealign.parallel.wire.combine` of what all ranks have computed for this one, given this rank's
        results `rows`."""

    def end(self) -> None:
        """Before a batch that was sent alone is combined."""


def transport_of(kind: str, group: Group, rank: int, ranks: int, device: torch.device) -> Transport:
    """The transport ``collective`` or ``direct`` of one exchange.

    Raises:
        InvalidInput: another `kind`.
    """
    if kind not in ("collective", "direct"):
        raise InvalidInput(f"transport: expected collective or direct, got {kind!r}")
    group = group or dist.distributed_c10d._get_default_group()
    return Direct(group, rank, ranks, device) if kind == "direct" else Collective(group.group_name)


class Collective:
    """By all-to-all of the group, always as many rows as there is room for; with gradients."""

    def __init__(self, group: str) -> None:
        self.group = group

    def begin(self, alone: bool) -> None:
        pass

    def send(
        self, module: Any, rows: Tensor, args: tuple[Any, ...], error_word: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sent, routes, places = module.pack(rows, *args, error_word=error_word)
        return swap(sent, self.group), routes, places

    def results(self, rows: Tensor) -> Tensor | None:
        return None

    def combine(self, rows: Tensor, weights: Tensor, routes: Tensor, places: Tensor) -> Tensor:
        return wire.combine(swap(rows, self.group), weights, routes, places)

    def end(self) -> None:
        pass


class Memory(NamedTuple):
    """A buffer of each rank of a group."""

    buffers: list[Tensor]  #: uint8 ``[bytes]`` each, those of other ranks too
    addresses: list[int]  #: of the buffers, as this rank reaches them
    wait: Callable[[], None]  #: a barrier of all ranks: what was written before it can be read after it

    def parts(self, rank: int) -> list[Tensor]:
        """The part of `rank` in every buffer, uint8."""
        return [each.view(len(self.buffers), -1)[rank] for each in self.buffers]

    def like(self, rows: Tensor, rank: int) -> Tensor:
        """The buffer of `rank` as `rows` of the same bytes."""
        return self.buffers[rank].view(rows.dtype).view(rows.shape)


class Direct:
    """By memory that all ranks reach, taken at the first call, together; for inference alone."""

    def __init__(self, group: Group, rank: int, ranks: int, device: torch.device) -> None:
        self.group = group
        self.rank, self.ranks, self.device = rank, ranks, device
        self.name = str(next(_names))
        _live[self.name] = self
        self._turn = torch.zeros((), dtype=torch.int32, device=device)
        self._known: dict[tuple[str, int], tuple[Memory, wire.Parts]] = {}
        self._away = False

    def begin(self, alone: bool) -> None:
        if alone and torch.is_grad_enabled():
            raise InvalidInput(
                "dispatch: expected torch.no_grad() with the direct transport, whose memory no backward may keep, got "
                "a call with gradients enabled"
            )
        if self._away:
            raise InvalidInput(
                "dispatch: expected the last batch to be combined first, for its rows lie in the memory of the direct "
                "transport, got another batch; prepare an exchange for each batch that is under way"
            )
        self._away = alone

    def end(self) -> None:
        self._away = False

    def send(
        self, module: Any, rows: Tensor, args: tuple[Any, ...], error_word: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        watched = modes.watched(rows, *(each for each in args if isinstance(each, Tensor)))
        if watched or launch.refuses(rows) is not None:
            sent, routes, places = module.pack(rows, *args, error_word=error_word)
            if watched:
                return modes.call(torch.ops.moealign.push_rows, sent, self.name, self._turn), routes, places
            return self.push(sent), routes, places
        came, routes, places = module.pack(rows, *args, error_word=error_word, memory=self._arrivals)
        self._memory("arrivals", came)[0].wait()
        return came, routes, places

    def push(self, sent: Tensor) -> Tensor:
        """What came to this rank, in its memory, of the wires `sent` by all."""
        sent = sent.contiguous()
        memory, _ = self._memory("arrivals", sent)
        for theirs, part in zip(memory.parts(self.rank), sent.view(torch.uint8).view(self.ranks, -1), strict=True):
            theirs.copy_(part)
        memory.wait()
        return memory.like(sent, self.rank)

    def results(self, rows: Tensor) -> Tensor | None:
        if modes.watched(rows) or launch.refuses(rows) is not None or torch.is_autocast_enabled(rows.device.type):
            return None  # where the layer allocates anyway, or chooses the dtype
        return self._memory("results", rows)[0].like(rows, self.rank)

    def combine(self, rows: Tensor, weights: Tensor, routes: Tensor, places: Tensor) -> Tensor:
        if modes.watched(rows, weights, routes, places):
            back = modes.call(torch.ops.moealign.pull_rows, rows, self.name, self._turn)
            return wire.combine(back, weights, routes, places)
        if wire.sums_in_torch(rows, weights):
            return wire.combine(self.pull(rows), weights, routes, places)
        memory, parts = self._offer(rows)
        out = wire.new_sums(rows, weights)
        launch.run([wire.combine_launch(memory.like(rows, self.rank), weights, places, out, parts)], rows.device)
        return out

    def pull(self, rows: Tensor) -> Tensor:
        """Of the results `rows` of every rank, those for this one; as if all had been sent."""
        memory, _ = self._offer(rows)
        return torch.cat(memory.parts(self.rank)).view(rows.dtype).view(rows.shape)

    def _offer(self, rows: Tensor) -> tuple[Memory, wire.Parts]:
        """Let other ranks read this rank's results `rows`, and wait until theirs can be read."""
        memory, parts = self._memory("results", rows)
        mine = memory.like(rows, self.rank)
        if mine.data_ptr() != rows.data_ptr():
            mine.copy_(rows)
        memory.wait()
        return memory, parts

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _arrivals(self, rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, wire.Parts]:
        memory, parts = self._buffers("arrivals", rows * width * dtype.itemsize)
        return memory.buffers[self.rank].view(dtype).view(rows, width), parts

    def _memory(self, kind: str, rows: Tensor) -> tuple[Memory, wire.Parts]:
        return self._buffers(kind, rows.numel() * rows.element_size())

    def _buffers(self, kind: str, size: int) -> tuple[Memory, wire.Parts]:
        """The buffers ``arrivals`` or ``results``, of `size` bytes each, and this rank's part of them for kernels."""
        found = self._known.get((kind, size))
        if found is None:
            if self.device.type == "cuda":
                memory = _symmetric(self.group, self.ranks, self.rank, size, self.device)
            else:
                memory = _shared(self.group, self.ranks, size)
            mine = [each + self.rank * (size // self.ranks) for each in memory.addresses]
            parts = wire.Parts.between(mine, memory.addresses[self.rank], self.device)
            found = self._known[kind, size] = memory, parts
        return found


_names = itertools.count()
_live: weakref.WeakValueDictionary[str, Direct] = weakref.WeakValueDictionary()

_library = torch.library.Library("moealign", "FRAGMENT")
# No compiler may change the order of these, so each says that it writes `turn`.
_library.define("push_rows(Tensor rows, str exchange, Tensor(a!) turn) -> Tensor")
_library.define("pull_rows(Tensor rows, str exchange, Tensor(a!) turn) -> Tensor")


def _push(rows: Tensor, exchange: str, turn: Tensor) -> Tensor:
    return _live[exchange].push(rows).clone()


def _pull(rows: Tensor, exchange: str, turn: Tensor) -> Tensor:
    return _live[exchange].pull(rows)


def _same(rows: Tensor, exchange: str, turn: Tensor) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


for _name, _eager in (("push_rows", _push), ("pull_rows", _pull)):
    _library.impl(_name, _eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moealign::{_name}", _same, lib=_library)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _symmetric(group: Group, ranks: int, rank: int, size: int, device: torch.device) -> Memory:
    """Symmetric memory of GPUs."""
    from torch.distributed import _symmetric_memory as symmetric

    if torch.cuda.is_current_stream_capturing():
        raise InvalidInput(
            "transport: expected an eager call of the same sizes before a capture, for the memory of the direct "
            "transport is taken together by all ranks, got a first call in a capture"
        )
    patience = _patience(group, device)
    try:
        with torch.cuda.device(device):
            own = symmetric.empty(size, dtype=torch.uint8, device=device)
            handle = symmetric.rendezvous(own, group.group_name)
    except RuntimeError as error:
        raise RankFailed(
            f"transport: expected GPUs that reach each other's memory for direct, by NVLink or PCIe, and {ranks} ranks "
            f"that make the same first call; torch has no symmetric memory here, use transport='collective' ({error})"
        ) from error
    buffers = [own if each == rank else handle.get_buffer(each, (size,), torch.uint8) for each in range(ranks)]

    def wait() -> None:
        with torch.cuda.device(device):
            handle.barrier(0, patience)

    return Memory(buffers, list(handle.buffer_ptrs), wait)


def _patience(group: Group, device: torch.device) -> int:
    """Milliseconds until a rank gives up waiting for the others: the timeout of the group."""
    options = getattr(group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", None) or dist.distributed_c10d.default_pg_timeout
    return int(timeout / datetime.timedelta(milliseconds=1))


def _shared(group: Group, ranks: int, size: int) -> Memory:
    """A file of each rank, mapped by the processes of one machine."""

    def wait() -> None:
        collective(group, lambda: dist.barrier(group=group))

    path, problem = "", ""
    try:
        path = _file(size)
    except OSError as error:
        problem = f"expected room for {size} bytes, got {error}"
    try:
        paths = _told(group, ranks, path)
        if not problem and any(each and not Path(each).exists() for each in paths):
            problem = "expected ranks of one machine, got some that do not see each other's files"
        problem = next((each for each in _told(group, ranks, problem) if each), "")
        if problem:
            raise InvalidInput(f"transport: {problem}; use transport='collective'")
        buffers = [torch.from_file(each, shared=True, size=size, dtype=torch.uint8) for each in paths]
        wait()
    finally:
        if path:
            Path(path).unlink(missing_ok=True)
    return Memory(buffers, [each.data_ptr() for each in buffers], wait)


def _file(size: int) -> str:
    """A new file of `size` bytes, in memory where the system has a folder for that.  Its room is taken at once: a write
    without room would end the process."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    handle, path = tempfile.mkstemp(prefix="moealign-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        else:  # macOS
            os.ftruncate(handle, size)
    except OSError:
        Path(path).unlink()
        raise
    finally:
        os.close(handle)
    return path


def _told(group: Group, ranks: int, mine: str) -> list[str]:
    """What each rank says."""
    every: list[Any] = [None] * ranks
    collective(group, lambda: dist.all_gather_object(every, mine, group=group))
    return every
