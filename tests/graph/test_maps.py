"""Pointwise maps between matmul and loss are composed into one expression, and biases into one vector."""

import pytest
import torch
import torch.nn.functional as F
from helpers import EVERYTHING, D, S, V, bias, check, hidden, labels, weight

from cce_inductor.compat import CLAMP_IS_FLAT_AT_BOUNDS
from cce_inductor.graph.driver import rewrite_module

BEYOND = "ge" if CLAMP_IS_FLAT_AT_BOUNDS else "gt"
# map -> the expression that the report should show, None where only the result matters
MAPS = {
    "mul": (lambda x: x * 0.5, "0.5*z"),
    "mul_left": (lambda x: 0.5 * x, "0.5*z"),
    "mul_method": (lambda x: x.mul(0.5), "0.5*z"),
    "mul_function": (lambda x: torch.mul(x, 0.5), "0.5*z"),
    "mul_keywords": (lambda x: torch.mul(input=x, other=0.5), "0.5*z"),
    "div_keyword": (lambda x: x.div(other=2.0), "0.5*z"),
    "mul_int": (lambda x: 2 * x, "2*z"),
    "div": (lambda x: x / 4.0, "0.25*z"),
    "div_int": (lambda x: x / 2, None),
    "div_method": (lambda x: x.div(4.0), "0.25*z"),
    "true_divide": (lambda x: torch.true_divide(x, 4.0), "0.25*z"),
    "neg": (lambda x: -x, "-z"),
    "neg_function": (lambda x: torch.neg(x), "-z"),
    "add_number": (lambda x: x + 1.5, "z + 1.5"),
    "add_number_left": (lambda x: 1.5 + x, "z + 1.5"),
    "sub_number": (lambda x: x - 1.5, "z - 1.5"),
    "tanh": (lambda x: torch.tanh(x), "tanh(z)"),
    "sigmoid": (lambda x: torch.sigmoid(x), "sigmoid(z)"),
    "sigmoid_method": (lambda x: x.sigmoid(), "sigmoid(z)"),
    "softcap": (lambda x: 5 * torch.tanh(x / 5), None),
    "softcap_right": (lambda x: (x / 5).tanh() * 5, None),
    "softcap_gemma": (lambda x: torch.tanh(x / 4.0) * 4.0, "4.0*tanh(0.25*z)"),
    "two_maps": (lambda x: torch.sigmoid(3 * torch.tanh(x)) * 7, "7*sigmoid(3*tanh(z))"),
    "shifted": (lambda x: (x + 1) * 2 - 3, None),
    "there_and_back": (lambda x: x * 4.0 / 4.0, None),
    "number_minus": (lambda x: 1.0 - x, None),
    "number_over": (lambda x: 1.0 / (torch.sigmoid(x) + 2), None),
    "exp": (lambda x: torch.exp(x / 4), "exp(z/4)"),
    "square": (lambda x: x.square(), "z**2"),
    "abs": (lambda x: x.abs(), None),
    "pow": (lambda x: x**3 / 9, None),
    "relu": (lambda x: torch.relu(x), "where(gt(z, 0), z, 0)"),
    "relu_in_place": (lambda x: F.relu(x, inplace=True), None),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), None),
    "silu": (lambda x: F.silu(x), None),
    "swish_by_hand": (lambda x: x * torch.sigmoid(x), None),
    "squared_by_hand": (lambda x: x * x, "z**2"),
    "residual": (lambda x: x + torch.tanh(x), None),
    "difference": (lambda x: torch.tanh(x) - 0.5 * x, None),
    "ratio": (lambda x: x / (1 + torch.exp(-x)), None),
    "clamp": (lambda x: x.clamp(-1.5, 1.5), None),
    "clamp_keywords": (lambda x: torch.clamp(x, max=1.0), f"where({BEYOND}(z, 1.0), 1.0, z)"),
    "clamp_min": (lambda x: x.clamp_min(-1), None),
    "clamp_max": (lambda x: torch.clamp_max(x, 1), None),
    "clip": (lambda x: x.clip(min=-0.5), None),
    "hardtanh": (lambda x: F.hardtanh(x, -2.0, 2.0), None),
    "leaky_clamp": (lambda x: torch.where(x > 1, 1 + 0.1 * (x - 1), x), None),
    "leaky_clamp_of_both_sides": (lambda x: torch.where(x < -1, -1 + 0.1 * (x + 1), x.clamp(max=2)), None),
    "chosen_constant": (lambda x: torch.where(x >= 0.5, x, 0.5), None),
    "chosen_branch": (lambda x: torch.where(x <= 0, torch.tanh(x), x * 0.5), None),
    "sigmoid_cap": (lambda x: 15 * torch.sigmoid((x + 5) / 7.5), None),
}


@pytest.mark.parametrize(("function", "text"), MAPS.values(), ids=MAPS)
def test_map(function, text):
    def program(h, w, b, t):
        return F.cross_entropy(function(F.linear(h, w, b)).view(-1, V), t.view(-1))

    ours = check(program, hidden(), weight(), bias(), labels())
    if text is not None:
        assert ours.report.rewritten[0].logit_map == text


@pytest.mark.parametrize("where", ["before", "after", "both"])
def test_softcap_before_or_after_the_upcast(where):
    def softcap(x):
        return 5.0 * torch.tanh(x / 5.0)

    def program(h, w, t):
        logits = F.linear(h, w)
        logits = softcap(logits) if where != "after" else logits
        logits = logits.float()
        logits = softcap(logits) if where != "before" else logits
        return F.cross_entropy(logits.view(-1, V), t.view(-1))

    check(program, hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), labels())


SCALES = {
    "mul": lambda x, s: x * s,
    "mul_left": lambda x, s: s * x,
    "div": lambda x, s: x / s,
    "div_method": lambda x, s: x.div(s),
    "mul_exp": lambda x, s: x * s.exp(),
    "after_a_number": lambda x, s: (0.5 * x) * s,
}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_scale_by_a_learned_number(scale, shape):
    """It moves to the hidden states and the bias, and gets its own gradient."""

    def program(h, w, b, s, t):
        return F.cross_entropy(scale(F.linear(h, w, b), s).view(-1, V), t.view(-1))

    factor = torch.full(shape, 1.25, requires_grad=True)
    ours = check(program, hidden(), weight(), bias(), factor, labels())
    assert ours.gradients[3].shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_in_another_dtype_than_the_hidden_states(dtype):
    def program(h, w, s, t):
        return F.cross_entropy((F.linear(h, w) * s).view(-1, V), t.view(-1))

    factor = torch.tensor([1.25], dtype=dtype, requires_grad=True)
    check(program, hidden(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), factor, labels())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 2, 1.0])
def test_temperature_as_an_argument(temperature, dynamic):
    """Under dynamic=True a float argument becomes a value of the graph."""

    def program(h, w, t, temperature):
        return F.cross_entropy((F.linear(h, w) / temperature).view(-1, V), t.view(-1))

    check(program, hidden(), weight(), labels(), temperature, dynamic=dynamic)


class Capped(torch.nn.Module):
    """Gemma 2: under dynamic=True its number becomes an input of the graph."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(D, V, bias=False)
        self.cap = 5.0

    def forward(self, h, t):
        logits = self.cap * torch.tanh(self.head(h) / self.cap) + self.cap
        return F.cross_entropy(logits.view(-1, V), t.view(-1))


def test_numbers_of_a_model_are_constants_until_they_change():
    reports = []

    def backend(module, inputs):
        reports.append(rewrite_module(module, EVERYTHING))
        return module.forward

    model = Capped()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    for cap, batch, graphs in ((5.0, 2, 1), (5.0, 4, 1), (3.0, 4, 2), (3.0, 5, 2)):
        model.cap = cap
        h, t = hidden(batch, S, D), labels(batch, S)
        assert torch.allclose(compiled(h, t), model(h, t), rtol=V * 2**-23)
        assert len(reports) == graphs
    assert all(len(report.rewritten) == 1 for report in reports)


def test_numbers_of_a_program_that_is_not_rewritten_stay_dynamic():
    graphs = []

    def backend(module, inputs):
        graphs.append(rewrite_module(module, EVERYTHING))
        return module.forward

    def program(h, w, number):
        return torch.tanh(F.linear(h, w)) * number

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=backend, dynamic=True)
    for number in (0.5, 1.5, 2.5):
        compiled(hidden(), weight(), number)
    assert len(graphs) == 1


def test_scale_by_a_dynamic_size():
    def program(h, w, t):
        return F.cross_entropy((F.linear(h, w) * t.size(1)).view(-1, V), t.view(-1))

    check(program, hidden(), weight(), labels(), dynamic=True)


BIASES = {
    "vector": (lambda x, b: x + b, (V,)),
    "vector_left": (lambda x, b: b + x, (V,)),
    "row": (lambda x, b: x + b, (1, V)),
    "block": (lambda x, b: x + b, (1, 1, V)),
    "function": (lambda x, b: torch.add(x, b), (V,)),
    "method": (lambda x, b: x.add(b), (V,)),
    "subtracted": (lambda x, b: x - b, (V,)),
    "before_a_scale": (lambda x, b: (x + b) * 3.0, (V,)),
    "after_a_scale": (lambda x, b: x / 3.0 + b, (V,)),
    "between_scales": (lambda x, b: (x * 2.0 + b) * 0.25, (1, V)),
    "before_a_softcap": (lambda x, b: torch.tanh(x + b) * 4, (V,)),
    "after_a_number": (lambda x, b: (x + 1.0) + b, (V,)),
    "after_negation": (lambda x, b: b - (-x) if False else (-x) + b, (V,)),
    "after_the_rows_are_flat": (lambda x, b: x.flatten(0, 1) + b, (V,)),
    "twice": (lambda x, b: x + b + b, (V,)),
    "an_expression": (lambda x, b: x + (b * 2).exp(), (V,)),
    "alpha": (lambda x, b: torch.add(x, b, alpha=2), (V,)),
    "subtracted_with_alpha": (lambda x, b: torch.sub(x, b, alpha=0.5), (V,)),
    "minus_the_logits": (lambda x, b: b - x, (V,)),
    "in_place": (lambda x, b: x.add_(b), (V,)),
}


@pytest.mark.parametrize("with_argument", [False, True], ids=["alone", "beside_a_bias_argument"])
@pytest.mark.parametrize(("add", "shape"), BIASES.values(), ids=BIASES)
def test_bias(add, shape, with_argument):
    def program(h, w, b, c, t):
        logits = add(F.linear(h, w, c if with_argument else None), b)
        return F.cross_entropy(logits.view(-1, V), t.view(-1)) + c.sum()

    check(program, hidden(), weight(), bias(*shape), bias().detach().flip(0).requires_grad_(), labels())


CLASS_SCALES = {
    "mul": lambda x, s: x * s,
    "div": lambda x, s: x / (s.abs() + 1),
    "in_float32": lambda x, s: x.float() * (s.float() * 2.0),
    "before_a_softcap": lambda x, s: 5 * torch.tanh(x * s / 5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", CLASS_SCALES.values(), ids=CLASS_SCALES)
def test_scale_by_a_learned_vector(scale, dtype):
    """One number for each class: it moves to the weight."""

    def program(h, w, b, s, t):
        return F.cross_entropy(scale(F.linear(h, w, b), s).view(-1, V), t.view(-1))

    factors = torch.linspace(0.5, 2.0, V).to(dtype).requires_grad_()
    check(program, hidden(dtype=dtype), weight(dtype=dtype), bias(dtype=dtype), factors, labels())


class Marian(torch.nn.Module):
    """Adds a [1, V] buffer to the logits."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, V, bias=False)
        self.register_buffer("final_logits_bias", torch.linspace(-1, 1, V).view(1, V))
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, h, t):
        logits = self.head(h) * self.scale + self.final_logits_bias
        return F.cross_entropy(logits.view(-1, V), t.view(-1))


def test_bias_in_a_buffer():
    torch.manual_seed(0)
    check(lambda model, h, t: model(h, t), Marian(), hidden(), labels())


def test_bias_wider_than_the_logits():
    """Type promotion: bfloat16 logits and a float32 bias make a float32 loss."""

    def program(h, w, b, t):
        return F.cross_entropy((F.linear(h, w) + b).view(-1, V), t.view(-1))

    half = torch.bfloat16
    ours = check(program, hidden(dtype=half), weight(dtype=half), bias(), labels())
    assert ours.outputs[0].dtype == torch.float32


def test_the_bias_gets_its_gradient_in_its_own_shape():
    def program(h, w, b, t):
        return F.cross_entropy((F.linear(h, w) + b).view(-1, V), t.view(-1))

    ours = check(program, hidden(), weight(), bias(1, V), labels())
    assert ours.gradients[2].shape == (1, V)


REFUSED = {
    "bias_after_softcap": (lambda x, b: torch.tanh(x) + b, "after a non-linear map"),
    "scale_tensor_after_softcap": (lambda x, b: torch.tanh(x) * b.sum(), "scalar tensor scales the logits after"),
    "scale_by_rows": (lambda x, b: x * x.new_ones(x.size(1), 1), "differs from row to row"),
    "vector_after_softcap": (lambda x, b: torch.tanh(x) * b, "scale first"),
    "divided": (lambda x, b: b / (x + 100), "divided by the logits"),
    "shifted_rows": (lambda x, b: x * x[:, :1], "other rows, are combined"),
    "compared_with_a_vector": (lambda x, b: torch.where(b > x, 0.0, x), "only a boolean mask [V]"),
    "chosen_tensor": (lambda x, b: torch.where(x > 0, x, b), "choose numbers"),
    "clamped_by_a_tensor": (lambda x, b: x.clamp(max=b), "clamp them by numbers"),
    "error_function": (lambda x, b: x.erf(), "`erf` of the logits is not understood"),
    "fractional_power": (lambda x, b: (x * 0 + 1) ** 0.5, "no whole number"),
    "infinite": (lambda x, b: x * 1e400, "inf"),
    "alpha": (lambda x, b: torch.add(b, x, alpha=2), "alpha"),
    "rows_of_numbers": (lambda x, b: x + x.new_ones(x.size(1), 1), "differs from row to row"),
    "rounding": (lambda x, b: torch.div(x, 2.0, rounding_mode="floor"), "rounding"),
    "unknown_keyword": (lambda x, b: torch.mul(x, 2.0, out=torch.empty_like(x)), "in a way that is not understood"),
}


@pytest.mark.parametrize(("function", "reason"), REFUSED.values(), ids=REFUSED)
def test_maps_that_are_left_alone(function, reason):
    def program(h, w, b, t):
        return F.cross_entropy(function(F.linear(h, w), b).view(-1, V), t.view(-1)) + 0 * b.sum()

    grad = function is not REFUSED["unknown_keyword"][0]
    args = (hidden(requires_grad=grad), weight(requires_grad=grad), bias(requires_grad=grad), labels())
    ours = check(program, *args, rewrites=0, calls=0, refusals=1, logits_in_memory=True)
    assert reason in str(ours.report.refused[0])
