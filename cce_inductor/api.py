"""Direct use, without a compiler: the loss of a linear classifier from its hidden states."""

import torch
from torch import Tensor

from .compat import differentiated_by_transform
from .logit_map import LogitMap
from .ops import losses
from .ops.library import vocab_reductions
from .options import Options


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_map: str = "z",
    approximate_mass: float = Options.approximate_mass,
) -> Tensor:
    """`cross_entropy(f(linear(input, linear_weight, linear_bias)), target, ...)` without storing the logits.

    The arguments are those of `torch.nn.functional.linear_cross_entropy` and mean the same.

    input: hidden states [..., D], float64, float32, bfloat16 or float16.
    linear_weight: the classifier weight [V, D]. Where it is float32 and `input` is narrower, or inside autocast, the
        products are computed in the narrower dtype and its gradient comes back in its own.
    target: class indices [...], int64 or uint8, in [0, V) or `ignore_index`.
    linear_bias: [V], added to the logits.
    weight: [V], a weight for each class.
    reduction: "mean" (by the sum of the targets' weights), "sum" or "none".
    ignore_index: rows with this target count for nothing.
    label_smoothing: in [0, 1].
    logit_map: a pointwise function of a logit z, for example "30.0*tanh(z/30.0)"; numbers, z, + - * / ** and tanh,
        sigmoid, exp.
    approximate_mass: the option of that name (`Options`): 0 for exact gradients.

    Returns the loss, a scalar or [...] for reduction "none", in the dtype of `input`; inside autocast in float32.
    Raises what eager PyTorch raises for wrong shapes, dtypes, devices, smoothing and (on a CPU) targets, ValueError for
    a wrong reduction or map, NotImplementedError under torch.func.grad, jvp and other forward-mode differentiation.
    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009.
    """
    _check(input, linear_weight, target, linear_bias, weight, reduction, label_smoothing)
    autocast = _is_autocast_enabled(input.device.type)
    compute_dtype = torch.get_autocast_dtype(input.device.type) if autocast else input.dtype
    target_rows = target.reshape(-1).long()
    smooth = label_smoothing > 0
    lse, picked, total, _, _, _, lse_rest, *_ = vocab_reductions(
        input.reshape(-1, input.shape[-1]),
        linear_weight,
        linear_bias,
        target_rows,
        weight if smooth else None,
        logit_map=_parsed(logit_map),
        want_total=smooth,
        ignore_index=ignore_index,
        compute_dtype=compute_dtype,
        workspace_mib=Options.workspace_mib,
        approximate_mass=approximate_mass,
        skip_ignored=True,
    )
    loss = losses.cross_entropy(
        lse,
        picked,
        total,
        target_rows,
        linear_weight.shape[0],
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_rest=lse_rest,
    )
    loss = loss.reshape(target.shape) if reduction == "none" else loss
    return loss if autocast else loss.to(input.dtype)


@torch.compiler.assume_constant_result
def _parsed(logit_map: str) -> str:
    """The map as the operator takes it; ValueError for what is not one. A compiler need not look inside."""
    return str(LogitMap.parse(logit_map))


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    """Some devices, "meta" for one, have no autocast and raise when asked for it. Dynamo of 2.11 can't trace this."""
    return torch.amp.is_autocast_available(device_type)


def _is_autocast_enabled(device_type: str) -> bool:
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    """What the operator does not check because it does not see it; the errors are eager's."""
    if differentiated_by_transform():
        raise NotImplementedError(
            "linear_cross_entropy does not support torch.func.grad, jvp and what is made of them; "
            "use torch.autograd.grad"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction")
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")
    if input.dim() == 0 or target.shape != input.shape[:-1]:
        raise ValueError(
            f"Expected input batch_size ({tuple(input.shape[:-1])}) to match target batch_size ({tuple(target.shape)})."
        )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected targets of dtype int64 or uint8 (class indices), got {target.dtype}")
    allowed = {input.dtype, torch.float32} if input.dtype.itemsize == 2 else {input.dtype}
    autocast = _is_autocast_enabled(input.device.type)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias), ("weight", weight)):
        if tensor is not None and tensor.dtype not in allowed and not autocast:
            raise RuntimeError(f"expected {name} to have the dtype of input, {input.dtype}, but got {tensor.dtype}")
    if weight is not None and weight.shape != linear_weight.shape[:1]:
        raise RuntimeError(
            f"weight tensor should be defined either for all {linear_weight.shape[0]} classes or no classes "
            f"but got weight tensor of shape: {tuple(weight.shape)}"
        )
