"""Fused operations on one rank: each file holds the reference, the fast path and the backends of one operation."""
