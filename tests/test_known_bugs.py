"""What went wrong in other implementations of this loss, and what is easy to get wrong, each as one test.

`both_ways` holds a program against eager PyTorch on the two public surfaces: rewritten by the compiler pass, and as a
call of `linear_cross_entropy`. Bugs that have tests elsewhere: wrong gradients for reduction="none" and a batch without
a valid token (test_api.py, graph/test_loss_forms.py), offsets above 2^31 (ops/test_gpu.py), a target's logit above the
log-sum-exp (ops/test_implementations.py), returned logits that are None or raise (graph/test_returned_logits.py),
refusals without a word (graph/test_refusals.py), -inf logits of masked classes (graph/test_masks.py).
"""

import copy
import importlib
import pkgutil

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from helpers import B, D, S, V, assert_close_to_eager, bias, check, hidden, labels, nodes_of, weight
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from triton.runtime.autotuner import Autotuner

import cce_inductor.kernels
from cce_inductor import capture_reports, linear_cross_entropy
from cce_inductor.kernels.forward import forward_kernel
from cce_inductor.ops import cpu

OPTIONS = {"min_vocab": 0, "min_logits_bytes": 0, "min_flops": 0}
gpu = pytest.mark.gpu


def both_ways(h, w, t, b=None, **options):
    """Ours is no further from float64 than eager, compiled and called; gives the loss."""

    def eager(h, w, b, t):
        return F.cross_entropy(F.linear(h, w, b).flatten(0, -2), t.flatten(), **options)

    def ours(h, w, b, t):
        return linear_cross_entropy(h.flatten(0, -2), w, t.flatten(), linear_bias=b, **options)

    check(eager, h, w, b, t, logits_in_memory=True)
    return assert_close_to_eager(ours, eager, (h, w, b, t))


def compiled(function, backend="cce", **how):
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, options=OPTIONS if backend == "cce" else None, **how)


def mean_loss(h, w, t):
    return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten())


# ------------------------------------------------------------------------------- design: what others got wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bias_is_added_once_to_the_targets_logit(dtype):
    """Added twice, it makes losses negative."""
    b = torch.full((V,), 3.0, dtype=dtype)
    b[::2] = 20.0
    loss = both_ways(hidden(dtype=dtype), weight(dtype=dtype), labels(), b.requires_grad_(), reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_losses_of_certain_rows_are_not_negative(dtype):
    w = 4 * weight(dtype=dtype, requires_grad=False)
    t = labels()
    h = (4 * w[t]).requires_grad_()
    loss = both_ways(h, w.requires_grad_(), t, reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, V - 1, V, 10**6])
def test_any_ignore_index_is_heeded(ignore_index):
    both_ways(hidden(), weight(), labels(ignored=ignore_index), ignore_index=ignore_index)


def test_an_ignore_index_is_heeded_by_the_compiled_backend():
    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten(), ignore_index=-1)

    with capture_reports() as reports:
        assert_close_to_eager(compiled(program), program, (hidden(), weight(), labels(ignored=-1)))
    assert [len(report.rewritten) for report in reports] == [1]


def test_the_weights_gradient_keeps_its_precision_however_many_blocks_it_is_summed_over(monkeypatch):
    """Summed over blocks of rows in bfloat16, its error would grow with their number."""
    h, w, t = hidden(1024, D, dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels(1024)
    [exact] = torch.autograd.grad(mean_loss(h.double(), w64 := w.detach().double().requires_grad_(), t), w64)

    def error(gradient):
        return (gradient.double() - exact).norm() / exact.norm()

    def ours(rows):
        monkeypatch.setattr(cpu, "BLOCK_ROWS", rows)
        return error(torch.autograd.grad(linear_cross_entropy(h, w, t), w)[0])

    few, many = ours(128), ours(4)
    assert many <= 1.1 * few
    rounded = torch.zeros_like(w)  # what is not done
    for rows in torch.arange(1024).split(4):
        rounded += torch.autograd.grad(linear_cross_entropy(h[rows], w, t[rows], reduction="sum"), w)[0] / 1024
    assert error(rounded) > 1.5 * many


def test_every_class_gets_its_gradient():
    """None is rounded to zero or filtered out, on a CPU."""
    h, w, t = hidden(), 0.1 * weight(V, D), labels()
    w = w.detach().requires_grad_()
    [gradient] = torch.autograd.grad(linear_cross_entropy(h, w, t), w)
    assert gradient.abs().amax(1).min() > 0


@gpu
@pytest.mark.parametrize("scale", [0.01, 1.0], ids=["untrained", "trained"])
def test_every_class_gets_its_gradient_from_the_approximate_backward(scale):
    """A filter would leave a tenth of the classes without; here what is skipped is put back. Eager is the measure."""
    torch.manual_seed(0)
    rows, vocab, width = 8192, 65536, 1024  # large enough for the sparse backward
    h = (scale * torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    w = (0.3 * torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)).requires_grad_()
    t = torch.randint(0, vocab, (rows,), device="cuda")
    [ours] = torch.autograd.grad(linear_cross_entropy(h, w, t), w)
    [eagers] = torch.autograd.grad(mean_loss(h, w, t), w)
    missing = ((ours.abs().amax(1) == 0) & (eagers.abs().amax(1) > 0)).float().mean()
    assert missing == 0


def test_no_kernel_is_inlined_into_inductors_code():
    """There its arguments would be Inductor's to type, Python floats as float64; an operator is called as it is."""
    ours = check(mean_loss, hidden(), weight(), labels())
    targets = {str(node.target) for module in ours.modules for node in nodes_of(module)}
    assert not any("triton" in target for target in targets)


def test_nothing_is_tuned_at_run_time():
    """Tile shapes come from a table; a tuner would run again for every new length."""
    for module in pkgutil.iter_modules(cce_inductor.kernels.__path__):
        members = vars(importlib.import_module(f"cce_inductor.kernels.{module.name}"))
        assert not any(isinstance(member, Autotuner) for member in members.values())


@gpu
def test_new_lengths_compile_no_new_kernels():
    w = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def run(rows):
        h = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        linear_cross_entropy(h, w, torch.randint(0, 5000, (rows,), device="cuda")).backward()
        return sum(len(cache[0]) for cache in forward_kernel.device_caches.values())

    kernels = [run(rows) for rows in (512, 513, *range(514, 700, 9))]
    assert kernels[-1] == kernels[1], "one for multiples of 16, one for the others"


def test_the_number_of_valid_tokens_is_not_read():
    """No `.item()`, no `nonzero()`: neither a graph break nor a wait for the GPU."""
    seen = []

    def lower(module, inputs):
        def compiler(graph, _):
            seen.extend(str(node.target) for node in nodes_of(graph))
            return make_boxed_func(graph.forward)

        return aot_module_simplified(module, inputs, fw_compiler=compiler)

    check(mean_loss, hidden(), weight(), labels(ignored=-100), lower=lower, fullgraph=True)
    assert any("cce_inductor" in target for target in seen)
    assert not any(name in target for target in seen for name in ("nonzero", "_local_scalar_dense", "masked_select"))


@gpu
def test_a_compiled_training_step_does_not_wait_for_the_gpu():
    h = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(32000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    t = torch.randint(0, 32000, (4096,), device="cuda")
    t[::3] = -100
    step = compiled(mean_loss)
    step(h, w, t).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(h, w, t).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Head(nn.Module):
    """Tied: embedding and classifier are one parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return mean_loss(self.embed(ids).tanh(), self.head.weight, ids)


def test_a_model_is_not_touched():
    """Its parameters stay the same objects with their attributes, its methods and names its own."""
    model = Head()
    model.head.weight.tensor_model_parallel = True
    before = dict(model.named_parameters()), list(model.state_dict()), type(model).forward, dict(vars(model.head))
    step = compiled(model)
    with capture_reports() as reports:
        step(labels()).backward()
    assert [len(report.rewritten) for report in reports] == [1]
    after = dict(model.named_parameters()), list(model.state_dict()), type(model).forward, dict(vars(model.head))
    assert after[1:] == before[1:]
    assert all(after[0][name] is parameter for name, parameter in before[0].items())
    assert model.head.weight is model.embed.weight
    assert model.head.weight.tensor_model_parallel
    assert "forward" not in vars(model)


# --------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("way", ["compiled", "called"])
def test_a_second_backward_through_a_retained_graph_gives_the_same_again(way):
    step = compiled(mean_loss) if way == "compiled" else linear_cross_entropy
    h, w, t = hidden(), weight(), labels()
    loss = step(h, w, t)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (h, w))))


def test_second_derivatives_of_a_compiled_loss_are_an_error():
    """AOTAutograd's, which is clear; `linear_cross_entropy` has its own (test_api.py)."""
    h, w, t = hidden(), weight(), labels()
    [gradient] = torch.autograd.grad(compiled(mean_loss)(h, w, t), h, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


TRANSFORMS = {
    "grad": lambda f, h: torch.func.grad(f)(h),
    "grad_and_value": lambda f, h: torch.func.grad_and_value(f)(h),
    "vjp": lambda f, h: torch.func.vjp(f, h)[1](torch.ones(())),
    "jvp": lambda f, h: torch.func.jvp(f, (h,), (h,)),
    "jacrev": lambda f, h: torch.func.jacrev(f)(h),
    "jacfwd": lambda f, h: torch.func.jacfwd(f)(h),
    "hessian": lambda f, h: torch.func.hessian(f)(h),
    "vmap of grad": lambda f, h: torch.func.vmap(torch.func.grad(lambda scale: f(scale * h)))(torch.ones(2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_function_transforms_say_that_they_are_not_supported(transform, compile):
    w, t = weight(requires_grad=False), labels()

    def program(h):
        return transform(lambda h: linear_cross_entropy(h, w, t), h)

    torch._dynamo.reset()
    program = torch.compile(program, backend="eager") if compile else program
    with pytest.raises(NotImplementedError, match=r"does not support torch\.func\.grad"):
        program(hidden(requires_grad=False))


def test_forward_mode_does_not_take_the_derivative_for_zero():
    h, w, t = hidden(requires_grad=False), weight(requires_grad=False), labels()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(h, torch.ones_like(h))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            linear_cross_entropy(dual, w, t)
        assert not linear_cross_entropy(h, w, t).isnan(), "nothing here has a tangent"


def test_vmap_gives_what_a_loop_gives():
    h, w, t = hidden(), weight(), labels()
    losses = torch.func.vmap(lambda h, t: linear_cross_entropy(h, w, t))(h, t)
    expected = torch.stack([linear_cross_entropy(*pair) for pair in zip(h, [w] * B, t, strict=True)])
    for mine, theirs in zip(
        (losses, *torch.autograd.grad(losses.sum(), (h, w))),
        (expected, *torch.autograd.grad(expected.sum(), (h, w))),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_gradients_accumulate_over_micro_batches():
    model, batches = Head(), [labels(B, S), labels(B, S) // 2, labels(B, S) // 3]
    eager = copy.deepcopy(model)
    step = compiled(model)
    for ids in batches:
        (step(ids) / len(batches)).backward()
        (eager(ids) / len(batches)).backward()
    torch.testing.assert_close(model.head.weight.grad, eager.head.weight.grad)


# ----------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("way", ["compiled", "called"])
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**14, 2.0**18, 2.0**24, 2.0**40])
def test_a_gradient_scaler_sees_an_overflow_exactly_when_it_does_in_eager(way, scale):
    """The gradient of a float16 loss, scaled, is inf or nan in the same operands as eager's."""

    def program(h, w, t):
        return F.cross_entropy(F.linear(h, w).flatten(0, -2).float(), t.flatten(), reduction="sum")

    def called(h, w, t):
        with torch.autocast("cpu", torch.float16):
            return linear_cross_entropy(h, w, t, reduction="sum")

    h, w, t = hidden(dtype=torch.float16), weight(dtype=torch.float16), labels()
    ours = called if way == "called" else None
    if way == "compiled":
        run = check(program, h, w, t)
        assert len(run.report.rewritten) == 1
        ours = compiled(program, dynamic=False)
    given = torch.autograd.grad(ours(h, w, t) * scale, (h, w))
    expected = torch.autograd.grad(program(h, w, t) * scale, (h, w))
    for mine, theirs in zip(given, expected, strict=True):
        assert mine.isfinite().all() == theirs.isfinite().all()
    assert (scale >= 2.0**14) == (not expected[1].isfinite().all()), "both kinds are tried"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_whose_logits_are_all_equal(dtype):
    """The loss is the log of the number of classes; the gradient is uniform but for the target."""
    h = torch.zeros(B, S, D, dtype=dtype, requires_grad=True)
    loss = both_ways(h, weight(dtype=dtype), labels())
    torch.testing.assert_close(loss, torch.tensor(float(V)).log().to(dtype))
    same = weight(1, D, dtype=dtype, requires_grad=False).expand(V, D).contiguous().requires_grad_()
    both_ways(hidden(dtype=dtype), same, labels())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(dtype, size):
    h = torch.full((B, S, D), 100.0, dtype=dtype)
    w = (size / (100 * D) * (1 + weight(requires_grad=False) / 8)).to(dtype)
    loss = both_ways(h.requires_grad_(), w.requires_grad_(), labels(), reduction="none")
    assert loss.isfinite().all()
    assert loss.max() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab", "width"), [(1, D), (V, 1), (1, 1), (2, 1)])
def test_one_class_or_a_width_of_one(vocab, width, dtype):
    h, w = hidden(B, S, width, dtype=dtype), weight(vocab, width, dtype=dtype)
    loss = both_ways(h, w, labels(classes=vocab), bias(vocab, dtype=dtype))
    assert vocab > 1 or loss == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(rows, reduction):
    both_ways(hidden(rows, 1, D), weight(), labels(rows, 1), bias(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("share", [2, 1], ids=["every second", "all"])
def test_class_weights_of_zero(share, smoothing, reduction):
    """The mean over no weight at all is nan, as in eager."""
    c = torch.linspace(0.1, 2.0, V)
    c[::share] = 0
    options = {"label_smoothing": smoothing, "reduction": reduction}

    def eager(h, w, t, c):
        return F.cross_entropy(F.linear(h, w).flatten(0, -2), t.flatten(), weight=c, **options)

    def ours(h, w, t, c):
        return linear_cross_entropy(h.flatten(0, -2), w, t.flatten(), weight=c, **options)

    check(eager, hidden(), weight(), labels(), c)
    assert_close_to_eager(ours, eager, (hidden(), weight(), labels(), c))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_label_smoothing_of_one(reduction):
    both_ways(hidden(), weight(), labels(ignored=-100), bias(), label_smoothing=1.0, reduction=reduction)


# ---------------------------------------------------------------------------------------------------- operands


def test_a_weight_with_a_storage_offset():
    storage = torch.randn(3 + V * D, generator=torch.Generator().manual_seed(0))
    w = storage[3:].view(V, D)
    assert w.storage_offset() == 3
    both_ways(hidden(), w.requires_grad_(), labels())


def test_operands_that_share_their_storage():
    """Hidden states and weight are parts of one flat buffer, as under a sharding wrapper; another step overlaps."""
    flat = torch.randn((B * S + V) * D, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def program(flat, t):
        h, w = flat[: B * S * D].view(B, S, D), flat[B * S * D :].view(V, D)
        return mean_loss(h, w, t)

    def overlapping(flat, t):
        return mean_loss(flat[: B * S * D].view(B, S, D), flat[D : D + V * D].view(V, D), t)

    check(program, flat, labels(), logits_in_memory=True)
    check(overlapping, flat, labels(), logits_in_memory=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32], ids=str)
def test_targets_of_every_dtype_do_what_they_do_in_other_compiled_programs(dtype):
    """Inductor allows others than eager, whose errors `linear_cross_entropy` has (test_api.py)."""
    given = hidden(B * S, D), weight(), labels(B * S).clamp(max=1).to(dtype)

    def outcome(backend):
        try:
            return compiled(mean_loss, backend)(*given)
        except Exception as error:
            return type(error)

    theirs, ours = outcome("inductor"), outcome("cce")
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs)
    else:
        assert ours is theirs


@pytest.mark.parametrize("place", ["input", "linear_weight", "target", "linear_bias", "weight"])
def test_operands_on_different_devices_are_an_error(place):
    arguments = {"input": hidden(), "linear_weight": weight(), "target": labels(), "linear_bias": bias()}
    arguments["weight"] = torch.ones(V)
    arguments[place] = arguments[place].to("meta")
    with pytest.raises(RuntimeError, match=r"on the same device, but found cpu, meta|not on the expected device"):
        linear_cross_entropy(
            arguments.pop("input"), arguments.pop("linear_weight"), arguments.pop("target"), **arguments
        )


def test_operands_that_are_all_on_the_meta_device():
    """No memory, but shape and dtype."""
    h, w, t = (tensor.to("meta") for tensor in (hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels()))
    loss = linear_cross_entropy(h, w, t, reduction="none")
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", t.shape, torch.bfloat16)


@gpu
@pytest.mark.parametrize("place", ["input", "linear_weight", "target"])
def test_operands_on_a_gpu_and_a_cpu_are_an_error(place):
    arguments = {"input": hidden(), "linear_weight": weight(), "target": labels()}
    arguments = {name: tensor.to("cpu" if name == place else "cuda") for name, tensor in arguments.items()}
    with pytest.raises(RuntimeError, match="on the same device"):
        linear_cross_entropy(*arguments.values())
    with pytest.raises(Exception, match=r"same device|different device|two devices"):
        compiled(mean_loss)(*arguments.values())


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["equal", "1e4", "V=1", "D=1", "N=0", "N=1", "-inf bias", "certain"])
def test_odd_numbers_and_shapes_on_a_gpu(case, dtype):
    """Loss and gradients of the kernels against float64, no further from it than eager and some roundings."""
    torch.manual_seed(0)
    rows = {"N=0": 0, "N=1": 1}.get(case, 40)
    vocab, width = 1 if case == "V=1" else 300, 1 if case == "D=1" else 64
    h, w = torch.randn(rows, width), torch.randn(vocab, width)
    b = torch.randn(vocab)
    t = torch.randint(0, vocab, (rows,))
    if case == "equal":
        w, b = w[:1].expand(vocab, width), torch.zeros(vocab)
    elif case == "1e4":
        h, w = 100 * torch.ones_like(h), 1.5 * (1 + w / 8)
    elif case == "-inf bias":
        b[1::2] = -torch.inf
        t = t // 2 * 2
    elif case == "certain":
        h = 4 * w[t]
    given = [x.to("cuda", dtype) for x in (h, w, b)]
    t = t.cuda()

    def gradients(function, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        loss = function(*leaves, t)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours(h, w, b, t):
        return linear_cross_entropy(h, w, t, linear_bias=b, reduction="sum")

    def eager(h, w, b, t):
        return F.cross_entropy(F.linear(h, w, b), t, reduction="sum")

    runs = gradients(ours, given), gradients(eager, given), gradients(eager, [x.double() for x in given])
    for mine, theirs, exact in zip(*runs, strict=True):
        assert torch.equal(mine.isfinite(), exact.isfinite())
        error, eagers = ((x.double() - exact).nan_to_num().norm() for x in (mine, theirs))
        assert error <= eagers + 2 * torch.finfo(dtype).eps * exact.nan_to_num().norm()
