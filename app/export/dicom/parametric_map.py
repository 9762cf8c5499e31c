"""DICOM Parametric Map (PS3.3 A.75) of the anomaly map.

The pixels are 16-bit integers with a real world value mapping: programs that do not know parametric maps still show
them as a grey image. Pixels with `PADDING` were not analysed.
"""

import numpy as np
import numpy.typing as npt
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.sr import CodedConcept
from pydicom.dataelem import DataElement
from pydicom.sr.codedict import codes

from app.export.dicom.frames import plane_geometry, reference_images
from app.export.dicom.identity import ANOMALY_SCORE, shared_arguments
from app.export.dicom.source import SourceSeries
from app.export.report import RESEARCH_USE_ONLY, Report
from app.volume import FloatArray

SERIES_NUMBER = 9004
SERIES_DESCRIPTION = "Counterpart: anomaly map (research use only)"
CONTENT_LABEL = "ANOMALY"
PADDING = 0
LARGEST = np.iinfo(np.uint16).max
# The window reaches from 0 to this multiple of the threshold, as the colours of preview.png do.
WINDOW = 3.0


def build_parametric_map(source: SourceSeries, anomaly: FloatArray, report: Report) -> ParametricMap:
    """Build the parametric map with placeholder UIDs.

    The frames reach from the first to the last slice with a value.

    Parameters
    ----------
    source : SourceSeries
        Series of the scan, with one frame of reference.
    anomaly : (X, Y, Z) ndarray of float32
        Anomaly map on the scan's grid, NaN where the scan was not analysed.
    report : Report
        Contains the thresholds and the model.
    """
    slices = _analysed_slices(anomaly)
    slope = _slope(float(np.fmax.reduce(anomaly, axis=None, initial=0.0)))
    window = WINDOW * report.threshold / slope
    parametric_map = ParametricMap(
        source_images=source.images,
        pixel_array=_quantise(anomaly[..., slices], slope),
        series_number=SERIES_NUMBER,
        series_description=SERIES_DESCRIPTION,
        content_label=CONTENT_LABEL,
        content_description=RESEARCH_USE_ONLY,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[_mapping(slope)],
        voi_lut_transformations=[VOILUTTransformation(window_center=1 + window / 2, window_width=window)],
        **shared_arguments(source, report),
        **plane_geometry(source, anomaly.shape[2], slices),
    )
    parametric_map.ContentCreatorName = None  # type 2; there is no creator
    parametric_map.BodyPartExamined = "BRAIN"  # not paired: no laterality is required
    parametric_map.add(DataElement(0x00280120, "US", PADDING))  # PixelPaddingValue
    reference_images(parametric_map, source)
    return parametric_map


def _analysed_slices(anomaly: FloatArray) -> slice:
    """Return the slices from the first to the last with a value, or all slices if none has one."""
    found = np.flatnonzero(np.isfinite(anomaly).any(axis=(0, 1)))
    return slice(int(found[0]), int(found[-1]) + 1) if found.size else slice(0, anomaly.shape[2])


def _slope(peak: float) -> float:
    """Return the step between two stored values, as a power of ten times 1, 2 or 5, so that the peak is in range."""
    least = max(peak, 1e-6) / (LARGEST - 1)
    power = 10.0 ** np.floor(np.log10(least))
    return float(f"{next(step for step in (1, 2, 5, 10) if step * power >= least) * power:.3g}")


def _quantise(anomaly: FloatArray, slope: float) -> npt.NDArray[np.uint16]:
    """Return the stored values, (slices, rows, columns): 1 is zero, `PADDING` is NaN."""
    stored = np.round(anomaly.transpose(2, 1, 0) / np.float32(slope)) + 1
    # NaN compares as false in `clip` and stays NaN.
    quantised: npt.NDArray[np.uint16] = np.nan_to_num(stored.clip(PADDING + 1, LARGEST), nan=PADDING).astype(np.uint16)
    return quantised


def _mapping(slope: float) -> RealWorldValueMapping:
    return RealWorldValueMapping(
        lut_label="ANOMALY",
        lut_explanation="Anomaly score",
        unit=CodedConcept.from_code(codes.UCUM.NoUnits),
        value_range=(PADDING + 1, LARGEST),
        slope=slope,
        intercept=-slope,
        quantity_definition=ANOMALY_SCORE,
    )
