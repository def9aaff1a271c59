"""`options={"verify": N}`: a program checks itself against Inductor in its first calls, and is not changed by it."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import D, S, V, bias, hidden, labels, weight
from torch import nn

from cce_inductor import VerificationError, verify
from cce_inductor.ops import blocks, cpu

OPTIONS = {"min_vocab": 0, "min_logits_bytes": 0, "min_flops": 0, "verify": 1}


@pytest.fixture(autouse=True)
def _from_the_beginning():
    torch._dynamo.reset()


@pytest.fixture
def runs(monkeypatch):
    """Counts the runs of both versions."""
    seen, original = [], verify._run

    def run(function, args, nudge, *others):
        seen.append(nudge > 0)
        return original(function, args, nudge, *others)

    monkeypatch.setattr(verify, "_run", run)
    return seen


def compiled(function, **options):
    return torch.compile(function, backend="cce", options=OPTIONS | options, fullgraph=True)


def program(h, w, b, t):
    logits = F.linear(F.dropout(h, 0.2), w, b).float()
    loss = F.cross_entropy(logits.view(-1, V), t.view(-1), label_smoothing=0.1)
    return loss + 1e-2 * logits.logsumexp(-1).square().mean(), h * 2


def given(dtype=torch.float32):
    return hidden(dtype=dtype), weight(dtype=dtype), bias(dtype=dtype), labels(ignored=-100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_versions_that_agree(dtype, runs):
    args, step = given(dtype), compiled(program, verify=2)
    for calls in (3, 6, 6):
        loss, _ = step(*args)
        loss.backward()
        assert len(runs) == calls
    assert all(arg.grad is not None for arg in args[:3])


def test_the_program_goes_on_as_if_nothing_had_run():
    """Random numbers, gradients and results are those of a program that is not verified."""
    results = []
    for calls in (0, 1):
        torch._dynamo.reset()
        torch.manual_seed(0)
        args = given()
        loss, _ = compiled(program, verify=calls)(*args)
        loss.backward()
        results.append([loss.detach(), *(arg.grad for arg in args[:3]), torch.rand(3)])
    assert all(map(torch.equal, *results))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)

    def forward(self, ids):
        logits = self.embed(ids).tanh() @ self.embed.weight.T
        return F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)), logits


def test_a_model_that_returns_its_logits(runs):
    model, ids = Model(), labels(4, S)
    eager = copy.deepcopy(model)
    loss, logits = compiled(model)(ids)
    assert not logits.is_computed
    (loss + logits.square().mean()).backward()
    expected, theirs = eager(ids)
    (expected + theirs.square().mean()).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.embed.weight.grad, eager.embed.weight.grad)
    assert len(runs) == 3


def test_without_gradients_results_are_compared(runs):
    with torch.no_grad():
        compiled(program)(*given())
    assert len(runs) == 3


FAULTS = {
    "loss": (cpu, "log_sum", lambda lse, rest: (lse + 1e-3, rest)),
    "gradient of the bias": (blocks.Gradients, "results", lambda h, w, b: (h, w, 2 * b)),
    "gradient of the weight": (blocks.Gradients, "results", lambda h, w, b: (h, w.roll(1, 0), b)),
    "a number that is none": (blocks.Gradients, "results", lambda h, w, b: (h * torch.nan, w, b)),
}


@pytest.mark.parametrize(("owner", "name", "wrong"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(monkeypatch, owner, name, wrong):
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: wrong(*original(*args)))
    with pytest.raises(VerificationError) as raised:
        compiled(program)(*given())
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("cce_inductor and Inductor disagree in ")
    assert len(lines) == 6  # two results, three gradients
    assert any(line.endswith("<-- wrong") for line in lines)
    assert not all(line.endswith("<-- wrong") for line in lines[1:])


def test_a_fault_in_bfloat16_is_found(monkeypatch):
    """The gradient of a bias that is left out."""
    original = blocks.Gradients.results
    monkeypatch.setattr(blocks.Gradients, "results", lambda *args: (*original(*args)[:2], 0 * original(*args)[2]))
    with pytest.raises(VerificationError, match=r"gradient of .*b.*<-- wrong"):
        compiled(program)(*given(torch.bfloat16))


def test_a_program_that_writes_to_an_argument_is_not_verified(runs):
    """And is not run twice on the argument; torch's batch normalization writes without saying so in its name."""
    counter, norm = torch.zeros(()), nn.BatchNorm1d(D)

    def counting(h, w, t, counter):
        counter.add_(1)
        return F.cross_entropy(F.linear(norm(h.view(-1, D)), w), t.view(-1))

    step, args = compiled(counting), (hidden(), weight(), labels())
    with pytest.warns(RuntimeWarning, match=r"not verified, as it writes to .*counter"):
        step(*args, counter)
    with warnings.catch_warnings(action="error"):
        step(*args, counter)
    assert (counter.item(), norm.num_batches_tracked.item()) == (2, 2)
    assert len(runs) == 1


def test_operands_whose_strides_a_copy_would_not_keep(runs):
    h, w = hidden(1, 1, D).detach().expand(3, 7, D), weight(V, 2 * D).detach()[:, ::2]
    compiled(lambda h, w, t: F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1)))(h, w, labels(3, 7))
    assert len(runs) == 3


def test_a_program_that_is_left_alone_is_not_run_twice(runs):
    compiled(program, min_vocab=V + 1)(*given())
    assert runs == []


def test_dynamic_shapes_and_subgraphs(runs):
    def checkpointed(h, w, t):
        def head(h, w):
            return F.cross_entropy(F.linear(h, w).flatten(0, 1), t.flatten())

        return torch.utils.checkpoint.checkpoint(head, h, w, use_reentrant=False)

    step = torch.compile(checkpointed, backend="cce", options=OPTIONS, dynamic=True)
    for length in (5, 9):
        step(hidden(2, length, D), weight(), labels(2, length)).backward()
    assert len(runs) == 3
