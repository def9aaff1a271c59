"""What is private to PyTorch is touched in one file, for the versions that it names."""

import ast
from pathlib import Path

import pytest
import torch

import cce_inductor
from cce_inductor import compat

FOLDER = Path(cce_inductor.__file__).parent
FILES = sorted(path for path in FOLDER.rglob("*.py") if path.name != "compat.py")
DOCUMENTED = {"torch._check", "torch._check_value", "torch._dynamo.mark_dynamic"}  # in PyTorch's documentation


def private_names(source: str) -> set[str]:
    """Dotted names below torch with a part that begins with one underscore."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            root, *parts = name.split(".")
            if root == "torch" and any(part.startswith("_") and not part.startswith("__") for part in parts):
                found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_other_file_touches_what_is_private(path):
    names = private_names(path.read_text())
    assert not {name for name in names if not any(known.startswith(name) for known in DOCUMENTED)}


def test_private_names_are_found():
    source = "import torch._ops\nfrom torch._inductor import config\nx = torch._C._nn.gelu\ny = torch.__version__\n"
    assert {"torch._ops", "torch._inductor.config", "torch._C._nn"} <= private_names(source)
    assert not any("__version__" in name for name in private_names(source))


def test_it_says_which_versions_it_was_checked_against():
    first = (FOLDER / "compat.py").read_text().splitlines()[0]
    assert "Checked against torch 2.11" in first


class Doubled(torch.autograd.Function):
    """Like a compiled backward that saves nothing; notes which of its gradients require one."""

    @staticmethod
    def forward(ctx, x, given):
        ctx.set_materialize_grads(False)
        ctx.given = given
        return 2 * x, 2 * x.detach()

    @staticmethod
    def backward(ctx, *grads):
        ctx.given += [grad is not None and grad.requires_grad for grad in grads]
        return 2 * grads[0], None


@pytest.mark.parametrize("create_graph", [False, True])
def test_before_torch_2_13_a_compiled_backward_is_given_what_requires_a_gradient(create_graph, monkeypatch):
    monkeypatch.setattr(compat, "LOSES_SECOND_DERIVATIVES", True)
    of_compiled, of_argument = [], []
    x = torch.ones(3, requires_grad=True)
    argument, _ = Doubled.apply(x, of_argument)
    compiled = compat.refusing_second_derivatives(lambda x: (*Doubled.apply(x, of_compiled), x))
    doubled, _, same = compiled(argument)
    how = {"create_graph": create_graph, "retain_graph": True}
    assert torch.equal(*torch.autograd.grad(doubled.sum(), argument, **how), torch.full((3,), 2.0))
    assert of_compiled == [create_graph, False]
    torch.autograd.grad(same.sum(), x, **how)
    assert of_argument == [False, False], "what made an argument is the caller's"
