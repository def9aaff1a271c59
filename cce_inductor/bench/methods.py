"""What is compared: the same loss computed in different ways, on problems of the sizes of public models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cce_inductor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""loss(hidden [N, D], weight [V, D], target [N]), the mean cross-entropy."""


@dataclass(frozen=True)
class Shape:
    rows: int
    vocab: int
    width: int

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocab} D={self.width}"


SHAPES = {
    "gemma2-2b": Shape(8192, 256000, 2304),
    "llama3-8b": Shape(8192, 128256, 4096),
    "qwen2.5-7b": Shape(8192, 152064, 3584),
    "gpt2": Shape(8192, 50257, 768),
    "phi3.5": Shape(8192, 32064, 3072),
    "tiny": Shape(256, 4099, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As most public models write it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _cce_compile() -> Loss:
    options: dict[str, Any] = {"min_vocab": 0, "min_logits_bytes": 0, "on_refusal": "raise"}
    return torch.compile(eager, backend=cce_inductor.cce_backend, options=options)


METHODS: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "compile": lambda: torch.compile(eager),
    "cce": lambda: cce_inductor.linear_cross_entropy,
    "cce-compile": _cce_compile,
}


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, target) of a made-up trained head: every state leans to its target, the loss is about 3."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    weight = normal(shape.vocab, shape.width) / shape.width**0.5  # rows of length one: logits spread by the 2 below
    target = torch.randint(0, shape.vocab, (shape.rows,), generator=generator, device=device)
    hidden = 2 * normal(shape.rows, shape.width) + 12 * weight[target]
    return hidden.requires_grad_(), weight.requires_grad_(), target
