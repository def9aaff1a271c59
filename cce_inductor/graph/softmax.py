"""Rules for probabilities of the logits, their products with the logits, and maxima: entropy, accuracy, confidence.

Of log-probabilities those for multiples too: some write the loss as -log_softmax(x).

    p = softmax(x)      entropy = - sum over v of p[v] * log p[v] = logsumexp(x) - sum over v of p[v] * x[v]

None of these values is computed; each is followed until a reduction over the vocabulary ends it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy

from . import rows  # noqa: F401 (its rules are in the registry, and used here)
from .logits import DeferredLogits, Refused
from .reductions import Reduction, Results, Vector, in_rows, require_vocab
from .registry import RULES, Call, rule


@dataclass(frozen=True)
class Probabilities:
    """factor * exp(log), in the dtype of log."""

    log: DeferredLogits  # normalized
    factor: float = 1.0
    kind: ClassVar = "softmax"


@dataclass(frozen=True)
class Scaled:
    """factor * log-probabilities."""

    log: DeferredLogits  # normalized
    factor: float
    kind: ClassVar = "scaled"


@dataclass(frozen=True)
class Floored:
    """Log-probabilities, the lowest finite number in the place of minus infinity, as `Categorical` has them."""

    log: DeferredLogits
    kind: ClassVar = "floored"


@dataclass(frozen=True)
class Product:
    """factor * p * log p, or factor * p * x."""

    log: DeferredLogits
    with_log: bool
    factor: float
    kind: ClassVar = "product"


@dataclass(frozen=True)
class Maxima:
    """What max(dim) gives: values and indices."""

    of: DeferredLogits | Probabilities
    keepdim: bool
    kind: ClassVar = "maxima"


@rule("softmax")
def softmax(
    call: Call, input: DeferredLogits, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Probabilities:
    require_vocab(input, dim)
    return Probabilities(input.log_softmax().to(call.output.dtype))


def _on_rows(function: Callable, call: Call, x: Any, *args: Any, **named: Any) -> Any:
    """What an operation does to the rows of the logits, it does to those of a function of them."""
    log = function(call, x.log, *args, **named)
    return _of_reduced(x, log) if isinstance(log, Reduction) else replace(x, log=log)


def _of_reduced(x: Any, of_logs: Reduction) -> Reduction:
    """What picks or sums log-probabilities does so with a multiple of them; what picks them picks probabilities."""
    if not isinstance(x, Probabilities | Scaled):
        raise Refused(f"classes are picked of the logits ({x.kind}); pick them of the log_softmax")

    def build(results: Results) -> Vector:
        value = of_logs.build(results)
        return x.factor * (value.exp() if isinstance(x, Probabilities) else value)

    return replace(of_logs, build=build)


_ROW_OPERATIONS = (
    "clone", "contiguous", "detach", "flatten", "float", "getitem", "index_select", "narrow", "reshape", "select",
    "squeeze", "to", "type_as", "unsqueeze", "view",
)  # fmt: skip
for _name in _ROW_OPERATIONS:
    for _kind in (Probabilities.kind, Scaled.kind, Floored.kind, Product.kind):
        rule(f"{_kind}.{_name}")(functools.partial(_on_rows, RULES[_name]))


@rule("softmax.neg", "scaled.neg", "product.neg")
def neg(call: Call, x: Any) -> Any:
    x = replace(x, factor=-x.factor)
    return x.log if isinstance(x, Scaled) and x.factor == 1.0 else x


for _name in ("scaled.gather", "scaled.sum", "scaled.mean", "softmax.gather"):
    rule(_name)(functools.partial(_on_rows, RULES[_name.split(".")[1]]))


@rule("softmax.entr")
def entr(call: Call, p: Probabilities) -> Product:
    """- p * log p, zero where p is."""
    if p.factor != 1.0:
        raise Refused("entr of something else than the probabilities of the logits")
    return Product(p.log.to(call.output.dtype), True, -1.0)


@rule("softmax.log")
def log(call: Call, p: Probabilities) -> None:
    raise Refused("the log of a softmax is -inf where a probability is rounded to zero; use log_softmax")


@rule("floored.mul", "product.mul")
def times(call: Call, a: Any, b: Any) -> Any:
    """By a number; probabilities by the logits that they are of, or by their logs."""
    for x, number in ((a, b), (b, a)):
        if isinstance(number, int | float) and not isinstance(x, Floored):
            return replace(x, factor=x.factor * number)
    p, x = (a, b) if isinstance(a, Probabilities) else (b, a)
    log = x.log if isinstance(x, Floored | Scaled) else x
    if not isinstance(p, Probabilities) or not isinstance(log, DeferredLogits) or not _same_logits(p.log, log):
        raise Refused("probabilities are multiplied by something else than the same logits or their log_softmax")
    if log.logit_map.expr.has(-sympy.oo) and not isinstance(x, Floored):
        raise Refused("0 * -inf, of classes that are masked with -inf, is nan; mask with a large negative number")
    factor = p.factor * (x.factor if isinstance(x, Scaled) else 1.0)
    return Product(p.log.to(call.output.dtype), log.normalized, factor)


@rule("softmax.div", "scaled.div", "product.div")
def divided(call: Call, x: Any, divisor: Any) -> Any:
    if not isinstance(divisor, int | float):
        raise Refused("probabilities are divided by a tensor, or the other way round; only by a number they can be")
    return replace(x, factor=x.factor / divisor)


def _same_logits(a: DeferredLogits, b: DeferredLogits) -> bool:
    a, b = replace(a, normalized=False), replace(b, normalized=False)
    return a.same_products(b) and a.logit_map == b.logit_map


@rule("product.sum")
def expectation(
    call: Call, product: Product, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Reduction:
    """The expected log-probability is minus the entropy; the expected logit exceeds it by the log-sum-exp."""
    require_vocab(product.log, dim)

    def build(results: Results) -> Vector:
        value = -results.entropy
        if not product.with_log:
            value = results.lse + (results.lse_rest - results.entropy)
        return in_rows(product.log, product.factor * value, results, keepdim)

    return Reduction(call.node, product.log, build, want_entropy=True)


@rule("max", "softmax.max")
def maxima(call: Call, input: DeferredLogits | Probabilities, dim: Any = None, keepdim: bool = False) -> Maxima:
    require_vocab(_logits(input), dim)
    return Maxima(input, keepdim)


@rule("maxima.getitem")
def value_or_index(call: Call, x: Maxima, index: int) -> Reduction:
    return (_maximum, _argmax)[index](call, x.of, x.keepdim)


@rule("amax", "softmax.amax")
def amax(call: Call, input: DeferredLogits | Probabilities, dim: Any = (), keepdim: bool = False) -> Reduction:
    if call.output.requires_grad:
        raise Refused("amax spreads its gradient over equal logits; use max(dim).values, or amax without gradient")
    require_vocab(_logits(input), dim)
    return _maximum(call, input, keepdim)


@rule("argmax", "softmax.argmax")
def argmax(
    call: Call, input: DeferredLogits | Probabilities, dim: int | None = None, keepdim: bool = False
) -> Reduction:
    require_vocab(_logits(input), dim)
    return _argmax(call, input, keepdim)


def _argmax(call: Call, x: DeferredLogits | Probabilities, keepdim: bool) -> Reduction:
    logits = _logits(x)

    def build(results: Results) -> Vector:
        return in_rows(logits, results.argmax.clone(), results, keepdim)

    return Reduction(call.node, logits, build, want_max=True, is_loss=logits.normalized)


def _maximum(call: Call, x: DeferredLogits | Probabilities, keepdim: bool) -> Reduction:
    logits = _logits(x)

    def build(results: Results) -> Vector:
        value = results.maximum.clone()
        if logits.normalized:
            value = value - results.lse - results.lse_rest
        if isinstance(x, Probabilities):
            value = value.exp()
        return in_rows(logits, value, results, keepdim)

    return Reduction(call.node, logits, build, want_max=True, is_loss=logits.normalized)


def _logits(x: DeferredLogits | Probabilities) -> DeferredLogits:
    if isinstance(x, DeferredLogits):
        return x
    if x.factor != 1.0:
        raise Refused("the largest of negated probabilities is searched")
    return x.log
