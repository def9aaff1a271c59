"""What is known of the rows of the logits x from what is known of parts of the vocabulary, [parts, N]:

peaks: the largest x of a part, or 0 where all are -inf
sums: of exp(x - peak); nan where the part has a nan or +inf
spreads: sums of exp(x - peak) * (x - peak)
"""

import torch
from torch import Tensor

from .problem import LEAST_LOG


def log_sum(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(lse, lse_rest): the log of the sum over parts of exp(peak) * sum, and what rounding took from it.

    Where one logit stands out, the log-sum-exp exceeds it by less than a rounding of either. Losses of confident rows
    are nothing but that difference, and `torch.log_softmax` keeps it. Parts are added in float64, as next to a certain
    one, many small ones would be lost one by one.
    """
    if len(peaks) == 0:
        nothing = sums.sum(0)
        return nothing.log(), nothing
    peak, shift = _shifts(peaks, sums)
    above = (sums.double() * shift.double().exp()).sum(0).log()
    lse = (peak + above).to(peaks.dtype)
    return lse, torch.where(lse.isfinite(), above - (lse - peak), 0.0).to(peaks.dtype)


def entropy_of(peaks: Tensor, sums: Tensor, spreads: Tensor) -> Tensor:
    """log s - t / s, s the sum over all columns of exp(x - peak), t that of exp(x - peak) * (x - peak): both terms are
    positive, so that nothing cancels in confident rows."""
    if len(peaks) == 0:
        return sums.sum(0)
    _, shift = _shifts(peaks, sums)
    scale = shift.exp()
    total = (scale * sums).sum(0)
    return total.log() - (scale * (spreads + sums * shift.clamp(min=LEAST_LOG))).sum(0) / total


def largest(maxima: Tensor, places: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum, argmax) of each row, from the largest logit of each part, nan aside, and the class that has it."""
    maximum, part = maxima.max(0)
    # nan counts as the largest
    maximum = torch.where(lse.isnan() & (maximum != float("inf")), float("nan"), maximum)
    return maximum, places.gather(0, part.unsqueeze(0)).squeeze(0).long()


def _shifts(peaks: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """(peak [N], peaks - peak [parts, N]): the largest of the parts' peaks, and how far they lie below it."""
    peaks = torch.where(sums == 0, -torch.inf, peaks)
    peak = peaks.amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    return peak, peaks - peak
