"""Lazy logits: a tensor that is computed from the hidden states and the weight when something first reads it.

A program that returns its logits beside the loss gets them back in this form. Shape, dtype, device and autograd are
those of the logits; the numbers come into being on first use, once.

The tensor is a wrapper subclass: autograd sees it as the result of one differentiable function of hidden states, weight
and bias, and whatever reaches the dispatcher with it is given the computed tensor. What only looks at some rows, or at
all of them in another dtype, makes another lazy tensor.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compat import below_torch_function, is_tracing, throw_on_data_ptr, tree_map_only, unset_fake_temporarily
from .logit_map import LogitMap

aten = torch.ops.aten

CHANGED = (
    "these logits were returned lazily and are read for the first time now, but their {name} has changed in place or "
    "was freed since (an optimizer step, a sharded weight); read them before that, or keep them with the option "
    'logits="materialize" of cce_inductor'
)


@dataclass(frozen=True)
class Formula:
    """x = f(rows @ weight.T + bias), or log_softmax(x): what the logits are of their operands.

    logit_map: f, in the language of `LogitMap`; evaluated in float32, or float64 where `compute_dtype` is.
    compute_dtype: of the product.
    dtypes: that the result is cast to, one after the other.
    """

    logit_map: str
    compute_dtype: torch.dtype
    dtypes: tuple[torch.dtype, ...]
    normalized: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[-1]

    def cast(self, dtype: torch.dtype) -> "Formula":
        return replace(self, dtypes=(*self.dtypes, dtype))

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows [..., D], weight [V, D], bias [V] -> logits [..., V]."""
        with torch.autocast(rows.device.type, enabled=False):
            x = self._product(rows.to(self.compute_dtype), weight.to(self.compute_dtype), bias)
            if self.normalized or self.logit_map != "z":
                x = _Mapped.apply(x.to(torch.promote_types(x.dtype, torch.float32)), LogitMap.parse(self.logit_map))
            if self.normalized:
                x = x.log_softmax(-1)
            for dtype in self.dtypes:
                x = x.to(dtype)
            return x

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None or bias.dtype == self.compute_dtype:
            return F.linear(rows, weight, bias)
        return F.linear(rows, weight) + bias


class _Mapped(torch.autograd.Function):
    """f(z), with the derivative that the operators have: zero, not nan, where f fills in for a z of -inf."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, logit_map: LogitMap) -> Tensor:
        ctx.save_for_backward(z)
        ctx.logit_map = logit_map
        return logit_map(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        slope = ctx.logit_map.value_and_derivative(*ctx.saved_tensors)[1]
        return grad if slope is None else grad * slope, None


class LazyLogits(Tensor):
    """f(rows @ weight.T + bias) of shape [..., V], not computed yet; `lazy_logits` makes one.

    A piece (some rows, another view) shares memory with the tensor that it was taken from, as a view does: it computes
    only its own rows, unless that tensor is computed already or something views the piece or writes to it.
    """

    formula: Formula
    _operands: dict[str, Tensor]  # rows, weight and maybe bias
    _watched: dict[str, tuple[Tensor, tuple]]  # the tensors that the operands are views of, in the state they were in
    _whole: "LazyLogits | None"  # what it is a piece of
    _take: Callable[[Tensor], Tensor]  # the piece of a computed whole
    _value: Tensor | None

    __torch_function__ = below_torch_function

    @staticmethod
    def __new__(cls, operands: dict[str, Tensor], formula: Formula, geometry: Tensor, device: Any) -> "LazyLogits":
        """geometry: any tensor of the same sizes and strides."""
        self = Tensor._make_wrapper_subclass(
            cls,
            geometry.shape,
            strides=geometry.stride(),
            storage_offset=geometry.storage_offset(),
            dtype=formula.dtype,
            device=device,
        )
        throw_on_data_ptr(self)
        self.formula = formula
        self._operands = operands
        self._watched = {name: (tensor, _state(tensor)) for name, tensor in operands.items()}
        self._whole = None
        self._value = None
        return self

    def rows(self) -> Tensor:
        """The hidden states; raises RuntimeError where they have changed."""
        return self._operand("rows")

    def _operand(self, name: str) -> Tensor:
        """Raises RuntimeError where it has changed since the logits were returned."""
        tensor, state = self._watched[name]
        if _state(tensor) != state:
            raise RuntimeError(CHANGED.format(name="hidden states" if name == "rows" else name))
        return self._operands[name]

    @property
    def is_computed(self) -> bool:
        """Whether the numbers are there, here or where this is a piece of."""
        return self._value is not None or (self._whole is not None and self._whole.is_computed)

    @torch.compiler.disable
    def value(self, shared: bool = False) -> Tensor:
        """The logits as a plain tensor without autograd.

        shared: in the memory that all pieces of the same logits share, to be viewed or written.
        """
        with torch.no_grad(), unset_fake_temporarily():  # a compiler may ask
            if self._whole is not None and (shared or self._whole.is_computed):
                return self._take(self._whole.value(shared))
            if self._value is None:
                self._value = self.formula(*map(self._operand, self._operands))
            return self._value

    @torch.compiler.disable
    def plain(self) -> Tensor:
        """The logits as a plain tensor with the same place in autograd."""
        return _Plain.apply(self)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        how = kwargs or {}
        first = args[0] if args and isinstance(args[0], LazyLogits) else None
        if first is not None and (func in SAME or (is_tracing() and _views(func))):
            # of this type even where computed: tracers want that of a view
            return first.piece(None, lambda t: func(t, *args[1:], **how))
        if first is not None and func in LAZY and first._root._value is None:
            piece = LAZY[func](first, func, *args[1:], **how)
            if piece is not None:
                return piece
        shared = any(argument.alias_info is not None for argument in func._schema.arguments)
        args, how = tree_map_only(LazyLogits, lambda x: x.value(shared), (args, how))
        return func(*args, **how)

    @property
    def _root(self) -> "LazyLogits":
        return self if self._whole is None else self._whole._root

    def piece(self, rows: Tensor | None, take: Callable[[Tensor], Tensor]) -> "LazyLogits":
        """The view `take` of these logits, with the rows that it has; None for the same rows."""
        geometry = torch.empty_strided(self.shape, self.stride(), device="meta")
        piece = self._with_rows(rows, self.formula, take(geometry))
        piece._whole, piece._take = self, take
        return piece

    def copy(self, rows: Tensor | None, formula: Formula) -> "LazyLogits":
        """Other logits with the same weight, in memory of their own."""
        shape = self.shape if rows is None else (*rows.shape[:-1], self.shape[-1])
        return self._with_rows(rows, formula, torch.empty(shape, device="meta"))

    def _with_rows(self, rows: Tensor | None, formula: Formula, geometry: Tensor) -> "LazyLogits":
        operands = self._operands if rows is None else self._operands | {"rows": rows}
        other = LazyLogits(operands, formula, geometry, self.device)
        other._watched = self._watched
        return other

    # A compiled function that is given lazy logits has them computed before it starts.

    computed = property(value)

    def __tensor_flatten__(self) -> tuple[list[str], Formula]:
        return ["computed"], self.formula

    def _stable_hash_for_caching(self) -> str:
        return repr(self.formula)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], formula: Formula, size: Any, stride: Any) -> "LazyLogits":
        self = LazyLogits({}, formula, inner["computed"], inner["computed"].device)
        self._value = inner["computed"]
        return self


def _reads(name: str, tracing: Callable | None = None) -> None:
    """Defines a method of Tensor that looks at memory without the dispatcher: it is given the plain tensor.

    tracing: what the method is while a program that was given lazy logits is compiled.
    """

    @functools.wraps(getattr(Tensor, name))
    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        if tracing is not None and is_tracing():
            return tracing(self, *args, **kwargs)
        return getattr(self.plain(), name)(*args, **kwargs)

    setattr(LazyLogits, name, method)


for _name in ("__format__", "__reduce_ex__", "__deepcopy__", "__dlpack__", "numpy", "tolist"):
    _reads(_name)
for _name in ("data_ptr", "storage", "untyped_storage", "_typed_storage"):
    _reads(_name, tracing=getattr(Tensor, _name))  # compilers tell tensors apart by it, these and the computed ones
_reads("__repr__", tracing=lambda self: f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})")
LazyLogits.__cuda_array_interface__ = property(lambda self: self.plain().__cuda_array_interface__)  # type: ignore


def lazy_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, formula: Formula) -> LazyLogits:
    """The logits of `formula` as a tensor that is computed on first use; differentiable in all operands.

    rows: hidden states [..., D]. weight: [V, D]. bias: [V] or None.
    Reading them raises RuntimeError where an operand has been changed in place since.
    """
    return _Lazy.apply(rows, weight, bias, formula)


class _Lazy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, formula: Formula) -> LazyLogits:
        ctx.save_for_backward(rows, weight, bias)
        ctx.formula = formula
        operands = {"rows": rows.detach(), "weight": weight.detach()}
        if bias is not None:
            operands["bias"] = bias.detach()
        geometry = torch.empty((*rows.shape[:-1], weight.shape[0]), device="meta")
        return LazyLogits(operands, formula, geometry, rows.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        with torch.enable_grad():
            # as views: the rows may come from the weight, and this is about one use of it
            operands = [None if operand is None else operand.view_as(operand) for operand in ctx.saved_tensors]
            logits = ctx.formula(*operands)
        wanted: list[Any] = [t for t, needed in zip(operands, ctx.needs_input_grad, strict=False) if needed]
        grads = iter(torch.autograd.grad(logits, wanted, grad, create_graph=torch.is_grad_enabled()))
        return *(next(grads) if needed else None for needed in ctx.needs_input_grad[:3]), None


class _Plain(torch.autograd.Function):
    """The identity, from a lazy tensor to a plain one."""

    @staticmethod
    def forward(ctx: Any, lazy: LazyLogits) -> Tensor:
        return lazy.value(shared=True).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _views(func: Any) -> bool:
    """Whether an operator gives one view of its first argument."""
    first, returns = func._schema.arguments[0].alias_info, func._schema.returns
    return first is not None and not first.is_write and len(returns) == 1 and str(returns[0].type) == "Tensor"


def _state(tensor: Tensor) -> tuple[int | None, int]:
    """Differs after a write, and after the memory is given back (as FSDP does with a gathered weight)."""
    return None if tensor.is_inference() else tensor._version, tensor.untyped_storage().nbytes()


# ------------------------------------------------------------------------------------------- what stays lazy, by rows


def _along_rows(x: LazyLogits, func: Any, dim: int = 0, *args: Any) -> LazyLogits | None:
    if dim % x.dim() == x.dim() - 1:
        return None
    dim %= x.dim()
    return x.piece(func(x.rows(), dim, *args), lambda t: func(t, dim, *args))


def _viewed(x: LazyLogits, func: Any, size: Any) -> LazyLogits | None:
    shape = func(torch.empty_strided(x.shape, x.stride(), device="meta"), size).shape
    if not shape or shape[-1] != x.shape[-1]:
        return None
    return x.piece(x.rows().reshape(*shape[:-1], x.rows().shape[-1]), lambda t: func(t, size))


def _cast(x: LazyLogits, func: Any, *, dtype: Any = None, device: Any = None, **how: Any) -> LazyLogits | None:
    dtype, device = dtype or x.dtype, device or x.device
    if not dtype.is_floating_point or torch.device(device) != x.device or how.get("pin_memory"):
        return None
    return x.copy(None, x.formula.cast(dtype))


def _cloned(x: LazyLogits, func: Any, **how: Any) -> LazyLogits:
    return x.copy(None, x.formula)


def _indexed(x: LazyLogits, func: Any, indices: list) -> LazyLogits | None:
    if len(indices) == x.dim() and indices[-1] is not None:
        return None
    return x.copy(func(x.rows(), indices), x.formula)


def _index_selected(x: LazyLogits, func: Any, dim: int, index: Tensor) -> LazyLogits | None:
    return None if dim % x.dim() == x.dim() - 1 else x.copy(func(x.rows(), dim % x.dim(), index), x.formula)


SAME = (aten.alias.default, aten.detach.default)
LAZY: dict[Any, Callable[..., LazyLogits | None]] = {
    aten.slice.Tensor: _along_rows,
    aten.select.int: _along_rows,
    aten.view.default: _viewed,
    aten._unsafe_view.default: _viewed,
    aten._to_copy.default: _cast,
    aten.clone.default: _cloned,
    aten.index.Tensor: _indexed,
    aten.index_select.default: _index_selected,
}
