"""The operators: reductions over the vocabulary of f(hidden @ weight.T + bias). They know tensors, not graphs."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("cce_inductor needs Triton, also where it runs on a CPU only: pip install triton") from error
