"""Summary of a sample: of times, of speed-ups, of scores."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation (n - 1; None of one value), extremes, quartiles and median."""
    quantiles = np.percentile(values, [0, 25, 50, 75, 100])
    return dict(
        mean=float(np.mean(values)),
        std=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        **dict(zip(('min', 'q1', 'median', 'q3', 'max'), map(float, quantiles), strict=True)),
    )
