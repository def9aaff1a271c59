"""The sizes that are compared: heads of public models."""

from dataclasses import dataclass

import torch


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
    "gpt2": Shape(16384, 50257, 768),
    "phi3.5": Shape(8192, 32064, 3072),
    "tiny": Shape(1024, 4160, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parse_shapes(text: str) -> list[Shape]:
    """Names of SHAPES separated by commas, or the three numbers "N,V,D" of one; ValueError for anything else."""
    parts = text.split(",")
    if len(parts) == 3 and all(part.isdigit() for part in parts):
        rows, vocab, width = map(int, parts)
        return [Shape(rows, vocab, width)]
    if unknown := [part for part in parts if part not in SHAPES]:
        raise ValueError(f"a shape is N,V,D or one of {', '.join(SHAPES)}, not {', '.join(unknown)}")
    return [SHAPES[part] for part in parts]
