"""The dtypes in which operations are tested on a CPU."""

import torch

DTYPES = [torch.float32, torch.bfloat16]
