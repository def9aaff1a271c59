"""Time, memory and accuracy against eager PyTorch and torch.compile: `python -m cce_inductor.bench`."""
