"""Runs the GPU tests of small shapes under NVIDIA's compute-sanitizer and prints what it found.

    python tests/sanitize.py                          # memcheck, racecheck and initcheck, a few minutes each
    python tests/sanitize.py --tools memcheck -k ignored_rows

It needs a GPU and compute-sanitizer, which the CUDA toolkit brings, or a wheel of it. Each test has a process of its
own, so that an error in one says nothing of others. Fails where a tool finds something, a test fails, or there is none.
Under racecheck a test may take 40 GB of memory beside the GPU's: fewer --jobs where processes are killed.
"""

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from triton import JITFunction

from cce_inductor import kernels

ROOT = Path(__file__).parent.parent
PREFIX = f"{kernels.__name__}."
OF_CUBLAS = "nvjet"  # in the names of its kernels that use a tensor memory accelerator
TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = ("tests/ops/test_gpu.py", "tests/ops/test_gpu_loss.py", "tests/ops/test_gpu_codes.py")
# What else there is needs much memory, counts on its speed, or differs in the values of its data only.
SMALL = "(no_worse or ignored_rows) and not uniform and not certain"
# initcheck takes memory that a tensor memory accelerator wrote, for Triton or for cuBLAS, to be without a value. Where
# rows are not aligned for that, the same kernels store by pointers.
ONLY = {"initcheck": "pointers"}


def places() -> Iterator[Path]:
    """Where compute-sanitizer may be: on the path, in CUDA toolkits, in Python packages."""
    on_path = shutil.which("compute-sanitizer")
    if on_path is not None:
        yield Path(on_path)
    toolkits = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits += [toolkit for parent in ("/usr/local", "/opt") for toolkit in sorted(Path(parent).glob("cuda*"))]
    for toolkit in toolkits:
        yield toolkit / "bin" / "compute-sanitizer"
        yield toolkit / "compute-sanitizer" / "compute-sanitizer"
    for packages in site.getsitepackages():
        for package in ("nvidia", "triton"):
            yield from sorted(Path(packages, package).rglob("compute-sanitizer"))


def pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def tests(expression: str) -> list[str]:
    """The names of the tests that an expression of pytest's -k selects."""
    command = pytest("--collect-only", *TESTS, "-k", expression)
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [line for line in told.splitlines() if "::" in line]


def watched() -> list[str]:
    """Options for our kernels alone, as racecheck is slow, and for those of cuBLAS that it fails in where it looks at
    others and not at them."""
    modules = (importlib.import_module(module.name) for module in pkgutil.iter_modules(kernels.__path__, PREFIX))
    functions = {name for module in modules for name, value in vars(module).items() if isinstance(value, JITFunction)}
    names = sorted(f"kernel_name={name}" for name in functions if name.endswith("_kernel"))
    return [option for name in [*names, f"kernel_substring={OF_CUBLAS}"] for option in ("--kernel-name", name)]


def found(sanitizer: Path, tool: str, options: list[str], test: str, seconds: float) -> list[str]:
    """What the tool and pytest say of a test where one of them has something to say; nothing where all is well.

    Races inside cuBLAS's kernels are left out: some synchronise in ways that racecheck does not know.
    """
    races = tool == "racecheck"
    options = [*options, *(watched() if races else ("--error-exitcode", "9"))]
    command = [str(sanitizer), "--tool", tool, "--print-limit", "10000", *options, *pytest(test)]
    # memory that PyTorch keeps for itself hides what is out of bounds of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [f"stopped after {seconds:.0f} s"]
    lines = (done.stdout + done.stderr).splitlines()
    if races:
        lines = [line for line in lines if OF_CUBLAS not in line]
    errors = [line for line in lines if re.search("^=====.*(Error|Race|at .*\\+0x)", line)]
    summary = " SUMMARY: " if races else "SUMMARY: 0 errors"  # racecheck's counts what is left out
    clean = not errors and any(summary in line for line in lines)
    if done.returncode == 0 and clean and any("1 passed" in line for line in lines):
        return []
    return [*errors, *(line for line in lines if re.search("SUMMARY|^E  |passed|failed", line))] or lines[-5:]


def sanitize(sanitizer: Path, tool: str, options: list[str], expression: str, jobs: int, seconds: float) -> bool:
    """Whether there were tests, and all is well."""
    if tool in ONLY:
        expression = f"({expression}) and {ONLY[tool]}"
    names = tests(expression)
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda test: found(sanitizer, tool, options, test, seconds), names)
        clean = 0
        for name, result in zip(names, results, strict=True):
            if result:
                print(f"{tool}: {name}", *result[:12], sep="\n    ", flush=True)
            clean += not result
    print(f"{tool}: {clean} of {len(names)} tests clean", flush=True)
    return 0 < clean == len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("-k", default=SMALL, help="which of the tests, as for pytest")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="tests at a time")
    parser.add_argument("--seconds", type=float, default=600, help="the most that one test may take")
    parser.add_argument("--option", action="append", default=[], help="of compute-sanitizer, beside those needed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")
    sanitizers = [place for place in places() if os.access(place, os.X_OK)]
    if not sanitizers:
        looked = "\n    ".join(str(place.parent) for place in places())
        sys.exit(
            "compute-sanitizer was not found: install it with the CUDA toolkit (cuda-sanitizer-api), or set PATH or "
            f"CUDA_HOME. Looked on the path, under nvidia and triton in site-packages, and in\n    {looked}"
        )
    print(f"with {sanitizers[0]}", flush=True)
    how = arguments.option, arguments.k, arguments.jobs, arguments.seconds
    results = [sanitize(sanitizers[0], tool, *how) for tool in arguments.tools]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
