"""Analysis of one scan: read, detect and export. The command line and the worker share these steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from app.errors import CannotAnalyse, NoBrainMask, UnreadableScan
from app.export.outputs import ExportContext, write_outputs
from app.export.report import BrainReport, ModelSelectionReport, ModelUsed, Report, SiteProfileReport, build_report
from app.inference_result import ExtractedBrain, InferenceResult
from app.ingest import limits
from app.ingest.reader import read_scan
from app.manifest import Manifest
from app.pipeline.brain_extraction import extract_brain
from app.pipeline.detect import Detection, network_evaluations
from app.pipeline.findings import to_scan_result
from app.pipeline.methods import METHODS
from app.runtime.bundle import Bundle
from app.runtime.selection import explain_selection, select_model, trained_sequences
from app.volume import Geometry, Scan, SegmentationType, Volume

# Called with the stage ("read", "infer" or "export") and its completed fraction, 0 to 1. It is called between network
# evaluations and may raise `app.errors.Cancelled`.
Progress = Callable[[str, float], None]

# Prefix of the folder into which an archive is unpacked.
UNPACKED_PREFIX = limits.UNPACKED_PREFIX


@dataclass(frozen=True)
class AnalysisRequest:
    """Options of one analysis.

    Attributes
    ----------
    model : str or None
        Name or id of a bundle. None selects a bundle by modality and sequence.
    series : str or None
        SeriesInstanceUID, if the upload contains several series.
    seed : int or None
        Seed of the keyed noise. None uses the manifest's seed.
    geometry : {"refuse", "resample"}
        Refuse or resample a DICOM series with missing, tilted or unevenly spaced slices.
    note : str
        Sentence about the arrival of the scan for the notes of the report. It has no influence on the results.
    """

    model: str | None = None
    series: str | None = None
    seed: int | None = None
    geometry: Geometry = "refuse"
    note: str = ""


def read_requested_scan(path: Path, scratch: Path, manifests: Sequence[Manifest], request: AnalysisRequest) -> Scan:
    """Read the scan of a request. The parameters are those of `infer`."""
    scan = read_scan(
        path,
        scratch=scratch,
        series=request.series,
        geometry=request.geometry,
        sequences=trained_sequences(manifests, request.model),
    )
    if not request.note:
        return scan
    return replace(scan, source=replace(scan.source, notes=(*scan.source.notes, request.note)))


def analyse(  # noqa: PLR0913 - the command line has all of them
    path: Path,
    out: Path,
    bundles: Callable[[Manifest], Bundle],
    manifests: Sequence[Manifest],
    request: AnalysisRequest,
    progress: Progress,
    segmentation_type: SegmentationType = "binary",
) -> Report:
    """Read a scan, compare it with its healthy counterpart and write the results.

    Parameters
    ----------
    path : Path
        A NIfTI or MGH file, a zip archive, or a folder of DICOM files.
    out : Path
        Existing folder for the files of `app.export.outputs.OUTPUTS`. Each file appears complete or not at all.
    bundles : callable
        Returns the loaded bundle of a manifest.
    manifests : sequence of Manifest
        Available models.
    request : AnalysisRequest
        Model, series, seed, geometry.
    progress : callable
        Called with stage and completed fraction.
    segmentation_type : {"binary", "labelmap"}
        Type of the DICOM segmentation.

    Raises
    ------
    CounterpartError
        The scan cannot be analysed. Each cause has its own class in `app.errors`.
    """
    # Inside `out`, so that removing the results of a killed process also removes its unpacked scan. It is needed until
    # the end of the export, which reads the DICOM headers again.
    with TemporaryDirectory(prefix=UNPACKED_PREFIX, dir=out) as scratch:
        scan, inference = infer(path, Path(scratch), bundles, manifests, request, progress)
        return export(scan, inference, out, progress, segmentation_type)


def infer(
    path: Path,
    scratch: Path,
    bundles: Callable[[Manifest], Bundle],
    manifests: Sequence[Manifest],
    request: AnalysisRequest,
    progress: Progress,
) -> tuple[Scan, InferenceResult]:
    """Read a scan and compare it with its healthy counterpart. The other parameters are those of `analyse`.

    Parameters
    ----------
    scratch : Path
        Existing folder for unpacked files. They must exist until the export.
    """
    seconds: dict[str, float] = {}
    with _timed("read", seconds):
        progress("read", 0.0)
        scan = read_requested_scan(path, scratch, manifests, request)
        selection = select_model(manifests, scan.source, request.model)
        manifest = selection.manifest
        progress("read", 1.0)
    with _timed("load", seconds):
        bundle = bundles(manifest)
    progress("infer", 0.0)
    try:
        with _timed("extract", seconds):
            volume, brain = _run_extractor(scan.volume, bundle)
        with _timed("infer", seconds):
            detection = detect_volume(volume, bundle, request.seed, progress)
    except (CannotAnalyse, UnreadableScan) as refusal:
        raise explain_selection(refusal, selection, scan.source, manifests) from None
    progress("infer", 1.0)
    profile = bundle.site_profiles.find(bundle.sha256, scan.source.scanner)
    model = ModelUsed(
        id=manifest.id,
        sha256=bundle.sha256,
        provider=bundle.provider,
        precision=bundle.precision,
        seed=manifest.seed if request.seed is None else request.seed,
        licence=manifest.licence.licence,
        selection=ModelSelectionReport(
            by=selection.by, certain=not selection.warning, warning=selection.warning or None
        ),
        site_profile=SiteProfileReport.of(profile, scan.source.scanner) if profile else None,
    )
    return scan, InferenceResult(profile.apply(manifest) if profile else manifest, model, detection, brain, seconds)


def export(
    scan: Scan,
    inference: InferenceResult,
    out: Path,
    progress: Progress,
    segmentation_type: SegmentationType = "binary",
) -> Report:
    """Write the results of a scan. No network is run, and the same arguments give the same bytes.

    Parameters
    ----------
    scan : Scan
        The scan of the inference, or the same file read again.
    inference : InferenceResult
    out : Path
        Existing folder for the results.
    progress : callable
        Called with stage and completed fraction.
    segmentation_type : {"binary", "labelmap"}
        Type of the DICOM segmentation.
    """
    started = time.perf_counter()
    progress("export", 0.0)
    result = to_scan_result(scan.volume, inference.detection, inference.manifest)
    extracted = inference.brain if isinstance(inference.brain, ExtractedBrain) else None
    report = build_report(
        scan, result, inference.model, inference.manifest, extracted.report if extracted else None, inference.seconds
    )
    context = ExportContext(
        scan=scan,
        manifest=inference.manifest,
        result=result,
        brain=inference.brain.mask if isinstance(inference.brain, ExtractedBrain) else inference.brain,
        report=report,
        elapsed=lambda: time.perf_counter() - started,
        segmentation_type=segmentation_type,
    )
    report = write_outputs(context, out)
    progress("export", 1.0)
    return report


def _run_extractor(volume: Volume, bundle: Bundle) -> tuple[Volume, ExtractedBrain | NoBrainMask]:
    """Return the volume to analyse, and the brain mask or the reason why there is none."""
    if bundle.extractor is None:
        return volume, NoBrainMask(
            f"{bundle.manifest.id} analyses scans without brain extraction.",
            expected="a model that needs brain extraction.",
            advice="The analysed region is the set of voxels that have a value in anomaly.nii.gz.",
        )
    brain = extract_brain(volume, bundle.extractor.networks)
    if isinstance(brain, NoBrainMask):
        return volume, brain
    report = BrainReport(
        method=bundle.extractor.manifest.method,
        version=bundle.extractor.manifest.version,
        sha256=bundle.extractor.sha256,
        volume_ml=round(brain.volume_ml, 1),
        agreement=round(brain.agreement, 4),
        cut_cm2=round(brain.cut_cm2, 1),
        warnings=brain.warnings,
    )
    return brain.volume, ExtractedBrain(brain.mask, report)


def detect_volume(volume: Volume, bundle: Bundle, seed: int | None, progress: Progress) -> Detection:
    """Run the pipeline on a volume without reading or extracting, batch by batch.

    Parameters
    ----------
    volume : Volume
        Skull-stripped, if the model needs that.
    bundle : Bundle
    seed : int or None
        Seed of the keyed noise. None uses the manifest's seed.
    progress : callable
        Called with "infer" and the completed fraction.
    """
    # Which slices need the reverse process is unknown before the KL map. The progress counts it for every slice of the
    # volume and jumps to 1 at the end.
    depth_mm = (abs(volume.affine[:3, :3]) @ volume.shape)[2]
    count = max(1, int(depth_mm / bundle.manifest.preprocessing.spacing_mm[0]))
    expected = network_evaluations(bundle.manifest, count, [count] * len(bundle.manifest.views))
    done = 0

    def tick(slices: int) -> None:
        nonlocal done
        done += slices
        progress("infer", min(done / expected, 1.0))

    networks = bundle.networks.in_batches(bundle.batch, tick)
    return METHODS[bundle.manifest.method](volume, networks, bundle.manifest, seed)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start
