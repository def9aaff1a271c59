"""Gradient modes, frozen operands, autocast, checkpointing and dynamic shapes."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import (
    EVERYTHING,
    B,
    D,
    S,
    V,
    assert_like_eager,
    bias,
    check,
    elements,
    hidden,
    labels,
    nodes_of,
    run_compiled,
    tensors_of,
    weight,
)
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from cce_inductor import Options
from cce_inductor.graph.driver import rewrite_module
from cce_inductor.ops.library import vocab_reductions, vocab_reductions_backward


def loss(h, w, t):
    return F.cross_entropy(F.linear(h, w).float().view(-1, V), t.view(-1))


def smoothed_loss(h, w, t):
    """One whose gradients have to wait for the backward."""
    return F.cross_entropy(F.linear(h, w).float().view(-1, V), t.view(-1), label_smoothing=0.1)


def plain_loss(h, w, t):
    """Without casts, which the float64 reference would have to see again where a checkpoint recomputes them."""
    return F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1))


def with_bias(h, w, b, t):
    """Smoothed, so that its gradients have to wait for the backward."""
    return F.cross_entropy(F.linear(h, w, b).view(-1, V), t.view(-1), label_smoothing=0.1)


class Graphs:
    """AOTAutograd's forward and backward graphs, run uncompiled."""

    def __init__(self):
        self.forward, self.backward = [], []
        self.lower = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    @staticmethod
    def _keep(graphs):
        def compiler(module, inputs):
            graphs.append(module)
            return make_boxed_func(module.forward)

        return compiler

    def calls(self, operator):
        return [
            node for module in (*self.forward, *self.backward) for node in nodes_of(module) if node.target is operator
        ]


# ------------------------------------------------------------------------------------------------- gradient modes


def test_training_takes_one_call_each_way():
    graphs = Graphs()
    check(smoothed_loss, hidden(), weight(), labels(), lower=graphs.lower)
    assert len(graphs.calls(vocab_reductions)) == 1
    [backward] = graphs.calls(vocab_reductions_backward)
    assert backward.kwargs["needs_grad"] == [True, True, False]


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_tensor_of_the_size_of_the_logits_in_the_graphs_of_autograd(dynamic):
    def program(h, w, b, t):
        x = 3 * torch.tanh(F.linear(h, w, b)[:, :-1].float() / 3)
        target = t[:, 1:].flatten()
        return F.cross_entropy(x.flatten(0, 1), target, label_smoothing=0.1) + x.logsumexp(-1).square().mean()

    largest = {}
    for options in (EVERYTHING, Options()):
        graphs = Graphs()
        args = hidden(), torch.nn.Parameter(weight()), torch.nn.Parameter(bias()), labels()
        run_compiled(program, *args, options=options, dynamic=dynamic, lower=graphs.lower)
        nodes = [node for module in (*graphs.forward, *graphs.backward) for node in nodes_of(module)]
        largest[options] = max(elements(value) for node in nodes for value in tensors_of(node.meta.get("val")))
    assert largest == {EVERYTHING: V * D, Options(): B * S * V}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [False, True], ids=["around_the_call", "in_the_program"])
def test_forward_alone(mode, inside):
    def program(h, w, t):
        if inside:
            with mode():
                return loss(h, w, t)
        return loss(h, w, t)

    if inside:  # AOTAutograd of torch 2.13 can't trace inference_mode inside a program
        check(program, hidden(), weight(), labels())
        return
    graphs = Graphs()
    with mode():
        check(program, hidden(), weight(), labels(), lower=graphs.lower)
    assert graphs.backward == []


FROZEN = {
    "weight": (hidden(), weight(requires_grad=False), bias(), [True, False, True]),
    "hidden": (hidden(requires_grad=False), weight(), bias(), [False, True, True]),
    "bias": (hidden(), weight(), bias(requires_grad=False), [True, True, False]),
    "all_but_bias": (hidden(requires_grad=False), weight(requires_grad=False), bias(), [False, False, True]),
    "detached": (hidden(), weight(), bias(), [True, True, True]),
}


@pytest.mark.parametrize(("h", "w", "b", "needs_grad"), FROZEN.values(), ids=FROZEN)
def test_frozen_operands_get_no_gradient(h, w, b, needs_grad):
    """And what is not needed is not computed: no tensor of the weight's size in the backward of a frozen weight."""
    graphs = Graphs()
    check(with_bias, h, w, b, labels(), lower=graphs.lower)
    [backward] = graphs.calls(vocab_reductions_backward)
    assert backward.kwargs["needs_grad"] == needs_grad
    shapes = [tuple(value.shape) for value in backward.meta["val"]]
    assert [len(shape) > 1 or shape == (V,) for shape in shapes] == needs_grad


def test_a_weight_detached_in_the_program_gets_no_gradient():
    graphs = Graphs()
    check(lambda h, w, t: smoothed_loss(h, w.detach(), t), hidden(), weight(), labels(), lower=graphs.lower)
    [backward] = graphs.calls(vocab_reductions_backward)
    assert backward.kwargs["needs_grad"] == [True, False, False]


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_a_metric_without_gradients_beside_the_loss(first):
    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        value = None if first else F.cross_entropy(x, t.view(-1))
        with torch.no_grad():
            z = x.detach().logsumexp(-1).mean()
        if first:
            value = F.cross_entropy(x, t.view(-1))
        return value, z

    # it joins the call of a loss that comes before it
    check(program, hidden(), weight(), labels(), calls=2 if first else 1)


def test_logits_with_gradients_reduced_without():
    def program(h, w, t):
        x = F.linear(h, w).view(-1, V)
        with torch.no_grad():
            return F.cross_entropy(x, t.view(-1)), h.sum()

    check(program, hidden(), weight(), labels())


def test_perplexity_alone_in_a_block_without_gradients():
    def program(h, w, t):
        with torch.no_grad():
            return loss(h, w, t).exp()

    check(program, hidden(), weight(), labels())


# ------------------------------------------------------------------------------------------------------- autocast


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_ambient_autocast():
    """It leaves no node. Products are bfloat16, the loss and the gradients of float32 parameters float32."""
    with autocast():
        ours = check(loss, hidden(), weight(), labels())
    assert [gradient.dtype for gradient in ours.gradients] == [torch.float32, torch.float32]
    [call] = ours.operator_calls
    assert call.kwargs["compute_dtype"] == torch.bfloat16
    assert call.args[1].meta["example_value"].dtype == torch.float32


@pytest.mark.parametrize("loss_inside", [False, True])
def test_inner_autocast(loss_inside):
    def program(h, w, b, t):
        with autocast():
            x = F.linear(h, w, b).view(-1, V)
            if loss_inside:
                return F.cross_entropy(x, t.view(-1))
        return F.cross_entropy(x.float(), t.view(-1))

    ours = check(program, hidden(), weight(), bias(), labels())
    assert [gradient.dtype for gradient in ours.gradients] == [torch.float32] * 3
    assert ours.outputs[0].dtype == torch.float32


def test_autocast_with_everything_in_between():
    def program(h, w, b, s, t):
        with autocast():
            x = 5 * torch.tanh((h @ w.T + b) * s / 5)
            z = x.logsumexp(-1).square().mean()
            return F.cross_entropy(x.view(-1, V), t.view(-1), label_smoothing=0.1) + z

    check(program, hidden(), weight(), bias(), torch.tensor(1.5, requires_grad=True), labels())


def test_autocast_switched_off_inside():
    def program(h, w, t):
        with torch.autocast("cpu", enabled=False):
            return loss(h, w, t)

    with autocast():
        ours = check(program, hidden(), weight(), labels())
    assert ours.operator_calls[0].kwargs["compute_dtype"] == torch.float32


# -------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("lower", [None, "aot"])
def test_activation_checkpoint(lower):
    """Head and loss are in the subgraph of a higher-order operator."""

    def program(h, w, t):
        return checkpoint(plain_loss, h * 2, w, t, use_reentrant=False)

    ours = check(program, hidden(), weight(), labels(), lower=None if lower is None else Graphs().lower)
    assert ours.operator_calls[0].graph is not ours.modules[0].graph


def test_checkpoint_beside_a_head_of_its_own():
    def program(h, w, t):
        return checkpoint(plain_loss, h, w, t, use_reentrant=False) + loss(h, w * 2, t)

    check(program, hidden(), weight(), labels(), rewrites=2, calls=2)


def test_checkpoint_of_chunks():
    """litgpt, verl: each chunk of the rows has its head, loss and recomputation."""

    def program(h, w, t):
        pieces = zip(h.chunk(3), t.chunk(3), strict=True)
        return sum(checkpoint(plain_loss, x, w, y, use_reentrant=False) for x, y in pieces)

    check(program, hidden(B, 9, D), weight(), labels(B, 9), rewrites=3, calls=3)


# ------------------------------------------------------------------------------------------------- dynamic shapes


def lengths_loss(h, w, t):
    """With everything that a language model does to rows."""
    batch, length, _ = h.shape
    x = F.linear(h, w)[..., :-1, :].contiguous().float() / 0.7
    target = F.pad(t, (0, 1), value=-100)[..., 2:].contiguous()
    value = F.cross_entropy(x.view(-1, x.size(-1)), target.view(-1), ignore_index=-100, reduction="sum")
    return value / (batch * length) + x.logsumexp(-1).square().mean()


def test_ten_shapes_compile_at_most_twice():
    compiled_graphs = []

    def backend(module, inputs):
        report = rewrite_module(module, Options(min_vocab=0, min_logits_bytes=0))
        assert len(report.rewritten) == 1, report
        compiled_graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(lengths_loss, backend=backend, dynamic=True, fullgraph=True)
    for batch, length in ((2, 5), (3, 7), (4, 6), (5, 9), (2, 8), (7, 3), (6, 11), (3, 4), (9, 2), (8, 10)):
        h, w, t = hidden(batch, length, D), weight(), labels(batch, length)
        assert torch.allclose(compiled(h, w, t), lengths_loss(h, w, t), rtol=V * 2**-23)
    assert len(compiled_graphs) <= 2


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_the_rewrite_adds_no_guard(dynamic):
    """As many recompilations with the pass as without it."""
    counts = []
    for min_vocab in (0, 10**6):
        graphs = []

        def backend(module, inputs, graphs=graphs, min_vocab=min_vocab):
            rewrite_module(module, Options(min_vocab=min_vocab, min_logits_bytes=0))
            graphs.append(module)
            return module.forward

        torch._dynamo.reset()
        compiled = torch.compile(lengths_loss, backend=backend, dynamic=dynamic)
        for batch, length in ((2, 5), (2, 7), (4, 7), (5, 9)):
            compiled(hidden(batch, length, D), weight(), labels(batch, length))
        counts.append(len(graphs))
    assert counts[0] == counts[1]


DYNAMIC = {
    "flat": lambda x, t: F.cross_entropy(x.view(-1, x.size(-1)), t.view(-1)),
    "class_dimension_one": lambda x, t: F.cross_entropy(x.transpose(1, 2), t),
    "none": lambda x, t: F.cross_entropy(x.flatten(0, 1), t.flatten(), reduction="none").view(t.shape).sum(1),
    "gather": lambda x, t: x[:, 1:].log_softmax(-1).gather(-1, t[: x.size(0), : x.size(1) - 1, None]).squeeze(-1),
    "shifted": lambda x, t: F.cross_entropy(x[:, :-1].reshape(-1, x.shape[-1]), t[:, 1:].reshape(-1)),
    "z_loss": lambda x, t: x.logsumexp(-1, keepdim=True).square().mean() + F.cross_entropy(x.flatten(0, 1), t.view(-1)),
    "half_of_the_rows": lambda x, t: F.cross_entropy(x[: x.size(0) // 2].flatten(0, 1), t[: t.size(0) // 2].flatten()),
    "chunks": lambda x, t: sum(
        F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(x.split(2), t.split(2), strict=True)
    ),
    "narrow": lambda x, t: F.cross_entropy(x.narrow(1, 1, x.size(1) - 1).flatten(0, 1), t[:, 1:].flatten()),
    "transposed_rows": lambda x, t: F.cross_entropy(x.transpose(0, 1).flatten(0, 1), t.t().flatten()),
    "flattened_in_two_steps": lambda x, t: F.cross_entropy(
        x.unflatten(0, (2, -1)).flatten(0, 1)[:, None].flatten(0, 2), t.view(-1)
    ),
    "two_of_three_row_dimensions": lambda x, t: F.cross_entropy(
        x.unsqueeze(2).flatten(1, 2).unsqueeze(0).flatten(0, 1).movedim(-1, 1), t, reduction="none"
    ),
    "regrouped": lambda x, t: x.reshape(t.size(1), t.size(0), -1).logsumexp(-1).sum(0),
}  # fmt: skip


@pytest.mark.parametrize("form", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_batch_and_length(form):
    def program(h, w, t):
        return form(F.linear(h, w), t)

    given = (hidden(4, S, D), weight(), labels(4, S))
    for tensor in (given[0], given[2]):
        torch._dynamo.mark_dynamic(tensor, (0, 1))
    ours = run_compiled(program, *given, dynamic=None)
    assert len(ours.report.rewritten) == 1, ours.report
    assert len(ours.operator_calls) == 1
    assert_like_eager(ours, program, given)


@pytest.mark.parametrize("form", DYNAMIC.values(), ids=DYNAMIC)
def test_everything_dynamic(form):
    def program(h, w, t):
        return form(F.linear(h, w), t)

    given = (hidden(4, S, D), weight(), labels(4, S))
    check(program, *given, dynamic=True, logits_in_memory=True)


def test_dynamic_shapes_through_autograd():
    check(lengths_loss, hidden(), weight(), labels(), dynamic=True, lower=Graphs().lower)
