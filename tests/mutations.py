"""Do the tests catch faults? Plants single faults in a copy of the package and runs a few tests on each.

    python tests/mutations.py                 # all of them, a few minutes
    python tests/mutations.py bias slope      # those with one of the words in their name

A fault replaces a piece of source text that must occur exactly once. One that no test catches survives: write the test.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRITON = "tests/ops/test_implementations.py -k triton"
ATEN = "tests/ops/test_implementations.py -k aten"
SPARSE = "tests/ops/test_sparse.py"
LOSSES = "tests/ops/test_losses.py"
SCALED = "tests/ops/test_scaled_loss.py"
MAPS = "tests/test_logit_map.py"
GRAPH = "tests/graph/test_"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # in the package
    old: str
    new: str
    tests: str  # arguments for pytest


FAULTS = [
    # kernels
    Fault(
        "forward: no mask of columns", "kernels/forward.py", "if column + BLOCK_V > num_columns:", "if False:", TRITON
    ),
    Fault(
        "forward: the last rows are skipped",
        "kernels/forward.py",
        "tl.cdiv(rows_here, BLOCK_N)",
        "rows_here // BLOCK_N",
        TRITON,
    ),
    Fault(
        "forward: the total has no class weight",
        "kernels/forward.py",
        "weighted = x * scale[None, :]",
        "weighted = x",
        TRITON,
    ),
    Fault(
        "target in the next tile",
        "kernels/tile.py",
        "local = targets - first_column",
        "local = targets - first_column - 1",
        TRITON,
    ),
    Fault("ignore_index is ignored", "kernels/tile.py", "inside = inside & (targets != ignore_index)", "pass", TRITON),
    Fault(
        "strides swapped",
        "kernels/tile.py",
        ".to(tl.int64) * stride_row + depths[None, :].to(tl.int64) * stride_depth",
        ".to(tl.int64) * stride_depth + depths[None, :].to(tl.int64) * stride_row",
        TRITON,
    ),
    Fault("no mask of the width", "kernels/tile.py", "& (depths[None, :] < num_depth)", "", TRITON),
    Fault(
        "backward: no bias",
        "kernels/backward.py",
        "stride_wv, stride_wd, HAS_BIAS,",
        "stride_wv, stride_wd, False,",
        TRITON,
    ),
    Fault("backward: no slope", "kernels/backward.py", "gradient = dx * slope", "gradient = dx", TRITON),
    Fault(
        "backward: no gradient of the total",
        "kernels/backward.py",
        "dx += total_grad",
        "dx += 0.0 * total_grad",
        TRITON,
    ),
    Fault(
        "backward: rows outside count for the bias",
        "kernels/backward.py",
        "tl.where(row_mask[:, None], gradient, 0.0)",
        "gradient",
        TRITON,
    ),
    Fault(
        "picked: above the log-sum-exp",
        "kernels/picked.py",
        "tl.minimum(VALUE(z), tl.load(lse + row))",
        "VALUE(z)",
        TRITON,
    ),
    Fault(
        "sparse: the target's tile is skipped",
        "kernels/active.py",
        "selected = selected | (picks",
        "selected | (picks",
        SPARSE,
    ),
    Fault(
        "sparse: twice the budget",
        "kernels/active.py",
        "fits = skipped <= budget",
        "fits = skipped <= 2 * budget",
        SPARSE,
    ),
    Fault(
        "sparse: skipped mass is spread evenly",
        "kernels/share.py",
        "spread = tl.where(tile_mass > 0.0, force / tile_mass, 0.0)",
        "spread = tl.where(tile_mass > 0.0, 1.0 / BLOCK_V, 0.0) + 0.0 * force",
        SPARSE,
    ),
    # blocks through ATen
    Fault(
        "blocks: sums forget the blocks before",
        "ops/blocks.py",
        "hidden[rows], first=rows.start == 0",
        "hidden[rows], first=True",
        ATEN,
    ),
    Fault(
        "blocks: hidden's sums forget the slices before",
        "ops/blocks.py",
        "padded, first=columns.start == 0",
        "padded, first=True",
        ATEN,
    ),
    Fault(
        "blocks: sums in 16 bits",
        "ops/blocks.py",
        "hidden.new_empty(weight.shape, dtype=sums)",
        "hidden.new_empty(weight.shape)",
        ATEN,
    ),
    Fault(
        "ATen: ignore_index is ignored",
        "ops/cpu.py",
        "        inside &= target != problem.ignore_index\n",
        "        pass\n",
        ATEN,
    ),
    Fault(
        "ATen: rounding of the log-sum-exp is lost",
        "ops/cpu.py",
        "log_sum - (lse - peak), 0.0",
        "0.0 * log_sum, 0.0",
        ATEN,
    ),
    Fault(
        "in the forward: the sign of the picked gradient",
        "ops/in_forward.py",
        "[grad_lse, -coefficient,",
        "[grad_lse, coefficient,",
        SCALED,
    ),
    # losses and maps
    Fault(
        "loss: mean over rows with class weights",
        "ops/losses.py",
        "(valid.sum() if row_weight is None else row_weight.sum())",
        "valid.sum()",
        LOSSES,
    ),
    Fault(
        "loss: smoothing forgets class weights",
        "ops/losses.py",
        "smooth = weight_sum * lse",
        "smooth = num_classes * lse",
        LOSSES,
    ),
    Fault("loss: ignored rows count", "ops/losses.py", "losses = torch.where(valid, losses, 0.0)", "pass", LOSSES),
    Fault("map: derivative of sigmoid", "logit_map.py", "value * (1 - value)", "value * (1 + value)", MAPS),
    Fault(
        "map: derivative of the other branch",
        "logit_map.py",
        "a.diff(symbol), b.diff(symbol)",
        "b.diff(symbol), a.diff(symbol)",
        MAPS,
    ),
    # rules
    Fault(
        "rule: x - b adds b",
        "graph/maps.py",
        "_added(call, a, b, -alpha)",
        "_added(call, a, b, alpha)",
        GRAPH + "maps.py",
    ),
    Fault(
        "rule: a bias after a scale is not divided",
        "graph/logits.py",
        "bias if slope == 1 else bias.then(torch.div, slope)",
        "bias",
        GRAPH + "maps.py",
    ),
    Fault(
        "rule: the wrong slice of the classes",
        "graph/logits.py",
        "weight=self.weight.then(operator.getitem, slice(start, stop))",
        "weight=self.weight.then(operator.getitem, slice(0, stop - start))",
        GRAPH + "row_operations.py",
    ),
    Fault(
        "rule: detach leaves the weight its gradient",
        "graph/logits.py",
        "weight=self.weight.then(torch.detach)",
        "weight=self.weight",
        GRAPH + "row_operations.py",
    ),
    Fault(
        "rule: hardtanh is a clamp without bounds",
        "graph/registry.py",
        '"clip": "clamp",',
        '"clip": "clamp", "hardtanh": "clamp",',
        "tests/fuzz/test_regressions.py",
    ),
    Fault(
        "rule: any ignore_index is -100",
        "graph/reductions.py",
        "            ignore_index=ignore_index,\n            label_smoothing",
        "            label_smoothing",
        GRAPH + "loss_forms.py",
    ),
    Fault(
        "writes: an operand that changes is not seen",
        "graph/rewrite.py",
        "if write is not None:",
        "if False:",
        GRAPH + "effects.py",
    ),
    Fault(
        "writes: other names keep the old value",
        "graph/sites.py",
        "if values[other] is old:",
        "if False:",
        GRAPH + "effects.py",
    ),
    Fault(
        "merge: every part is the first",
        "graph/merge.py",
        "(old, emitter.call(operator.getitem, pieces, i))",
        "(old, emitter.call(operator.getitem, pieces, 0))",
        GRAPH + "sums.py " + GRAPH + "loss_forms.py",
    ),
    Fault(
        "returned: rows as before the view",
        "graph/returned.py",
        "rows = logits.hidden.emit(emitter.call)",
        "rows = logits.hidden.flat().emit(emitter.call)",
        GRAPH + "returned_logits.py",
    ),
]


def outcome(fault: Fault) -> str:
    """ "caught", "survived", or why neither can be said."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copy = Path(directory)
        for part in ("cce_inductor", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = copy / "cce_inductor" / fault.file
        text = source.read_text()
        if text.count(fault.old) != 1:
            return f"not planted: {fault.old!r} occurs {text.count(fault.old)} times"
        source.write_text(text.replace(fault.old, fault.new))
        flags = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutations"]
        command = [sys.executable, "-m", "pytest", *flags, *fault.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=1200)
        return {0: "survived", 1: "caught"}.get(done.returncode, f"no result:\n{done.stdout[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name")
    words = parser.parse_args().words
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    caught = 0
    for fault in faults:
        start = time.perf_counter()
        result = outcome(fault)
        caught += result == "caught"
        print(f"{result:9} {time.perf_counter() - start:5.0f} s  {fault.name}", flush=True)
    print(f"{caught} of {len(faults)} caught")
    sys.exit(caught < len(faults))


if __name__ == "__main__":
    main()
