"""Losses as arithmetic on the reductions over the vocabulary: vectors of length N, no logits.

`row_weights` is for the losses that are nothing but a weighted sum of -log p over the rows.

The functions work on tensors and, unchanged, on FX proxies: the pass calls them to write the same arithmetic into a
graph. So they branch on plain Python values only.
"""

import math

import torch
from torch import Tensor


def cross_entropy(
    lse: Tensor,  # [N]
    picked: Tensor,  # [N]
    total: Tensor | None,  # [N], needed for label smoothing: sum over v of weight[v] * x[n, v]
    target: Tensor,  # [N]
    num_classes: int,
    weight: Tensor | None = None,  # [V]
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_rest: Tensor | float = 0.0,  # [N], what rounding took from lse
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of logits x, from lse, picked and total of x.

    With -log p[n, v] = lse[n] - x[n, v], class weights w and smoothing s, the loss of a row is

        (1 - s) * w[t] * (lse - x[t])  +  s / V * sum over v of w[v] * (lse - x[v])

    and zero where the target is `ignore_index`; the mean divides by the sum of w[t] over the rows that count.
    """
    valid = target != ignore_index
    losses = lse - picked + lse_rest
    row_weight = None
    if weight is not None:
        weight = weight.to(lse.dtype)
        row_weight = _target_weights(weight, target, valid)
        losses = row_weight * losses
    if label_smoothing > 0.0:
        assert total is not None, "label smoothing needs the sum of the logits"
        weight_sum = num_classes if weight is None else weight.sum()
        smooth = weight_sum * lse - total
        losses = (1.0 - label_smoothing) * losses + (label_smoothing / num_classes) * smooth
    losses = torch.where(valid, losses, 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (valid.sum() if row_weight is None else row_weight.sum())


def row_weights(
    target: Tensor,  # [N]
    dtype: torch.dtype,
    weight: Tensor | None = None,  # [V]
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:  # [N]
    """What each row's lse - picked is multiplied by in a sum that is the loss, without label smoothing."""
    valid = target != ignore_index
    weights = valid.to(dtype) if weight is None else _target_weights(weight.to(dtype), target, valid)
    return weights if reduction == "sum" else torch.where(valid, weights / weights.sum(), 0.0)


def nan_without_rows(loss: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The mean over no row is nan, while its gradients are zero."""
    return torch.where((target != ignore_index).any(), loss, math.nan)


def _target_weights(weight: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    # ignored targets may lie outside [0, V): look up class 0 for them and drop the result
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0.0)
