"""Finds sites: matmuls whose result is used for nothing but reductions over its last dimension.

From each matmul the deferred logits are followed through the graph by the rules, in the order of the graph.
"""

import heapq
import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Graph, Node

from ..compat import graph_break, size_hint, statically_equal
from ..options import Options
from ..report import Refusal
from . import maps, masks, matmuls, rows, stacks, words  # noqa: F401 (they register their rules)
from .effects import dead_nodes, grad_modes, shares_memory, written
from .logits import DeferredLogits, Refused
from .reductions import Reduction
from .registry import apply, operation, tensor_of

LOSSES = ("cross_entropy", "nll_loss")
FEWEST_GPU_ROWS = 2048  # with fewer, reading the weight takes longer than what is done with it
ORPHANED = (
    "its logits are no product with a weight in this graph; where the product is outside of it, compile both together"
)
TRANSFORMED = (
    "the loss is computed under a torch.func transform, for which the operators have no rules; "
    "use backward() or torch.autograd.grad"
)
TOGETHER = (
    "compile head and loss together, as one function that calls the model and then the loss, "
    "or as a model that computes its loss"
)
BETWEEN = "leave it out between the product and the loss, or write it with the operations that the README lists"
BESIDE = "compute it outside of the compiled function, or from a product of its own under no_grad"


@dataclass
class Site:
    """A matmul, the reductions that its logits end in, and where they escape: an escape needs them in memory."""

    logits: DeferredLogits
    reductions: list[Reduction] = field(default_factory=list)
    escapes: dict[Node, str] = field(default_factory=dict)
    returned: dict[Node, DeferredLogits] = field(default_factory=dict)  # those that are results of the graph
    chain: list[Node] = field(default_factory=list)  # the deferred values and the reductions, in graph order

    def path(self, node: Node) -> set[Node]:
        """The nodes that the logits go through from the matmul to a node, without it."""
        deferred = set(self.chain) - {reduction.node for reduction in self.reductions}
        path = {other for other in deferred if written(other) and other < node}
        stack = [node, *path]
        while stack:
            new = deferred.intersection(stack.pop().all_input_nodes) - path
            path |= new
            stack += new
        return path


def find_sites(graph: Graph) -> list[Site]:
    """All matmuls of a graph as sites, most of them without any reduction."""
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    modes, dead = grad_modes(graph), dead_nodes(graph)
    sites: list[Site] = []
    others: dict[Node, Any] = {}
    for node in nodes:
        logits = matmuls.start(node, modes)
        if logits is not None:
            sites.append(_follow(logits, nodes, position, others, dead))
    return sites


def _follow(
    logits: DeferredLogits, nodes: list[Node], position: dict[Node, int], others: dict[Node, Any], dead: set[Node]
) -> Site:
    """others: the deferred values of the sites before, to which this one's are added. dead: go with the logits."""
    site = Site(logits)
    values: dict[Node, Any] = {logits.matmul: logits}
    queue = [position[logits.matmul]]
    queued = set(queue)
    while queue:
        node = nodes[heapq.heappop(queue)]
        if node.op == "output":
            _note_returned(site, node, values)
            continue
        site.chain.append(node)
        if node is not logits.matmul and node not in dead:
            try:
                values[node] = value = apply(node, values, others)
                _overwrite(node, value, values)
                if isinstance(value, DeferredLogits) and value.products > site.logits.products:
                    _absorb(site, node, value, others)
                    site.chain.sort(key=position.__getitem__)
            except Refused as refused:
                values.pop(node, None)
                site.escapes[node] = str(refused)
                continue
            if value is None:
                del values[node]
                continue
            if isinstance(value, Reduction):
                site.reductions.append(value)
                continue
        for user in node.users:
            if position[user] not in queued:
                queued.add(position[user])
                heapq.heappush(queue, position[user])
    others.update(values)
    return site


def _note_returned(site: Site, output: Node, values: dict[Node, Any]) -> None:
    for source in output.all_input_nodes:
        value = values.get(source)
        if isinstance(value, DeferredLogits):
            site.returned[source] = value
        elif value is not None and not isinstance(value, Reduction):
            site.escapes[source] = "it is returned, so the logits are needed in memory"


def _overwrite(node: Node, value: Any, values: dict[Node, Any]) -> None:
    """After an operation in place, its operand has the new value too; other views of the memory must not be read."""
    for target in written(node):
        old = values.get(target)
        for other in list(values):
            if values[other] is old:
                values[other] = value
            elif other is not node and shares_memory(other, target) and any(user > node for user in other.users):
                raise Refused("the logits are written in place, and read through another view; write to one tensor")


def _absorb(site: Site, node: Node, sum_of_products: DeferredLogits, others: dict[Node, Any]) -> None:
    """Another product, to which a node adds the site's, becomes part of the site."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        new = {source for source in stack.pop().all_input_nodes if source in others} - found
        found |= new
        stack += new
    written_before = any(source in written(user) for source in found for user in source.users if user is not node)
    read_later = any(
        user > node
        for target in written(node)
        for source in others
        if shares_memory(source, target)
        for user in source.users
    )
    if written_before or read_later:
        raise Refused("one of two products that are added is written in place besides; write after adding, to the sum")
    site.chain += found - set(site.chain)
    parts = {name: getattr(sum_of_products, name) for name in ("matmul", "width", "hidden")}
    site.logits = replace(site.logits, **parts)


def why_not(site: Site, joined: list[Site], transformed: set[Node], options: Options) -> Refusal | None:
    """Why a site should stay as it is, by what is known of it alone; None where it can be rewritten.

    joined: the sites on the same weight, which may become one operator call, this one among them.
    transformed: the nodes that run under a torch.func transform.
    """
    matmul = site.logits.matmul
    small = _too_small(site, joined, options)
    if small is not None:
        return small
    if not transformed.isdisjoint(site.chain):
        return refusal(matmul, "torch.func", TRANSFORMED, of=site)
    for node, reason in site.escapes.items():
        return refusal(node, operation(node), reason, of=site, otherwise=BESIDE if site.reductions else BETWEEN)
    if site.returned and site.reductions:
        if options.logits != "refuse":
            return None
        reason = 'the logits are returned beside the loss, and the option logits is "refuse"; return the loss alone'
        return refusal(matmul, "return", reason, of=site)
    if site.returned:
        broken = graph_break(matmul.graph.owning_module)
        reason = "the logits are returned and no loss of them is in this graph"
        reason += "" if broken is None else f", which breaks at {broken}"
        by_choice = not tensor_of(matmul).requires_grad
        advice = TOGETHER if broken is None else f"avoid the break; {TOGETHER}"
        return refusal(matmul, "return", reason, by_choice, of=site, advice=advice)
    return None


def _too_small(site: Site, joined: list[Site], options: Options) -> Refusal | None:
    vocab, size = size_hint(site.logits.vocab_size), logits_bytes(site)
    if vocab is not None and vocab < options.min_vocab:
        reason = (
            f"{vocab} classes are fewer than min_vocab={options.min_vocab}: too few to gain; min_vocab=0 rewrites all"
        )
    elif size is not None and size < options.min_logits_bytes:
        reason = (
            f"the logits take {size} bytes, less than min_logits_bytes={options.min_logits_bytes}; "
            "min_logits_bytes=0 rewrites all"
        )
    elif (quick := _too_quick(joined, options)) is not None:
        reason = quick
    else:
        return None
    name = site.reductions[0].name if site.reductions else "return"
    return refusal(site.logits.matmul, name, reason, by_choice=True, of=site)


def _too_quick(joined: list[Site], options: Options) -> str | None:
    """Why a loss would get slower on a GPU: what starts the kernels there takes longer than they run."""
    logits = joined[0].logits
    if logits.compute_dtype.itemsize > 2 or not on_gpu(logits.matmul):
        return None
    sizes = [size_hint(size) for size in (logits.vocab_size, logits.width)]
    sizes += [size_hint(math.prod(site.logits.row_shape)) for site in joined]
    known = [size for size in sizes if size is not None]
    if len(known) < len(sizes):
        return None
    vocab, width, *row_counts = known
    flops = 2 * sum(row_counts) * vocab * width
    if flops < options.min_flops:
        return (
            f"the logits take {flops:.1e} operations, less than min_flops={options.min_flops:.1e}: "
            "on a GPU Inductor's loss is faster; min_flops=0 rewrites all, which saves memory"
        )
    if options.min_flops > 0 and sum(row_counts) < FEWEST_GPU_ROWS:
        return (
            f"{sum(row_counts)} rows are fewer than {FEWEST_GPU_ROWS}: on a GPU Inductor's loss is faster; "
            "min_flops=0 rewrites all, which saves memory"
        )
    return None


def on_gpu(node: Node) -> bool:
    """Whether the value of a node is on a GPU."""
    return tensor_of(node).device.type == "cuda"


def is_worth_reporting(site: Site, options: Options) -> bool:
    """Whether a user may have expected a rewrite: a loss was reached, or a large head's logits are just returned."""
    if any(reduction.is_loss for reduction in site.reductions) or "log_softmax" in map(operation, site.chain):
        return True
    vocab = size_hint(site.logits.vocab_size)
    only_returned = bool(site.returned) and not site.escapes
    return only_returned and vocab is not None and vocab >= max(options.min_vocab, 1024)


def logits_bytes(site: Site) -> int | None:
    """What the logits would take in memory as they enter the first reduction; None for unknown sizes."""
    logits = site.reductions[0].logits if site.reductions else site.logits
    sizes = [size_hint(size) for size in site.logits.shape]
    known = [size for size in sizes if size is not None]
    return math.prod(known, start=logits.dtype.itemsize) if len(known) == len(sizes) else None


def orphan_losses(graph: Graph, sites: list[Site], transformed: set[Node], options: Options) -> list[Refusal]:
    """Refusals for the losses that no site reaches, with the operation that cut them off where one can be named."""
    reached = {node for site in sites for node in site.chain if node not in site.escapes}
    escapes = {node: reason for site in sites for node, reason in site.escapes.items()}
    reported = {node for site in sites if is_worth_reporting(site, options) for node in site.escapes}
    refusals = []
    for node in graph.nodes:
        log_softmax = operation(node) == "log_softmax"  # elsewhere than in a loss too, so only after a classifier head
        if not (log_softmax or operation(node) in LOSSES) or node in reached:
            continue
        source = tensor_of(node.args[0] if node.args else node.kwargs.get("input"))
        if source is None or source.dim() == 0:
            continue
        vocab = source.shape[-1 if log_softmax else min(1, source.dim() - 1)]
        if (size_hint(vocab) or 0) < options.min_vocab:
            continue
        cut = _cut(node, vocab, escapes)
        if log_softmax and (cut is None or node in transformed):
            continue
        if node in transformed:
            refusals.append(refusal(node, "torch.func", TRANSFORMED))
        elif cut is None:
            refusals.append(_orphan(node, vocab))
        elif cut not in reported:
            site = next(site for site in sites if cut in site.escapes)
            refusals.append(refusal(cut, operation(cut), escapes[cut], of=site, otherwise=BETWEEN))
            reported.add(cut)
    return refusals


def _orphan(loss: Node, vocab: Any) -> Refusal:
    """A loss of logits that no known product makes: an input of the graph, or something else."""
    node = loss.all_input_nodes[0]
    while len(sources := [source for source in node.all_input_nodes if tensor_of(source) is not None]) == 1:
        [node] = sources
    if node.op != "placeholder" or not any(statically_equal(size, vocab) for size in tensor_of(node).shape):
        return refusal(loss, operation(loss), ORPHANED)
    reason = f"its logits are an input of this graph, `{words.name(node)}`, and what makes them is not compiled with it"
    return refusal(loss, operation(loss), reason, advice=TOGETHER, chain=f"{words.name(node)} -> {words.loss(loss)}")


def _cut(loss: Node, vocab: Any, escapes: dict[Node, str]) -> Node | None:
    """The escape through which the logits went into a loss: found backwards along tensors as wide as the logits."""
    seen, stack = set(), [loss]
    while stack:
        node = stack.pop()
        if node in escapes:
            return node
        for source in node.all_input_nodes:
            tensor = tensor_of(source)
            if (
                source not in seen
                and tensor is not None
                and any(statically_equal(size, vocab) for size in tensor.shape)
            ):
                seen.add(source)
                stack.append(source)
    return None


def refusal(
    node: Node,
    name: str,
    reason: str,
    by_choice: bool = False,
    *,
    of: Site | None = None,
    advice: str = "",
    otherwise: str = "",
    chain: str = "",
) -> Refusal:
    """Of an operation on the logits `of` a site.

    reason: why, or "why; what to do" where no advice is given. otherwise: the advice where there is none at all.
    """
    if not advice:
        reason, _, advice = reason.partition("; ")
    if of is not None:
        chain = words.chain(of, None if node is of.logits.matmul else node)
    matmul = "" if of is None else location(of.logits.matmul)
    return Refusal(location(node), name, reason, by_choice, advice or otherwise, chain, matmul)


def location(node: Node) -> str:
    """ "file:line" of the user's innermost frame that made a node, "" where Dynamo kept none."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if "/torch/nn/" not in frame[0].replace("\\", "/")] or frames
    return ":".join(own[-1]) if own else ""
