"""Threads, processes and long runs: the same gradients everywhere and every time, and no memory that stays behind."""

import subprocess
import sys
import textwrap
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, D, S, V, labels
from torch import nn

from cce_inductor import linear_cross_entropy

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")
gpu = pytest.mark.gpu
# autograd of a CUDA build works in no fork of a process that used it
START_METHODS = ("spawn",) if torch.backends.cuda.is_built() else ("fork", "spawn")


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, ids):
        logits = self.head(self.layer(self.embed(ids)).tanh())
        return F.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)), logits


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def test_two_threads_compile_and_train_at_once():
    """Different programs, so that both compile; each gets the gradients that it gets in eager mode."""
    torch._dynamo.reset()
    start, errors = threading.Barrier(2), []

    def train(scale, model, eager, ids):
        try:
            compiled = torch.compile(lambda ids: model(ids)[0] * scale, backend="cce", options=OPTIONS)
            start.wait()
            for _ in range(20):
                compiled(ids).backward()
                (eager(ids)[0] * scale).backward()
            for mine, theirs in zip(gradients(model), gradients(eager), strict=True):
                torch.testing.assert_close(mine, theirs)
        except BaseException as error:
            errors.append(error)

    # made here, as threads draw from the same random numbers
    programs = [(2.0 + seed, Model(seed), Model(seed), labels(4 + seed, S)) for seed in (0, 1)]
    threads = [threading.Thread(target=train, args=program) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# --------------------------------------------------------------------------------------------------- processes

SCRIPT = f"""
import os, sys, tempfile
import torch, torch.nn.functional as F, torch.multiprocessing as mp
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding({V}, {D}), nn.Linear({D}, {V})
    def forward(self, ids):
        logits = self.head(self.embed(ids).tanh())
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()), logits

def gradients(wrap, ids, backend="cce"):
    model = Model()
    wrapped = wrap(model)  # which has to live until the backward
    loss, _ = torch.compile(wrapped, backend=backend, options=OPTIONS if backend == "cce" else None)(ids)
    loss.backward()
    del wrapped
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

def check(mine, theirs):
    torch.testing.assert_close(mine, theirs)

IDS, OPTIONS = torch.arange(24).view(4, 6), {OPTIONS}
"""


def run(tmp_path, code):
    """A script of its own, as children that are spawned import it."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")


@on_linux
def test_a_child_compiles_and_trains(tmp_path):
    """After its parent did; forked from it, or begun anew. So do the workers of a data loader beside it."""
    run(tmp_path, f"""
        def child(queue):
            torch._dynamo.reset()
            queue.put(gradients(lambda model: model, IDS).numpy())

        if __name__ == "__main__":
            torch.set_num_threads(1)  # a child that is forked has no threads of OpenMP
            expected = gradients(lambda model: model, IDS, backend="eager")
            check(gradients(lambda model: model, IDS), expected)
            for how in {START_METHODS!r}:
                context = mp.get_context(how)
                queue = context.Queue()
                process = context.Process(target=child, args=(queue,))
                process.start()
                check(torch.from_numpy(queue.get(timeout=200)), expected)
                process.join()
                loader = torch.utils.data.DataLoader(IDS, 4, num_workers=1, multiprocessing_context=how)
                for ids in loader:
                    check(gradients(lambda model: model, ids), expected)
            print("done")
    """)  # fmt: skip


@on_linux
def test_two_processes_of_ddp_have_the_gradients_of_one(tmp_path):
    """Each has half of the batch; the mean over ranks is the mean over the batch."""
    run(tmp_path, f"""
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel

        def rank(number, store):
            dist.init_process_group("gloo", init_method="file://" + store, rank=number, world_size=2)
            mine = gradients(DistributedDataParallel, IDS.chunk(2)[number])
            check(mine, gradients(lambda model: model, IDS, backend="eager"))
            dist.barrier()
            dist.destroy_process_group()

        if __name__ == "__main__":
            import cce_inductor.backend  # and with it all that children need: those that are forked have it then
            with tempfile.TemporaryDirectory() as folder:
                store = os.path.join(folder, "store")
                mp.start_processes(rank, (store,), nprocs=2, start_method={START_METHODS[0]!r})
            print("done")
    """)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- long runs


@on_linux
def test_a_thousand_steps_leave_no_memory_behind(tmp_path):
    """With logits that are returned and not read, and read every tenth time.

    In a process of its own: what other tests left to be freed would be counted here.
    """
    run(tmp_path, """
        import ctypes, gc, re

        def resident_mib():
            # without what the C library's allocator keeps of freed memory, which varies from run to run
            if hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/status") as status:
                return int(re.search(r"VmRSS:\\s+(\\d+) kB", status.read())[1]) / 1024

        def train(steps):
            for step in range(steps):
                loss, logits = compiled(IDS)
                if step % 10 == 0:
                    loss = loss + logits.square().mean()
                loss.backward()
            del loss, logits
            gc.collect()
            return resident_mib(), len(gc.get_objects())

        torch.set_num_threads(1)
        compiled = torch.compile(Model(), backend="cce", options=OPTIONS)
        train(100)
        mib, objects = train(100)
        after, objects_after = train(1000)
        assert after - mib < 2, (mib, after)
        assert objects_after - objects < 100, (objects, objects_after)
        print("done")
    """)  # fmt: skip


@gpu
def test_a_thousand_steps_leave_no_memory_behind_on_a_gpu():
    h = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(0, 5000, (300,), device="cuda")

    def train(steps):
        for _ in range(steps):
            linear_cross_entropy(h, w, t).backward()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    train(10)
    before = train(10)
    assert train(1000) == before


@pytest.fixture(params=[False, True], ids=["", "deterministic algorithms"])
def deterministic(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("deterministic", "two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_fifty_runs_give_the_same_bits(device, dtype):
    rows, vocab, width = (300, 3000, 48) if device == "cpu" else (4096, 65536, 2048)  # sparse on a GPU in 16 bits
    torch.manual_seed(0)
    h, w = (torch.randn(n, width, device=device, dtype=dtype, requires_grad=True) for n in (rows, vocab))
    t = torch.randint(0, vocab, (rows,), device=device)

    def run():
        loss = linear_cross_entropy(h, w, t, reduction="sum")
        return loss, *torch.autograd.grad(loss, (h, w))

    first = run()
    for _ in range(49):
        assert all(map(torch.equal, run(), first))


@pytest.mark.usefixtures("deterministic")
def test_fifty_runs_of_a_compiled_loss_give_the_same_bits():
    """Of a loss alone: Inductor's own gradient of an embedding is summed in any order on a CPU."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    args = torch.randn(300, D, requires_grad=True), torch.randn(3000, D, requires_grad=True), torch.arange(300)
    compiled = torch.compile(
        lambda h, w, t: F.cross_entropy(F.linear(h, w), t, label_smoothing=0.1), backend="cce", options=OPTIONS
    )

    def run():
        loss = compiled(*args)
        return loss, *torch.autograd.grad(loss, args[:2])

    first = run()
    for _ in range(49):
        assert all(map(torch.equal, run(), first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(device, dtype):
    """The same bits of its loss and gradient, as long as the batch has the same size and gradients are exact."""
    torch.manual_seed(0)
    rows, vocab, width = 300, 3000, 48
    h, w = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(vocab, width, device=device, dtype=dtype)
    t = torch.randint(0, vocab, (rows,), device=device)
    kept = slice(100, 110)

    def run(h, t):
        h = h.clone().requires_grad_()
        losses = linear_cross_entropy(h, w, t, reduction="none", approximate_mass=0.0)
        return losses[kept], torch.autograd.grad(losses.sum(), h)[0][kept]

    other_h, other_t = 3 * torch.randn_like(h), t.flip(0)
    other_h[kept], other_t[kept] = h[kept], t[kept]
    assert all(map(torch.equal, run(h, t), run(other_h, other_t)))
