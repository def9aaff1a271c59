"""Single faults for `mutations.py` to plant, each with the tests that should catch it."""

from dataclasses import dataclass

TRITON = "tests/ops/test_implementations.py -k triton"
STORED = "tests/ops/test_stored.py tests/ops/test_implementations.py -k stored"
ATEN = "tests/ops/test_implementations.py -k aten"
SPARSE = "tests/ops/test_sparse.py"
LOSSES = "tests/ops/test_losses.py"
SCALED = "tests/ops/test_scaled_loss.py"
KEPT = "tests/ops/test_kept_tiles.py"
CPU_SPARSE = "tests/ops/test_cpu_sparse.py"
CPU_FUSED = "tests/ops/test_cpu_fused.py -k no_worse"
MAPS = "tests/test_logit_map.py"
GRAPH = "tests/graph/test_"


@dataclass(frozen=True)
class Fault:
    name: str
    file: str  # in the package
    old: str
    new: str
    tests: str  # arguments for pytest: the few that should catch it
    gpu: bool = False  # whether only a GPU shows it

    def planted_in(self, source: str) -> str:
        """The source with the fault; ValueError unless there is exactly one place for it."""
        if source.count(self.old) != 1:
            raise ValueError(f"{self.old!r} occurs {source.count(self.old)} times")
        return source.replace(self.old, self.new)


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
    Fault(
        "ignore_index is ignored",
        "kernels/tile.py",
        "inside = inside & (targets != ignore_index)",
        "pass",
        "tests/ops/test_implementations.py -k ignored_one",
    ),
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
        "several targets: of those of a row in a tile only the first has its gradient",
        "kernels/several_targets.py",
        "range(tl.max(end - begin, 0))",
        "range(tl.minimum(tl.max(end - begin, 0), 1))",
        TRITON,
    ),
    Fault(
        "several targets: their gradients in the order of the targets as given",
        "ops/cuda.py",
        "picked=grads.picked.gather(1, order)",
        "picked=grads.picked",
        TRITON,
    ),
    Fault(
        "several targets: only the first of each row is checked",
        "ops/cuda.py",
        "num_rows=problem.target.numel()",
        "num_rows=problem.num_rows",
        "tests/ops/test_bad_input.py",
    ),
    Fault(
        "several targets: taken by the sparse backward",
        "ops/sparse.py",
        "not problem.several_targets and problem.logit_map",
        "problem.logit_map",
        "tests/ops/test_sparse.py -k several",
    ),
    Fault(
        "picked: above the log-sum-exp",
        "kernels/picked.py",
        "tl.minimum(VALUE(z), tl.load(lse + row))",
        "VALUE(z)",
        TRITON,
    ),
    Fault(
        "sparse: the target is skipped",
        "kernels/active.py",
        "stands_out = stands_out | (picks",
        "stands_out | (picks",
        "tests/ops/test_sparse.py -k never_its_target",
    ),
    Fault(
        "sparse: twice the budget",
        "kernels/active.py",
        "fits = skipped <= budget",
        "fits = skipped <= 2 * budget",
        "tests/ops/test_sparse.py -k light_tiles",
    ),
    Fault(
        "tops: a heavy tile is needed whole though one token has nearly all of it",
        "kernels/active.py",
        "selected = (rest >=",
        "selected = (mass >=",
        "tests/ops/test_sparse.py -k nearly_one_token",
    ),
    Fault(
        "sparse: skipped mass is spread evenly",
        "kernels/share.py",
        "spread = tl.where(tile_mass > 0.0, force / tile_mass, 0.0)",
        "spread = tl.where(tile_mass > 0.0, 1.0 / BLOCK_V, 0.0) + 0.0 * force",
        "tests/ops/test_sparse.py -k put_back",
    ),
    Fault(
        "tops: put back a second time with what is skipped",
        "kernels/lists.py",
        "mass = tl.where(top != 0, mass * rest_share, mass)",
        "mass = tl.where(top != 0, mass + 0.0 * rest_share, mass)",
        "tests/ops/test_sparse.py -k specified",
    ),
    Fault(
        "tops: without the slope of the logit map",
        "kernels/top_gradient.py",
        "dz = tl.where(mask, dx * slope, 0.0)",
        "dz = tl.where(mask, dx, 0.0)",
        "tests/ops/test_sparse.py -k specified",
    ),
    Fault(
        "tops: the place in the tile is that in its part",
        "kernels/top_gradient.py",
        "hit = first + tl.arange(0, PART)[None, :]",
        "hit = tl.arange(0, PART)[None, :]",
        "tests/ops/test_sparse.py -k specified",
    ),
    Fault(
        "forward: nothing is left without the heaviest token",
        "kernels/tops.py",
        "return with_column((total - 1.0) / total, column_of",
        "return with_column((total - total) / total, column_of",
        "tests/ops/test_sparse.py -k heaviest",
    ),
    Fault(
        "forward: the target is not recorded in its tile",
        "kernels/picked.py",
        "place = (column // TILE) * num_rows + row",
        "place = row",
        "tests/ops/test_sparse.py -k heaviest",
    ),
    Fault(
        "tops: a target that is computed alone has no gradient of its own",
        "kernels/top_gradient.py",
        "tl.where(tokens == row_target, target_grad, 0.0)",
        "tl.where(tokens == row_target, 0.0 * target_grad, 0.0)",
        "tests/ops/test_sparse.py -k specified",
    ),
    # passes over stored logits
    Fault(
        "stored: no mask of columns",
        "kernels/stored.py",
        'x = tl.where(column_mask[None, :], x, -float("inf"))',
        "pass",
        STORED,
    ),
    Fault(
        "stored: p - 1 of the target is p minus 1",
        "kernels/stored.py",
        "lack * factor + (factor + target_grad)",
        "((lack + 1.0) * factor + target_grad)",
        STORED,
    ),
    Fault("stored: slices share a tile", "ops/stored.py", "number * slice_tiles", "number * (slice_tiles - 1)", STORED),
    Fault("stored: the bias's gradient", "ops/stored.py", "grad_bias += dz.sum(0)", "grad_bias += dz.mean(0)", STORED),
    Fault(
        "stored: logits that are at hand are computed again",
        "ops/stored.py",
        "z = dz if at_hand else logits_into",
        "z = logits_into",
        STORED,
    ),
    Fault(
        "stored: groups cost nothing",
        "ops/in_forward.py",
        "(groups - 1) * GPU_GROUP_ROWS >= computed_again",
        "0 >= computed_again",
        STORED,
    ),
    Fault(
        "stored: the workspace may hold all logits",
        "ops/in_forward.py",
        "workspace_bytes=min(problem.workspace_bytes, most)",
        "workspace_bytes=problem.workspace_bytes",
        "tests/ops/test_memory.py -k float32",
    ),
    # blocks through ATen
    Fault(
        "blocks: sums forget the blocks before",
        "ops/blocks.py",
        "factor, first=rows.start == 0",
        "factor, first=True",
        ATEN,
    ),
    Fault(
        "blocks: hidden's sums forget the slices before",
        "ops/blocks.py",
        "first = columns.start + part.start == 0",
        "first = True",
        ATEN,
    ),
    Fault(
        "blocks: sums in 16 bits",
        "ops/blocks.py",
        "hidden.new_empty(weight.shape, dtype=sums)",
        "hidden.new_empty(weight.shape)",
        "tests/known_bugs/test_others.py -k precision",
    ),
    Fault(
        "ATen: ignore_index is ignored",
        "ops/cpu.py",
        "        inside &= index != ignore_index\n",
        "        pass\n",
        ATEN,
    ),
    Fault(
        "aten: a row's gradient of the picked logit in blocks without it",
        "ops/cpu.py",
        "torch.where(inside, sums, dx.gather(1, index))",
        "sums",
        ATEN,
    ),
    Fault(
        "ATen: rounding of the log-sum-exp is lost",
        "ops/combine.py",
        "above - (lse - peak), 0.0",
        "0.0 * above, 0.0",
        "tests/test_api.py -k digits",
    ),
    Fault(
        "in the forward: the sign of the picked gradient",
        "ops/in_forward.py",
        "RowGradients(grad_lse, -coefficient,",
        "RowGradients(grad_lse, coefficient,",
        SCALED,
    ),
    Fault(
        "what the CPU skips is lost in the weight's gradient",
        "ops/cpu_sparse.py",
        "= skipped_hidden[tile], 0.0",
        "= 0.0, 0.0",
        CPU_SPARSE,
    ),
    Fault(
        "a row may skip its target on the CPU",
        "ops/cpu_sparse.py",
        "unsqueeze(0), True)",
        "unsqueeze(0), False)",
        CPU_SPARSE,
    ),
    Fault("fused: no bias", "ops/cpu_fused.py", "sum(bias, product.float())", "product.float()", CPU_FUSED),
    Fault("fused: f' is forgotten", "ops/cpu_fused.py", "dx = dx if slope is None else dx * slope", "pass", CPU_FUSED),
    Fault(
        "fused: a block without its targets",
        "ops/cpu_fused.py",
        "dz.scatter_(",
        "dz.clone().scatter_(",
        CPU_FUSED,
    ),
    Fault(
        "fused: the bias without the targets",
        "ops/cpu_fused.py",
        "right - there, 0.0",
        "0 * right, 0.0",
        CPU_FUSED,
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
    Fault(
        "returned: the bias is forgotten",
        "graph/returned.py",
        "None if bias is None else _operand(bias, results)",
        "None",
        GRAPH + "returned_logits.py",
    ),
    Fault(
        "masks: less is taken for greater",
        "graph/masks.py",
        '"lt": lambda z, number: gt(number, z)',
        '"lt": lambda z, number: gt(z, number)',
        GRAPH + "maps.py " + GRAPH + "masks.py",
    ),
    Fault(
        "masks: what is kept is filled",
        "graph/masks.py",
        "vocab_mask(a, condition, inverted=True)",
        "vocab_mask(a, condition)",
        GRAPH + "masks.py",
    ),
    Fault(
        "softmax: an expected logit without the log-sum-exp",
        "graph/softmax.py",
        "value = results.lse + (results.lse_rest - results.entropy)",
        "value = results.lse_rest - results.entropy",
        GRAPH + "softmax.py",
    ),
    Fault(
        "stacks: always the first part",
        "graph/stacks.py",
        "_part(call, x.parts[at], tuple(entries))",
        "_part(call, x.parts[0], tuple(entries))",
        GRAPH + "sums.py " + GRAPH + "row_operations.py " + GRAPH + "returned_forms.py -k stack",
    ),
    Fault(
        "counted: rows go back in their order, not to their places",
        "ops/counted.py",
        "index_copy_(0, rows, values)",
        "index_copy_(0, torch.arange(len(rows)), values)",
        ATEN + " " + SCALED,
    ),
    Fault(
        "kept: the logits of another group",
        "ops/kept.py",
        "start = rows.start % self._rows",
        "start = 0",
        SCALED,
    ),
    Fault(
        "kept tiles: rounded as they are",
        "kernels/kept.py",
        "origin = peak\n",
        "origin = 0.0 * peak\n",
        KEPT + " -k certain",
    ),
    Fault(
        "kept tiles: the origin is the largest logit before the map",
        "kernels/kept.py",
        'origin = tl.max(tl.where(x == peak[:, None], z, -float("inf")), 1)',
        "origin = tl.max(z, 1)",
        KEPT + " -k certain",
    ),
    Fault(
        "kept tiles: rows that are left out are read",
        "kernels/backward.py",
        'row_mask & (row_lse != float("inf"))',
        "row_mask",
        KEPT + " -k written",
    ),
    Fault(
        "kept tiles: rows in the order in which they count",
        "kernels/forward.py",
        "kept, kept_base, z, x, peak, column_block, places,",
        "kept, kept_base, z, x, peak, column_block, rows,",
        KEPT,
    ),
    Fault(
        "kept tiles: differences beyond the range of float16",
        "kernels/kept.py",
        "UNIT = tl.constexpr(256.0)",
        "UNIT = tl.constexpr(1.0)",
        KEPT + " -k any_size",
    ),
    Fault(
        "kept tiles: at the start of the gradient's memory",
        "ops/kept_tiles.py",
        "room[room.numel() - in_room * size :]",
        "room",
        KEPT + " -k will_be_read",
    ),
    Fault(
        "kept tiles: over the gradient of the first slice",
        "ops/kept_tiles.py",
        "room = room[first * (room.numel() // vocab_size) :]",
        "room = room[:]",
        KEPT + " -k will_be_read",
    ),
    Fault(
        "kept tiles: in a workspace that several blocks of rows share",
        "ops/kept_tiles.py",
        "first = workspace.shape[1] if len(workspace) == rows else 0",
        "first = workspace.shape[1]",
        KEPT + " -k will_be_read",
    ),
    Fault(
        "kept tiles: of a map with a kink",
        "ops/cuda_loss.py",
        "if problem.logit_map.is_smooth:",
        "if True:",
        KEPT + " -k kink",
    ),
    Fault(
        "in the forward: on a GPU also where gradients may be sparse",
        "ops/library.py",
        "approximate_mass == 0 and needs_grad_weight",
        "needs_grad_weight",
        GRAPH + "in_forward.py -k gpu",
    ),
    Fault(
        "in the forward: twice, of two heads",
        "graph/driver.py",
        "once = once and len(worthwhile) == 1",
        "once = True",
        GRAPH + "in_forward.py",
    ),
    Fault(
        "effects: gradient modes are not seen",
        "graph/effects.py",
        "enabled = bool(node.args[0])",
        "pass",
        GRAPH + "modes.py",
    ),
    Fault(
        "lazy logits: a changed weight is not noticed",
        "lazy_logits.py",
        "return None if tensor.is_inference() else tensor._version, tensor",
        "return None, tensor",
        "tests/test_lazy_logits.py",
    ),
    Fault(
        "undo: the report has rewrites that were undone",
        "graph/driver.py",
        "        report = _failed(error)\n    else",
        "        report.refused += _failed(error).refused\n    else",
        GRAPH + "faults.py",
    ),
    Fault(
        "caches: the same key for all versions",
        "backend.py",
        'f"{config.cache_key_tag}cce_inductor={_source_hash().hex()}"',
        'f"{config.cache_key_tag}cce_inductor"',
        "tests/test_caches.py",
    ),
    Fault(
        "enable: the same key for all options",
        "backend.py",
        "            return _source_hash(), repr(self.options)\n",
        "            return _source_hash()\n",
        "tests/test_backend.py tests/test_caches.py",
    ),
    Fault(
        "fallback: any error is taken for one of the machine",
        "ops/fallback.py",
        "if not _is_of_the_machine(error):",
        "if False:",
        "tests/ops/test_fallback.py",
    ),
    # where only a GPU shows them
    Fault(
        "offsets of 32 bits",
        "kernels/tile.py",
        "offsets = rows[:, None].to(tl.int64) * stride_row + depths[None, :].to(tl.int64) * stride_depth",
        "offsets = rows[:, None] * stride_row + depths[None, :] * stride_depth",
        "tests/ops/test_gpu.py -k int64",
        gpu=True,
    ),
    Fault(
        "forward: waits for the GPU",
        "ops/cuda.py",
        "        compat.assert_on_device(good, BAD_TARGET)\n",
        "        assert good.item(), BAD_TARGET\n",
        "tests/ops/test_gpu.py -k waits",
        gpu=True,
    ),
    Fault(
        "sparse: offsets of 32 bits",
        "kernels/sparse.py",
        "offsets = columns[:, None].to(tl.int64) * width + depths[None, :]",
        "offsets = columns[:, None] * width + depths[None, :]",
        "tests/ops/test_gpu.py -k int64",
        gpu=True,
    ),
]
