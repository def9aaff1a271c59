"""Logits that are returned beside the loss, together with every other form that the pass knows."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EVERYTHING,
    D,
    V,
    assert_like_eager,
    bias,
    check,
    check_left_alone,
    hidden,
    labels,
    nodes_of,
    run_compiled,
    weight,
)

from cce_inductor.ops.library import scaled_loss, vocab_reductions

HALF = torch.bfloat16
MASKED = torch.arange(V) > V - 4


def args(dtype=torch.float32):
    return hidden(dtype=dtype), weight(dtype=dtype), labels(classes=V - 4)


def loss_of(x, t):
    return F.cross_entropy(x.reshape(-1, x.shape[-1]), t.reshape(-1))


def operators(ours):
    return [node.target for module in ours.modules for node in nodes_of(module) if "cce_inductor" in str(node.target)]


def plain(h, w, t):
    x = F.linear(h, w)
    return loss_of(x, t), x


# ---------------------------------------------------------------------------------------- gradients in the forward


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, HALF], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_in_the_forward(dtype, dynamic):
    """Loss and logits get gradients at once; those of the loss are there already."""
    ours = check(plain, *args(dtype), dynamic=dynamic)
    assert operators(ours) == [scaled_loss]
    assert ours.report.rewritten[0].returned == "lazy"


def test_gradients_in_the_forward_of_logits_with_a_map_and_a_bias():
    def program(h, w, b, t):
        x = 5 * torch.tanh(F.linear(h, w, b) / 5)
        return loss_of(x, t), x

    h, w, t = args()
    ours = check(program, h, w, bias(), t)
    assert operators(ours) == [scaled_loss]
    assert ours.report.rewritten[0].returned == "lazy"


def test_a_loss_of_returned_logits_later():
    """The gradients of both losses add up."""

    def program(h, w, t):
        loss, x = plain(h, w, t)
        return loss + (x - 1).square().mean()

    def in_two(h, w, t):
        loss, x = plain(h, w, t)
        torch._dynamo.graph_break()
        return loss + (x - 1).square().mean()

    ours = run_compiled(in_two, *args(), fullgraph=False)
    assert operators(ours) == [scaled_loss]
    assert_like_eager(ours, program, args())


# ------------------------------------------------------------------------------------------------------ joined calls


def two_heads(h, w, t):
    one = F.linear(h[:, :-1], w)
    two = F.linear(torch.tanh(h[:, :-2] * 2), w)
    return loss_of(one, t[:, 1:]) + 0.3 * loss_of(two, t[:, 2:]), one, two


def chunks(h, w, t):
    x = F.linear(h, w)
    pieces = zip(x.chunk(3, dim=1), t.chunk(3, dim=1), strict=True)
    return sum(loss_of(piece, y) for piece, y in pieces), x


def rows_in_a_loop(h, w, t):
    x = F.linear(h, w) / 0.7
    picked = [row.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1) for row, index in zip(x, t, strict=True)]
    return -torch.stack(picked).mean(), x


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("program", "rewrites"), [(two_heads, 2), (chunks, 1), (rows_in_a_loop, 1)])
def test_joined_calls(program, rewrites, dtype):
    ours = check(program, *args(dtype), rewrites=rewrites, logits_in_memory=rewrites > 1)
    assert operators(ours) == [vocab_reductions]
    assert [rewrite.returned for rewrite in ours.report.rewritten] == ["lazy"] * rewrites


def test_joined_calls_with_computed_logits():
    """The second head's logits are viewed twice, and so computed."""

    def program(h, w, t):
        loss, one, two = two_heads(h, w, t)
        return loss, one, two, two.view(-1, V)

    ours = check(program, *args(), rewrites=2, logits_in_memory=True)
    assert [rewrite.returned.split(",")[0] for rewrite in ours.report.rewritten] == ["lazy", "computed"]


# ------------------------------------------------------------------------------------------------ sums, maps, masks


def low_rank(h, w, t):
    a, b = w[:4].detach().clone(), w[:, :4].detach() * 0.5
    x = F.linear(h, w) + 2 * F.linear(F.linear(h, a), b)
    return loss_of(x, t), x


def classes_scaled(h, w, t):
    x = F.linear(h, w) * w[:, 0]
    return loss_of(x, t), x


def clamped(h, w, t):
    x = F.linear(h, w).clamp(-1, 1.5)
    return loss_of(x, t), x


def leaky(h, w, t):
    x = F.linear(h, w)
    x = torch.where(x > 0, x, 0.1 * x)
    return loss_of(x, t), x


def silu(h, w, t):
    x = F.silu(F.linear(h, w)) ** 2
    return loss_of(x, t), x


def einsum(h, w, t):
    x = torch.einsum("bsd,vd->bsv", h, w)
    return loss_of(x, t), x


def log_softmax_by_hand(h, w, t):
    x = F.linear(h, w)
    x = x - x.logsumexp(-1, keepdim=True)
    return F.nll_loss(x.view(-1, V), t.view(-1)), x


def stacked_and_selected(h, w, t):
    x = torch.stack([F.linear(h, w), F.linear(h, w.flip(0))])
    return loss_of(x[0], t), x[0]


def beside_another_result(h, w, t):
    x = F.linear(h, w)
    return loss_of(x, t), x, x.logsumexp(-1)


FORMS = [
    low_rank, classes_scaled, clamped, leaky, silu, einsum, log_softmax_by_hand, stacked_and_selected,
    beside_another_result,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("program", FORMS, ids=lambda program: program.__name__)
def test_forms(program, dtype):
    ours = check(program, *args(dtype), logits_in_memory=program in (low_rank, stacked_and_selected))
    assert ours.report.rewritten[0].returned == "lazy"


MAPS = {
    "plain": lambda x: x,
    "capped": lambda x: 5 * torch.tanh(x / 5),
    "squared": lambda x: x**2,  # its slope is infinite where the bias of the masked classes is
    "silu": F.silu,
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("fill", [-float("inf"), -1e4])
@pytest.mark.parametrize("function", MAPS.values(), ids=MAPS)
def test_masked_classes(function, fill, dtype):
    """Held against float64 through a clamp, because differences of infinite numbers are nan."""

    def program(h, w, t):
        x = function(F.linear(h, w)).masked_fill(MASKED, fill)
        return loss_of(x, t), x

    def of_finite_logits(h, w, t):
        loss, x = program(h, w, t)
        return loss, x.clamp(min=-50)

    ours = check(of_finite_logits, *args(dtype))
    assert ours.report.rewritten[0].returned == "lazy"
    [_, x], [_, eager] = run_compiled(program, *args(dtype)).outputs, program(*args(dtype))
    torch.testing.assert_close(x + 0, eager.detach())


# ---------------------------------------------------------------------------------------------------- written in place


def written_before_the_loss(h, w, t):
    x = F.linear(h, w)
    x /= 2
    return loss_of(x, t), x


def written_after_the_loss(h, w, t):
    x = F.linear(h, w)
    loss = loss_of(x, t)
    x.mul_(2)
    return loss, x


def written_between_two_losses(h, w, t):
    x = F.linear(h, w)
    loss = loss_of(x, t)
    x.div_(2).tanh_()
    return loss + loss_of(x, t), x


def bias_added(h, w, t):
    x = h @ w.t()
    x += w[:, 0]
    return loss_of(x, t), x


def classes_filled(h, w, t):
    x = F.linear(h, w)
    x[..., -4:] = -30.0
    return loss_of(x, t), x


def product_added(h, w, t):
    x = F.linear(h, w)
    x += F.linear(h[..., :3] * 2, w[:, :3])
    return loss_of(x, t), x


WRITTEN = [
    written_before_the_loss, written_after_the_loss, written_between_two_losses, bias_added, classes_filled,
    product_added,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("program", WRITTEN, ids=lambda program: program.__name__)
def test_written_in_place(program, dtype):
    """What is returned is what the logits are in the end."""
    calls = 2 if program is written_between_two_losses else 1
    ours = check(program, *args(dtype), calls=calls, logits_in_memory=program is product_added)
    assert ours.report.rewritten[0].returned == "lazy"


@pytest.mark.parametrize("program", [written_before_the_loss, written_after_the_loss], ids=lambda p: p.__name__)
def test_written_in_place_and_computed(program):
    ours = check(program, *args(), logits_in_memory=True, options=replace(EVERYTHING, logits="materialize"))
    assert ours.report.rewritten[0].returned.startswith("computed")


def test_written_in_place_without_gradients():
    """Autograd does not see the write, so the gradients of what is returned are those from before it."""

    def program(h, w, t):
        x = F.linear(h, w)
        loss = loss_of(x, t)
        with torch.no_grad():
            x.mul_(2)
        return loss, x

    ours = check(program, *args(), logits_in_memory=True)
    assert "gradients are not recorded" in ours.report.rewritten[0].returned


# --------------------------------------------------------------------------------------------------------- left alone


def written_through_a_view(h, w, t):
    x = F.linear(h, w)
    x.view(-1, V).mul_(2)
    return loss_of(x, t), x


def stacked(h, w, t):
    x = torch.stack([F.linear(h, w), F.linear(h, w.flip(0))])
    return loss_of(x[0], t) + loss_of(x[1], t), x


def compared(h, w, t):
    x = F.linear(h, w)
    positive = x > 0
    return loss_of(torch.where(positive, x, 0.1 * x), t), positive


LEFT_ALONE = [written_through_a_view, stacked, compared]


@pytest.mark.parametrize("program", LEFT_ALONE, ids=lambda program: program.__name__)
def test_left_alone(program):
    ours = check_left_alone(program, *args())
    assert ours.report.refused


def test_one_of_two_products_that_are_added_is_returned():
    """The sum has a loss, its first part is read: it is computed."""

    def program(h, w, t):
        one = F.linear(h, w)
        return loss_of(one + F.linear(h[..., : D // 2], w[:, : D // 2]), t), one

    check(program, *args(), logits_in_memory=True)
