"""AIGC: generative models from theory to practice. The package behind the course's notebooks."""

__version__ = "0.1.0"
