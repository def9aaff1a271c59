"""Class indices that take the shape of the logits: one-hot rows times logits, and `Categorical.log_prob`."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    S,
    V,
    bias,
    check,
    check_left_alone,
    check_refused,
    hidden,
    labels,
    weight,
)
from torch.distributions import Categorical

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EPS = 0.1


def logits_of(h, w):
    return F.linear(h, w).view(-1, V)


# ------------------------------------------------------------------------------------------------------ Categorical


def policy_gradient(h, w, t):
    policy = Categorical(logits=F.linear(h, w))
    return -(policy.log_prob(t) * 0.5).mean() - 0.01 * policy.entropy().mean()


def clipped_objective(h, w, t):
    """PPO, with the log-probabilities of a policy before."""
    policy = Categorical(logits=F.linear(h, w)[:, :-1] / 0.7)
    ratio = torch.exp(policy.log_prob(t[:, 1:]) + 4.0)
    return -torch.min(ratio, ratio.clamp(0.8, 1.2)).mean() + 0.1 * policy.entropy().mean()


POLICIES = {
    "log_prob": lambda h, w, t: Categorical(logits=F.linear(h, w)).log_prob(t),
    "flat": lambda h, w, t: Categorical(logits=logits_of(h, w).float()).log_prob(t.view(-1)),
    "policy_gradient": policy_gradient,
    "clipped_objective": clipped_objective,
}


@DTYPES
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_log_probabilities_of_a_categorical(policy, dtype):
    check(policy, hidden(dtype=dtype), weight(dtype=dtype), labels())


def test_a_categorical_of_dynamic_sizes():
    check(policy_gradient, hidden(), weight(), labels(), dynamic=True)


def test_actions_that_several_policies_share():
    """One action for all rows of the batch is broadcast to them, which is not known."""

    def program(h, w, t):
        return Categorical(logits=F.linear(h, w)).log_prob(t)  # <-

    run = check_refused(
        program,
        *(hidden(), weight(), labels(S)),
        operation="broadcast_tensors",
        reason="broadcast against a larger tensor",
        marker=None,
    )
    assert "categorical.py" in run.report.refused[0].location


def test_actions_written_after_they_were_used():
    def program(h, w, t):
        picked = Categorical(logits=F.linear(h, w)).log_prob(t)
        t.zero_()
        return picked

    given = hidden(requires_grad=False), weight(requires_grad=False), labels()
    check_left_alone(program, *given)


# ----------------------------------------------------------------------------------------------------- one-hot rows


def filled(x, t):
    """Label smoothing as in many a repository."""
    q = torch.zeros_like(x)
    q.fill_(EPS / (V - 1))
    q.scatter_(1, t.unsqueeze(1), 1 - EPS)
    return (-q * x.log_softmax(-1)).sum(dim=-1).mean()


def full(x, t):
    q = torch.full((len(t), V), EPS / V).scatter_(1, t[:, None], 1 - EPS + EPS / V)
    return -torch.sum(q * x.float().log_softmax(-1)) / len(t)


def others_smoothed(q):
    return q.float() * (1 - EPS) + (1 - q) * EPS / (V - 1)


FORMS = {
    "one_hot": lambda x, t: -(F.one_hot(t, V) * F.log_softmax(x, dim=-1)).sum(-1),
    "log_softmax_first": lambda x, t: -torch.sum(F.log_softmax(x, dim=-1) * F.one_hot(t, V), dim=1).mean(),
    "float": lambda x, t: (-F.one_hot(t, num_classes=V).float() * x.log_softmax(-1)).sum(-1, keepdim=True),
    "to": lambda x, t: -(F.one_hot(t, x.size(-1)).to(x.dtype) * x.log_softmax(-1)).sum(-1),
    "type_as": lambda x, t: (F.one_hot(t, V).type_as(x) * -x.log_softmax(-1)).sum(-1),
    "type_as_last": lambda x, t: (-x.log_softmax(-1) * F.one_hot(t, V).type_as(x)).sum(-1),
    "probabilities_first": lambda x, t: (x.softmax(-1) * torch.zeros_like(x).scatter_(1, t[:, None], 1)).sum(-1),
    "logits": lambda x, t: (x.logsumexp(-1) - (x * F.one_hot(t, V)).sum(-1)).mean(),
    "everything": lambda x, t: -(F.one_hot(t, V) * x.log_softmax(-1)).sum() / len(t),
    "scaled": lambda x, t: (2 * (F.one_hot(t, V) * x.log_softmax(-1)) * -0.5).sum(-1),
    "probabilities": lambda x, t: (1 - (x.softmax(-1) * F.one_hot(t, V)).sum(-1)).square().mean(),
    "smoothed_probabilities": lambda x, t: (x.softmax(-1) * (F.one_hot(t, V) * 0.9 + EPS / V)).sum(-1),
    "smoothed": lambda x, t: -(((1 - EPS) * F.one_hot(t, V) + EPS / V) * x.log_softmax(-1)).sum(-1).mean(),
    "smoothed_others": lambda x, t: -(others_smoothed(F.one_hot(t, V)).detach() * x.log_softmax(-1)).sum(-1),
    "smoothed_shift": lambda x, t: -((F.one_hot(t, V) / 2 + (EPS - 0.01)) * x.log_softmax(-1)).sum(-1),
    "smoothed_logits": lambda x, t: x.logsumexp(-1).mean() - ((F.one_hot(t, V) * 0.9 + EPS / V) * x).sum(-1).mean(),
    "scatter": lambda x, t: -(torch.zeros(len(t), V).scatter(-1, t[:, None], 1.0) * x.log_softmax(-1)).sum(-1),
    "scatter_in_place": lambda x, t: -(torch.zeros_like(x).scatter_(1, t[:, None], 1) * x.log_softmax(-1)).sum(-1),
    "filled": filled,
    "full": full,
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_hot_rows_times_logits(form, dtype):
    check(lambda h, w, t: form(logits_of(h, w), t.view(-1)), hidden(dtype=dtype), weight(dtype=dtype), labels())


def test_several_row_dimensions_a_bias_and_a_cap():
    def program(h, w, b, t):
        log_p = (3 * torch.tanh(F.linear(h, w, b) / 3)).log_softmax(-1)
        return -(F.one_hot(t, V).float() * log_p).sum(-1)

    check(program, hidden(), weight(), bias(), labels())


def test_dynamic_rows():
    def program(h, w, t):
        return -(F.one_hot(t.view(-1), V).float() * logits_of(h, w).log_softmax(-1)).sum(-1)

    check(program, hidden(), weight(), labels(), dynamic=True)


def test_one_hot_rows_that_something_else_reads_stay():
    def program(h, w, t):
        q = F.one_hot(t.view(-1), V).float()
        return -(q * logits_of(h, w).log_softmax(-1)).sum(-1), q.mean(0)

    check(program, hidden(), weight(), labels(), logits_in_memory=True)


def test_a_class_outside_the_vocabulary_raises():
    wrong = labels()
    wrong[0, 0] = V
    with pytest.raises(RuntimeError):
        check(lambda h, w, t: (F.one_hot(t, V) * F.linear(h, w).log_softmax(-1)).sum(-1), hidden(), weight(), wrong)


def two_hot(x, t):
    q = torch.zeros_like(x).scatter_(1, t[:, None], 0.5).scatter_(1, t.roll(1)[:, None], 0.5)
    return -(q * x.log_softmax(-1)).sum(-1)


def padding(x, t):
    q = torch.zeros_like(x).scatter_(1, t[:, None], 0.5)
    q[:, 3] = 0.0
    return -(q * x.log_softmax(-1)).sum(-1)


def labels_written_later(x, t):
    t = t.clone()
    q = F.one_hot(t, V)
    t.zero_()
    return -(q * x.log_softmax(-1)).sum(-1)


def cast_to_whole_numbers(x, t):
    q = (F.one_hot(t, V) * 0.9 + 0.05).long()
    return -(q * x.log_softmax(-1)).sum(-1)


def masked_with_infinity(x, t):
    x = x.masked_fill(torch.arange(V) == 5, -torch.inf)
    return -(F.one_hot(t, V) * x.log_softmax(-1)).sum(-1).nan_to_num()


def combined_with_the_logits(x, t):
    q = torch.zeros_like(x).scatter_(1, t[:, None], 0.5) + x
    return -(q * x.log_softmax(-1)).sum(-1)


def other_rows(x, t):
    q = torch.zeros_like(x).scatter_(0, t[None, :3] % 5, 1.0)
    return -(q * x.log_softmax(-1)).sum(-1)


OTHERS = (
    two_hot,
    padding,
    labels_written_later,
    cast_to_whole_numbers,
    masked_with_infinity,
    combined_with_the_logits,
    other_rows,
)


@pytest.mark.parametrize("form", OTHERS, ids=lambda form: form.__name__)
def test_what_only_looks_like_it_is_left_alone(form):
    def program(h, w, t):
        x = logits_of(h, w)
        return form(x, t.view(-1)), F.cross_entropy(x, t.view(-1))

    check_left_alone(program, hidden(), weight(), labels())
