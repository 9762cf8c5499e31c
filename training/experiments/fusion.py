"""One score of several: how far the most unusual of them lies outside what healthy pictures show."""

from dataclasses import dataclass

import numpy as np

from app.volume import FloatArray

FUSED = "fused, the most unusual of six"
# What is fused, and whether a low value is as unusual as a high one. A picture as a whole may be too smooth or
# too dark; inside the head, only too much is a finding.
TWO_SIDED = {
    "KL, percentile 97": False,
    "KL, mean over the head": False,
    "KL, mean over the picture": True,
    "KL at t = 100, mean over the picture": True,
    "residual, percentile 97": False,
    "residual, mean over the head": False,
}
# A residual can be 0, whose logarithm says nothing: lower values than this percentile of the healthy are set to it.
FLOOR_PERCENTILE = 1
# Of the median distance from the median: the standard deviation of a normal distribution.
NORMAL = 1.4826


@dataclass(frozen=True)
class Scale:
    """How a score's logarithm is spread over healthy validation pictures: robust, on each side of its own.

    Attributes
    ----------
    floor : float
        Lower values count as this.
    median : float
        Of the logarithm.
    above, below : float
        Standard deviations on either side of the median.
    """

    floor: float
    median: float
    above: float
    below: float

    @classmethod
    def of(cls, healthy: FloatArray) -> "Scale":
        """From the scores of healthy pictures, (N,)."""
        known = healthy[np.isfinite(healthy)]
        floor = float(np.percentile(known[known > 0], FLOOR_PERCENTILE)) if (known <= 0).any() else float(known.min())
        off = np.log(np.maximum(known, floor))
        middle = float(np.median(off))
        off = off - middle
        above, below = np.median(off[off >= 0]), -np.median(off[off <= 0])
        return cls(floor, middle, NORMAL * float(above), NORMAL * float(below))

    def __call__(self, values: FloatArray, *, two_sided: bool) -> FloatArray:
        """Standard deviations from the healthy median, (N,); what is no number is infinitely unusual."""
        off = np.log(np.maximum(values, self.floor if not two_sided else np.finfo(np.float32).tiny)) - self.median
        scaled = np.where(off > 0, off / self.above, off / self.below)
        unusual = np.abs(scaled) if two_sided else np.maximum(scaled, 0)
        return np.where(np.isnan(values), np.float32(np.inf), unusual).astype(np.float32)


@dataclass(frozen=True)
class Fused:
    """The greatest of several scores, each in standard deviations of healthy validation pictures.

    The greatest was taken, and not the mean of the two greatest, by AUROC on validation pictures with a sprite
    (0.787 and 0.778 for `headct` 1.0.0).
    """

    scales: dict[str, Scale]

    @classmethod
    def of(cls, healthy: dict[str, FloatArray]) -> "Fused":
        """From the single scores of healthy validation pictures."""
        return cls({name: Scale.of(healthy[name]) for name in TWO_SIDED})

    def __call__(self, scores: dict[str, FloatArray]) -> dict[str, FloatArray]:
        """The fused score of pictures, by name."""
        each = [scale(scores[name], two_sided=TWO_SIDED[name]) for name, scale in self.scales.items()]
        return {FUSED: np.max(each, axis=0)}
