"""Other readers of the logits in the same pass: accuracy, confidence and entropy, with and without gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import B, S, V, bias, check, hidden, labels, run_compiled, weight
from torch.distributions import Categorical

MASK = torch.arange(V) % 5 == 2


def logits_of(h, w):
    return F.linear(h, w).view(-1, V)


def without_gradient(function, x):
    with torch.no_grad():
        return function(x)


def in_pieces(x):
    """Entropies as TRL computes them."""
    pieces = []
    for piece in x.split(11, dim=0):
        log_p = F.log_softmax(piece, dim=-1)
        pieces.append(-(torch.exp(log_p) * log_p).sum(-1))
    return torch.cat(pieces)


MAXIMA = {
    "argmax": lambda x: x.argmax(-1),
    "argmax_keyword": lambda x: torch.argmax(x, dim=1, keepdim=True),
    "argmax_without_gradient": lambda x: without_gradient(lambda x: x.argmax(dim=-1), x),
    "argmax_detached": lambda x: x.detach().argmax(-1),
    "argmax_of_log_softmax": lambda x: x.log_softmax(-1).argmax(-1),
    "argmax_of_softmax": lambda x: x.softmax(-1).argmax(-1),
    "max": lambda x: x.max(-1),
    "max_indices": lambda x: torch.max(x, 1)[1],
    "max_values": lambda x: x.max(dim=-1).values,
    "max_keepdim": lambda x: torch.max(x, dim=-1, keepdim=True),
    "max_of_log_softmax": lambda x: x.log_softmax(-1).max(-1).values,
    "confidence": lambda x: F.softmax(x, dim=-1).max(dim=-1).values,
    "confidence_without_gradient": lambda x: without_gradient(lambda x: F.softmax(x, -1).amax(-1), x),
    "amax_detached": lambda x: x.detach().amax(-1, keepdim=True),
}  # fmt: skip
ENTROPIES = {
    "softmax_log_softmax": lambda x: -(F.softmax(x, dim=-1) * F.log_softmax(x, dim=-1)).sum(-1),
    "log_softmax_softmax": lambda x: -torch.sum(x.log_softmax(1) * x.softmax(1), dim=1),
    "negative_before": lambda x: (-F.softmax(x, -1) * F.log_softmax(x, -1)).sum(dim=-1, keepdim=True),
    "negative_product": lambda x: (-(x.softmax(-1) * x.log_softmax(-1))).sum(-1),
    "negated_log_softmax": lambda x: (x.softmax(-1) * -x.log_softmax(-1)).sum(-1),
    "in_bits": lambda x: (x.log_softmax(-1) / -0.6931 * x.softmax(-1)).sum(-1),
    "scaled_product": lambda x: (2 * (x.softmax(-1) * x.log_softmax(-1)) / -3).sum(-1),
    "entr": lambda x: torch.special.entr(x.softmax(-1)).sum(-1),
    "negated_log_first": lambda x: torch.sum(torch.neg(x.log_softmax(-1)) * x.softmax(-1), -1, keepdim=True),
    "exp_of_log_softmax": lambda x: -(x.log_softmax(-1).exp() * x.log_softmax(-1)).sum(-1),
    "logsumexp": lambda x: torch.logsumexp(x, dim=-1) - torch.sum(F.softmax(x, dim=-1) * x, dim=-1),
    "expected_logit": lambda x: (x * x.softmax(-1)).sum(-1),
    "in_pieces": in_pieces,
    "categorical": lambda x: Categorical(logits=x).entropy(),
    "upcast": lambda x: -(F.softmax(x, -1, dtype=torch.float32) * F.log_softmax(x, -1, dtype=torch.float32)).sum(-1),
    "without_gradient": lambda x: without_gradient(ENTROPIES["softmax_log_softmax"], x),
    "detached": lambda x: ENTROPIES["logsumexp"](x.detach()),
}  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("reader", (MAXIMA | ENTROPIES).values(), ids=MAXIMA | ENTROPIES)
def test_one_operator_call_serves_the_loss_and_a_reader(reader, dtype):
    def program(h, w, t):
        x = logits_of(h, w)
        return F.cross_entropy(x, t.view(-1)), reader(x)

    check(program, hidden(dtype=dtype), weight(dtype=dtype), labels(ignored=-100))


@DTYPES
@pytest.mark.parametrize("reader", ENTROPIES.values(), ids=ENTROPIES)
def test_an_entropy_alone(reader, dtype):
    def program(h, w):
        return reader(3 * torch.tanh(logits_of(h, w).float() / 3))

    check(program, hidden(dtype=dtype), weight(dtype=dtype))


@DTYPES
def test_an_accuracy_in_the_shape_of_the_labels(dtype):
    def program(h, w, t):
        x = F.linear(h, w)
        hits = (x.argmax(-1) == t) & (t != -100)
        return F.cross_entropy(x.view(-1, V).float(), t.view(-1)), hits.sum() / (t != -100).sum()

    check(program, hidden(dtype=dtype), weight(dtype=dtype), labels(ignored=-100))


def test_a_loss_with_an_entropy_bonus_and_all_readers():
    def program(h, w, b, t):
        x = F.linear(h, w, b)[:, :-1] / 0.7
        log_p = x.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = -log_p.gather(-1, t[:, 1:, None]).squeeze(-1) - 0.1 * entropy
        return loss.mean() + 1e-3 * x.logsumexp(-1).square().mean(), x.max(-1), entropy.detach(), x.argmax(-1)

    check(program, hidden(), weight(), bias(), labels())


@pytest.mark.parametrize("dynamic", [False, True])
def test_logits_that_are_returned_too_stay_lazy(dynamic):
    def program(h, w, t):
        x = F.linear(h, w)
        p = x.softmax(-1)
        return F.cross_entropy(x.view(-1, V), t.view(-1)), x.argmax(-1), -(p * x.log_softmax(-1)).sum(-1), x

    ours = check(program, hidden(), weight(), labels(), dynamic=dynamic)
    assert ours.report.rewritten[0].returned == "lazy"


@pytest.mark.parametrize("number", [-1e4, -torch.inf])
def test_masked_classes(number):
    def program(h, w, t):
        x = logits_of(h, w).masked_fill(MASK, number)
        loss = F.cross_entropy(x, t.view(-1), reduction="none")
        return loss, x.argmax(-1), x.max(-1).values, Categorical(logits=x).entropy()

    check(program, hidden(), weight(), torch.zeros(B, S, dtype=torch.int64))


def test_the_gradient_of_a_maximum_goes_to_the_first_of_equal_logits():
    def program(h, w, t):
        x = logits_of(h, w)
        return F.cross_entropy(x, t.view(-1)), x.max(-1)

    h, w = hidden().detach().round().requires_grad_(), weight().detach().round()
    w[V // 2 :] = w[: V - V // 2].clone()
    check(program, h, w.requires_grad_(), labels())


def test_a_detached_reader_before_the_loss():
    """The first call of the operator would have no gradient, so there are two."""

    def program(h, w, t):
        x = logits_of(h, w)
        return x.detach().argmax(-1), F.cross_entropy(x, t.view(-1))

    check(program, hidden(), weight(), labels(), calls=2)


def log_of_softmax(x):
    p = F.softmax(x, -1)
    return -(p * torch.log(p)).sum(-1)  # <-


def log_of_shifted_softmax(x):
    p = F.softmax(x, -1)
    return -(p * torch.log(p + 1e-8)).sum(-1)  # <-


def detached_weights(x):
    return -(x.softmax(-1).detach() * x.log_softmax(-1)).sum(-1)  # <-


def other_temperature(x):
    return -(x.softmax(-1) * F.log_softmax(x / 2, -1)).sum(-1)  # <-


def masked_with_infinity(x):
    x = x.masked_fill(MASK, -torch.inf)
    return -(x.softmax(-1) * x.log_softmax(-1)).sum(-1)  # <-


def amax(x):
    return x.amax(-1)  # <-


REFUSED = {
    "log": (log_of_softmax, "rounded to zero; use log_softmax"),
    "add": (log_of_shifted_softmax, "`add` of the logits (softmax) is not understood"),
    "mul": (detached_weights, "something else than the same logits"),
    "mul ": (other_temperature, "something else than the same logits"),
    "mul  ": (masked_with_infinity, "0 * -inf"),
    "amax": (amax, "spreads its gradient over equal logits"),
}


@pytest.mark.parametrize(("operation", "case"), REFUSED.items(), ids=[case[0].__name__ for case in REFUSED.values()])
def test_what_only_looks_like_it_is_left_alone(operation, case):
    reader, reason = case

    def program(h, w, t):
        x = logits_of(h, w)
        return F.cross_entropy(x, t.view(-1)) + reader(x).nan_to_num().mean()

    run = run_compiled(program, hidden(), weight(), labels())
    assert run.report.rewritten == []
    assert run.report.refused[0].operation == operation.strip()
    assert reason in str(run.report.refused[0])
