"""Whether the image-wise score can be read as a probability: what it predicts against what is observed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

mpl.use("Agg")
from matplotlib import pyplot as plt

from app.volume import BoolArray, FloatArray
from training.config import ROOT
from training.experiments.imagewise import NEAR, Scored
from training.experiments.metrics import BOOTSTRAP, Interval

FIGURE = ROOT / "docs" / "figures" / "reliability.png"
BINS = 10
FOREIGN = "every foreign class"

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Score -> probability of not being healthy, which never falls: isotonic regression.

    Attributes
    ----------
    scores, shares : (N,) ndarray
        What it goes through, scores ascending; constant beyond its ends.
    """

    scores: DoubleArray
    shares: DoubleArray

    @classmethod
    def fit(cls, scores: FloatArray, ill: BoolArray) -> "Calibration":
        """From pictures of which it is known, (N,)."""
        values, at, counts = np.unique(_filled(scores), return_inverse=True, return_counts=True)
        observed = np.bincount(at, weights=ill.astype(np.float64)) / counts
        shares = isotonic_regression(observed, weights=counts.astype(np.float64)).x
        return cls(values, np.asarray(shares, dtype=np.float64))

    def __call__(self, scores: FloatArray) -> DoubleArray:
        """Probabilities, (N,)."""
        return np.interp(_filled(scores), self.scores, self.shares)


def _filled(scores: FloatArray) -> DoubleArray:
    """No number: a picture without a head, as unusual as can be."""
    greatest = float(np.finfo(np.float32).max)
    return np.nan_to_num(scores.astype(np.float64), nan=greatest, posinf=greatest, neginf=-greatest)


@dataclass(frozen=True, eq=False)
class Binned:
    """Pictures in bins of about equal count by their score, added up for each subject.

    Attributes
    ----------
    sums : (S, B, 4) ndarray
        Of each subject and bin: pictures, those that are not healthy, their probabilities, and squared errors.
    """

    sums: DoubleArray

    @classmethod
    def of(cls, scores: FloatArray, probability: DoubleArray, ill: BoolArray, subjects: Sequence[str]) -> "Binned":
        """From pictures, (N,) each."""
        order = np.argsort(_filled(scores), kind="stable")
        bins = np.empty(len(order), dtype=np.int64)
        for index, part in enumerate(np.array_split(order, BINS)):
            bins[part] = index
        names, owners = np.unique(subjects, return_inverse=True)
        sums = np.zeros((len(names), BINS, 4))
        each = np.stack([np.ones(len(ill)), ill, probability, (probability - ill) ** 2], axis=1)
        np.add.at(sums, (owners, bins), each)
        return cls(sums)

    def judged(self) -> dict[str, Any]:
        """Bins, expected calibration error and Brier score, with bootstrap 95 % intervals over subjects."""
        count = len(self.sums)
        draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=BOOTSTRAP)
        drawn = np.tensordot(draws.astype(np.float64), self.sums, axes=1)  # (BOOTSTRAP, B, 4)
        whole = self.sums.sum(axis=0)
        observed = _interval(_share(whole, 1), _share(drawn, 1))
        bins = [
            {"pictures": int(w[0]), "predicted": float(w[2] / w[0]), "observed": asdict(o)}
            for w, o in zip(whole, observed, strict=True)
        ]
        numbers = {"ece": calibration_error, "brier": _brier}
        return {"bins": bins} | {
            k: asdict(_interval(of(whole)[None], of(drawn)[:, None])[0]) for k, of in numbers.items()
        }


def _share(sums: DoubleArray, of: int) -> DoubleArray:
    """Of the pictures of each bin; NaN where a draw has none."""
    count = sums[..., 0]
    return np.where(count > 0, sums[..., of] / np.maximum(count, 1), np.nan)


def calibration_error(sums: DoubleArray) -> DoubleArray:
    """|predicted - observed|, mean over bins by their pictures, (...)."""
    gap = np.abs(sums[..., 2] - sums[..., 1]).sum(axis=-1)
    return np.asarray(gap / sums[..., 0].sum(axis=-1))


def _brier(sums: DoubleArray) -> DoubleArray:
    return np.asarray(sums[..., 3].sum(axis=-1) / sums[..., 0].sum(axis=-1))


def _interval(values: DoubleArray, drawn: DoubleArray) -> list[Interval]:
    low, high = np.nanpercentile(drawn, (2.5, 97.5), axis=0)
    return [Interval(float(v), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]


def _pooled(name: str, healthy: Scored, ill: Sequence[Scored]) -> tuple[FloatArray, BoolArray, list[str]]:
    """Scores, what is true, and subjects of pictures of several kinds."""
    parts = [healthy, *ill]
    scores = np.concatenate([p.scores[name] for p in parts])
    truth = np.arange(len(scores)) >= len(healthy.scores[name])
    return scores, truth, [s for p in parts for s in p.pictures.subjects]


def judge(name: str, validation: Sequence[Scored], test: Sequence[Scored]) -> dict[str, Any]:
    """Fit on healthy and near validation pictures; judge on test pictures, near and foreign ones apart.

    Parameters
    ----------
    name : str
        Of the score.
    validation, test : sequence of Scored
        Healthy pictures first.
    """
    scores, truth, _ = _pooled(name, validation[0], validation[1:])
    calibration = Calibration.fit(scores, truth)
    kinds = {
        NEAR: [s for s in test[1:] if s.pictures.kind == NEAR],
        FOREIGN: [s for s in test[1:] if s.pictures.kind != NEAR],
    }
    document: dict[str, Any] = {"score": name, "fitted": "isotonic", "kinds": {}}
    for kind, ill in kinds.items():
        values, ill_ones, subjects = _pooled(name, test[0], ill)
        judged = Binned.of(values, calibration(values), ill_ones, subjects).judged()
        document["kinds"][kind] = {**judged, "share_fitted": float(truth.mean()), "share": float(ill_ones.mean())}
    return document


def draw(document: dict[str, Any], path: Path) -> None:
    """Observed over predicted, one panel for each kind."""
    kinds = document["kinds"]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 4), layout="constrained", squeeze=False)
    for axis, (kind, row) in zip(axes[0], kinds.items(), strict=True):
        predicted = np.array([b["predicted"] for b in row["bins"]])
        value, low, high = (np.array([b["observed"][key] for b in row["bins"]]) for key in ("value", "low", "high"))
        axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        # The interval of a share can lie on one side of it.
        reach = np.maximum(np.stack([value - low, high - value]), 0)
        axis.errorbar(predicted, value, yerr=reach, fmt="o", color="C0", markersize=4, capsize=2)
        axis.set(xlabel="predicted share that is not healthy", ylabel="observed share", title=f"healthy and {kind}")
        axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
