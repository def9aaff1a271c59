"""Kernels compile for GPUs that are not here, and find the shared memory there that they need."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# the forward and the backward with most of it
KERNELS = ("forward_kernel", "block_gradient_kernel", "weight_gradient_kernel")


def test_the_largest_kernels_fit_where_shared_memory_is_small(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS.parent), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(TESTS / "architectures.py"), "--gpus", "12.0", "--problems", "bfloat16"]
    done = subprocess.run([*command, "--kernels", *KERNELS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kernel in KERNELS:
        assert any(kernel in line and "KiB shared" in line for line in done.stdout.splitlines()), done.stdout
