"""The ways in, with real Inductor: the backend by name and by function, and `enable()` under plain torch.compile."""

import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from helpers import D, V, assert_close_to_eager, bias, hidden, labels, weight

import cce_inductor
from cce_inductor import capture_reports, cce_backend

OPTIONS = {"min_vocab": 0, "min_logits_bytes": 0}


def program(h, w, b, t):
    logits = 4 * torch.tanh(F.linear(h, w, b).float() / 4)
    loss = F.cross_entropy(logits.view(-1, V), t.view(-1), label_smoothing=0.1)
    return loss + 1e-2 * logits.logsumexp(-1).square().mean()


def refused(h, w, b, t):
    return F.cross_entropy(F.dropout(F.linear(h, w, b), 0.0).view(-1, V), t.view(-1))


def given(dtype=torch.float32):
    return hidden(dtype=dtype), weight(dtype=dtype), bias(dtype=dtype), labels(ignored=-100)


@pytest.fixture(autouse=True)
def _from_the_beginning():
    """No compiled code of other tests, and nothing enabled before or after."""
    torch._dynamo.reset()
    yield
    while torch._inductor.config.pre_grad_custom_pass is not None:
        cce_inductor.disable()


def rewrites(reports):
    return sum(len(report.rewritten) for report in reports)


# ------------------------------------------------------------------------------------------------------ the backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_name(dtype):
    compiled = torch.compile(program, backend="cce", options=OPTIONS, fullgraph=True)
    with capture_reports() as reports:
        assert_close_to_eager(compiled, program, given(dtype))
    assert rewrites(reports) == 1


def test_by_function_with_mode_and_mixed_options():
    mixed = OPTIONS | {"epilogue_fusion": False, "shape_padding": False, "mode": "max-autotune-no-cudagraphs"}
    compiled = torch.compile(program, backend=cce_backend, options=mixed)
    with capture_reports() as reports:
        assert_close_to_eager(compiled, program, given())
    assert rewrites(reports) == 1


def test_dynamic_shapes():
    compiled = torch.compile(program, backend="cce", options=OPTIONS, dynamic=True)
    with capture_reports() as reports:
        assert_close_to_eager(compiled, program, given())
        for batch, length in ((2, 5), (4, 6), (5, 9)):
            args = hidden(batch, length, D), weight(), bias(), labels(batch, length)
            assert torch.allclose(compiled(*args), program(*args), rtol=V * 2**-23)
    assert len(reports) == 1


def test_defaults_leave_a_small_head_alone():
    compiled = torch.compile(program, backend="cce")
    with capture_reports() as reports:
        assert_close_to_eager(compiled, program, given())
    assert rewrites(reports) == 0


def test_inductor_gets_mode_and_its_options(monkeypatch):
    seen = []

    def inductor_backend(mode, options):
        seen.append((mode, options))
        return lambda module, inputs: module.forward

    monkeypatch.setattr(cce_inductor.compat, "inductor_backend", inductor_backend)
    torch.compile(program, backend=cce_backend, mode="max-autotune")(*given())
    torch._dynamo.reset()
    torch.compile(program, backend="cce", options=OPTIONS | {"mode": "default", "max_autotune": True})(*given())
    assert seen == [("max-autotune", {}), ("default", {"max_autotune": True})]


WRONG = {
    "unknown": ({"min_vocabulary": 3}, "min_vocab=4096"),
    "ill_typed": ({"min_vocab": "many"}, "option min_vocab must be an int"),
    "out_of_range": ({"workspace_mib": 0}, "option workspace_mib must be at least 1"),
    "ill_typed_for_inductor": ({"max_autotune": "yes"}, "max_autotune"),
    "mode": ({"mode": "fastest"}, "fastest"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_option_raises(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(program, backend="cce", options=options)(*given())


# ----------------------------------------------------------------------------------------------------- enable()


def test_enable_and_disable():
    cce_inductor.enable(**OPTIONS)
    with capture_reports() as reports:
        assert_close_to_eager(torch.compile(program), program, given())
    assert rewrites(reports) == 1
    cce_inductor.disable()
    torch._dynamo.reset()
    with capture_reports() as reports:
        torch.compile(program)(*given())
    assert reports == []


def test_enable_as_a_context_manager_nests():
    config = torch._inductor.config
    with cce_inductor.enable(**OPTIONS):
        outer = config.pre_grad_custom_pass
        with cce_inductor.enable(min_vocab=V + 1), capture_reports() as reports:
            torch.compile(program)(*given())
        assert config.pre_grad_custom_pass is outer
    assert config.pre_grad_custom_pass is None
    # both passes ran: the outer one first, and it left nothing for the inner one to do
    assert [len(report.rewritten) for report in reports] == [1, 0]


def test_enable_ends_with_an_error():
    with pytest.raises(KeyError), cce_inductor.enable():
        raise KeyError
    assert torch._inductor.config.pre_grad_custom_pass is None


def test_disable_without_enable_does_nothing():
    cce_inductor.disable()
    assert torch._inductor.config.pre_grad_custom_pass is None


def test_enable_keeps_a_pass_that_was_set_before():
    seen = []
    with torch._inductor.config.patch(pre_grad_custom_pass=seen.append), cce_inductor.enable(**OPTIONS):
        with capture_reports() as reports:
            torch.compile(program)(*given())
        cce_inductor.disable()
        assert torch._inductor.config.pre_grad_custom_pass == seen.append
        cce_inductor.enable()
    assert len(seen) == 1
    assert rewrites(reports) == 1


@pytest.mark.parametrize("options", [{"max_autotune": True}, {"mode": "default"}])
def test_enable_takes_only_options_of_ours(options):
    with pytest.raises(ValueError, match=f"give {next(iter(options))} to torch.compile"):
        cce_inductor.enable(**options)


def test_enable_checks_its_options_at_once():
    with pytest.raises(ValueError, match="unknown option 'min_vocabs'"):
        cce_inductor.enable(min_vocabs=3)
    assert torch._inductor.config.pre_grad_custom_pass is None


def test_the_pass_has_an_identity_for_caches():
    """By options and what ran before; None, which means "don't cache", where that has none."""

    def identity(**options):
        with cce_inductor.enable(**options):
            return torch._inductor.config.pre_grad_custom_pass.uuid()

    assert identity() == identity()
    assert identity() != identity(min_vocab=1)
    with cce_inductor.enable():
        assert identity() != torch._inductor.config.pre_grad_custom_pass.uuid()
    with torch._inductor.config.patch(pre_grad_custom_pass=lambda graph: None):
        cce_inductor.enable()
        assert torch._inductor.config.pre_grad_custom_pass.uuid() is None
        cce_inductor.disable()


# ------------------------------------------------------------------------------------------------- fresh processes

PRELUDE = f"""
import torch, torch.nn.functional as F
h, w = torch.randn(20, 8, requires_grad=True), torch.randn({V}, 8, requires_grad=True)
t = torch.randint(0, {V}, (20,))
def program(h, w, t):
    return F.cross_entropy(h @ w.T, t)
def refused(h, w, t):
    return F.cross_entropy(F.dropout(h @ w.T, 0.0), t)
options = {OPTIONS}
"""


def python(code, **environment):
    """Runs a program in a fresh interpreter; gives what it printed and logged."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_name_needs_no_import_and_nothing_is_logged_unasked():
    printed, logged = python("""
        import sys
        assert "cce_inductor" not in sys.modules and "cce" in torch._dynamo.list_backends()
        torch.compile(program, backend="cce", options=options)(h, w, t).backward()
        print(sys.modules["cce_inductor"].__name__, h.grad is not None)
    """)
    assert printed == "cce_inductor True\n"
    assert "rewrote" not in logged


def test_torch_logs_prints_one_line_for_each_rewrite_and_refusal():
    code = """
        for function in program, refused:
            torch._dynamo.reset()
            torch.compile(function, backend="cce", options=options)(h, w, t)
    """
    _, logged = python(code, TORCH_LOGS="cce_inductor")
    lines = [line for line in logged.splitlines() if "cce" in line]
    assert len(lines) == 2
    assert "rewrote cross_entropy of [20, 53] logits" in lines[0]
    assert "left alone: " in lines[1]
    assert "dropout" in lines[1]


def test_standard_logging_shows_them_too(caplog):
    with caplog.at_level(logging.INFO, "cce_inductor"):
        torch.compile(refused, backend="cce", options=OPTIONS)(*given())
    assert [message for message in caplog.messages if message.startswith("left alone: ")]


MEMORY = """
    import re
    h, w = torch.randn(2048, 32, requires_grad=True), torch.randn(32768, 32, requires_grad=True)
    t = torch.randint(0, 32768, (2048,))  # logits of 256 MiB

    def mib(name):
        return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

    def peak(backend):
        compiled = torch.compile(program, backend=backend, dynamic=True)
        # compiles what is measured below, as these logits are not too small either
        smaller = (x[:n].detach().requires_grad_() for x, n in ((h, 1024), (w, 8192)))
        compiled(*smaller, t[:1024] % 8192).backward()
        before = mib("VmRSS")
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
        compiled(h, w, t).backward()
        return mib("VmHWM") - before

    print(peak("cce"), peak("inductor"))  # ours first, as memory that is left for the next hides some of its peak
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_training_step_never_holds_the_logits_in_memory():
    ours, inductors = map(float, python(MEMORY)[0].split())
    assert inductors > 256
    assert ours < 128
