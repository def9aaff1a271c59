"""What decides which compiled kernel a launch takes, and that a launch starts it with all arguments in order."""

import pytest
import torch
import triton
from architectures import Driver
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from cce_inductor.ops import quick_launch
from cce_inductor.ops.quick_launch import Rounds, launch


def add_kernel(first, second, count, scale, ROWS, round_index):
    """Nothing runs it."""


def one_kernel(argument):
    """Nothing runs it."""


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The one that Triton finds; a function puts another in its place."""
    monkeypatch.setattr(quick_launch, "_compiled", {})

    def put(gpu):
        monkeypatch.setattr(driver, "_active", Driver(gpu))

    put("9.0")
    return put


class Compiled(triton.compiler.CompiledKernel):
    """Records what it is started with."""

    def __init__(self):
        self.function, self.packed_metadata, self.module = "function", "metadata", None
        self.started = []

    @property
    def run(self):
        return lambda *arguments: self.started.append(arguments)


class Kernel(triton.JITFunction):
    """Records what Triton was asked to launch, with a compiled kernel each time."""

    def __init__(self):
        super().__init__(add_kernel, do_not_specialize=["round_index"])
        self.asked = []

    def __getitem__(self, grid):
        def ask(**arguments):
            self.asked.append((grid, arguments))
            return Compiled()

        return ask


def arguments(**changed):
    some = torch.zeros(64)
    given = {"first": some, "second": None, "count": 12, "scale": 0.5, "ROWS": 4, "round_index": 0, "num_warps": 4}
    return given | changed


def test_a_second_launch_starts_what_the_first_one_compiled():
    kernel = Kernel()
    compiled = launch(kernel, 3, **arguments())
    others = arguments(first=torch.ones(64), scale=2.0)
    assert launch(kernel, 5, **others) is compiled
    assert len(kernel.asked) == 1
    assert kernel.asked[0][0] == (3,)
    in_order = [others[name] for name in ("first", "second", "count", "scale", "ROWS", "round_index")]
    (started,) = compiled.started
    assert started[:9] == (5, 1, 1, 0, "function", "metadata", None, None, None)
    assert all(a is b for a, b in zip(started[9:], in_order, strict=True))


def test_arguments_go_in_the_order_of_the_kernel():
    kernel = Kernel()
    for _ in range(2):
        compiled = launch(kernel, 3, **dict(reversed(arguments().items())))
    assert compiled.started[0][10:] == (None, 12, 0.5, 4, 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"count": 13},
        {"count": 1 << 40},
        {"ROWS": 8},
        {"num_warps": 8},
        {"second": torch.zeros(64)},
        {"first": torch.zeros(64, dtype=torch.int32)},
        {"first": torch.zeros(64)[1:]},
        {"first": None},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_arguments_that_decide_more_are_left_to_triton(changed):
    kernel = Kernel()
    launch(kernel, 3, **arguments())
    launch(kernel, 3, **arguments(**changed))
    assert len(kernel.asked) == 2


def test_each_kernel_and_each_gpu_has_its_own(gpu):
    kernel, other = Kernel(), Kernel()
    launch(kernel, 3, **arguments())
    gpu("8.0")
    launch(kernel, 3, **arguments())
    assert len(kernel.asked) == 2
    other.hash = "of another source"
    launch(other, 3, **arguments())
    assert len(other.asked) == 1


def test_hooks_are_told_of_all_launches():
    kernel = Kernel()
    rounds = Rounds(kernel, 3, **{name: value for name, value in arguments().items() if name != "round_index"})
    hook = [].append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for index in range(2):
            launch(kernel, 3, **arguments())
            rounds(index)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(kernel.asked) == 4
    assert [asked["round_index"] for _, asked in kernel.asked[1::2]] == [0, 1]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(quick_launch, "MOST_COMPILED", 3)
    kernel = Kernel()
    for count in range(10):
        launch(kernel, 3, **arguments(count=count))
        assert len(quick_launch._compiled) <= 3
    launch(kernel, 3, **arguments(count=9))
    assert len(kernel.asked) == 10


def test_rounds_differ_in_their_index_only():
    kernel = Kernel()
    first = torch.zeros(64)
    rounds = Rounds(kernel, 3, first=first, second=None, count=12, scale=0.5, ROWS=4, num_warps=4)
    for index in range(4):
        rounds(index)
    assert len(kernel.asked) == 1
    started = quick_launch._compiled.popitem()[1].started
    assert [call[9:] for call in started] == [(first, None, 12, 0.5, 4, index) for index in (1, 2, 3)]


def test_the_interpreter_launches_as_it_does():
    class Interpreted:
        def __getitem__(self, grid):
            return lambda **arguments: (grid, arguments)

    assert launch(Interpreted(), 3, a=1) == ((3,), {"a": 1})


TENSORS = st.builds(
    lambda dtype, offset, count: torch.zeros(count + offset, dtype=dtype)[offset:],
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool]),
    st.integers(0, 20),
    st.integers(1, 40),
)
DESCRIPTORS = st.builds(
    lambda dtype, rows, columns: TensorDescriptor.from_tensor(torch.zeros(64, 64, dtype=dtype), [rows, columns]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([16, 32]),
    st.sampled_from([16, 32]),
)
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 8, 15, 16, 48, 2**31 - 1, 2**31, 2**63 - 1, -1, 0.0, 1.0, 0.5, True, False, None]
)


@given(first=st.one_of(TENSORS, DESCRIPTORS, NUMBERS), second=st.one_of(TENSORS, DESCRIPTORS, NUMBERS))
def test_arguments_that_look_alike_are_alike_to_triton(first, second):
    *_, binder = triton.JITFunction(one_kernel).create_binder()
    _, of_first, _ = binder(first, debug=False)
    _, of_second, _ = binder(second, debug=False)
    if quick_launch._decisive(first) == quick_launch._decisive(second):
        assert of_first == of_second
