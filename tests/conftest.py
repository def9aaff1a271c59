"""Where there is no GPU, Triton kernels run in Triton's interpreter, and tests marked `gpu` are skipped."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which no import above does
    from interpreter import make_faster

    make_faster()

torch.set_num_threads(1)  # tests run side by side, and threads that wait for each other take the cores of others

# What an earlier run left in Inductor's cache would not be compiled again, and so not be reported.
_cache = tempfile.TemporaryDirectory(prefix="inductor-cache-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

# Inductor tries out what each CPU flag promises in every process, by a C++ compiler and a process that loads PyTorch.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# Inductor compiles C++ in processes of its own, which load PyTorch first, while the tests keep all cores busy anyway.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Dynamo empties the processor's caches to time the guards of each program: a tenth of what most tests take.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0

settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=1000)  # pytest --hypothesis-profile=long
# for tests/mutations.py: whether anything fails, not what
settings.register_profile("mutations", deadline=None, derandomize=True, max_examples=25, phases=[Phase.generate])
settings.load_profile("default")


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    """The same ways on every CPU, also on those whose products are so fast that nothing is skipped."""
    monkeypatch.setattr("cce_inductor.compat.multiplies_in_hardware", lambda: False)


def pytest_collection_modifyitems(items):
    # What takes longest begins first, so that no long test is left alone in the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter):
    """What tests say of themselves by record_property("programs", ...)."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "programs":
                terminalreporter.write_line(f"{report.nodeid}: {text}")
