"""Terminal output of `counterpart detect`: progress bars, a table of findings, the Dice."""

from collections.abc import Callable
from dataclasses import replace
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
from app.export.report import Report, by_certainty
from app.manifest import Manifest
from app.pipeline.findings import dice
from app.runtime.bundle import Bundle, find_bundles, load_bundle, read_manifest, shipped_models
from app.runtime.selection import check_licence
from app.settings import Settings
from app.site_profile import load_site_profiles

# `counterpart sample` writes this file beside its scan.
TRUTH_FILE = "truth.nii.gz"
# Largest difference of two affines of one grid, far below the size of a voxel.
AFFINE_TOLERANCE_MM = 1e-3
STAGES = {"read": "Read the scan", "infer": "Compare with the counterpart", "export": "Write the results"}


class ProgressBars:
    """One progress bar for each stage on standard error, if that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, fraction: float) -> None:
        """Update the bar of a stage (an `app.analysis.Progress`)."""
        if stage not in self._tasks:
            self._tasks[stage] = self.progress.add_task(STAGES.get(stage, stage), total=1.0)
        self.progress.update(self._tasks[stage], completed=fraction)


def run_analysis(scan: Path, out: Path, request: AnalysisRequest, settings: Settings) -> Report:
    """Analyse one scan with the bundles and the provider of the settings, and show the progress.

    Raises
    ------
    CounterpartError
        The scan cannot be analysed, or a model cannot be used; see `app.errors`.
    """
    load, manifests = installed_models(settings)
    out.mkdir(parents=True, exist_ok=True)
    bars = ProgressBars()
    with bars.progress:
        return analyse(scan, out, load, manifests, request, bars, settings.seg_type)


def installed_models(settings: Settings) -> tuple[Callable[[Manifest], Bundle], tuple[Manifest, ...]]:
    """Return a function that loads a bundle once, with the site profiles, and the manifests of all bundles.

    Raises
    ------
    UnknownModel
        The folder of the models contains no bundle.
    DamagedBundle, InvalidProfile
    """
    folder = settings.models or shipped_models()
    found = [(read_manifest(path), path) for path in find_bundles(folder)]
    if not found:
        raise UnknownModel(
            f"The folder {folder} contains no model bundle.",
            expected="a folder with a manifest.json for each model.",
            advice="Unset COUNTERPART_MODELS to use the shipped bundles, or install counterpart again.",
        )
    profiles = load_site_profiles(settings.profiles, settings.profile_key, any_scanner=settings.profile_any_scanner)
    loaded: dict[str, Bundle] = {}

    def load(manifest: Manifest) -> Bundle:
        check_licence(manifest, noncommercial=settings.allow_noncommercial)
        if manifest.id not in loaded:
            path = next(path for other, path in found if other.id == manifest.id)
            bundle = load_bundle(path, settings.provider, settings.threads, settings.gpu_batch)
            loaded[manifest.id] = replace(bundle, site_profiles=profiles)
        return loaded[manifest.id]

    return load, tuple(manifest for manifest, _ in found)


def print_report(report: Report, out: Path, console: Console) -> None:
    """Print the warnings, the findings as a table, the surest first, the notes, and the folder of the results."""
    for warning in report.warnings:
        console.print(f"Warning: {warning}", style="yellow", soft_wrap=True, highlight=False)
    table = Table(title=f"{len(report.findings)} findings, {report.lesion_volume_ml:.2f} ml ({report.model.id})")
    for heading in ("#", "ml", "peak", "mean", "difference", "centroid RAS+ mm", "key plane z mm"):
        table.add_column(heading, justify="right")
    for finding in by_certainty(report.findings):
        centroid = ", ".join(f"{c:.1f}" for c in finding.centroid_mm)
        difference = "" if finding.mean_difference is None else f"{finding.mean_difference:+.3g}"
        numbers = (f"{finding.volume_ml:.2f}", f"{finding.peak_score:.2f}", f"{finding.mean_score:.2f}", difference)
        table.add_row(str(finding.label), *numbers, centroid, f"{finding.key_z_mm:.1f}")
    console.print(table)
    seconds = sum(report.work.seconds.values())
    low, high = report.analysed.z_mm
    console.print(f"Analysed: {report.analysed.volume_ml:.0f} ml, z {low:.0f} to {high:.0f} mm, in {seconds:.1f} s.")
    lines = list(report.input.notes)
    if report.brain:
        made_by = f"{report.brain.method} {report.brain.version}"
        lines.append(f"Brain: {report.brain.volume_ml:.0f} ml, extracted by {made_by} (brain.nii.gz).")
    if report.input.format == "dicom":
        lines += [f"No {name}: {reason['found']}" for name, reason in report.absent.items() if name in DICOM_NAMES]
    for line in (*lines, f"Results: {out}"):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(report.notice)


def find_truth(scan: Path) -> Path | None:
    """Return the known lesion mask beside a scan, if there is one."""
    truth = scan.parent / TRUTH_FILE
    return truth if truth.is_file() else None


def print_dice(out: Path, truth: Path, console: Console) -> None:
    """Print the Dice of the mask and a known lesion mask.

    Raises
    ------
    NotAVolume
        The known mask cannot be read, or it has another grid than the scan.
    """
    mask, lesion = (_load_mask(path) for path in (out / "mask.nii.gz", truth))
    if mask[0].shape != lesion[0].shape or np.abs(mask[1] - lesion[1]).max() > AFFINE_TOLERANCE_MM:
        raise NotAVolume(
            "The truth has another grid than the scan.",
            expected=f"a mask of shape {mask[0].shape} with the affine of the scan.",
            advice="Resample the truth to the grid of the scan, or leave it out.",
        )
    console.print(f"Dice with {truth.name}: {dice(mask[0], lesion[0]):.3f}", highlight=False)


def _load_mask(path: Path) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Return a mask, (X, Y, Z), and its affine, (4, 4)."""
    try:
        image = nib.load(path)
    except ImageFileError:
        raise NotAVolume(
            "The truth cannot be read as an image.",
            expected="a NIfTI mask on the grid of the scan.",
            advice="Correct the file, or leave it out.",
        ) from None
    assert isinstance(image, nib.Nifti1Image)
    assert image.affine is not None
    return np.asarray(image.dataobj) > 0, image.affine
