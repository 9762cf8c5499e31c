"""Table of false findings with a site profile, from the volumes of healthy heads at each candidate threshold."""

from typing import Any

import numpy as np

from app.pipeline.risk_control import FACTORS, conformal_threshold
from app.site_profile import MIN_SCANS
from training.cluster_bootstrap import FloatArray, cluster_weights, interval, quantile
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


def site_profile_table(rows: Rows) -> list[str]:
    """Return the false findings in held-out heads with and without a profile, for scanners with enough heads, if any.

    Parameters
    ----------
    rows : list of dict
        Rows of the part `heads`.
    """
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        done = [row for row in rows if row["kind"] == kind and row.get("volumes_ml")]
        if len(done) >= MIN_HEADS:
            volumes = np.array([row["volumes_ml"] for row in done])
            unchanged = volumes[:, int(np.argmin(np.abs(FACTORS - 1)))]
            lines.append([kind, str(len(done)), "none", *_cells(unchanged), ""])
            lines += [[kind, str(len(done)), f"{t:g} ml", *_held_out(volumes, t)] for t in TARGETS_ML]
    if not lines:
        return []
    header = ["scanner", "people", "target", "false findings, ml: median", "90th percentile", "mean", "factor"]
    return [*NOTE.splitlines(), "", *table(header, lines).splitlines()]


def _cells(volumes: FloatArray) -> list[str]:
    weights = cluster_weights([str(i) for i in range(len(volumes))], seed=0)
    found = [show_interval(interval(quantile(volumes.tolist(), percent), weights)) for percent in (50, 90)]
    return [*found, f"{volumes.mean():.2f}"]


def _held_out(volumes: FloatArray, target_ml: float) -> list[str]:
    """Return the cells of the volumes (n, K), each row at the threshold from other rows."""
    found, factors = [], []
    for i in range(len(volumes)):
        others = np.delete(np.arange(len(volumes)), i)
        rng = np.random.default_rng([SEED, i])
        chosen = rng.choice(others, min(MIN_SCANS, len(others)), replace=False)
        index = conformal_threshold(volumes[chosen], target_ml)
        if index is None:
            return ["target not reached", "", "", ""]
        found.append(volumes[i, index])
        factors.append(FACTORS[index])
    return [*_cells(np.array(found)), f"{np.median(factors):.2f}"]
