"""Problems for the operators, three ways to solve them, and what "no worse than eager" means in numbers.

exact   the specification in float64: `ops/reference.py`
eager   what PyTorch computes in the problem's dtype, logits and all
ours    an implementation of the operators
"""

import os
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops import reference
from cce_inductor.ops.problem import Problem, RowGradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_INTERPRETED = "there is a GPU, so Triton compiles: tests/ops/test_gpu.py runs the kernels on it"
interpreted = pytest.mark.skipif(not INTERPRETED, reason=NOT_INTERPRETED)

# tests of which an example takes a second have fewer than others, in every profile
costly = settings(max_examples=settings.default.max_examples * 3 // 5)

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
    picks: int | None = None  # how many targets a row, in a second dimension
    ignore_index: int | None = -100
    total: bool = True
    class_weight: bool = True
    max: bool = False
    entropy: bool = False
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
        self.grads = [self._vector(self.rows, self.accumulate_dtype) for _ in range(5)]
        if self.targets is not None and self.picks is not None:
            self.grads[1] = self._matrix(self.rows, self.picks).to(self.accumulate_dtype)
        self.options = {
            "logit_map": self.logit_map,
            "want_total": self.total,
            "ignore_index": self.ignore_index,
            "compute_dtype": self.compute_dtype,
            "workspace_mib": 1,
            "want_max": self.max,
            "want_entropy": self.entropy,
        }

    @property
    def names(self):
        """What `ours`, `exact` and `eager` give: the results, then the gradients."""
        results = ["lse", "picked", "total", *["maximum"] * self.max, *["entropy"] * self.entropy]
        return [*results, "grad_hidden", "grad_weight", *["grad_bias"] * self.bias]

    def row_gradients(self, results=None, target_logit=None):
        """What a backward starts from, after a forward that gave these results."""
        grad_lse, *others = (g.contiguous() for g in self.grads)
        if results is None:
            return RowGradients(grad_lse, *others[:2], target_logit=target_logit)
        return RowGradients(
            grad_lse * torch.exp(-results.lse_rest),
            *others[:2],
            maximum=others[2] if self.max else None,
            entropy=others[3] * torch.exp(-results.lse_rest) if self.entropy else None,
            argmax=results.argmax,
            row_entropy=results.entropy - results.lse_rest if self.entropy else None,
        )

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
        shape = (self.rows,) if self.picks is None else (self.rows, self.picks)
        targets = torch.randint(0, max(self.vocab, 1), shape, generator=self.generator)
        if self.ignore_index is not None:
            targets.view(-1)[self.seed % 3 :: 3] = self.ignore_index  # the first row in some cases, not in others
        return targets.to(self.device)


def ours(case, implementation, **changes):
    """The results of an implementation, `cpu` or `cuda`, and the gradients."""
    problem = case.problem(**changes)
    results = implementation.forward(problem)
    needs_grad = [True, True, case.bias]
    grads = case.row_gradients(results)
    gradients = implementation.backward(problem, results.lse, results.tiles, grads, needs_grad)
    wanted = [getattr(results, name) for name in case.names if not name.startswith("grad")]
    return [*wanted, *gradients[: 2 + case.bias]]


def exact(case):
    """The same in float64; operands rounded to the dtype of the matmuls first, as is part of the problem."""
    hidden, weight = (t.to(case.compute_dtype).double() for t in (case.hidden, case.weight))
    leaves = [t.detach().requires_grad_() for t in (hidden, weight, _double(case.bias_vector)) if t is not None]
    bias = leaves[2] if case.bias else None
    logit_map = LogitMap.parse(case.logit_map)
    lse, picked, total, maximum, _, entropy = reference.vocab_reductions(
        leaves[0], leaves[1], bias, case.targets, _double(case.class_weights), logit_map, case.ignore_index
    )
    results = (lse, picked, total if case.total else torch.zeros_like(total), maximum, entropy)
    return _with_gradients(case, results, leaves, [g.double() for g in case.grads])


def eager(case):
    """The same as PyTorch computes them, with the logits upcast before the loss, as models do."""
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
        index = _columns(case.targets.masked_fill(ignored, 0))
        picked = x.gather(1, index).view_as(case.targets).masked_fill(ignored, 0)
    if case.total:
        total = (x if case.class_weights is None else x * case.class_weights.to(x.dtype)).sum(1)
    log_p = x.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return _with_gradients(case, (lse, picked, total, x.max(1).values, entropy), leaves, case.grads)


def _columns(tensor):
    """[N] as [N, 1]; [N, K] as it is."""
    return tensor.unsqueeze(1) if tensor.dim() == 1 else tensor


def _double(tensor):
    return None if tensor is None else tensor.double()


def _with_gradients(case, results, leaves, grads):
    wanted = (True, True, True, case.max, case.entropy)
    results, grads = ([part for part, want in zip(parts, wanted, strict=True) if want] for parts in (results, grads))
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
    grad_lse, grad_picked, grad_total, *others = (_columns(g.double().abs()) for g in case.grads)
    log_p = (x - lse).clamp(min=-1000)
    surprise = log_p.abs() - (log_p.exp() * log_p).sum(1, keepdim=True)
    p = log_p.exp() * (grad_lse + (others[1] * (surprise + 1) if case.entropy else 0))
    onehot = torch.zeros_like(x)
    if case.target:
        index = _columns(case.targets.clamp(0, case.vocab - 1))
        onehot = onehot.scatter_add(1, index, grad_picked)
    if case.max:
        onehot = onehot + F.one_hot(x.argmax(1), case.vocab) * others[0]
    dz = slope * (p + onehot + (grad_total * class_weights if case.total else 0))
    row_scale = scale.amax(1) + lse.abs().squeeze(1)
    sums = slope * p * row_scale.unsqueeze(1) + dz * (1 + scale)
    dz_error = 4 * u[case.accumulate_dtype] * sums
    operand_error = u[case.compute_dtype] * dz + dz_error
    last = max(u[case.dtype], u[case.compute_dtype])
    return [
        4 * u[case.accumulate_dtype] * row_scale,
        (4 * u[case.accumulate_dtype] + cast_error) * row_scale * (case.picks or 1) ** 0.5,
        4 * u[case.accumulate_dtype] * (scale * class_weights).sum(1),
        *[4 * u[case.accumulate_dtype] * row_scale] * case.max,
        *[4 * u[case.accumulate_dtype] * (row_scale + 1) * (log_p.exp() * (surprise + 1)).sum(1)] * case.entropy,
        operand_error @ w.abs() + last * (dz @ w.abs()),
        operand_error.T @ h.abs() + last * (dz.T @ h.abs()),
        dz_error.sum(0) + last * dz.sum(0),
    ]


def assert_no_worse_than_eager(case, results, interpreted=False):
    """Every result has the right dtype and shape, and no larger an error than eager's, rounding aside."""
    assert_no_worse(case.names, results, exact(case), eager(case), uncertainty(case, interpreted))


def assert_no_worse(names, results, references, eagers, allowances):
    assert len(results) == len(references) == len(names)
    for name, mine, theirs, right, rounding in zip(names, results, eagers, references, allowances, strict=False):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
        error, eager_error = ((t.double() - right).norm() for t in (mine, theirs))
        assert error <= eager_error + rounding.norm(), f"{name}: {error:.2e}, eager's {eager_error:.2e}"
