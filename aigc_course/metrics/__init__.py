"""Numbers that judge what was generated: ``features`` compares pictures by their features, ``text`` language."""

from .features import (
    MetricError,
    ModeCoverage,
    PrecisionRecall,
    class_coverage,
    frechet_distance,
    frechet_distance_gaussians,
    kernel_distance,
    mode_coverage,
    nearest_neighbours,
    polynomial_kernel,
    precision_recall,
)
from .text import bits_per_character, distinct_n, longest_copied_span, perplexity

__all__ = [
    "MetricError",
    "ModeCoverage",
    "PrecisionRecall",
    "bits_per_character",
    "class_coverage",
    "distinct_n",
    "frechet_distance",
    "frechet_distance_gaussians",
    "kernel_distance",
    "longest_copied_span",
    "mode_coverage",
    "nearest_neighbours",
    "perplexity",
    "polynomial_kernel",
    "precision_recall",
]
