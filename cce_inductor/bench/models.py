"""Two language models in plain PyTorch, as `--train` trains them: GPT-2 small, and a Llama of half a billion."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """kv_heads: None for GPT's block (LayerNorm, GELU, learned positions), else Llama's (RMSNorm, SwiGLU, rotary)."""

    vocab: int
    layers: int
    width: int
    heads: int
    inner: int
    kv_heads: int | None = None
    seq_len: int = 1024


MODELS = {
    "gpt2-small": Sizes(vocab=50257, layers=12, width=768, heads=12, inner=3072),
    "llama-0.5b": Sizes(vocab=151936, layers=24, width=896, heads=14, inner=4864, kv_heads=2),
    "tiny": Sizes(vocab=4160, layers=1, width=64, heads=2, inner=128, kv_heads=1, seq_len=256),
}


class GPTBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.width
        self.heads = sizes.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, sizes.inner), nn.Linear(sizes.inner, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D]
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        assert sizes.kv_heads is not None
        width, head = sizes.width, sizes.width // sizes.heads
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, sizes.kv_heads * head) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = (nn.Linear(width, sizes.inner, bias=False) for _ in range(2))
        self.down = nn.Linear(sizes.inner, width, bias=False)
        frequencies = 1e6 ** (-torch.arange(0, head, 2) / head)
        angles = torch.arange(sizes.seq_len)[:, None] * frequencies  # [S, head / 2]
        self.register_buffer("turn", torch.stack([angles.cos(), angles.sin()]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D]
        h = self.norm1(x)
        q = self._rotate(self.q(h).unflatten(2, (self.heads, -1)).transpose(1, 2))
        k = self._rotate(self.k(h).unflatten(2, (self.kv_heads, -1)).transpose(1, 2))
        v = self.v(h).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _rotate(self, x: Tensor) -> Tensor:  # [B, heads, S, head]
        cosine, sine = self.get_buffer("turn").to(x.dtype).unbind(0)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


class LanguageModel(nn.Module):
    """forward(ids, targets), both [B, S], returns the mean loss; head and embedding share one weight."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        gpt = sizes.kv_heads is None
        self.embedding = nn.Embedding(sizes.vocab, sizes.width)
        self.positions = nn.Parameter(torch.empty(sizes.seq_len, sizes.width)) if gpt else None
        block = GPTBlock if gpt else LlamaBlock
        self.blocks = nn.ModuleList(block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width) if gpt else nn.RMSNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                shrink = math.sqrt(2 * sizes.layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 / shrink)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.positions is not None:
            x = x + self.positions
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
