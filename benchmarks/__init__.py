"""Timings of the course's code beside what a reader would otherwise use: ``python -m benchmarks``."""
