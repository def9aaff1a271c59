"""How much scratch memory a call takes where the user leaves that open."""

from dataclasses import replace

from .problem import MIB, Problem

MOST_FOR_CODES = 1024 * MIB


def for_loss_with_gradients(problem: Problem) -> Problem:
    """The same with a workspace for a call whose exact gradients are computed while logits are at hand.

    The more logits have room, the fewer are computed twice. On a CPU more memory does not make it faster.
    """
    return _taking_more(problem, _room_below_half_of_compiled(problem))


def for_approximate_loss(problem: Problem) -> Problem:
    """The same with a workspace for such a call whose gradients are sparse.

    Codes of logits spare time only where many are needed again, so there is a limit to what they may take.
    """
    most = problem.workspace_bytes + MOST_FOR_CODES
    return _taking_more(problem, min(_room_below_half_of_compiled(problem), most))


def _taking_more(problem: Problem, workspace_bytes: int) -> Problem:
    """The same with so large a workspace, if that is more and it may take more."""
    if not (problem.may_take_more and problem.hidden.is_cuda):
        return problem
    return replace(problem, workspace_bytes=max(problem.workspace_bytes, workspace_bytes))


def _room_below_half_of_compiled(problem: Problem) -> int:
    """Bytes of a workspace with which the peak stays below half of torch.compile's, which holds the logits and both
    gradients; below zero where it can't."""
    rows, vocab_size, width = problem.num_rows, problem.vocab_size, problem.width
    gradients = rows * width * problem.hidden_dtype.itemsize + vocab_size * width * problem.weight.dtype.itemsize
    sums = 0 if problem.hidden_dtype == problem.accumulate_dtype else rows * width * problem.accumulate_dtype.itemsize
    records = rows * vocab_size // (8 * problem.compute_dtype.itemsize)  # at most; of tiles, and what is made of them
    return (problem.logits_bytes + gradients) // 2 - gradients - sums - records
