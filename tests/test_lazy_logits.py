"""Lazy logits: what computes them, what does not, and that it does not show in values and gradients."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, bias, hidden, weight
from torch.testing import assert_close

from cce_inductor.lazy_logits import Formula, LazyLogits, lazy_logits

PLAIN = Formula("z", torch.float32, (torch.float32,))
CAPPED = Formula("30.0*tanh(z/30.0)", torch.bfloat16, (torch.bfloat16, torch.float32))


def given():
    return hidden(), weight(), bias()


def pair(formula=PLAIN):
    """Lazy logits and eager ones, each of operands of their own."""
    mine, theirs = given(), given()
    return lazy_logits(*mine, formula), formula(*theirs), mine, theirs


def is_lazy(x):
    return type(x) is LazyLogits and not x.is_computed


UNREAD = {
    "shape": lambda x: tuple(x.shape),
    "size": lambda x: (x.size(), x.size(-1), x.dim(), x.ndim, x.numel(), x.nelement()),
    "dtype": lambda x: (x.dtype, x.is_floating_point(), x.element_size(), x.layout),
    "device": lambda x: (x.device, x.is_cuda, x.is_cpu, x.is_sparse),
    "autograd": lambda x: (x.requires_grad, x.is_leaf, x.grad_fn is None),
    "len": len,
    "strides": lambda x: (x.stride(), x.is_contiguous(), x.storage_offset()),
    "isinstance": lambda x: (isinstance(x, torch.Tensor), torch.is_tensor(x)),
    "container": lambda x: len({"logits": x, "more": (x, [x])}),
}


@pytest.mark.parametrize("question", UNREAD.values(), ids=UNREAD)
def test_questions_that_compute_nothing(question):
    mine, theirs, *_ = pair()
    assert question(mine) == question(theirs)
    assert is_lazy(mine)


LAZY = {
    "double": lambda x: x.double(),
    "to": lambda x: x.to(torch.bfloat16),
    "two casts": lambda x: x.half().float(),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x[:, 1:].contiguous(),
    "last row": lambda x: x[:, -1],
    "rows": lambda x: x[..., 1:-1, :],
    "one": lambda x: x[0, 2],
    "step": lambda x: x[:, ::2],
    "flat": lambda x: x.view(-1, V),
    "reshaped": lambda x: x[:, :-1].reshape(-1, V),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "index": lambda x: x[torch.tensor([1, 0, 1])],
    "mask": lambda x: x[torch.arange(S).remainder(2).eq(0).expand(B, S)],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "chain": lambda x: x.float()[:, :-1].detach().reshape(-1, V)[3:5].to(torch.float64),
}


@pytest.mark.parametrize("formula", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("piece", LAZY.values(), ids=LAZY)
def test_pieces_that_stay_lazy(piece, formula):
    x, y, mine, theirs = pair(formula)
    a, b = piece(x), piece(y)
    assert is_lazy(a)
    assert is_lazy(x)
    assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
    assert_close((a + 0).float(), b.float())
    assert a.is_computed
    if a.requires_grad:
        _assert_same_gradients(a, b, mine, theirs)
    assert is_lazy(x), "a piece computes only its own rows"


def test_a_piece_computes_only_its_rows(monkeypatch):
    x, *_ = pair()
    rows = []

    def linear(hidden, *args, original=F.linear):
        rows.append(hidden.numel() // D)
        return original(hidden, *args)

    monkeypatch.setattr(F, "linear", linear)
    x[:, -1].argmax(-1)
    x[1:, :2].sum()
    x.sum()
    x.sum()
    assert rows == [B, (B - 1) * 2, B * S]


READ = {
    "arithmetic": lambda x: x * 2 + x,
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "topk": lambda x: x.topk(3).values,
    "cross_entropy": lambda x: F.cross_entropy(x.view(-1, V), torch.arange(B * S)),
    "one class": lambda x: x[..., 3],
    "some classes": lambda x: x[..., 2:5],
    "transpose": lambda x: x.transpose(1, 2),
    "cat": lambda x: torch.cat([x, x]),
    "equal": lambda x: torch.equal(x, x),
    "item": lambda x: x[0, 0, 0].item(),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "asarray": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "dlpack": lambda x: torch.from_dlpack(x.detach()),
    "iteration": lambda x: torch.stack(list(x)),
    "int": lambda x: x.int(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "copy": lambda x: copy.copy(x.detach()),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "save": lambda x: _saved_and_loaded(x.detach()),
    "list of tensors": lambda x: torch.stack([x, x]),
    "out": lambda x: torch.add(x.detach(), 1, out=torch.empty(B, S, V)),
    "storage": lambda x: x.untyped_storage().nbytes(),
    "compiled": lambda x: torch.compile(lambda y: (y * 2).sum(-1), backend="aot_eager")(x),
}


def _saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_everything_else_computes(read):
    x, y, mine, theirs = pair()
    a, b = read(x), read(y)
    assert type(a) is type(b)
    assert_close(a, b)
    if isinstance(a, torch.Tensor) and a.requires_grad:
        _assert_same_gradients(a, b, mine, theirs)


def _assert_same_gradients(a, b, mine, theirs):
    cotangent = torch.randn(a.shape, generator=torch.Generator().manual_seed(0)).to(a.dtype)
    ours, eagers = torch.autograd.grad(a, mine, cotangent), torch.autograd.grad(b, theirs, cotangent)
    for one, other in zip(ours, eagers, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other)


def test_printing():
    x, y, *_ = pair()
    assert repr(x.detach()) == repr(y.detach())
    assert f"{x[0, 0, 0].detach():.3f}" == f"{y[0, 0, 0].detach():.3f}"
    assert "grad_fn" in str(x)


def test_memory_addresses_are_those_of_the_computed_tensor():
    x, *_ = pair()
    assert x.data_ptr() != 0
    assert x.data_ptr() == x.data_ptr() == x.untyped_storage().data_ptr() == x.detach().numpy().ctypes.data


def test_numpy_of_what_requires_gradients_is_eagers_error():
    with pytest.raises(RuntimeError, match="Can't call numpy"):
        pair()[0].numpy()


def test_second_derivatives():
    def second(logits, operands):
        [gradient] = torch.autograd.grad(logits.tanh().square().sum(), operands[0], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), operands)

    x, y, mine, theirs = pair()
    for one, other in zip(second(x, mine), second(y, theirs), strict=True):
        assert_close(one, other)


def test_gradients_where_the_rows_are_made_of_the_weight():
    """As with an embedding that is tied to the head: each use of the weight counts once."""
    for_both = []
    for make in (lazy_logits, lambda rows, weight, bias, formula: formula(rows, weight, bias)):
        w = weight()
        rows = w[:5].tanh()
        for_both.append(torch.autograd.grad(make(rows, w, None, PLAIN).square().sum(), w)[0])
    assert_close(*for_both)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_operands_without_gradients(frozen):
    operands = [t.detach() if i == frozen else t for i, t in enumerate(given())]
    wanted = [t for t in operands if t.requires_grad]
    ours = torch.autograd.grad(lazy_logits(*operands, PLAIN).square().sum(), wanted)
    for one, other in zip(ours, torch.autograd.grad(PLAIN(*operands).square().sum(), wanted), strict=True):
        assert_close(one, other)


# -------------------------------------------------------------------------------------------------- memory and writes


def test_writes_are_seen_by_all_pieces():
    x, *_ = pair()
    x = x.detach()
    row, flat = x[:, 0], x.view(-1, V)
    row.sum()
    flat[0] = 7.0
    assert_close(row[0] + 0, torch.full((V,), 7.0))
    assert_close(x[0, 0] + 0, torch.full((V,), 7.0))


def test_a_copy_does_not_see_later_writes():
    x, y, *_ = pair()
    copied, x = x.detach().clone(), x.detach()
    x.zero_()
    assert_close(copied + 0, y.detach())
    assert_close(x + 0, torch.zeros_like(y))


@pytest.mark.parametrize(
    "write",
    [lambda x: x.div_(2), lambda x: x[:, 0].mul_(3), lambda x: x.__setitem__((slice(None), 1), 0.0)],
    ids=["whole", "piece", "setitem"],
)
def test_writes_have_eagers_gradients(write):
    x, y, mine, theirs = pair()
    write(x), write(y)
    assert_close(x + 0, y)
    _assert_same_gradients(x.square(), y.square(), mine, theirs)


@pytest.mark.parametrize(("which", "name"), [(0, "hidden states"), (1, "weight"), (2, "bias")])
def test_an_operand_that_changed_is_an_error(which, name):
    x, _, mine, _ = pair()
    row, upcast = x[:, -1], x.double()
    with torch.no_grad():
        mine[which].add_(1)
    for logits in (x, row, upcast, x.detach()):
        with pytest.raises(
            RuntimeError, match=f'their {name} has changed in place or was freed since.*logits="materialize"'
        ):
            logits.sum()


def test_a_freed_weight_is_an_error():
    """FSDP frees the weight that it gathered, without a new version of it."""
    h, w, b = given()
    whole = w.detach().clone()
    x = lazy_logits(h, whole, b, PLAIN)
    with torch.autograd._unsafe_preserve_version_counter(whole):
        whole.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="their weight has changed in place or was freed since"):
        x.sum()


def test_what_is_computed_before_the_change_stays():
    x, y, mine, _ = pair()
    x.sum()
    with torch.no_grad():
        mine[1].add_(1)
    assert_close(x + 0, y)
    assert_close(x[:, -1] + 0, y[:, -1])


def test_unread_logits_hold_nothing_of_their_size():
    x, _, mine, _ = pair()
    kept = [x, x.float(), x[:, 1:], x.detach().view(-1, V)]
    gc.collect()
    held = [t for logits in kept for t in (*logits._operands.values(), logits._value) if t is not None]
    assert max(t.numel() for t in held) < B * S * V
    assert {t.data_ptr() for t in held} <= {t.data_ptr() for t in (*mine, mine[0][:, 1:])}


def test_nothing_stays_behind():
    x, *_ = pair()
    gone = weakref.ref(x)
    x[:, 1].sum()
    del x
    gc.collect()
    assert gone() is None


def test_in_inference_mode():
    with torch.inference_mode():
        x, y, *_ = pair()
        assert_close(x[:, -1] + 0, y[:, -1])
        assert_close(x + 0, y)


def test_ambient_autocast_does_not_change_them():
    x, y, *_ = pair()
    with torch.autocast("cpu", torch.bfloat16):
        x.sum()
    assert_close(x + 0, y)


def test_log_probabilities():
    x, y, mine, theirs = pair(Formula("z", torch.float32, (torch.float32,), normalized=True))
    assert_close(x + 0, F.linear(*theirs).log_softmax(-1))
    _assert_same_gradients(x.exp(), y.exp(), mine, theirs)


def test_compiled_functions_get_the_computed_tensor():
    def function(x, k):
        return (x.tanh() * k).sum(-1), x

    x, y, mine, theirs = pair()
    compiled = torch.compile(function, backend="inductor")
    a, same = compiled(x, 3.0)
    assert same is x
    b, _ = function(y, 3.0)
    assert_close(a, b)
    _assert_same_gradients(a, b, mine, theirs)
    assert_close(compiled(lazy_logits(*mine, PLAIN)[:, :3], 3.0)[0], b[:, :3])
