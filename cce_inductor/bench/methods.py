"""What is compared: the mean cross-entropy of a linear head, its logits softly capped or not, in different ways."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cce_inductor

from ..compat import inductor_option_names

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss(hidden [N, D], weight [V, D], target [N]), the mean over rows whose target is not -100."""

BASELINE = "compile"
LEAN_MIB = 64


class UnavailableError(Exception):
    """A method that can't run here; says why."""


@dataclass(frozen=True)
class Method:
    """make: builds the loss for a soft cap, or None, or raises UnavailableError. about: a few words for the legend.

    ours: whether it is this package. approximate_mass: what a sparse plan of it is asked for, None for the default.
    """

    make: Callable[[float | None], Loss]
    about: str
    ours: bool = False
    approximate_mass: float | None = None


def eager(softcap: float | None) -> Loss:
    """As most public models write it, and Gemma 2 with a cap."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits.float(), target)

    return loss


def _uncapped(softcap: float | None) -> None:
    if softcap is not None:
        raise UnavailableError("it knows no soft cap")


def _auto_chunker(softcap: float | None) -> Loss:
    if "auto_chunker.enable" not in inductor_option_names():
        raise UnavailableError(f"torch {torch.__version__} has no auto_chunker")
    return torch.compile(eager(softcap), dynamic=False, options={"auto_chunker.enable": True})


def _torch_chunked(softcap: float | None) -> Loss:
    _uncapped(softcap)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options())


def _cce(**options: Any) -> Callable[[float | None], Loss]:
    """The backend with its defaults but for the given options."""
    options = {"on_refusal": "raise", **options}
    return lambda softcap: torch.compile(
        eager(softcap), backend=cce_inductor.cce_backend, dynamic=False, options=options
    )


def _direct(softcap: float | None) -> Loss:
    return functools.partial(cce_inductor.linear_cross_entropy, logit_map=logit_map(softcap))


def logit_map(softcap: float | None) -> str:
    """As this package writes it."""
    return "z" if softcap is None else f"{softcap} * tanh(z / {softcap})"


def _from(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from None


def _cut_cross_entropy(**options: Any) -> Callable[[float | None], Loss]:
    def make(softcap: float | None) -> Loss:
        return functools.partial(_from("cut_cross_entropy", "linear_cross_entropy"), softcap=softcap, **options)

    return make


def _liger(softcap: float | None) -> Loss:
    function = _from("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    # bias, weights of classes, ignore_index, squared log-sum-exps, label smoothing, reduction
    options = None, None, -100, 0.0, 0.0, "mean", softcap
    return lambda hidden, weight, target: function.apply(hidden, weight, target, *options)[0]


def _quack(softcap: float | None) -> Loss:
    _uncapped(softcap)
    function = _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target, tuned=False)


METHODS = {
    BASELINE: Method(lambda softcap: torch.compile(eager(softcap), dynamic=False), "torch.compile with Inductor"),
    "eager": Method(eager, "PyTorch without a compiler"),
    "auto-chunker": Method(_auto_chunker, "Inductor with its auto_chunker"),
    "torch-chunked": Method(_torch_chunked, "F.linear_cross_entropy, chunked"),
    "cce": Method(_cce(), "this package, all defaults", ours=True),
    "cce-exact": Method(_cce(approximate_mass=0.0), "approximate_mass=0", True, 0.0),
    "cce-approx": Method(_cce(approximate_mass=2.0**-3), "approximate_mass=2**-3", True, 2.0**-3),
    "cce-lean": Method(_cce(workspace_mib=LEAN_MIB), f"workspace_mib={LEAN_MIB}", ours=True),
    "cce-direct": Method(_direct, "linear_cross_entropy, no compiler", ours=True),
    "cut-cross-entropy": Method(_cut_cross_entropy(), "Apple's package, its default filter"),
    "cut-cross-entropy-exact": Method(_cut_cross_entropy(filter_eps=None), "Apple's package without filter"),
    "liger": Method(_liger, "Liger's fused linear cross-entropy"),
    "quack": Method(_quack, "quack's chunked linear cross-entropy, not tuned"),
}
