"""Calibration of the image-level score as a probability: isotonic regression and a reliability diagram."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from app.volume import BoolArray, FloatArray
from training.experiments.image_level import NEAR, ScoredImages
from training.experiments.metrics import BOOTSTRAP_DRAWS, Interval, percentile_interval
from training.experiments.results import KindReliability, Reliability, ReliabilityBin

BINS = 10
FAR = "every foreign class"

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Monotone map from a score to the probability of not being healthy.

    Attributes
    ----------
    scores, shares : (N,) ndarray
        Points of the map, scores ascending. The map is constant beyond its ends.
    """

    scores: DoubleArray
    shares: DoubleArray

    @classmethod
    def fit(cls, scores: FloatArray, is_anomalous: BoolArray) -> "Calibration":
        """Fit by isotonic regression, (N,) each."""
        values, at, counts = np.unique(_finite(scores), return_inverse=True, return_counts=True)
        observed = np.bincount(at, weights=is_anomalous.astype(np.float64)) / counts
        shares = isotonic_regression(observed, weights=counts.astype(np.float64)).x
        return cls(values, np.asarray(shares, dtype=np.float64))

    def predict(self, scores: FloatArray) -> DoubleArray:
        """Return probabilities, (N,)."""
        return np.interp(_finite(scores), self.scores, self.shares)


def _finite(scores: FloatArray) -> DoubleArray:
    """Replace NaN, the score of an image without a head, by the greatest number."""
    greatest = float(np.finfo(np.float32).max)
    return np.nan_to_num(scores.astype(np.float64), nan=greatest, posinf=greatest, neginf=-greatest)


def bin_images(
    scores: FloatArray, probability: DoubleArray, is_anomalous: BoolArray, subjects: Sequence[str]
) -> DoubleArray:
    """Sum images in bins of about equal count, by subject.

    Returns
    -------
    (S, B, 4) ndarray
        Images, anomalous images, sum of probabilities and of squared errors of each subject and bin.
    """
    order = np.argsort(_finite(scores), kind="stable")
    bins = np.empty(len(order), dtype=np.int64)
    for index, part in enumerate(np.array_split(order, BINS)):
        bins[part] = index
    names, owners = np.unique(subjects, return_inverse=True)
    sums = np.zeros((len(names), BINS, 4))
    each = np.stack([np.ones(len(scores)), is_anomalous, probability, (probability - is_anomalous) ** 2], axis=1)
    np.add.at(sums, (owners, bins), each)
    return sums


def _observed_share(sums: DoubleArray) -> DoubleArray:
    """Return the share of anomalous images, (...); NaN for an empty bin."""
    return np.where(sums[..., 0] > 0, sums[..., 1] / np.maximum(sums[..., 0], 1), np.nan)


def calibration_error(sums: DoubleArray) -> DoubleArray:
    """Return the expected calibration error of sums (..., B, 4), (...)."""
    gap = np.abs(sums[..., 2] - sums[..., 1]).sum(axis=-1)
    return np.asarray(gap / sums[..., 0].sum(axis=-1))


def brier_score(sums: DoubleArray) -> DoubleArray:
    """Return the Brier score of sums (..., B, 4), (...)."""
    return np.asarray(sums[..., 3].sum(axis=-1) / sums[..., 0].sum(axis=-1))


def evaluate_bins(sums: DoubleArray, fitted_share: float) -> KindReliability:
    """Return bins and errors with bootstrap intervals over subjects.

    Parameters
    ----------
    sums : (S, B, 4) ndarray
        Counts, as returned by `bin_images`.
    fitted_share : float
        Share of anomalous images in the calibration data.
    """
    count = len(sums)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=BOOTSTRAP_DRAWS)
    drawn = np.tensordot(draws.astype(np.float64), sums, axes=1)  # (draws, B, 4)
    whole = sums.sum(axis=0)

    def interval(statistic: Callable[[DoubleArray], DoubleArray]) -> Interval:
        return percentile_interval(float(statistic(whole)), statistic(drawn))

    observed = zip(_observed_share(whole), _observed_share(drawn).T, strict=True)
    return KindReliability(
        bins=tuple(
            ReliabilityBin(images=int(w[0]), predicted=float(w[2] / w[0]), observed=percentile_interval(float(o), d))
            for w, (o, d) in zip(whole, observed, strict=True)
        ),
        calibration_error=interval(calibration_error),
        brier=interval(brier_score),
        fitted_share=fitted_share,
        share=float(whole[:, 1].sum() / whole[:, 0].sum()),
    )


def _pool(
    name: str, healthy: ScoredImages, anomalous: Sequence[ScoredImages]
) -> tuple[FloatArray, BoolArray, list[str]]:
    """Return scores, truth and subjects of images of several kinds."""
    parts = [healthy, *anomalous]
    scores = np.concatenate([p.scores[name] for p in parts])
    truth = np.arange(len(scores)) >= len(healthy.scores[name])
    return scores, truth, [s for p in parts for s in p.images.subjects]


def evaluate(name: str, validation: Sequence[ScoredImages], test: Sequence[ScoredImages]) -> Reliability:
    """Fit on healthy and near validation images, and evaluate on near and on far test images.

    Parameters
    ----------
    name : str
        Name of the score.
    validation, test : sequence of ScoredImages
        Healthy images first.
    """
    scores, truth, _ = _pool(name, validation[0], validation[1:])
    calibration = Calibration.fit(scores, truth)
    kinds = {
        NEAR: [s for s in test[1:] if s.images.kind == NEAR],
        FAR: [s for s in test[1:] if s.images.kind != NEAR],
    }
    evaluated = {}
    for kind, anomalous in kinds.items():
        values, is_anomalous, subjects = _pool(name, test[0], anomalous)
        sums = bin_images(values, calibration.predict(values), is_anomalous, subjects)
        evaluated[kind] = evaluate_bins(sums, float(truth.mean()))
    return Reliability(score=name, kinds=evaluated)
