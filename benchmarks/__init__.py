"""Benchmark that compares the service with other methods: `python -m benchmarks`. It is not part of the wheel."""
