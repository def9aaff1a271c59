"""Every language model of transformers that can be built small: is its loss rewritten, and if not, why?

    python tests/models/sweep.py                    # all kinds, the models untouched
    python tests/models/sweep.py --loss-only        # the model wrapped in a function that returns the loss alone
    python tests/models/sweep.py --kinds causal --only llama,gpt2 --compile

Each model is traced with its labels, rewritten and run, then loss and gradients are compared with eager. It prints a
row for each model and counts at the end. With --compile the graphs go through Inductor, which takes ten times as long.
"""

import argparse
import collections
import concurrent.futures.process
import logging
import resource
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import tiny
import torch
import transformers

import cce_inductor
from cce_inductor.graph.driver import rewrite_module
from cce_inductor.graph.returned import LazyResults
from cce_inductor.graph.sites import TOGETHER

EVERYTHING = {"min_vocab": 0, "min_logits_bytes": 0}
TIMEOUT = 240  # seconds, to build a model or to compare it
MEMORY = 8 << 30


VERDICTS = {
    "rewritten": "",
    "refused": "head and loss are in one graph, which the pass does not understand",
    "apart": "head and loss are in no graph together: Dynamo ends a graph between them",
    "wrong": "it differs from the same program without the pass",
    "not traceable": "Dynamo raises an error",
    "not built": "it could not be made small, or does not run with tokens alone",
}


@dataclass(frozen=True)
class Result:
    """verdict: one of VERDICTS."""

    kind: str
    name: str
    verdict: str
    reason: str = ""


def examine(kind: str, name: str, loss_only: bool, through_inductor: bool) -> Result:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(TIMEOUT)
    try:
        model = tiny.model(name, kind)
        given = tiny.inputs(model)
        tiny.without_dropout(model)
        model(**given)  # some choose how to go on in their first call
        torch.manual_seed(0)
        eager = _loss_and_gradients(model, model(**given).loss)
    except Exception as error:
        return Result(kind, name, "not built", _one_line(error))
    finally:
        signal.alarm(0)
    function = (lambda **kwargs: model(**kwargs).loss) if loss_only else model
    signal.alarm(TIMEOUT)
    try:
        return _compare(kind, name, model, function, given, eager, through_inductor)
    except Exception as error:
        return Result(kind, name, "not traceable", _one_line(error))
    finally:
        signal.alarm(0)


def _compare(kind, name, model, function, given, eager, through_inductor) -> Result:
    reports = []

    def pass_alone(module, _):
        lazy = LazyResults(module.graph)
        reports.append(rewrite_module(module, cce_inductor.Options(**EVERYTHING), lazy))
        return lazy.around(module.forward)

    pass_alone.__module__ = plain.__module__ = "cce_inductor.backend"  # so that warning_once is left out for both
    if through_inductor:
        with cce_inductor.capture_reports() as reports:
            ours = _compiled(model, function, given, backend="cce", options=EVERYTHING)
    else:
        ours = _compiled(model, function, given, backend=pass_alone)
    notes = [str(refusal) for report in reports for refusal in report.refused]
    if not _same(ours, eager):
        # some models do other things when they are compiled, whatever the backend
        if not _same(ours, _compiled(model, function, given, backend=plain)):
            return Result(kind, name, "wrong", "; ".join(["its loss or gradients differ from eager", *notes]))
        notes.append("compiled without the pass, it differs from eager too, and in the same way")
    if any(report.rewritten for report in reports):
        return Result(kind, name, "rewritten", "; ".join(notes))
    together = [refusal for report in reports for refusal in report.refused if TOGETHER not in refusal.advice]
    if together or len(reports) == 1:
        return Result(kind, name, "refused", "; ".join(notes) or "no loss over logits was found")
    where = dict.fromkeys(where for report in reports for where in report.breaks)
    return Result(
        kind, name, "apart", f"{len(reports)} graphs; Dynamo ends them at {'; '.join(where) or 'no known place'}"
    )


def plain(module, _):
    return module.forward


def _compiled(model, function, given, **how) -> list:
    torch._dynamo.reset()
    torch.manual_seed(0)
    output = torch.compile(function, **how)(**given)
    return _loss_and_gradients(model, output if isinstance(output, torch.Tensor) else output.loss)


def _same(ours: list, theirs: list) -> bool:
    return all(
        (mine is None) == (other is None)
        and (mine is None or torch.allclose(mine, other, rtol=1e-3, atol=1e-5, equal_nan=True))
        for mine, other in zip(ours, theirs, strict=True)
    )


def _loss_and_gradients(model, loss) -> list:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


def _too_slow(*_) -> None:
    raise TimeoutError(f"it took more than {TIMEOUT} s")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def _in_processes(tasks: list[tuple], workers: int) -> Iterator[Result]:
    """Results as they come. Processes are started anew now and then, as Dynamo's memory grows with every model."""
    context = torch.multiprocessing.get_context("spawn")
    for start in range(0, len(tasks), 40 * workers):
        with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
            futures = {pool.submit(examine, *task): task for task in tasks[start : start + 40 * workers]}
            for future in concurrent.futures.as_completed(futures):
                kind, name, *_ = futures[future]
                dead = isinstance(future.exception(), concurrent.futures.process.BrokenProcessPool)
                yield Result(kind, name, "not traceable", "its process died") if dead else future.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(tiny.KINDS), help="of " + ", ".join(tiny.KINDS))
    parser.add_argument("--only", default="", help="model types, separated by commas")
    parser.add_argument("--loss-only", action="store_true", help="compile a function that returns the loss alone")
    parser.add_argument("--compile", action="store_true", help="through Inductor too")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    only = set(filter(None, arguments.only.split(",")))
    tasks = [
        (kind, name, arguments.loss_only, arguments.compile)
        for kind in arguments.kinds.split(",")
        for name in tiny.KINDS[kind]
        if not only or name in only
    ]
    counts: collections.Counter = collections.Counter()
    for result in _in_processes(tasks, arguments.workers):
        counts[result.kind, result.verdict] += 1
        print(f"{result.kind:10} {result.name:32} {result.verdict:14} {result.reason}", flush=True)
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    print(f"{'':10} " + " ".join(f"{verdict:>14}" for verdict in VERDICTS))
    for kind in arguments.kinds.split(","):
        print(f"{kind:10} " + " ".join(f"{counts[kind, verdict]:14}" for verdict in VERDICTS))
    print("\n".join(f"{verdict}: {meaning}" for verdict, meaning in VERDICTS.items() if meaning))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
