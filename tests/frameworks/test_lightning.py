"""Lightning: the model is compiled, or a function of the module, or its training step; loss and accuracy are logged."""

import pytest
import torch
import torch.nn.functional as F
from helpers import D, S, V
from seen import Seen
from torch import nn

pytest.importorskip("lightning", reason="needs lightning: pip install cce_inductor[models]")

import lightning

seen = Seen()


def compiled(function):
    return torch.compile(function, backend=seen)


class Model(nn.Module):
    """forward(ids) gives the loss of the next tokens, and the logits."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V, bias=False)

    def forward(self, ids):
        logits = self.head(self.layer(self.embed(ids)).tanh())[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), logits


class Module(lightning.LightningModule):
    # Dynamo does not get through it; where the training step is compiled, the graph ends there
    log = torch.compiler.disable(lightning.LightningModule.log)

    def __init__(self):
        super().__init__()
        self.model = Model()
        self.scores = []

    def loss_and_accuracy(self, ids):
        loss, logits = self.model(ids)
        return loss, (logits.detach().argmax(-1) == ids[:, 1:]).float().mean()

    def training_step(self, batch, index):
        loss, accuracy = self.loss_and_accuracy(batch)
        self.log("loss", loss)
        self.log("accuracy", accuracy)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)

    def on_train_batch_end(self, *_):
        self.scores.append([float(self.trainer.logged_metrics[name]) for name in ("loss", "accuracy")])


def eager(module):
    pass


def model(module):
    module.model = compiled(module.model)


def function(module):
    module.loss_and_accuracy = compiled(module.loss_and_accuracy)


def step(module):
    module.training_step = compiled(module.training_step)


def scores(compile_in, folder):
    """(loss, accuracy) of each step, as logged."""
    torch._dynamo.reset()
    seen.reports.clear()
    torch.manual_seed(0)
    module = Module()
    compile_in(module)
    data = torch.randint(V, (8, S), generator=torch.Generator().manual_seed(1))
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    return torch.tensor(module.scores)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize(("compile_in", "returned"), [(model, "lazy"), (function, ""), (step, "")])
def test_training(compile_in, returned, tmp_path):
    theirs = scores(eager, tmp_path)
    assert theirs.shape == (6, 2)
    assert not seen.reports
    ours = scores(compile_in, tmp_path)
    torch.testing.assert_close(ours, theirs)
    [rewrite] = seen.rewritten
    assert rewrite.returned == returned
    assert rewrite.losses == (("cross_entropy",) if compile_in is model else ("cross_entropy", "argmax"))
    assert not any(report.refused for report in seen.reports)
