"""Table of false findings with a site profile, from the volumes of healthy heads at each candidate threshold."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from app.pipeline.risk_control import FACTORS, conformal_threshold
from app.site_profile import MIN_SCANS
from training.cluster_bootstrap import FloatArray, Interval, cluster_weights, interval, quantile
from training.experiments.markdown import table
from training.formats import show_interval

Rows = list[dict[str, Any]]
TARGETS_ML = (1.0, 0.5)
# Scanners with fewer analysed heads are left out.
MIN_HEADS = 9
SEED = 20261129
NOTE = f"""\
Each head is measured with the thresholds that `counterpart calibrate` would choose from {MIN_SCANS} other heads of its
scanner, drawn at random, or from all other heads if there are fewer. The command itself requires {MIN_SCANS} scans.
The target is the mean over scans that the calibration aims at. The factor multiplies both thresholds of the model.
Intervals resample the people, with their thresholds unchanged."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """False findings in heads of one scanner.

    Attributes
    ----------
    kind : str
        Scanner.
    target_ml : float or None
        Target of the profiles from other heads; None without a profile.
    volumes_ml : (n,) ndarray
        False findings in each head; empty if a target is not reached.
    factor : float
        Median factor by which the profiles multiply the thresholds.
    """

    kind: str
    target_ml: float | None
    volumes_ml: FloatArray
    factor: float

    def percentile(self, percent: float) -> Interval:
        """Return a percentile of the volume, with its interval over people."""
        weights = cluster_weights([str(i) for i in range(len(self.volumes_ml))], seed=0)
        return interval(quantile(self.volumes_ml.tolist(), percent), weights)


def held_out_heads(rows: Rows) -> list[HeldOut]:
    """Return the false findings without a profile and with one for each target, for scanners with enough heads.

    Parameters
    ----------
    rows : list of dict
        Rows of the part `heads`.
    """
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        done = [row["volumes_ml"] for row in rows if row["kind"] == kind and row.get("volumes_ml")]
        if len(done) >= MIN_HEADS:
            volumes = np.array(done)
            found.append(HeldOut(kind, None, volumes[:, int(np.argmin(np.abs(FACTORS - 1)))], 1.0))
            found += [_with_profile(kind, volumes, target) for target in TARGETS_ML]
    return found


def _with_profile(kind: str, volumes: FloatArray, target_ml: float) -> HeldOut:
    """Return the volumes (n, K) of each head at the threshold that other heads determine."""
    chosen = []
    for i in range(len(volumes)):
        others = np.delete(np.arange(len(volumes)), i)
        rng = np.random.default_rng([SEED, i])
        drawn = rng.choice(others, min(MIN_SCANS, len(others)), replace=False)
        chosen.append(conformal_threshold(volumes[drawn], target_ml))
    reached = [index for index in chosen if index is not None]
    if len(reached) < len(chosen):
        return HeldOut(kind, target_ml, np.empty(0), np.nan)
    return HeldOut(kind, target_ml, volumes[np.arange(len(volumes)), reached], float(np.median(FACTORS[reached])))


def site_profile_table(rows: Rows) -> list[str]:
    """Return a table of `held_out_heads`, or nothing if there are none.

    Parameters
    ----------
    rows : list of dict
        Rows of the part `heads`.
    """
    if not (found := held_out_heads(rows)):
        return []
    header = ["scanner", "people", "target", "false findings, ml: median", "90th percentile", "mean", "factor"]
    return [*NOTE.splitlines(), "", *table(header, [_line(each) for each in found]).splitlines()]


def _line(heads: HeldOut) -> list[str]:
    if not len(heads.volumes_ml):
        return [heads.kind, "", f"{heads.target_ml:g} ml", "target not reached", "", "", ""]
    target, factor = ("none", "") if heads.target_ml is None else (f"{heads.target_ml:g} ml", f"{heads.factor:.2f}")
    percentiles = [show_interval(heads.percentile(percent)) for percent in (50, 90)]
    mean = f"{heads.volumes_ml.mean():.2f}"
    return [heads.kind, str(len(heads.volumes_ml)), target, *percentiles, mean, factor]
