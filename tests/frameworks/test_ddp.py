"""DistributedDataParallel around a compiled model that returns its logits beside the loss, and the other way round."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import D, S, V
from seen import Seen
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cce_inductor.lazy_logits import LazyLogits

seen = Seen()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, ids):
        logits = self.head(self.layer(self.embed(ids)).tanh())
        return {"loss": F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)), "logits": logits}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 64)
    torch._dynamo.reset()
    seen.reports.clear()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    torch._dynamo.reset()


HOW = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "split into buckets": {"bucket_cap_mb": 1e-4},
}


@pytest.mark.parametrize("compile_inside", [True, False], ids=["DDP of compiled", "compiled DDP"])
@pytest.mark.parametrize("second_loss", [False, True], ids=["logits unread", "second loss"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_training_step(how, second_loss, compile_inside):
    torch.manual_seed(0)
    eager, ids = Model(), torch.randint(0, V, (4, S))
    model = copy.deepcopy(eager)
    if compile_inside:
        ours = DistributedDataParallel(torch.compile(model, backend=seen), **how)
    else:
        ours = torch.compile(DistributedDataParallel(model, **how), backend=seen)
    for _ in range(2):
        given = eager(ids), ours(ids)
        logits = given[1]["logits"]
        assert type(logits) is LazyLogits
        assert not logits.is_computed
        for out in given:
            loss = out["loss"] + out["logits"].square().mean() if second_loss else out["loss"]
            loss.backward()
        torch.testing.assert_close(given[1]["loss"], given[0]["loss"])
        torch.testing.assert_close(logits.detach() + 0, given[0]["logits"].detach())
    assert len(seen.rewritten) == 1
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
