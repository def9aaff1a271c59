"""Real architectures of transformers, tiny and random: untouched: each loss is rewritten, and does what eager does.

`sweep.py` does the same for all that can be built; these stand for the classes of forms that were found there.
"""

import pytest
import torch
from helpers import EVERYTHING, elements, nodes_of, tensors_of

pytest.importorskip("transformers", reason="needs transformers: pip install cce_inductor[models]")

import tiny

from cce_inductor import backend as ours
from cce_inductor.graph.driver import rewrite_module
from cce_inductor.graph.returned import LazyResults
from cce_inductor.lazy_logits import LazyLogits

ARCHITECTURES = {
    "causal": {
        "linear, float, view, cross_entropy": (
            "llama", "qwen3", "mixtral", "phi", "gemma", "olmo2", "falcon", "gpt_neox", "gptj", "opt", "bloom",
        ),
        "a warning between head and loss": ("gpt2", "roberta"),
        "soft-capped": ("gemma2", "gemma3_text"),
        "scaled": ("cohere", "granite", "dory"),
        "cast twice": ("mamba",),
        "decoders of sequence to sequence models": ("bart", "marian"),
    },
    "masked": {
        "linear, view, cross_entropy": ("bert", "distilbert", "albert", "electra", "modernbert", "deberta-v2"),
        "a weight that is computed, a bias added in place": ("mobilebert",),
    },
    "seq2seq": {
        "linear, view, cross_entropy": ("t5", "blenderbot", "switch_transformers"),
        "with a bias buffer": ("bart", "m2m_100"),
    },
    "image-text": {
        "of text alone": ("llava", "gemma3", "idefics3", "mllama", "qwen3_vl"),
        "with an image": ("blip", "kosmos-2", "vision-encoder-decoder"),
        "classes masked in place": ("chameleon",),
    },
}  # fmt: skip
CASES = [(kind, name) for kind, forms in ARCHITECTURES.items() for names in forms.values() for name in names]


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_architecture(kind, name):
    model = tiny.model(name, kind)
    tiny.without_dropout(model)
    given = tiny.inputs(model)
    reports, graphs = [], []

    def backend(module, inputs):
        lazy = LazyResults(module.graph)
        reports.append(rewrite_module(module, EVERYTHING, lazy))
        graphs.append(module)
        return lazy.around(module.forward)

    backend.__module__ = ours.__name__  # what the real backend leaves out while it traces is left out here too
    torch._dynamo.reset()
    torch.manual_seed(0)
    mine = torch.compile(model, backend=backend)(**given)
    torch.manual_seed(0)
    theirs = model(**given)
    loss, eager = mine.loss, theirs.loss
    assert sum(len(report.rewritten) for report in reports) == 1, reports
    assert not any(report.refused for report in reports), reports
    assert_no_logits(graphs)
    assert type(mine.logits) is LazyLogits
    assert not mine.logits.is_computed
    torch.testing.assert_close(mine.logits.detach() + 0, theirs.logits.detach(), rtol=1e-4, atol=1e-5)
    assert loss.dtype == eager.dtype
    torch.testing.assert_close(loss, eager, rtol=1e-5, atol=0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, one, other in zip(names, gradients(model, loss), gradients(model, eager), strict=True):
        assert (one is None) == (other is None), name
        if other is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7, name


def assert_no_logits(graphs):
    """No tensor with a logit for each token, or for each but the last of a sequence."""
    logits = {tiny.BATCH * length * tiny.VOCAB for length in (tiny.LENGTH, tiny.LENGTH - 1)}
    for graph in graphs:
        for node in nodes_of(graph):
            for tensor in tensors_of(node.meta.get("example_value")):
                assert tiny.VOCAB not in tensor.shape or elements(tensor) not in logits, node


def test_the_message_of_warning_once_is_heard_by_other_backends():
    """Only programs that are compiled by this package go without it; elsewhere the graph breaks, as it always did."""
    model = tiny.model("gpt2", "causal", loss_type=None)
    given = tiny.inputs(model)
    graphs = []

    def other_backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(lambda: model(**given).loss, backend=other_backend)()
    assert len(graphs) == 2
