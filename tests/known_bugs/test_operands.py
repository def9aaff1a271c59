"""Storages, dtypes and devices of the operands."""

import pytest
import torch
import torch.nn.functional as F
from common import both_ways, compiled, gpu, mean_loss
from helpers import B, D, S, V, bias, check, hidden, labels, weight

from cce_inductor import linear_cross_entropy


def test_a_weight_with_a_storage_offset():
    storage = torch.randn(3 + V * D, generator=torch.Generator().manual_seed(0))
    w = storage[3:].view(V, D)
    assert w.storage_offset() == 3
    both_ways(hidden(), w.requires_grad_(), labels())


def test_operands_that_share_their_storage():
    """Hidden states and weight are parts of one flat buffer, as under a sharding wrapper; another step overlaps."""
    flat = torch.randn((B * S + V) * D, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def program(flat, t):
        h, w = flat[: B * S * D].view(B, S, D), flat[B * S * D :].view(V, D)
        return mean_loss(h, w, t)

    def overlapping(flat, t):
        return mean_loss(flat[: B * S * D].view(B, S, D), flat[D : D + V * D].view(V, D), t)

    check(program, flat, labels(), logits_in_memory=True)
    check(overlapping, flat, labels(), logits_in_memory=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32], ids=str)
def test_targets_of_every_dtype_do_what_they_do_in_other_compiled_programs(dtype):
    """Inductor allows others than eager, whose errors `linear_cross_entropy` has (test_api.py)."""
    given = hidden(B * S, D), weight(), labels(B * S).clamp(max=1).to(dtype)

    def outcome(backend):
        try:
            return compiled(mean_loss, backend)(*given)
        except Exception as error:
            return type(error)

    theirs, ours = outcome("inductor"), outcome("cce")
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs


@pytest.mark.parametrize("place", ["input", "linear_weight", "target", "linear_bias", "weight"])
def test_operands_on_different_devices_are_an_error(place):
    arguments = {"input": hidden(), "linear_weight": weight(), "target": labels(), "linear_bias": bias()}
    arguments["weight"] = torch.ones(V)
    arguments[place] = arguments[place].to("meta")
    with pytest.raises(RuntimeError, match=r"on the same device, but found cpu, meta|not on the expected device"):
        linear_cross_entropy(
            arguments.pop("input"), arguments.pop("linear_weight"), arguments.pop("target"), **arguments
        )


def test_operands_that_are_all_on_the_meta_device():
    """No memory, but shape and dtype."""
    h, w, t = (tensor.to("meta") for tensor in (hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels()))
    loss = linear_cross_entropy(h, w, t, reduction="none")
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", t.shape, torch.bfloat16)


@gpu
@pytest.mark.parametrize("place", ["input", "linear_weight", "target"])
def test_operands_on_a_gpu_and_a_cpu_are_an_error(place):
    arguments = {"input": hidden(), "linear_weight": weight(), "target": labels()}
    arguments = {name: tensor.to("cpu" if name == place else "cuda") for name, tensor in arguments.items()}
    with pytest.raises(RuntimeError, match="on the same device"):
        linear_cross_entropy(*arguments.values())
    with pytest.raises(Exception, match=r"same device|different device|two devices"):
        compiled(mean_loss)(*arguments.values())


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["equal", "1e4", "V=1", "D=1", "N=0", "N=1", "-inf bias", "certain"])
def test_odd_numbers_and_shapes_on_a_gpu(case, dtype):
    """Loss and gradients of the kernels against float64, no further from it than eager and some roundings.

    Eager subtracts equal logits where a row is certain. The kernels compute a logit more than once, in float32, and
    so the gradient of such a row is what that rounds.
    """
    torch.manual_seed(0)
    rows = {"N=0": 0, "N=1": 1}.get(case, 40)
    vocab, width = 1 if case == "V=1" else 300, 1 if case == "D=1" else 64
    h, w = torch.randn(rows, width), torch.randn(vocab, width)
    b = torch.randn(vocab)
    t = torch.randint(0, vocab, (rows,))
    if case == "equal":
        w, b = w[:1].expand(vocab, width), torch.zeros(vocab)
    elif case == "1e4":
        h, w = 100 * torch.ones_like(h), 1.5 * (1 + w / 8)
    elif case == "-inf bias":
        b[1::2] = -torch.inf
        t = t // 2 * 2
    elif case == "certain":
        h = 4 * w[t]
    given = [x.to("cuda", dtype) for x in (h, w, b)]
    t = t.cuda()

    def gradients(function, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        loss = function(*leaves, t)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours(h, w, b, t):
        return linear_cross_entropy(h, w, t, linear_bias=b, reduction="sum")

    def eager(h, w, b, t):
        return F.cross_entropy(F.linear(h, w, b), t, reduction="sum")

    h, w, b = (x.double() for x in given)
    logits = F.linear(h, w, b).nan_to_num(neginf=0)
    rounding = torch.finfo(torch.float32).eps * (logits.abs().max() if rows else 0)  # of each row's dz at its target
    terms = rows, w[t].norm(), h.norm(), rows**0.5  # what it is multiplied by in the loss and each gradient
    runs = gradients(ours, given), gradients(eager, given), gradients(eager, [h, w, b])
    for mine, theirs, exact, term in zip(*runs, terms, strict=True):
        assert torch.equal(mine.isfinite(), exact.isfinite())
        error, eagers = ((x.double() - exact).nan_to_num().norm() for x in (mine, theirs))
        assert error <= eagers + 2 * torch.finfo(dtype).eps * exact.nan_to_num().norm() + rounding * term
