"""DeferredLogits: the logits f(hidden @ weight.T + bias) of a graph as a value that is not computed.

The pass carries it through the graph in place of a tensor. What the program does to the rows of the logits is
recorded and can be replayed on the hidden states, whose rows are the same and whose last dimension is narrow.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..compat import statically_equal
from ..logit_map import LogitMap, Z, filled


class Refused(Exception):  # noqa: N818 (it is an answer, not an error)
    """Raised by a rule that can't follow the logits; the text, "why" or "why; what to do", goes into the report."""


@dataclass(frozen=True)
class Step:
    """One call to replay: function(value, *args, **named), the args with nodes and replays among them.

    A reshape keeps the order of the elements; its args are None where the sizes can't be written as arguments.
    """

    function: Callable
    args: tuple[Any, ...] | None = ()
    is_reshape: bool = False
    named: tuple[tuple[str, Any], ...] = ()  # constants


@dataclass(frozen=True)
class Joined:
    """Tensors side by side along their last dimension: [..., D1 + D2 + ...]."""

    parts: tuple["Replay", ...]


@dataclass(frozen=True)
class Replay:
    """A tensor of the graph, or several joined, and the calls to make on it."""

    source: Node | Joined
    steps: tuple[Step, ...] = ()

    def then(self, function: Callable, *args: Any, **named: Any) -> "Replay":
        return replace(self, steps=(*self.steps, Step(function, args, named=tuple(named.items()))))

    def reshaped(self, function: Callable, args: tuple[Any, ...] | None, absolute: bool = True) -> "Replay":
        """absolute: to the same shape whatever the shape was, so reshapes right before don't matter."""
        steps = self.flat().steps if absolute else self.steps
        return replace(self, steps=(*steps, Step(function, args, is_reshape=True)))

    def flat(self) -> "Replay":
        """The same elements in the same order: without the reshapes at the end, for use where rows are flattened."""
        steps = self.steps
        while steps and steps[-1].is_reshape:
            steps = steps[:-1]
        return replace(self, steps=steps)

    def steps_after(self, other: "Replay") -> tuple[Step, ...] | None:
        """The calls that make this of another; None where it is not made of that."""
        made = self.source == other.source and self.steps[: len(other.steps)] == other.steps
        return self.steps[len(other.steps) :] if made else None

    def without(self, function: Callable) -> "Replay":
        return replace(self, steps=tuple(step for step in self.steps if step.function is not function))

    def operands(self) -> list[Node]:
        """Every node that `emit` reads."""
        nodes = []
        if isinstance(self.source, Joined):
            nodes += [node for part in self.source.parts for node in part.operands()]
        else:
            nodes.append(self.source)
        for step in self.steps:
            map_arg(step.args, nodes.append)
            nodes += [node for arg in step.args or () if isinstance(arg, Replay) for node in arg.operands()]
        return nodes

    def emit(self, call: Callable[..., Node]) -> Node:
        """The result as a node; call(function, *args) writes one call into the graph."""
        if isinstance(self.source, Joined):
            value = call(torch.cat, [part.emit(call) for part in self.source.parts], -1)
        else:
            value = self.source
        for step in self.steps:
            if step.args is None:
                raise Refused("rows are reshaped to several dynamic sizes that are not arguments of the call")
            args = [arg.emit(call) if isinstance(arg, Replay) else arg for arg in step.args]
            value = call(step.function, value, *args, **dict(step.named))
        return value


@dataclass(frozen=True)
class DeferredLogits:
    """x = f(hidden @ weight.T + bias), log_softmax(x) where `normalized`, of a given shape and dtype."""

    matmul: Node  # where it began
    hidden: Replay  # [rows..., D]
    weight: Replay  # [V, D]
    biases: tuple[Replay, ...]  # [V] each; their sum is added
    logit_map: LogitMap
    compute_dtype: torch.dtype  # of the matmul's result
    shape: tuple[Any, ...]  # of the logits, int or SymInt: the rows with V at vocab_dim
    dtype: torch.dtype  # that the program sees
    vocab_dim: int
    width: Any  # D, int or SymInt
    normalized: bool = False
    assumed: tuple[torch.SymFloat, ...] = ()  # the map holds their values in this run
    has_fill: bool = False  # a bias of -inf marks classes that the map fills with a number

    @property
    def products(self) -> int:
        """How many matrix products are added up."""
        return len(self.hidden.source.parts) if isinstance(self.hidden.source, Joined) else 1

    def operands(self) -> list[Node]:
        """Every node that computing them reads."""
        return [node for replay in (self.hidden, self.weight, *self.biases) for node in replay.operands()]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def vocab_size(self) -> Any:
        return self.shape[self.vocab_dim]

    @property
    def row_shape(self) -> tuple[Any, ...]:
        return self.shape[: self.vocab_dim] + self.shape[self.vocab_dim + 1 :]

    def dim(self, dim: int) -> int:
        """A dimension of the logits, counted from the front."""
        return dim % self.ndim

    def row_dim(self, dim: int) -> int:
        """The dimension of `hidden` that is dimension `dim` of the logits, which must not be the vocabulary."""
        if self.dim(dim) == self.vocab_dim:
            raise Refused("it works along the vocabulary in a way that needs the logits in memory")
        return self.dim(dim) - (self.dim(dim) > self.vocab_dim)

    def has_rows(self, shape: Any) -> bool:
        """Whether a shape is the logits' shape without the vocabulary, whatever the inputs."""
        return len(shape) == self.ndim - 1 and all(map(statically_equal, shape, self.row_shape))

    def to(self, dtype: torch.dtype) -> "DeferredLogits":
        """Seen in another dtype. The operator computes in float32 whatever the program rounds to in between."""
        if not dtype.is_floating_point:
            raise Refused(f"the logits are converted to {dtype}")
        if dtype == torch.float64 and self.compute_dtype != torch.float64:
            raise Refused("the logits are converted to float64, and are reduced in float32 where they are not stored")
        return replace(self, dtype=dtype)

    def replay(self, function: Callable, *args: Any, shape: Any, vocab_dim: int | None = None) -> "DeferredLogits":
        """After a call on the rows, whose result has this shape."""
        hidden = self.hidden.then(function, *args)
        dim = self.vocab_dim if vocab_dim is None else vocab_dim
        return replace(self, hidden=hidden, shape=tuple(shape), vocab_dim=dim)

    def moved(self, shape: Any, vocab_dim: int) -> "DeferredLogits":
        """With the vocabulary at another place and the rows in the same order."""
        return replace(self, shape=tuple(shape), vocab_dim=vocab_dim)

    def slice_vocab(self, start: int, stop: int) -> "DeferredLogits":
        """The classes [start, stop): fewer rows of the weight."""
        if (start, stop) == (0, self.vocab_size):
            return self
        shape = (*self.shape[: self.vocab_dim], stop - start, *self.shape[self.vocab_dim + 1 :])
        return replace(
            self,
            weight=self.weight.then(operator.getitem, slice(start, stop)),
            biases=tuple(bias.then(operator.getitem, slice(start, stop)) for bias in self.biases),
            shape=shape,
        )

    def piece(self, pieces: Replay, index: int, shape: Any, vocab_dim: int) -> "DeferredLogits":
        """One of the pieces that the rows were cut into."""
        return replace(self, hidden=pieces.then(operator.getitem, index), shape=tuple(shape), vocab_dim=vocab_dim)

    def reshape(
        self, shape: Any, row_sizes: tuple[Any, ...] | None, relative: tuple[Callable, tuple] | None = None
    ) -> "DeferredLogits":
        """In another shape with the elements in the same order and the vocabulary last.

        row_sizes: the row sizes as arguments for torch.reshape; None where they can't be written down.
        relative: then this call, with arguments, does the same to the rows of the hidden states.
        """
        shape = tuple(shape)
        if len(shape) == self.ndim and all(map(statically_equal, shape, self.shape)):
            return self
        last = self.vocab_dim == self.ndim - 1
        if not (last and shape and statically_equal(shape[-1], self.vocab_size)):
            raise Refused("it reshapes across the vocabulary dimension; keep that dimension whole, and last")
        function, args = self._reshape_call(len(shape) - 1, row_sizes)
        if args is None and relative is not None:
            hidden = self.hidden.reshaped(*relative, absolute=False)
        else:
            hidden = self.hidden.reshaped(function, args)
        return replace(self, hidden=hidden, shape=shape, vocab_dim=len(shape) - 1)

    def _reshape_call(self, row_dims: int, row_sizes: tuple[Any, ...] | None) -> tuple[Callable, tuple | None]:
        """(function, arguments) that reshape the hidden states; the width may be a dynamic size without a node."""
        width = self.width if isinstance(self.width, int) else -1
        if row_dims == 1 and width != -1:
            return torch.reshape, ((-1, width),)
        if row_dims == 1 and self.ndim > 1:
            return torch.flatten, (0, -2)
        if row_sizes is None or (width == -1 and -1 in row_sizes):
            return torch.reshape, None
        return torch.reshape, ((*row_sizes, width),)

    def map(self, step: Callable[[sympy.Expr], sympy.Expr]) -> "DeferredLogits":
        """After a pointwise function."""
        if self.normalized:
            raise Refused("it changes log-probabilities over the vocabulary; apply it after picking the targets' ones")
        return replace(self, logit_map=self.logit_map.then(step))

    def same_products(self, other: Any) -> bool:
        """Whether other is made of the same z, in the same shape, perhaps by another map."""
        return (
            isinstance(other, DeferredLogits)
            and not (self.normalized or other.normalized)
            and (self.hidden.flat(), self.weight, self.biases) == (other.hidden.flat(), other.weight, other.biases)
            and self.compute_dtype == other.compute_dtype
            and self.same_shape(other)
        )

    def same_shape(self, other: "DeferredLogits") -> bool:
        same_dims = (self.ndim, self.vocab_dim) == (other.ndim, other.vocab_dim)
        return same_dims and all(map(statically_equal, self.shape, other.shape))

    def combine(
        self, other: "DeferredLogits", function: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]
    ) -> "DeferredLogits":
        """A pointwise function of these logits and of others made of the same products."""
        if not self.same_products(other):
            raise Refused("logits of two different products, or of other rows, are combined element by element")
        expr = function(self.logit_map.expr, other.logit_map.expr)
        return replace(self, logit_map=LogitMap(expr), assumed=(*self.assumed, *other.assumed))

    def fill(self, mask: Replay, value: sympy.Expr) -> "DeferredLogits":
        """With a number, without gradient, for the classes of a mask [V]: a bias of -inf marks them for the map."""
        if self.normalized:
            raise Refused("log-probabilities are masked; mask the logits before log_softmax")
        if self.biases and value != -sympy.oo and not self.has_fill:
            raise Refused("classes of logits with a bias are filled with a finite number; fill them with -inf")
        expr = filled(self.logit_map.expr, value)
        if expr is None:
            raise Refused("classes are filled twice, with different numbers or another map between; fill them once")
        bias = mask.then(torch.where, -math.inf, 0.0)
        return replace(self, biases=(*self.biases, bias), logit_map=LogitMap(expr), has_fill=True)

    def plus(self, other: "DeferredLogits") -> "DeferredLogits":
        """The sum of two products: one product of the hidden states side by side with the weights side by side.

        That copies the weight, as the operator takes it in one piece. To fold the second product into the weight
        (weight + B @ A) would copy it too, round small updates away, and could not express dropout before A.
        """
        parts = sorted((self._without_map(), other._without_map()), key=lambda part: part.matmul)
        dtypes = {part.compute_dtype for part in parts}
        if len(dtypes) > 1 and (torch.float64 in dtypes or torch.float32 not in dtypes):
            raise Refused("the sum of two products is computed in two dtypes that do not fit; compute both in one")
        if not self.same_shape(other):
            raise Refused("the sum of two products of different shapes is needed in memory; give both the same shape")
        compute_dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
        return replace(
            self,
            matmul=parts[0].matmul,
            hidden=_joined([part.hidden for part in parts], compute_dtype),
            weight=_joined([part.weight for part in parts], compute_dtype),
            biases=(*parts[0].biases, *parts[1].biases),
            logit_map=LogitMap().then(lambda z: z + self.offset + other.offset),
            compute_dtype=compute_dtype,
            width=self.width + other.width,
            assumed=(*self.assumed, *other.assumed),
        )

    @property
    def offset(self) -> sympy.Expr:
        """c of an affine map a z + c."""
        return self.logit_map.expr.subs(Z, 0)

    def _without_map(self) -> "DeferredLogits":
        """a (hidden @ weight.T + bias) with a moved to the operands, where the map is a z + c."""
        affine = self.logit_map.affine()
        if self.normalized or affine is None:
            raise Refused("products are added after a non-linear map; add them before the map")
        if affine[0] == 1:
            return self
        return replace(
            self,
            hidden=self.hidden.then(torch.mul, affine[0]),
            biases=tuple(bias.then(torch.mul, affine[0]) for bias in self.biases),
        )

    def swapped(self) -> "DeferredLogits":
        """The transpose of logits [N, V] with classes and rows exchanged: weight @ hidden.T."""
        if self.ndim != 2 or self.biases or self.normalized:
            raise Refused(
                "its class dimension is not the vocabulary of the matmul; only the transpose of a plain product "
                "[N, V] can be reduced along its rows"
            )
        return replace(self, hidden=self.weight, weight=self.hidden, vocab_dim=1 - self.vocab_dim)

    def log_softmax(self) -> "DeferredLogits":
        """As log-probabilities over the vocabulary; doing that twice changes nothing."""
        return replace(self, normalized=True)

    def add_bias(self, bias: Replay) -> "DeferredLogits":
        """After adding a vector over the vocabulary: f(z) + b = f(z + b / a) where f(z) = a z + c."""
        affine = self.logit_map.affine()
        if self.normalized or affine is None:
            raise Refused("a vector over the vocabulary is added after a non-linear map; add it before the map")
        slope = affine[0]
        return replace(self, biases=(*self.biases, bias if slope == 1 else bias.then(torch.div, slope)))

    @property
    def is_scalable(self) -> bool:
        """Whether multiplying hidden states and biases by a number multiplies the logits by it."""
        affine = self.logit_map.affine()
        return not self.normalized and affine is not None and affine[1] == 0

    def assume(self, number: torch.SymFloat) -> "DeferredLogits":
        """With a map that takes a dynamic number for a constant."""
        return replace(self, assumed=(*self.assumed, number))

    def scale(self, function: Callable, factor: Node) -> "DeferredLogits":
        """After multiplying or dividing by a scalar of the program: it moves to the hidden states and biases."""
        if not self.is_scalable:
            raise Refused("a scalar tensor scales the logits after another map; scale first, or by a Python number")
        return replace(
            self,
            hidden=self.hidden.then(function, factor),
            biases=tuple(bias.then(function, factor).then(torch.flatten) for bias in self.biases),
        )

    def scale_classes(self, function: Callable, factors: Replay) -> "DeferredLogits":
        """After multiplying or dividing by a vector [V] of the program: it moves to the weight, a copy, and biases."""
        if not self.is_scalable or self.vocab_dim != self.ndim - 1:
            raise Refused("a vector over the vocabulary scales the logits after another map; scale first")
        return replace(
            self,
            weight=self.weight.then(function, factors.then(torch.unsqueeze, -1)),
            biases=tuple(bias.then(function, factors) for bias in self.biases),
        )

    def detach(self) -> "DeferredLogits":
        return replace(
            self,
            hidden=self.hidden.then(torch.detach),
            weight=self.weight.then(torch.detach),
            biases=tuple(bias.then(torch.detach) for bias in self.biases),
        )


@dataclass(frozen=True)
class Shaped:
    """A tensor that is made of the shape or dtype of the logits and of nothing else of them."""

    kind: ClassVar = "shaped"


@dataclass(frozen=True)
class Stacked:
    """Logits of several products stacked along a dimension; None stands for those of other sites."""

    parts: tuple[DeferredLogits | None, ...]
    dim: int
    kind: ClassVar = "stacked"


def _joined(parts: list[Replay], dtype: torch.dtype) -> Replay:
    """Operands of products side by side, in the dtype of the product."""
    flat: list[Replay] = []
    for part in parts:
        several = part.source.parts if isinstance(part.source, Joined) and not part.steps else (part,)
        flat += [p if _has_dtype(p, dtype) else p.then(torch.Tensor.to, dtype) for p in several]
    return Replay(Joined(tuple(flat)))


def _has_dtype(part: Replay, dtype: torch.dtype) -> bool:
    return isinstance(part.source, Node) and part.source.meta["example_value"].dtype == dtype
