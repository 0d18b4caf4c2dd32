"""The parts of tools/gpu_check.py: a supervisor that imports no torch, and the stages, each a process of its own."""
