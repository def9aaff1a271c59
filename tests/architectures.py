"""Compiles our kernels for GPUs that need not be here, and prints what they take there.

    python tests/architectures.py                                     # all of them, a minute or two each
    python tests/architectures.py --gpus 9.0 12.0 --problems exact tanh --kernels forward_kernel

It needs no GPU: the operators run on fake tensors, and each launch compiles its kernel without running it. Fails where
a kernel can't be compiled, or takes more shared memory than a block of threads can have. A stack says that registers
did not suffice.
"""

import argparse
import contextlib
import copy
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cce_inductor import ops
from cce_inductor.ops import cuda, library, scaling

KIB = 1024
GPUS = {  # compute capability: (KiB of shared memory that a block of threads can have, multiprocessors)
    "8.0": (163, 108),
    "8.6": (99, 84),
    "9.0": (227, 132),
    "10.0": (227, 148),
    "12.0": (99, 170),
}
L2_CACHE_BYTES = 50 << 20
PROBLEMS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "exact": {"approximate_mass": 0.0},
    "tanh": {"logit_map": "30.0*tanh(z/30.0)"},
    "everything": {"bias": True, "want_total": True, "want_max": True, "want_entropy": True},
    "several": {"picks": 4},
    "pointers": {"width": 4100},  # rows that no tensor memory accelerator can load
    "autocast": {"dtype": torch.float32, "compute_dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
}


class Driver:
    """As much of a driver of Triton's as compiling takes."""

    def __init__(self, gpu: str) -> None:
        self._capability = int(gpu.replace(".", ""))

    def get_current_device(self) -> int:
        return self._capability  # what is compiled is remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


def compilable(argument: Any) -> Any:
    """An argument of a kernel, without the tensor that it is or describes."""
    if isinstance(argument, FakeTensor):
        return MockTensor(argument.dtype)
    if isinstance(argument, TensorDescriptor):
        argument = copy.copy(argument)
        argument.base = compilable(argument.base)
    return argument


class Compiling:
    """Takes the place of launches; prints each kernel once a GPU."""

    def __init__(self, kernels: list[str] | None) -> None:
        self._run, self._kernels = JITFunction.run, kernels
        self._seen: set[str] = set()
        self.gpu, self.failures = "", 0

    def __call__(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **arguments: Any) -> None:
        name = kernel.__name__
        if self._kernels is not None and name not in self._kernels:
            return
        arguments = {key: compilable(value) for key, value in arguments.items()}
        try:
            compiled = self._run(kernel, *map(compilable, args), grid=grid, warmup=True, **arguments)
        except Exception as error:
            self.failures += 1
            print(f"{self.gpu:5} {name:24} FAILED: {type(error).__name__}: {error}")
            return
        if compiled.hash not in self._seen:
            self._seen.add(compiled.hash)
            too_much = compiled.metadata.shared > GPUS[self.gpu][0] * KIB
            self.failures += too_much
            shared = f"{compiled.metadata.shared / KIB:6.1f} KiB shared{' FAILED: too much' if too_much else ''}"
            print(f"{self.gpu:5} {name:24} {shared}, {usage(compiled.asm['cubin'])}", flush=True)


def usage(cubin: bytes) -> str:
    """Of registers and stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return f"{registers:>3} registers, {stack:>3} B stack"


class OnFakeGpu(TorchFunctionMode):
    """What PyTorch without CUDA refuses to do with fake tensors of a GPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__setitem__ or "out" in kwargs:
            return kwargs.get("out")
        if func is Tensor.__invert__:
            return torch.logical_not(args[0])
        if func is Tensor.__getitem__:
            return part_of(*args)
        return func(*args, **kwargs)


def part_of(tensor: Tensor, index: Any) -> Tensor:
    """tensor[index], by the shape and strides that it has elsewhere."""
    indices = index if isinstance(index, tuple) else (index,)
    with unset_fake_temporarily():
        others = [torch.empty(i.shape, dtype=i.dtype, device="meta") if isinstance(i, Tensor) else i for i in indices]
        part = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")[tuple(others)]
    if any(isinstance(i, Tensor) for i in indices):
        return tensor.new_empty(part.shape)
    return tensor.as_strided(part.shape, part.stride(), tensor.storage_offset() + part.storage_offset())


def solve(
    dtype: torch.dtype = torch.bfloat16,
    compute_dtype: torch.dtype | None = None,
    logit_map: str = "z",
    approximate_mass: float = 2**-5,
    width: int = 4096,
    bias: bool = False,
    picks: int = 1,
    **wanted: bool,
) -> None:
    """A loss with its gradients, where it can be that, then the reductions of the logits and their backward."""
    rows, vocab = 8192, 128256
    compute_dtype = compute_dtype or dtype
    several = () if picks == 1 else (picks,)
    hidden, weight, bias_vector = (
        torch.empty(shape, dtype=dtype, device="cuda:0") for shape in ((rows, width), (vocab, width), (vocab,))
    )
    target = torch.empty((rows, *several), dtype=torch.int64, device="cuda:0")
    by_row, by_target = (torch.empty(shape, device="cuda:0") for shape in ((rows,), target.shape))
    tensors = hidden, weight, bias_vector if bias else None, target
    needs_grad = [True, True, bias]
    options: dict[str, Any] = {
        "logit_map": logit_map,
        "ignore_index": -100,
        "compute_dtype": compute_dtype,
        "workspace_mib": None,
        "approximate_mass": approximate_mass if compute_dtype.itemsize == 2 else 0.0,
    }
    if not wanted and not several:
        loss, gradient, *_ = library._scaled_loss(*tensors, by_row, needs_grad=needs_grad, **options)
        scaling._scale_on_gpu(gradient, loss)
    options |= {"want_total": False} | wanted
    results = library._forward(cuda, *tensors, None, **options)
    grads = by_row, by_target, by_row, *(by_row if wanted.get(name) else None for name in ("want_max", "want_entropy"))
    saved = results.argmax, results.entropy, results.lse, results.tile_lse, results.tile_tops
    library._backward(cuda, *grads, *saved, *tensors, None, needs_grad=needs_grad, **options)


def pretend(gpu: str) -> None:
    """The operators ask for such a GPU's properties, and Triton compiles for it."""
    driver.set_active(Driver(gpu))
    major, minor = map(int, gpu.split("."))
    answers = {
        "device_properties": lambda device: ((major, minor), GPUS[gpu][1]),
        "l2_cache_bytes": lambda device: L2_CACHE_BYTES,
    }
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{info.name}")
        for name in answers.keys() & vars(module).keys():
            setattr(module, name, answers[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS), help="compute capabilities")
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--kernels", nargs="+", help="only these")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("Triton compiles nothing where TRITON_INTERPRET=1 is set")
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    FakeTensor.data_ptr = lambda self: 0
    compiling = Compiling(args.kernels)
    JITFunction.run = lambda *args, **kwargs: compiling(*args, **kwargs)
    for compiling.gpu in args.gpus:
        pretend(compiling.gpu)
        for problem in args.problems:
            print(f"{compiling.gpu:5} {problem}")
            with FakeTensorMode(), OnFakeGpu():
                solve(**PROBLEMS[problem])
    return min(compiling.failures, 1)


if __name__ == "__main__":
    sys.exit(main())
