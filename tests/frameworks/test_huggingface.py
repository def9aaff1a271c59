"""Untouched models of transformers, tiny and random: the loss is rewritten, and the logits of the output are lazy."""

import copy
import io

import pytest
import torch

import cce_inductor
from cce_inductor.lazy_logits import LazyLogits

pytest.importorskip("transformers", reason="needs transformers: pip install cce_inductor[models]")

import transformers
from small import DECODER, VOCAB, assert_no_logits, assert_same_gradients, batch, compiled, llama, make
from transformers.trainer_pt_utils import LabelSmoother

BERT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCAB, "dropout": 0.0,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Qwen 3, tied": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"tie_word_embeddings": True}),
    "Gemma 2, soft cap": ("Gemma2ForCausalLM", "Gemma2Config", DECODER),
    "Cohere, scaled": ("CohereForCausalLM", "CohereConfig", DECODER),
    "BERT": ("BertForMaskedLM", "BertConfig", BERT),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "BART, bias added later": ("BartForConditionalGeneration", "BartConfig", BART),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_loss_logits_and_gradients_are_eagers(model):
    eager = make(*model).train()
    mine = copy.deepcopy(eager)
    function, seen = compiled(mine)
    out, reference = function(**batch()), eager(**batch())
    [rewrite] = seen.rewritten
    assert rewrite.returned == "lazy"
    assert type(out.logits) is LazyLogits
    assert not out.logits.is_computed
    assert (out.logits.shape, out.logits.dtype) == (reference.logits.shape, reference.logits.dtype)
    torch.testing.assert_close(out.loss, reference.loss)
    for result in (out, reference):
        (result.loss + result.logits.float().square().mean()).backward()
    torch.testing.assert_close(out.logits.detach() + 0, reference.logits.detach())
    assert_same_gradients(mine, eager)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_the_loss_alone(as_tuple):
    eager = llama().train()
    mine = copy.deepcopy(eager)
    out = compiled(mine)[0](**batch(), return_dict=not as_tuple)
    loss, logits = out[:2] if as_tuple else (out.loss, out.logits)
    loss.backward()
    eager(**batch()).loss.backward()
    assert not logits.is_computed
    assert_same_gradients(mine, eager)


def test_evaluation_and_generation():
    eager = llama().eval()
    mine = copy.deepcopy(eager)
    mine.forward, _ = compiled(mine.forward)  # generate() calls that
    with torch.no_grad():
        out, reference = mine(**batch()), eager(**batch())
        assert type(out.logits) is LazyLogits
        assert not out.logits.requires_grad
        torch.testing.assert_close(out.logits.argmax(-1), reference.logits.argmax(-1))
        ids = batch(8)["input_ids"]
        how = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(mine.generate(ids, **how), eager.generate(ids, **how))


def test_an_output_that_is_saved():
    """It holds plain logits in the file: who loads it need not have this package."""
    model = llama().train()
    out, file = compiled(model)[0](**batch()), io.BytesIO()
    torch.save(out, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(out)
    assert type(loaded.logits) is torch.Tensor
    torch.testing.assert_close(loaded.logits, model(**batch()).logits)


def test_label_smoothing():
    """The Trainer smooths outside of the model: the logits are needed, unless both are compiled as one function."""
    eager = llama(vocab_size=1031, num_hidden_layers=1)  # an output of fewer classes might be any layer's
    mine = copy.deepcopy(eager)
    smoother, given = LabelSmoother(0.1), batch()

    def loss_of(model, input_ids, labels):
        return smoother(model(input_ids=input_ids), labels, shift_labels=True)

    model, seen = compiled(mine)
    reference = loss_of(eager, **given)
    torch.testing.assert_close(loss_of(model, **given), reference)
    [refusal] = seen.reports[0].refused
    assert refusal.reason == "the logits are returned and no loss of them is in this graph"
    assert refusal.advice.startswith("compile head and loss together")

    together, seen = compiled(loss_of)
    loss = together(mine, **given)
    torch.testing.assert_close(loss, reference)
    assert len(seen.rewritten) == 1
    assert_no_logits(seen)
    loss.backward(), reference.backward()
    assert_same_gradients(mine, eager)


def test_accelerate_converts_outputs_to_float32():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install cce_inductor[models]")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = llama().train()
    with torch.no_grad():
        reference = model(**batch()).logits
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(compiled(model)[0])
    out = prepared(**batch())
    assert type(out.logits) is LazyLogits
    assert out.logits.dtype == torch.float32
    assert not out.logits.is_computed
    accelerator.backward(out.loss)
    assert model.lm_head.weight.grad is not None
    gathered = accelerator.gather_for_metrics(out.logits.detach())
    torch.testing.assert_close(gathered + 0, reference, rtol=0.05, atol=0.02)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_trainer(tmp_path):
    """Training in bfloat16 with accumulated gradients, evaluation with metrics, prediction."""
    pytest.importorskip("accelerate", reason="needs accelerate: pip install cce_inductor[models]")
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (8, 12))]
    start = llama(num_hidden_layers=1)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    def train(torch_compile):
        torch._dynamo.reset()
        arguments = transformers.TrainingArguments(
            str(tmp_path), torch_compile=torch_compile, bf16=True, use_cpu=True, max_steps=3, seed=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, per_device_eval_batch_size=4,
            learning_rate=1e-2, logging_steps=1, eval_strategy="steps", eval_steps=3, save_strategy="no",
            report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            copy.deepcopy(start), arguments, train_dataset=data, eval_dataset=data, compute_metrics=accuracy
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, trainer.evaluate(), trainer.predict(data).predictions

    with cce_inductor.enable(min_vocab=0, min_logits_bytes=0), cce_inductor.capture_reports() as reports:
        losses, scores, predictions = train(torch_compile=True)
    eager_losses, eager_scores, eager_predictions = train(torch_compile=False)
    assert {rewrite.returned for report in reports for rewrite in report.rewritten} == {"lazy"}
    assert len(losses) == 3
    assert losses == pytest.approx(eager_losses, rel=1e-3)
    assert scores["eval_loss"] == pytest.approx(eager_scores["eval_loss"], rel=1e-3)
    assert predictions.shape == eager_predictions.shape == (8, 12, VOCAB)
    assert abs(predictions - eager_predictions).max() < 0.1
