"""Runs the GPU tests of small shapes under NVIDIA's compute-sanitizer and prints its summaries.

    python tests/sanitize.py                          # memcheck, racecheck and initcheck, a few minutes each
    python tests/sanitize.py --tools memcheck -k ignored_rows

It needs a GPU, and compute-sanitizer of the CUDA toolkit on the path. Fails where a tool finds something, or a test
fails.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
TESTS = "tests/ops/test_gpu.py"
SMALL = "no_worse or ignored_rows"  # what else there is needs much memory, or counts on its speed


def sanitize(sanitizer: str, tool: str, expression: str) -> bool:
    """Whether nothing was found."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
    command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", TESTS, "-k", expression]
    # memory that PyTorch keeps for itself hides what is out of bounds of a tensor
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    told = [line for line in lines if re.search("SUMMARY|passed|failed|Error: ", line)]
    print(f"{tool}: exit code {done.returncode}", *(told[-6:] or lines[-6:]), sep="\n    ", flush=True)
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("-k", default=SMALL, help="which of the tests, as for pytest")
    arguments = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        sys.exit("compute-sanitizer was not found: install the CUDA toolkit, or set PATH")
    results = [sanitize(sanitizer, tool, arguments.k) for tool in arguments.tools]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
