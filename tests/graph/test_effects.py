"""What the order of a graph matters for: writes in place, regions without gradients, and torch.func transforms."""

import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    B,
    S,
    V,
    assert_like_eager,
    bias,
    check,
    check_left_alone,
    check_refused,
    hidden,
    labels,
    run_compiled,
    weight,
)

from cce_inductor.graph import effects


def args(requires_grad=True):
    return hidden(requires_grad=requires_grad), weight(requires_grad=requires_grad), labels()


# ------------------------------------------------------------------------------------------------ in-place writes


WRITES = {
    "scaled": lambda x: x.mul_(2.0),
    "divided": lambda x: x.div_(0.7),
    "augmented": lambda x: _imul(x),
    "function": lambda x: torch.relu_(x),
    "capped": lambda x: x.div_(5.0).tanh_(),
    "shifted": lambda x: x.add_(torch.linspace(-1, 1, V)),
    "clamped": lambda x: x.clamp_(-1.0, 1.0),
    "by_a_tensor": lambda x: x.div_(torch.tensor(0.7)),
    "twice": lambda x: (x.mul_(2.0), x.add_(1.0)),
    "result_and_operand": lambda x: x.mul_(2.0).add_(x),
}
OTHER_WRITES = {
    "filled": lambda x: x[..., 0].fill_(-1.0),
    "rows": lambda x: x.__setitem__((0, slice(0, 2)), -1.0),
    "out": lambda x: torch.mul(x, 2.0, out=x),
    "copied": lambda x: x.copy_(x.detach() * 2),
    "zeroed": lambda x: x.zero_(),
}


def _imul(x):
    x *= 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_logits_written_in_place(write, dtype):
    def program(h, w, t):
        x = F.linear(h, w)
        write(x)
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    check(program, hidden(dtype=dtype), weight(dtype=dtype), labels())


@pytest.mark.parametrize("write", OTHER_WRITES.values(), ids=OTHER_WRITES)
def test_logits_written_in_place_in_another_way(write):
    def program(h, w, t):
        x = F.linear(h, w)
        write(x)
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    given = args(requires_grad=write is not OTHER_WRITES["out"])
    ours = check_left_alone(program, *given)
    assert ours.report.refused[0].location.startswith(f"{__file__}:")


def test_reductions_before_and_after_a_write_read_different_logits():
    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        before = x.logsumexp(-1).mean()
        x = x * 1.0
        x.div_(0.5)
        return before + F.cross_entropy(x, t.view(-1))

    check(program, *args(), calls=2)


def test_logits_written_through_one_view_and_read_through_another():
    def program(h, w, t):
        x = F.linear(h, w)
        flat = x.view(-1, V)
        x.mul_(2.0)  # <-
        return F.cross_entropy(flat, t.view(-1))

    check_refused(program, *args(), operation="mul_", reason="read through another view")


def test_logits_written_through_a_view_that_alone_is_read():
    def program(h, w, t):
        flat = F.linear(h, w).squeeze(0).view(-1, V)
        flat.div_(0.7)
        return F.cross_entropy(flat, t.view(-1))

    check(program, *args())


def test_a_write_without_gradients():
    """The gradient does not see the factor: moving it into the product would."""

    def program(h, w, t):
        x = F.linear(h, w)
        with torch.no_grad():
            x.mul_(2.0)
        return F.cross_entropy(x.view(-1, V), t.view(-1))

    check_left_alone(program, *args())


def test_the_loss_written_in_place():
    def program(h, w, t):
        loss = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))
        loss += 0.1 * h.square().mean()
        loss.mul_(0.5)
        return loss

    check(program, *args())


def test_labels_written_after_the_loss():
    def program(h, w, t):
        loss = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))
        t.fill_(0)
        return loss, t

    check(program, *args(requires_grad=False))


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

    check_left_alone(program, *args())


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
    """One call may serve both, on twice the rows."""

    def program(h, w, t):
        shifted = t.clone()[:, 1:]
        before = shifted.reshape(-1)
        shifted[:, 0] = 3
        after = shifted.reshape(-1)
        x = F.linear(h[:, 1:], w).reshape(-1, V)
        return F.cross_entropy(x, before) + 2 * F.cross_entropy(x, after)

    ours = check(program, hidden(), weight(), labels())
    assert ours.operator_calls[0].args[0].meta["example_value"].shape[0] == 2 * B * (S - 1)


def test_the_signature_of_a_function_is_read_once(monkeypatch):
    """Python takes a millisecond for that of a built-in function, and the pass asks about each node many times."""
    reads = []

    def signature(target):
        reads.append(target)
        return inspect.signature(target)

    monkeypatch.setattr(effects, "inspect", types.SimpleNamespace(signature=signature))
    effects._signature.cache_clear()

    def program(h, w, t):
        chunks = zip(F.linear(h, w).view(-1, V).split(2), t.view(-1).split(2), strict=True)
        return sum(F.cross_entropy(x, y, reduction="sum") for x, y in chunks)

    check(program, hidden(), weight(), labels())
    assert reads
    assert len(reads) == len(set(reads))
