"""How the way of the logits reads: "lm_head [V=50304, D=768] -> float32 -> mean cross-entropy, ignore_index -100"."""

import inspect
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ..compat import source_name
from ..report import log
from .logits import DeferredLogits, Joined
from .registry import operation, out_of_place, tensor_of

if TYPE_CHECKING:
    from .sites import Site

_UNSAID = {"view", "reshape", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "clone", "linear", "matmul"}
_SYMBOLS = {"mul": "*", "div": "/", "add": "+", "sub": "-", "pow": "**"}
_LOSSES = {"cross_entropy": "cross-entropy", "nll_loss": "negative log-likelihood"}


def chain(site: "Site", end: Node | None = None) -> str:
    """The way from a head to an operation; to all reductions where none is given. Ways that read alike are said once.

    Never raises, as words must not cost a rewrite.
    """
    try:
        return _chain(site, end)
    except Exception:
        log.debug("the way of the logits could not be put in words", exc_info=True)
        return ""


def _chain(site: "Site", end: Node | None) -> str:
    ends = [reduction.node for reduction in site.reductions] if end is None else [end]
    found: dict[tuple[str, ...], Counter[str]] = {}
    for node in ends:
        path = site.path(node)
        words = tuple(word for other in site.chain if other in path and (word := _word(other, site)))
        found.setdefault(words, Counter())[loss(node)] += 1
    ways = [" -> ".join((*words, " + ".join(map(_counted, last.items())))) for words, last in found.items()]
    return " -> ".join([head(site.logits), "; -> ".join(ways)] if ways else [head(site.logits)])


def _counted(of: tuple[str, int]) -> str:
    word, count = of
    return word if count == 1 else f"{count} x {word}"


def head(logits: DeferredLogits) -> str:
    """ "lm_head [V=50304, D=768]"."""
    bias = ", bias" if logits.biases else ""
    return f"{_name_of_head(logits)} [V={logits.vocab_size}, D={logits.width}{bias}]"


def _name_of_head(logits: DeferredLogits) -> str:
    """The module that makes the product where that is a Linear, else the weight, as the program calls them."""
    modules = list((logits.matmul.meta.get("nn_module_stack") or {}).values())
    if modules and isinstance(modules[-1][1], type) and issubclass(modules[-1][1], torch.nn.Linear):
        return _short(modules[-1][0])
    weight = logits.weight.source
    while isinstance(weight, Joined):
        weight = weight.parts[0].source
    return name(weight).removesuffix(".weight")


def name(node: Node) -> str:
    """What the user calls the value of a node, as far as Dynamo has kept that."""
    source = source_name(node)
    return node.name if source is None else _short(source)


def _short(source: str) -> str:
    """Dynamo's name of a value without what it is found through: L['self']._modules['head'] is "head"."""
    parts = [a or b for a, b in re.findall(r"\['?([^'\]]+)'?\]|\.(\w+)", source)]
    if "cell_contents" in parts:
        parts = parts[parts.index("cell_contents") + 1 :] or parts
    elif parts[1:] and parts[0] in ("self", "fn", "mod", "module"):
        parts = parts[1:]
    return ".".join(part for part in parts if not part.startswith("_") and part != "orig_mod") or source


def loss(node: Node) -> str:
    """An operation at the end of a way, with what matters of its arguments."""
    words = _LOSSES.get(operation(node))
    try:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        given = {}
    if words is None:
        over = operation(node) in ("sum", "mean", "max", "amax", "argmax")
        return f"{operation(node)} over the vocabulary" if over else operation(node)
    reduction = given.get("reduction", "mean")
    words = f"{words} of each row" if reduction == "none" else f"{reduction} {words}"
    words += f", ignore_index {given.get('ignore_index', -100)}"
    words += ", class weights" if given.get("weight") is not None else ""
    return words + (f", label smoothing {given['label_smoothing']:g}" if given.get("label_smoothing") else "")


def _word(node: Node, site: "Site") -> str:
    """What a node does to the logits on their way; "" for what only arranges them."""
    base, output = out_of_place(operation(node)), tensor_of(node)
    source: Any = next((n for n in node.all_input_nodes if n in site.chain), None)
    if node is site.logits.matmul or source is None or base in _UNSAID:
        return ""
    if base in _SYMBOLS and len(node.args) == 2:
        left, right = (_operand(arg, site) for arg in node.args)
        return f"{left} {_SYMBOLS[base]} {right}".removeprefix("x ")
    if base == "getitem":
        return f"[{_index(node.args[1])}]" if tensor_of(source) is not None else ""
    dtype = tensor_of(source).dtype if tensor_of(source) is not None else None
    if base in ("to", "float", "half", "bfloat16", "double", "type_as"):
        return "" if output is None or output.dtype == dtype else str(output.dtype).removeprefix("torch.")
    constants = [str(arg) for arg in node.args if isinstance(arg, int | float)]
    constants += [f"{key}={arg}" for key, arg in node.kwargs.items() if isinstance(arg, int | float)]
    return f"{base}({', '.join(constants)})" if constants else base


def _operand(arg: Any, site: "Site") -> str:
    if not isinstance(arg, Node):
        return str(arg)
    return "x" if arg in site.chain else name(arg)


def _index(index: Any) -> str:
    if isinstance(index, tuple | list):
        return ", ".join(map(_index, index))
    if isinstance(index, slice):
        ends = ("" if end is None else _index(end) for end in (index.start, index.stop))
        return ":".join(ends) + ("" if index.step is None else f":{index.step}")
    return "..." if index is Ellipsis else str(index)
