"""Pointwise maps on logits, x = f(z), as sympy expressions.

A model may scale, cap or shift its logits before the loss: Gemma 2 computes `30 * tanh(z / 30)`, Cohere `z * c`,
Granite `z / c`. The pass records such a chain as one expression in z, the operator receives it as text, and each
implementation evaluates it together with its derivative: torch functions on the CPU, generated Triton on the GPU.

The text is a small language of its own (numbers, inf, z, + - * / **, and the functions below). `parse` accepts nothing
else and never evaluates Python.
"""

import ast
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.printing.str import StrPrinter

Z = sympy.Symbol("z", real=True)
X = sympy.Symbol("x", real=True)


class sigmoid(sympy.Function):  # noqa: N801 (sympy prints a function by its class name)
    """1 / (1 + exp(-x)), kept whole so that it is evaluated without overflow."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        value = sigmoid(self.args[0])
        return value * (1 - value)


class gt(sympy.Function):  # noqa: N801
    """Whether a > b: a condition, false where either is nan."""

    nargs = 2

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        return sympy.Integer(float(a) > float(b)) if a.is_number and b.is_number else None


class ge(sympy.Function):  # noqa: N801
    """Whether a >= b: a condition, false where either is nan."""

    nargs = 2

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        return sympy.Integer(float(a) >= float(b)) if a.is_number and b.is_number else None


class where(sympy.Function):  # noqa: N801
    """a where a condition holds, else b. Its derivative is that of the branch taken, as autograd has it."""

    nargs = 3

    @classmethod
    def eval(cls, condition: sympy.Expr, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if condition.is_number:
            return a if condition else b
        return a if a == b else None

    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        condition, a, b = self.args
        return where(condition, a.diff(symbol), b.diff(symbol))


# Every function a map may contain: its sympy form and its torch form. The Triton form has the same name and lives in
# `kernels/pointwise.py`.
FUNCTIONS: dict[str, tuple[Any, Callable[..., torch.Tensor]]] = {
    "tanh": (sympy.tanh, torch.tanh),
    "sigmoid": (sigmoid, torch.sigmoid),
    "exp": (sympy.exp, torch.exp),
    "gt": (gt, operator.gt),
    "ge": (ge, operator.ge),
    "where": (where, torch.where),
}


class _TextPrinter(StrPrinter):
    """Prints an expression so that `parse` gives it back bit for bit."""

    def _print_Float(self, expr: sympy.Float) -> str:  # noqa: N802 (named by sympy's printers)
        return repr(float(expr))

    def _print_Rational(self, expr: sympy.Rational) -> str:  # noqa: N802
        return repr(float(expr))

    def _print_Infinity(self, expr: sympy.Expr) -> str:  # noqa: N802
        return "inf"

    def _print_NegativeInfinity(self, expr: sympy.Expr) -> str:  # noqa: N802
        return "-inf"


def to_text(expr: sympy.Expr) -> str:
    """The expression in the map language; also valid in generated Triton code."""
    return _TextPrinter({"full_prec": True}).doprint(expr)


_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def _parse_node(node: ast.expr) -> sympy.Expr:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return sympy.Integer(number) if isinstance(number, int) else sympy.Float(number)
        case ast.Name(id="z"):
            return Z
        case ast.Name(id="inf"):
            return sympy.oo
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_parse_node(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_parse_node(left), _parse_node(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            function = FUNCTIONS[name][0]
            if len(arguments) in function.nargs:
                return function(*map(_parse_node, arguments))
    raise ValueError(
        f"{ast.unparse(node)!r} is not part of a logit map: allowed are numbers, inf, z, + - * / ** and "
        f"{list(FUNCTIONS)}"
    )


def _affine(expr: sympy.Expr) -> tuple[float, float] | None:
    """(a, c) of a * z + c. By its form: sympy's derivatives would cost each first graph of a process an import."""
    if expr == Z:
        return 1.0, 0.0
    if expr.is_number:
        return 0.0, float(expr)
    parts = [_affine(arg) for arg in expr.args] if expr.is_Add or expr.is_Mul else [None]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if expr.is_Add:
        slopes, offsets = zip(*known, strict=True)
        return sum(slopes), sum(offsets)
    factor = math.prod(offset for slope, offset in known if slope == 0)
    lines = [part for part in known if part[0] != 0]
    return (factor * lines[0][0], factor * lines[0][1]) if len(lines) == 1 else None


# Where the values of functions lie that have bounds.
BOUNDS = {"tanh": sympy.AccumBounds(-1, 1), "sigmoid": sympy.AccumBounds(0, 1)}
# Where codes put a probability off by a part of itself (`kernels/codes.py`), they put x off by as much, and f', if it
# is told from x, by no more than half of that.
STEEPEST = 0.5


def _is_bounded(expr: sympy.Expr) -> bool:
    return type(expr).__name__ in BOUNDS


def _largest(expr: sympy.Expr) -> float | None:
    """The largest absolute value of an expression without z, if it is finite."""
    if expr.free_symbols:
        return None
    largest = max(abs(expr.max), abs(expr.min)) if isinstance(expr, sympy.AccumBounds) else abs(expr)
    return float(largest) if largest.is_finite else None


@dataclass(frozen=True)
class LogitMap:
    """x = f(z), applied to every logit; immutable, compared and hashed by its text."""

    expr: sympy.Expr = Z

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> "LogitMap":
        """The map written as `text`; ValueError for anything outside the map language."""
        try:
            tree = ast.parse(text, mode="eval")
        except SyntaxError as error:
            raise ValueError(f"{text!r} is not a logit map: {error.msg}") from error
        return cls(_parse_node(tree.body))

    def __str__(self) -> str:
        return to_text(self.expr)

    @property
    def is_identity(self) -> bool:
        return self.expr == Z

    @property
    def is_smooth(self) -> bool:
        """Whether the derivative is continuous."""
        return not self.expr.has(where)

    @property
    def derivative(self) -> sympy.Expr:
        """df/dz."""
        return sympy.diff(self.expr, Z)

    @functools.cached_property
    def slope_bound(self) -> float | None:
        """A number that |f'| stays below or at, everywhere; None where none is found."""
        return _largest(self.derivative.replace(_is_bounded, lambda e: BOUNDS[type(e).__name__]))

    @functools.cached_property
    def slope_by_value(self) -> sympy.Expr | None:
        """f' as an expression in x = f(z), where it changes by no more than half as much as x; else None.

        That is where f = a * z + c, or a * t + c with one bounded function t of a line. So it is 1 - (x / a)**2 for
        f = a * tanh(z / a) with a of 4 and more.
        """
        line = self.affine()
        if line is not None:
            return sympy.Float(line[0])
        bounded = self.expr.find(_is_bounded)
        if len(bounded) != 1:
            return None
        [part], t = bounded, sympy.Dummy("t", real=True)
        value, slope = (expr.xreplace({part: t}) for expr in (self.expr, self.derivative))
        line = None if value.has(Z) or slope.has(Z) else _affine(value.xreplace({t: Z}))
        if line is None:
            return None
        factor, offset = line
        steepness = _largest((slope.diff(t) / factor).xreplace({t: BOUNDS[type(part).__name__]}))
        known = steepness is not None and steepness <= STEEPEST
        return slope.xreplace({t: (X - offset) / factor}) if known else None

    def affine(self) -> tuple[float, float] | None:
        """(a, c) where f(z) = a * z + c, or None where f is not of that form or a is zero."""
        line = _affine(self.expr)
        return None if line is None or line[0] == 0 else line

    def then(self, step: Callable[[sympy.Expr], sympy.Expr]) -> "LogitMap":
        """The map that applies `step` to the result of this one."""
        return LogitMap(step(self.expr))

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """f(z) with torch functions, in z's dtype."""
        return z if self.is_identity else _evaluate(self.value_program(), z)[0]

    def value_and_derivative(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """f(z) and f'(z) with torch functions; None stands for a derivative of one everywhere."""
        if self.is_identity:
            return z, None
        value, slope = _evaluate(self.program(), z)
        return value, slope

    def value_program(self) -> "Program":
        """The steps that compute f."""
        return self._program((self.expr,))

    def program(self) -> "Program":
        """The steps that compute f and f', with shared subexpressions computed once."""
        return self._program((self.expr, self.derivative))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def _program(outputs: tuple[sympy.Expr, ...]) -> "Program":
        steps, results = sympy.cse(outputs, symbols=sympy.numbered_symbols("t"))
        return Program(tuple(steps), tuple(results))


@dataclass(frozen=True)
class Program:
    """Straight-line code: `steps` name shared subexpressions in order, `results` use them."""

    steps: tuple[tuple[sympy.Symbol, sympy.Expr], ...]
    results: tuple[sympy.Expr, ...]


def _evaluate(program: Program, z: torch.Tensor) -> list[torch.Tensor]:
    values: dict[sympy.Symbol, Any] = {Z: z}
    for symbol, expr in program.steps:
        values[symbol] = _evaluate_expr(expr, values)
    results = (_evaluate_expr(expr, values) for expr in program.results)
    return [r if isinstance(r, torch.Tensor) else torch.full_like(z, r) for r in results]


def _evaluate_expr(expr: sympy.Expr, values: dict[sympy.Symbol, Any]) -> Any:
    if expr.is_Symbol:
        return values[expr]
    if expr.is_number:
        return float(expr)
    args = [_evaluate_expr(arg, values) for arg in expr.args]
    if expr.is_Add:
        return functools.reduce(operator.add, args)
    if expr.is_Mul:
        return functools.reduce(operator.mul, args)
    if expr.is_Pow:
        return args[0] ** args[1]
    if type(expr) is where:  # of two numbers torch.where would make a tensor of the default dtype
        args[1:] = [arg if isinstance(arg, torch.Tensor) else values[Z].new_full((), arg) for arg in args[1:]]
    return FUNCTIONS[type(expr).__name__][1](*args)


def clamped(expr: sympy.Expr, low: sympy.Expr | None, high: sympy.Expr | None, flat_bounds: bool) -> sympy.Expr:
    """torch.clamp: the larger of expr and low, then the smaller of that and high; nan stays.

    flat_bounds: whether the gradient is zero at the bounds too, and not one.
    """
    beyond = ge if flat_bounds else gt
    if low is not None:
        expr = where(beyond(low, expr), low, expr)
    return expr if high is None else where(beyond(expr, high), high, expr)


LOWEST = sympy.Float(-3.4e38)  # any finite logit is larger


def filled(expr: sympy.Expr, value: sympy.Expr) -> sympy.Expr | None:
    """f with a number in the place of the logits that a bias of -inf marks; None where they hold another already."""
    marked = gt(LOWEST, Z)
    if isinstance(expr, where) and expr.args[0] == marked:
        return expr if expr.args[1] == value else None
    return None if expr.has(marked) else where(marked, value, expr)


def constant(value: float) -> sympy.Expr:
    """A number of the user's program as it enters an expression; ValueError unless it is finite."""
    if not math.isfinite(value):
        raise ValueError(f"{value} in the map of the logits")
    return sympy.Integer(value) if isinstance(value, int) else sympy.Float(value)
