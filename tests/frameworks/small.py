"""Small models of transformers with random weights, and what compiling one with the pass gives."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from helpers import EVERYTHING, Snapshot
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from cce_inductor import Report, Rewrite
from cce_inductor.graph.driver import rewrite_module
from cce_inductor.graph.returned import LazyResults

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


@dataclass
class Seen:
    """What the pass did to the graphs of a compiled function."""

    reports: list[Report] = field(default_factory=list)
    graphs: list[Snapshot] = field(default_factory=list)

    @property
    def rewritten(self) -> list[Rewrite]:
        return [rewrite for report in self.reports for rewrite in report.rewritten]

    def assert_no_logits(self, rows: int = BATCH * (LENGTH - 1)) -> None:
        """No graph computes a tensor with as many elements as so many rows of logits."""
        assert self.graphs
        assert max(graph.largest_computed for graph in self.graphs) < rows * VOCAB


def compiled(function: Any, **how: Any) -> tuple[Any, Seen]:
    """The function or module, compiled by the pass but not by Inductor, which takes long. how: of torch.compile."""
    seen = Seen()

    def backend(module: Any, inputs: Any) -> Any:
        lazy = LazyResults(module.graph)
        seen.reports.append(rewrite_module(module, EVERYTHING, lazy))
        seen.graphs.append(Snapshot.of(module))
        return lazy.around(aot_eager(module, inputs))

    return torch.compile(function, backend=backend, **how), seen


def assert_same_gradients(mine: nn.Module, theirs: nn.Module, rounding: float = 1e-5) -> None:
    """Up to rounding of the largest of the model: some are zero but for rounding."""
    largest = max(p.grad.abs().max() for p in theirs.parameters() if p.grad is not None)
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            assert (one.grad - other.grad).abs().max() <= rounding * largest, name
