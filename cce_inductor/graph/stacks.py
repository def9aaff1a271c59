"""Rules for stacked logits: several heads whose results are stacked, then selected again (MusicGen's codebooks)."""

from dataclasses import replace
from typing import Any

from torch.fx import Node

from .logits import DeferredLogits, Refused, Stacked
from .registry import Call, rule, tensor_of
from .rows import FULL, getitem


@rule("stack")
def stack(call: Call, tensors: Any, dim: int = 0) -> Stacked:
    parts = tuple(call.values.get(tensor) for tensor in tensors)
    ndims = tensor_of(call.node).dim()
    return Stacked(tuple(part if isinstance(part, DeferredLogits) else None for part in parts), dim % ndims)


@rule("stacked.getitem")
def getitem_of_stack(call: Call, x: Stacked, index: Any) -> DeferredLogits | Stacked | None:
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(isinstance(entry, int | slice | Node) or entry is Ellipsis for entry in entries):
        raise Refused("stacked logits are indexed by tensors or None; select one of them first")
    ndim = next(part.ndim for part in x.parts if part is not None) + 1
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        entries[at : at + 1] = [FULL] * (ndim - len(entries) + 1)
    entries += [FULL] * (ndim - len(entries))
    at = entries.pop(x.dim)
    if isinstance(at, int):
        return _part(call, x.parts[at], tuple(entries))
    if at != FULL or any(not isinstance(entry, slice) for entry in entries):
        raise Refused("stacked logits are sliced along the stack; select one of them first")
    each = replace(call, output=call.output.select(x.dim, 0))
    return replace(x, parts=tuple(_part(each, part, tuple(entries)) for part in x.parts))


def _part(call: Call, part: DeferredLogits | None, index: tuple) -> DeferredLogits | None:
    return None if part is None else getitem(call, part, index)


@rule("stacked.select")
def select_of_stack(call: Call, x: Stacked, dim: int, index: Any) -> DeferredLogits | Stacked | None:
    ndim = next(part.ndim for part in x.parts if part is not None) + 1
    return getitem_of_stack(call, x, (*[FULL] * (dim % ndim), index))


@rule("stacked.unbind")
def unbind_stack(call: Call, x: Stacked, dim: int = 0) -> tuple:
    ndim = next(part.ndim for part in x.parts if part is not None) + 1
    if dim % ndim != x.dim:
        raise Refused("stacked logits are cut along another dimension than the stack; select one of them first")
    return x.parts


@rule("stacked.reshape", "stacked.view", "stacked.flatten", "stacked.permute", "stacked.transpose")
def rearranged(call: Call, x: Stacked, *args: Any, **named: Any) -> None:
    raise Refused("the stacked logits of several heads are reshaped; return or select them one by one")
