"""What the order of a graph matters for: writes in place, regions without gradients, and torch.func transforms."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    S,
    V,
    assert_like_eager,
    assert_untouched,
    bias,
    check,
    check_refused,
    hidden,
    labels,
    run_compiled,
    weight,
)


def args(requires_grad=True):
    return hidden(requires_grad=requires_grad), weight(requires_grad=requires_grad), labels()


# ------------------------------------------------------------------------------------------------ in-place writes


WRITES = {
    "scaled": lambda x: x.mul_(2.0),
    "divided": lambda x: x.div_(0.7),
    "augmented": lambda x: _imul(x),
    "set": lambda x: x.__setitem__((Ellipsis, slice(0, 2)), -1.0),
    "filled": lambda x: x[..., 0].fill_(-1.0),
    "out": lambda x: torch.mul(x, 2.0, out=x),
}


def _imul(x):
    x *= 0.5


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_logits_written_in_place(write):
    def program(h, w, t):
        x = F.linear(h, w)
        write(x)
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    given = args(requires_grad=write is not WRITES["out"])
    ours = run_compiled(program, *given)
    assert ours.report.rewritten == []
    assert ours.report.refused[0].location.startswith(f"{__file__}:")
    assert_untouched(ours)
    assert_like_eager(ours, program, given)


@pytest.mark.parametrize("operand", ["hidden", "weight", "bias", "view_of_the_weight", "weight_by_out"])
def test_an_operand_written_between_product_and_loss(operand):
    def program(h, w, b, t):
        x = F.linear(h, w, b)  # <-
        if operand == "hidden":
            h.zero_()
        elif operand == "weight":
            w.mul_(2.0)
        elif operand == "bias":
            b += 1.0
        elif operand == "view_of_the_weight":
            w.t()[0].fill_(1.0)
        else:
            torch.neg(w, out=w)
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    given = (hidden(requires_grad=False), weight(requires_grad=False), bias(requires_grad=False), labels())
    reason = "changes an operand in place that the loss is computed from"
    check_refused(program, *given, operation="cross_entropy", reason=reason)


def test_a_bias_written_after_the_loss():
    """Eager's backward does not read it, ours would."""

    def program(h, w, b, t):
        shift = b * 2
        loss = F.cross_entropy(F.linear(h, w, shift).view(-1, V), t.view(-1))
        shift.zero_()
        return loss

    reason = "changes an operand in place"
    check_refused(program, hidden(), weight(), bias(), labels(), operation="cross_entropy", reason=reason, marker=None)


def test_hidden_states_written_after_the_loss():
    def program(h, w, t):
        loss = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))
        h.zero_()
        return loss + h.sum()

    check(program, *args(requires_grad=False))


def test_another_tensor_written_between_product_and_loss():
    def program(h, w, t, counter):
        x = F.linear(h, w)
        counter += 1
        return F.cross_entropy(x.view(-1, V), t.view(-1)), counter

    check(program, *args(), torch.zeros(3))


def test_labels_written_between_product_and_loss():
    """llm-foundry rolls the labels and writes the last ones. The loss reads them afterwards in any case."""

    def program(h, w, t):
        x = F.linear(h, w)
        t = t.roll(-1, dims=1)
        t[:, -1] = -100
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    check(program, *args())


def test_labels_written_between_two_losses():
    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        first = F.cross_entropy(x, t.view(-1))  # the target's own memory
        t[:, 0] = 5
        return first + F.cross_entropy(x, t.view(-1))

    check(program, *args(requires_grad=False), calls=2)


def test_labels_written_between_logsumexp_and_loss():
    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        z = x.logsumexp(-1).mean()
        t = t.clone()
        t[:, 0] = -100
        return z + F.cross_entropy(x, t.view(-1))

    check(program, *args(), calls=2)


def test_an_index_written_before_its_use():
    def program(h, w, t, rows):
        x = F.linear(h, w)
        rows.add_(1)
        return F.cross_entropy(x[:, rows].flatten(0, 1), t[:, rows].flatten())

    ours = run_compiled(program, *args(), torch.arange(S - 1))
    assert_like_eager(ours, program, (*args(), torch.arange(S - 1)))


def test_a_refusal_puts_labels_that_were_to_be_moved_back():
    def program(h, w, t):
        x = F.linear(h, w)  # <-
        w.zero_()
        z = x.logsumexp(-1).mean()
        shifted = F.pad(t, (0, 1), value=-100)[..., 1:].contiguous()
        return z + F.cross_entropy(x.view(-1, V), shifted.view(-1))

    given = args(requires_grad=False)
    check_refused(program, *given, operation="logsumexp", reason="changes an operand in place")


# ------------------------------------------------------------------------------------------- regions and transforms


@pytest.mark.parametrize("where", ["product", "rows", "cast"])
def test_logits_without_gradients_reduced_with_gradients(where):
    """Moving the product to the loss would give the operands gradients that eager does not give."""

    def program(h, w, t):
        x = F.linear(h, w) if where != "product" else None
        with torch.no_grad():
            if where == "product":
                x = F.linear(h, w)
            x = x[:, :-1] if where == "rows" else x.to(torch.float64).float()
        return F.cross_entropy(x.reshape(-1, V), t[:, : x.size(1)].reshape(-1)) + h.sum() + w.sum()

    ours = run_compiled(program, *args())
    assert ours.report.rewritten == []
    assert_untouched(ours)
    assert_like_eager(ours, program, args())


def test_loss_under_a_function_transform():
    def program(h, w, t):
        def loss(h):
            return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))  # <-

        return torch.func.grad(loss)(h)

    given = args(requires_grad=False)
    check_refused(program, *given, operation="torch.func", reason="torch.func transform")


def test_loss_under_vmap():
    def program(h, w, t):
        return torch.func.vmap(lambda h, t: F.cross_entropy(F.linear(h, w), t))(h, t)  # <-

    given = args(requires_grad=False)
    check_refused(program, *given, operation="torch.func", reason="torch.func transform")


def test_copies_of_labels_from_before_and_after_a_write_are_two_targets():
    def program(h, w, t):
        shifted = t.clone()[:, 1:]
        before = shifted.reshape(-1)
        shifted[:, 0] = 3
        after = shifted.reshape(-1)
        x = F.linear(h[:, 1:], w).reshape(-1, V)
        return F.cross_entropy(x, before) + 2 * F.cross_entropy(x, after)

    check(program, hidden(), weight(), labels(), calls=2)
