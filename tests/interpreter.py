"""Triton's interpreter, made faster: it prepares `triton.language` for each call of a function that a kernel makes.

That is to find functions that it has wrapped already, and takes a third of the time of the tests of our kernels.
"""

from triton import language
from triton.runtime import interpreter


class _Scope:
    """What is prepared until a kernel has run."""

    def __init__(self, scope, modules: set[int]):
        self._scope, self._modules = scope, modules

    def restore(self):
        self._scope.restore()
        self._modules.clear()


def prepare_once_a_kernel() -> None:
    """`triton.language` is prepared once for each kernel that runs."""
    prepare, ready, all_modules = interpreter._patch_lang, set(), {id(language), id(language.core)}

    def prepare_once(function):
        modules = all_modules.intersection(map(id, function.__globals__.values()))
        if modules <= ready:
            return None  # of a function that a kernel calls, which nobody takes back
        scope = _Scope(prepare(function), ready)
        ready.update(modules)
        return scope

    interpreter._patch_lang = prepare_once
