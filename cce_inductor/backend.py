"""The ways in: `backend="cce"`, and `enable()` for programs that call plain `torch.compile(model)`."""

import contextlib
import functools
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from . import compat
from .compat import CustomGraphPass
from .graph.driver import rewrite_module
from .graph.returned import LazyResults
from .ops import scaling
from .options import Options
from .report import Report, publish
from .verify import Verified, copy_of


def cce_backend(
    gm: GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable:
    """Backend for torch.compile: Inductor, with heads and their losses rewritten to Cut Cross-Entropy operators.

        model = torch.compile(model, backend="cce")        # found by name, or
        model = torch.compile(model, backend=cce_inductor.cce_backend)

    gm, example_inputs: what Dynamo gives to a backend.
    mode: Inductor's mode, as in `torch.compile(mode=...)`.
    options: options of this package (`Options`) and of Inductor, mixed.

    Returns the compiled callable. Raises ValueError or TypeError for a wrong option of ours, RuntimeError for an
    ill-typed one of Inductor's, and `RefusedError` under `on_refusal="raise"`.
    """
    ours, inductors = Options.split(options)
    inductor = compat.inductor_backend(mode or ours.mode, inductors)
    return _compiled(inductor, gm, example_inputs, ours)


def _compiled(inductor: Callable, gm: GraphModule, example_inputs: list[Any], options: Options) -> Callable:
    """A graph, rewritten and compiled, that gives lazy logits where the pass took logits out of its results."""
    lazy = LazyResults(gm.graph)
    original = copy_of(gm) if options.verify else None
    report = rewrite_module(gm, options, lazy)
    publish(report, options.on_refusal)
    if not report.rewritten:
        return inductor(gm, example_inputs)
    scaling.compile_in_place()
    theirs = None if original is None else inductor(copy_of(original), example_inputs)
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=f"{config.cache_key_tag}cce_inductor={_source_hash().hex()}"):
        ours = lazy.around(compat.refusing_second_derivatives(inductor(gm, example_inputs)))
    if original is None or theirs is None:
        return ours
    return Verified(ours, theirs, original, options.verify)


def _is_ours(backend: Any) -> bool:
    """Whether the programs that a backend compiles come to the pass."""
    return isinstance(compat.inductor_config.pre_grad_custom_pass, _PreGradPass) or (
        getattr(backend, "__module__", None) == __name__  # also that of explain()
    )


# Decided program by program while Dynamo traces it, so that other programs are not touched.
compat.ignore_warning_once(_is_ours)


class _PreGradPass(CustomGraphPass):
    """The same pass where Inductor runs its own passes on the graphs of Dynamo, after any pass that was set before.

    Inductor skips it where it finds compiled code in a cache, and whoever calls Inductor does not hear of it. So lazy
    logits can't begin here, nor anything else that is put around compiled code. Where there is no other pass to wait
    for, graphs are rewritten before Inductor.
    """

    def __init__(self, options: Options, previous: Any) -> None:
        self.options = options
        self.previous = previous

    def before(self, inductor: Callable, gm: GraphModule, example_inputs: list[Any]) -> Callable:
        """Called by `torch.compile` in place of Inductor."""
        if self.previous is not None:
            return inductor(gm, example_inputs)

        def inductor_alone(*graph_and_inputs: Any) -> Callable:
            token = _done.set(self)
            try:
                return inductor(*graph_and_inputs)
            finally:
                _done.reset(token)

        return _compiled(inductor_alone, gm, example_inputs, self.options)

    def __call__(self, graph: Graph) -> None:
        if _done.get() is self:
            return
        if self.previous is not None:
            self.previous(graph)
        module = graph.owning_module
        assert module is not None, "Inductor hands over the graph of a module"
        scaling.compile_in_place()
        once = not compat.LOSES_SECOND_DERIVATIVES  # what the gradients need then is put around compiled code
        publish(rewrite_module(module, self.options, once=once), self.options.on_refusal)

    def uuid(self) -> Any:
        """Tells caches of compiled graphs apart: by our sources, the options, and what ran before."""
        if self.previous is None:
            return _source_hash(), repr(self.options)
        before = self.previous.uuid() if isinstance(self.previous, CustomGraphPass) else None
        return None if before is None else (_source_hash(), repr(self.options), before)


_done: ContextVar[_PreGradPass | None] = ContextVar("done", default=None)  # the pass, in what it rewrote before


@functools.cache
def _source_hash() -> bytes:
    return compat.get_hash_for_files(tuple(sorted(map(str, Path(__file__).parent.rglob("*.py")))))


class _Enabled(contextlib.AbstractContextManager):
    """What `enable()` returns: leaving a with-block that was entered with it undoes it."""

    def __exit__(self, *_: Any) -> None:
        disable()


_outer: list[tuple[Any, Callable]] = []  # for each enable() that is still on: what was set before, and an undo


def enable(**options: Any) -> contextlib.AbstractContextManager:
    """Rewrites losses under plain `torch.compile(model)` too, for everything compiled from here on in this process.

    For frameworks that accept only the names of built-in backends. options: those of `Options`, but for `mode`.
    Until `disable()`, or to the end of the block where it is used as a context manager:

        with cce_inductor.enable():
            ...

    What was compiled before stays as it was compiled. Raises ValueError or TypeError for a wrong option.
    """
    ours, inductors = Options.split(options)
    if inductors or ours.mode is not None:
        wrong = ", ".join([*inductors, *(["mode"] if ours.mode is not None else [])])
        raise ValueError(f"enable() takes the options of cce_inductor only; give {wrong} to torch.compile")
    config: Any = compat.inductor_config
    ours_there = _PreGradPass(ours, config.pre_grad_custom_pass)
    _outer.append((config.pre_grad_custom_pass, compat.around_inductor(ours_there.before)))
    config.pre_grad_custom_pass = ours_there
    return _Enabled()


def disable() -> None:
    """Undoes the last `enable()`; nothing happens where there is none."""
    if _outer:
        compat.inductor_config.pre_grad_custom_pass, undo = _outer.pop()
        undo()


def explain(function: Callable, options: dict[str, Any] | None = None) -> Callable[..., Report]:
    """What `backend="cce"` would do to a function or module: `print(explain(model)(*args, **kwargs))`.

    Traces one call, rewrites its graphs, and runs them uncompiled. Like `torch._dynamo.explain`, it starts from an
    empty cache of compiled code. Returns one `Report` over all graphs of the call: print it, let rich print it as a
    table, or take its `to_dict()` or `to_json()`.
    """
    ours, _ = Options.split(options)

    def explained(*args: Any, **kwargs: Any) -> Report:
        total = Report(graphs=0)

        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable:
            lazy = LazyResults(gm.graph)
            total.add_graph(rewrite_module(gm, ours, lazy))
            return lazy.around(gm.forward)

        torch.compiler.reset()
        try:
            torch.compile(function, backend=backend)(*args, **kwargs)
        finally:
            torch.compiler.reset()
        return total

    return explained
