"""Terminal output of `counterpart calibrate` and `counterpart drift`."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.analysis import AnalysisRequest
from app.console import installed_models
from app.settings import Settings
from app.site_calibration import Drift, calibrate, list_scans
from app.site_profile import SiteProfile, write_profile


def calibrate_site(
    folder: Path, out: Path, request: AnalysisRequest, target_ml: float, settings: Settings, console: Console
) -> SiteProfile:
    """Calibrate a model on the scans of a folder, write the profile, and print each scan that is left out.

    Scans are named by their number in the sorted folder, because a file name may contain a patient's name.

    Raises
    ------
    TooFewScans
        See `app.site_calibration.calibrate`.
    """
    load, manifests = installed_models(settings.model_copy(update={"profiles": None}))
    paths = list_scans(folder)

    def show(index: int, outcome: str) -> None:
        console.print(f"Scan {index + 1} of {len(paths)}: {outcome}", highlight=False)

    profile = calibrate(paths, load, manifests, request, target_ml, show)
    key = settings.profile_key
    write_profile(profile, out, key.get_secret_value() if key else None)
    return profile


def print_profile(profile: SiteProfile, out: Path, console: Console) -> None:
    """Print the false findings with a site profile, and the loss of sensitivity."""
    left_out = ", ".join(f"{code} {count}" for code, count in profile.excluded.items()) or "none"
    scanner = (
        f"{profile.scanner.manufacturer} {profile.scanner.model}" if profile.scanner else "not stated in the files"
    )
    thresholds = f"Threshold {profile.threshold:.3g}, extent threshold {profile.extent_threshold:.3g}."
    for line in (
        f"{profile.scans} scans for {profile.model}. Scanner: {scanner}.",
        f"Left out: {left_out}.",
        thresholds,
    ):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(_volume_table(profile))
    console.print(_sensitivity_table(profile))
    advice = "Move it into the folder of COUNTERPART_PROFILES."
    console.print(f"Profile {profile.id}: {out}. {advice}", soft_wrap=True, highlight=False)


def _volume_table(profile: SiteProfile) -> Table:
    table = Table(title="False findings in these healthy scans, ml")
    for heading in ("thresholds", "median", "90th percentile", "mean", "largest"):
        table.add_column(heading, justify="right")
    for name, volumes in (("model", profile.before), ("profile, each scan left out in turn", profile.achieved)):
        numbers = (volumes.median, volumes.percentile_90, volumes.mean, volumes.largest)
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    return table


def _sensitivity_table(profile: SiteProfile) -> Table:
    table = Table(title="Lesions inserted into these scans")
    for heading in ("ml", "lesions", "found: model", "found: profile", "Dice: model", "Dice: profile"):
        table.add_column(heading, justify="right")
    for row in profile.sensitivity:
        counts = (str(n) for n in (row.lesions, row.detected_by_model, row.detected))
        table.add_row(f"{row.volume_ml:g}", *counts, f"{row.dice_of_model:.2f}", f"{row.dice:.2f}")
    return table


def print_drift(drift: Drift, console: Console) -> None:
    """Print the comparison of later scans with a site profile."""
    verdict = "drifted: calibrate again, or find the cause" if drift.has_drifted else "no drift found"
    score = f"median {drift.median_score:.3g}, at the calibration {drift.calibrated_median_score:.3g}"
    volume = f"median {drift.median_volume_ml:.2f} ml, at the calibration {drift.calibrated_median_volume_ml:.2f} ml"
    lines = (
        f"{drift.scans} scans with this profile: {verdict}.",
        f"Score of a scan: {score} (p = {drift.p_value:.2g}, Mann-Whitney).",
        f"Outside the range of the profile: {drift.outside} scans.",
        f"Volume of the findings: {volume} (healthy scans).",
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
