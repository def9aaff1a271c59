"""Small models of transformers with random weights, and what compiling one with the pass gives."""

from typing import Any

import torch
import transformers
from seen import Seen
from torch import Tensor, nn

VOCAB, BATCH, LENGTH = 211, 2, 48
DECODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "vocab_size": VOCAB,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make(architecture: str, config: str, arguments: dict[str, Any], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of transformers by the names of its classes."""
    torch.manual_seed(0)
    return getattr(transformers, architecture)(getattr(transformers, config)(**arguments)).to(dtype)


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    return make("LlamaForCausalLM", "LlamaConfig", DECODER | changes, dtype)


def batch(length: int = LENGTH) -> dict[str, Tensor]:
    """Tokens and labels, the first three of which are ignored."""
    ids = torch.randint(3, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 3, -100)}


def assert_no_logits(seen: Seen, rows: int = BATCH * (LENGTH - 1)) -> None:
    """No graph computes a tensor with as many elements as so many rows of logits."""
    assert seen.graphs
    assert max(graph.largest_computed for graph in seen.graphs) < rows * VOCAB


def compiled(function: Any, **how: Any) -> tuple[Any, Seen]:
    """The function or module, compiled by the pass alone. how: of torch.compile."""
    seen = Seen()
    return torch.compile(function, backend=seen, **how), seen


def assert_same_gradients(mine: nn.Module, theirs: nn.Module, rounding: float = 1e-5) -> None:
    """Up to rounding of the largest of the model: some are zero but for rounding."""
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= rounding * largest, name
