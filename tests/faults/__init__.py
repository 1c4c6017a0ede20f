"""Faults injected for real, and counted: `make faults` runs the full counts, `make test` a draw of each."""
