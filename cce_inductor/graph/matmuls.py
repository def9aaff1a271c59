"""Where deferred logits begin: every spelling of hidden @ weight.T (+ bias)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..compat import FakeTensor, constant_size, statically_equal
from ..logit_map import LogitMap
from .effects import never_written_after
from .logits import DeferredLogits, Replay
from .registry import operation, tensor_of

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Operands = tuple[Replay, Replay, tuple[Replay, ...]] | None  # hidden [rows..., D], weight [V, D], biases [V]


def start(node: Node, grad_modes: dict[Node, bool]) -> DeferredLogits | None:
    """The logits that a node begins, None where it is no matrix product of that form.

    grad_modes: whether gradients are recorded, for every node.
    """
    form = FORMS.get(operation(node))
    if form is None:
        return None
    output = tensor_of(node)
    if type(output) is not FakeTensor or output.dtype not in COMPUTE_DTYPES or output.dim() == 0:
        return None
    try:
        operands = form(*node.args, **node.kwargs)
    except TypeError:
        return None
    if operands is None or not all(type(tensor_of(r.source)) is FakeTensor for r in _flat(operands)):
        return None
    hidden, weight, biases = operands
    shape, vocab_dim = tuple(map(constant_size, output.shape)), output.dim() - 1
    width = constant_size(tensor_of(hidden.source).shape[-1])
    if operation(node) == "einsum":
        args: Any = node.args
        letters = _einsum_letters(*args)
        assert letters is not None, "_einsum() has read the equation"
        vocab_dim = letters.output.index(letters.vocab)
        width = constant_size(tensor_of(hidden.source).shape[letters.hidden.index(letters.width)])
    return DeferredLogits(
        node,
        hidden,
        _uncast(weight, node, grad_modes),
        biases,
        LogitMap(),
        output.dtype,
        shape,
        output.dtype,
        vocab_dim,
        width,
    )


def _flat(operands: tuple) -> list[Replay]:
    hidden, weight, biases = operands
    return [hidden, weight, *biases]


def _shape(arg: Any) -> Any:
    tensor = tensor_of(arg)
    return None if tensor is None else tuple(tensor.shape)


def _linear(input: Node, weight: Node, bias: Node | None = None) -> Operands:
    shape = _shape(weight)
    if shape is None or len(shape) != 2:
        return None
    return Replay(input), Replay(weight), () if bias is None else (Replay(bias),)


def _matmul(input: Node, other: Node) -> Operands:
    shape = _shape(other)
    if shape is None or len(shape) != 2 or not _shape(input):
        return None
    return Replay(input), Replay(other).then(torch.t), ()


def _mm(input: Node, mat2: Node) -> Operands:
    return _matmul(input, mat2)


def _addmm(input: Node, mat1: Node, mat2: Node, *, beta: float = 1, alpha: float = 1) -> Operands:
    matmul, bias = _matmul(mat1, mat2), _shape(input)
    if matmul is None or bias is None or not is_vocab_vector(bias, _shape(mat2)[1]):
        return None
    return _weighed(matmul, vocab_vector(input), beta, alpha)


def _weighed(matmul: Any, bias: Replay, beta: Any, alpha: Any) -> Operands:
    """beta * bias + alpha * hidden @ weight.T."""
    hidden, weight, _ = matmul
    hidden = hidden if alpha == 1 else hidden.then(torch.mul, alpha)
    return hidden, weight, (bias if beta == 1 else bias.then(torch.mul, beta),)


def _bmm(input: Node, mat2: Node) -> Operands:
    shape = _shape(mat2)
    if shape is None or shape[0] != 1:
        return None
    return Replay(input), Replay(mat2).then(torch.squeeze, 0).then(torch.t), ()


def _baddbmm(input: Node, batch1: Node, batch2: Node, *, beta: float = 1, alpha: float = 1) -> Operands:
    bmm, bias = _bmm(batch1, batch2), _shape(input)
    if bmm is None or bias is None or not is_vocab_vector(bias, _shape(batch2)[2]):
        return None
    return _weighed(bmm, vocab_vector(input), beta, alpha)


@dataclass(frozen=True)
class _Letters:
    """An einsum "rows width, vocab width -> rows vocab", the letters of each operand in any order."""

    hidden: str
    weight: str
    output: str
    width: str
    vocab: str
    swapped: bool  # the weight comes first


def _einsum(equation: str, *operands: Any) -> Operands:
    letters = _einsum_letters(equation, *operands)
    if letters is None:
        return None
    hidden, weight = _einsum_operands(operands)[:: -1 if letters.swapped else 1]
    order = [letters.hidden.index(letter) for letter in letters.output.replace(letters.vocab, "") + letters.width]
    replay = Replay(hidden)
    replay = replay if order == sorted(order) else replay.then(torch.permute, tuple(order))
    return replay, Replay(weight) if letters.weight[0] == letters.vocab else Replay(weight).then(torch.t), ()


def _einsum_operands(operands: tuple) -> tuple:
    return tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands


def _einsum_letters(equation: str, *operands: Any) -> _Letters | None:
    operands = _einsum_operands(operands)
    if len(operands) != 2 or "->" not in equation:
        return None
    inputs, output = equation.replace(" ", "").split("->")
    spellings = inputs.split(",")
    for swapped in (False, True):
        (hidden, weight), (tensor, _) = (pair[:: -1 if swapped else 1] for pair in (spellings, operands))
        dots = len(_shape(tensor) or ()) - len(hidden.replace("...", ""))
        if dots > len(_UNUSED):
            return None
        hidden, result = (text.replace("...", _UNUSED[:dots]) for text in (hidden, output))
        widths, vocabs = set(hidden) & set(weight), set(weight) - set(hidden)
        if len(weight) == 2 and len(widths) == len(vocabs) == 1 and len(set(hidden)) == len(hidden):
            [width], [vocab] = widths, vocabs
            if sorted(result) == sorted(hidden.replace(width, vocab)):
                return _Letters(hidden, weight, result, width, vocab, swapped)
    return None


_UNUSED = "\u03b1\u03b2\u03b3\u03b4\u03b5"  # letters that stand for the dimensions of "..."


def is_vocab_vector(shape: tuple, vocab_size: Any) -> bool:
    """Whether a tensor of this shape adds one number to each class, the same in every row."""
    ones = all(isinstance(size, int) and size == 1 for size in shape[:-1])
    return bool(shape) and ones and statically_equal(shape[-1], vocab_size)


def vocab_vector(node: Node) -> Replay:
    """Such a tensor as a vector [V]."""
    return Replay(node) if len(_shape(node) or ()) == 1 else Replay(node).then(torch.flatten)


FORMS: dict[str, Callable[..., Operands]] = {
    "linear": _linear,
    "matmul": _matmul,
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
}

_TRANSPOSES = {"t", "T", "mT"}
_CASTS = {"to", "bfloat16", "half", "type_as"}


def _uncast(weight: Replay, matmul: Node, grad_modes: dict[Node, bool]) -> Replay:
    """The weight itself where the program casts it, transposes it, or both, just for this product.

    The operator casts a slice of the weight at a time, and gives the gradient in the dtype of the parameter.
    """
    source: Any = weight.source
    steps = weight.steps
    compute_dtype = tensor_of(matmul).dtype
    # what is made without gradients gives none to what it is made of
    while grad_modes[source] or not grad_modes[matmul]:
        if _is_transpose(source):
            source, steps = source.args[0], (Replay(source).then(torch.t).steps + steps)
        elif _is_narrowing_cast(source, compute_dtype):
            source = source.args[0]
        else:
            break
    transposed = sum(step.function is torch.t for step in steps) % 2 == 1
    rest = tuple(step for step in steps if step.function is not torch.t)
    return Replay(source, rest).then(torch.t) if transposed else Replay(source, rest)


def _is_transpose(node: Node) -> bool:
    shape, name = _shape(node), operation(node)
    if shape is None or len(shape) != 2:
        return False
    dims = tuple(arg for arg in node.args[1:] if isinstance(arg, int))
    return (name in _TRANSPOSES and (node.target is getattr or len(node.args) == 1)) or (
        name == "transpose" and not node.kwargs and sorted(dim % 2 for dim in dims) == [0, 1]
    )


def _is_narrowing_cast(node: Node, compute_dtype: torch.dtype) -> bool:
    """Whether a node does nothing but round a wider tensor, never written again, to the dtype of the product."""
    if operation(node) not in _CASTS:
        return False
    source: Any = node.args[0]
    before, after = tensor_of(source), tensor_of(node)
    return (
        before is not None
        and after is not None
        and before.dtype == torch.float32
        and after.dtype == compute_dtype
        and compute_dtype in (torch.bfloat16, torch.float16)
        and before.device == after.device
        and never_written_after(node, source)
    )
