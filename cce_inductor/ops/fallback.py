"""What to do where an implementation can't run on this machine: take the next one, with one warning.

That is where Triton can't compile a kernel, the GPU has too little shared memory for it, or memory runs out. All other
errors, those of the operands among them, are raised as they are. What ran before an error is thrown away: no
implementation writes to its operands. Nothing here waits for the device.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TypeVar

import torch
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from .problem import MIB, Problem

T = TypeVar("T")

_cannot_compile: set[Hashable] = set()  # (kind of problem, implementation): not tried again, as compiling takes long
_warned: set[tuple[str, type]] = set()


def first_that_runs(kind: Hashable, ways: dict[str, Callable[[], T]]) -> T:
    """The result of the first way that can run here; raises what the last one raises.

    kind: what decides which kernels are compiled.
    ways: the best first, by names that complete "... can't run here".
    """
    *others, last = ways
    for name in others:
        if (kind, name) in _cannot_compile:
            continue
        try:
            return ways[name]()
        except Exception as error:
            if not _is_of_the_machine(error):
                raise
            if not isinstance(error, torch.OutOfMemoryError):
                _cannot_compile.add((kind, name))
            warn_once(name, error)
        # here the error is gone, and with it the memory that its traceback held on to
    return ways[last]()


def smaller(problem: Problem) -> Problem:
    """The same problem with an eighth of the workspace."""
    return replace(problem, workspace_bytes=max(MIB, problem.workspace_bytes // 8))


def _is_of_the_machine(error: Exception) -> bool:
    if isinstance(error, InterpreterError):  # whatever a kernel raises in Triton's interpreter
        return False
    if type(error) is RuntimeError:  # Triton has no class of its own for these
        return any(text in str(error) for text in ("PassManager::run failed", "Failed to find C compiler"))
    return isinstance(error, torch.OutOfMemoryError | TritonError)


def warn_once(name: str, error: Exception) -> None:
    """Once for each implementation and kind of error."""
    if (name, type(error)) not in _warned:
        _warned.add((name, type(error)))
        reason = f"{type(error).__name__}: {str(error).strip()}"
        warnings.warn(
            f"cce_inductor: {name} can't run here, a simpler implementation takes its place ({reason})",
            RuntimeWarning,
            stacklevel=3,
        )
