"""Generated maps, their functions and the order of tiles, run by Triton: compiled where there is a GPU."""

import ast
import importlib.util
import inspect
import os
import py_compile
import re
import stat
from pathlib import Path

import pytest
import sympy
import torch
import triton
import triton.language as tl

from cce_inductor.kernels import template
from cce_inductor.kernels.tile import tile_position
from cce_inductor.logit_map import FUNCTIONS, LogitMap, Z

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAPS = ("z", "0.5*z", "30.0*tanh(z/30.0)", "2.0*sigmoid(z) - 1.0", "exp(-z*z) + z", "1/(1 + z**2)", "z**3 - z", "3.0",
        "where(gt(z, 1.0), 0.1*z + 0.9, z)", "where(ge(0.0, z), 0.0, z)",
        "where(gt(-3.4e38, z), -inf, tanh(z))")  # fmt: skip


@triton.jit
def _apply(z, value, slope, size, VALUE: tl.constexpr, VALUE_AND_SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(z + index, mask=index < size)
    y, dy = VALUE_AND_SLOPE(x)
    tl.store(value + index, VALUE(x) + tl.where(y > 0, 0.0, 0.0), mask=index < size)
    tl.store(slope + index, dy, mask=index < size)


@triton.jit
def _visit(visits, row_blocks, column_blocks):
    row, column = tile_position(tl.program_id(0), row_blocks, column_blocks)
    tl.store(visits + row * column_blocks + column, tl.program_id(0) + 1)


def apply(logit_map, z):
    """Value and slope of a map by its generated functions, in float32."""
    module = template.load(logit_map)
    z = z.to(DEVICE)
    value, slope = torch.empty_like(z), torch.empty_like(z)
    _apply[(triton.cdiv(len(z), 64),)](z, value, slope, len(z), module.value, module.value_and_slope, 64)
    return value.cpu(), slope.cpu()


@pytest.mark.parametrize("text", MAPS)
def test_generated_functions_compute_the_map_and_its_derivative(text):
    z = torch.cat([torch.linspace(-9, 9, 200), torch.tensor([0.0, 1e-6, -1e-6, 0.2499, 0.2501, 80.0, -80.0])])
    logit_map = LogitMap.parse(text)
    expected = logit_map.value_and_derivative(z.double())
    for mine, exact in zip(apply(logit_map, z), expected, strict=True):
        exact = torch.ones_like(z).double() if exact is None else exact
        # exp's argument is rounded: relative to exp an error of |z| epsilons; cancellation in sums is absolute
        rounding = torch.finfo(torch.float32).eps * (2 + z.double().abs().clamp(max=9)) * (4 + exact.abs())
        assert ((mine.double() - exact).abs() <= rounding).all()


def test_tanh_is_accurate_to_a_few_units_near_and_far_from_zero():
    z = torch.cat([torch.logspace(-30, 1.9, 300), -torch.logspace(-30, 1.9, 300)])
    value, _ = apply(LogitMap.parse("tanh(z)"), z)
    exact = z.double().tanh()
    assert ((value.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all()


def test_infinities_reach_the_limits_of_a_map():
    z = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for text, limits in (("tanh(z)", (1.0, -1.0)), ("sigmoid(z)", (1.0, 0.0))):
        value, _ = apply(LogitMap.parse(text), z)
        assert tuple(value[:2].tolist()) == limits
        assert value[2].isnan()


def test_marked_logits_are_filled_without_gradient():
    z = torch.tensor([-torch.inf, 0.0, torch.nan])
    value, slope = apply(LogitMap.parse("where(gt(-3.4e38, z), -inf, tanh(z))"), z)
    assert value[:2].tolist() == [-torch.inf, 0.0]
    assert slope[:2].tolist() == [0.0, 1.0]
    assert value[2].isnan()


def test_the_generated_file_is_readable_private_and_reused(monkeypatch, tmp_path):
    monkeypatch.setattr(template, "cache_dir", lambda: str(tmp_path))
    template.load.cache_clear()
    template.load(LogitMap.parse("30.0*tanh(z/30.0)"))
    [path] = (tmp_path / "cce_inductor").iterdir()
    text = path.read_text()
    assert "f(z)  = 30.0*tanh(0.03333" in text
    assert "def value_and_slope(z):" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    py_compile.compile(str(path), cfile=str(tmp_path / "compiled"), doraise=True)
    before = path.stat().st_mtime_ns
    template.load.cache_clear()
    template.load(LogitMap.parse("30.0*tanh(z/30.0)"))
    assert path.stat().st_mtime_ns == before
    path.write_text("broken by someone")
    template.load.cache_clear()
    template.load(LogitMap.parse("30.0*tanh(z/30.0)"))
    assert path.read_text() == text
    template.load.cache_clear()


def test_nothing_that_lies_in_the_cache_directory_is_run(monkeypatch, tmp_path):
    """Neither bytecode beside the file, nor the file once it is changed by others; the directory is private."""
    monkeypatch.setattr(template, "cache_dir", lambda: str(tmp_path / "cache"))
    logit_map = LogitMap.parse("3.0*tanh(z/3.0) + 1.0")
    template.load.cache_clear()
    template.load(logit_map)
    [path] = (tmp_path / "cache" / "cce_inductor").iterdir()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    evil = "raise SystemExit('planted')" + " " * path.stat().st_size
    changed, original = tmp_path / "changed.py", path.read_text()
    changed.write_text(evil[: path.stat().st_size])
    times = (path.stat().st_atime, int(path.stat().st_mtime))
    for file in (path, changed):
        os.utime(file, times)
    bytecode = importlib.util.cache_from_source(str(path))
    py_compile.compile(str(changed), cfile=bytecode, doraise=True)
    template.load.cache_clear()
    module = template.load(logit_map)
    path.write_text(evil)
    assert inspect.getsource(module.value.fn) in original
    template.load.cache_clear()


def test_other_processes_see_the_whole_file_or_none(monkeypatch, tmp_path):
    seen, replace = [], os.replace

    def look_and_replace(source, target):
        seen.append((Path(target).exists(), Path(source).read_text(), stat.S_IMODE(Path(source).stat().st_mode)))
        replace(source, target)

    monkeypatch.setattr(template, "cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(os, "replace", look_and_replace)
    template.load.cache_clear()
    template.load(LogitMap.parse("7.0*tanh(z/7.0)"))
    [path] = (tmp_path / "cce_inductor").iterdir()
    assert seen == [(False, path.read_text(), 0o600)]
    template.load.cache_clear()


@pytest.mark.parametrize("function", [sympy.sin, sympy.Function("__import__"), sympy.Function("evil")], ids=str)
def test_only_functions_of_the_map_language_are_generated(function):
    with pytest.raises(ValueError, match="no function of a logit map"):
        template.load(LogitMap(function(Z)))


def test_code_is_generated_from_numbers_z_and_x_alone():
    """No string of a user gets into it: whatever a map is made of comes through the parser of its language."""
    known = re.compile(r"z|x|t\d+|triton|tl|float|" + "|".join(FUNCTIONS))
    for text in MAPS:
        tree = ast.parse(template._source(LogitMap.parse(text)))
        assert all(known.fullmatch(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name))


def test_nothing_is_unpickled():
    package = Path(template.__file__).parents[1]
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"pickle", "marshal", "shelve", "dill"}, path
        assert "torch.load(" not in path.read_text(), path


def test_a_power_that_is_no_product_is_not_generated():
    with pytest.raises(NotImplementedError, match="power"):
        template.load(LogitMap.parse("z**0.5"))


@pytest.mark.parametrize("row_blocks", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("column_blocks", [1, 3, 9])
def test_tile_numbers_visit_every_tile_once(row_blocks, column_blocks):
    visits = torch.zeros(row_blocks, column_blocks, dtype=torch.int32, device=DEVICE)
    _visit[(row_blocks * column_blocks,)](visits, row_blocks, column_blocks)
    assert sorted(visits.flatten().tolist()) == list(range(1, row_blocks * column_blocks + 1))
