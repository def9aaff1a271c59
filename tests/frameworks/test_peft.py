"""Adapters of PEFT on models of transformers: the loss is rewritten, and what is trained has eager's gradients."""

import copy

import pytest
import torch

from cce_inductor.lazy_logits import LazyLogits

pytest.importorskip("transformers", reason="needs transformers: pip install cce_inductor[models]")
pytest.importorskip("peft", reason="needs peft: pip install cce_inductor[models]")

import peft
from small import assert_no_logits, assert_same_gradients, batch, compiled, llama

RANK = 4
ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "head": {"target_modules": ["lm_head"]},
    "head and attention, dropout": {"target_modules": ["lm_head", "q_proj"], "lora_dropout": 0.1},
    "head, bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "head and embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 7]},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(dtype=torch.float32, tied=False, **adapter):
    """A model with an adapter that does something from the start."""
    config = peft.LoraConfig(r=RANK, init_lora_weights=False, **adapter)
    return peft.get_peft_model(llama(dtype, tie_word_embeddings=tied, num_hidden_layers=1), config).train()


def losses(function, eager):
    """(ours, eager's) of the same batch and random numbers."""
    results = []
    for model in (function, eager):
        torch.manual_seed(1)
        results.append(model(**batch()))
    ours, theirs = results
    assert type(ours.logits) is LazyLogits
    assert not ours.logits.is_computed
    return ours.loss, theirs.loss


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(
    ("adapter", "tied"),
    [(adapter, False) for adapter in ADAPTERS] + [(adapter, True) for adapter in ("head", "head saved", "some tokens")],
)
def test_loss_and_gradients_are_eagers(adapter, tied):
    adapter = ADAPTERS[adapter]
    eager = adapted(tied=tied, **adapter)
    mine = copy.deepcopy(eager)
    function, seen = compiled(mine)
    loss, reference = losses(function, eager)
    [rewrite] = seen.rewritten
    # the low-rank path joins the product: hidden states and weight are wider by its rank
    assert rewrite.shape[2] == str(32 + RANK * ("lm_head" in adapter["target_modules"]))
    assert_no_logits(seen)
    torch.testing.assert_close(loss, reference)
    loss.backward(), reference.backward()
    assert sum(p.grad is not None for p in mine.parameters()) >= 2
    assert_same_gradients(mine, eager)


def test_a_base_in_bfloat16_under_an_adapter_in_float32():
    eager = adapted(torch.bfloat16, target_modules=["lm_head", "q_proj"])
    exact = copy.deepcopy(eager).double()
    mine = copy.deepcopy(eager)
    function, seen = compiled(mine)
    loss, reference = losses(function, eager)
    assert len(seen.rewritten) == 1
    assert_no_logits(seen)
    assert loss.dtype == reference.dtype
    truth = exact(**batch()).loss
    eps = torch.finfo(torch.bfloat16).eps  # u = scale * A x and B are rounded to it, in one product with the base
    assert abs(loss - truth) <= abs(reference - truth) + eps * truth
    for result in (loss, reference, truth):
        result.backward()
    for one, other, true in zip(mine.parameters(), eager.parameters(), exact.parameters(), strict=True):
        if true.grad is not None:
            assert one.grad.dtype == other.grad.dtype
            assert (one.grad - true.grad).norm() <= (other.grad - true.grad).norm() + eps * true.grad.norm()


def test_each_adapter_is_rewritten():
    """One, another one, two at once, none, one that is merged into the weight."""
    eager = adapted(target_modules=["lm_head"])
    eager.add_adapter("other", peft.LoraConfig(r=RANK, init_lora_weights=False, target_modules=["lm_head"]))
    function, seen = compiled(eager)
    widths = {"default": 32 + RANK, "other": 32 + RANK, "both": 32 + 2 * RANK, "off": 32, "merged": 32}
    for adapter, width in widths.items():
        seen.reports.clear()
        torch._dynamo.reset()
        if adapter == "merged":
            eager.merge_adapter()
        elif adapter != "off":
            eager.base_model.set_adapter(["default", "other"] if adapter == "both" else adapter)
        context = eager.disable_adapter() if adapter == "off" else torch.enable_grad()
        with context:
            torch.testing.assert_close(*losses(function, eager))
        [rewrite] = seen.rewritten
        assert rewrite.shape[2] == str(width), adapter


def test_switching_an_adapter_off_and_on():
    """Dynamo compiles the other program once, and uses each where it belongs."""
    eager = adapted(target_modules=["lm_head"])
    function, seen = compiled(eager)
    with_adapter = losses(function, eager)
    with eager.disable_adapter():
        without = losses(function, eager)
    again = losses(function, eager)
    for pair in (with_adapter, without, again):
        torch.testing.assert_close(*pair)
    assert abs(with_adapter[0] - without[0]) > 1e-3
    assert len(seen.rewritten) == 2
