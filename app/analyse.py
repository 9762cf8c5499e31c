"""ingest -> detect -> export for one scan: the chain that the command line and the worker both call."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from app.brain import Brain, extract
from app.errors import CounterpartError, NoBrainMask, NotFromDicom
from app.export.nifti import write_nifti
from app.export.pictures import write_preview
from app.export.report import RESEARCH_USE_ONLY, BrainReported, ModelChoice, ModelUsed, Report, build_report
from app.inferred import Inferred, Taken
from app.ingest.reader import read_scan
from app.dicom_attributes import silence_libraries
from app.manifest import Manifest
from app.pipeline.detect import Detection, detect, network_evaluations
from app.pipeline.findings import Result, to_result
from app.runtime.bundle import Bundle
from app.runtime.choice import choose
from app.volume import Geometry, Scan, Volume

# Stage ("read", "infer", "export") and how much of it is done, 0 to 1. It may raise
# `app.errors.Cancelled`: it is called between network evaluations.
Progress = Callable[[str, float], None]

RESULT_FILES = ("mask.nii.gz", "anomaly.nii.gz", "counterpart.nii.gz", "report.json", "preview.png")
# Beside them for a scan that came as DICOM, and for a head whose brain was taken out of it; where one is
# absent, `Report.absent` says why.
DICOM_FILES = ("segmentation.dcm", "report.dcm")
BRAIN_FILE = "brain.nii.gz"
OPTIONAL_FILES = (BRAIN_FILE, *DICOM_FILES)
# Beginning of the name of a folder that holds what an archive held.
UNPACKED = ".unpacked-"


@dataclass(frozen=True)
class Request:
    """What the caller asks for beside the scan.

    Attributes
    ----------
    model : str or None
        Name or id of a bundle; None chooses by modality and sequence.
    series : str or None
        SeriesInstanceUID where several were sent.
    seed : int or None
        Of the keyed noise; None takes the manifest's.
    geometry : {"refuse", "resample"}
        What to do with a DICOM series whose slices are missing, tilted or unevenly spaced.
    """

    model: str | None = None
    series: str | None = None
    seed: int | None = None
    geometry: Geometry = "refuse"


def analyse(
    path: Path,
    out: Path,
    bundles: Callable[[Manifest], Bundle],
    manifests: Sequence[Manifest],
    request: Request,
    progress: Progress,
) -> Report:
    """Read a scan, compare it with its counterpart, write the results.

    Parameters
    ----------
    path : Path
        A NIfTI or MGH file, a zip, or a folder of DICOM files.
    out : Path
        Existing folder for `RESULT_FILES` and `OPTIONAL_FILES`; each appears whole or not at all.
    bundles : callable
        The loaded bundle of a manifest.
    manifests : sequence of Manifest
        Those to choose from.
    request : Request
        Model, series, seed, geometry.
    progress : callable
        Told of each stage.

    Raises
    ------
    CounterpartError
        One leaf a cause; see `app.errors`.
    """
    # Inside the results' folder: whoever removes that reaches an unpacked scan which a kill left behind.
    # It lives until the export, which reads the source's headers again.
    with TemporaryDirectory(prefix=UNPACKED, dir=out) as scratch:
        scan, inferred = infer(path, Path(scratch), bundles, manifests, request, progress)
        return export(scan, inferred, out, progress)


def infer(
    path: Path,
    scratch: Path,
    bundles: Callable[[Manifest], Bundle],
    manifests: Sequence[Manifest],
    request: Request,
    progress: Progress,
) -> tuple[Scan, Inferred]:
    """Read a scan and compare it with its counterpart; parameters as of `analyse`.

    Parameters
    ----------
    scratch : Path
        For what an archive holds; the export needs it still.
    """
    seconds: dict[str, float] = {}
    with _timed("read", seconds):
        progress("read", 0.0)
        scan = read_scan(path, scratch=scratch, series=request.series, geometry=request.geometry)
        choice = choose(manifests, scan.source, request.model)
        manifest = choice.manifest
        progress("read", 1.0)
    with _timed("load", seconds):
        bundle = bundles(manifest)
    progress("infer", 0.0)
    with _timed("extract", seconds):
        brain = _take_out(scan.volume, bundle)
    with _timed("infer", seconds):
        seen = brain.volume if isinstance(brain, Brain) else scan.volume
        detection = _compare(seen, bundle, request.seed, progress)
        progress("infer", 1.0)
    used = ModelUsed(
        id=manifest.id,
        sha256=bundle.sha256,
        provider=bundle.provider,
        precision=bundle.precision,
        seed=manifest.seed if request.seed is None else request.seed,
        licence=manifest.licence.licence,
        choice=ModelChoice(by=choice.by, sure=not choice.doubt, doubt=choice.doubt or None),
    )
    return scan, Inferred(manifest, used, detection, _taken(brain, bundle), seconds)


def export(scan: Scan, inferred: Inferred, out: Path, progress: Progress) -> Report:
    """Write the results of a scan; it asks no network, and the same two give the same bytes.

    Parameters
    ----------
    scan : Scan
        As it was read, now or for the inference.
    inferred : Inferred
    out : Path
        As of `analyse`.
    progress : callable
        Told of the stage.
    """
    seconds = dict(inferred.seconds)
    with _timed("export", seconds):
        progress("export", 0.0)
        result = to_result(scan.volume, inferred.detection, inferred.manifest)
        _write_images(out, scan, result)
        absent = _write_brain(out, scan, inferred.brain)
        write_preview(out / "preview.png", inferred.detection, inferred.manifest, RESEARCH_USE_ONLY)
    report = build_report(scan, inferred.detection, result, inferred.used, inferred.manifest, seconds)
    if isinstance(inferred.brain, Taken):
        report = report.model_copy(update={"brain": inferred.brain.reported})
    absent |= _write_dicom(out, scan, result, report)
    report = report.model_copy(update={"absent": {name: reason.problem for name, reason in absent.items()}})
    part = out / "report.json.part"
    part.write_text(report.model_dump_json(indent=1) + "\n")
    part.replace(out / "report.json")
    progress("export", 1.0)
    return report


def _take_out(volume: Volume, bundle: Bundle) -> Brain | NoBrainMask:
    """The brain alone, for a model that knows nothing else; or why the scan stays as it is."""
    if bundle.extractor is None:
        return NoBrainMask(
            f"{bundle.manifest.id} analyses scans as they come: nothing was extracted.",
            expected="a model of brains without their heads.",
            advice="The analysed extent is where anomaly.nii.gz has a value.",
        )
    return extract(volume, bundle.extractor.networks)


def _taken(brain: Brain | NoBrainMask, bundle: Bundle) -> Taken | NoBrainMask:
    """What is kept of the extraction."""
    if isinstance(brain, NoBrainMask):
        return brain
    assert bundle.extractor is not None, "it took the brain out"
    reported = BrainReported(
        method=bundle.extractor.manifest.method,
        version=bundle.extractor.manifest.version,
        sha256=bundle.extractor.sha256,
        volume_ml=round(brain.volume_ml, 1),
        agreement=round(brain.agreement, 4),
        cut_cm2=round(brain.cut_cm2, 1),
        warnings=brain.warnings,
    )
    return Taken(brain.mask, reported)


def _compare(volume: Volume, bundle: Bundle, seed: int | None, progress: Progress) -> Detection:
    """Run the pipeline on a volume, batch by batch."""
    done = 0
    expected = 1

    def tick(slices: int) -> None:
        nonlocal done
        done += slices
        # How many slices will need the reverse process is not known before the KL map: the bar
        # counts on every one, and jumps ahead at the end.
        progress("infer", min(done / expected, 1.0))

    depth_mm = abs(volume.affine[:3, :3]) @ volume.shape
    most = max(1, int(depth_mm[2] / bundle.manifest.preparation.spacing_mm[0]))
    expected = network_evaluations(bundle.manifest, most, [most] * len(bundle.manifest.views))
    return detect(volume, bundle.models.in_batches(bundle.batch, tick), bundle.manifest, seed)


def _write_images(out: Path, scan: Scan, result: Result) -> None:
    """The three volumes, on the scan's own grid."""

    def write(name: str, array: npt.NDArray[Any], text: str) -> None:
        what = f"counterpart: {text}; research use only"
        write_nifti(out / f"{name}.nii.gz", array, result.affine, scan.source.sform_code, what)

    # Alone: it is as large as the scan, and needed for nothing else.
    write("counterpart", result.counterpart, "imagined healthy counterpart")
    with ThreadPoolExecutor(2) as pool:  # igzip lets go of the interpreter's lock
        mask = pool.submit(write, "mask", result.mask, "1 where the scan differs from its counterpart")
        write("anomaly", result.anomaly, "residual; NaN where not analysed")
        mask.result()


def _write_brain(out: Path, scan: Scan, brain: Taken | NoBrainMask) -> dict[str, CounterpartError]:
    """The brain's mask, where one was taken out; else why there is none."""
    if isinstance(brain, NoBrainMask):
        return {BRAIN_FILE: brain}
    what = "counterpart: 1 in the brain that was taken out of its head; research use only"
    write_nifti(out / BRAIN_FILE, brain.mask.astype(np.uint8), scan.volume.affine, scan.source.sform_code, what)
    return {}


def _write_dicom(out: Path, scan: Scan, result: Result, report: Report) -> dict[str, CounterpartError]:
    """The DICOM objects; why those of `DICOM_FILES` that are absent are."""
    if scan.source.format != "dicom":
        reason = NotFromDicom(
            "The scan did not come as DICOM: there is no patient, study or series that DICOM results could belong to.",
            expected="a DICOM series.",
            advice="Take mask.nii.gz and report.json, or send the DICOM series itself.",
        )
        return dict.fromkeys(DICOM_FILES, reason)
    # A second of imports that a NIfTI file does not need.
    from app.export.dicom import write_dicom  # noqa: PLC0415

    with silence_libraries():
        return write_dicom(out, scan, result, report)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
