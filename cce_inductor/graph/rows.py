"""Rules for operations on the rows of the logits: replayed on the hidden states, whose rows are the same."""

import operator
from typing import Any

import torch
from torch.fx import Node

from ..compat import constant_size
from .effects import never_written_after
from .logits import DeferredLogits, Refused, Shaped
from .reductions import pick
from .registry import Call, operation, rule, tensor_of

FULL = slice(None, None, None)


@rule("contiguous", "clone", "alias", "cuda", "cpu", "float", "half", "bfloat16", "double", "to", "type", "type_as")
def convert(call: Call, x: Any, *_: Any, **__: Any) -> DeferredLogits | Shaped:
    """Copies and casts: only the dtype that comes out matters."""
    if not isinstance(x, DeferredLogits):  # another tensor takes the dtype of the logits
        return Shaped()
    source = x.matmul.meta["example_value"]
    if not isinstance(call.output, torch.Tensor) or call.output.device != source.device:
        raise Refused("the logits move to another device")
    return x.to(call.output.dtype)


@rule("detach")
def detach(call: Call, x: DeferredLogits) -> DeferredLogits:
    return x.detach()


@rule("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")
def reshape(call: Call, x: DeferredLogits, *args: Any, **named: Any) -> DeferredLogits:
    """Operations that keep all elements in order: described by the shape that comes out."""
    if call.output.dtype != x.dtype:
        raise Refused("the bits of the logits are viewed as another dtype")
    shape, name = tuple(map(constant_size, call.output.shape)), operation(call.node)
    if name in ("view", "reshape"):
        return x.reshape(shape, _row_sizes(shape[:-1], args))
    # hidden states have the same row dimensions, so the same call does the same to them
    relative = (getattr(torch, name), args) if args and not named else None
    return x.reshape(shape, _row_sizes(shape[:-1], ()), relative)


def _row_sizes(shape: tuple, arguments: tuple) -> tuple | None:
    """Row sizes as arguments for torch.reshape: numbers, one -1, and the program's own nodes for dynamic ones."""
    if sum(not isinstance(size, int) for size in shape) <= 1:
        return tuple(size if isinstance(size, int) else -1 for size in shape)
    if len(arguments) == 1 and isinstance(arguments[0], tuple | list):
        arguments = tuple(arguments[0])
    if len(arguments) != len(shape) + 1:
        return None
    return arguments[:-1]


@rule("transpose", "permute", "movedim", "t", "T", "mT", "swapaxes")
def permute(call: Call, x: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits:
    order = _order(call, x.ndim, args, kwargs)
    rows = [x.row_dim(dim) for dim in order if dim != x.vocab_dim]
    vocab_dim = order.index(x.vocab_dim)
    if rows == sorted(rows):
        return x.moved(call.output.shape, vocab_dim)
    return x.replay(torch.permute, (*rows, len(rows)), shape=call.output.shape, vocab_dim=vocab_dim)


def _order(call: Call, ndim: int, args: tuple, kwargs: dict) -> list[int]:
    """The permutation of a call, read off the shape that it gives to a tensor whose sizes tell its dimensions."""
    probe = torch.empty(tuple(range(2, 2 + ndim)), device="meta")
    target: Any = call.node.target
    if target is getattr:
        moved = getattr(probe, operation(call.node))
    elif call.node.op == "call_method":
        moved = getattr(probe, target)(*args, **kwargs)
    else:
        moved = target(probe, *args, **kwargs)
    return [size - 2 for size in moved.shape]


@rule("getitem")
def getitem(call: Call, x: Any, index: Any) -> Any:
    if isinstance(x, tuple):  # what chunk, split or unbind gave
        return x[index]
    if _picks_one_class(x, index):
        return pick(call, x, index[1], from_end=True)
    entries = _full_index(x, index if isinstance(index, tuple) else (index,))
    before, vocab_entry, after = _split_at_vocab(x, entries)
    if not isinstance(vocab_entry, slice):
        raise Refused("single classes are picked by indexing; use gather(-1, index) or cross_entropy")
    x = _vocab_slice(x, vocab_entry)
    vocab_dim = sum(_output_dims(entry) for entry in before)
    rows = (*before, *after)
    if all(entry == FULL for entry in rows if not isinstance(entry, Node)) and not any(map(_is_node, rows)):
        return x.moved(call.output.shape, vocab_dim)
    return x.replay(operator.getitem, rows, shape=call.output.shape, vocab_dim=vocab_dim)


def _picks_one_class(x: DeferredLogits, index: Any) -> bool:
    """Whether an index (arange(N), classes [N]) picks a class for each row of logits [N, V]."""
    if not (isinstance(index, tuple) and len(index) == 2 and (x.ndim, x.vocab_dim) == (2, 1)):
        return False
    if not isinstance(x.vocab_size, int):  # negative classes count from its end
        return False
    rows, classes = index
    tensor = tensor_of(classes)
    if tensor is None or tensor.dtype != torch.int64 or not x.has_rows(tensor.shape):
        return False
    if isinstance(rows, list | tuple | range):
        return list(rows) == list(range(len(rows))) and x.has_rows((len(rows),))
    counts = operation(rows) == "arange" and rows.args[:-1] in ((), (0,)) and not {"end", "step"} & set(rows.kwargs)
    return counts and x.has_rows(tensor_of(rows).shape) and never_written_after(rows, rows)


def _is_node(entry: Any) -> bool:
    return isinstance(entry, Node)


def _full_index(x: DeferredLogits, index: tuple) -> list[Any]:
    """The index with one entry for each dimension that it consumes: no Ellipsis, none left out."""
    tensors = [entry for entry in index if tensor_of(entry) is not None]
    known = all(entry is None or entry is Ellipsis or isinstance(entry, int | slice | Node) for entry in index)
    ints = any(isinstance(entry, int) or (_is_node(entry) and tensor_of(entry) is None) for entry in index)
    if not known or any(isinstance(entry, bool) for entry in index) or len(tensors) > 1 or (tensors and ints):
        raise Refused("the logits are indexed by several tensors or lists; use one index tensor, or gather")
    if any(tensor.dtype in (torch.bool, torch.uint8) for tensor in map(tensor_of, tensors)):
        raise Refused("rows are picked by a mask; keep all rows and set the labels of the others to ignore_index")
    missing = x.ndim - sum(map(_consumed_dims, index))
    at = index.index(Ellipsis) if Ellipsis in index else len(index)
    return [*index[:at], *[FULL] * missing, *index[at + 1 :]]


def _consumed_dims(entry: Any) -> int:
    return int(entry is not None and entry is not Ellipsis)


def _output_dims(entry: Any) -> int:
    tensor = tensor_of(entry)
    if tensor is not None:
        return tensor.ndim
    return int(entry is None or isinstance(entry, slice))


def _split_at_vocab(x: DeferredLogits, entries: list) -> tuple[list, Any, list]:
    consuming = [position for position, entry in enumerate(entries) if _consumed_dims(entry)]
    position = consuming[x.vocab_dim]
    return entries[:position], entries[position], entries[position + 1 :]


def _vocab_slice(x: DeferredLogits, entry: slice) -> DeferredLogits:
    """A slice of the vocabulary is a slice of the weight's rows and of the bias."""
    if entry == FULL:
        return x
    numbers = (entry.start, entry.stop, entry.step)
    if not (isinstance(x.vocab_size, int) and all(number is None or isinstance(number, int) for number in numbers)):
        raise Refused("the vocabulary is sliced by a dynamic size; slice it by a constant")
    start, stop, step = entry.indices(x.vocab_size)
    if step != 1 or x.normalized:
        raise Refused("log-probabilities are sliced, or the vocabulary with a step; slice the logits, step by one")
    return x.slice_vocab(start, max(stop, start))


@rule("narrow")
def narrow(call: Call, x: DeferredLogits, dim: int, start: Any, length: Any) -> DeferredLogits:
    if x.dim(dim) == x.vocab_dim:
        if not (isinstance(start, int) and isinstance(length, int)):
            raise Refused("the vocabulary is narrowed by a dynamic size; narrow it by a constant")
        return _vocab_slice(x, slice(start, start + length))
    return x.replay(torch.narrow, x.row_dim(dim), start, length, shape=call.output.shape)


@rule("select")
def select(call: Call, x: DeferredLogits, dim: int, index: Any) -> DeferredLogits:
    row_dim = x.row_dim(dim)
    vocab_dim = x.vocab_dim - (x.dim(dim) < x.vocab_dim)
    return x.replay(torch.select, row_dim, index, shape=call.output.shape, vocab_dim=vocab_dim)


@rule("index_select")
def index_select(call: Call, x: DeferredLogits, dim: int, index: Node) -> DeferredLogits:
    return x.replay(torch.index_select, x.row_dim(dim), index, shape=call.output.shape)


@rule("chunk", "split", "tensor_split")
def split(call: Call, x: DeferredLogits, sizes: Any = None, dim: int = 0, **named: Any) -> tuple:
    """Pieces along the rows: each replays the split and takes its part. The piece sizes may be named."""
    [sizes] = [sizes] if sizes is not None else named.values()
    pieces = x.hidden.then(getattr(torch, operation(call.node)), sizes, x.row_dim(dim))
    return tuple(x.piece(pieces, i, part.shape, x.vocab_dim) for i, part in enumerate(call.output))


@rule("unbind")
def unbind(call: Call, x: DeferredLogits, dim: int = 0) -> tuple:
    pieces = x.hidden.then(torch.unbind, x.row_dim(dim))
    vocab_dim = x.vocab_dim - (x.dim(dim) < x.vocab_dim)
    return tuple(x.piece(pieces, i, part.shape, vocab_dim) for i, part in enumerate(call.output))
