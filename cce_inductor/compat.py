"""Everything private to PyTorch that the package touches, in one place. Checked against torch 2.11, 2.13 and 2.15."""

from collections.abc import Callable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass

__all__ = ["CustomGraphPass", "cache_dir", "detect_fake_mode", "inductor_backend", "inductor_option_names"]


def cache_dir() -> str:
    """Inductor's cache directory of this user (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as inductor_cache_dir

    return inductor_cache_dir()


def inductor_backend(mode: str | None, options: dict[str, Any] | None) -> Callable:
    """What `torch.compile(backend="inductor", mode=mode, options=options)` would call with a graph and its inputs.

    It checks the names and types of Inductor's options and raises RuntimeError on a wrong one.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)


def inductor_option_names() -> frozenset[str]:
    """The names that Inductor accepts in `options=`."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())
