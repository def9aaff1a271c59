"""The operators as PyTorch knows them: schema, shapes, gradients and FLOP counts.

    cce_inductor::vocab_reductions(hidden [N, D], weight [V, D], bias [V]?, target [N]?, total_weight [V]?, ...)
        -> lse [N], picked [N], total [N], maximum [N], argmax [N], entropy [N], lse_rest [N], tile_lse [tiles, N],
           tile_tops [tiles, N, 2]

A target [N, K] picks K classes of each row, in the same pass: picked is [N, K] then.

    cce_inductor::scaled_loss(hidden [N, D], weight [V, D], bias [V]?, target [N], coefficient [N], ...)
        -> loss [], grad_hidden [N, D], grad_weight [V, D], grad_bias [V], units [2]

`scaled_loss` is the sum over n of coefficient[n] * (lse[n] - picked[n]) over the rows whose target is not
`ignore_index`, with its gradients where `needs_grad` asks for them; the gradient of the loss multiplies them later. In
float16 `units` does too, of which there are none else: one for the gradient of hidden states, one for the others, which
`float16_range.py` chooses. The coefficients get no gradient.

`reference.py` says what is computed. `logit_map` is the text of a `LogitMap`. `compute_dtype` is what the operands of
the matmuls are cast to (autocast: a float32 parameter with bfloat16 arithmetic), while gradients come back in each
input's own dtype. `want_total` asks for the third result, which is zero otherwise, `want_max` for maximum and argmax,
`want_entropy` for the entropy, which are empty otherwise. `workspace_mib` bounds the scratch memory of the backward;
`workspace.py` says what None stands for. `approximate_mass` is how much of each row's probability gradients may
approximate, 0 for exact ones. `tile_lse` and `tile_tops` are what the forward hands to an approximate backward, where
there is one, else empty. With `skip_ignored` nobody reads results but picked of rows whose target is `ignore_index`:
they may be anything but nan.
`lse_rest` is what rounding took from lse: a log-probability is picked - lse - lse_rest. It has no gradient. In a
row with a nan or +inf logit lse is nan, as the log-softmax of such a row is.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from ..compat import hands_over
from ..logit_map import LogitMap
from . import cpu, cuda, in_forward
from .problem import Problem, Reductions, RowGradients, Tiles, accumulate_dtype, check
from .scaling import scaled

NAMESPACE = "cce_inductor"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(
    "vocab_reductions(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? total_weight, *, "
    "str logit_map, bool want_total, int? ignore_index, ScalarType compute_dtype, int? workspace_mib, "
    "float approximate_mass=0.0, bool skip_ignored=False, bool want_max=False, bool want_entropy=False) "
    "-> (Tensor lse, Tensor picked, Tensor total, Tensor maximum, Tensor argmax, Tensor entropy, Tensor lse_rest, "
    "Tensor tile_lse, Tensor tile_tops)"
)
_library.define(
    "vocab_reductions_backward(Tensor grad_lse, Tensor grad_picked, Tensor grad_total, Tensor? grad_maximum, "
    "Tensor? grad_entropy, Tensor argmax, Tensor entropy, Tensor lse, Tensor tile_lse, Tensor tile_tops, "
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? total_weight, *, "
    "str logit_map, bool want_total, int? ignore_index, ScalarType compute_dtype, int? workspace_mib, "
    "bool[] needs_grad, float approximate_mass=0.0, bool skip_ignored=False, bool want_max=False, "
    "bool want_entropy=False) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
_library.define(
    "scaled_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor coefficient, *, str logit_map, "
    "int? ignore_index, ScalarType compute_dtype, int? workspace_mib, bool[] needs_grad, "
    "float approximate_mass=0.0) "
    "-> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, Tensor units)"
)


def pays_in_forward(
    device: torch.device,
    compute_dtype: torch.dtype,
    approximate_mass: float,
    needs_grad_weight: bool,
    logit_map: LogitMap,
) -> bool:
    """Whether `scaled_loss` is the faster way, where both can be taken.

    Always where no Triton kernel computes the logits. Where one does, if the weight has a gradient, in whose memory
    something of the logits is kept: a sparse backward can use that only if it tells the slope of the map. In float16
    slopes need a bound, for gradients are kept in its range. On a CPU nothing is fast in float16.
    """
    float16 = compute_dtype == torch.float16
    if compute_dtype.itemsize > 2:
        return True
    if device.type != "cuda":
        return device.type == "cpu" and not float16
    known = approximate_mass == 0 or logit_map.slope_by_value is not None
    return needs_grad_weight and known and not (float16 and logit_map.slope_bound is None)


@contextlib.contextmanager
def _plain_context(tensor: Tensor) -> Iterator[None]:
    """On the tensor's GPU, and without ambient autocast: the operands have the dtypes that they should have."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode differentiation would find results without tangents here and take their derivatives for zero."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("forward-mode differentiation of a linear cross-entropy is not supported")


def _forward(implementation: Any, hidden: Tensor, *args: Any, **options: Any) -> Reductions:
    _refuse_tangents(hidden, *args)
    with _plain_context(hidden):
        return implementation.forward(Problem.of(hidden, *args, **options))


def _backward(
    implementation: Any,
    grad_lse: Tensor,
    grad_picked: Tensor,
    grad_total: Tensor,
    grad_maximum: Tensor | None,
    grad_entropy: Tensor | None,
    argmax: Tensor,
    entropy: Tensor,
    lse: Tensor,
    tile_lse: Tensor,
    tile_tops: Tensor,
    hidden: Tensor,
    *args: Any,
    needs_grad: list[bool],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    _refuse_tangents(grad_lse, grad_picked, grad_total, grad_maximum, grad_entropy, hidden, *args)
    grads = RowGradients(grad_lse, grad_picked, grad_total, grad_maximum, grad_entropy, argmax, entropy)
    lse, grads = lse.contiguous(), grads.map(Tensor.contiguous)
    with _plain_context(hidden):
        return implementation.backward(
            Problem.of(hidden, *args, **options), lse, Tiles(tile_lse, tile_tops), grads, needs_grad
        )


def _scaled_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    coefficient: Tensor,
    *,
    needs_grad: list[bool],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _refuse_tangents(hidden, weight, bias, coefficient)
    _check_coefficients(target, coefficient)
    with _plain_context(hidden):
        problem = Problem.of(hidden, weight, bias, target, None, want_total=False, skip_ignored=True, **options)
        return in_forward.loss_and_gradients(problem, coefficient.to(problem.accumulate_dtype), needs_grad)


def _check_coefficients(target: Tensor, coefficient: Tensor) -> None:
    if target.dim() != 1 or coefficient.dim() != 1:
        raise ValueError(f"a target and a coefficient a row are needed, got {target.dim()}-D and {coefficient.dim()}-D")


for _key, _implementation in (("CPU", cpu), ("CUDA", cuda)):
    _library.impl("vocab_reductions", functools.partial(_forward, _implementation), _key)
    _library.impl("vocab_reductions_backward", functools.partial(_backward, _implementation), _key)
    _library.impl("scaled_loss", _scaled_loss, _key)

vocab_reductions = torch.ops.cce_inductor.vocab_reductions.default
vocab_reductions_backward = torch.ops.cce_inductor.vocab_reductions_backward.default
scaled_loss = torch.ops.cce_inductor.scaled_loss.default


@torch.library.register_fake(f"{NAMESPACE}::vocab_reductions", lib=_library)
def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    total_weight: Tensor | None,
    *,
    compute_dtype: torch.dtype,
    logit_map: str,
    want_total: bool,
    approximate_mass: float = 0.0,
    want_max: bool = False,
    want_entropy: bool = False,
    **_: Any,
) -> Reductions:
    check(hidden, weight, bias, target, total_weight, compute_dtype)
    LogitMap.parse(logit_map)
    rows, sums = hidden.shape[0], accumulate_dtype(compute_dtype)
    picks = () if target is None else target.shape[1:]
    several = len(picks) > 0
    tiles = cuda.recorded_tiles(hidden.device, weight.shape[0], compute_dtype, want_total, several, approximate_mass)

    def vector(wanted: bool = True, dtype: torch.dtype = sums) -> Tensor:
        return hidden.new_empty((rows if wanted else 0,), dtype=dtype)

    return Reductions(
        lse=vector(),
        picked=hidden.new_empty((rows, *picks), dtype=sums),
        total=vector(),
        maximum=vector(want_max),
        argmax=vector(want_max, torch.int64),
        entropy=vector(want_entropy),
        lse_rest=vector(),
        tile_lse=hidden.new_empty((tiles, rows), dtype=torch.float32),
        tile_tops=hidden.new_empty((tiles, rows, 2), dtype=torch.int32),
    )


@torch.library.register_fake(f"{NAMESPACE}::vocab_reductions_backward", lib=_library)
def _backward_fake(
    grad_lse: Tensor,
    grad_picked: Tensor,
    grad_total: Tensor,
    grad_maximum: Tensor | None,
    grad_entropy: Tensor | None,
    argmax: Tensor,
    entropy: Tensor,
    lse: Tensor,
    tile_lse: Tensor,
    tile_tops: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *_: Any,
    needs_grad: list[bool],
    **__: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(hidden, weight, bias, needs_grad)


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    grad_hidden, grad_weight, grad_bias = (
        tensor.new_empty(tensor.shape if needed else 0)
        for tensor, needed in zip((hidden, weight, hidden if bias is None else bias), needs_grad, strict=True)
    )
    return grad_hidden, grad_weight, grad_bias


@torch.library.register_fake(f"{NAMESPACE}::scaled_loss", lib=_library)
def _scaled_loss_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    coefficient: Tensor,
    *,
    compute_dtype: torch.dtype,
    logit_map: str,
    needs_grad: list[bool],
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check(hidden, weight, bias, target, None, compute_dtype)
    _check_coefficients(target, coefficient)
    LogitMap.parse(logit_map)
    loss = hidden.new_empty((), dtype=accumulate_dtype(compute_dtype))
    units = loss.new_empty(2 if compute_dtype == torch.float16 else 0)
    return loss, *_empty_gradients(hidden, weight, bias, needs_grad), units


def _save_for_backward(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    lse, _, _, _, argmax, entropy, lse_rest, *tiles = output
    ctx.mark_non_differentiable(argmax, lse_rest, *tiles)
    ctx.set_materialize_grads(False)  # a maximum or an entropy that is only looked at costs the backward nothing
    ctx.save_for_backward(lse_rest, argmax, entropy, lse, *tiles, *inputs)
    ctx.options = keyword_only_inputs


def _gradients(
    ctx: Any,
    grad_lse: Tensor | None,
    grad_picked: Tensor | None,
    grad_total: Tensor | None,
    grad_maximum: Tensor | None,
    _: None,
    grad_entropy: Tensor | None,
    *__: None,
) -> tuple:
    needs_grad = list(ctx.needs_input_grad[:3])
    lse_rest, argmax, entropy, lse, tile_lse, tile_tops, *inputs = ctx.saved_tensors
    target = lse if inputs[3] is None else inputs[3]
    shaped_like = ((grad_lse, lse), (grad_picked, target), (grad_total, lse))
    grads = [lse.new_zeros(like.shape) if grad is None else grad for grad, like in shaped_like]
    # exp(x - lse - lse_rest) and x - lse - lse_rest without a pass over the logits
    scale = torch.exp(-lse_rest)
    grads[0] = grads[0] * scale
    grad_maximum = grad_maximum if ctx.options.get("want_max") else None
    grad_entropy = grad_entropy if ctx.options.get("want_entropy") else None
    if grad_entropy is not None:
        grad_entropy, entropy = grad_entropy * scale, entropy - lse_rest
    results = (grad_maximum, grad_entropy, argmax, entropy, lse, tile_lse, tile_tops)
    grads = vocab_reductions_backward(*grads, *results, *inputs, **ctx.options, needs_grad=needs_grad)
    return *(grad if needed else None for grad, needed in zip(grads, needs_grad, strict=True)), None, None


torch.library.register_autograd(
    f"{NAMESPACE}::vocab_reductions", _gradients, setup_context=_save_for_backward, lib=_library
)


def _no_double_backward(ctx: Any, *_: Tensor) -> tuple:
    raise NotImplementedError(
        "the gradient of a linear cross-entropy cannot be differentiated again by cce_inductor; "
        'compile with backend="inductor" where you need second derivatives'
    )


torch.library.register_autograd(f"{NAMESPACE}::vocab_reductions_backward", _no_double_backward, lib=_library)


def _save_gradients(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple) -> None:
    _, *grads, units = output
    needs_grad = keyword_only_inputs["needs_grad"]
    assert all(n or not i for i, n in zip(ctx.needs_input_grad, needs_grad, strict=False)), (
        "a gradient is not asked for"
    )
    ctx.mark_non_differentiable(*grads, units)
    ctx.save_for_backward(*inputs[:3], *grads, units)


class _Scaled(torch.autograd.Function):
    """A gradient times a number, as a function of what it is the gradient of, which can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, scale: Tensor, *_: Tensor | None) -> Tensor:
        return scaled(grad, scale, False)

    backward = staticmethod(_no_double_backward)


def _scale_gradients(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple:
    *saved, units = ctx.saved_tensors
    inputs, grads = saved[:3], saved[3:]
    scales = [grad_loss] * 3
    if len(units) > 0:
        of_hidden, of_weight = grad_loss * units
        scales = [of_hidden, of_weight, of_weight]
    may_reuse = hands_over()
    results = (
        (_Scaled.apply(grad, scale, *inputs) if torch.is_grad_enabled() else scaled(grad, scale, may_reuse))
        if needed
        else None
        for grad, scale, needed in zip(grads, scales, ctx.needs_input_grad[:3], strict=True)
    )
    return *results, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::scaled_loss", _scale_gradients, setup_context=_save_gradients, lib=_library
)


@register_flop_formula(torch.ops.cce_inductor.vocab_reductions)
def _forward_flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    """One matmul: 2 N V D."""
    return 2 * hidden[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.cce_inductor.vocab_reductions_backward)
def _backward_flops(
    grad_lse: torch.Size,
    grad_picked: torch.Size,
    grad_total: torch.Size,
    grad_maximum: torch.Size | None,
    grad_entropy: torch.Size | None,
    argmax: torch.Size,
    entropy: torch.Size,
    lse: torch.Size,
    tile_lse: torch.Size,
    tile_tops: torch.Size,
    hidden: torch.Size,
    weight: torch.Size,
    *_: Any,
    needs_grad: list[bool],
    **__: Any,
) -> int:
    """The logits again, and one matmul for each of the gradients of hidden and weight."""
    return 2 * hidden[0] * weight[0] * weight[1] * (1 + needs_grad[0] + needs_grad[1])


@register_flop_formula(torch.ops.cce_inductor.scaled_loss)
def _scaled_loss_flops(hidden: torch.Size, weight: torch.Size, *_: Any, needs_grad: list[bool], **__: Any) -> int:
    """The logits once, and one matmul for each of the gradients of hidden and weight."""
    return 2 * hidden[0] * weight[0] * weight[1] * (1 + needs_grad[0] + needs_grad[1])
