"""fully_shard (FSDP2) with two processes: every parameter in two shards, gathered inside of the compiled model."""

import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import D, S, V
from seen import Seen
from torch import nn
from torch.distributed.fsdp import fully_shard

PROCESSES = 2
WAYS = ("layers", "root", "root compiled")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, ids):
        logits = self.head(self.layer(self.embed(ids)).tanh())
        return F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))


def model_and_batch():
    torch.manual_seed(0)
    return Model(), torch.randint(0, V, (2 * PROCESSES, S))


def train(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    try:
        found = {how: train_one_way(rank, how) for how in WAYS}
        if rank == 0:
            torch.save(found, results)
    finally:
        dist.destroy_process_group()


def train_one_way(rank, how):
    """Two steps on this process's half of the batch: losses, gradients as whole tensors, what the pass did."""
    torch._dynamo.reset()
    model, ids = model_and_batch()
    if how == "layers":
        fully_shard(model.layer)
    fully_shard(model)
    seen = Seen()
    if how == "root compiled":
        model.compile(backend=seen)
        ours = model
    else:
        ours = torch.compile(model, backend=seen)
    losses = []
    for _ in range(2):
        loss = ours(ids.chunk(PROCESSES)[rank])
        loss.backward()
        losses.append(loss.detach())
    gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
    return losses, gradients, len(seen.rewritten), max(graph.largest_computed for graph in seen.graphs)


def test_gradients_are_those_of_one_process(tmp_path):
    """All ways in the same two processes, forked from one that has loaded what takes long."""
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "cce_inductor.backend"])
    arguments = (tmp_path / "store", tmp_path / "results")
    mp.start_processes(train, arguments, nprocs=PROCESSES, start_method="forkserver")
    found = torch.load(tmp_path / "results")
    assert tuple(found) == WAYS
    eager, ids = model_and_batch()
    for part in (ids, ids):
        eager(part).backward()
    for how, (losses, gradients, rewritten, largest) in found.items():
        assert rewritten == 1, how
        assert largest < 2 * (S - 1) * V, how
        for mine, theirs in zip(gradients, eager.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs.grad)
        torch.testing.assert_close(losses[0], eager(ids.chunk(PROCESSES)[0]).detach())
