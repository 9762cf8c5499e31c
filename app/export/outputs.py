"""Registry of the result files of a scan, and the writer of its volumes.

A new result file is one entry in `OUTPUTS`. The export, the command line, the API and its OpenAPI document read this
registry. CONTRIBUTING.md lists the other places.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip
from PIL import Image

from app.dicom_attributes import silence_libraries
from app.errors import CounterpartError, NoBrainMask, NotFromDicom
from app.export.preview import draw_preview, write_thumbnail
from app.export.report import Report
from app.manifest import Manifest
from app.pipeline.detect import ScanResult
from app.volume import RESULT_PREFIX, RESULT_SUFFIX, BoolArray, FloatArray, Format, Scan, SegmentationType

if TYPE_CHECKING:  # an import takes a second, and only DICOM input needs it
    from pydicom.dataset import Dataset

    from app.export.dicom import DicomExport

ALL_FORMATS: tuple[Format, ...] = get_args(Format)

BRAIN_NAME = "brain.nii.gz"
SEGMENTATION_NAME = "segmentation.dcm"
STRUCTURED_REPORT_NAME = "report.dcm"
CAPTURE_NAME = "capture.dcm"
PARAMETRIC_MAP_NAME = "anomaly.dcm"

# A qform has no shear. If a sheared affine differs from its qform by more than this, the qform would move voxels and is
# switched off.
QFORM_TOLERANCE_MM = 1e-3
UNKNOWN_CODE = 0
# igzip has levels 0 to 3. Level 1 is nine times as fast as zlib's level 4; its files are a tenth larger.
COMPRESSION_LEVEL = 1


@dataclass(eq=False)
class ExportContext:
    """Data that the writers of the results of one scan share.

    Attributes
    ----------
    scan : Scan
    manifest : Manifest
        Manifest of the model that analysed the scan.
    result : ScanResult
        Findings on the scan's own grid.
    brain : (X, Y, Z) ndarray of bool or NoBrainMask
        Brain mask on the scan's own grid, or the reason why no brain was extracted.
    report : Report
        Report. `absent` and the duration of the export are empty until report.json is written.
    elapsed : callable
        Returns the seconds since the start of the export.
    segmentation_type : {"binary", "labelmap"}
        Type of the DICOM segmentation.
    absent : dict of str to CounterpartError
        Reason for each output that does not exist, by name. `write_outputs` fills it.
    """

    scan: Scan
    manifest: Manifest
    result: ScanResult
    brain: BoolArray | NoBrainMask
    report: Report
    elapsed: Callable[[], float]
    segmentation_type: SegmentationType = "binary"
    absent: dict[str, CounterpartError] = field(default_factory=dict)

    @cached_property
    def page(self) -> Image.Image:
        """Picture of the findings, which preview.png and the secondary capture contain."""
        return draw_preview(self.result, self.report)

    @cached_property
    def dicom(self) -> "DicomExport":
        """Builder of the DICOM objects. Its users silence the libraries."""
        from app.export.dicom import DicomExport  # noqa: PLC0415 - see TYPE_CHECKING above

        return DicomExport(self.scan, self.report)

    @cached_property
    def segmentation_and_report(self) -> "tuple[Dataset | CounterpartError, Dataset | CounterpartError]":
        """Segmentation and structured report, built together because the report contains the segmentation's UIDs."""
        return self.dicom.segmentation_and_report(self.result.labels, self.segmentation_type)


# Writes the file to the path, or returns the reason why the scan has no such file.
Writer = Callable[[ExportContext, Path], CounterpartError | None]


@dataclass(frozen=True)
class Output:
    """One kind of result file.

    Attributes
    ----------
    name : str
        File name, in the result folder and in the API.
    media_type : str
        Content-Type of the file.
    description : str
        One sentence for the OpenAPI document.
    writer : callable
    order : int
        Outputs are written in ascending order. Outputs with the same number are written concurrently. A new one takes
        1 to 5: counterpart.nii.gz is first and alone, and report.json is last.
    always : bool
        The file exists for every scan.
    formats : tuple of {"nifti", "mgh", "dicom"}
        Formats of the scan for which the file can exist: all, or only DICOM. For other formats than DICOM, the file is
        then absent with the code `not_from_dicom`.
    """

    name: str
    media_type: str
    description: str
    writer: Writer
    order: int
    always: bool = False
    formats: tuple[Format, ...] = ALL_FORMATS


def _write_mask(context: ExportContext, path: Path) -> None:
    _write_volume(context, path, context.result.mask, "1 where the scan differs from its counterpart")


def _write_labels(context: ExportContext, path: Path) -> None:
    _write_volume(context, path, context.result.labels, "number of each finding, as in report.json")


def _write_anomaly(context: ExportContext, path: Path) -> None:
    _write_volume(context, path, context.result.anomaly, "residual; NaN where not analysed")


def _write_counterpart(context: ExportContext, path: Path) -> None:
    _write_volume(context, path, context.result.counterpart, "imagined healthy counterpart")


def _write_image(context: ExportContext, path: Path) -> None:
    _write_volume(context, path, to_smallest_type(context.scan.volume.array), "scan, as it was read")


def _write_brain(context: ExportContext, path: Path) -> NoBrainMask | None:
    if isinstance(context.brain, NoBrainMask):
        return context.brain
    _write_volume(context, path, context.brain.astype(np.uint8), "1 in the brain that was taken out of its head")
    return None


def _write_volume(context: ExportContext, path: Path, array: npt.NDArray[Any], content: str) -> None:
    description = f"{RESULT_PREFIX}{content}{RESULT_SUFFIX}"
    write_nifti(path, array, context.result.affine, context.scan.source.sform_code, description)


def write_nifti(
    path: Path, array: npt.NDArray[Any], affine: npt.NDArray[np.float64], code: int, description: str
) -> None:
    """Write one volume as a gzip-compressed NIfTI file. The same arguments give the same bytes.

    Parameters
    ----------
    path : Path
        File to write.
    array : (X, Y, Z) ndarray
        For example uint8 for a mask, float32 for a map.
    affine : (4, 4) ndarray
        Voxel indices to RAS+ millimetres. The sform stores it exactly.
    code : int
        NIfTI code of that space (1 scanner, 2 aligned, 3 Talairach, 4 MNI).
    description : str
        At most 79 characters, without patient data.
    """
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description[:79].encode()
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code, strip_shears=True)
    if np.abs(image.get_qform() - affine).max() > QFORM_TOLERANCE_MM:
        image.set_qform(None, code=UNKNOWN_CODE)
        image.header["pixdim"][1:4] = nib.affines.voxel_sizes(affine)
    # Without a file name and a time in the gzip header, the same volume gives the same bytes.
    with path.open("wb") as raw, igzip.IGzipFile("", "wb", COMPRESSION_LEVEL, raw, mtime=0) as compressed:
        image.to_stream(compressed)


def to_smallest_type(array: FloatArray) -> FloatArray | npt.NDArray[np.int16]:
    """Return an array as int16 if that changes no value, else unchanged.

    Parameters
    ----------
    array : (X, Y, Z) ndarray of float32
        Finite values.
    """
    limits = np.iinfo(np.int16)
    whole = np.empty(array.shape, dtype=np.int16)
    for source, target in zip(array, whole, strict=True):  # plane by plane, to save memory
        if source.min() < limits.min or source.max() > limits.max:
            return array
        target[:] = source
        if (target != source).any():
            return array
    return whole


def _write_preview(context: ExportContext, path: Path) -> None:
    context.page.save(path, format="PNG", optimize=False)


def _write_thumbnail(context: ExportContext, path: Path) -> None:
    write_thumbnail(path, context.result)


def _write_segmentation(context: ExportContext, path: Path) -> CounterpartError | None:
    return _write_dicom(lambda: context.segmentation_and_report[0], path)


def _write_structured_report(context: ExportContext, path: Path) -> CounterpartError | None:
    return _write_dicom(lambda: context.segmentation_and_report[1], path)


def _write_capture(context: ExportContext, path: Path) -> CounterpartError | None:
    return _write_dicom(lambda: context.dicom.secondary_capture(np.asarray(context.page)), path)


def _write_parametric_map(context: ExportContext, path: Path) -> CounterpartError | None:
    return _write_dicom(lambda: context.dicom.parametric_map(context.result.anomaly), path)


def _write_dicom(build: "Callable[[], Dataset | CounterpartError]", path: Path) -> CounterpartError | None:
    with silence_libraries():
        dataset = build()
        if isinstance(dataset, CounterpartError):
            return dataset
        dataset.save_as(path, enforce_file_format=True)
    return None


def _write_report(context: ExportContext, path: Path) -> None:
    report = context.report
    seconds = {**report.work.seconds, "export": round(context.elapsed(), 3)}
    context.report = report.model_copy(
        update={
            "absent": {name: error.problem for name, error in context.absent.items()},
            "work": report.work.model_copy(update={"seconds": seconds}),
        }
    )
    path.write_text(context.report.model_dump_json(indent=1) + "\n")


OUTPUTS: tuple[Output, ...] = (
    Output(
        "mask.nii.gz",
        "application/gzip",
        "Binary mask on the scan's grid: 1 where the scan differs from its healthy counterpart.",
        _write_mask,
        order=1,
        always=True,
    ),
    Output(
        "labels.nii.gz",
        "application/gzip",
        "Labels on the scan's grid: the mask, with the `label` of each finding of report.json instead of 1.",
        _write_labels,
        order=1,
        always=True,
    ),
    Output(
        "anomaly.nii.gz",
        "application/gzip",
        "Anomaly map on the scan's grid: weighted residual, NaN where the scan was not analysed.",
        _write_anomaly,
        order=1,
        always=True,
    ),
    Output(
        "counterpart.nii.gz",
        "application/gzip",
        "Generated healthy counterpart on the scan's grid, in the scan's own units.",
        _write_counterpart,
        # It is written first and not together with other files, because the array is as large as the scan.
        order=0,
        always=True,
    ),
    Output(
        "image.nii.gz",
        "application/gzip",
        "The scan as it was read, on its own grid, for viewers: int16 if that is exact, else float32.",
        _write_image,
        # It is written after the maps, because it is as large as counterpart.nii.gz.
        order=2,
        always=True,
    ),
    Output(
        "report.json",
        "application/json",
        "Findings, scores, model and provenance.",
        _write_report,
        # The report is the last output, because it lists the absent ones.
        order=6,
        always=True,
    ),
    Output(
        "preview.png",
        "image/png",
        "Planes of the surest findings: scan, counterpart, anomaly map and outlines of the mask side by side.",
        _write_preview,
        order=3,
        always=True,
    ),
    Output(
        "thumbnail.png",
        "image/png",
        "Axial plane of the surest finding with its outline, 160 by 160 pixels.",
        _write_thumbnail,
        order=3,
        always=True,
    ),
    Output(
        BRAIN_NAME,
        "application/gzip",
        "Brain mask on the scan's grid, if the brain was extracted from a scan with skull.",
        _write_brain,
        order=2,
    ),
    Output(
        SEGMENTATION_NAME,
        "application/dicom",  # RFC 3240
        "DICOM Segmentation with one segment per lesion, if the scan is DICOM and has a lesion.",
        _write_segmentation,
        order=4,
        formats=("dicom",),
    ),
    Output(
        STRUCTURED_REPORT_NAME,
        "application/dicom",
        "DICOM Structured Report (TID 1500) with the numbers of report.json, if the scan is DICOM.",
        _write_structured_report,
        order=5,
        formats=("dicom",),
    ),
    Output(
        CAPTURE_NAME,
        "application/dicom",
        "DICOM Secondary Capture with the page of preview.png, if the scan is DICOM.",
        _write_capture,
        order=5,
        formats=("dicom",),
    ),
    Output(
        PARAMETRIC_MAP_NAME,
        "application/dicom",
        "DICOM Parametric Map with the values of anomaly.nii.gz, if the scan is DICOM.",
        _write_parametric_map,
        order=5,
        formats=("dicom",),
    ),
)
REQUIRED_NAMES = tuple(output.name for output in OUTPUTS if output.always)
OPTIONAL_NAMES = tuple(output.name for output in OUTPUTS if not output.always)
DICOM_NAMES = tuple(output.name for output in OUTPUTS if output.formats == ("dicom",))


def media_type(name: str) -> str:
    """Return the Content-Type of an output."""
    return next(output.media_type for output in OUTPUTS if output.name == name)


def write_outputs(context: ExportContext, folder: Path) -> Report:
    """Write all outputs of a scan into an existing folder. Files are written under a temporary name and renamed.

    Returns
    -------
    Report
        Report with `absent` and the duration of the export.
    """

    def write(output: Output) -> CounterpartError | None:
        if context.scan.source.format not in output.formats:
            return _not_from_dicom()
        part = folder / f"{output.name}.part"
        reason = output.writer(context, part)
        if reason is None:
            part.replace(folder / output.name)
        return reason

    for _, group in groupby(sorted(OUTPUTS, key=lambda output: output.order), key=lambda output: output.order):
        outputs = list(group)
        with ThreadPoolExecutor(len(outputs)) as pool:  # igzip releases the interpreter lock
            reasons = list(pool.map(write, outputs))
        for output, reason in zip(outputs, reasons, strict=True):
            if reason is not None:
                context.absent[output.name] = reason
    return context.report


def _not_from_dicom() -> NotFromDicom:
    return NotFromDicom(
        "The scan was not sent as DICOM. DICOM results must refer to the patient, study and series of a DICOM scan.",
        expected="a DICOM series.",
        advice="Use mask.nii.gz and report.json, or send the original DICOM series.",
    )
