"""Benchmark of the service beside other methods: `python -m benchmarks`. It is not part of the wheel."""
