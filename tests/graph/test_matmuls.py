"""Every spelling of hidden @ weight.T (+ bias) begins a site."""

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, bias, check, hidden, labels, weight

SPELLINGS = {
    "linear": lambda h, w: F.linear(h, w),
    "linear_by_keyword": lambda h, w: F.linear(input=h, weight=w),
    "linear_none_bias": lambda h, w: F.linear(h, w, None),
    "matmul_t": lambda h, w: torch.matmul(h, w.t()),
    "matmul_T": lambda h, w: torch.matmul(h, w.T),
    "matmul_method": lambda h, w: h.matmul(w.mT),
    "matmul_by_keyword": lambda h, w: torch.matmul(input=h, other=w.T),
    "at": lambda h, w: h @ w.T,
    "at_mT": lambda h, w: h @ w.mT,
    "at_T_of_later_torch": lambda h, w: h @ torch.ops.aten.numpy_T(w),  # Dynamo's x.T from torch 2.14 on
    "at_mT_of_later_torch": lambda h, w: h @ torch.ops.aten.mT(w),
    "at_transpose": lambda h, w: h @ w.transpose(0, 1),
    "at_transpose_negative": lambda h, w: h @ w.transpose(-1, -2),
    "at_permute": lambda h, w: h @ w.permute(1, 0),
    "at_swapaxes": lambda h, w: h @ w.swapaxes(0, 1),
    "mm": lambda h, w: torch.mm(h.flatten(0, 1), w.t()).view(B, S, V),
    "mm_method": lambda h, w: h.view(-1, D).mm(w.t()).view(B, S, V),
    "bmm_batch_of_one": lambda h, w: torch.bmm(h.view(1, -1, D), w.t().unsqueeze(0)).view(B, S, V),
    "einsum_weight_first_letter": lambda h, w: torch.einsum("bsd,vd->bsv", h, w),
    "einsum_spaces": lambda h, w: torch.einsum("b s d, v d -> b s v", h, w),
    "einsum_transposed": lambda h, w: torch.einsum("bsd,dv->bsv", h, w.T),
    "einsum_list": lambda h, w: torch.einsum("bsd,vd->bsv", [h, w]),
    "einsum_flat": lambda h, w: torch.einsum("nd,vd->nv", h.flatten(0, 1), w).view(B, S, V),
    "einsum_dots": lambda h, w: torch.einsum("...d,vd->...v", h, w),
    "einsum_dots_transposed": lambda h, w: torch.einsum("...d,dv->...v", h, w.T),
    "einsum_weight_first": lambda h, w: torch.einsum("vd,b...d->b...v", w, h),
    "einsum_width_first": lambda h, w: torch.einsum("dbs,vd->bsv", h.permute(2, 0, 1), w),
    "functional_namespace": lambda h, w: torch._C._nn.linear(h, w),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_product(spelling):
    def program(h, w, t):
        return F.cross_entropy(spelling(h, w).view(-1, V), t.view(-1))

    check(program, hidden(), weight(), labels())


WITH_BIAS = {
    "linear": lambda h, w, b: F.linear(h, w, b),
    "linear_by_keyword": lambda h, w, b: F.linear(h, w, bias=b),
    "addmm": lambda h, w, b: torch.addmm(b, h.flatten(0, 1), w.t()),
    "addmm_row": lambda h, w, b: torch.addmm(b.view(1, V), h.flatten(0, 1), w.t()),
    "addmm_method": lambda h, w, b: b.addmm(h.flatten(0, 1), w.t()),
    "baddbmm": lambda h, w, b: torch.baddbmm(b, h.view(1, -1, D), w.t().unsqueeze(0)),
    "addmm_weighed": lambda h, w, b: torch.addmm(b, h.flatten(0, 1), w.t(), beta=0.5, alpha=2.0),
    "baddbmm_weighed": lambda h, w, b: torch.baddbmm(b, h.view(1, -1, D), w.t().unsqueeze(0), alpha=0.25),
    "baddbmm_block": lambda h, w, b: torch.baddbmm(b.view(1, 1, V), h.view(1, -1, D), w.t().unsqueeze(0)),
}


@pytest.mark.parametrize("spelling", WITH_BIAS.values(), ids=WITH_BIAS)
def test_every_spelling_of_the_product_with_a_bias(spelling):
    def program(h, w, b, t):
        return F.cross_entropy(spelling(h, w, b).view(-1, V), t.view(-1))

    check(program, hidden(), weight(), bias(), labels())


WEIGHTS = {
    "rows": lambda w: w[:V],
    "later_rows": lambda w: w[4 : V + 4],
    "cast": lambda w: w.to(torch.bfloat16),
    "cast_method": lambda w: w.bfloat16(),
    "cast_then_transposed_twice": lambda w: w.to(torch.bfloat16).t().t(),
    "scaled": lambda w: w * 0.5,
    "normalized": lambda w: F.normalize(w, dim=-1),
    "detached": lambda w: w.detach(),
    "concatenated": lambda w: torch.cat([w[:20], w[20:V] * 2]),
    "not_contiguous": lambda w: w.t().contiguous().t(),
}


@pytest.mark.parametrize("expression", WEIGHTS.values(), ids=WEIGHTS)
def test_the_weight_may_be_an_expression(expression):
    def program(h, w, t):
        logits = F.linear(h.to(expression(w).dtype), expression(w))
        classes = logits.size(-1)
        return F.cross_entropy(logits.view(-1, classes), t.view(-1))

    rows = V if expression is not WEIGHTS["rows"] and expression is not WEIGHTS["later_rows"] else V + 4
    check(program, hidden(), weight(rows, D), labels())


def test_a_cast_of_the_weight_is_left_to_the_operator():
    """Its gradient comes back in float32 without a bfloat16 copy of the weight."""

    def program(h, w, t):
        return F.cross_entropy((h @ w.to(torch.bfloat16).t()).flatten(0, 1).float(), t.flatten())

    ours = check(program, hidden(dtype=torch.bfloat16), weight(), labels())
    [call] = ours.operator_calls
    assert call.args[1].meta["example_value"].dtype == torch.float32
    assert ours.gradients[1].dtype == torch.float32


def test_a_cast_without_gradients_gives_none():
    def program(h, w, t):
        with torch.no_grad():
            narrow = w.to(torch.bfloat16)
        return F.cross_entropy((h @ narrow.t()).flatten(0, 1).float(), t.flatten())

    ours = check(program, hidden(dtype=torch.bfloat16), weight(), labels())
    assert ours.gradients[1] is None


def test_a_transpose_without_gradients_gives_none():
    def program(h, w, t):
        with torch.no_grad():
            transposed = w.t()
        return F.cross_entropy((h @ transposed).flatten(0, 1), t.flatten())

    ours = check(program, hidden(), weight(), labels())
    assert ours.gradients[1] is None


def test_a_weight_written_after_its_cast_keeps_the_value_of_the_cast():
    def program(h, w, t):
        narrow = w.to(torch.bfloat16)
        w.mul_(2.0)
        return F.cross_entropy((h @ narrow.t()).flatten(0, 1).float(), t.flatten())

    ours = check(program, hidden(dtype=torch.bfloat16), weight(requires_grad=False), labels())
    assert ours.operator_calls[0].args[1].meta["example_value"].dtype == torch.bfloat16


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, D)
        self.head = torch.nn.Linear(D, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        logits = self.head(self.embedding(tokens))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_tied_embedding():
    torch.manual_seed(0)
    check(lambda model, tokens: model(tokens), Tied(), labels())


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_module(with_bias):
    torch.manual_seed(0)

    def program(head, h, t):
        return F.cross_entropy(head(h).view(-1, V), t.view(-1))

    check(program, torch.nn.Linear(D, V, bias=with_bias), hidden(), labels())


def test_one_row_without_a_batch():
    def program(h, w, b, t):
        return F.cross_entropy(F.linear(h, w, b), t)

    check(program, hidden(D), weight(), bias(), labels(1)[0], logits_in_memory=True)


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_any_number_of_row_dimensions(dims):
    shape = (2, 3, 1, 5)[: dims - 1]

    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.reshape(-1))

    check(program, hidden(*shape, D), weight(), labels(*shape), logits_in_memory=dims < 5)


def test_hidden_states_that_are_not_contiguous():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h.transpose(0, 1), w).flatten(0, 1), t.t().flatten())

    check(program, hidden(), weight(), labels())


def test_einsum_that_moves_rows_and_vocabulary():
    def program(h, w, t):
        return F.cross_entropy(torch.einsum("bsd,vd->svb", h, w), t.t())

    check(program, hidden(), weight(), labels())


NOT_HEADS = {
    "einsum_of_batches": lambda h, w: torch.einsum("bsd,bvd->bsv", h, w.expand(B, V, D)),
    "einsum_without_arrow": lambda h, w: torch.einsum("bsd,zd", h, w),
    "two_batches": lambda h, w: torch.bmm(h, w.t().expand(B, D, V)),
    "three_operands": lambda h, w: torch.einsum("bsd,vd,d->bsv", h, w, w[0]),
    "vocabulary_in_both": lambda h, w: torch.einsum("bsd,sd->bsd", h, h[0]) @ w[:, :].repeat(1, 1)[None].mT,
}


@pytest.mark.parametrize("form", NOT_HEADS.values(), ids=NOT_HEADS)
def test_other_products_are_left_alone(form):
    def program(h, w, t):
        return F.cross_entropy(form(h, w).reshape(-1, V), t.view(-1))

    check(program, hidden(), weight(), labels(), rewrites=0, calls=0, refusals=1, logits_in_memory=True)
