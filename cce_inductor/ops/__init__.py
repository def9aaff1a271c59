"""The operators: reductions over the vocabulary of f(hidden @ weight.T + bias). They know tensors, not graphs."""
