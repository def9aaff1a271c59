"""Logit maps: the language, its text, and value and derivative against autograd."""

import pickle

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cce_inductor.compat import CLAMP_IS_FLAT_AT_BOUNDS
from cce_inductor.logit_map import FUNCTIONS, STEEPEST, LogitMap, X, Z, clamped, constant, filled

NUMBERS = st.floats(0.1, 8.0).map(lambda x: round(x, 3))


@st.composite
def steps(draw):
    """One step of a chain of pointwise operations, of those that keep numbers moderate."""
    c = constant(draw(NUMBERS))
    return draw(
        st.sampled_from(
            (
                lambda x: x * c,
                lambda x: x / c,
                lambda x: c - x,
                lambda x: x + c,
                lambda x: c * sympy.tanh(x / c),
                lambda x: FUNCTIONS["sigmoid"][0](x),
                lambda x: sympy.exp(-((x / c) ** 2)),
                lambda x: 1 / (c + x**2),
                lambda x: clamped(x, -c, c, False),
                lambda x: clamped(x, None, c, True),
                lambda x: FUNCTIONS["where"][0](FUNCTIONS["gt"][0](x, c), c + (x - c) / 10, x),
            )
        )
    )


@st.composite
def maps(draw):
    result = LogitMap()
    for step in draw(st.lists(steps(), max_size=4)):
        result = result.then(step)
    return result


def evaluate(logit_map, z):
    """(f(z), f'(z)) with the derivative by autograd."""
    z = z.clone().requires_grad_()
    value = logit_map(z)
    if not value.requires_grad:
        return value, torch.zeros_like(z)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


@given(maps())
def test_value_and_derivative_agree_with_autograd(logit_map):
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    value, slope = logit_map.value_and_derivative(z)
    expected_value, expected_slope = evaluate(logit_map, z)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(torch.ones_like(z) if slope is None else slope, expected_slope, rtol=1e-6, atol=1e-9)


@given(maps())
def test_the_text_gives_the_map_back(logit_map):
    again = LogitMap.parse(str(logit_map))
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    assert str(LogitMap.parse(str(again))) == str(again)
    torch.testing.assert_close(again(z), logit_map(z), rtol=1e-12, atol=1e-12)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_survive_the_text_bit_for_bit(number):
    text = str(LogitMap().then(lambda x: x + constant(number)))
    assert float(LogitMap.parse(text).expr.subs(Z, 0)) == number


@pytest.mark.parametrize(
    "text",
    [
        "y",
        "sin(z)",
        "z.real",
        "__import__('os')",
        "z if z else z",
        "[z]",
        "'z'",
        "z @ z",
        "z, z",
        "z =",
        "True",
        "z**z if 1 else 2",
        "gt(z)",
        "where(z, z)",
        "z > 1",
    ],
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="logit map"):
        LogitMap.parse(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_constants_must_be_finite(value):
    with pytest.raises(ValueError, match="in the map of the logits"):
        constant(value)


@pytest.mark.parametrize(
    ("text", "affine"),
    [
        ("z", (1.0, 0.0)),
        ("2*z + 1", (2.0, 1.0)),
        ("z/4.0 - 3", (0.25, -3.0)),
        ("tanh(z)", None),
        ("3.0", None),
        ("z*z", None),
    ],
)
def test_affine_maps_are_known_as_such(text, affine):
    assert LogitMap.parse(text).affine() == affine


KNOWN = ("z", "2*z + 1", "30.0*tanh(z/30.0)", "4.0*tanh(0.25*z)", "3 - 5.0*tanh(z/10.0 + 1)", "8.0*sigmoid(z/4.0) - 1")


@pytest.mark.parametrize("text", KNOWN)
def test_the_slope_is_that_of_the_value(text):
    logit_map = LogitMap.parse(text)
    z = torch.linspace(-60, 60, 501, dtype=torch.float64)
    x, slope = logit_map.value_and_derivative(z)
    slope = torch.ones_like(z) if slope is None else slope
    by_value = sympy.lambdify(X, logit_map.slope_by_value)
    torch.testing.assert_close(torch.zeros_like(z) + by_value(x), slope, rtol=0, atol=1e-14)
    assert (by_value(x + 0.01) - slope).abs().max() <= 0.01 * (STEEPEST + 0.01)


@pytest.mark.parametrize(
    "text",
    [
        "3.0*tanh(z/3.0)",  # too steep
        "2.0*sigmoid(z)",
        "tanh(0.1*z) + 0.1*z",
        "0.1*z*tanh(z)",
        "tanh(0.1*z)**2",
        "9.0*tanh(z*z)",
        "4.0*tanh(z/8.0) + 4.0*tanh(z/9.0)",
        "where(gt(z, 1.0), 1.0, z)",
        "9.0*tanh(where(gt(z, 1.0), 1.0, z)/9.0)",
        "0.1*exp(z)",
        "3.0",
    ],
)
def test_slopes_that_a_value_says_too_little_of(text):
    assert LogitMap.parse(text).slope_by_value is None


def test_maps_are_equal_hashable_and_picklable_by_their_expression():
    one, two = LogitMap.parse("30.0*tanh(z/30.0)"), LogitMap.parse("tanh(z/30.0) * 30.0")
    assert one == two
    assert hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == one
    assert LogitMap.parse("z").is_identity
    assert not one.is_identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_values_keep_the_dtype(dtype):
    value, slope = LogitMap.parse("2.0*sigmoid(z) + 1").value_and_derivative(torch.ones(3, dtype=dtype))
    assert (value.dtype, slope.dtype) == (dtype, dtype)


def test_a_constant_map_has_a_zero_derivative_of_the_right_shape():
    value, slope = LogitMap.parse("3.0").value_and_derivative(torch.randn(4))
    assert torch.equal(value, torch.full((4,), 3.0))
    assert torch.equal(slope, torch.zeros(4))


@pytest.mark.parametrize(("text", "at_bound"), [("where(ge(z, 1.0), 1.0, z)", 0.0), ("where(gt(z, 1.0), 1.0, z)", 1.0)])
def test_the_derivative_at_a_bound_is_that_of_the_branch_taken(text, at_bound):
    z = torch.tensor([0.5, 1.0, 2.0])
    value, slope = LogitMap.parse(text).value_and_derivative(z)
    assert value.tolist() == [0.5, 1.0, 1.0]
    assert slope.tolist() == [1.0, at_bound, 0.0]


@pytest.mark.parametrize(
    ("function", "flat_bounds"), [(torch.clamp, CLAMP_IS_FLAT_AT_BOUNDS), (F.hardtanh, True)], ids=["clamp", "hardtanh"]
)
def test_clamp_at_its_bounds_and_of_nan_is_torchs(function, flat_bounds):
    z = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, torch.nan], requires_grad=True)
    expected = function(z, -1, 1)
    expected.sum().backward()
    value, slope = LogitMap(clamped(Z, sympy.Integer(-1), sympy.Integer(1), flat_bounds)).value_and_derivative(
        z.detach()
    )
    torch.testing.assert_close(value, expected.detach(), equal_nan=True)
    assert torch.equal(slope[:-1], z.grad[:-1])


@pytest.mark.parametrize("number", [-sympy.oo, sympy.Float(-5.0)])
def test_a_filled_map_has_the_number_where_a_bias_marks_it(number):
    logit_map = LogitMap(filled(sympy.tanh(Z), number))
    assert str(LogitMap.parse(str(logit_map))) == str(logit_map)
    value, slope = logit_map.value_and_derivative(torch.tensor([-torch.inf, 0.0, torch.nan]))
    assert value[:2].tolist() == [float(number), 0.0]
    assert slope[:2].tolist() == [0.0, 1.0]
    assert value[2].isnan()
    assert filled(logit_map.expr, number) == logit_map.expr
    assert filled(logit_map.expr, sympy.Float(2.0)) is None
    assert filled(2 * logit_map.expr, number) is None
