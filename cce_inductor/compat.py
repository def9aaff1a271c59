"""Everything private to PyTorch that the package touches, in one place. Checked against torch 2.11 and 2.13-2.15.

A test holds the other files to names without an underscore. Of those with one it allows what the documentation of
PyTorch names too: `torch._check`, `torch._check_value`, `torch._dynamo.mark_dynamic`.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import TracingContext
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._logging import getArtifactLogger
from torch._logging._internal import register_artifact
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_map_only

__all__ = [
    "CLAMP_IS_FLAT_AT_BOUNDS",
    "LOSES_SECOND_DERIVATIVES",
    "CustomGraphPass",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "around_inductor",
    "artifact_logger",
    "assert_on_device",
    "below_torch_function",
    "cache_dir",
    "compiled_alone",
    "constant_size",
    "cpp_compiler",
    "differentiated_by_transform",
    "fix",
    "float_hint",
    "get_hash_for_files",
    "graph_break",
    "hands_over",
    "ignore_warning_once",
    "inductor_backend",
    "inductor_config",
    "inductor_option_names",
    "is_mutable",
    "is_tracing",
    "multiplies_in_hardware",
    "nn_functions",
    "refusing_second_derivatives",
    "reuse_handed_over",
    "size_hint",
    "source_name",
    "statically_equal",
    "throw_on_data_ptr",
    "tree_map_only",
    "unset_fake_temporarily",
]


_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

# Whether the gradient of torch.clamp is zero at the bounds; before torch 2.14, it was one.
CLAMP_IS_FLAT_AT_BOUNDS = _VERSION >= (2, 14)

# Whether gradients that compiled code gives under create_graph=True may be constants, so that a penalty on them has no
# effect. Before torch 2.13 they are where the compiled backward is given no tensor that requires a gradient, and one
# that only multiplies what the forward has computed is not given any.
LOSES_SECOND_DERIVATIVES = _VERSION < (2, 13)

nn_functions = torch._C._nn  # where some of torch.nn.functional's functions are defined, and found in graphs

# As a class attribute __torch_function__: torch's functions take the instances for plain tensors.
below_torch_function: Any = torch._C._disabled_torch_function_impl


def is_mutable(op: OpOverload) -> bool:
    """Whether an operator writes to one of its arguments."""
    return op._schema.is_mutable


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Asserts that one bool is true on its device: nothing waits for it; the program ends later where it is false."""
    torch._assert_async(condition, message)


def cache_dir() -> str:
    """Inductor's cache directory of this user (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

    return inductor_cache_dir()


def multiplies_in_hardware() -> bool:
    """Whether the CPU has units for matrix products in bfloat16 (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor takes (CXX); None where there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except RuntimeError:
        return None


def inductor_backend(mode: str | None, options: dict[str, Any] | None) -> Callable:
    """What `torch.compile(backend="inductor", mode=mode, options=options)` would call with a graph and its inputs.

    It checks the names and types of Inductor's options and raises RuntimeError on a wrong one.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)


def compiled_alone(gm: torch.fx.GraphModule) -> Callable:
    """A graph of our own, compiled by Inductor for tensors of any size, and without what `enable()` adds to it."""

    def inductor(gm: torch.fx.GraphModule, inputs: Any) -> Callable:
        from torch._inductor.compile_fx import compile_fx  # slow to import, and a program has done so if it compiles

        with inductor_config.patch(pre_grad_custom_pass=None):
            compiled: Any = compile_fx(gm, inputs)
        return compiled

    return torch.compile(gm, backend=inductor, dynamic=True, fullgraph=True)


def hands_over() -> bool:
    """Whether a backward may write to the tensors that its forward saved for it alone."""
    from torch._functorch import config

    return config.donated_buffer


@functools.cache
def reuse_handed_over(op: OpOverload, in_place: OpOverload) -> None:
    """Has Inductor compile `op(tensor, number, may_reuse)` to `in_place(tensor, number)` if a forward saved the tensor
    for this alone. Otherwise it multiplies them.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V

    def handed_over(tensor: Any) -> bool:
        if inductor_config.triton.cudagraphs:  # they may not be taken where a backward writes to what it is given
            return False
        node: Any = V.graph.current_node.args[0]
        buffer: Any = getattr(getattr(tensor, "data", None), "data", None)
        donated = isinstance(buffer, ir.DonatedBuffer)
        return donated and buffer.get_layout().is_contiguous() and len(node.users) == 1

    @lowering.register_lowering(op, type_promotion_kind=None)
    def lower(tensor: Any, number: Any, may_reuse: bool) -> Any:
        if may_reuse and handed_over(tensor):
            lowering.fallback_handler(in_place, add_to_fallback_set=False)(tensor, number)
            return tensor
        product = lowering.mul(lowering.to_dtype(tensor, number.get_dtype()), number)
        return lowering.to_dtype(product, tensor.get_dtype())


def around_inductor(hook: Callable[[Callable, Any, Any], Callable]) -> Callable[[], None]:
    """Has `torch.compile(backend="inductor")` call `hook(inductor, gm, inputs)` from now on; gives what undoes that."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    original = wrapper.__call__

    @functools.wraps(original)
    def call(self: Any, gm: Any, inputs: Any, **how: Any) -> Callable:
        return hook(functools.partial(original, self, **how), gm, inputs)

    def undo() -> None:
        wrapper.__call__ = original

    wrapper.__call__ = call
    return undo


def refusing_second_derivatives(compiled: Callable) -> Callable:
    """What Inductor has compiled, with AOTAutograd's error in every version where its gradients are differentiated."""
    if not LOSES_SECOND_DERIVATIVES:
        return compiled

    @functools.wraps(compiled, updated=())
    def call(*args: Any) -> Any:
        results = compiled(*args)
        tensors = [result for result in results if isinstance(result, torch.Tensor)]
        for node in {tensor.grad_fn for tensor in tensors if not any(tensor is arg for arg in args)}:
            if node is not None:
                node.register_prehook(_requiring_grad)
        return results

    return call


def _requiring_grad(grads: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...] | None:
    """Gradients that a compiled backward is given, so that under create_graph=True one of them requires a gradient."""
    if not torch.is_grad_enabled() or any(grad is not None and grad.requires_grad for grad in grads):
        return None
    return tuple(None if grad is None else grad.detach().requires_grad_() for grad in grads)


def inductor_option_names() -> frozenset[str]:
    """The names that Inductor accepts in `options=`."""
    return frozenset(inductor_config.get_config_copy())


def artifact_logger(name: str, description: str) -> logging.Logger:
    """A logger that TORCH_LOGS=name turns on; it must be asked for once, at import."""
    register_artifact(name, description, visible=True)
    return getArtifactLogger(name, name)


def is_tracing() -> bool:
    """Whether a program is being compiled, by Dynamo or by what it hands graphs to."""
    return TracingContext.try_get() is not None


@torch.compiler.assume_constant_result
def differentiated_by_transform() -> bool:
    """Whether the code that runs is inside torch.func.grad, jvp or a transform that is made of them."""
    functorch = torch._C._functorch
    kinds = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(interpreter.key() in kinds for interpreter in functorch.get_interpreter_stack() or ())


def throw_on_data_ptr(tensor: torch.Tensor) -> None:
    """Lets compiled code that is given a tensor without memory raise an error rather than crash."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def statically_equal(a: Any, b: Any) -> bool:
    """Whether two sizes, int or SymInt, are equal whatever the inputs; installs no guard."""
    return statically_known_true(a == b)


def source_name(node: Node) -> str | None:
    """How Dynamo finds an argument of a graph, for example "L['self']._modules['head']._parameters['weight']"."""
    source = getattr(node, "_dynamo_source", None)
    found = getattr(source, "name", None)
    return found() if callable(found) else found


def graph_break(module: Any) -> str | None:
    """Where and why Dynamo ended a graph before the end of the program: "file:line: reason"; None where it did not."""
    ended = getattr(module, "compile_subgraph_reason", None)
    if ended is None or not ended.graph_break:
        return None
    frames = [frame for frame in ended.user_stack if frame is not None]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""
    return place + ended.reason.splitlines()[0]


def float_hint(number: torch.SymFloat) -> float | None:
    """The value of a dynamic float in the run that is being compiled; None where it is not known. No guard."""
    return float(number.node.hint) if number.node.has_hint() else None


def fix(number: torch.SymFloat) -> None:
    """Guards the code that is being compiled: it is used again only where the number has the value of this run."""
    float(number)


def constant_size(size: Any) -> Any:
    """A size as an int where it is known to be the same whatever the inputs."""
    value = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return size if value is None else value


def size_hint(size: Any) -> int | None:
    """The value of a size in the run that is being compiled; None where it is not known. Installs no guard."""
    if isinstance(size, torch.SymInt):
        return size.node.hint if size.node.has_hint() else None
    return int(size)


class _IgnoredFunctions(set):
    """Functions that Dynamo leaves out while it traces: those of the set, and transformers' `warning_once`.

    That one only where `applies` says so of the backend that the traced program is compiled with.
    """

    def __init__(self, functions: set, applies: Callable[[Any], bool]) -> None:
        super().__init__(functions)
        self._applies = applies

    def __contains__(self, function: Any) -> bool:
        return super().__contains__(function) or (
            getattr(function, "__module__", None) == "transformers.utils.logging"
            and getattr(function, "__name__", None) == "warning_once"
            and self._applies(_backend_being_traced_for())
        )

    def __reduce__(self) -> tuple:
        """Copies, which torch makes to describe its configuration, are plain sets."""
        return set, (list(self),)


def _backend_being_traced_for() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is being traced
        return None
    while hasattr(backend, "_torchdynamo_orig_backend"):  # Dynamo's debugging wrapper
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_fn", backend)  # torch.compile's wrapper, which holds mode and options


def ignore_warning_once(applies: Callable[[Any], bool]) -> None:
    """Leaves transformers' `logger.warning_once` out of programs whose backend `applies` is true of.

    Dynamo would break the graph at it, in ten architectures between the head and the loss. The messages, about
    arguments of the model, appear again when the model runs uncompiled.
    """
    config = torch._dynamo.config
    config.ignore_logging_functions = _IgnoredFunctions(config.ignore_logging_functions, applies)
