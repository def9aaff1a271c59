"""Runs the GPU tests of small shapes under NVIDIA's compute-sanitizer and prints its summaries.

    python tests/sanitize.py                          # memcheck, racecheck and initcheck, a few minutes each
    python tests/sanitize.py --tools memcheck -k ignored_rows

It needs a GPU and compute-sanitizer, which the CUDA toolkit brings, or a wheel of it. Fails where a tool finds
something, a test fails, or no test was run.
"""

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = "tests/ops/test_gpu.py"
SMALL = "no_worse or ignored_rows"  # what else there is needs much memory, or counts on its speed
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


def sanitize(sanitizer: Path, tool: str, expression: str, seconds: float) -> bool:
    """Whether tests ran and nothing was found."""
    if tool in ONLY:
        expression = f"({expression}) and {ONLY[tool]}"
    command = [str(sanitizer), "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
    command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", TESTS, "-k", expression]
    # memory that PyTorch keeps for itself hides what is out of bounds of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{tool}: stopped after {seconds:.0f} s without a result", flush=True)
        return False
    lines = (done.stdout + done.stderr).splitlines()
    told = [line for line in lines if re.search("SUMMARY|passed|failed|skipped|Error: ", line)]
    print(f"{tool}: exit code {done.returncode}", *(told[-6:] or lines[-6:]), sep="\n    ", flush=True)
    return done.returncode == 0 and any(" passed" in line for line in told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("-k", default=SMALL, help="which of the tests, as for pytest")
    parser.add_argument("--seconds", type=float, default=3600, help="the most that one tool may take")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use")
    found = [place for place in places() if os.access(place, os.X_OK)]
    if not found:
        looked = "\n    ".join(str(place.parent) for place in places())
        sys.exit(
            "compute-sanitizer was not found: install it with the CUDA toolkit (cuda-sanitizer-api), or set PATH or "
            f"CUDA_HOME. Looked on the path, under nvidia and triton in site-packages, and in\n    {looked}"
        )
    print(f"with {found[0]}", flush=True)
    results = [sanitize(found[0], tool, arguments.k, arguments.seconds) for tool in arguments.tools]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
