"""Work beside an exchange: :func:`beside`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Beside", "beside"]

Result = TypeVar("Result")


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside(Generic[Result]):
    """A call in progress, of :func:`beside`."""

    def __init__(self, result: Result, inputs: tuple[Any, ...], side: torch.cuda.Stream | None) -> None:
        self._result, self._side = result, side
        self._inputs = inputs  # which must live until the call is complete

    def wait(self) -> Result:
        """The result of the call, for the current stream; the host does not wait."""
        if self._side is not None:
            current = torch.cuda.current_stream(self._side.device)
            current.wait_stream(self._side)
            for each in self._result if isinstance(self._result, (tuple, list)) else (self._result,):
                if isinstance(each, Tensor):
                    each.record_stream(current)
            self._side, self._inputs = None, ()
        return self._result


def beside(call: Callable[..., Result], *inputs: Any) -> Beside[Result]:
    """Start ``call(*inputs)`` on a stream of its own, beside what the current stream does until :meth:`Beside.wait`.

    It is for work that needs nothing of an exchange, such as shared experts or the router of the next micro-batch.  The
    call starts when the current stream has come here.  CUDA graphs capture it as a branch of its own.  On CPUs it runs
    at once.

    Args:
        call: without collectives of the exchange's group, which would be in another order on another rank.
        inputs: its arguments; the first tensor of a GPU decides the device.

    Returns:
        The call in progress, whose result is a tensor or a tuple or list of tensors.
    """
    device = next((each.device for each in inputs if isinstance(each, Tensor) and each.is_cuda), None)
    if device is None:
        return Beside(call(*inputs), inputs, None)
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        return Beside(call(*inputs), inputs, side)
