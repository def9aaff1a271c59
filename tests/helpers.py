"""Compiles small programs with the pass, without Inductor, and holds them against eager PyTorch.

A program is a function of tensors and modules. `check` says that it is rewritten and right, `check_refused` that it is
left alone for a reason and right.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from cce_inductor import Options, Report
from cce_inductor.compat import size_hint
from cce_inductor.graph import driver
from cce_inductor.graph.returned import LazyResults
from cce_inductor.ops.library import scaled_loss, vocab_reductions

OPTIONS = {"min_vocab": 0, "min_logits_bytes": 0, "min_flops": 0}  # of torch.compile, to rewrite everything
EVERYTHING = Options(**OPTIONS)
# [B, S, D] hidden states and [V, D] weights; no two sizes are equal, and there are more rows than the width, so that
# the logits are the largest tensor of a program.
B, S, D, V = 3, 7, 8, 53


def hidden(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    """Hidden states of the given shape, [B, S, D] where there is none."""
    return _random(shape or (B, S, D), dtype, requires_grad, seed=1)


def weight(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    return _random(shape or (V, D), dtype, requires_grad, seed=2)


def bias(*shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> Tensor:
    return _random(shape or (V,), dtype, requires_grad, seed=3)


def labels(*shape: int, classes: int = V, ignored: int | None = None, every: int = 3) -> Tensor:
    """Class indices; every third one is `ignored` where that is given."""
    shape = shape or (B, S)
    target = torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(4))
    if ignored is not None:
        target.view(-1)[::every] = ignored
    return target


def _random(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_(requires_grad)


# ---------------------------------------------------------------------------------------------------- running programs


@dataclass
class Run:
    """What one run of a program gave."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]  # of every leaf that requires one, None where eager gives none
    arguments: list[Tensor]  # as the program leaves them
    requires_grad: list[bool]  # of the outputs
    rng_state: Tensor  # after the forward


@dataclass
class Compiled(Run):
    """The same with the pass, the compiled program, what the pass said, and its graphs before and after."""

    function: Callable
    report: Report = field(default_factory=Report)
    before: list["Snapshot"] = field(default_factory=list)
    after: list["Snapshot"] = field(default_factory=list)
    modules: list[GraphModule] = field(default_factory=list)

    @property
    def operator_calls(self) -> list[Node]:
        return [
            node
            for module in self.modules
            for node in nodes_of(module)
            if node.target in (vocab_reductions, scaled_loss)
        ]


@dataclass(frozen=True)
class Snapshot:
    """One graph as text, the elements of its largest input, and of the largest tensor that it computes."""

    text: str
    largest_input: int
    largest_computed: int
    dtypes: frozenset[torch.dtype]

    @classmethod
    def of(cls, module: GraphModule) -> "Snapshot":
        inputs, computed, dtypes = [0], [0], set()
        for node in nodes_of(module):
            for tensor in tensors_of(node.meta.get("example_value")):
                (inputs if node.op in ("placeholder", "get_attr") else computed).append(elements(tensor))
                dtypes.add(tensor.dtype)
        text = "\n".join(str(graph.graph) for graph in graph_modules(module))
        return cls(text, max(inputs), max(computed), frozenset(d for d in dtypes if d.is_floating_point))


def graph_modules(module: GraphModule) -> Iterator[GraphModule]:
    """A graph module and the subgraphs of its higher-order operators."""
    return (child for child in module.modules() if isinstance(child, GraphModule))


def nodes_of(module: GraphModule) -> Iterator[Node]:
    return (node for child in graph_modules(module) for node in child.graph.nodes)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)


def elements(tensor: Tensor) -> int:
    """The number of elements in the run that was traced; dynamic sizes count as they are in it."""
    return math.prod(size_hint(size) or 0 for size in tensor.shape)


def run_eager(function: Callable, args: tuple) -> Run:
    return _run(function, copy.deepcopy(args))


def run_float64(function: Callable, args: tuple) -> Run:
    """The reference: the same program on float64 inputs, without any of its casts."""
    with _Float64():
        return _run(function, tuple(_double(arg) for arg in copy.deepcopy(args)))


def run_compiled(
    function: Callable,
    *args: Any,
    options: Options = EVERYTHING,
    dynamic: bool | None = None,
    lower: Callable | None = None,
    fullgraph: bool = True,
) -> Compiled:
    """Compiled by the pass; then uncompiled graphs, or `lower(gm, inputs)` where given."""
    report, before, after, modules = Report(), [], [], []

    def backend(module: GraphModule, inputs: list[Any]) -> Callable:
        before.append(Snapshot.of(module))
        lazy = LazyResults(module.graph)
        report.extend(driver.rewrite_module(module, options, lazy))
        after.append(Snapshot.of(module))
        modules.append(module)
        return lazy.around(module.forward if lower is None else lower(module, inputs))

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    run = _run(compiled, copy.deepcopy(args))
    return Compiled(**vars(run), function=compiled, report=report, before=before, after=after, modules=modules)


def _run(function: Callable, args: tuple) -> Run:
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes the stack for each kind of GPU, which takes longer
    outputs = list(tensors_of(function(*args)))
    rng_state = torch.get_rng_state()
    differentiable = [output for output in outputs if output.requires_grad]
    leaves = list(leaves_of(args))
    gradients: list[Tensor | None] = [None for _ in leaves]
    if differentiable and leaves:
        weights = [_cotangent(output, i) for i, output in enumerate(differentiable)]
        gradients = list(torch.autograd.grad(differentiable, leaves, weights, allow_unused=True))
    return Run(
        [output.detach() for output in outputs],
        gradients,
        [argument.detach() for argument in tensors_of(args)],
        [output.requires_grad for output in outputs],
        rng_state,
    )


def leaves_of(args: Any) -> Iterator[Tensor]:
    """The tensors and parameters that require gradients, each once."""
    found: dict[int, Tensor] = {}
    for arg in args:
        parts = arg.parameters() if isinstance(arg, torch.nn.Module) else tensors_of(arg)
        found |= {id(part): part for part in parts if part.requires_grad}
    return iter(found.values())


def _cotangent(output: Tensor, seed: int) -> Tensor:
    """Numbers in eighths, which every dtype holds exactly; one for a scalar."""
    if output.dim() == 0 and seed == 0:
        return torch.ones_like(output)
    eighths = torch.randint(-8, 9, output.shape, generator=torch.Generator().manual_seed(seed))
    return (eighths / 8).to(output.dtype)


def _double(arg: Any) -> Any:
    if isinstance(arg, torch.nn.Module):
        return arg.double()
    if isinstance(arg, tuple | list):
        return type(arg)(map(_double, arg))
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.detach().double().requires_grad_(arg.requires_grad)
    return arg


class _Float64(TorchFunctionMode):
    """Turns the casts of a program into nothing, so that float64 inputs make a float64 program."""

    CASTS = (Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.type)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        if func in self.CASTS and args[0].dtype == torch.float64:
            return args[0].clone()  # a cast makes a copy; it may be written in place
        return func(*map(_widened, args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


# --------------------------------------------------------------------------------------------------------- comparisons


def check(
    function: Callable,
    *args: Any,
    rewrites: int = 1,
    calls: int = 1,
    logits_in_memory: bool = False,
    refusals: int = 0,
    **how: Any,
) -> Compiled:
    """Asserts that a program is rewritten, into so many operator calls, and still does what eager does.

    logits_in_memory: whether the logits may stay the largest tensor, because the program is too small or keeps them.
    how: arguments for `run_compiled`.
    """
    ours = run_compiled(function, *args, **how)
    assert len(ours.report.rewritten) == rewrites, ours.report
    assert len(ours.report.refused) == refusals, ours.report
    assert len(ours.operator_calls) == calls
    if not logits_in_memory:
        for before, after in zip(ours.before, ours.after, strict=True):
            assert before.largest_computed > before.largest_input, "the logits should be the largest tensor"
            assert after.largest_computed <= after.largest_input, f"there are logits in\n{after.text}"
    assert_like_eager(ours, function, args)
    return ours


def check_refused(
    function: Callable,
    *args: Any,
    operation: str,
    reason: str,
    marker: str | None = "# <-",
    by_choice: bool = False,
    refusals: int = 1,
    **how: Any,
) -> Compiled:
    """Asserts that a program is left exactly as it was, for a reason that names its line.

    marker: a comment on the line of the program that the refusal should name; None for a program without lines.
    """
    ours = check_left_alone(function, *args, **how)
    assert len(ours.report.refused) == refusals, ours.report
    refusal = ours.report.refused[0]
    assert (refusal.operation, refusal.by_choice) == (operation, by_choice), refusal
    assert reason in str(refusal), refusal
    if marker is not None:
        assert refusal.location == line_of(function, marker), refusal
    return ours


def check_left_alone(function: Callable, *args: Any, **how: Any) -> Compiled:
    """Asserts that a program is left exactly as it was, and right."""
    ours = run_compiled(function, *args, **how)
    assert ours.report.rewritten == [], ours.report
    assert_untouched(ours)
    assert_like_eager(ours, function, args)
    return ours


def assert_untouched(ours: Compiled) -> None:
    assert [graph.text for graph in ours.after] == [graph.text for graph in ours.before]


def line_of(function: Callable, marker: str) -> str:
    """ "file:line" of the one line of a function that carries a comment."""
    lines, first = inspect.getsourcelines(function)
    [line] = [first + i for i, line in enumerate(lines) if marker in line]
    return f"{inspect.getsourcefile(function)}:{line}"


def assert_like_eager(ours: Compiled, function: Callable, args: tuple, theirs: Run | None = None) -> None:
    """Same shapes and dtypes, and no further from the float64 result than eager (or theirs), but for rounding.

    Rounding is as much as changes where the inputs change by a unit of rounding in the coarsest dtype of the program,
    or by D units in float32, which is what a logit, a sum of D products, may be wrong by; and the same of the result.
    Eager's distance is the largest of those for such inputs.
    """
    eps = max(torch.finfo(dtype).eps for graph in ours.before for dtype in graph.dtypes)
    _assert_close_runs(ours, theirs or run_eager(function, args), function, args, eps)


def assert_close_to_eager(ours: Callable, eager: Callable, args: tuple, rounding: torch.dtype | None = None) -> Tensor:
    """The same for a function of ours and one of eager PyTorch; gives our result.

    rounding: the coarsest dtype that they compute in, where it is not that of an argument.
    """
    dtypes = [rounding] if rounding else [t.dtype for t in tensors_of(args) if t.is_floating_point()]
    run = run_eager(ours, args)
    _assert_close_runs(run, run_eager(eager, args), eager, args, max(torch.finfo(dtype).eps for dtype in dtypes))
    return run.outputs[0]


def _assert_close_runs(ours: Run, theirs: Run, function: Callable, args: tuple, eps: float) -> None:
    exact = run_float64(function, args)
    eps += D * 2**-23
    # what happens beside these arguments says what rounding does to eager: to one result it may happen to do nothing
    beside = [tuple(_nudged(arg, eps, seed) for arg in copy.deepcopy(args)) for seed in range(3)]
    rounded, nearby = ([run(function, moved) for moved in beside] for run in (run_eager, run_float64))
    assert ours.requires_grad == theirs.requires_grad
    assert torch.equal(ours.rng_state, theirs.rng_state), "the random number generator is in another state"
    for name in ("outputs", "gradients", "arguments"):
        results = (getattr(run, name) for run in (ours, theirs, exact, *rounded, *nearby))
        for i, (mine, other, reference, *others) in enumerate(zip(*results, strict=True)):
            assert (mine is None) == (other is None), f"{name}[{i}]: only one of the two is None"
            if other is not None:
                pairs = list(zip(others[: len(beside)], others[len(beside) :], strict=True))
                _assert_close(f"{name}[{i}]", mine, other, reference, pairs, eps)


def _nudged(arg: Any, eps: float, seed: int) -> Any:
    """Inputs that differ by a share eps: each number up or down, as the seed says."""
    if isinstance(arg, torch.nn.Module):
        for parameter in arg.parameters():
            parameter.data = _nudged(parameter.data, eps, seed)
        return arg
    if isinstance(arg, tuple | list):
        return type(arg)(_nudged(part, eps, seed) for part in arg)
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    signs = torch.randint(0, 2, arg.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    moved = arg.detach().double() * (1 + eps * signs)
    return moved.to(arg.dtype).requires_grad_(arg.requires_grad)


def _assert_close(
    name: str, mine: Tensor, theirs: Tensor, exact: Tensor, nearby: list[tuple[Tensor, Tensor]], eps: float
) -> None:
    """nearby: what eager gives for arguments beside these, in their dtypes and in float64."""
    assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
    if not exact.dtype.is_floating_point:
        assert torch.equal(mine, theirs), name
        return
    assert torch.equal(mine.isnan(), theirs.isnan()), name
    error, *eagers = (_distance(*pair) for pair in ((mine, exact), (theirs, exact), *nearby))
    moved = max(_distance(near, exact) for _, near in nearby)
    allowed = max(eagers) + moved + eps * exact.nan_to_num().norm()
    assert error <= allowed, f"{name}: off by {error}, eager by {eagers}, allowed {allowed}"


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b).nan_to_num().norm()
