"""Powers of two that keep gradients in the range of float16 where they are computed before that of their loss is known.

    coefficient[n] S    the weights of rows in the loss, the largest at least 4 and below 8
    hidden[n] T         the hidden states, for the weight's gradient, which is a sum over rows

In float16 a gradient scaler multiplies the loss by some 2**15, as gradients would underflow without. In the forward
that number is yet to come. So the loss is multiplied by S, with which dz tells probabilities down to 2**-27. T, at most
one, is the largest with which no sum over all rows can overflow:

    T (sum over n of S |coefficient[n]| max(1, max |hidden[n]|)) max |f'| < 2**15

Products with powers of two round nothing but what is too small for float16.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem

LARGEST_ROW, LARGEST_SUM = 3, 15  # exponents; the largest number of float16 is next to 2**16


class Scaled(NamedTuple):
    """A problem whose gradients are in range."""

    problem: Problem
    coefficient: Tensor  # [N]
    rows: Tensor  # [], S
    units: Tensor  # [2]: what the gradients of hidden states, and of weight and bias, are to be multiplied by


def scaled(problem: Problem, coefficient: Tensor) -> Scaled:
    """The same in the range of float16."""
    if problem.is_empty:
        one = coefficient.new_ones(())
        return Scaled(problem, coefficient, one, coefficient.new_ones(2))
    size, peak = coefficient.abs(), torch.linalg.vector_norm(problem.hidden, ord=float("inf"), dim=1)
    if (counts := problem.counts) is not None:
        size, peak = (torch.where(counts, vector, 0.0) for vector in (size, peak))
    row_exponent = LARGEST_ROW - torch.frexp(size.amax()).exponent
    rows = _power_of_two(row_exponent)
    largest = (rows * size * peak.float().clamp(min=1.0)).sum() * (problem.logit_map.slope_bound or 1.0)
    sum_exponent = (LARGEST_SUM - torch.frexp(largest).exponent).clamp(max=0)
    units = torch.stack([_power_of_two(-row_exponent), _power_of_two(-row_exponent - sum_exponent)])
    scaled_problem = replace(problem, weight_scale=_power_of_two(sum_exponent))
    return Scaled(scaled_problem, coefficient * rows, rows, units)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent as float32, as near as its normal numbers have it; exact, as a GPU's power function need not be."""
    return ((exponent.clamp(-126, 127) + 127) << 23).view(torch.float32)
