"""Losses as public projects write them, whole: each names the project whose form it has."""

import pytest
import torch
import torch.nn.functional as F
from helpers import B, S, V, check, hidden, labels, weight

IGNORED = -100


def nanochat(h, w, t):
    """The weight has more rows than there are classes."""
    x = F.linear(h, w.to(h.dtype))[..., : V - 3].float()
    x = 15 * torch.tanh(x / 15)
    return F.cross_entropy(x.view(-1, x.size(-1)), t.clamp(max=V - 4).view(-1), ignore_index=IGNORED)


def torchtune(h, w, t):
    """Chunks of the hidden states, a head on each."""
    total = 0.0
    for part, target in zip(h.chunk(2, dim=1), t.chunk(2, dim=1), strict=True):
        x = F.linear(part, w).reshape(-1, V).float()
        total = total + F.cross_entropy(x, target.reshape(-1), reduction="sum", ignore_index=IGNORED)
    return total / (t != IGNORED).sum()


def litgpt(h, w, t):
    x, t = F.linear(h, w).reshape(-1, V), t.reshape(-1)
    pieces = zip(x.split(8, dim=0), t.split(8, dim=0), strict=True)
    losses = [F.cross_entropy(x, t, ignore_index=IGNORED, reduction="none") for x, t in pieces]
    counted = (t != IGNORED).sum()
    return torch.cat(losses).sum() / torch.maximum(torch.ones_like(counted), counted)


def axolotl(h, w, t):
    x, t = F.linear(h, w), F.pad(t, (0, 1), value=IGNORED)[..., 1:]
    total = 0.0
    for part, target in zip(x.chunk(4, dim=1), t.chunk(4, dim=1), strict=True):
        total = total + F.cross_entropy(part.reshape(-1, V).float(), target.reshape(-1), reduction="sum")
    return total / 7


def olmo_core(h, w, t):
    x, t = F.linear(h, w).view(-1, V).float(), t.view(-1)
    z = x.logsumexp(-1).pow(2) * (t != IGNORED)
    return F.cross_entropy(x, t, reduction="sum", ignore_index=IGNORED) / 9 + 1e-4 * z.sum() / 9


def trl_float32(h, w, t):
    """Of all rows at once what is picked, row by row what it is normalized by."""
    x, index = F.linear(h, w)[:, :-1] / 0.7, t[:, 1:].clamp(min=0)
    selected = torch.gather(x, dim=-1, index=index.unsqueeze(-1)).squeeze(-1)
    return (selected - torch.stack([torch.logsumexp(row, dim=-1) for row in x])).sum()


def trl_bfloat16(h, w, t):
    x, t = F.linear(h, w)[:, :-1] / 0.7, t[:, 1:].clamp(min=0)
    rows = (F.log_softmax(row, -1).gather(-1, i.unsqueeze(-1)).squeeze(-1) for row, i in zip(x, t, strict=True))
    return torch.stack(list(rows)).sum()


def verl(h, w, t):
    """Temperature in place, log-probabilities and an entropy bonus."""
    x = F.linear(h, w)
    x.div_(0.7)
    picked = F.log_softmax(x.float(), dim=-1).gather(-1, t.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = torch.logsumexp(x, dim=-1) - torch.sum(F.softmax(x, dim=-1) * x, dim=-1)
    return -picked.mean() - 0.01 * entropy.mean()


def llm_foundry(h, w, t):
    """Logits scaled in place, labels rolled and written in place."""
    x = F.linear(h, w)
    x *= 0.5
    t = torch.roll(t, shifts=-1, dims=1)
    t[:, -1] = IGNORED
    loss = F.cross_entropy(x.view(-1, V), t.view(-1), ignore_index=IGNORED, reduction="none")
    return loss.sum() / (t != IGNORED).sum()


def mixture_of_experts(h, w, t):
    """transformers adds the routers' loss in place."""
    loss = F.cross_entropy(F.linear(h, w).float().view(-1, V), t.view(-1))
    loss += 0.01 * h.square().mean()
    return loss


def multi_token_prediction(h, w, t):
    heads = (F.linear(torch.tanh(h * k), w)[:, :-k].reshape(-1, V) for k in (1, 2))
    return sum(F.cross_entropy(x, t[:, k:].reshape(-1)) for k, x in enumerate(heads, start=1))


def trainable_token_indices(h, w, t):
    """PEFT: some rows of the embedding are trained."""
    rows = w.index_copy(0, torch.tensor([1, 5]), h[0, :2])
    return F.cross_entropy(F.linear(input=h, weight=rows).view(-1, V), t.view(-1))


def fairseq(h, w, t):
    """Label smoothing by hand, padding filled in place."""
    log_probs = F.log_softmax(F.linear(h, w), dim=-1)
    target, padding = t.clamp(min=0).unsqueeze(-1), t.eq(IGNORED).unsqueeze(-1)
    nll, smooth = -log_probs.gather(dim=-1, index=target), -log_probs.sum(dim=-1, keepdim=True)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    return 0.9 * nll.sum() + 0.1 / V * smooth.sum()


def poly_loss(h, w, t):
    loss = F.cross_entropy(F.linear(h, w).view(-1, V), t.view(-1), reduction="none")
    return (loss + 1.0 - torch.exp(-loss)).mean()


FORMS = {  # operator calls, heads
    nanochat: (1, 1), torchtune: (1, 2), litgpt: (1, 1), axolotl: (1, 1), olmo_core: (1, 1), trl_float32: (1, 1),
    trl_bfloat16: (1, 1), verl: (1, 1), llm_foundry: (1, 1), mixture_of_experts: (1, 1), multi_token_prediction: (1, 2),
    trainable_token_indices: (1, 1), fairseq: (1, 1), poly_loss: (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("form", "counts"), FORMS.items(), ids=[form.__name__ for form in FORMS])
def test_form(form, counts, dtype):
    calls, heads = counts
    check(form, hidden(dtype=dtype), weight(dtype=dtype), labels(ignored=IGNORED), rewrites=heads, calls=calls)


def test_clip():
    """One product, a loss on it and one on its transpose."""

    def program(image, text, scale):
        x = image @ text.t() * scale.exp()
        target = torch.arange(len(image))
        return (F.cross_entropy(x, target) + F.cross_entropy(x.t(), target)) / 2

    check(program, hidden(B * S, 5), weight(B * S, 5), torch.tensor(0.3, requires_grad=True), calls=2)
