"""The specification of the operators, in plain PyTorch. Readable first, differentiable, exact in float64.

With logits x = f(hidden @ weight.T + bias), of shape [N, V]:

    lse[n]    = log(sum over v of exp(x[n, v]))
    picked[n] = x[n, target[n]]                     (0 where target[n] == ignore_index)
                or picked[n, k] = x[n, target[n, k]] for several targets of each row
    total[n]  = sum over v of total_weight[v] * x[n, v]
    maximum[n], argmax[n] = the largest x[n, v], and the first v that has it
    entropy[n] = - sum over v of p[n, v] * log p[n, v],  p = softmax(x), where a class without probability adds nothing

Every loss of the package is arithmetic on these vectors of length N (`losses.py`).
"""

import torch
from torch import Tensor

from ..logit_map import LogitMap


def vocab_reductions(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None = None,  # [V]
    target: Tensor | None = None,  # [N] or [N, K], integers in [0, V) or ignore_index
    total_weight: Tensor | None = None,  # [V]; None stands for ones
    logit_map: LogitMap | None = None,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # lse, picked, total, maximum, argmax, entropy; [N] each
    """Every reduction over the whole vocabulary, in the dtype of `hidden`; holds all N x V logits."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if logit_map is not None:
        logits = logit_map(logits)
    lse = torch.logsumexp(logits, dim=-1)
    total = (logits if total_weight is None else logits * total_weight).sum(dim=-1)
    maximum, argmax = logits.max(dim=-1)
    log_p = (logits - lse.unsqueeze(-1)).clamp(min=torch.finfo(logits.dtype).min)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return lse, _picked(logits, target, ignore_index), total, maximum, argmax, entropy


def _picked(logits: Tensor, target: Tensor | None, ignore_index: int | None) -> Tensor:
    if target is None:
        return logits.new_zeros(logits.shape[0])
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    index = target.masked_fill(ignored, 0)
    picked = logits.gather(-1, index) if target.dim() == 2 else logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(ignored, 0)
