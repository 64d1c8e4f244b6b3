"""Record what a model's routers choose, as a routing trace."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import choices
from .errors import InvalidInput
from .trace import Trace

__all__ = ["Capture", "capture"]

_PADDING = ("drop", "keep")
_ADVICE = "capture(model, padding='keep') counts padding as the model does"


@dataclass
class _Frame:
    """A running call of a module, with the masks it was given."""

    module: nn.Module
    masks: list[choices.PaddingMask] = field(default_factory=list)
    unmasked: set[int] = field(default_factory=set)  #: numbers of tokens that came without a mask


@dataclass
class _ThreadState:
    """The running calls of one thread."""

    frames: list[_Frame] = field(default_factory=list)
    call: int = -1  #: number of the outermost call
    pending: list[tuple[str, Tensor, int]] = field(default_factory=list)  #: layer, ids, experts of this call so far


class Capture:
    """What :func:`capture` has recorded so far.  Only whole calls of the model count: one that raises adds nothing."""

    def __init__(self, model: nn.Module, padding: str, attention_mask: Tensor | None) -> None:
        self._model, self._padding = model, padding
        self._mask = attention_mask
        self._recorded: dict[str, list[tuple[int, Tensor]]] = {}  # number of the model's call, ids
        self._experts: dict[str, int] = {}
        self._facts: dict[str, dict[str, Any]] = {}  # sizes of an expert, and the device, of each layer
        self._calls = 0
        self._lock = threading.Lock()
        self._threads: dict[int, _ThreadState] = {}

    # ---- results

    @property
    def layers(self) -> list[str]:
        """Names of the recorded modules, in the order of their first call."""
        return list(self._recorded)

    @property
    def topk_ids(self) -> dict[str, Tensor]:
        """The ids of each layer, all calls concatenated: int32 ``[tokens, k]`` on the CPU.

        ``-1`` is a choice without an expert: an expert of another rank, or fewer than k.
        """
        return {name: choices.concatenate([ids for _, ids in self._in_order(name)]) for name in self._recorded}

    @property
    def num_experts(self) -> dict[str, int]:
        """The number of experts that the router of each layer chooses from."""
        return dict(self._experts)

    @property
    def calls(self) -> dict[str, tuple[int, ...]]:
        """The number of tokens in each call of each layer."""
        return {name: tuple(len(ids) for _, ids in self._in_order(name)) for name in self._recorded}

    def _describe(self, layer: str, facts: dict[str, Any]) -> None:
        self._facts.setdefault(layer, facts)

    def _shared_facts(self, layers: list[str]) -> dict[str, Any]:
        """What :meth:`_describe` said of all of `layers` alike."""
        first = self._facts.get(layers[0], {})
        same = [self._facts.get(layer, {}) for layer in layers]
        return {name: value for name, value in first.items() if all(each.get(name) == value for each in same)}

    def trace(self, *, model: str | None = None, source: str = "", revision: str = "") -> Trace:
        """All calls so far as one trace: ``topk_ids`` ``[layers, tokens, k]``, and in ``calls`` the tokens per call.

        The details also have ``hidden`` and ``intermediate``, the sizes of an expert, and ``device``, where all layers
        agree in them.

        Args:
            model: what routed; by default the model's class and, if it has one, its name or path.
            source: what it read.
            revision: the version of both.

        Raises:
            InvalidInput: no layer was called, or layers are of several kinds (see :meth:`traces`).
        """
        traces = self.traces(model=model, source=source, revision=revision)
        if len(traces) > 1:
            kinds = "; ".join(
                f"{each.details['layers'][0]} and {each.layers - 1} more: {each.tokens} tokens to {each.top_k} of "
                f"{each.num_experts} experts in {len(each.calls)} calls"
                for each in traces
            )
            raise InvalidInput(
                f"capture: expected every layer to route the same tokens to as many experts, got {kinds}; "
                "traces() gives a trace of each kind, topk_ids the ids of each layer"
            )
        return traces[0]

    def traces(self, *, model: str | None = None, source: str = "", revision: str = "") -> list[Trace]:
        """One trace for each kind of layer, in the order of first calls; arguments as of :meth:`trace`.

        Layers are of one kind if they choose equally many of equally many experts and were called with the same tokens:
        in the same calls of the model, equally often.

        Raises:
            InvalidInput: no layer was called.
        """
        kinds: dict[Any, list[str]] = {}
        ids = self.topk_ids
        for name in self._recorded:
            calls = tuple((call, len(each)) for call, each in self._in_order(name))
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
                {"layers": names, "calls": [count for _, count in calls], **self._shared_facts(names)},
            )
            for (_, experts, calls), names in kinds.items()
        ]

    def _in_order(self, name: str) -> list[tuple[int, Tensor]]:
        """In the order of the model's calls, which several threads may make at once."""
        return sorted(self._recorded[name], key=lambda each: each[0])

    # ---- called by the hooks

    def _state(self) -> _ThreadState:
        return self._threads.setdefault(threading.get_ident(), _ThreadState())

    def _begin_call(self, state: _ThreadState) -> None:
        with self._lock:
            state.call, self._calls = self._calls, self._calls + 1

    def _enter(self, frame: _Frame) -> None:
        state = self._state()
        if any(each.module is frame.module for each in state.frames):  # the call before this one was interrupted
            state.frames.clear()
        if not state.frames:
            state.pending.clear()
            self._begin_call(state)
        state.frames.append(frame)

    def _leave(self, module: nn.Module, *, raised: bool) -> None:
        state = self._state()
        if not state.frames or state.frames[-1].module is not module:
            return
        state.frames.pop()
        if not state.frames:
            if raised:
                state.pending.clear()
            else:
                self._commit(state)

    def _add(self, layer: str, ids: Tensor, experts: int) -> None:
        state = self._state()
        real = self._real_tokens(layer, len(ids), state)
        if real is not None:
            ids = ids[real]
        if len(ids) == 0:
            return
        state.pending.append((layer, ids, experts))
        if not state.frames:  # a part of the model was called on its own
            self._begin_call(state)
            self._commit(state)

    def _commit(self, state: _ThreadState) -> None:
        with self._lock:
            for layer, ids, experts in state.pending:
                self._recorded.setdefault(layer, []).append((state.call, ids))
                self._experts[layer] = max(self._experts.get(layer, 0), experts)
            state.pending.clear()

    def _real_tokens(self, layer: str, tokens: int, state: _ThreadState) -> Tensor | None:
        """bool ``[tokens]``, False for padding; None if all are to be recorded."""
        if self._padding == "keep":
            return None
        masks = [mask for frame in reversed(state.frames) for mask in frame.masks]
        if self._mask is not None:
            masks.append(choices.PaddingMask(self._mask, *self._mask.shape))
        padded = False
        for mask in masks:
            real = mask.real_tokens()
            if real is not None and real.numel() == tokens:
                return real.reshape(-1)
            padded |= real is None or not bool(real.all())
        if padded and not any(tokens in frame.unmasked for frame in state.frames):
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

    Works on every Transformers model that passes the router's choice to an experts module (its ``forward`` has an
    argument ``top_k_index`` or the like), and on those whose router returns a mask or scores over all experts (Llama
    4), with any experts implementation.  The results of the model do not change.  A module under two names is recorded
    under the first; a module that is called twice is recorded twice.

    A layer that gradient checkpointing recomputes in the backward pass is recorded once.  Compiled models run eagerly
    inside the block (``torch.compiler.set_stance``), so that calls of existing graphs are recorded too; replays of a
    CUDA graph run no module and are not recorded.  Every call copies the ids to the CPU, which waits for the device.

    Args:
        padding: "drop" omits the positions that the attention mask marks as padding, since a server does not route
            them; "keep" records everything that is routed.
        attention_mask: ``[batch, length]``, 0 or False for padding, for models that take none.  By default the model's
            own argument ``attention_mask`` (of its innermost module that has one of the tokens' shape), ``[batch,
            length]`` or ``[batch, heads, length, length]``, where a token that may not attend to itself is padding.

    Raises:
        InvalidInput: no module of `model` routes; in a call: invalid ids, or a mask that does not fit the tokens.
        InvalidType: in a call: a choice that is neither ids nor a mask of experts.
    """
    if padding not in _PADDING:
        raise InvalidInput(f"padding: expected one of {', '.join(_PADDING)}, got {padding!r}")
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise InvalidInput(f"attention_mask: expected a tensor [batch, length], got {got}")
    model = getattr(model, "_orig_mod", model)
    recorded = Capture(model, padding, attention_mask)
    handles: list[Any] = []
    try:
        parents = []
        for name, module in model.named_modules():
            hook = _experts_hook(recorded, name, module)
            if hook is not None:
                parents.append(_parent(name))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for name, module in model.named_modules():
            if choices.is_router(module) and not any(_related(_parent(name), each) for each in parents):
                handles.append(module.register_forward_hook(_router_hook(recorded, name)))
        if not handles:
            raise InvalidInput(
                f"model: expected a Mixture-of-Experts model, got {type(model).__name__}, in which no module takes "
                f"an argument {', '.join(choices.CHOICE_NAMES)} and none is a router with top_k and num_experts"
            )
        for module in model.modules():
            if module is model or any(name in choices.parameter_names(module) for name in choices.MASK_NAMES):
                handles += _frame_hooks(recorded, module)
        with _eagerly():
            yield recorded
    finally:
        for handle in handles:
            handle.remove()


# ---- compiled models -------------------------------------------------------------------------------------------------

_stance_lock = threading.Lock()
_eager_blocks = 0
_stance: Any = None


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Run compiled functions eagerly until the last of the blocks ends, in whatever order they end."""
    global _eager_blocks, _stance
    with _stance_lock:
        if _eager_blocks == 0:
            try:
                _stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise InvalidInput(
                    f"capture: expected to begin outside a compiled function, got one that runs ({error}); put the "
                    "with statement around its call"
                ) from None
            _stance.__enter__()
        _eager_blocks += 1
    try:
        yield
    finally:
        with _stance_lock:
            _eager_blocks -= 1
            if _eager_blocks == 0:
                _stance.__exit__(None, None, None)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def _is_replay() -> bool:
    """Whether this is not the model's own run: a recomputation in a backward pass, a compiler or an exporter."""
    return torch._C._current_graph_task_id() != -1 or torch.compiler.is_compiling()


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _related(one: str, other: str) -> bool:
    """Whether two modules are the same, or one contains the other; the model itself contains none for this purpose."""
    one, other = f"{one}.", f"{other}."
    return one == other or ("." not in (one, other) and (one.startswith(other) or other.startswith(one)))


def _frame_hooks(recorded: Capture, module: nn.Module) -> list[Any]:
    names = choices.parameter_names(module)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_replay():
            return
        arguments = dict(zip(names, args, strict=False)) | kwargs
        frame = _Frame(module)
        for name, token_names in choices.MASK_NAMES.items():
            mask = arguments.get(name)
            if isinstance(mask, dict):  # one mask for each kind of attention
                mask = mask.get("full_attention", next(iter(mask.values()), None))
            tokens = next((arguments[each] for each in token_names if isinstance(arguments.get(each), Tensor)), None)
            if mask is None and tokens is not None:
                frame.unmasked.add(tokens.shape[:2].numel())
            outermost = module is recorded._model
            if isinstance(mask, Tensor) and mask.dim() == 3:
                mask = mask[:, None]
            if not isinstance(mask, Tensor) or mask.dim() not in ((2, 4) if outermost else (2,)):
                if outermost and mask is not None and recorded._padding == "drop":
                    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                    raise InvalidInput(
                        f"{name}: expected [batch, length], or [batch, heads, length, length], to know padding by, got "
                        f"{got}; {_ADVICE}"
                    )
                continue
            batch, length = (mask.shape[0], mask.shape[-1 if mask.dim() == 2 else -2])
            if tokens is not None and tokens.dim() >= 2:
                batch, length = tokens.shape[:2]
            cache = next((each for each in arguments.values() if hasattr(each, "get_seq_length")), None)
            past = None if cache is None else int(cache.get_seq_length())
            frame.masks.append(choices.PaddingMask(mask, batch, length, past))
        recorded._enter(frame)

    def leave(*_: Any) -> None:
        if not _is_replay():
            recorded._leave(module, raised=False)

    def leave_raised(*_: Any) -> None:  # runs after every call, but `leave` has removed the frame unless it raised
        if not _is_replay():
            recorded._leave(module, raised=True)

    return [
        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        module.register_forward_hook(leave),
        module.register_forward_hook(leave_raised, always_call=True),
    ]


def _experts_hook(recorded: Capture, name: str, module: nn.Module) -> Any:
    names = choices.parameter_names(module)
    choice = next((each for each in choices.CHOICE_NAMES if each in names), None)
    if choice is None or choices.number_of_experts(module, choice) is None:
        return None

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_replay():
            return
        i = names.index(choice)
        experts = choices.number_of_experts(module, choice)
        assert experts is not None
        ids = choices.ids_from_choice(
            name, kwargs.get(choice, args[i] if i < len(args) else None), experts, distinct=False
        )
        rows = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(rows, Tensor):
            recorded._describe(name, {**choices.expert_sizes(module, rows), "device": choices.device_name(rows.device)})
        tokens = rows.shape[:-1].numel() if isinstance(rows, Tensor) and rows.dim() > 1 else len(ids)
        if tokens != len(ids):
            raise InvalidInput(
                f"capture: expected {name} to get the choice of each of its {tokens} tokens, got {choice} of {len(ids)}"
            )
        recorded._add(name, ids, experts)

    return hook


def _router_hook(recorded: Capture, name: str) -> Any:
    def hook(router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not _is_replay():
            recorded._add(name, choices.ids_from_router(name, router, output), int(router.num_experts))  # type: ignore[arg-type]

    return hook
