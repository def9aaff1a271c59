"""Triton's interpreter, made faster by half, as it takes much of the time of the tests of our kernels.

It prepares `triton.language` for each call of a function that a kernel makes, to find functions that it has wrapped
already. For each result it works out what follows from a type: its name, shape and size. And it computes what is less
than 64 bits wide twice to see whether it overflows, which sizes that it can run do not let happen.
"""

import dataclasses
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter


def make_faster() -> None:
    """Before the first kernel runs."""
    prepare_once_a_kernel()
    remember_types()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


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


def remember_types() -> None:
    """What a type says of a block, a tensor and its numbers is worked out once for each name or shape."""
    make_block_type, block_types = core.block_type.__init__, {}
    make_tensor, tensors = core.tensor.__init__, {}
    find_np_dtype, np_dtypes = interpreter._get_np_dtype, {}

    def block_type(self: Any, element_ty: core.dtype, shape: Any) -> None:
        key = str(element_ty), *map(core._unwrap_if_constexpr, shape)
        if key not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: core.dtype) -> None:
        shape = type.shape if type.is_block() else ()
        if shape not in tensors:
            make_tensor(self, None, type)
            tensors[shape] = dict(vars(self))
        vars(self).update(tensors[shape], handle=handle, type=type, dtype=type.scalar)

    def np_dtype(type: core.dtype) -> Any:
        if type.name not in np_dtypes:
            np_dtypes[type.name] = find_np_dtype(type)
        return np_dtypes[type.name]

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = np_dtype
    compare = core.tuple.__eq__  # of shapes, which are the same objects now where they are equal
    core.tuple.__eq__ = lambda self, other: core.constexpr(True) if self is other else compare(self, other)
