"""One frozen dataclass, validated, that may be mixed with Inductor's options."""

import dataclasses

import pytest
import torch

from cce_inductor import Options
from cce_inductor.graph.driver import rewrite_module

DEFAULTS = {
    "mode": None,
    "min_vocab": 4096,
    "min_logits_bytes": 16 << 20,
    "min_flops": 10**12,
    "workspace_mib": None,
    "on_refusal": "log",
    "approximate_mass": 2**-4,
    "logits": "lazy",
    "verify": 0,
}


def test_defaults():
    assert dataclasses.asdict(Options()) == DEFAULTS


@pytest.mark.parametrize(("given", "calls"), [(True, 2), (False, 0), (5, 5)])
def test_verify_is_a_number_of_calls(given, calls):
    assert Options(verify=given).verify == calls
    with pytest.raises(ValueError, match="option verify must be at least 0"):
        Options(verify=-1)


def test_they_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().min_vocab = 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("min_vocab", "min_logits_bytes", "min_flops", "workspace_mib")
        for value in (True, 1.5, "7", None, [1])
        if (name, value) != ("workspace_mib", None)  # it may be left open
    ],
)
def test_numbers_must_be_ints(name, value):
    with pytest.raises(TypeError, match=f"option {name} must be an int, got"):
        Options(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("min_vocab", -1), ("min_logits_bytes", -1), ("workspace_mib", 0)])
def test_numbers_have_a_least_value(name, value):
    with pytest.raises(ValueError, match=f"option {name} must be at least {value + 1}, got {value}"):
        Options(**{name: value})


@pytest.mark.parametrize("name", ["min_vocab", "min_logits_bytes", "min_flops"])
def test_zero_is_allowed(name):
    assert getattr(Options(**{name: 0}), name) == 0


@pytest.mark.parametrize(
    ("value", "error"), [(True, TypeError), ("1", TypeError), (-0.1, ValueError), (1, ValueError)], ids=repr
)
def test_approximate_mass_is_a_share_below_one(value, error):
    with pytest.raises(error, match="option approximate_mass must be"):
        Options(approximate_mass=value)


@pytest.mark.parametrize("value", ["LOG", "never", None, 1])
def test_on_refusal_is_one_of_three(value):
    with pytest.raises(ValueError, match=r"option on_refusal must be one of \('log', 'warn', 'raise'\), got"):
        Options(on_refusal=value)


@pytest.mark.parametrize("value", ["LAZY", "computed", None, True])
def test_logits_is_one_of_three(value):
    with pytest.raises(ValueError, match=r"option logits must be one of \('lazy', 'materialize', 'refuse'\), got"):
        Options(logits=value)


def test_mode_is_a_string():
    with pytest.raises(TypeError, match="option mode must be a string or None, got 3"):
        Options(mode=3)


def test_split_gives_each_its_own():
    ours, inductors = Options.split({"min_vocab": 7, "max_autotune": True, "epilogue-fusion": False, "mode": "default"})
    assert ours == Options(min_vocab=7, mode="default")
    assert inductors == {"max_autotune": True, "epilogue-fusion": False}


@pytest.mark.parametrize("options", [None, {}])
def test_split_of_nothing(options):
    assert Options.split(options) == (Options(), {})


@pytest.mark.parametrize("name", ["min_vocabs", "MIN_VOCAB", "workspace", "", "max_autotunes"])
def test_an_unknown_name_lists_the_valid_ones(name):
    with pytest.raises(ValueError, match=f"unknown option '{name}'") as raised:
        Options.split({name: 1})
    message = str(raised.value)
    for field in dataclasses.fields(Options):
        assert f"{field.name}={field.default!r}" in message
    assert "torch._inductor.list_options()" in message


def test_no_name_is_also_inductors():
    names = {field.name for field in dataclasses.fields(Options)}
    assert names.isdisjoint(torch._inductor.list_options())


@pytest.mark.parametrize(("name", "value"), [("workspace_mib", 3), ("approximate_mass", 0.25)])
def test_an_option_reaches_the_operator(name, value):
    def program(h, w, t):
        return torch.nn.functional.cross_entropy(h @ w.T, t)

    limits = []

    def backend(module, inputs):
        rewrite_module(module, Options(min_vocab=0, min_logits_bytes=0, **{name: value}))
        operators = (node for node in module.graph.nodes if str(node.target).startswith("cce_inductor."))
        limits.extend(node.kwargs.get(name) for node in operators)
        return module.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend)(torch.randn(20, 4), torch.randn(9, 4), torch.randint(0, 9, (20,)))
    assert limits == [value]
