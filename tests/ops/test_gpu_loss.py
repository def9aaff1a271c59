"""The loss with its gradients on a GPU, over logits that are kept in 16 bits, or stored in float32."""

import pytest
import torch
import torch.nn.functional as F
from on_a_gpu import BF16, FP16, FP32, FP64, assert_captured, assert_same_bits, nothing_waits, plain, random

from cce_inductor.logit_map import LogitMap
from cce_inductor.ops.library import scaled_loss
from cce_inductor.ops.problem import MIB

pytestmark = pytest.mark.gpu


def mean_loss(hidden, weight, bias, target, logit_map="z", compute_dtype=BF16, workspace_mib=256, approximate_mass=0.0):
    """A cross-entropy by `scaled_loss`; of rows whose target is not -100."""
    counts = target != -100
    return scaled_loss(
        hidden,
        weight,
        bias,
        target,
        torch.where(counts, 1.0, 0.0) / counts.sum(),
        logit_map=logit_map,
        ignore_index=-100,
        compute_dtype=compute_dtype,
        workspace_mib=workspace_mib,
        approximate_mass=approximate_mass,
        needs_grad=[True, True, bias is not None],
    )[0]


def eager_mean_loss(hidden, weight, bias, target, logit_map="z", **_):
    logits = LogitMap.parse(logit_map)(F.linear(hidden, weight, bias).to(FP64 if hidden.dtype == FP64 else FP32))
    return F.cross_entropy(logits, target)


def losses_and_gradients(function, *operands, scale=1.0, **how):
    """scale: what multiplies the loss, as a gradient scaler does."""
    loss = function(*operands, **how)
    return loss.detach(), *torch.autograd.grad(loss * scale, [t for t in operands if t is not None and t.requires_grad])


SHAPES = {  # (rows, vocab, width, workspace in MiB): several slices, some of them in part in the gradient's memory
    "wide": (1000, 50257, 128, 8),
    "narrow": (3000, 20000, 512, 16),
    "more width than rows": (300, 30001, 768, 2),
    "pointers": (1000, 20001, 129, 8),
    "one slice": (1000, 5003, 128, 256),
}
SCALES = {BF16: 1.0, FP16: 2.0**12}
ROUNDING = {BF16: 2.0**-9, FP16: 2.0**-12}  # of dz and of a result, where eager's are next to exact: uniform rows
LEADS = {"uniform": 0.0, "soft": 8.0, "certain": 17.0}  # how much larger than others the logit of a target is


def leaves_of(rows, vocab, width, lead, masked=0.3, bias=False, dtype=BF16):
    weight = random(vocab, width)
    target = torch.randint(0, vocab, (rows,), device="cuda")
    towards = weight[target].float() / weight[target].float().square().sum(1, keepdim=True)
    hidden = (random(rows, width, dtype=FP32, scale=width**-0.5) + lead * towards).to(dtype)
    target[torch.rand(rows, device="cuda") < masked] = -100
    leaves = hidden, weight.to(dtype), random(vocab, dtype=dtype) if bias else None
    return *(None if leaf is None else leaf.requires_grad_() for leaf in leaves), target


def in_three_ways(loss, shape, lead, how):
    """(losses and gradients of a loss in 16 bits, of eager under autocast, the exact ones; the exact operands)."""
    *sizes, workspace = shape
    bits = how.get("compute_dtype", BF16)
    kwargs = {"logit_map": how.get("logit_map", "z"), "scale": SCALES[bits]}
    *leaves, target = leaves_of(*sizes, lead, bias="bias" in how, dtype=how.get("dtype", bits))
    doubles = *(None if t is None else t.detach().to(bits).double().requires_grad_() for t in leaves), target
    exact = losses_and_gradients(eager_mean_loss, *doubles, **kwargs)
    with torch.autocast("cuda", bits):  # for eager
        eagers = losses_and_gradients(eager_mean_loss, *leaves, target, **kwargs)
    ours = losses_and_gradients(loss, *leaves, target, **kwargs, compute_dtype=bits, workspace_mib=workspace)
    return ours, eagers, exact, doubles


@pytest.mark.parametrize(
    "how",
    [{}, {"logit_map": "30.0*tanh(z/30.0)"}, {"bias": True}, {"dtype": FP32}, {"compute_dtype": FP16, "bias": True}],
    ids=str,
)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_from_kept_logits_are_no_worse_than_eagers(shape, lead, how):
    ours, eagers, exact, _ = in_three_ways(mean_loss, shape, lead, how)
    rounding = ROUNDING[how.get("compute_dtype", BF16)]
    for mine, theirs, right in zip(ours[1:], eagers[1:], exact[1:], strict=True):
        assert (mine.double() - right).norm() <= (theirs.double() - right).norm() + rounding * right.norm()
    # a loss is the difference of two logits of about `lead + 5`, and tensor cores cut off after each 16 products
    cut_off = shape[2] / 16 * torch.finfo(FP32).eps * (lead + 5)
    assert abs(ours[0] - exact[0]) <= abs(eagers[0] - exact[0]) + 2**-16 * exact[0].abs() + cut_off


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_from_kept_logits_are_the_same_bits_every_run(shape):
    *sizes, workspace = shape
    problem = leaves_of(*sizes, 8.0, bias=True)
    assert_same_bits(lambda: losses_and_gradients(mean_loss, *problem, workspace_mib=workspace))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_nothing_waits_for_the_gpu_in_the_forward_with_gradients(dtype):
    problem = leaves_of(1000, 20000, 128, 8.0, dtype=dtype)
    losses_and_gradients(mean_loss, *problem, compute_dtype=dtype, workspace_mib=4)
    with nothing_waits():
        losses_and_gradients(mean_loss, *problem, compute_dtype=dtype, workspace_mib=4)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_forward_with_gradients_can_be_captured_into_a_cuda_graph(dtype):
    problem = leaves_of(1000, 20000, 128, 8.0, dtype=dtype)
    assert_captured(lambda: losses_and_gradients(mean_loss, *problem, compute_dtype=dtype, workspace_mib=4))


@pytest.mark.parametrize(
    ("rows", "vocab", "width", "workspace_mib"),
    [(33000, 66000, 64, 2 * 33000 * 66000 // MIB + 64), (4096, 560000, 4096, 32)],
    ids=["workspace", "gradient"],
)
def test_int64_offsets_into_kept_logits(rows, vocab, width, workspace_mib):
    """The last rows, and classes, against those of a backward that computes all logits again."""
    *leaves, target = leaves_of(rows, vocab, width, 4.0, masked=0.0)
    ours = losses_and_gradients(mean_loss, *leaves, target, workspace_mib=workspace_mib)

    def again(hidden, weight, _, target):
        lse, picked = plain(hidden, weight, target, 256)
        return (lse - picked).mean()

    for mine, theirs in zip(ours, losses_and_gradients(again, *leaves, target), strict=True):
        last = (slice(-64, None),) if mine.dim() else ()
        assert (mine[last].float() - theirs[last].float()).norm() <= 2**-7 * theirs[last].float().norm()


# ------------------------------------------------------------------------- float32: passes over logits that are stored

STORED = {  # (rows, vocab, width, workspace in MiB)
    "groups": (4096, 20000, 256, 64),
    "slices, some of them kept": (3000, 20000, 512, 16),
    "slices, all of them kept": (300, 50257, 768, 8),
    "odd width": (1000, 20001, 129, 8),
    "all at once": (300, 5003, 128, 256),
}


@pytest.mark.parametrize("how", [{}, {"logit_map": "30.0*tanh(z/30.0)"}, {"bias": True}], ids=str)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
@pytest.mark.parametrize("shape", STORED.values(), ids=STORED)
def test_gradients_in_float32_are_no_worse_than_eagers(shape, lead, how):
    """Without TF32, which is PyTorch's default."""
    assert not torch.backends.cuda.matmul.allow_tf32
    *sizes, workspace = shape
    logit_map = how.get("logit_map", "z")
    *leaves, target = leaves_of(*sizes, lead, bias="bias" in how, dtype=FP32)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    exact = losses_and_gradients(eager_mean_loss, *doubles, target, logit_map=logit_map)
    eagers = losses_and_gradients(eager_mean_loss, *leaves, target, logit_map=logit_map)
    how = {"logit_map": logit_map, "compute_dtype": FP32, "workspace_mib": workspace}
    ours = losses_and_gradients(mean_loss, *leaves, target, **how)
    # of logits of about that size: cuBLAS takes the sums of other shapes in another order
    rounding = 4 * torch.finfo(FP32).eps * (lead + 10)
    assert abs(ours[0] - exact[0]) <= abs(eagers[0] - exact[0]) + rounding
    for mine, theirs, right in zip(ours[1:], eagers[1:], exact[1:], strict=True):
        assert (mine.double() - right).norm() <= (theirs.double() - right).norm() + rounding * right.norm()


@pytest.mark.parametrize("shape", STORED.values(), ids=STORED)
def test_gradients_in_float32_are_the_same_bits_every_run(shape):
    *sizes, workspace = shape
    problem = leaves_of(*sizes, 8.0, bias=True, dtype=FP32)
    first, second = (
        losses_and_gradients(mean_loss, *problem, compute_dtype=FP32, workspace_mib=workspace) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("shape", STORED.values(), ids=STORED)
def test_gradients_in_tf32_are_no_worse_than_eagers(shape, tf32):
    *sizes, workspace = shape
    *leaves, target = leaves_of(*sizes, 8.0, dtype=FP32)
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    exact = losses_and_gradients(eager_mean_loss, *doubles, target)
    eagers = losses_and_gradients(eager_mean_loss, *leaves, target)
    ours, again = (
        losses_and_gradients(mean_loss, *leaves, target, compute_dtype=FP32, workspace_mib=workspace) for _ in range(2)
    )
    assert all(map(torch.equal, ours, again))
    rounding = 2.0**-11  # of an operand: cuBLAS may round it or cut it off, which depends on shapes
    assert abs(ours[0] - exact[0]) <= abs(eagers[0] - exact[0]) + rounding * exact[0]
    for mine, theirs, right in zip(ours[1:], eagers[1:], exact[1:], strict=True):
        assert (mine.double() - right).norm() <= (theirs.double() - right).norm() + rounding * right.norm()
