"""Record what a model's routers choose, as a routing trace."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidInput, InvalidType
from .trace import Trace

__all__ = ["Capture", "capture"]

#: What experts call the router's choice.
_CHOICES = ("top_k_index", "router_indices", "selected_experts", "topk_indices", "expert_indices", "router_mask")
#: What modules call the number of their experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
#: What models call their mask of padding, and what it is the mask of.
_MASKS = {
    "attention_mask": ("input_ids", "inputs_embeds", "hidden_states"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}
_PADDING = ("drop", "keep")
_ADVICE = "capture(model, padding='keep') counts padding as the model does"


@dataclass(frozen=True)
class _Mask:
    """A mask of padding, and what it is the mask of: the last of its tokens, or those behind `past`."""

    mask: Tensor  #: [batch, length] or [batch, heads, length, keys]
    batch: int
    length: int
    past: int | None = None  #: tokens in the cache, where there is one

    def real(self) -> Tensor | None:
        """Which tokens are no padding ``[batch, length]``; None where the mask does not say."""
        mask, length = _whole(self.mask).detach().to("cpu"), self.length
        if mask.shape[0] not in (1, self.batch) or mask.shape[-1] < length:
            return None
        if mask.dim() == 2:
            real = mask[:, mask.shape[1] - length :]
            real = real == 0 if real.is_floating_point() and bool((mask < 0).any()) else real != 0
        else:
            past = self.past if self.past is not None else 0 if mask.shape[-1] == length else None
            if past is None or mask.shape[-2] != length or past + length > mask.shape[-1]:
                return None
            own = mask[:, 0, :, past : past + length].diagonal(dim1=-2, dim2=-1)
            real = own == 0 if own.is_floating_point() else own != 0
        return real.expand(self.batch, length)


@dataclass
class _Frame:
    """A call of a module that is under way: the masks that came with it."""

    module: nn.Module
    masks: list[_Mask] = field(default_factory=list)
    without: set[int] = field(default_factory=set)  #: how many tokens came without a mask


@dataclass
class _Thread:
    """What a thread is in the middle of."""

    frames: list[_Frame] = field(default_factory=list)
    number: int = -1  #: of the outermost call
    made: list[tuple[str, Tensor, int]] = field(default_factory=list)  #: so far: layer, ids, experts


class Capture:
    """What :func:`capture` has seen so far.  Only whole calls of the model count: one that raises leaves nothing."""

    def __init__(self, model: nn.Module, padding: str, attention_mask: Tensor | None) -> None:
        self._model, self._padding = model, padding
        self._mask = attention_mask
        self._layers: dict[str, list[Tensor]] = {}  # the ids of each call
        self._numbers: dict[str, list[int]] = {}  # the model's call that each was a part of
        self._experts: dict[str, int] = {}
        self._calls = 0
        self._lock = threading.Lock()
        self._threads: dict[int, _Thread] = {}

    # ---- what came

    @property
    def layers(self) -> list[str]:
        """Names of the modules that were recorded, in the order of their first call."""
        return list(self._layers)

    @property
    def topk_ids(self) -> dict[str, Tensor]:
        """Of every layer the ids of all its calls, one behind the other: int32 ``[tokens, k]`` on the CPU.

        ``-1`` is a choice without an expert: an expert of another rank, or fewer than k.
        """
        return {name: _joined([ids for _, ids in self._ordered(name)]) for name in self._layers}

    @property
    def num_experts(self) -> dict[str, int]:
        """Of every layer the number of experts that its router chooses from."""
        return dict(self._experts)

    @property
    def calls(self) -> dict[str, tuple[int, ...]]:
        """Of every layer how many tokens came in each of its calls."""
        return {name: tuple(len(ids) for _, ids in self._ordered(name)) for name in self._layers}

    def trace(self, *, model: str | None = None, source: str = "", revision: str = "") -> Trace:
        """All calls so far, one behind the other: ``topk_ids`` ``[layers, tokens, k]``, and ``calls``, where each ends.

        Args:
            model: what routed; by default the model's class and, if it has one, its name or path.
            source: what it read.
            revision: which version of both.

        Raises:
            InvalidInput: no layer was called, or layers are of several kinds (see :meth:`traces`).
        """
        found = self.traces(model=model, source=source, revision=revision)
        if len(found) > 1:
            kinds = "; ".join(
                f"{each.details['layers'][0]} and {each.layers - 1} more: {each.tokens} tokens to {each.top_k} of "
                f"{each.num_experts} experts in {len(each.calls)} calls"
                for each in found
            )
            raise InvalidInput(
                f"capture: expected every layer to route the same tokens to as many experts, got {kinds}; "
                "traces() gives a trace of each kind, topk_ids the ids of each layer"
            )
        return found[0]

    def traces(self, *, model: str | None = None, source: str = "", revision: str = "") -> list[Trace]:
        """A trace of every kind of layer, in the order of first calls; arguments as of :meth:`trace`.

        Layers are of one kind if they choose as many of as many experts and were called with the same tokens: in the
        same calls of the model, as often.

        Raises:
            InvalidInput: no layer was called.
        """
        kinds: dict[Any, list[str]] = {}
        ids = self.topk_ids
        for name in self._layers:
            calls = tuple((number, len(each)) for number, each in self._ordered(name))
            kinds.setdefault((ids[name].shape[1], self._experts[name], calls), []).append(name)
        if not kinds:
            raise InvalidInput("capture: expected at least one call of the model inside the with block, got none")
        if model is None:
            path = getattr(getattr(self._model, "config", None), "_name_or_path", "")
            model = f"{type(self._model).__name__} {path}".strip()
        return [
            Trace(
                torch.stack([ids[name] for name in names]),
                experts,
                model,
                source,
                revision,
                {"layers": names, "calls": [count for _, count in calls]},
            )
            for (_, experts, calls), names in kinds.items()
        ]

    def _ordered(self, name: str) -> list[tuple[int, Tensor]]:
        """By the model's calls: several threads may call it at once."""
        return sorted(zip(self._numbers[name], self._layers[name], strict=True), key=lambda each: each[0])

    # ---- what hooks tell

    def _thread(self) -> _Thread:
        return self._threads.setdefault(threading.get_ident(), _Thread())

    def _enter(self, frame: _Frame) -> None:
        here = self._thread()
        if any(each.module is frame.module for each in here.frames):  # a call before this one was interrupted
            here.frames.clear()
        if not here.frames:
            here.made.clear()
            with self._lock:
                here.number, self._calls = self._calls, self._calls + 1
        here.frames.append(frame)

    def _leave(self, module: nn.Module, whole: bool) -> None:
        here = self._thread()
        if not here.frames or here.frames[-1].module is not module:
            return
        if whole and len(here.frames) > 1:
            here.frames.pop()
        elif whole:
            here.frames.clear()
            self._keep(here)
        else:
            here.frames.pop()
            if not here.frames:
                here.made.clear()

    def _add(self, layer: str, ids: Tensor, experts: int) -> None:
        here = self._thread()
        keep = self._kept(layer, len(ids), here)
        if keep is not None:
            ids = ids[keep]
        if len(ids) == 0:
            return
        here.made.append((layer, ids, experts))
        if not here.frames:  # a part of the model was called by itself
            with self._lock:
                here.number, self._calls = self._calls, self._calls + 1
            self._keep(here)

    def _keep(self, here: _Thread) -> None:
        with self._lock:
            for layer, ids, experts in here.made:
                self._layers.setdefault(layer, []).append(ids)
                self._numbers.setdefault(layer, []).append(here.number)
                self._experts[layer] = max(self._experts.get(layer, 0), experts)
            here.made.clear()

    def _kept(self, layer: str, tokens: int, here: _Thread) -> Tensor | None:
        """Which of `tokens` are no padding; None for all."""
        if self._padding == "keep":
            return None
        masks = [mask for frame in reversed(here.frames) for mask in frame.masks]
        if self._mask is not None:
            masks.append(_Mask(self._mask, *self._mask.shape))
        padded = False
        for mask in masks:
            real = mask.real()
            if real is not None and real.numel() == tokens:
                return real.reshape(-1)
            padded |= real is None or not bool(real.all())
        if padded and not any(tokens in frame.without for frame in here.frames):
            raise InvalidInput(
                f"capture: expected {layer} to route the {masks[0].batch} x {masks[0].length} tokens that the "
                f"attention mask {list(masks[0].mask.shape)} tells apart, got {tokens} tokens; {_ADVICE}"
            )
        return None


@contextlib.contextmanager
def capture(model: nn.Module, *, padding: str = "drop", attention_mask: Tensor | None = None) -> Iterator[Capture]:
    """Record the routing of `model` while the block runs.

        with moealign.capture(model) as seen:
            model(**inputs)
        moealign.trace.save_trace("mine.safetensors", seen.trace(source="what it read"))

    Works on every Transformers model that hands the router's choice to an experts module (its ``forward`` has an
    argument ``top_k_index`` or the like), and on those whose router gives a mask or scores over all experts (Llama 4),
    with any experts implementation.  What the model computes does not change.  A module under two names goes by its
    first; called twice, it is recorded twice.

    Each choice is recorded once.  A layer that gradient checkpointing computes again in the backward pass is not
    recorded again.  Models that were compiled run eagerly inside the block (``torch.compiler.set_stance``), so that no
    call of a graph that is there already is missed; replays of a CUDA graph run no module and cannot be seen.  The ids
    are copied to the CPU in every call, which waits for the device.

    Args:
        padding: "drop" leaves out the positions that the attention mask says are padding, as their routes are no load
            that a server has; "keep" records whatever is routed.
        attention_mask: ``[batch, length]``, 0 or False for padding, for models that take none.  By default the model's
            own argument ``attention_mask`` (of its innermost module that has one of the tokens' shape), ``[batch,
            length]`` or ``[batch, heads, length, length]``, where a token that may not attend to itself is padding.

    Raises:
        InvalidInput: no module of `model` routes; in a call: ids that are none, or a mask that is not of the tokens.
        InvalidType: in a call: a choice that is neither ids nor a mask of experts.
    """
    if padding not in _PADDING:
        raise InvalidInput(f"padding: expected one of {', '.join(_PADDING)}, got {padding!r}")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InvalidInput(f"attention_mask: expected a tensor [batch, length], got {got}")
    model = getattr(model, "_orig_mod", model)
    seen = Capture(model, padding, attention_mask)
    handles: list[Any] = []
    try:
        places = []
        for name, module in model.named_modules():
            hook = _experts_hook(seen, name, module)
            if hook is not None:
                places.append(name.rpartition(".")[0])
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in model.named_modules():
            if _is_router(module) and not _near(name.rpartition(".")[0], places):  # its experts do not tell
                handles.append(module.register_forward_hook(_router_hook(seen, name)))
        if not handles:
            raise InvalidInput(
                f"model: expected a Mixture-of-Experts model, got {type(model).__name__}, in which no module takes "
                f"an argument {', '.join(_CHOICES)} and none is a router with top_k and num_experts"
            )
        for module in model.modules():
            if module is model or _masked(module):
                handles += _frame_hooks(seen, module)
        with _eagerly():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


# ---- compiled models -------------------------------------------------------------------------------------------------

_stance = threading.Lock()
_blocks = 0
_before: Any = None


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled functions run eagerly until the last of the blocks ends, in whatever order they end."""
    global _blocks, _before
    with _stance:
        if _blocks == 0:
            try:
                _before = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise InvalidInput(
                    f"capture: expected to begin outside a compiled function, got one that runs ({error}); put the "
                    "with statement around its call"
                ) from None
            _before.__enter__()
        _blocks += 1
    try:
        yield
    finally:
        with _stance:
            _blocks -= 1
            if _blocks == 0:
                _before.__exit__(None, None, None)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def _again() -> bool:
    """Whether this is no run of the model's own: a recomputation in a backward pass, or a compiler's or exporter's."""
    return torch._C._current_graph_task_id() != -1 or torch.compiler.is_compiling()


def _names(forward: Any, first: int) -> list[str]:
    """What `forward` calls its parameters from `first` on, where it can be said."""
    with contextlib.suppress(TypeError, ValueError):
        found = list(inspect.signature(forward).parameters.values())[first:]
        if any(each.kind is each.POSITIONAL_OR_KEYWORD for each in found):
            return [each.name for each in found]
    return []


def _parameters(module: nn.Module) -> list[str]:
    """Names of what `module` takes, in order; its class knows them where a wrapper of its forward does not."""
    return _names(module.forward, 0) or _names(type(module).forward, 1)


def _near(place: str, others: list[str]) -> bool:
    """Whether `place` is, is in, or holds one of `others`."""
    pairs = ((f"{place}.", f"{each}.") for each in others)
    return any(
        one == other or ("." not in (one, other) and (one.startswith(other) or other.startswith(one)))
        for one, other in pairs
    )


def _masked(module: nn.Module) -> bool:
    return any(name in _parameters(module) for name in _MASKS)


def _frame_hooks(seen: Capture, module: nn.Module) -> list[Any]:
    order = _parameters(module)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _again():
            return
        given = dict(zip(order, args, strict=False)) | kwargs
        frame = _Frame(module)
        for name, of in _MASKS.items():
            mask = given.get(name)
            if isinstance(mask, dict):  # a mask of each kind of attention
                mask = mask.get("full_attention", next(iter(mask.values()), None))
            tokens = next((given[each] for each in of if isinstance(given.get(each), Tensor)), None)
            if mask is None and tokens is not None:
                frame.without.add(tokens.shape[:2].numel())
            outermost = module is seen._model
            if isinstance(mask, Tensor) and mask.dim() == 3:
                mask = mask[:, None]
            if not isinstance(mask, Tensor) or mask.dim() not in ((2, 4) if outermost else (2,)):
                if outermost and mask is not None and seen._padding == "drop":
                    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                    raise InvalidInput(
                        f"{name}: expected [batch, length], or [batch, heads, length, length], to know padding by, got "
                        f"{got}; {_ADVICE}"
                    )
                continue
            batch, length = (mask.shape[0], mask.shape[-1 if mask.dim() == 2 else -2])
            if tokens is not None and tokens.dim() >= 2:
                batch, length = tokens.shape[:2]
            cache = next((each for each in given.values() if hasattr(each, "get_seq_length")), None)
            frame.masks.append(_Mask(mask, batch, length, None if cache is None else int(cache.get_seq_length())))
        seen._enter(frame)

    def whole(*_: Any) -> None:
        if not _again():
            seen._leave(module, True)

    def broken(*_: Any) -> None:
        if not _again():
            seen._leave(module, False)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        module.register_forward_hook(whole),
        module.register_forward_hook(broken, always_call=True),  # finds its frame only where the forward raised
    ]


def _whole(tensor: Tensor) -> Tensor:
    """A DTensor's whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _number_of_experts(module: nn.Module, choice: str) -> int | None:
    """How many experts the ids are of: all, or those of this rank, as Transformers' releases have it.

    From 5.19 on experts that are sharded get the ids of all experts, by a forward of their own that sends tokens to the
    ranks; before, ids are of this rank's when they come.
    """
    found = [value for name in _EXPERTS if type(value := getattr(module, name, None)) is int]
    if not found:
        return None
    sends = choice in _names(vars(module).get("forward"), 0)
    shards = [each.shape[0] for each in module.parameters(recurse=False) if hasattr(each, "full_tensor")]
    return max(found[0], *shards) if sends and shards else found[0]


def _experts_hook(seen: Capture, name: str, module: nn.Module) -> Any:
    order = _parameters(module)
    choice = next((each for each in _CHOICES if each in order), None)
    if choice is None or _number_of_experts(module, choice) is None:
        return None

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _again():
            return
        at = order.index(choice)
        chosen = kwargs.get(choice, args[at] if at < len(args) else None)
        experts = _number_of_experts(module, choice)
        assert experts is not None
        ids = _ids(name, chosen, experts, None, distinct=False)
        rows = kwargs.get("hidden_states", args[0] if args else None)
        tokens = rows.shape[:-1].numel() if isinstance(rows, Tensor) and rows.dim() > 1 else len(ids)
        if tokens != len(ids):
            raise InvalidInput(
                f"capture: expected {name} to get the choice of each of its {tokens} tokens, got {choice} of {len(ids)}"
            )
        seen._add(name, ids, experts)

    return hook


def _is_router(module: nn.Module) -> bool:
    """A router that says how many experts there are, and how many it chooses unless its output is a mask."""
    return "Router" in type(module).__name__ and type(getattr(module, "num_experts", None)) is int


def _router_hook(seen: Capture, name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _again():
            return
        tensors = [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, Tensor)]
        experts = int(module.num_experts)  # type: ignore[arg-type]
        top_k = getattr(module, "top_k", None)
        top_k = top_k if type(top_k) is int else None
        for each in tensors:
            if not each.is_floating_point() and each.dim() and each.shape[-1] in (top_k, experts):
                seen._add(name, _ids(name, each, experts, top_k), experts)
                return
        scores = [
            _whole(each).detach() for each in tensors if each.is_floating_point() and each.shape[-1:] == (experts,)
        ]
        if top_k is None or not scores:
            raise InvalidType(
                f"capture: expected {name} to return ids [tokens, k], or a mask or scores [tokens, {experts}], got "
                f"{[f'{each.dtype} {list(each.shape)}' for each in tensors]}"
            )
        for each in scores:  # zero, but where chosen
            if top_k < experts and bool(((each != 0).sum(-1) <= top_k).all()):
                values, ids = each.topk(top_k, dim=-1)
                seen._add(name, _ids(name, ids.masked_fill(values == 0, -1), experts, top_k), experts)
                return
        tuned = [key for key, value in _tensors(module) if value.shape == (experts,) and key != "bias"]
        best = [each.float().topk(top_k, dim=-1).indices.sort(-1).values for each in scores]
        if tuned or any(not torch.equal(each, best[0]) for each in best):
            raise InvalidType(
                f"capture: expected {name} to return its choice, or scores that it chooses by, got scores of all "
                f"experts {'and a choice that ' + tuned[0] + ' shifts' if tuned else 'that do not agree'}; "
                "capture a model whose experts take the ids"
            )
        seen._add(name, _ids(name, scores[-1].topk(top_k, dim=-1).indices, experts, top_k), experts)

    return hook


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


# ---- ids -------------------------------------------------------------------------------------------------------------


def _ids(layer: str, chosen: Any, experts: int, top_k: int | None, distinct: bool = True) -> Tensor:
    """int32 ``[tokens, k]`` on the CPU, -1 for none, from ids ``[..., k]`` or from a mask ``[..., experts]``.

    `distinct`: no token may choose an expert twice, or what looks like ids is something else.
    """
    if not isinstance(chosen, Tensor) or chosen.dtype.is_floating_point or chosen.dtype.is_complex:
        got = f"{chosen.dtype} {list(chosen.shape)}" if isinstance(chosen, Tensor) else type(chosen).__name__
        raise InvalidType(
            f"capture: expected the choice that {layer} gets to be integer ids [tokens, k] or a mask [tokens, "
            f"{experts}], got {got}; weights and probabilities say nothing certain about the choice"
        )
    if chosen.device.type == "meta" or type(chosen).__module__.startswith("torch._subclasses"):
        raise InvalidInput(f"capture: expected ids with values in {layer}, got a {type(chosen).__name__} without")
    if chosen.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInput(f"capture: expected {layer} to run outside the capture of a CUDA graph; capture without it")
    if chosen.dim() == 0:
        raise InvalidInput(f"capture: expected ids [tokens, k] in {layer}, got a single number")
    ids = _whole(chosen).detach().to("cpu")
    ids = ids.reshape(-1, ids.shape[-1]) if ids.numel() else ids.new_empty(0, ids.shape[-1])
    if ids.dtype is torch.bool or (ids.shape[1] == experts and bool(_bad(ids, experts, True).any())):
        if ids.shape[1] != experts or (ids.dtype is not torch.bool and bool(((ids != 0) & (ids != 1)).any())):
            raise InvalidInput(
                f"capture: expected a mask [tokens, {experts}] of zeros and ones in {layer}, got {ids.dtype} "
                f"{list(ids.shape)}"
            )
        return _from_mask(ids != 0, top_k)
    wrong = _bad(ids, experts, distinct)
    if bool(wrong.any()):
        raise InvalidInput(
            f"capture: expected {'different ' if distinct else ''}ids in [0, {experts}) for each token, -1 or "
            f"{experts} for none, in {layer}, got {ids[wrong][0].tolist()} for one"
        )
    return ids.to(torch.int64).masked_fill(ids == experts, -1).to(torch.int32)


def _bad(ids: Tensor, experts: int, distinct: bool) -> Tensor:
    """Which rows hold an id that is none, or one twice."""
    ids = ids.to(torch.int64)
    wrong = ((ids < -1) | (ids > experts)).any(1)
    if distinct:
        rows = ids.sort(1).values
        wrong |= ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0) & (rows[:, 1:] < experts)).any(1)
    return wrong


def _from_mask(mask: Tensor, top_k: int | None) -> Tensor:
    """``[tokens, k]`` from ``[tokens, experts]``, in ascending order, -1 behind."""
    most = int(mask.sum(1).max()) if len(mask) else 0
    width = max(most, top_k or 1)
    ids = torch.where(mask, torch.arange(mask.shape[1]), mask.shape[1]).sort(1).values[:, :width]
    return ids.masked_fill(ids == mask.shape[1], -1).to(torch.int32)


def _joined(parts: list[Tensor]) -> Tensor:
    """One behind the other, as wide as the widest."""
    width = max(each.shape[1] for each in parts)
    return torch.cat([nn.functional.pad(each, (0, width - each.shape[1]), value=-1) for each in parts])
