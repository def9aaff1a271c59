"""Launches of Triton's kernels that take less of the host's time.

Before each launch Triton looks at all of some thirty arguments, for what of them decides which compiled kernel it is:
dtypes, alignments, constants. Then hooks are called, mostly none. For small problems that takes longer than the kernel.
Here, what decides it is put together by less than that, and the kernel is started as Inductor starts its own.
"""

from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_COMPILED = 4096  # each number that a kernel is told makes another entry

_compiled: dict[tuple, Any] = {}


def launch(kernel: Any, programs: int, /, **arguments: Any) -> Any:
    """`kernel[(programs,)](**arguments)` where all arguments have names; the compiled kernel, where there is one."""
    if not isinstance(kernel, triton.JITFunction):  # but one of Triton's interpreter
        return kernel[(programs,)](**arguments)
    key = (kernel, driver.active.get_current_device(), *arguments, *map(_decisive, arguments.values()))
    compiled = _compiled.get(key)
    if compiled is None or _watched():
        compiled = kernel[(programs,)](**arguments)
        if len(_compiled) >= MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled
    else:
        _start(compiled, kernel, programs, arguments)
    return compiled


def _decisive(argument: Any) -> Any:
    """What of an argument decides which compiled kernel it is for: no less than what Triton goes by."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return float if isinstance(argument, float) else (type(argument), argument)


def _watched() -> bool:
    """Whether somebody, such as a profiler of Triton's, is to be told of launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _start(compiled: Any, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
    stream = driver.active.get_current_stream(driver.active.get_current_device())
    metadata_and_hooks = compiled.packed_metadata, None, None, None
    in_order = (arguments[name] for name in kernel.arg_names)
    compiled.run(programs, 1, 1, stream, compiled.function, *metadata_and_hooks, *in_order)


class Rounds:
    """Launches of one kernel that differ in `round_index` only: its arguments are looked at once."""

    def __init__(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """arguments: all but round_index, which the kernel must list in do_not_specialize."""
        self._kernel, self._programs, self._arguments = kernel, programs, arguments
        self._compiled: Any = None

    def __call__(self, round_index: int) -> None:
        """Launches the kernel for a round."""
        self._arguments["round_index"] = round_index
        if self._compiled is None or _watched():
            self._compiled = launch(self._kernel, self._programs, **self._arguments)
        else:
            _start(self._compiled, self._kernel, self._programs, self._arguments)
