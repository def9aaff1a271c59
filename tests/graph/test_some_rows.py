"""Reductions of some of the rows that a loss is about: the operator call on all of them serves them too."""

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, check, check_left_alone, check_refused, hidden, labels, run_compiled, weight
from torch.distributions import Categorical

PARTS = {
    "row by row": lambda x: torch.stack([row.logsumexp(-1) for row in x]),
    "slice": lambda x: x[:, 2:].logsumexp(-1),
    "narrow": lambda x: x.narrow(0, 1, 2).logsumexp(-1, keepdim=True),
    "select": lambda x: x.select(1, 3).softmax(-1).max(-1),
    "index twice": lambda x: x.index_select(1, torch.tensor([3, 1, 1])).logsumexp(-1),
    "chunks of all": lambda x: torch.cat([chunk.logsumexp(-1) for chunk in x.reshape(-1, V).split(4)]),
    "reshaped part": lambda x: x[1:].reshape(-1, V)[3:].logsumexp(-1),
    "unflattened": lambda x: x[:, 1:].unflatten(1, (2, -1))[:, 1].logsumexp(-1),
    "transposed": lambda x: x.transpose(0, 1)[1:].logsumexp(-1),
    "classes in between": lambda x: x.permute(0, 2, 1)[1:].logsumexp(1),
    "entropy": lambda x: Categorical(logits=x[:, -1]).entropy(),
    "accuracy": lambda x: x.detach()[:, 1:].argmax(-1),
    "sum": lambda x: x[1].sum(-1),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_reduction_of_some_rows_joins_the_loss_of_all(part, dynamic):
    def program(h, w, t):
        x = F.linear(h, w)
        return F.cross_entropy(x.view(-1, V), t.view(-1), reduction="none"), part(x)

    check(program, hidden(), weight(), labels(ignored=-100), dynamic=dynamic)


def test_some_rows_without_gradients():
    def program(h, w, t):
        x = F.linear(h, w)
        loss = F.cross_entropy(x.view(-1, V), t.view(-1))
        with torch.no_grad():
            return loss, x[:, 1:].logsumexp(-1)

    ours = check(program, hidden(), weight(), labels(ignored=-100))
    assert ours.requires_grad == [True, False]


def test_some_rows_of_other_logits_do_not_join():
    def program(h, w, t):
        x = F.linear(h, w)
        return (
            F.cross_entropy(x.view(-1, V), t.view(-1)),
            (x[1:] / 2).logsumexp(-1),
            F.linear(h + 1, w)[1:].logsumexp(-1),
        )

    check(program, hidden(), weight(), labels(), rewrites=2, calls=3)


def test_rows_whose_index_is_written_later():
    def program(h, w, t, i):
        x = F.linear(h, w)
        loss, some = F.cross_entropy(x.view(-1, V), t.view(-1)), x[i]
        i.zero_()
        return loss, some.logsumexp(-1)

    given = hidden(requires_grad=False), weight(requires_grad=False), labels(), torch.tensor([2, 1])
    check_left_alone(program, *given)


SOME_ROWS = {
    "slice": lambda x: x[:, 1:-1].logsumexp(-1),
    "in_a_loop": lambda x: torch.stack([row.logsumexp(-1) for row in x]),
    "index_tensor": lambda x: x[:, torch.tensor([4, 0, 4])].argmax(-1),
    "transposed": lambda x: x.transpose(0, 1)[2:].max(-1).values,
    "pieces": lambda x: torch.cat([-torch.special.entr(p.softmax(-1)).sum(-1) for p in x.view(-1, V).split(5)]),
    "detached": lambda x: x[:, -1].detach().argmax(-1),
}
SOME_ROWS_OF_CONSTANT_SIZES = {
    "reshaped": lambda x: x.reshape(S, B, V)[1:, None].logsumexp(-1, keepdim=True),
    "total": lambda x: x[1].log_softmax(-1).mean(-1),
}


@pytest.mark.parametrize("loss_first", [True, False])
@pytest.mark.parametrize(
    ("reader", "dynamic"),
    [(reader, dynamic) for reader in SOME_ROWS.values() for dynamic in (False, True)]
    + [(reader, False) for reader in SOME_ROWS_OF_CONSTANT_SIZES.values()],
)
def test_readers_of_some_rows_are_served_with_all(reader, loss_first, dynamic):
    def program(h, w, t):
        x = F.linear(h, w)
        read = None if loss_first else reader(x)
        loss = F.cross_entropy(x.view(-1, V), t.view(-1))
        return loss, reader(x) if loss_first else read

    check(program, hidden(), weight(), labels(ignored=-100), dynamic=dynamic)


def test_rows_in_an_order_that_is_written_later():
    """An index that changes after its use is not read again."""

    def program(h, w, t, index):
        x = F.linear(h, w)
        some = x[:, index]
        index.zero_()
        return F.cross_entropy(x.view(-1, V), t.view(-1)) + some.logsumexp(-1).mean()

    fixed = hidden(requires_grad=False), weight(requires_grad=False)
    run = run_compiled(program, *fixed, labels(), torch.tensor([1, 2]))
    assert run.report.rewritten == []
    assert "changes an operand in place" in str(run.report.refused[0])


def test_scaled_rows_are_other_logits():
    def program(h, w, t, temperature):
        x = F.linear(h, w)
        return F.cross_entropy(x.view(-1, V), t.view(-1)) + (x / temperature).logsumexp(-1).mean()

    check(program, hidden(), weight(), labels(), torch.tensor(0.7), calls=2)


def test_logits_minus_the_log_sum_exps_of_other_rows_are_no_log_softmax():
    def program(h, w, t):
        x = F.linear(h, w)
        log_p = x - x.logsumexp(-1)[[1, 0, 2, 4, 6, 5, 3]][:, None]  # <-
        return -(log_p.gather(-1, t[:, None])[:, 0] * torch.arange(1.0, len(h) + 1)).sum()

    check_refused(program, hidden(7, D), weight(), labels(7), operation="sub", reason="logits")


@pytest.mark.parametrize("write", [lambda lse, column: lse.mul_(2), lambda lse, column: column.add_(1)])
def test_logits_minus_a_log_sum_exp_that_was_written_to_are_no_log_softmax(write):
    """Eager does not differentiate it, but computes it."""

    def program(h, w, t):
        x = F.linear(h, w)
        lse = x.logsumexp(-1)
        column = lse.unsqueeze(-1).float()
        write(lse, column)
        log_p = x - column  # <-
        return -log_p.gather(-1, t[:, None]).mean()

    given = hidden(7, D, requires_grad=False), weight(requires_grad=False), labels(7)
    check_refused(program, *given, operation="sub", reason="logits")


@pytest.mark.parametrize("column", [lambda lse: lse[:, None], lambda lse: lse[..., None], lambda lse: lse[:][:, None]])
def test_logits_minus_their_log_sum_exp_as_a_column(column):
    def program(h, w, t):
        x = F.linear(h, w)
        log_p = x - column(x.logsumexp(-1))
        return -(log_p.gather(-1, t[:, None])[:, 0] * torch.arange(1.0, len(h) + 1)).sum()

    check(program, hidden(B * S, D), weight(), labels(B * S))


def test_logits_less_their_maximum_before_a_log_softmax():
    """No loss is reached, but a log_softmax that the logits were meant for."""

    def program(h, w, t):
        x = F.linear(h, w)
        shifted = x - x.amax(-1, keepdim=True)  # <-
        return -shifted.log_softmax(-1).gather(-1, t[..., None]).mean()

    check_refused(program, hidden(), weight(), labels(), operation="sub", reason="differs from row to row")
