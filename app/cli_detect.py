"""What `counterpart detect` does around `app.analysis`: a progress bar, a table, the Dice."""

from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.analysis import AnalysisRequest, analyse
from app.errors import NotAVolume, UnknownModel
from app.export.outputs import DICOM_NAMES
from app.export.report import Report
from app.manifest import Manifest
from app.runtime.bundle import Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.choice import permit
from app.settings import Settings

TRUTH = "truth.nii.gz"
# Two affines closer than this place every voxel of a head alike, well inside a voxel.
SAME_GRID_MM = 1e-3
STAGES = {"read": "Reading", "infer": "Comparing with its counterpart", "export": "Writing"}


class Bar:
    """One line a stage on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        """Move a stage's line: `app.analysis.Progress`."""
        if stage not in self._tasks:
            self._tasks[stage] = self.progress.add_task(STAGES.get(stage, stage), total=1.0)
        self.progress.update(self._tasks[stage], completed=fraction)


def run(scan: Path, out: Path, request: AnalysisRequest, settings: Settings) -> Report:
    """Analyse one scan with the bundles and the provider of the settings.

    Raises
    ------
    CounterpartError
        One leaf a cause; see `app.errors`.
    """
    folder = settings.models or shipped_models()
    manifests = {bundle: read_manifest(bundle) for bundle in find_bundles(folder)}
    if not manifests:
        raise UnknownModel(
            f"There is no model bundle in {folder}.",
            expected="a folder with a manifest.json for each model.",
            advice="Unset COUNTERPART_MODELS to use the shipped ones, or install counterpart again.",
        )

    def load(manifest: Manifest) -> Bundle:
        permit(manifest, noncommercial=settings.allow_noncommercial)
        chosen = next(bundle for bundle, known in manifests.items() if known == manifest)
        return load_bundle(chosen, settings.provider, settings.threads, settings.gpu_batch)

    out.mkdir(parents=True, exist_ok=True)
    bar = Bar()
    with bar.progress:
        return analyse(scan, out, load, tuple(manifests.values()), request, bar)


def tell(report: Report, out: Path, console: Console) -> None:
    """The findings for a person, in one table."""
    table = Table(title=f"{len(report.findings)} findings, {report.lesion_volume_ml:.2f} ml ({report.model.id})")
    for heading in ("#", "ml", "peak", "mean", "centroid RAS+ mm", "slice"):
        table.add_column(heading, justify="right")
    for finding in report.findings:
        centroid = ", ".join(f"{c:.1f}" for c in finding.centroid_mm)
        numbers = (f"{finding.volume_ml:.2f}", f"{finding.peak_score:.2f}", f"{finding.mean_score:.2f}")
        table.add_row(str(finding.label), *numbers, centroid, str(finding.key_slice))
    console.print(table)
    seconds = sum(report.work.seconds.values())
    low, high = report.analysed.z_mm
    console.print(f"Analysed: {report.analysed.volume_ml:.0f} ml, z {low:.0f} to {high:.0f} mm, in {seconds:.1f} s.")
    if report.brain:
        made_by = f"{report.brain.method} {report.brain.version}"
        console.print(f"Brain: {report.brain.volume_ml:.0f} ml, taken out of its head by {made_by} (brain.nii.gz).")
        for warning in report.brain.warnings:
            console.print(warning, soft_wrap=True, highlight=False)
    if report.model.selection and report.model.selection.warning:
        console.print(f"Not sure of the model: {report.model.selection.warning}", soft_wrap=True, highlight=False)
    if report.input.format == "dicom":
        for name, reason in report.absent.items():
            if name not in DICOM_NAMES:
                continue
            console.print(f"No {name}: {reason['found']}", soft_wrap=True, highlight=False)
    console.print(f"Results in {out}", soft_wrap=True, highlight=False)
    console.print(report.notice)


def beside(scan: Path) -> Path | None:
    """The truth that `counterpart sample` writes beside its scan, where there is one."""
    truth = scan.parent / TRUTH
    return truth if truth.is_file() else None


def tell_dice(out: Path, truth: Path, console: Console) -> None:
    """Compare the mask with a known lesion.

    Raises
    ------
    NotAVolume
        The truth is no image on the scan's own grid.
    """
    mask, lesion = (_binary(path) for path in (out / "mask.nii.gz", truth))
    if mask[0].shape != lesion[0].shape or np.abs(mask[1] - lesion[1]).max() > SAME_GRID_MM:
        raise NotAVolume(
            "The truth has another grid than the scan.",
            expected=f"a mask of shape {mask[0].shape} with the scan's affine.",
            advice="Resample the truth onto the scan, or leave it out.",
        )
    console.print(f"Dice with {truth.name}: {dice(mask[0], lesion[0]):.3f}", highlight=False)


def dice(found: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Overlap of two masks, 0 to 1; 1 where both are empty."""
    size = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / size if size else 1.0


def _binary(path: Path) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    try:
        image = nib.load(path)
    except ImageFileError:
        raise NotAVolume(
            "The truth cannot be read as an image.",
            expected="a mask as NIfTI, on the scan's grid.",
            advice="Correct it, or leave it out.",
        ) from None
    assert isinstance(image, nib.Nifti1Image)
    assert image.affine is not None
    return np.asarray(image.dataobj) > 0, image.affine
