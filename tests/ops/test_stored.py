"""Float32 on a GPU, through Triton's interpreter: logits that a product has put in memory, and `scaled_loss` of them."""

import cases
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_fallback import Broken
from test_kept_tiles import workspace_of
from test_scaled_loss import compute, eager, make, run
from triton.compiler.errors import CompilationError

from cce_inductor.compat import FakeTensorMode
from cce_inductor.kernels.config import INTERPRETER
from cce_inductor.ops import cpu, cuda, fallback, in_forward, stored
from cce_inductor.ops.problem import MIB, Problem

# the interpreter meets nan and infinity with numpy's warnings
pytestmark = [cases.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

TILE = INTERPRETER.block_v
WORKSPACES = {"slices": 1000, "groups": 8000, "whole": MIB}  # of 20 rows, 333 classes


@pytest.fixture(autouse=True, scope="module")
def as_on_a_gpu():
    """The way of a GPU on a CPU, with groups of few rows, and slices of one tile and more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "supported", stored.covers)
        patch.setattr(in_forward, "SMALL", 0)
        patch.setattr(in_forward, "GPU_LOGITS_SHARE", 1)
        patch.setattr(in_forward, "GPU_GROUP_ROWS", 3)
        patch.setattr(cuda, "COLUMN_MULTIPLE", TILE)
        patch.setattr(cuda, "NARROWEST_SLICE", TILE)
        yield


@pytest.fixture
def products(monkeypatch):
    """(rows, columns) of each block of logits that is computed."""
    seen, mm = [], torch.mm

    def noting(a, b, **how):
        seen.append((len(a), b.shape[1]))
        return mm(a, b, **how)

    monkeypatch.setattr(stored.torch, "mm", noting)
    return seen


@given(
    rows=st.integers(1, 37),
    vocab=st.integers(1, 150),
    width=st.integers(1, 48),
    logit_map=st.sampled_from((*cases.MAPS, "-0.5*z", "where(gt(z, 0.0), z, 0.1*z)")),
    bias=st.booleans(),
    ignore_index=st.sampled_from((-100, 0, None)),
    workspace=st.sampled_from((1, 3000, 10_000, MIB)),
    seed=st.integers(0, 9),
)
def test_it_is_no_worse_than_eager(rows, vocab, width, logit_map, bias, ignore_index, workspace, seed):
    how = {"logit_map": logit_map, "bias": bias, "ignore_index": ignore_index, "seed": seed}
    case = cases.Case(rows, vocab, width, total=False, class_weight=False, **how)
    leaves, target, coefficient, options = make(rows, vocab, width, **how)
    counted = coefficient if ignore_index is None else coefficient.masked_fill(target == ignore_index, 0.0)
    case.grads[:3] = [counted, -counted, torch.zeros_like(counted)]
    lse, picked, _, *gradients = cases.uncertainty(case)
    with workspace_of(workspace):
        ours = run(compute, leaves, target, coefficient, options)
    right, theirs = ([(v[0] - v[1]) @ counted.to(v[0]), *v[3:]] for v in (cases.exact(case), cases.eager(case)))
    allowed = [(lse + picked) @ counted.abs().double(), *gradients]
    names = ["loss", "grad_hidden", "grad_weight", *["grad_bias"] * bias]
    cases.assert_no_worse(names, ours, right, theirs, allowed)


@pytest.mark.parametrize(("workspace", "computed"), zip(WORKSPACES.values(), (1.0, 1.0, 1.0), strict=True), ids=WORKSPACES)
def test_no_logit_is_computed_twice_that_has_room(workspace, computed, products):
    """In groups, or in the memory of the weight's gradient, which is wider than there are rows."""
    problem = make(20, 333, 24)
    with workspace_of(workspace):
        run(compute, *problem)
    assert sum(rows * columns for rows, columns in products) == computed
