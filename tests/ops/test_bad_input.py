"""What cannot be right raises what eager PyTorch raises; what is merely odd gives what eager gives."""

from dataclasses import replace

import cases
import pytest
import torch
import torch.nn.functional as F

from cce_inductor.ops import cuda, losses
from cce_inductor.ops.library import scaled_loss, vocab_reductions
from cce_inductor.ops.problem import Problem


def call(case, **changes):
    names = ("hidden", "weight", "bias", "target", "total_weight")
    tensors = dict(zip(names, case.tensors, strict=True)) | {k: v for k, v in changes.items() if k in names}
    options = case.options | {k: v for k, v in changes.items() if k not in names}
    return vocab_reductions(*tensors.values(), **options)


CASE = cases.Case(6, 20, 4)
SEVERAL = cases.Case(6, 20, 4, picks=3)


@pytest.mark.parametrize("target", [20, -1, -101, 2**40])
def test_a_target_outside_the_vocabulary_raises_cross_entropys_error(target):
    targets = torch.full((6,), target)
    with pytest.raises(IndexError) as eager:
        F.cross_entropy(CASE.hidden @ CASE.weight.T, targets)
    with pytest.raises(IndexError) as ours:
        call(CASE, target=targets)
    assert str(ours.value) == str(eager.value)


def test_one_of_several_targets_outside_the_vocabulary():
    targets = SEVERAL.targets.clamp(0)
    targets[4, 1] = 20
    with pytest.raises(RuntimeError, match="index 20 is out of bounds for dimension 1 with size 20"):
        call(SEVERAL, target=targets, ignore_index=None)


@cases.interpreted
@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("place", [(0, 0), (4, 1), (5, 2)])
def test_one_of_several_targets_outside_the_vocabulary_in_the_kernels(place, ignore_index):
    problem = Problem.of(*SEVERAL.tensors, **SEVERAL.options)
    targets = SEVERAL.targets.clamp(0)
    targets[place] = 20
    with pytest.raises(RuntimeError, match="a target lies outside"):
        cuda.reduce(replace(problem, target=targets, ignore_index=ignore_index))


def test_a_loss_with_its_gradients_takes_one_target_a_row():
    options = {name: CASE.options[name] for name in ("logit_map", "ignore_index", "compute_dtype", "workspace_mib")}
    with pytest.raises(ValueError, match="a target and a coefficient a row are needed, got 2-D and 1-D"):
        scaled_loss(*SEVERAL.tensors[:4], torch.ones(6), needs_grad=[True, True, True], **options)


@pytest.mark.parametrize("target", [20, -1, 2**40])
def test_without_an_ignore_index_it_raises_gathers_error(target):
    targets = torch.full((6,), target)
    with pytest.raises(RuntimeError) as eager:
        (CASE.hidden @ CASE.weight.T).gather(1, targets.unsqueeze(1))
    with pytest.raises(RuntimeError) as ours:
        call(CASE, target=targets, ignore_index=None)
    assert str(ours.value) == str(eager.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.randn(6, 5)}, RuntimeError, "cannot be multiplied"),
        ({"hidden": torch.randn(6)}, RuntimeError, "must be 2-D"),
        ({"weight": torch.randn(4)}, RuntimeError, "must be 2-D"),
        ({"bias": torch.randn(21)}, RuntimeError, "bias has 21 entries for a vocabulary of 20"),
        ({"bias": torch.randn(20, 1)}, RuntimeError, "bias must be 1-D"),
        ({"total_weight": torch.randn(3)}, RuntimeError, "class weight has 3 entries"),
        ({"target": torch.zeros(5, dtype=torch.long)}, ValueError, "to match target batch_size"),
        ({"target": torch.zeros(6, 1, 1, dtype=torch.long)}, ValueError, "targets must be 1-D, or 2-D"),
        ({"target": torch.zeros(6, dtype=torch.int32)}, RuntimeError, "int64 or uint8"),
        ({"target": torch.zeros(6)}, RuntimeError, "int64 or uint8"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.long)}, RuntimeError, "hidden must be of a floating-point dtype"),
        ({"bias": torch.zeros(20, dtype=torch.long)}, RuntimeError, "bias must be of a floating-point dtype"),
        ({"compute_dtype": torch.float8_e4m3fn}, RuntimeError, "not supported"),
        ({"weight": torch.randn(20, 4, device="meta")}, RuntimeError, "same device"),
        ({"logit_map": "sin(z)"}, ValueError, "not part of a logit map"),
    ],
)
def test_operands_that_do_not_fit_raise(changes, error, message):
    with pytest.raises(error, match=message):
        call(CASE, **changes)
    with pytest.raises(error, match=message):
        Problem.of(
            *({**dict(zip(NAMES, CASE.tensors, strict=True)), **changes}[name] for name in NAMES),
            **{**CASE.options, **{k: v for k, v in changes.items() if k not in NAMES}},
        )


NAMES = ("hidden", "weight", "bias", "target", "total_weight")


def test_targets_of_eight_bits_count_as_indices():
    targets = torch.arange(6)
    expected = call(CASE, target=targets)
    assert all(map(torch.equal, call(CASE, target=targets.to(torch.uint8)), expected))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 6])
def test_with_no_valid_token_the_loss_and_gradients_are_eagers(reduction, rows):
    case = cases.Case(rows, 20, 4, bias=False, total=False)
    case.targets = torch.full((rows,), -100)
    hidden, weight = (t.clone().requires_grad_() for t in case.tensors[:2])
    lse, picked, *_ = vocab_reductions(hidden, weight, *case.tensors[2:], **case.options)
    ours = losses.cross_entropy(lse, picked, None, case.targets, 20, reduction=reduction)
    logits = F.linear(hidden, weight)
    eager = F.cross_entropy(logits, case.targets, reduction=reduction)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.nan_to_num(), eager.nan_to_num())
    if reduction == "sum":
        gradients = torch.autograd.grad(ours, (hidden, weight))
        assert all(gradient.count_nonzero() == 0 for gradient in gradients)


@pytest.mark.parametrize("index", [(3, 1), (0, 0)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_loss_of_non_finite_operands_is_as_non_finite_as_eagers(index, value):
    case = cases.Case(6, 20, 4, total=False)
    for where in (case.hidden, case.weight):
        saved = where[index].clone()
        where[index] = value
        lse, picked, *_ = vocab_reductions(*case.tensors, **case.options)
        ours = losses.cross_entropy(lse, picked, None, case.targets, 20, reduction="none")
        eager = F.cross_entropy(F.linear(*case.tensors[:3]), case.targets, reduction="none")
        assert torch.equal(ours.isfinite(), eager.isfinite())
        torch.testing.assert_close(ours[eager.isfinite()], eager[eager.isfinite()])
        where[index] = saved
