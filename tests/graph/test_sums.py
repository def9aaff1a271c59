"""Sums of products, stacked heads, transposed logits, and operator calls that are joined."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    D,
    S,
    V,
    assert_like_eager,
    check,
    elements,
    hidden,
    labels,
    nodes_of,
    run_compiled,
    tensors_of,
    weight,
)

from cce_inductor.graph import merge

HALF = torch.bfloat16


def loss_of(x, t):
    return F.cross_entropy(x.reshape(-1, x.size(-1)), t.reshape(-1))


class LowRank(torch.nn.Module):
    """A frozen head with a trained low-rank update, as PEFT writes it."""

    def __init__(self, rank=4, dropout=0.3, bias=True, low_rank_dtype=None, base_last=False):
        super().__init__()
        torch.manual_seed(0)
        self.base = torch.nn.Linear(D, V, bias=bias).requires_grad_(False)
        self.A = torch.nn.Linear(D, rank, bias=False)
        self.B = torch.nn.Linear(rank, V, bias=False)
        self.dropout = torch.nn.Dropout(dropout)
        self.base_last = base_last

    def forward(self, h):
        if self.base_last:
            return self.B(self.A(self.dropout(h))) * 0.5 + self.base(h)
        result = self.base(h)
        update = self.B(self.A(self.dropout(h.to(self.A.weight.dtype)))) * 2.0
        return (result + update).to(h.dtype)


def assert_no_logits(ours, rows):
    """The joined weight is larger than any input here, so the sizes are looked at."""
    for module in ours.modules:
        for node in nodes_of(module):
            for tensor in tensors_of(node.meta.get("example_value")):
                assert elements(tensor) != rows * V, node


LOW_RANK = {
    "dropout": {},
    "no_dropout": {"dropout": 0.0},
    "no_bias": {"bias": False},
    "base_last": {"base_last": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("how", LOW_RANK.values(), ids=LOW_RANK)
def test_a_low_rank_update_of_the_head(how, dtype):
    model = LowRank(**how).to(dtype)
    ours = check(lambda m, h, t: loss_of(m(h).float(), t), model, hidden(dtype=dtype), labels(), logits_in_memory=True)
    assert_no_logits(ours, labels().numel())
    assert ours.report.rewritten[0].shape[2] == str(D + 4)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["base.weight", "base.bias"][: len(frozen)]


def test_a_low_rank_update_in_float32_of_a_bfloat16_head():
    model = LowRank()
    model.base.to(HALF)

    def program(m, h, t):
        return loss_of(m(h).float(), t)

    ours = check(program, model, hidden(dtype=HALF), labels(), logits_in_memory=True)
    assert_no_logits(ours, labels().numel())


def test_a_low_rank_update_under_autocast():
    def program(m, h, t):
        with torch.autocast("cpu", HALF):
            x = m(h)
        return loss_of(x.float(), t)

    ours = check(program, LowRank(dropout=0.0), hidden(), labels(), logits_in_memory=True)
    assert_no_logits(ours, labels().numel())


def test_two_low_rank_updates_of_a_head_that_is_trained_too():
    def program(h, w, a, b, c, d, t):
        x = F.linear(h, w) + 2.0 * F.linear(F.linear(h, a), b) - F.linear(F.linear(h, c), d)
        return loss_of(x[:, :-1], t[:, 1:])

    low = [weight(*shape) for shape in ((2, D), (V, 2), (3, D), (V, 3))]
    ours = check(program, hidden(), weight(), *low, labels(), logits_in_memory=True)
    assert_no_logits(ours, labels().numel())
    assert ours.report.rewritten[0].shape[2] == str(D + 5)


def test_the_entropy_of_a_low_rank_head_is_rewritten_and_nothing_said_to_be_left_alone():
    """Its log_softmax is reached through the sum alone: each product by itself ends at the addition."""

    def program(h, w, a, b):
        x = F.linear(h, w) + F.linear(F.linear(h, a), b)
        return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean()

    ours = check(program, hidden(), weight(), weight(2, D), weight(V, 2), logits_in_memory=True)
    assert_no_logits(ours, labels().numel())
    assert not ours.report.refused


def test_an_update_added_in_place():
    def program(h, w, a, b, t):
        result = F.linear(h, w)
        result += F.linear(F.linear(h, a), b) * 2.0
        return loss_of(result, t)

    ours = check(program, hidden(), weight(), weight(2, D), weight(V, 2), labels(), logits_in_memory=True)
    assert_no_logits(ours, labels().numel())


def test_an_update_added_in_place_to_logits_that_are_read_through_another_view():
    def program(h, w, a, b, t):
        result = F.linear(h, w)
        flat = result.view(-1, V)
        result += F.linear(F.linear(h, a), b) * 2.0
        return F.cross_entropy(flat, t.view(-1)) + 0 * loss_of(result, t)

    given = (hidden(), weight(), weight(2, D), weight(V, 2), labels())
    ours = run_compiled(program, *given)
    assert ours.report.rewritten == []
    assert_like_eager(ours, program, given)


def test_the_update_is_needed_elsewhere_too():
    """Both are rewritten no further than they can: the update is computed, the loss is not read from logits."""

    def program(h, w, a, b, t):
        update = F.linear(F.linear(h, a), b)
        return loss_of(F.linear(h, w) + update, t) + update.square().mean()

    given = (hidden(), weight(), weight(2, D), weight(V, 2), labels())
    ours = run_compiled(program, *given)
    assert_like_eager(ours, program, given)


SUMS = {
    "after_a_softcap": lambda x, y: torch.tanh(x) + y,
    "multiplied": lambda x, y: x * y,
    "written_before": lambda x, y: x.mul_(2.0) + y,
}


@pytest.mark.parametrize("combine", SUMS.values(), ids=SUMS)
def test_other_combinations_of_two_products_are_left_alone(combine):
    def program(h, w, t):
        return loss_of(combine(F.linear(h, w), F.linear(h.tanh(), w)), t)

    given = (hidden(), weight(), labels())
    ours = run_compiled(program, *given)
    assert ours.report.rewritten == []
    assert_like_eager(ours, program, given)


# ----------------------------------------------------------------------------------------------------- stacked heads


SELECT = {
    "index": lambda x, i: x[:, i],
    "negative": lambda x, i: x[:, i - 2],
    "dots": lambda x, i: x.movedim(1, 1)[:, i] if False else x[:, i, ...],
    "select": lambda x, i: x.select(1, i),
    "unbind": lambda x, i: x.unbind(1)[i],
    "sliced": lambda x, i: x[:, :, 1:][:, i],
    "last_dimension": lambda x, i: x[..., :, i, :, :],
}


@pytest.mark.parametrize("select", SELECT.values(), ids=SELECT)
def test_heads_that_are_stacked_and_selected(select):
    def program(h, w, v, t):
        x = torch.stack([F.linear(h, w), F.linear(h, v)], dim=1)
        loss = torch.zeros([])
        for i in range(2):
            logits = select(x, i).contiguous().view(-1, V)
            loss = loss + F.cross_entropy(logits, t[:, -logits.size(0) // t.size(0) :].reshape(-1))
        return loss / 2

    check(program, hidden(), weight(), weight().detach().flip(0).requires_grad_(), labels(), rewrites=2, calls=2)


def test_stacked_heads_of_which_one_is_read_as_a_whole():
    def program(h, w, v, t):
        x = torch.stack([F.linear(h, w), F.linear(h, v)])
        return F.cross_entropy(x[0].flatten(0, 1), t.flatten()) + 0 * x.norm()

    given = (hidden(), weight(), weight().detach().flip(0).requires_grad_(), labels())
    ours = run_compiled(program, *given)
    assert ours.report.rewritten == []
    assert_like_eager(ours, program, given)


# ------------------------------------------------------------------------------------------------- both directions


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("transpose", [torch.t, lambda x: x.T, lambda x: x.transpose(0, 1), torch.ops.aten.numpy_T])
def test_both_directions_of_a_contrastive_loss(transpose, dtype):
    """CLIP: a loss along each dimension of one product, with a learned temperature."""

    def program(image, text, scale):
        x = (image @ text.t()) * scale.exp()
        target = torch.arange(image.size(0))
        return (F.cross_entropy(x, target) + F.cross_entropy(transpose(x), target)) / 2

    scale = torch.tensor(0.3, requires_grad=True)
    check(program, hidden(20, D, dtype=dtype), weight(20, D, dtype=dtype), scale, calls=2)


# ---------------------------------------------------------------------------------------------------- joined calls


def rows_in_a_loop(h, w, t):
    """TRL reads the log-probabilities row by row."""
    x = F.linear(h, w) / 0.7
    picked = [row.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1) for row, index in zip(x, t, strict=True)]
    return -torch.stack(picked).mean()


def chunks_of_logits(h, w, t):
    pieces = zip(F.linear(h, w).chunk(3, dim=1), t.chunk(3, dim=1), strict=True)
    return sum(F.cross_entropy(x.reshape(-1, V), y.reshape(-1), reduction="sum") for x, y in pieces) / t.numel()


def chunks_of_hidden_states(h, w, t):
    """torchtune multiplies chunk by chunk."""
    total = 0
    for piece, y in zip(h.chunk(4, dim=1), t.chunk(4, dim=1), strict=True):
        total += F.cross_entropy(F.linear(piece, w).float().reshape(-1, V), y.reshape(-1), reduction="sum")
    return total / (t != -100).sum()


def two_heads(h, w, t):
    """Multi-token prediction: one weight, two hidden states, the second made of the first."""
    first = loss_of(F.linear(h[:, :-1], w), t[:, 1:])
    return first + 0.3 * loss_of(F.linear(torch.tanh(h[:, :-2] * 2), w), t[:, 2:])


def preferences(h, w, t):
    """DPO: log-probabilities of the chosen and the rejected half."""
    chosen, rejected = (
        F.linear(part, w).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1).sum(-1)
        for part, y in ((h[:2], t[:2]), (h[1:], t[1:]))
    )
    return -F.logsigmoid(chosen - rejected).mean()


JOINED = {
    "rows_in_a_loop": (rows_in_a_loop, 1),
    "chunks_of_logits": (chunks_of_logits, 1),
    "chunks_of_hidden_states": (chunks_of_hidden_states, 4),
    "two_heads": (two_heads, 2),
    "preferences": (preferences, 2),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("program", "rewrites"), JOINED.values(), ids=JOINED)
def test_losses_on_one_weight_share_a_call(program, rewrites, dtype, dynamic):
    if dynamic and program in (rows_in_a_loop, chunks_of_logits, chunks_of_hidden_states):
        pytest.skip("the number of rows or chunks is a constant of the program")
    given = (hidden(dtype=dtype), torch.nn.Parameter(weight(dtype=dtype).detach()), labels())
    check(program, *given, rewrites=rewrites, dynamic=dynamic, logits_in_memory=rewrites > 1)


@pytest.mark.parametrize("name", ["_key", "_may_move", "_emit"])
def test_a_failure_to_join_leaves_the_calls_apart(monkeypatch, name):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(merge, name, fail)
    check(two_heads, hidden(), weight(), labels(), rewrites=2, calls=2, logits_in_memory=True)


def test_calls_are_not_joined_where_the_second_needs_the_first():
    def program(h, w, t):
        first = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))
        return first + F.cross_entropy(F.linear(h * first, w).view(-1, V), t.view(-1))

    check(program, hidden(), weight(), labels(), rewrites=2, calls=2)


def test_calls_are_not_joined_over_a_write_of_an_operand():
    def program(h, w, t):
        first = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))
        h.zero_()
        return first + F.cross_entropy(F.linear(h + 1, w).view(-1, V), t.view(-1))

    check(program, hidden(requires_grad=False), weight(requires_grad=False), labels(), rewrites=2, calls=2)


def test_calls_are_not_joined_over_something_random():
    def program(h, w, t):
        first = F.dropout(F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), reduction="none"), 0.5).mean()
        return first + F.cross_entropy(F.linear(F.dropout(h, 0.5), w).view(-1, V), t.view(-1))

    check(program, hidden(), weight(), labels(), rewrites=2, calls=2)


def test_calls_on_other_weights_or_with_other_arguments_are_not_joined():
    def program(h, w, v, t):
        x, y = F.linear(h, w).view(-1, V), F.linear(h, v).view(-1, V)
        z = F.linear(h * 2, w).view(-1, V)
        first = F.cross_entropy(x, t.view(-1)) + F.cross_entropy(y, t.view(-1))
        return first + F.cross_entropy(z, t.view(-1), ignore_index=3)

    given = (hidden(), weight(), weight().detach().flip(0).requires_grad_(), labels())
    check(program, *given, rewrites=3, calls=3)


# ------------------------------------------------------------------------------------- log-softmax written by hand


LOG_SOFTMAX = {
    "keepdim": (lambda x: x - x.logsumexp(-1, keepdim=True), 1),
    "unsqueezed": (lambda x: x - torch.logsumexp(x, -1).unsqueeze(-1), 1),
    "index_none": (lambda x: x - x.logsumexp(-1)[..., None], 1),
    "function": (lambda x: torch.sub(x, torch.logsumexp(x, dim=-1, keepdim=True)), 1),
    "of_capped": (lambda x: 3 * torch.tanh(x) - (3 * torch.tanh(x)).logsumexp(-1, keepdim=True), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("log_softmax", "calls"), LOG_SOFTMAX.values(), ids=LOG_SOFTMAX)
def test_log_softmax_written_by_hand(log_softmax, calls, dtype):
    def program(h, w, t):
        log_probs = log_softmax(F.linear(h, w))
        return -log_probs.gather(-1, t.unsqueeze(-1)).squeeze(-1).mean()

    check(program, hidden(dtype=dtype), weight(dtype=dtype), labels(), calls=calls)


OTHERS = {
    "of_other_logits": lambda x: x - (x * 2).logsumexp(-1, keepdim=True),
    "without_gradient": lambda x: x - x.logsumexp(-1, keepdim=True).detach(),
    "of_other_rows": lambda x: x - x[:, :1].logsumexp(-1, keepdim=True),
}


@pytest.mark.parametrize("shift", OTHERS.values(), ids=OTHERS)
def test_other_shifts_of_the_rows_are_left_alone(shift):
    def program(h, w, t):
        return -shift(F.linear(h, w)).gather(-1, t.unsqueeze(-1)).mean()

    given = (hidden(), weight(), labels())
    ours = run_compiled(program, *given)
    assert ours.report.rewritten == []
    assert_like_eager(ours, program, given)


DIVISORS = {
    "tensor": lambda loss, t: loss / (t != -100).sum(),
    "int": lambda loss, t: loss / 7,
    "size": lambda loss, t: loss / t.numel(),
    "float": lambda loss, t: loss / 7.5,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("divide", DIVISORS.values(), ids=DIVISORS)
def test_a_sum_divided_by_the_number_of_items(divide, dynamic):
    def program(h, w, t):
        return divide(F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), reduction="sum"), t)

    check(program, hidden(), torch.nn.Parameter(weight().detach()), labels(ignored=-100), dynamic=dynamic)


def test_late_labels_of_any_arithmetic_do_not_cost_a_second_pass():
    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        z = x.logsumexp(-1).square().mean()
        keep = (t * 2 > S) & (t != 5)
        return z + F.cross_entropy(x, torch.where(keep, t, -100).view(-1))

    check(program, hidden(), weight(), labels())
