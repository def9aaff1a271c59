"""Logits that a program returns beside the loss: the loss is rewritten, and they come back lazy, or computed."""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EVERYTHING,
    D,
    V,
    assert_like_eager,
    assert_untouched,
    bias,
    check,
    check_refused,
    hidden,
    labels,
    run_compiled,
    weight,
)
from torch.utils.checkpoint import checkpoint

from cce_inductor import Options, cce_backend, enable
from cce_inductor.graph import driver, rewrite
from cce_inductor.graph.returned import LazyResults
from cce_inductor.lazy_logits import LazyLogits

COMPUTED = Options(min_vocab=0, min_logits_bytes=0, logits="materialize")
REFUSED = Options(min_vocab=0, min_logits_bytes=0, logits="refuse")
HALF = torch.bfloat16


def args(dtype=torch.float32, requires_grad=True):
    return hidden(dtype=dtype, requires_grad=requires_grad), weight(dtype=dtype), bias(dtype=dtype), labels()


def loss_of(logits, t):
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), t.reshape(-1))


def outputs_of(program, *given, **how):
    """What a program returns when it is compiled by the pass, as it returns it."""
    kept = []

    def keeping(*args):
        kept[:] = program(*args)
        return kept[0]

    run_compiled(keeping, *given, fullgraph=False, **how)
    return kept


# Each returns the loss first, and then what it returns of its logits.
def plain(h, w, b, t):
    logits = F.linear(h, w)
    return loss_of(logits, t), logits


def with_bias(h, w, b, t):
    logits = F.linear(h, w, b)
    return loss_of(logits.float(), t), logits


def cast(h, w, b, t):
    logits = F.linear(h, w).float()
    return loss_of(logits, t), logits


def before_the_cast(h, w, b, t):
    logits = F.linear(h, w)
    return loss_of(logits.float(), t), logits


def both(h, w, b, t):
    logits = F.linear(h, w)
    upcast = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)
    return loss_of(upcast, t), logits, upcast


def capped(h, w, b, t):
    logits = 3 * torch.tanh(F.linear(h, w) / 3)
    return loss_of(logits.float(), t), logits


def scaled_by_a_tensor(h, w, b, t):
    logits = F.linear(h, w, b) * b[:1].exp()
    return loss_of(logits, t), logits


def bias_added_later(h, w, b, t):
    logits = F.linear(h, w).float() + b
    return loss_of(logits, t), logits


def flat(h, w, b, t):
    logits = F.linear(h, w).view(-1, V)
    return F.cross_entropy(logits, t.view(-1)), logits


def some_rows(h, w, b, t):
    logits = F.linear(h, w)
    return loss_of(logits[:, :-1], t[:, 1:]), logits[:, -1]


def part_of_the_vocabulary(h, w, b, t):
    logits = F.linear(h, w, b)[..., : V - 4]
    return loss_of(logits, t.clamp(max=V - 5)), logits


def log_probabilities(h, w, b, t):
    logs = F.linear(h, w, b).log_softmax(-1)
    return F.nll_loss(logs.view(-1, V), t.view(-1)), logs


def matrix_product(h, w, b, t):
    logits = h @ w.t()
    return loss_of(logits, t), logits


def cast_weight(h, w, b, t):
    logits = F.linear(h.bfloat16(), w.bfloat16())
    return loss_of(logits.float(), t), logits


def computed_weight(h, w, b, t):
    logits = F.linear(h, w * 2, b.sin())
    return loss_of(logits, t), logits


def computed_hidden(h, w, b, t):
    states = h.tanh() @ w.t()[:, :D]
    logits = F.linear(states, w)
    return loss_of(logits, t), logits, states


def detached(h, w, b, t):
    logits = F.linear(h, w)
    return loss_of(logits, t), logits.detach()


def two_losses(h, w, b, t):
    logits = F.linear(h, w)
    return loss_of(logits, t) + logits.logsumexp(-1).square().mean(), logits


RETURNING = [
    plain, with_bias, cast, before_the_cast, both, capped, scaled_by_a_tensor, bias_added_later, flat, some_rows,
    part_of_the_vocabulary, log_probabilities, matrix_product, cast_weight, computed_weight, computed_hidden, detached,
    two_losses,
]  # fmt: skip


def name(program):
    return program.__name__


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("program", RETURNING, ids=name)
def test_they_are_lazy_and_a_loss_of_them_has_gradients(program, dtype):
    """`check` reads them, compares them, and sends gradients through loss and logits at once."""
    ours = check(program, *args(dtype))
    assert ours.report.rewritten[0].returned == "lazy"
    outputs = outputs_of(program, *args(dtype))
    assert type(outputs[1]) is LazyLogits
    assert not outputs[1].is_computed


@pytest.mark.parametrize("program", [plain, cast, capped, computed_weight], ids=name)
@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_shapes(program, dynamic):
    assert check(program, *args(), dynamic=dynamic).report.rewritten[0].returned == "lazy"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    given = args()
    with mode():
        ours = check(plain, *given)
        assert ours.report.rewritten[0].returned == "lazy"
        _, logits = outputs_of(plain, *given)
        assert not logits.requires_grad
        torch.testing.assert_close(logits + 0, F.linear(*given[:2]))


def test_inside_autocast():
    def program(h, w, b, t):
        with torch.autocast("cpu", HALF):
            logits = F.linear(h, w, b)
            return loss_of(logits.float(), t), logits

    assert check(program, *args()).report.rewritten[0].returned == "lazy"


def test_two_heads():
    def program(h, w, b, t):
        one, two = F.linear(h, w), F.linear(h * 2, w, b)
        return loss_of(one, t) + loss_of(two, t), two, h.sum(), one

    ours = check(program, *args(), rewrites=2, calls=2)
    assert [rewrite.returned for rewrite in ours.report.rewritten] == ["lazy", "lazy"]


def test_the_caller_sees_as_many_results_as_before():
    def program(h, w, b, t):
        logits = F.linear(h, w * 2, b * 2)
        return loss_of(logits, t), logits, logits

    loss, logits, again = outputs_of(program, *args())
    assert logits is again
    assert loss.dim() == 0


def test_an_unread_result_gives_no_gradient_and_costs_none():
    """The gradients are those of the loss alone."""
    given = args()
    loss, logits = torch.compile(plain, backend=cce_backend, options={"min_vocab": 0, "min_logits_bytes": 0})(*given)
    loss.backward()
    assert not logits.is_computed
    eager = args()
    plain(*eager)[0].backward()
    for mine, theirs in zip(given[:2], eager[:2], strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_changed_weight_is_an_error():
    h, w, b, t = args()
    compiled = torch.compile(plain, backend=cce_backend, options={"min_vocab": 0, "min_logits_bytes": 0})
    loss, logits = compiled(h, w, b, t)
    loss.backward()
    torch.optim.SGD([w], 0.1).step()
    with pytest.raises(RuntimeError, match=r'weight has changed in place.*logits="materialize"'):
        logits.argmax(-1)


def test_a_graph_that_is_not_dynamos_may_return_a_structure():
    modules = []
    torch.compile(plain, backend=lambda module, inputs: modules.append(module) or module.forward)(*args())
    [module] = modules
    output = module.graph.output_node()
    output.args = ({"loss": output.args[0][0], "logits": output.args[0][1]},)
    lazy = LazyResults(module.graph)
    report = driver.rewrite_module(module, EVERYTHING, lazy)
    assert report.rewritten[0].returned == "computed, because they are not results on their own"
    assert lazy.found == []


# --------------------------------------------------------------------------------------------------- computed, refused


@pytest.mark.parametrize("program", RETURNING, ids=name)
def test_materialize(program):
    ours = check(program, *args(), options=COMPUTED, logits_in_memory=True)
    assert ours.report.rewritten[0].returned == 'computed, because the option logits is "materialize"'
    assert "are computed, because the option" in str(ours.report)
    assert type(outputs_of(program, *args(), options=COMPUTED)[1]) is torch.Tensor


def test_refuse():
    def program(h, w, b, t):
        logits = F.linear(h, w)  # <-
        return loss_of(logits, t), logits

    check_refused(program, *args(), options=REFUSED, operation="return", reason='the option logits is "refuse"')


def vocabulary_first(h, w, b, t):
    logits = F.linear(h, w).permute(0, 2, 1)
    return F.cross_entropy(logits, t), logits


def two_views(h, w, b, t):
    logits = F.linear(h, w)
    return loss_of(logits, t), logits, logits.view(-1, V)


def written_operand(h, w, b, t):
    shift = b * 2
    logits = F.linear(h, w)
    shifted = logits + shift
    shift.mul_(2)
    return loss_of(logits, t), shifted, shift


def checkpointed(h, w, b, t):
    return checkpoint(plain, h, w, b, t, use_reentrant=False)


NOT_LAZY = {
    vocabulary_first: "the vocabulary is not their last dimension",
    two_views: "two of the results are views of them that share memory",
    written_operand: "changes an operand in place before the end",
    checkpointed: "they leave a subgraph",
}


@pytest.mark.parametrize(("program", "reason"), NOT_LAZY.items(), ids=map(name, NOT_LAZY))
def test_where_they_cannot_be_lazy_they_are_computed(program, reason):
    ours = check(program, *args(), logits_in_memory=True)
    assert reason in ours.report.rewritten[0].returned


def test_a_failure_leaves_the_results_as_they_were(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    def program(h, w, b, t):
        one, two = F.linear(h, w), F.linear(h * 2, w, b)
        return loss_of(one, t) + loss_of(two, t), two, one

    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "_describe", fail)  # the last that can fail in a rewrite
        ours = run_compiled(program, *args())
    assert ours.report.rewritten == []
    assert_untouched(ours)
    assert_like_eager(ours, program, args())


# ----------------------------------------------------------------------------------------------------------- enable()


def test_enable_gives_lazy_logits_from_a_cache_too():
    """Inductor runs no passes of its own where it finds compiled code."""
    options = {"min_vocab": 0, "min_logits_bytes": 0}
    for _ in range(2):
        torch._dynamo.reset()
        h, w, b, t = args()
        with enable(**options):
            _, logits = torch.compile(plain)(h, w, b, t)
        assert type(logits) is LazyLogits
        torch.testing.assert_close(logits + 0, F.linear(h, w))


def test_enable_after_another_pass_computes_them():
    with torch._inductor.config.patch(pre_grad_custom_pass=lambda graph: None):
        torch._dynamo.reset()
        h, w, b, t = args()
        with enable(min_vocab=0, min_logits_bytes=0):
            _, logits = torch.compile(plain)(h, w, b, t)
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(logits, F.linear(h, w))


def test_a_compiled_function_inside_a_compiled_function():
    options = {"min_vocab": 0, "min_logits_bytes": 0}
    inner = torch.compile(plain, backend=cce_backend, options=options)

    def outer(h, w, b, t):
        loss, logits = inner(h, w, b, t)
        return loss + logits.square().mean()

    given, eager = args(), args()
    torch.compile(outer, backend="aot_eager")(*given).backward()
    loss, logits = plain(*eager)
    (loss + logits.square().mean()).backward()
    torch.testing.assert_close(given[1].grad, eager[1].grad)


def test_lazy_logits_cross_a_graph_break():
    def program(h, w, b, t):
        loss, logits = plain(h, w, b, t)
        torch._dynamo.graph_break()
        return loss + logits.square().mean()

    assert_like_eager(check(program, *args(), fullgraph=False, logits_in_memory=True), program, args())
