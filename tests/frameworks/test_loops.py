"""Training loops in the form that public projects give them, written out here: whole models, with eager's gradients.

The first ones compile head and loss together. In those of torchtitan and litgpt they are apart: the report says so.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, labels
from seen import Seen
from torch import nn

from cce_inductor import explain
from cce_inductor.lazy_logits import LazyLogits

STEPS = 3


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Body(nn.Module):
    """Everything before the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(V, D), nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.norm = nn.LayerNorm(D)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + F.gelu(block(x))
        return self.norm(x)


class NanoGPT(nn.Module):
    """Tied weights, and both results: nanoGPT's train.py does `logits, loss = model(X, Y)`."""

    def __init__(self):
        super().__init__()
        self.transformer, self.lm_head = Body(), nn.Linear(D, V, bias=False)
        self.transformer.embed.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        x = self.transformer(idx)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :])
            loss = None
        return logits, loss


class Torchtune(nn.Module):
    """The logits as a list of chunks of the sequence, in float32."""

    def __init__(self, chunks=4):
        super().__init__()
        self.decoder, self.output, self.chunks = Body(), nn.Linear(D, V, bias=False), chunks

    def forward(self, tokens):
        h = self.decoder(tokens)
        return [self.output(chunk).float() for chunk in h.chunk(self.chunks, dim=1)]


class CEWithChunkedOutputLoss(nn.Module):
    def __init__(self, chunks=4, ignore_index=-100):
        super().__init__()
        self.chunks, self.ignore_index = chunks, ignore_index

    def compute_cross_entropy(self, logits, target):
        return F.cross_entropy(logits.float(), target, ignore_index=self.ignore_index, reduction="sum")

    def forward(self, logits, target):
        total = (target != self.ignore_index).sum()
        targets = [chunk.reshape(-1) for chunk in target.chunk(self.chunks, dim=1)]
        logits = [chunk.reshape(-1, chunk.size(-1)) for chunk in logits]
        losses = [self.compute_cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
        return sum(losses) / total


class Plain(nn.Module):
    """Returns logits, as models of torchtitan and litgpt do."""

    def __init__(self, vocab=V):
        super().__init__()
        self.body, self.output = Body(), nn.Linear(D, vocab, bias=False)

    def forward(self, tokens):
        return self.output(self.body(tokens))


def torchtitan_loss(pred, labels):
    return F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum", ignore_index=-100)


def chunked_cross_entropy(logits, targets, chunk_size=5, ignore_index=-100):
    """litgpt's, for logits that are a tensor."""
    logits = logits.reshape(-1, logits.size(-1))
    targets = targets.reshape(-1)
    if chunk_size == 0:
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    chunks = zip(logits.split(chunk_size), targets.split(chunk_size), strict=True)
    losses = [F.cross_entropy(chunk, target, ignore_index=ignore_index, reduction="none") for chunk, target in chunks]
    return torch.cat(losses).sum() / targets.ne(ignore_index).sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------------------- compiled


def train(model, loss_of):
    """The losses of a few steps; loss_of(model, ids, targets)."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(STEPS):
        ids, targets = labels(B, S).roll(step, 0), labels(B, S, ignored=-100)
        loss = loss_of(model, ids, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_trains_like_eager(make, loss_of, compile_parts):
    """compile_parts(model, loss_of, backend) -> what to call instead of loss_of."""
    torch.manual_seed(0)
    eager = make()
    mine, seen = copy.deepcopy(eager), Seen()
    torch.testing.assert_close(train(mine, compile_parts(mine, loss_of, seen)), train(eager, loss_of))
    for one, other in zip(mine.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    return seen


def assert_rewritten(seen):
    assert len(seen.report.refused) == 0, seen.report
    assert len(seen.report.rewritten) > 0
    assert all(graph.largest_computed <= graph.largest_input for graph in seen.graphs)  # the weight; logits are larger


def test_nanogpt():
    def loss_of(model, ids, targets):
        logits, loss = model(ids, targets.masked_fill(targets == -100, -1))
        assert type(logits) in (torch.Tensor, LazyLogits)
        return loss

    def compile_parts(model, loss_of, backend):
        compiled = torch.compile(model, backend=backend)
        return lambda _, ids, targets: loss_of(compiled, ids, targets)

    seen = assert_trains_like_eager(NanoGPT, loss_of, compile_parts)
    assert_rewritten(seen)
    [rewrite] = seen.report.rewritten
    assert rewrite.returned == "lazy"


def test_nanogpt_estimates_its_loss_and_generates():
    torch.manual_seed(0)
    model = NanoGPT().eval()
    compiled = torch.compile(model, backend=Seen())
    ids, targets = labels(B, S), labels(B, S)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(ids, targets)[1], model(ids, targets)[1])
        for _ in range(3):
            logits, loss = compiled(ids)
            assert loss is None
            torch.testing.assert_close(logits, model(ids)[0])
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)


def test_torchtune():
    """Its recipes compile model and loss apart; together they are rewritten, as one operator call for all chunks."""
    loss = CEWithChunkedOutputLoss()

    def loss_of(model, ids, targets):
        return loss(model(ids), targets)

    def apart(model, loss_of, backend):
        model.compile(backend=backend)
        chunk = torch.compile(loss.compute_cross_entropy, backend=backend)
        return lambda model, ids, targets: (
            sum(chunk(x.flatten(0, 1), t.flatten()) for x, t in zip(model(ids), targets.chunk(4, 1), strict=True))
            / (targets != -100).sum()
        )

    def together(model, loss_of, backend):
        return torch.compile(loss_of, backend=backend)

    seen = assert_trains_like_eager(Torchtune, loss_of, apart)
    assert len(seen.report.rewritten) == 0
    assert_says_what_to_compile(seen.report.refused)
    torch._dynamo.reset()
    seen = assert_trains_like_eager(Torchtune, loss_of, together)
    assert_rewritten(seen)
    assert len(seen.report.rewritten) == 4
    assert {rewrite.operator_calls for rewrite in seen.report.rewritten} == {1}


# ------------------------------------------------------------------------------------------------- head and loss apart


def assert_says_what_to_compile(refusals):
    assert refusals
    for refusal in refusals:
        returned = refusal.reason.startswith("the logits are returned and no loss of them is in this graph")
        given = refusal.reason.startswith("its logits are an input of this graph")
        assert returned or given, refusal
        assert refusal.advice == (
            "compile head and loss together, as one function that calls the model and then the loss, "
            "or as a model that computes its loss"
        )


def test_torchtitan_compiles_blocks_and_loss_each_on_its_own():
    def loss_of(model, ids, targets):
        return torchtitan_loss(model(ids), targets) / (targets != -100).sum()

    def apart(model, loss_of, backend):
        for block in model.body.blocks:
            block.compile(backend=backend)
        loss = torch.compile(torchtitan_loss, backend=backend)
        return lambda model, ids, targets: loss(model(ids), targets) / (targets != -100).sum()

    def together(model, loss_of, backend):
        return torch.compile(loss_of, backend=backend)

    seen = assert_trains_like_eager(Plain, loss_of, apart)
    [refusal] = seen.report.refused
    assert "`pred`, and what makes them is not compiled with it" in refusal.reason
    assert_says_what_to_compile([refusal])
    torch._dynamo.reset()
    assert_rewritten(assert_trains_like_eager(Plain, loss_of, together))


@pytest.mark.parametrize("chunk_size", [0, 5])
def test_litgpt_compiles_a_model_that_returns_its_logits(chunk_size):
    def loss_of(model, ids, targets):
        return chunked_cross_entropy(model(ids), targets, chunk_size)

    def apart(model, loss_of, backend):
        compiled = torch.compile(model, backend=backend)
        return lambda _, ids, targets: loss_of(compiled, ids, targets)

    def together(model, loss_of, backend):
        return torch.compile(loss_of, backend=backend)

    seen = assert_trains_like_eager(Plain, loss_of, apart)
    assert len(seen.report.rewritten) == 0
    torch._dynamo.reset()
    assert_rewritten(assert_trains_like_eager(Plain, loss_of, together))


def test_the_report_of_a_model_that_returns_its_logits():
    report = explain(Plain(1031), {"min_vocab": 0, "min_logits_bytes": 0})(labels(B, S))  # fewer might be any layer's
    [refusal] = report.refused
    assert refusal.operation == "return"
    assert_says_what_to_compile([refusal])
