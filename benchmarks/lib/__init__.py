"""What the benchmarks share: contestants, their processes, reports."""
