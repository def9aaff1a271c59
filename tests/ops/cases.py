"""Problems for the operators, three ways to solve them, and what "no worse than eager" means in numbers.

exact   the specification in float64: `ops/reference.py`
eager   what PyTorch computes in the problem's dtype, logits and all
ours    an implementation of the operators
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import reference
from cce_inductor.ops.problem import Problem

NAMES = ("lse", "picked", "total", "grad_hidden", "grad_weight", "grad_bias")
MAPS = ("z", "0.5*z", "z/3.0 + 0.25", "5.0*tanh(z/5.0)", "2.0*sigmoid(z)", "tanh(0.5*z) + 0.1*z")


@dataclass
class Case:
    """One problem; small integers describe it, so that hypothesis can print and shrink it."""

    rows: int
    vocab: int
    width: int
    dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype | None = None
    logit_map: str = "z"
    bias: bool = True
    target: bool = True
    ignore_index: int | None = -100
    total: bool = True
    class_weight: bool = True
    strides: str = "contiguous"  # or "transposed", "sliced", "expanded"
    seed: int = 0
    device: str = "cpu"
    options: dict = field(init=False)

    def __post_init__(self):
        self.compute_dtype = self.compute_dtype or self.dtype
        self.generator = torch.Generator().manual_seed(self.seed)
        self.hidden = self._matrix(self.rows, self.width)
        self.weight = self._matrix(self.vocab, self.width)
        self.bias_vector = self._vector(self.vocab, self.dtype) if self.bias else None
        self.class_weights = self._vector(self.vocab, torch.float32).abs() if self.class_weight else None
        self.targets = self._targets() if self.target else None
        self.grads = [self._vector(self.rows, self.accumulate_dtype) for _ in range(3)]
        self.options = {
            "logit_map": self.logit_map,
            "want_total": self.total,
            "ignore_index": self.ignore_index,
            "compute_dtype": self.compute_dtype,
            "workspace_mib": 1,
        }

    @property
    def accumulate_dtype(self):
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def tensors(self):
        """The operator's positional arguments."""
        return self.hidden, self.weight, self.bias_vector, self.targets, self.class_weights

    def problem(self, **changes):
        return replace(Problem.of(*self.tensors, **self.options), **changes)

    def _random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def _vector(self, size, dtype):
        if self.strides == "expanded":
            return self._random(1).to(self.device, dtype).expand(size)
        step = 1 if self.strides == "contiguous" else 2
        return self._random(size * step).to(self.device, dtype)[::step]

    def _matrix(self, rows, columns):
        match self.strides:
            case "transposed":
                return self._random(columns, rows).to(self.device, self.dtype).T
            case "sliced":
                return self._random(rows, 2 * columns + 1).to(self.device, self.dtype)[:, 1::2]
            case "expanded":
                return self._random(1, columns).to(self.device, self.dtype).expand(rows, columns)
        return self._random(rows, columns).to(self.device, self.dtype)

    def _targets(self):
        targets = torch.randint(0, max(self.vocab, 1), (self.rows,), generator=self.generator)
        if self.ignore_index is not None:
            targets[::3] = self.ignore_index
        return targets.to(self.device)


def ours(case, implementation, **changes):
    """The six results of an implementation, `cpu` or `cuda`; None where there is nothing to give."""
    problem = case.problem(**changes)
    *results, lse_rest, tile_lse = implementation.forward(problem)
    grad_lse, *others = (g.contiguous() for g in case.grads)
    grads = [grad_lse * torch.exp(-lse_rest), *others]
    needs_grad = [True, True, case.bias]
    gradients = implementation.backward(problem, results[0], tile_lse, grads, needs_grad)
    return [*results, *gradients[: 2 + case.bias]]


def exact(case):
    """The six results in float64; operands rounded to the dtype of the matmuls first, as is part of the problem."""
    hidden, weight = (t.to(case.compute_dtype).double() for t in (case.hidden, case.weight))
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, _double(case.bias_vector)) if t is not None]
    bias = leaves[2] if case.bias else None
    logit_map = LogitMap.parse(case.logit_map)
    results = reference.vocab_reductions(
        leaves[0], leaves[1], bias, case.targets, _double(case.class_weights), logit_map, case.ignore_index
    )
    results = (*results[:2], results[2] if case.total else torch.zeros_like(results[2]))
    return _with_gradients(results, leaves, [g.double() for g in case.grads])


def eager(case):
    """The six results as PyTorch computes them, with the logits upcast before the loss, as models do."""
    leaves = [t.detach().clone().requires_grad_() for t in case.tensors[:3] if t is not None]
    logits = F.linear(leaves[0].to(case.compute_dtype), leaves[1].to(case.compute_dtype)).to(case.accumulate_dtype)
    if case.bias:
        logits = logits + leaves[2]
    x = LogitMap.parse(case.logit_map)(logits)
    lse = x.logsumexp(1)
    picked = total = torch.zeros_like(lse)
    if case.target:
        ignored = torch.zeros_like(case.targets, dtype=torch.bool)
        if case.ignore_index is not None:
            ignored = case.targets == case.ignore_index
        picked = x.gather(1, case.targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1).masked_fill(ignored, 0)
    if case.total:
        total = (x if case.class_weights is None else x * case.class_weights.to(x.dtype)).sum(1)
    return _with_gradients((lse, picked, total), leaves, case.grads)


def _double(tensor):
    return None if tensor is None else tensor.double()


def _with_gradients(results, leaves, grads):
    used = [(r, g) for r, g in zip(results, grads, strict=True) if r.requires_grad]
    gradients = torch.autograd.grad([r for r, _ in used], leaves, [g for _, g in used])
    return [t.detach() for t in (*results, *gradients)]


def uncertainty(case, interpreted=False):
    """How far rounding alone may move each result, in float64: half an epsilon of every intermediate.

    A logit is a sum of terms of size |h| |w|; its error moves x by |f'| times that, a probability by as much relative
    to itself. dz is rounded to the dtype of the matmuls, and so is each gradient, as under autocast, or to its
    own. Triton's interpreter cuts float32 off where it casts to bfloat16: a whole epsilon, for the target's weight too.
    """
    u = {dtype: torch.finfo(dtype).eps / 2 for dtype in (case.dtype, case.compute_dtype, case.accumulate_dtype)}
    cast_error = 0.0
    if interpreted and case.compute_dtype == torch.bfloat16:
        u[torch.bfloat16] *= 2
        cast_error = u[torch.bfloat16] if case.dtype != torch.bfloat16 else 0.0
    h, w = (t.to(case.compute_dtype).double() for t in (case.hidden, case.weight))
    b = 0 if case.bias_vector is None else case.bias_vector.double()
    x, slope = LogitMap.parse(case.logit_map).value_and_derivative(h @ w.T + b)
    slope = torch.ones_like(x) if slope is None else slope.abs()
    scale = slope * (h.abs() @ w.abs().T + abs(b)) + x.abs()  # of a logit
    lse = x.logsumexp(1, keepdim=True)
    class_weights = 1.0 if case.class_weights is None else case.class_weights.double()
    grad_lse, grad_picked, grad_total = (g.double().abs().unsqueeze(1) for g in case.grads)
    p = (x - lse).exp() * grad_lse
    onehot = torch.zeros_like(x)
    if case.target:
        onehot = F.one_hot(case.targets.clamp(0, case.vocab - 1), case.vocab).double() * grad_picked
    dz = slope * (p + onehot + (grad_total * class_weights if case.total else 0))
    row_scale = scale.amax(1) + lse.abs().squeeze(1)
    sums = slope * p * row_scale.unsqueeze(1) + dz * (1 + scale)
    dz_error = 4 * u[case.accumulate_dtype] * sums
    operand_error = u[case.compute_dtype] * dz + dz_error
    last = max(u[case.dtype], u[case.compute_dtype])
    return [
        4 * u[case.accumulate_dtype] * row_scale,
        (4 * u[case.accumulate_dtype] + cast_error) * row_scale,
        4 * u[case.accumulate_dtype] * (scale * class_weights).sum(1),
        operand_error @ w.abs() + last * (dz @ w.abs()),
        operand_error.T @ h.abs() + last * (dz.T @ h.abs()),
        dz_error.sum(0) + last * dz.sum(0),
    ]


def assert_no_worse_than_eager(case, results, interpreted=False):
    """Every result has the right dtype and shape, and no larger an error than eager's, rounding aside."""
    assert_no_worse(results, exact(case), eager(case), uncertainty(case, interpreted))


def assert_no_worse(results, references, eagers, allowances):
    assert len(results) == len(references)
    for name, mine, theirs, right, rounding in zip(NAMES, results, eagers, references, allowances, strict=False):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        error, eager_error = ((t.double() - right).norm() for t in (mine, theirs))
        assert error <= eager_error + rounding.norm(), f"{name}: {error:.2e}, eager's {eager_error:.2e}"
