"""Every language model of transformers that can be built small: is its loss rewritten, and if not, why?

    python tests/models/sweep.py                    # all kinds, the models untouched
    python tests/models/sweep.py --loss-only        # the model wrapped in a function that returns the loss alone
    python tests/models/sweep.py --kinds causal --only llama,gpt2 --compile

Each model is traced with its labels, rewritten and run, then loss and gradients are compared with eager. It prints a
row for each model and counts at the end. With --compile the graphs go through Inductor, which takes ten times as long.
"""

import argparse
import collections
import concurrent.futures
import logging
import resource
import signal
import warnings
from dataclasses import dataclass

import tiny
import torch
import transformers

import cce_inductor
from cce_inductor.graph.driver import rewrite_module
from cce_inductor.graph.returned import LazyResults

EVERYTHING = {"min_vocab": 0, "min_logits_bytes": 0}
TIMEOUT = 120  # seconds, to build a model or to compare it
MEMORY = 8 << 30


@dataclass(frozen=True)
class Result:
    """verdict: "rewritten", "refused", "wrong" (differs from eager), "not traceable" or "not built"."""

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

    torch._dynamo.reset()
    torch.manual_seed(0)
    if through_inductor:
        compiled = torch.compile(function, backend="cce", options=EVERYTHING)
        with cce_inductor.capture_reports() as reports:
            output = compiled(**given)
    else:
        pass_alone.__module__ = "cce_inductor.backend"  # so that warning_once is left out, as it is for the backend
        output = torch.compile(function, backend=pass_alone)(**given)
    ours = _loss_and_gradients(model, output if isinstance(output, torch.Tensor) else output.loss)
    rewritten = sum(len(report.rewritten) for report in reports)
    refused = [str(refusal) for report in reports for refusal in report.refused]
    for mine, theirs in zip(ours, eager, strict=True):
        if (mine is None) != (theirs is None) or (
            mine is not None and not torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5, equal_nan=True)
        ):
            return Result(kind, name, "wrong", f"{rewritten} rewritten; differs from eager")
    if rewritten:
        return Result(kind, name, "rewritten", "; ".join(refused))
    reason = "; ".join(refused) or "no loss over logits was found"
    return Result(kind, name, "refused", f"{len(reports)} graph(s): {reason}")


def _loss_and_gradients(model, loss) -> list:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


def _too_slow(*_) -> None:
    raise TimeoutError(f"it took more than {TIMEOUT} s")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


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
    reasons: collections.Counter = collections.Counter()
    context = torch.multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, context, max_tasks_per_child=40) as pool:
        for future in concurrent.futures.as_completed([pool.submit(examine, *task) for task in tasks]):
            result = future.result()
            counts[result.kind, result.verdict] += 1
            if result.verdict in ("refused", "wrong"):
                reasons[result.reason.split(": ", 1)[-1].rsplit(": ", 1)[-1]] += 1
            print(f"{result.kind:10} {result.name:32} {result.verdict:14} {result.reason}", flush=True)
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}")
    verdicts = ("rewritten", "refused", "wrong", "not traceable", "not built")
    print(f"{'':10} " + " ".join(f"{verdict:>14}" for verdict in verdicts))
    for kind in arguments.kinds.split(","):
        print(f"{kind:10} " + " ".join(f"{counts[kind, verdict]:14}" for verdict in verdicts))
    for reason, count in reasons.most_common():
        print(f"{count:4}  {reason}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
