"""TRL: its functions of logits are rewritten where they are compiled with the head; so are its trainers that use them.

The trainers of TRL 1 have a head of their own, which computes log-probabilities in tiles: there are no logits, and
nothing to rewrite. `plain_head` puts the logits back.
"""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import D, check, hidden, labels, weight
from torch._dynamo.backends.debugging import aot_eager

import cce_inductor

pytest.importorskip("transformers", reason="needs transformers: pip install cce_inductor[models]")
pytest.importorskip("trl", reason="needs trl: pip install cce_inductor[models]")

import tokenizers
import transformers
import trl
from datasets import Dataset
from small import VOCAB, llama
from trl.trainer import utils
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

ROWS, COLUMNS = 4, 40


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------- functions that take logits


def of_tokens(h, w, ids):
    return selective_log_softmax(F.linear(h, w)[:, :-1], ids[:, 1:])


def with_temperature(h, w, ids):
    return selective_log_softmax(F.linear(h, w)[:, :-1] / 0.7, ids[:, 1:])


def entropy(h, w, ids):
    return entropy_from_logits(F.linear(h, w)[:, :-1])


def both(h, w, ids):
    logits = F.linear(h, w)[:, :-1] / 0.7
    return selective_log_softmax(logits, ids[:, 1:]), entropy_from_logits(logits)


def entropy_to_look_at(h, w, ids):
    logits = F.linear(h, w)[:, :-1]
    log_probs = selective_log_softmax(logits, ids[:, 1:])
    with torch.no_grad():
        return log_probs, entropy_from_logits(logits)


# Operator calls in float32, and in bfloat16, where TRL picks from the log-probabilities of one sequence after another.
CALLS = {of_tokens: (1, 1), with_temperature: (1, 1), entropy: (1, 1), both: (1, 2), entropy_to_look_at: (1, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_functions_of_logits(function, dtype):
    given = hidden(ROWS, COLUMNS, D, dtype=dtype), weight(dtype=dtype), labels(ROWS, COLUMNS)
    check(function, *given, calls=CALLS[function][dtype == torch.bfloat16])


# ---------------------------------------------------------------------------------------------------------- trainers

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]


def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def dataset(**lengths):
    """Four examples with texts of so many words."""
    generator = torch.Generator().manual_seed(5)

    def text(length):
        return " ".join(WORDS[i] for i in torch.randint(3, VOCAB, (length,), generator=generator))

    return Dataset.from_list([{name: text(length) for name, length in lengths.items()} for _ in range(4)])


def sft(model, how):
    return trl.SFTTrainer(model, trl.SFTConfig(**how), train_dataset=dataset(text=12), processing_class=tokenizer())


def dpo(model, how):
    data = dataset(prompt=4, chosen=6, rejected=6)
    arguments = trl.DPOConfig(**how)
    return trl.DPOTrainer(model, copy.deepcopy(model), arguments, train_dataset=data, processing_class=tokenizer())


def grpo(model, how):
    def reward(completions, **_):
        return [float(len(text)) for text in completions]

    arguments = trl.GRPOConfig(**how, num_generations=2, max_completion_length=6)
    data = dataset(prompt=4)
    return trl.GRPOTrainer(model, reward, arguments, train_dataset=data, processing_class=tokenizer())


def plain_head(model):
    """In place of TRL's head: the logits of the model, and TRL's own functions of them."""

    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        out = type(self).forward(self, *args, **kwargs)
        if not fused_lm_head:
            return out
        logits, targets = out.logits[:, :-1], labels[:, 1:]
        counts = targets != -100
        log_probs = selective_log_softmax(logits, targets.clamp(min=0)).masked_fill(~counts, 0)
        with torch.no_grad():
            entropies, means, best = entropy_from_logits(logits), logits.mean(-1), logits.argmax(-1)
        return utils.FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropies.masked_fill(~counts, 0),
            mean_logits=means.masked_fill(~counts, 0),
            is_top1=(best == targets) & counts,
            label_mask=counts,
        )

    model.forward = types.MethodType(forward, model)


def train(make, folder, head=None, **how):
    """The log of the first two steps."""
    torch._dynamo.reset()
    how |= {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 1,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    trainer = make(llama(num_hidden_layers=1), how)
    if head is not None:
        head(trainer.model)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def _quick_inductor(monkeypatch):
    """What enable() calls after the pass, without its C++."""
    monkeypatch.setattr(
        torch._TorchCompileInductorWrapper, "__call__", lambda self, module, inputs, **_: aot_eager(module, inputs)
    )


FIGURES = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "logps/chosen", "logits/chosen"}


@pytest.mark.usefixtures("_quick_inductor")
@pytest.mark.parametrize("head", [None, plain_head], ids=["TRL's head", "plain head"])
@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_trainers(make, head, tmp_path):
    with cce_inductor.enable(min_vocab=0, min_logits_bytes=0), cce_inductor.capture_reports() as reports:
        ours = train(make, tmp_path, head, torch_compile=True)
    theirs = train(make, tmp_path)
    assert len(ours) == len(theirs) == 2
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() & FIGURES:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert reports
    assert not any(report.refused for report in reports)
    rewritten = [rewrite for report in reports for rewrite in report.rewritten]
    assert bool(rewritten) == (head is not None)
    assert all(rewrite.operator_calls == 1 for rewrite in rewritten)


@pytest.mark.usefixtures("_quick_inductor")
def test_supervised_tuning_by_the_loss_of_the_model(tmp_path):
    class Trainer(trl.SFTTrainer):
        compute_loss = transformers.Trainer.compute_loss

    def make(model, how):
        return Trainer(model, trl.SFTConfig(**how), train_dataset=dataset(text=12), processing_class=tokenizer())

    with cce_inductor.enable(min_vocab=0, min_logits_bytes=0), cce_inductor.capture_reports() as reports:
        ours = train(make, tmp_path, torch_compile=True)
    theirs = train(sft, tmp_path)
    assert [e["loss"] for e in ours] == pytest.approx([e["loss"] for e in theirs], rel=1e-4)
    assert [rewrite.losses for report in reports for rewrite in report.rewritten][:1] == [("cross_entropy",)]
