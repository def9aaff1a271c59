"""`options={"verify": N}`: the first calls of a compiled program run both versions, ours and Inductor's, and compare.

Every result is compared, and where gradients are recorded those of all arguments, for gradients of the results that
are drawn at random (one for a scalar). The runs take copies of the arguments and begin with the same state of the
random number generators, so the program goes on as if there had been none. A program that writes to an argument is
not verified, and a warning says so.

    ||ours - Inductor's|| <= 2 * (||Inductor's on nudged arguments - Inductor's|| + eps * ||Inductor's||)

is what is allowed, where eps is the rounding of the coarsest dtype of the program and a nudge moves each number by it
up or down: as far as rounding may take either version. It costs the time and memory of four training steps.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from .lazy_logits import LazyLogits

SLACK = 2  # two versions, each of which may round


class VerificationError(RuntimeError):
    """Raised by a compiled program under `verify` where it disagrees with Inductor's by more than rounding.

    The message has a line for each result and gradient.
    """


def copy_of(module: GraphModule) -> GraphModule:
    """A graph module that the pass may not change; parameters and buffers are the same."""
    clone = GraphModule(module, copy.deepcopy(module.graph))
    clone.meta = dict(module.meta)
    for name, child in module.named_children():
        if isinstance(child, GraphModule):
            setattr(clone, name, copy_of(child))
    return clone


class Verified:
    """A compiled program that compares itself with another version in its first calls."""

    def __init__(self, ours: Callable, original: Callable, module: GraphModule, calls: int) -> None:
        """module: the graph of the original version, as Dynamo made it."""
        self._ours, self._original, self._calls = ours, original, calls
        self._names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        self._eps = max(_epsilons(module), default=0.0)

    def __call__(self, *args: Any) -> Any:
        if self._calls > 0:
            self._calls -= 1
            self._verify(args)
            if self._calls == 0:
                self._original = self._ours  # whose memory is not needed any longer
        return self._ours(*args)

    def _verify(self, args: tuple) -> None:
        ours = _run(self._ours, args, 0.0)
        changed = [name for name, arg, used in zip(self._names, args, ours.args, strict=True) if not _same(arg, used)]
        if changed:
            self._calls = 0
            reason = f"cce_inductor: this program is not verified, as it writes to {', '.join(changed)} in place"
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return
        theirs = _run(self._original, args, 0.0, ours.differentiable)
        nudged = _run(self._original, args, self._eps, ours.differentiable)
        lines, wrong = [], 0
        for label, tensors in self._pairs(ours, theirs, nudged):
            line, agrees = _compared(label, self._eps, *tensors)
            lines.append(line)
            wrong += not agrees
        if wrong:
            raise VerificationError(
                f"cce_inductor and Inductor disagree in {wrong} of {len(lines)} results and gradients by more than "
                "rounding:\n" + "\n".join(lines)
            )

    def _pairs(self, *runs: "_Run") -> Iterator[tuple[str, tuple]]:
        """(what it is, ours, Inductor's, Inductor's on nudged arguments) of each result and gradient."""
        for i, results in enumerate(zip(*(run.results for run in runs), strict=True)):
            if isinstance(results[0], Tensor):
                yield f"result {i}", results
        for name, *gradients in zip(self._names, *(run.gradients for run in runs), strict=True):
            if any(gradient is not None for gradient in gradients):
                yield f"gradient of {name}", tuple(gradients)


@dataclass(frozen=True)
class _Run:
    """What a run took and gave."""

    args: list[Any]
    results: list[Any]
    gradients: list[Tensor | None]  # of each argument
    differentiable: list[int]  # the results whose gradients were given


def _run(function: Callable, args: tuple, nudge: float, differentiable: list[int] | None = None) -> _Run:
    """differentiable: the results to take gradients of; by default all but lazy logits, whose gradient is a matmul."""
    with _unchanged_generators(args):
        taken = [_copied(arg, nudge, seed) for seed, arg in enumerate(args)]
        results = list(function(*taken))
        if differentiable is None:
            differentiable = [i for i, result in enumerate(results) if _has_gradient(result)]
        leaves = [i for i, arg in enumerate(taken) if isinstance(arg, Tensor) and arg.requires_grad]
        gradients: list[Tensor | None] = [None] * len(taken)
        if differentiable and leaves:
            outputs = [results[i] for i in differentiable]
            weights = [_cotangent(output, seed) for seed, output in enumerate(outputs)]
            found = torch.autograd.grad(outputs, [taken[i] for i in leaves], weights, allow_unused=True)
            for i, gradient in zip(leaves, found, strict=True):
                gradients[i] = None if gradient is None else gradient.clone()
        # a CUDA graph writes its results to the same place the next time
        results = [result.detach().clone() if isinstance(result, Tensor) else result for result in results]
    return _Run(taken, results, gradients, differentiable)


def _has_gradient(result: Any) -> bool:
    return isinstance(result, Tensor) and result.requires_grad and not isinstance(result, LazyLogits)


def _copied(arg: Any, nudge: float, seed: int) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    with torch.no_grad():
        tensor = arg.detach().clone()
        if tensor.stride() != arg.stride():  # compiled code relies on strides; such a view is not nudged
            tensor = torch.empty(0, dtype=arg.dtype, device=arg.device)
            tensor.set_(arg.untyped_storage().clone(), arg.storage_offset(), arg.size(), arg.stride())
        elif nudge and tensor.is_floating_point():
            tensor *= 1 + nudge * (1 - 2 * _random(tensor, seed).round())
    return tensor.requires_grad_(arg.requires_grad)


def _cotangent(output: Tensor, seed: int) -> Tensor:
    return torch.ones_like(output) if output.dim() == 0 else (_random(output, seed) - 0.5).to(output.dtype)


def _random(tensor: Tensor, seed: int) -> Tensor:
    """Numbers in [0, 1) that are the same each time and leave the program's generators alone."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.rand(tensor.shape, generator=generator, device=tensor.device)


def _unchanged_generators(args: tuple) -> Any:
    """What runs inside leaves the state of all random number generators as it was."""
    devices = {arg.device.index for arg in args if isinstance(arg, Tensor) and arg.is_cuda}
    return torch.random.fork_rng(devices=sorted(devices), device_type="cuda")


def _same(arg: Any, used: Any) -> bool:
    if not isinstance(arg, Tensor):
        return True
    arg, used = arg.detach(), used.detach()
    return bool(((arg == used) | ((arg != arg) & (used != used))).all())


def _epsilons(module: GraphModule) -> Iterator[float]:
    """The rounding of every floating-point dtype of a graph."""
    for child in module.modules():
        for node in child.graph.nodes if isinstance(child, GraphModule) else ():
            value = node.meta.get("example_value")
            if isinstance(value, Tensor) and value.is_floating_point():
                yield torch.finfo(value.dtype).eps


def _compared(
    label: str, eps: float, ours: Tensor | None, theirs: Tensor | None, nudged: Tensor | None
) -> tuple[str, bool]:
    """A line of the report, and whether the two agree."""
    if ours is None or theirs is None or nudged is None:
        return f"  {label}: only one of the two versions has it  <-- wrong", False
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        return (
            f"  {label}: {ours.dtype} {list(ours.shape)} is not {theirs.dtype} {list(theirs.shape)}  <-- wrong",
            False,
        )
    if not theirs.is_floating_point():
        same = torch.equal(ours, theirs)
        return f"  {label}: {'the same' if same else 'differs  <-- wrong'}", same
    finite = [bool(tensor.isfinite().all()) for tensor in (ours, theirs)]
    if finite[0] != finite[1]:
        return (
            f"  {label}: {'Inductor' if finite[0] else 'cce_inductor'} gives inf or nan, the other does not  <-- wrong",
            False,
        )
    ours, theirs, nudged = (tensor.double().nan_to_num(0.0, 0.0, 0.0) for tensor in (ours, theirs, nudged))
    size = float(theirs.norm())
    off, allowed = float((ours - theirs).norm()), SLACK * (float((nudged - theirs).norm()) + eps * size)
    agrees = off <= allowed
    mark = "" if agrees else "  <-- wrong"
    return f"  {label}: differs by {off:.3g} of {size:.3g}, allowed {allowed:.3g}{mark}", agrees
