"""Which losses get their gradients in the forward, and how: `scaled_loss` in the place of `vocab_reductions`.

A loss that is a weighted sum over rows, and alone in reading the logits, needs nothing of the backward but a number.
"""

import operator
from typing import Any

from torch.fx import Node

from ..ops.library import pays_in_forward, scaled_loss
from ..ops.problem import accumulate_dtype
from ..options import Options
from .emitter import Emitter
from .reductions import Reduction
from .registry import operation, tensor_of
from .sweeps import Sweep

Factors = tuple[Node, Node, Node | None]
"""hidden [N, D], weight [V, D], bias [V]."""

_SAME_GRADIENT = {"add", "iadd", "to", "float", "view", "reshape", "squeeze"}


def applies(sweep: Sweep, factors: Factors, options: Options) -> bool:
    """Whether the gradients of a sweep should be computed in the forward."""
    reduction = sweep.reductions[0]
    if not sweep.grad_enabled or len(sweep.reductions) > 1 or reduction.weighted_sum is None:
        return False
    needing = [tensor for factor in factors if factor is not None and (tensor := tensor_of(factor)).requires_grad]
    if not needing:
        return False
    weight_needs = tensor_of(factors[1]).requires_grad
    device, dtype = needing[0].device, reduction.logits.compute_dtype
    if not pays_in_forward(device, dtype, options.approximate_mass, weight_needs, reduction.logits.logit_map):
        return False
    # a gradient that is rounded to 16 bits and then multiplied is rounded twice
    return all(tensor.itemsize > 2 for tensor in needing) or _is_only_added(reduction.node)


def _is_only_added(node: Node) -> bool:
    """Whether the graph's output gets this value as it is, or plus something."""
    return all(
        user.op == "output" or (operation(user) in _SAME_GRADIENT and _is_only_added(user)) for user in node.users
    )


def emit(reduction: Reduction, factors: Factors, target: Node, emitter: Emitter, options: Options) -> Any:
    """A proxy of the loss, in the dtype of the operator's results."""
    weighted_sum, logits = reduction.weighted_sum, reduction.logits
    assert weighted_sum is not None
    dtype = accumulate_dtype(logits.compute_dtype)
    outputs = emitter.call(
        scaled_loss,
        *factors,
        target,
        weighted_sum.row_weights(emitter.proxy(target), dtype, emitter.proxy).node,
        logit_map=str(logits.logit_map),
        ignore_index=reduction.ignore_index,
        compute_dtype=logits.compute_dtype,
        workspace_mib=options.workspace_mib,
        approximate_mass=float(options.approximate_mass),
        needs_grad=[factor is not None and tensor_of(factor).requires_grad for factor in factors],
    )
    loss = emitter.proxy(emitter.call(operator.getitem, outputs, 0))
    return weighted_sum.finish(loss, emitter.proxy(target))
