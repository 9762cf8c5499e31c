"""Thresholds that a scan raises by itself (docs/method.md, "Thresholds of a scan", and decision 27).

On a scanner that the model does not know, small differences are spread over the whole brain. Thresholds from other
scanners then mark many of them. The highest values of the scan outside its large findings show where these differences
end. A large finding is left out because a lesion must not raise the thresholds.
"""

import numpy as np
from scipy import ndimage

from app.manifest import Residual
from app.pipeline.findings import label_findings
from app.volume import FloatArray

# Dilations of a large finding before it is left out: its rim is below the extent threshold, but part of the lesion.
RIM_PIXELS = 2
# The factor is rounded up to hundredths, so that the report can state it.
FACTOR_STEPS = 100


def raise_thresholds(anomaly: FloatArray, settings: Residual, voxel_ml: float) -> Residual:
    """Return the settings with both thresholds raised by one factor, if the anomaly map of the scan requires it.

    Parameters
    ----------
    anomaly : (N, H, W) ndarray
        Anomaly map on the slices of the model. NaN in pixels that were not analysed.
    settings : Residual
        Settings of the bundle, or of a site profile.
    voxel_ml : float
        Volume of a pixel of a slice.
    """
    rule = settings.scan_threshold
    # A calibration also tries a threshold of 0, which has no factor.
    if rule is None or settings.threshold == 0:
        return settings
    labels, _ = label_findings(anomaly, settings, voxel_ml)
    is_large = np.bincount(labels.ravel()) * voxel_ml >= rule.finding_ml
    is_large[0] = False
    rest = np.isfinite(anomaly) & ~ndimage.binary_dilation(is_large[labels], iterations=RIM_PIXELS)
    if not rest.any():
        return settings
    own = float(np.percentile(anomaly[rest], rule.percentile))
    factor = np.ceil(own / settings.threshold * FACTOR_STEPS) / FACTOR_STEPS
    return scale_thresholds(settings, max(1.0, float(factor)))


def scale_thresholds(settings: Residual, factor: float) -> Residual:
    """Return the settings with both thresholds multiplied by a factor."""
    thresholds = {"threshold": settings.threshold, "extent_threshold": settings.extent_threshold}
    return settings.model_copy(update={name: float(f"{value * factor:.6g}") for name, value in thresholds.items()})
