"""Benchmarks beside other libraries, which are optional extras."""
