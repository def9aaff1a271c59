"""Several classes picked in each row: one pass over the vocabulary, whatever their number."""

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, bias, check, check_refused, hidden, labels, weight

K = 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def ids(*rows):
    return labels(*(rows or (B, S)), K)


def distillation(x, i):
    """Towards the likeliest classes of a teacher."""
    log_p = x.float().log_softmax(-1).gather(-1, i)
    teacher = torch.linspace(0.1, 0.4, K).expand_as(log_p)
    return (teacher * (teacher.log() - log_p)).sum(-1).mean()


FORMS = {
    "log_softmax": lambda x, i: x.log_softmax(-1).gather(-1, i),
    "gather_logsumexp": lambda x, i: x.gather(-1, i) - x.logsumexp(-1, keepdim=True),
    "take_along_dim": lambda x, i: torch.take_along_dim(x.log_softmax(-1), i, dim=-1),
    "probabilities": lambda x, i: x.softmax(-1).gather(-1, i).sum(-1),
    "negated": lambda x, i: (-x.log_softmax(-1)).gather(-1, i).mean(),
    "capped": lambda x, i: (3 * torch.tanh(x / 3)).log_softmax(-1).gather(-1, i),
    "rows": lambda x, i: x[:, 1:].log_softmax(-1).gather(-1, i[:, :-1]),
    "flat": lambda x, i: x.view(-1, V).log_softmax(-1).gather(1, i.view(-1, K)),
    "many": lambda x, i: x.log_softmax(-1).gather(-1, i.repeat(1, 1, 5)),
    "none": lambda x, i: x.log_softmax(-1).gather(-1, i[..., :0]),
    "distillation": distillation,
    "with_others": lambda x, i: (
        x.log_softmax(-1).gather(-1, i).sum() + x.logsumexp(-1).square().mean(),
        x.argmax(-1),
        -(x.softmax(-1) * x.log_softmax(-1)).sum(-1),
    ),
}


@DTYPES
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_operator_call_serves_all_ids(form, dtype):
    check(
        lambda h, w, b, i: form(F.linear(h, w, b), i),
        hidden(dtype=dtype),
        weight(dtype=dtype),
        bias(dtype=dtype),
        ids(),
    )


@pytest.mark.parametrize("form", [FORMS["gather_logsumexp"], distillation])
def test_dynamic_sizes(form):
    check(lambda h, w, i: form(F.linear(h, w), i), hidden(), weight(), ids(), dynamic=True)


def test_the_same_class_several_times():
    def program(h, w, i):
        return F.linear(h, w).log_softmax(-1).gather(-1, i)

    check(program, hidden(), weight(), labels(B, S, 1).expand(B, S, K))


def test_confident_rows():
    """Their log-probabilities are less than a rounding of the logits."""

    def program(h, w, i):
        return F.linear(h, w).log_softmax(-1).gather(-1, i)

    i = ids(B * S)
    check(program, (16 * weight().detach()[i[:, 0]]).requires_grad_(), weight(), i)


def test_unbatched():
    check(
        lambda h, w, i: F.linear(h, w).log_softmax(-1).gather(-1, i),
        hidden(D),
        weight(),
        ids(1)[0],
        logits_in_memory=True,
    )


def test_a_loss_of_one_class_beside_them_takes_a_call_of_its_own():
    def program(h, w, t, i):
        x = F.linear(h, w)
        return F.cross_entropy(x.view(-1, V), t.view(-1)) + distillation(x, i)

    check(program, hidden(), weight(), labels(ignored=-100), ids(), calls=2)


def test_chunks_of_the_rows_share_a_call():
    def program(h, w, i):
        chunks = zip(h.split(3, 1), i.split(3, 1), strict=True)
        return sum(F.linear(part, w).log_softmax(-1).gather(-1, classes).sum() for part, classes in chunks)

    check(program, hidden(), weight(), ids(), rewrites=3)


def test_chunks_with_different_numbers_of_ids_do_not():
    def program(h, w, i, j):
        first, second = F.linear(h[:1], w).log_softmax(-1), F.linear(h[1:], w).log_softmax(-1)
        return first.gather(-1, i).sum() + second.gather(-1, j).sum()

    check(program, hidden(), weight(), ids(1, S), labels(B - 1, S, K - 1), rewrites=2, calls=2)


def test_along_another_dimension_than_the_last():
    def program(h, w, i):
        x = F.linear(h, w).log_softmax(-1).transpose(1, 2)
        return x.gather(1, i)  # <-

    given = hidden(), weight(), ids().transpose(1, 2)
    check_refused(program, *given, operation="gather", reason="several classes along another dimension than the last")


def test_a_class_outside_the_vocabulary_raises_as_in_eager():
    i = ids()
    i[1, 2, 1] = V
    with pytest.raises(RuntimeError, match="out of bounds"):
        check(lambda h, w, i: F.linear(h, w).gather(-1, i), hidden(), weight(), i)
