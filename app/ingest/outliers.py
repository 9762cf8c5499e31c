"""Repair of single voxels whose sign or scale makes no sense, such as -32768 or 1e30 in an MR scan.

A scan is smoothed before it is sampled, so one such voxel would become a finding.
"""

from dataclasses import replace

import numpy as np

from app.volume import FloatArray, Scan

# A voxel beyond this multiple of the usual brightness is an outlier. In 476 real MR and CT scans the brightest voxel is
# at most 3.7 times as bright.
OUTLIER_FACTOR = 10.0
USUAL_PERCENTILE = 99.5
# More outliers than this share of the voxels are no single faults, and are left as they are.
MAX_OUTLIER_SHARE = 1e-5
# The usual brightness is measured on about this many voxels along each axis.
SAMPLES = 64


def repair_outliers(scan: Scan) -> Scan:
    """Replace the few voxels that are far beyond all others by the median of their neighbours, in place.

    Returns
    -------
    Scan
        With a note if voxels were replaced.
    """
    array = scan.volume.array
    limit = OUTLIER_FACTOR * _usual_brightness(array)
    if not limit or max(float(array.max()), -float(array.min())) <= limit:
        return scan
    outliers = np.argwhere((array > limit) | (array < -limit))
    if len(outliers) > max(1.0, MAX_OUTLIER_SHARE * array.size):
        return scan
    repaired = []
    for voxel in outliers:
        around = array[tuple(slice(max(0, i - 1), i + 2) for i in voxel)]
        usable = around[np.abs(around) <= limit]
        repaired.append(np.median(usable) if usable.size else 0.0)
    array[tuple(outliers.T)] = repaired
    note = (
        f"{len(outliers)} of {array.size} voxels were more than {OUTLIER_FACTOR:.0f} times as bright or dark as all "
        "others. The median of their neighbours is used instead."
    )
    return replace(scan, source=replace(scan.source, notes=(*scan.source.notes, note)))


def _usual_brightness(array: FloatArray) -> float:
    """Return a high percentile of the absolute values other than 0, from a sample of the voxels."""
    sample = np.abs(array[tuple(slice(None, None, max(1, n // SAMPLES)) for n in array.shape)])
    present = sample[sample > 0]
    return float(np.percentile(present, USUAL_PERCENTILE)) if present.size else 0.0
