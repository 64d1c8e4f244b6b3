"""Record what a model's routers choose, as a routing trace."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidInput
from .trace import Trace

__all__ = ["Capture", "capture"]

#: How Transformers' experts call the router's choice.
_CHOICES = ("top_k_index", "router_indices", "selected_experts", "topk_indices", "expert_indices")


class Capture:
    """What :func:`capture` has seen so far."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers: dict[str, list[Tensor]] = {}
        self._experts = 0

    def _add(self, layer: str, ids: Tensor, experts: int) -> None:
        ids = ids.detach().reshape(-1, ids.shape[-1]).to("cpu", torch.int32)
        # An expert of another rank, or one that there is not, is no expert.
        self._layers.setdefault(layer, []).append(ids.masked_fill((ids < 0) | (ids >= experts), -1))
        self._experts = max(self._experts, experts)

    @property
    def layers(self) -> list[str]:
        """Names of the modules that were recorded, in the order of their first call."""
        return list(self._layers)

    def trace(self, *, model: str | None = None, source: str = "", revision: str = "") -> Trace:
        """All calls so far, one behind the other: ``topk_ids`` ``[layers, tokens, k]``.

        Args:
            model: what routed; by default the model's class and, if it has one, its name or path.
            source: what it read.
            revision: which version of both.

        Raises:
            InvalidInput: no layer was called, or layers saw different numbers of tokens or choices.
        """
        joined = {name: torch.cat(parts) for name, parts in self._layers.items()}
        if not joined:
            raise InvalidInput("capture: expected at least one call of the model inside the with block, got none")
        shapes = {tuple(ids.shape) for ids in joined.values()}
        if len(shapes) > 1:
            raise InvalidInput(
                f"capture: expected every layer to route the same tokens to as many experts, got {sorted(shapes)}"
            )
        if model is None:
            path = getattr(getattr(self._model, "config", None), "_name_or_path", "")
            model = f"{type(self._model).__name__} {path}".strip()
        details = {"layers": list(joined)}
        return Trace(torch.stack(list(joined.values())), self._experts, model, source, revision, details)


@contextlib.contextmanager
def capture(model: nn.Module) -> Iterator[Capture]:
    """Record the routing of `model` while the block runs; its output does not change.

        with moealign.capture(model) as seen:
            model(**inputs)
        moealign.trace.save_trace("mine.safetensors", seen.trace(source="what it read"))

    Works on every Transformers model that hands the router's choice to an experts module (its ``forward`` has an
    argument ``top_k_index`` or the like), and on those whose router gives scores over all experts (Llama 4).  The ids
    are copied to the CPU in every call, which waits for the device: not for use inside a CUDA graph.

    Raises:
        InvalidInput: no module of `model` routes.
    """
    seen = Capture(model)
    handles = []
    try:
        for name, module in model.named_modules():
            hook = _experts_hook(seen, name, module)
            if hook is not None:
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if not handles:
            for name, module in model.named_modules():
                if _is_router(module):
                    handles.append(module.register_forward_hook(_router_hook(seen, name)))
        if not handles:
            raise InvalidInput(
                f"model: expected a Mixture-of-Experts model, got {type(model).__name__}, in which no module takes "
                f"an argument {', '.join(_CHOICES)} and none is a router with top_k and num_experts"
            )
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _experts_hook(seen: Capture, name: str, module: nn.Module) -> Any:
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return None
    choice = next((each for each in _CHOICES if each in parameters), None)
    experts = getattr(module, "num_experts", None)
    if choice is None or not isinstance(experts, int):
        return None
    order = list(parameters)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at = order.index(choice)
        ids = kwargs.get(choice, args[at] if at < len(args) else None)
        if isinstance(ids, Tensor):
            seen._add(name, ids, experts)

    return hook


def _is_router(module: nn.Module) -> bool:
    wanted = (getattr(module, "top_k", None), getattr(module, "num_experts", None))
    return "Router" in type(module).__name__ and all(isinstance(each, int) for each in wanted)


def _router_hook(seen: Capture, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensors = [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, Tensor)]
        top_k, experts = int(module.top_k), int(module.num_experts)  # type: ignore[arg-type]
        for each in tensors:
            if not each.is_floating_point() and each.shape[-1] == top_k:
                seen._add(name, each, experts)
                return
        for each in reversed(tensors):  # logits come behind the scores that were made of them
            if each.is_floating_point() and each.shape[-1] == experts:
                seen._add(name, each.topk(top_k, dim=-1).indices, experts)
                return

    return hook
