"""Operations on the rows of the logits are replayed on the hidden states.

Each operation is applied to logits and labels alike, so that the rows stay with their labels.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, check, hidden, labels, run_compiled, weight

# (operation on the logits [B, S, V], the same on the labels [B, S])
ROWS = {
    "view": (lambda x: x.view(-1, V), lambda t: t.view(-1)),
    "view_tuple": (lambda x: x.view((B * S, V)), lambda t: t.view((B * S,))),
    "view_minus_one_last": (lambda x: x.view(B * S, -1), lambda t: t.view(-1)),
    "view_size": (lambda x: x.view(-1, x.size(-1)), lambda t: t.view(-1)),
    "view_shape": (lambda x: x.view(-1, x.shape[-1]), lambda t: t.view(-1)),
    "view_four_dims": (lambda x: x.view(B, 1, S, V), lambda t: t.view(B, 1, S)),
    "view_as": (lambda x: x.view_as(x), lambda t: t),
    "reshape": (lambda x: x.reshape(-1, V), lambda t: t.reshape(-1)),
    "reshape_rows": (lambda x: x.reshape(S, B, V), lambda t: t.reshape(S, B)),
    "reshape_function": (lambda x: torch.reshape(x, (S, -1, V)), lambda t: torch.reshape(t, (S, -1))),
    "flatten": (lambda x: x.flatten(0, 1), lambda t: t.flatten()),
    "flatten_keywords": (lambda x: torch.flatten(x, start_dim=0, end_dim=-2), lambda t: t.flatten()),
    "flatten_input_keyword": (lambda x: torch.flatten(input=x, start_dim=0, end_dim=1), lambda t: t.flatten()),
    "unflatten": (lambda x: x.unflatten(1, (1, S)), lambda t: t.unflatten(1, (1, S))),
    "unflatten_tail": (lambda x: x.flatten(0, 1).unflatten(0, (S, B)), lambda t: t.flatten().unflatten(0, (S, B))),
    "slice": (lambda x: x[:, :-1], lambda t: t[:, 1:]),
    "slice_ellipsis": (lambda x: x[..., :-1, :], lambda t: t[..., 1:]),
    "slice_of_nothing": (lambda x: x[:, 0:, :], lambda t: t),
    "slice_step": (lambda x: x[:, ::2], lambda t: t[:, ::2]),
    "slice_two": (lambda x: x[1:, :-1], lambda t: t[1:, :-1]),
    "slice_last": (lambda x: x[:, -4:, :], lambda t: t[:, -4:]),
    "ellipsis_alone": (lambda x: x[...], lambda t: t[...]),
    "none_first": (lambda x: x[None], lambda t: t[None]),
    "none_inside": (lambda x: x[:, None], lambda t: t[:, None]),
    "none_before_ellipsis": (lambda x: x[:, :, None, :], lambda t: t[:, :, None]),
    "int": (lambda x: x[1:, 2], lambda t: t[1:, 2]),
    "int_first": (lambda x: x[1], lambda t: t[1]),
    "int_negative": (lambda x: x[:, -1], lambda t: t[:, -1]),
    "index_tensor": (lambda x: x[:, torch.tensor([4, 0, 2])], lambda t: t[:, torch.tensor([4, 0, 2])]),
    "index_tensor_first": (lambda x: x[torch.tensor([2, 0])], lambda t: t[torch.tensor([2, 0])]),
    "index_matrix": (
        lambda x: x[:, torch.tensor([[4, 0], [2, 2]])],
        lambda t: t[:, torch.tensor([[4, 0], [2, 2]])],
    ),
    "index_arange": (lambda x: x[:, torch.arange(S - 1)], lambda t: t[:, torch.arange(1, S)]),
    "narrow": (lambda x: x.narrow(1, 1, 4), lambda t: t.narrow(1, 1, 4)),
    "narrow_keywords": (lambda x: torch.narrow(x, dim=1, start=0, length=5), lambda t: t[:, :5]),
    "select": (lambda x: x.select(1, 3), lambda t: t.select(1, 3)),
    "select_keywords": (lambda x: torch.select(x, dim=0, index=1), lambda t: t[1]),
    "index_select": (
        lambda x: x.index_select(1, torch.tensor([5, 1])),
        lambda t: t.index_select(1, torch.tensor([5, 1])),
    ),
    "transpose": (lambda x: x.transpose(0, 1), lambda t: t.transpose(0, 1)),
    "transpose_negative": (lambda x: x.transpose(-3, -2), lambda t: t.t()),
    "swapaxes": (lambda x: x.swapaxes(0, 1), lambda t: t.swapaxes(0, 1)),
    "permute": (lambda x: x.permute(1, 0, 2), lambda t: t.permute(1, 0)),
    "permute_tuple": (lambda x: x.permute((1, 0, 2)), lambda t: t.t()),
    "movedim": (lambda x: x.movedim(0, 1), lambda t: t.movedim(0, 1)),
    "moved_away_and_back": (lambda x: x.permute(2, 1, 0).transpose(0, 2), lambda t: t),
    "vocabulary_to_the_front_and_back": (lambda x: x.movedim(-1, 0)[:, :, 1:].movedim(0, -1), lambda t: t[:, 1:]),
    "unsqueeze": (lambda x: x.unsqueeze(0), lambda t: t.unsqueeze(0)),
    "unsqueeze_before_last": (lambda x: x.unsqueeze(-2), lambda t: t.unsqueeze(-1)),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze(1), lambda t: t),
    "squeeze_all": (lambda x: x[:, None].squeeze(), lambda t: t),
    "contiguous": (lambda x: x[:, :-1].contiguous(), lambda t: t[:, 1:].contiguous()),
    "clone": (lambda x: x.clone(), lambda t: t.clone()),
    "clone_format": (lambda x: x.clone(memory_format=torch.contiguous_format), lambda t: t),
    "chain": (
        lambda x: x.transpose(0, 1)[1:, ..., None, :].contiguous().view(S - 1, B, V)[:, :2],
        lambda t: t.t()[1:][:, :2],
    ),
}


@pytest.mark.parametrize(("on_logits", "on_labels"), ROWS.values(), ids=ROWS)
def test_rows(on_logits, on_labels):
    def program(h, w, t):
        logits, target = on_logits(F.linear(h, w)), on_labels(t)
        return F.cross_entropy(logits.reshape(-1, V), target.reshape(-1), ignore_index=-1)

    check(program, hidden(), weight(), labels(ignored=-1, every=5))


PIECES = {
    "chunk": lambda x: x.chunk(3, dim=1),
    "chunk_function": lambda x: torch.chunk(x, chunks=2, dim=1),
    "split": lambda x: x.split(2, dim=1),
    "split_sizes": lambda x: x.split([4, 2, 1], dim=1),
    "split_keyword": lambda x: torch.split(x, split_size_or_sections=3, dim=1),
    "tensor_split": lambda x: x.tensor_split(3, dim=1),
    "tensor_split_indices": lambda x: torch.tensor_split(x, (2, 5), dim=1),
    "unbind": lambda x: x.unbind(1),
    "unbind_first": lambda x: torch.unbind(x),
    "slices": lambda x: (x[:, :3], x[:, 3:]),
    "rows": lambda x: tuple(x[i] for i in range(B)),
    "iteration": lambda x: tuple(row for row in x),
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_pieces_of_the_rows(pieces):
    """Chunked losses: every piece ends in a loss of its own; one call serves all."""

    def program(h, w, t):
        losses = [
            F.cross_entropy(x.reshape(-1, V), y.reshape(-1), reduction="sum")
            for x, y in zip(pieces(F.linear(h, w)), pieces(t), strict=True)
        ]
        return torch.stack(losses).sum() / t.numel()

    check(program, hidden(), weight(), labels())


def test_one_piece_of_several():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).chunk(3, dim=1)[1].flatten(0, 1), t.chunk(3, dim=1)[1].flatten())

    check(program, hidden(5, S, D), weight(), labels(5, S))


def test_a_mask_of_the_rows_is_refused_with_advice():
    """How many rows are left depends on the data, also to the program itself."""

    def program(h, w, t, mask):
        return F.cross_entropy(F.linear(h, w)[mask], t[mask])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        args = (hidden(), weight(), labels(), labels() % 2 == 0)
        ours = check(program, *args, rewrites=0, calls=0, refusals=1, logits_in_memory=True)
    assert "set the labels of the others to ignore_index" in ours.report.refused[0].advice


def test_rows_found_by_nonzero():
    def program(h, w, t, mask):
        [rows] = mask.flatten().nonzero(as_tuple=True)
        return F.cross_entropy(F.linear(h, w).flatten(0, 1)[rows], t.flatten()[rows])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(program, hidden(), weight(), labels(), labels() % 2 == 0)


def test_index_from_the_graph():
    def program(h, w, t, order):
        rows = order.argsort()
        return F.cross_entropy(F.linear(h, w)[:, rows].flatten(0, 1), t[:, rows].flatten())

    check(program, hidden(), weight(), labels(), torch.randperm(S, generator=torch.Generator().manual_seed(0)))


def test_detached_logits_have_no_gradient():
    def program(h, w, t):
        logits = F.linear(h, w)
        return F.cross_entropy(logits.detach().flatten(0, 1), t.flatten()) + h.sum() + w.sum()

    ours = check(program, hidden(), weight(), labels())
    assert torch.equal(ours.gradients[0], torch.ones(B, S, D))


def test_class_dimension_one():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).permute(0, 2, 1), t)

    check(program, hidden(), weight(), labels())


@pytest.mark.parametrize("spelling", ["bsd,vd->bvs", "bsd,vd->vbs"])
def test_class_dimension_of_an_einsum(spelling):
    def program(h, w, t):
        logits = torch.einsum(spelling, h, w)
        return F.cross_entropy(logits if spelling.endswith("bvs") else logits.transpose(0, 1), t)

    check(program, hidden(), weight(), labels())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_class_dimension_one_with_more_rows(reduction):
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).movedim(-1, 1), t, reduction=reduction)

    check(program, hidden(2, 3, 4, D), weight(), labels(2, 3, 4))


CASTS = {
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "to_keyword": lambda x: x.to(dtype=torch.float32),
    "to_device_and_dtype": lambda x: x.to("cpu", torch.float32),
    "to_device": lambda x: x.to("cpu"),
    "to_device_copy": lambda x: x.to(x.device, copy=True),
    "type": lambda x: x.type(torch.float32),
    "type_as": lambda x: x.type_as(torch.zeros(1)),
    "float_twice": lambda x: x.float().float(),
    "down_and_up": lambda x: x.float().half().float(),
    "half": lambda x: x.half(),
    "none": lambda x: x,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts(cast, dtype):
    """The loss has the dtype that eager gives it: that of the cast."""

    def program(h, w, t):
        return F.cross_entropy(cast(F.linear(h, w)).view(-1, V), t.view(-1))

    ours = check(program, hidden(dtype=dtype), weight(dtype=dtype), labels())
    assert ours.outputs[0].dtype == cast(torch.zeros(1, dtype=dtype)).dtype


def test_float64_throughout():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))

    ours = check(program, hidden(dtype=torch.float64), weight(dtype=torch.float64), labels())
    assert ours.outputs[0].dtype == torch.float64


VOCABULARY = {
    "first": lambda x: x[..., :47],
    "middle": lambda x: x[..., 3:50],
    "all_but_last": lambda x: x[:, :, :-6],
    "narrow": lambda x: x.narrow(-1, 0, 47),
    "twice": lambda x: x[..., 2:][..., :47],
    "with_rows": lambda x: x[:, :-1, :47],
    "more_than_there_are": lambda x: x[..., :100],
}


@pytest.mark.parametrize("part", VOCABULARY.values(), ids=VOCABULARY)
@pytest.mark.parametrize("map_first", [False, True])
def test_a_slice_of_the_vocabulary_is_fewer_rows_of_the_weight(part, map_first):
    def program(h, w, b, t):
        logits = F.linear(h, w, b)
        logits = part(10 * torch.tanh(logits / 10)) if map_first else part(logits)
        rows = logits.size(1)
        return F.cross_entropy(logits.flatten(0, 1), t[:, :rows].flatten())

    bias = torch.linspace(-1, 1, V).requires_grad_()
    check(program, hidden(), weight(), bias, labels(classes=47))


def test_rows_in_dynamic_sizes_that_only_the_program_knows():
    def program(h, w, t):
        batch, length = t.shape
        logits = F.linear(h, w).view(-1, V).view(batch, length, V)[:, :-1]
        return F.cross_entropy(logits.reshape(batch, 1, length - 1, V).flatten(0, 2), t[:, 1:].flatten())

    check(program, hidden(), weight(), labels(), dynamic=True)


def test_a_view_of_the_bits_is_refused():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).view(torch.int32).view(torch.float32).flatten(0, 1), t.flatten())

    ours = run_compiled(program, hidden(requires_grad=False), weight(requires_grad=False), labels())
    assert ours.report.rewritten == []
