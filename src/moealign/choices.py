"""Read from a model's modules which experts were chosen, how many there are, and which tokens are padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidInput, InvalidType

__all__ = [
    "CHOICE_NAMES",
    "MASK_NAMES",
    "PaddingMask",
    "concatenate",
    "device_name",
    "expert_sizes",
    "ids_from_choice",
    "ids_from_router",
    "is_router",
    "number_of_experts",
    "parameter_names",
]

#: Names under which experts modules take the router's choice.
CHOICE_NAMES = ("top_k_index", "router_indices", "selected_experts", "topk_indices", "expert_indices", "router_mask")
#: Attributes that hold the number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
#: Padding masks that models take, each with the arguments whose tokens it masks.
MASK_NAMES = {
    "attention_mask": ("input_ids", "inputs_embeds", "hidden_states"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}


# ---- modules ---------------------------------------------------------------------------------------------------------


def _positional_names(forward: Any, first: int) -> list[str]:
    """Names of the parameters of `forward` from `first` on; [] if it does not tell."""
    with contextlib.suppress(TypeError, ValueError):
        parameters = list(inspect.signature(forward).parameters.values())[first:]
        if any(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters):
            return [each.name for each in parameters]
    return []


def parameter_names(module: nn.Module) -> list[str]:
    """Names of the arguments of `module`, in order; from its class if its own forward is a wrapper that hides them."""
    return _positional_names(module.forward, 0) or _positional_names(type(module).forward, 1)


def is_router(module: nn.Module) -> bool:
    """Whether `module` is a router by its class name and says how many experts there are."""
    return "Router" in type(module).__name__ and type(getattr(module, "num_experts", None)) is int


def number_of_experts(module: nn.Module, choice: str) -> int | None:
    """How many experts the ids that `module` takes as `choice` refer to; None if it does not say.

    From Transformers 5.19 on, sharded experts take the ids of all experts, in a wrapped forward that sends tokens to
    the ranks; earlier releases pass ids of this rank's experts.
    """
    numbers = [value for name in _EXPERTS if type(value := getattr(module, name, None)) is int]
    if not numbers:
        return None
    sends = choice in _positional_names(vars(module).get("forward"), 0)
    shards = [each.shape[0] for each in module.parameters(recurse=False) if hasattr(each, "full_tensor")]
    return max(numbers[0], *shards) if sends and shards else numbers[0]


def expert_sizes(module: nn.Module, rows: Any) -> dict[str, int]:
    """``hidden`` and ``intermediate``, the sizes of an expert of `module` that gets `rows` ``[..., hidden]``.

    The second is the other size of ``down_proj``, a parameter ``[experts, ...]`` or a linear layer of each expert; {}
    if there is none that fits.
    """
    if not isinstance(rows, Tensor) or rows.dim() < 2:
        return {}
    hidden = int(rows.shape[-1])
    for name, weights in module.named_parameters():
        if "down_proj" in name.split(".") and weights.dim() >= 2 and hidden in weights.shape[-2:]:
            first, second = (int(size) for size in weights.shape[-2:])
            return {"hidden": hidden, "intermediate": first if second == hidden else second}
    return {}


def device_name(device: torch.device) -> str:
    """What a trace calls `device`: the name of a GPU, otherwise the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- padding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddingMask:
    """A padding mask of a call and the tokens it is for: the last `length` ones, or those after `past`."""

    mask: Tensor  #: [batch, length] or [batch, heads, length, keys]
    batch: int
    length: int
    past: int | None = None  #: tokens in the cache, if there is one

    def real_tokens(self) -> Tensor | None:
        """bool ``[batch, length]``, False for padding; None if the mask has another shape."""
        mask, length = _full_tensor(self.mask).detach().to("cpu"), self.length
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


# ---- ids -------------------------------------------------------------------------------------------------------------


def ids_from_choice(layer: str, choice: Any, experts: int, top_k: int | None = None, *, distinct: bool) -> Tensor:
    """Ids as int32 ``[tokens, k]`` on the CPU, -1 for none, from ids ``[..., k]`` or from a mask ``[..., experts]``.

    Args:
        layer: name of the module, for messages.
        choice: ids or mask, of an integer dtype or bool.
        experts: number of experts.
        top_k: minimal ``k`` of the result for a mask.
        distinct: refuse a token that chooses an expert twice: `choice` is then something other than ids.

    Raises:
        InvalidInput: values that are neither ids nor a mask, or that cannot be read.
        InvalidType: no integer or bool tensor.
    """
    if not isinstance(choice, Tensor) or choice.dtype.is_floating_point or choice.dtype.is_complex:
        got = f"{choice.dtype} {list(choice.shape)}" if isinstance(choice, Tensor) else type(choice).__name__
        raise InvalidType(
            f"capture: expected the choice that {layer} gets to be integer ids [tokens, k] or a mask [tokens, "
            f"{experts}], got {got}; weights and probabilities say nothing certain about the choice"
        )
    if choice.device.type == "meta" or type(choice).__module__.startswith("torch._subclasses"):
        raise InvalidInput(f"capture: expected ids with values in {layer}, got a {type(choice).__name__} without")
    if choice.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InvalidInput(f"capture: expected {layer} to run outside the capture of a CUDA graph; capture without it")
    if choice.dim() == 0:
        raise InvalidInput(f"capture: expected ids [tokens, k] in {layer}, got a single number")
    ids = _full_tensor(choice).detach().to("cpu")
    ids = ids.reshape(-1, ids.shape[-1]) if ids.numel() else ids.new_empty(0, ids.shape[-1])
    if ids.dtype is torch.bool or (ids.shape[1] == experts and bool(_invalid_rows(ids, experts, True).any())):
        if ids.shape[1] != experts or (ids.dtype is not torch.bool and bool(((ids != 0) & (ids != 1)).any())):
            raise InvalidInput(
                f"capture: expected a mask [tokens, {experts}] of zeros and ones in {layer}, got {ids.dtype} "
                f"{list(ids.shape)}"
            )
        return _ids_from_mask(ids != 0, top_k)
    invalid = _invalid_rows(ids, experts, distinct)
    if bool(invalid.any()):
        raise InvalidInput(
            f"capture: expected {'different ' if distinct else ''}ids in [0, {experts}) for each token, -1 or "
            f"{experts} for none, in {layer}, got {ids[invalid][0].tolist()} for one"
        )
    return ids.to(torch.int64).masked_fill(ids == experts, -1).to(torch.int32)


def ids_from_router(layer: str, router: nn.Module, output: Any) -> Tensor:
    """Ids as :func:`ids_from_choice` from what `router` returns: ids, a mask, or scores that it chooses by.

    Raises:
        InvalidInput: as :func:`ids_from_choice`.
        InvalidType: no output from which the choice follows.
    """
    tensors = [each for each in (output if isinstance(output, tuple) else (output,)) if isinstance(each, Tensor)]
    experts = int(router.num_experts)  # type: ignore[arg-type]
    top_k = getattr(router, "top_k", None)
    top_k = top_k if type(top_k) is int else None
    for each in tensors:
        if not each.is_floating_point() and each.dim() and each.shape[-1] in (top_k, experts):
            return ids_from_choice(layer, each, experts, top_k, distinct=True)
    scores = [
        _full_tensor(each).detach() for each in tensors if each.is_floating_point() and each.shape[-1:] == (experts,)
    ]
    if top_k is None or not scores:
        raise InvalidType(
            f"capture: expected {layer} to return ids [tokens, k], or a mask or scores [tokens, {experts}], got "
            f"{[f'{each.dtype} {list(each.shape)}' for each in tensors]}"
        )
    for each in scores:  # nonzero only for chosen experts
        if top_k < experts and bool(((each != 0).sum(-1) <= top_k).all()):
            values, ids = each.topk(top_k, dim=-1)
            return ids_from_choice(layer, ids.masked_fill(values == 0, -1), experts, top_k, distinct=True)
    corrections = [key for key, value in _tensors(router) if value.shape == (experts,) and key != "bias"]
    best = [each.float().topk(top_k, dim=-1).indices.sort(-1).values for each in scores]
    if corrections or any(not torch.equal(each, best[0]) for each in best):
        raise InvalidType(
            f"capture: expected {layer} to return its choice, or scores that it chooses by, got scores of all "
            f"experts {'and a choice that ' + corrections[0] + ' shifts' if corrections else 'that do not agree'}; "
            "capture a model whose experts take the ids"
        )
    return ids_from_choice(layer, scores[-1].topk(top_k, dim=-1).indices, experts, top_k, distinct=True)


def concatenate(parts: list[Tensor]) -> Tensor:
    """`parts` ``[tokens, k]`` in one tensor, as wide as the widest; the others are padded with -1."""
    width = max(each.shape[1] for each in parts)
    return torch.cat([nn.functional.pad(each, (0, width - each.shape[1]), value=-1) for each in parts])


def _invalid_rows(ids: Tensor, experts: int, distinct: bool) -> Tensor:
    """bool ``[tokens]``: rows with a value that is no id or, if `distinct`, with an id twice."""
    ids = ids.to(torch.int64)
    invalid = ((ids < -1) | (ids > experts)).any(1)
    if distinct:
        rows = ids.sort(1).values
        invalid |= ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0) & (rows[:, 1:] < experts)).any(1)
    return invalid


def _ids_from_mask(mask: Tensor, top_k: int | None) -> Tensor:
    """``[tokens, k]`` from ``[tokens, experts]``, in ascending order, then -1."""
    width = max(int(mask.sum(1).max()) if len(mask) else 0, top_k or 1)
    ids = torch.where(mask, torch.arange(mask.shape[1]), mask.shape[1]).sort(1).values[:, :width]
    return ids.masked_fill(ids == mask.shape[1], -1).to(torch.int32)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _full_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
