"""Everything that ends the logits: losses and other reductions over the vocabulary."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import B, D, S, V, check, hidden, labels, weight

CLASS_WEIGHT = torch.linspace(0.1, 2.0, V)


def logits_of(h, w):
    return F.linear(h, w).view(-1, V)


LOSSES = {
    "positional": lambda x, t: F.cross_entropy(x, t, None, None, -100, None, "mean", 0.0),
    "keyword": lambda x, t: F.cross_entropy(input=x, target=t, ignore_index=-100, reduction="mean"),
    "target_keyword": lambda x, t: F.cross_entropy(x, target=t),
    "module": lambda x, t: torch.nn.CrossEntropyLoss()(x, t),
    "module_options": lambda x, t: torch.nn.CrossEntropyLoss(ignore_index=-1, label_smoothing=0.1)(x, t),
    "log_softmax_nll": lambda x, t: F.nll_loss(F.log_softmax(x, dim=-1), t),
    "log_softmax_nll_method": lambda x, t: F.nll_loss(x.log_softmax(1), t, reduction="sum"),
    "log_softmax_module": lambda x, t: torch.nn.NLLLoss()(torch.nn.LogSoftmax(dim=-1)(x), t),
    "log_softmax_special": lambda x, t: F.nll_loss(torch.special.log_softmax(x, -1), t),
    "log_softmax_torch": lambda x, t: F.nll_loss(torch.log_softmax(x, -1), t, reduction="none"),
    "cross_entropy_of_log_softmax": lambda x, t: F.cross_entropy(F.log_softmax(x, -1), t),
    "smoothed_cross_entropy_of_log_softmax": lambda x, t: F.cross_entropy(F.log_softmax(x, -1), t, label_smoothing=0.2),
    "log_softmax_gather": lambda x, t: -x.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1).mean(),
    "log_softmax_gather_keywords": lambda x, t: -torch.gather(x.log_softmax(-1), dim=1, index=t[:, None]).sum(),
    "gather_logsumexp": lambda x, t: (torch.logsumexp(x, -1) - x.gather(-1, t[:, None])[:, 0]).mean(),
    "gather_logsumexp_keepdim": lambda x, t: (torch.logsumexp(x, -1, keepdim=True) - x.gather(1, t[:, None])).sum(),
    "logsumexp_first": lambda x, t: x.logsumexp(dim=-1).sum() - x.gather(dim=-1, index=t.unsqueeze(1)).sum(),
    "take_along_dim": lambda x, t: -torch.take_along_dim(x.log_softmax(-1), t[:, None], dim=-1).mean(),
    "take_along_dim_method": lambda x, t: -x.log_softmax(-1).take_along_dim(t[:, None], 1).mean(),
    "arange_index": lambda x, t: -x.log_softmax(-1)[torch.arange(len(t)), t].mean(),
    "arange_index_of_logits": lambda x, t: (x.logsumexp(-1) - x[torch.arange(0, x.size(0)), t]).mean(),
    "range_index": lambda x, t: F.log_softmax(x, -1)[range(B * S), t].sum(),
    "negated_log_softmax": lambda x, t: (-x.log_softmax(-1)).gather(-1, t[:, None]).mean(),
    "scaled_log_softmax": lambda x, t: (x.log_softmax(-1) * -0.5 / 3).gather(-1, t[:, None]).sum(),
    "negated_log_softmax_index": lambda x, t: (-1.0 * x.log_softmax(-1))[torch.arange(len(t)), t].mean(),
    "transformers_smoother": lambda x, t: _smoother(x, t),
    "softmax_gather": lambda x, t: -x.softmax(-1).gather(-1, t[:, None]).log().mean(),
    "softmax_index": lambda x, t: (1 - x.softmax(-1)[torch.arange(len(t)), t]).square().sum(),
    "unlikelihood": lambda x, t: -torch.log(1 - F.softmax(x, dim=-1).gather(1, t[:, None]) + 1e-6).mean(),
    "smoothing_by_hand": lambda x, t: (
        -0.9 * x.log_softmax(-1).gather(-1, t[:, None]).mean() - 0.1 * x.log_softmax(-1).mean(dim=-1).mean()
    ),
    "smoothing_by_hand_sum": lambda x, t: F.nll_loss(x.log_softmax(-1), t) - x.log_softmax(-1).sum(-1).mean() / V,
    "timm_smoothing": lambda x, t: _timm(x, t),
    "sum_of_logits": lambda x, t: x.logsumexp(-1).mean() - x.sum(-1, keepdim=True).mean() / V,
    "z_loss": lambda x, t: F.cross_entropy(x, t) + 1e-2 * x.logsumexp(-1).pow(2).mean(),
    "z_loss_first": lambda x, t: 1e-2 * torch.logsumexp(x, dim=-1).square().mean() + F.cross_entropy(x, t),
    "z_loss_list": lambda x, t: x.logsumexp([-1]).pow(2).sum() + F.cross_entropy(x, t, reduction="sum"),
    "negated_twice": lambda x, t: F.nll_loss(torch.neg(-x.log_softmax(-1)), t),
    "negated_rows": lambda x, t: (-x.log_softmax(-1))[2:].gather(-1, t[2:, None]).sum(),
    "three_of_a_kind": lambda x, t: F.cross_entropy(x, t) + F.nll_loss(x.log_softmax(1), t) + x.logsumexp(1).sum(),
    "focal": lambda x, t: _focal(F.cross_entropy(x, t, reduction="none")),
    "unlikely": lambda x, t: torch.log1p(-torch.exp(-F.cross_entropy(x, t, reduction="none"))).mean(),
}  # fmt: skip


def _timm(x, t):
    log_probs = F.log_softmax(x, dim=-1)
    nll = -log_probs.gather(dim=-1, index=t.unsqueeze(1)).squeeze(1)
    return (0.9 * nll + 0.1 * -log_probs.mean(dim=-1)).mean()


def _smoother(x, t):
    """transformers' LabelSmoother."""
    log_probs = -F.log_softmax(x, dim=-1)
    t = t.unsqueeze(-1)
    padding = t.eq(5)
    nll = log_probs.gather(dim=-1, index=torch.clamp(t, min=0))
    smoothed = log_probs.sum(dim=-1, keepdim=True)
    nll.masked_fill_(padding, 0.0)
    smoothed.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * smoothed.sum() / (count * V)


def _focal(nll):
    return ((1 - torch.exp(-nll)) ** 2 * nll).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_one_operator_call_serves_the_loss(loss, dtype):
    def program(h, w, t):
        return loss(logits_of(h, w), t.view(-1))

    ours = check(program, hidden(dtype=dtype), weight(dtype=dtype), labels())
    assert ours.outputs[0].dtype == dtype


def test_negative_classes_count_from_the_end_in_an_index_and_are_ignored_in_a_loss():
    def program(h, w, t):
        x, t = logits_of(h, w), t.view(-1)
        return F.cross_entropy(x, t, ignore_index=-3) - x[torch.arange(len(t)), t].mean()

    check(program, hidden(), weight(), labels(ignored=-3), calls=2)


REDUCTIONS = ("mean", "sum", "none")
GRID = list(itertools.product(REDUCTIONS, (-100, 5, 0), (None, CLASS_WEIGHT), (0.0, 0.3, 1.0)))


@pytest.mark.parametrize(("reduction", "ignore_index", "class_weight", "smoothing"), GRID)
def test_every_argument_of_cross_entropy(reduction, ignore_index, class_weight, smoothing):
    def program(h, w, t, class_weight):
        return F.cross_entropy(
            logits_of(h, w),
            t.view(-1),
            class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    check(program, hidden(), weight(), labels(ignored=ignore_index), class_weight)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["plain", "class_weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_of_capped_logits(reduction, class_weight, smoothing):
    """Smoothing needs the sum over the vocabulary of f(z), which is no product of sums where f is not linear."""

    def program(h, w, t, class_weight):
        x = 3 * torch.tanh(logits_of(h, w) / 3)
        return F.cross_entropy(x, t.view(-1), class_weight, reduction=reduction, label_smoothing=smoothing)

    check(program, hidden(), weight(), labels(ignored=-100), class_weight)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 7])
def test_nll_loss(reduction, ignore_index):
    def program(h, w, t, c):
        x = F.log_softmax(logits_of(h, w), -1)
        return F.nll_loss(x, t.view(-1), c, ignore_index=ignore_index, reduction=reduction)

    check(program, hidden(), weight(), labels(ignored=ignore_index), CLASS_WEIGHT)


UPCASTS = {
    "before": lambda x, t: F.cross_entropy(x.float(), t),
    "never": lambda x, t: F.cross_entropy(x, t),
    "after": lambda x, t: F.cross_entropy(x, t).float(),
    "log_softmax_dtype": lambda x, t: F.nll_loss(F.log_softmax(x, -1, dtype=torch.float32), t),
    "sum_dtype": lambda x, t: F.cross_entropy(x, t) - x.log_softmax(-1).sum(-1, dtype=torch.float32).mean(),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", UPCASTS.values(), ids=UPCASTS)
def test_the_loss_has_the_dtype_of_eager(loss, dtype):
    def program(h, w, t):
        return loss(logits_of(h, w), t.view(-1))

    check(program, hidden(dtype=dtype), weight(dtype=dtype), labels())


def test_labels_prepared_after_the_logsumexp():
    def program(h, w, t):
        x = F.linear(h, w).float()
        z = x.logsumexp(-1).pow(2).mean()
        shifted = F.pad(t, (0, 1), value=-100)[..., 1:].contiguous()
        return z + F.cross_entropy(x.view(-1, V), shifted.view(-1))

    check(program, hidden(), weight(), labels())


def test_labels_that_depend_on_the_logsumexp():
    """They can't be there before the first call, so the loss takes a second one."""

    def program(h, w, t):
        x = logits_of(h, w)
        z = x.logsumexp(-1)
        target = z.detach().long().clamp(0, V - 1)
        return z.mean() + F.cross_entropy(x, target)

    check(program, hidden(), weight(), labels(), calls=2)


def test_z_loss_counts_rows_that_the_cross_entropy_ignores():
    def program(h, w, t):
        x = logits_of(h, w)
        return x.logsumexp(-1).pow(2).sum() + F.cross_entropy(x, t.view(-1), reduction="sum")

    check(program, hidden(), weight(), labels(ignored=-100))


def test_z_loss_weighted_by_a_mask():
    def program(h, w, t):
        x = logits_of(h, w)
        mask = (t.view(-1) != -100).float()
        z = (x.logsumexp(-1).pow(2) * mask).sum() / mask.sum()
        return F.cross_entropy(x, t.view(-1)) + 1e-3 * z

    check(program, hidden(), weight(), labels(ignored=-100))


def test_two_losses_with_different_targets_take_a_call_on_twice_the_rows():
    def program(h, w, t, u):
        x = logits_of(h, w)
        return F.cross_entropy(x, t.view(-1)) + 0.5 * F.cross_entropy(x, u.view(-1)) + x.logsumexp(-1).mean()

    ours = check(program, hidden(), weight(), labels(), labels().flip(0))
    assert ours.operator_calls[0].args[0].meta["example_value"].shape[0] == 2 * B * S


def test_two_losses_with_different_ignored_classes_take_two_calls():
    def program(h, w, t):
        x = logits_of(h, w)
        return F.cross_entropy(x, t.view(-1)) + F.cross_entropy(x, t.view(-1), ignore_index=3)

    check(program, hidden(), weight(), labels(ignored=3), calls=2)


def test_different_class_weights_under_smoothing_take_two_calls():
    def program(h, w, t, c):
        x = logits_of(h, w)
        smooth = F.cross_entropy(x, t.view(-1), c, label_smoothing=0.1)
        return smooth + F.cross_entropy(x, t.view(-1), label_smoothing=0.1)

    check(program, hidden(), weight(), labels(), CLASS_WEIGHT, calls=2)


def test_a_loss_before_and_after_a_map():
    def program(h, w, t):
        x = logits_of(h, w)
        return F.cross_entropy(x, t.view(-1)) + F.cross_entropy(torch.tanh(x), t.view(-1))

    check(program, hidden(), weight(), labels(), calls=2)


def test_several_heads_on_one_weight():
    def program(h, g, w, t):
        first = F.cross_entropy(logits_of(h, w), t.view(-1))
        return first + 0.3 * F.cross_entropy(logits_of(g, w), t.roll(1).view(-1))

    check(program, hidden(), hidden().detach().flip(1).requires_grad_(), weight(), labels(), rewrites=2)


def test_two_heads_one_of_which_is_left_alone():
    def program(h, w, u, t):
        kept = F.linear(h, u)
        return F.cross_entropy(logits_of(h, w), t.view(-1)) + F.dropout(kept, 0.0).logsumexp(-1).mean()

    check(program, hidden(), weight(), weight().detach().flip(0).requires_grad_(), labels(), logits_in_memory=True)


def test_contrastive_pair_of_products():
    """open_clip: two products, of images with texts and of texts with images, each with a loss of its own."""

    def program(image, text, scale):
        target = torch.arange(image.size(0))
        return F.cross_entropy(scale * image @ text.T, target) + F.cross_entropy(scale * text @ image.T, target)

    images = hidden(20, 4)
    texts = weight(20, 4)
    check(program, images, texts, torch.tensor(2.0, requires_grad=True), rewrites=2, calls=2)


def test_preference_loss_row_by_row():
    """DPO: shifted, scaled, gathered log-probabilities, masked and summed for each sequence."""

    def program(h, w, t):
        x = F.linear(h, w)[:, :-1] / 0.7
        target = t[:, 1:].clone()
        mask = target != -100
        target[target == -100] = 0
        picked = x.log_softmax(-1).gather(2, target.unsqueeze(2)).squeeze(2)
        scores = (picked * mask).sum(-1)
        return -F.logsigmoid(scores[:1] - scores[1:2]).mean()

    check(program, hidden(), weight(), labels(ignored=-100))


def test_sum_divided_by_the_number_of_items():
    def program(h, w, t, items):
        return F.cross_entropy(logits_of(h, w), t.view(-1), reduction="sum") / items

    check(program, hidden(), weight(), labels(), torch.tensor(13))


def test_results_written_in_place_do_not_change_each_other():
    def program(h, w, t):
        x = logits_of(h, w)
        z = x.logsumexp(-1)
        loss = F.cross_entropy(x, t.view(-1), reduction="none")
        first = z * 1
        z.mul_(2.0)
        loss.add_(1.0)
        return first.sum() + z.sum() + loss.sum() + x.gather(-1, t.view(-1, 1)).sum()

    check(program, hidden(requires_grad=False), weight(requires_grad=False), labels(), calls=2)


@pytest.mark.parametrize("loss", ["mean", "sum", "none", "nll", "logsumexp"])
def test_unbatched(loss):
    def program(h, w, t):
        x = F.linear(h, w)
        if loss == "nll":
            return F.nll_loss(x.log_softmax(-1), t)
        if loss == "logsumexp":
            return x.logsumexp(0) - x.gather(0, t[None])
        return F.cross_entropy(x, t, reduction=loss)

    check(program, hidden(D), weight(), labels(1)[0], logits_in_memory=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_counts(reduction):
    """The mean over nothing is nan, as in eager, and so are its gradients."""

    def program(h, w, t):
        return F.cross_entropy(logits_of(h, w), t.view(-1), reduction=reduction)

    check(program, hidden(), weight(), torch.full((B, S), -100))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction):
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w), t, reduction=reduction)

    check(program, hidden(0, D), weight(), labels(0), logits_in_memory=True)


@pytest.mark.parametrize("target", [-1, V, 10**6])
def test_a_target_outside_the_vocabulary_raises_as_in_eager(target):
    def program(h, w, t):
        return F.cross_entropy(logits_of(h, w), t.view(-1))

    wrong = labels()
    wrong[0, 0] = target
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        check(program, hidden(), weight(), wrong)


def test_a_gathered_class_outside_the_vocabulary_raises_as_in_eager():
    def program(h, w, t):
        return logits_of(h, w).log_softmax(-1).gather(-1, t.view(-1, 1)).mean()

    wrong = labels()
    wrong[0, 0] = V
    with pytest.raises(RuntimeError, match="out of bounds"):
        check(program, hidden(), weight(), wrong)
