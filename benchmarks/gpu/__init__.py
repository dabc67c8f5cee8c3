"""Measurements on one GPU, prepared so that a few minutes on such a machine suffice.

`benchmarks/gpu/run.sh OUT` runs them all; start reading there.
"""
