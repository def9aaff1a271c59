"""Why did it not fire? Where head and loss are compiled apart, what the report says, and what to compile instead.

    python examples/compile_loss_with_model.py

Some training programs compile the blocks of a model and the loss function each on its own (torchtitan), or compile a
model that returns its logits and leave the loss outside (litgpt). The logits then pass from one compiled program to
another, or out of them all, and have to be stored. No compiler can change that; a function around both can.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cce_inductor


class Model(nn.Module):
    """Returns logits [batch, length, vocab]."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.block = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + self.block(hidden))


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))


def show(title: str, report: cce_inductor.Report) -> None:
    print(f"\n--- {title}")
    print(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Model(arguments.vocab, arguments.width)
    ids, labels = torch.randint(arguments.vocab, (2, 4, 256)).unbind()

    # explain() takes what torch.compile() takes, and says what backend="cce" does to it.
    show("the model alone", cce_inductor.explain(model)(ids))
    show("the loss alone", cce_inductor.explain(loss_of)(model(ids), labels))

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return loss_of(model(ids), labels)

    together = cce_inductor.explain(step)(ids, labels)
    show("both, compiled as one function", together)
    assert len(together.rewritten) == 1

    # so this is what to compile; on_refusal="raise" makes it an error if that ever stops working
    compiled = torch.compile(step, backend="cce", options={"on_refusal": "raise"})
    loss = compiled(ids, labels)
    loss.backward()
    print(f"\nloss {loss.item():.4f}, eager {step(ids, labels).item():.4f}")


if __name__ == "__main__":
    main()
