"""Caches of compiled code: they hit in the next process, never with other sources or options, and shapes are few."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import OPTIONS, D, V, hidden, labels, weight

import cce_inductor
from cce_inductor import capture_reports

PRELUDE = f"""
import json, torch, torch.nn.functional as F, cce_inductor
from torch._dynamo.utils import counters
OPTIONS = {OPTIONS}
def program(h, w, t):
    logits = F.linear(h, w)
    return F.cross_entropy(logits, t, label_smoothing=0.1), logits
"""
RUN = """
torch._dynamo.reset()
counters.clear()
torch.manual_seed(0)
h, w, t = torch.randn(20, 8, requires_grad=True), torch.randn(53, 8, requires_grad=True), torch.arange(20)
loss, logits = compiled(h, w, t)
loss.backward()
expected, theirs = program(h, w, t)
assert type(logits) is not torch.Tensor and torch.allclose(logits + 0, theirs)
assert torch.allclose(loss, expected) and torch.allclose(
    torch.cat([h.grad, w.grad]), torch.cat(torch.autograd.grad(expected, (h, w))), atol=1e-6)
print(json.dumps({"hits": counters["aot_autograd"]["autograd_cache_hit"],
                  "misses": counters["aot_autograd"]["autograd_cache_miss"],
                  "bypasses": counters["aot_autograd"]["autograd_cache_bypass"],
                  "graph_misses": counters["inductor"]["fxgraph_cache_miss"],
                  "graph_bypasses": counters["inductor"]["fxgraph_cache_bypass"]}))
"""
WAYS = (
    f'compiled = torch.compile(program, backend="cce", options=OPTIONS)\n{RUN}',
    f"cce_inductor.enable(**OPTIONS); compiled = torch.compile(program)\n{RUN}\ncce_inductor.disable()",
)
HIT = {"hits": 1, "misses": 0, "bypasses": 0, "graph_misses": 0, "graph_bypasses": 0}


def counts(cache, *changes):
    """What a fresh process with a cache directory found in it, each way: at first, and after each change."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    code = "\n".join(step for change in ("", *changes) for step in (change, *WAYS))
    done = subprocess.run([sys.executable, "-c", PRELUDE + code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [found[i : i + len(WAYS)] for i in range(0, len(found), len(WAYS))]


def test_the_second_process_finds_everything_and_with_other_sources_or_options_nothing(tmp_path):
    [first] = counts(tmp_path)
    other_sources = "cce_inductor.backend._source_hash = lambda: b'of another version'"
    other_options = "OPTIONS['workspace_mib'] = 3"
    second, *others = counts(tmp_path, other_sources, other_options)
    assert second == [HIT] * len(WAYS)
    for found in (*first, *others[0], *others[1]):
        assert (found["hits"], found["misses"], found["bypasses"], found["graph_bypasses"]) == (0, 1, 0, 0)


def program(h, w, t):
    return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten())


def given(*shape):
    return hidden(*shape, D), weight(), labels(*shape)


def test_two_programs_with_different_options_do_not_mix():
    """The same function, compiled three times in one process, each called twice in turns."""
    torch._dynamo.reset()
    ours = torch.compile(program, backend="cce", options=OPTIONS | {"workspace_mib": 7})
    others = torch.compile(program, backend="cce", options=OPTIONS | {"workspace_mib": 9})
    neither = torch.compile(program, backend="cce", options=OPTIONS | {"min_vocab": V + 1})
    seen = []
    original = cce_inductor.backend.rewrite_module

    def rewrite(module, options, lazy=None):
        report = original(module, options, lazy)
        seen.append((options.workspace_mib, options.min_vocab, len(report.rewritten)))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cce_inductor.backend, "rewrite_module", rewrite)
        for _ in range(2):
            for compiled in (ours, others, neither):
                args = given(2, 5)
                torch.testing.assert_close(compiled(*args), program(*args))
    assert seen == [(7, 0, 1), (9, 0, 1), (None, V + 1, 0)]


def test_64_lengths_compile_at_most_twice():
    torch._dynamo.reset()
    compiled = torch.compile(program, backend="cce", options=OPTIONS, dynamic=True)
    w = weight()
    with capture_reports() as reports:
        for length in range(2, 66):
            h, t = hidden(2, length, D), labels(2, length)
            loss = compiled(h, w, t)
            loss.backward()
            torch.testing.assert_close(loss, program(h, w, t))
    assert 1 <= len(reports) <= 2
    assert all(len(report.rewritten) == 1 for report in reports)
