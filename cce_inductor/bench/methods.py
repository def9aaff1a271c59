"""What is compared: the mean cross-entropy of a linear head, computed in different ways."""

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
    """make: builds the loss, or raises UnavailableError. about: a few words for the legend.

    ours: whether it is this package. approximate_mass: what a sparse plan of it is asked for, None for the default.
    """

    make: Callable[[], Loss]
    about: str
    ours: bool = False
    approximate_mass: float | None = None


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As most public models write it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _auto_chunker() -> Loss:
    if "auto_chunker.enable" not in inductor_option_names():
        raise UnavailableError(f"torch {torch.__version__} has no auto_chunker")
    return torch.compile(eager, dynamic=False, options={"auto_chunker.enable": True})


def _torch_chunked() -> Loss:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnavailableError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options())


def _cce(**options: Any) -> Callable[[], Loss]:
    """The backend with its defaults but for the given options."""
    return lambda: torch.compile(
        eager, backend=cce_inductor.cce_backend, dynamic=False, options={"on_refusal": "raise", **options}
    )


def _from(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise UnavailableError(f"not installed: {error}") from None


def _cut_cross_entropy(**options: Any) -> Callable[[], Loss]:
    def make() -> Loss:
        function = _from("cut_cross_entropy", "linear_cross_entropy")
        return lambda hidden, weight, target: function(hidden, weight, target, **options)

    return make


def _liger() -> Loss:
    function = _from("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return lambda hidden, weight, target: function.apply(hidden, weight, target)[0]


def _quack() -> Loss:
    function = _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, target: function(hidden, weight, target, tuned=False)


METHODS = {
    BASELINE: Method(lambda: torch.compile(eager, dynamic=False), "torch.compile with Inductor"),
    "eager": Method(lambda: eager, "PyTorch without a compiler"),
    "auto-chunker": Method(_auto_chunker, "Inductor with its auto_chunker"),
    "torch-chunked": Method(_torch_chunked, "F.linear_cross_entropy, chunked"),
    "cce": Method(_cce(), "this package, all defaults", ours=True),
    "cce-exact": Method(_cce(approximate_mass=0.0), "approximate_mass=0", True, 0.0),
    "cce-approx": Method(_cce(approximate_mass=2.0**-3), "approximate_mass=2**-3", True, 2.0**-3),
    "cce-lean": Method(_cce(workspace_mib=LEAN_MIB), f"workspace_mib={LEAN_MIB}", ours=True),
    "cce-direct": Method(lambda: cce_inductor.linear_cross_entropy, "linear_cross_entropy, no compiler", ours=True),
    "cut-cross-entropy": Method(_cut_cross_entropy(), "Apple's package, its default filter"),
    "cut-cross-entropy-exact": Method(_cut_cross_entropy(filter_eps=None), "Apple's package without filter"),
    "liger": Method(_liger, "Liger's fused linear cross-entropy"),
    "quack": Method(_quack, "quack's chunked linear cross-entropy, not tuned"),
}
