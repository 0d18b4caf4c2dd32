"""The `megalm` backends: for each operation its kernels of csrc as torch operations, and their autograd formulas."""
