"""Do the tests catch faults? Plants single faults in a copy of the package and runs a few tests on each.

    python tests/mutations.py                 # all of them, ten minutes on one core
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
from pathlib import Path

import torch
from faults import FAULTS, Fault

ROOT = Path(__file__).parent.parent
SECONDS = 1200  # at most, for the tests of one fault


def outcome(fault: Fault) -> str:
    """ "caught", "survived", or why neither can be said."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copy = Path(directory)
        for part in ("cce_inductor", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = copy / "cce_inductor" / fault.file
        try:
            source.write_text(fault.planted_in(source.read_text()))
        except ValueError as error:
            return f"not planted: {error}"
        flags = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutations"]
        command = [sys.executable, "-m", "pytest", *flags, *fault.tests.split()]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        if not fault.gpu:  # the tests that run kernels in Triton's interpreter are skipped where there is a GPU
            environment["CUDA_VISIBLE_DEVICES"] = ""
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"no result in {SECONDS} s"
        return {0: "survived", 1: "caught"}.get(done.returncode, f"no result:\n{done.stdout[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only faults with one of these in their name")
    words = parser.parse_args().words
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not torch.cuda.is_available():
        for fault in (fault for fault in faults if fault.gpu):
            print(f"left out, needs a GPU: {fault.name}")
        faults = [fault for fault in faults if not fault.gpu]
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
