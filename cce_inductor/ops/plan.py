"""Which implementation a problem takes, in words: for people, nothing decides by it."""

import torch

from ..compat import FakeTensorMode
from . import cpu_sparse, cuda, stored
from .launch import has_tma
from .library import pays_in_forward
from .problem import Problem


def plan(
    device: torch.device, dtype: torch.dtype, rows: int, vocab_size: int, width: int, approximate_mass: float
) -> str:
    """What computes a mean cross-entropy of hidden [rows, width] and weight [vocab_size, width], both with gradients.

    Nothing of that size is allocated.
    """
    with FakeTensorMode():
        problem = Problem.plain(
            torch.empty(rows, width, dtype=dtype, device=device),
            torch.empty(vocab_size, width, dtype=dtype, device=device),
            torch.empty(rows, dtype=torch.int64, device=device),
            workspace_mib=None,
            approximate_mass=approximate_mass,
        )
    pays = pays_in_forward(device, dtype, approximate_mass, needs_grad_weight=True, logit_map=problem.logit_map)
    once = ", in the forward where the loss is alone" if pays else ""
    if stored.supported(problem):
        return f"products by cuBLAS, Triton passes over blocks of logits, exact gradients{once}"
    if device.type != "cuda" or not cuda.supported(problem):
        once += ", sparse there if the softmax is peaked" if once and cpu_sparse.may_skip(problem) else ""
        return f"blocks through ATen on the {'GPU' if device.type == 'cuda' else 'CPU'}, exact gradients{once}"
    tma = has_tma(device) and width * dtype.itemsize % 16 == 0
    loads, gradients = "TMA" if tma else "pointers", "sparse backward" if cuda.may_skip(problem) else "exact backward"
    return f"Triton kernels, operands loaded by {loads}, {gradients}{once}"
