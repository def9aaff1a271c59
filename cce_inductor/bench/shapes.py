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

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """A name of SHAPES, or "N,V,D"; ValueError for anything else."""
        if text in SHAPES:
            return SHAPES[text]
        try:
            rows, vocab, width = (int(number) for number in text.split(","))
        except ValueError:
            raise ValueError(f"a shape is N,V,D or one of {', '.join(SHAPES)}, not {text!r}") from None
        return cls(rows, vocab, width)


SHAPES = {
    "gemma2-2b": Shape(8192, 256000, 2304),
    "llama3-8b": Shape(8192, 128256, 4096),
    "qwen2.5-7b": Shape(8192, 152064, 3584),
    "gpt2": Shape(16384, 50257, 768),
    "phi3.5": Shape(8192, 32064, 3072),
    "tiny": Shape(256, 4099, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
