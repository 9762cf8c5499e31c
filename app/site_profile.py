"""Site profile: thresholds that were calibrated on healthy scans of one scanner (docs/site-calibration.md)."""

import hashlib
import hmac
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError

from app.errors import InvalidProfile
from app.manifest import FrozenModel, Manifest, Range
from app.volume import Scanner

# Fewer scans do not determine a threshold: the bound of the risk leaves too little for the scans themselves.
MIN_SCANS = 10


class Volumes(FrozenModel):
    """False-positive volumes of healthy scans, in millilitres."""

    median: float
    percentile_90: float
    mean: float
    largest: float


class LesionSensitivity(FrozenModel):
    """Findings in lesions of one size that were inserted into the scans, with two pairs of thresholds."""

    volume_ml: float = Field(description="Intended volume of a lesion.")
    lesions: int
    detected_by_model: int = Field(description="Lesions that a finding overlaps, with the model's thresholds.")
    detected: int = Field(description="The same with the thresholds of the profile.")
    dice_of_model: float = Field(description="Mean Dice with the model's thresholds.")
    dice: float = Field(description="Mean Dice with the thresholds of the profile.")


class SiteProfile(FrozenModel):
    """Thresholds for one model and one scanner, and what they achieve there.

    The profile contains no patient data: neither file names nor dates of scans.
    """

    format_version: Literal[1] = 1
    created: datetime
    code_version: str
    model: str = Field(description="Id of the model.")
    model_sha256: str = Field(description="Hash of the model's manifest. The profile fits this model only.")
    scanner: Scanner | None = Field(description="Scanner of the scans. Null if the files state none (NIfTI).")
    scans: int = Field(ge=MIN_SCANS, description="Healthy scans that determined the thresholds.")
    excluded: dict[str, int] = Field(description="Scans that were left out, counted by reason.")
    target_ml: float = Field(gt=0, description="Largest expected false-positive volume of a new healthy scan.")
    threshold: float = Field(gt=0)
    extent_threshold: float = Field(gt=0)
    before: Volumes = Field(description="False-positive volumes with the model's thresholds.")
    achieved: Volumes = Field(
        description="False-positive volumes of each scan with the thresholds that the other scans determine."
    )
    sensitivity: tuple[LesionSensitivity, ...]
    scan_score: Range = Field(description="Scores of scans that the profile fits.")
    scan_scores: tuple[float, ...] = Field(description="Scores of the scans, sorted, for `counterpart drift`.")
    volumes_ml: tuple[float, ...] = Field(description="False-positive volumes with these thresholds, sorted.")

    @property
    def id(self) -> str:
        """Date and the beginning of the hash: the name of the profile in reports."""
        return f"{self.created:%Y-%m-%d}-{digest(self)[:12]}"

    def apply(self, manifest: Manifest) -> Manifest:
        """Return a manifest with the thresholds of the profile."""
        thresholds = {"threshold": self.threshold, "extent_threshold": self.extent_threshold}
        return manifest.model_copy(update={"residual": manifest.residual.model_copy(update=thresholds)})


class ProfileFile(FrozenModel):
    """Content of a profile file."""

    profile: SiteProfile
    sha256: str
    signature: str | None = Field(description="HMAC-SHA-256 of the hash with COUNTERPART_PROFILE_KEY, in hexadecimal.")


class SiteProfiles(FrozenModel):
    """Profiles that a service has loaded."""

    profiles: tuple[SiteProfile, ...] = ()
    any_scanner: bool = Field(
        default=False, description="Also use the profile of another scanner, if it is the only one for the model."
    )

    def find(self, model_sha256: str, scanner: Scanner | None) -> SiteProfile | None:
        """Return the profile for a model, given by the hash of its manifest, and a scanner; None if there is none."""
        of_model = [profile for profile in self.profiles if profile.model_sha256 == model_sha256]
        exact = next((profile for profile in of_model if profile.scanner == scanner), None)
        return exact or (of_model[0] if self.any_scanner and len(of_model) == 1 else None)


def digest(profile: SiteProfile) -> str:
    """Return the SHA-256 of a profile's content, in hexadecimal."""
    return hashlib.sha256(profile.model_dump_json().encode()).hexdigest()


def write_profile(profile: SiteProfile, path: Path, key: str | None) -> None:
    """Write a profile with its hash, and sign it if a key is given."""
    sha256 = digest(profile)
    content = ProfileFile(profile=profile, sha256=sha256, signature=_sign(sha256, key) if key else None)
    path.write_text(content.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_profile(path: Path, key: str | None) -> SiteProfile:
    """Read a profile and check its hash, and its signature if a key is given.

    Raises
    ------
    InvalidProfile
        The file is not a profile, it was changed, or its signature does not match the key.
    """
    try:
        content = ProfileFile.model_validate_json(path.read_bytes())
    except (ValidationError, UnicodeDecodeError):
        raise InvalidProfile(
            f"The file {path.name} is not a site profile.",
            expected="a file that `counterpart calibrate` wrote.",
            advice="Run `counterpart calibrate` again, or move the file out of COUNTERPART_PROFILES.",
        ) from None
    if content.sha256 != digest(content.profile):
        raise InvalidProfile(
            f"The site profile {path.name} was changed after it was written: its hash does not match.",
            expected="an unchanged file.",
            advice="Run `counterpart calibrate` again.",
        )
    if key is not None and not hmac.compare_digest(content.signature or "", _sign(content.sha256, key)):
        raise InvalidProfile(
            f"The signature of the site profile {path.name} is missing, or another key was used.",
            expected="a profile that was written with the same COUNTERPART_PROFILE_KEY.",
            advice="Run `counterpart calibrate` with this key.",
        )
    return content.profile


def load_site_profiles(folder: Path | None, key: SecretStr | None, *, any_scanner: bool) -> SiteProfiles:
    """Read all profiles (*.json) of a folder.

    Parameters
    ----------
    folder : Path or None
        None loads no profile.
    key : SecretStr or None
        See `read_profile`.
    any_scanner : bool
        See `SiteProfiles`.

    Raises
    ------
    InvalidProfile
        A file cannot be used, or two profiles are for the same model and scanner.
    """
    secret = key.get_secret_value() if key else None
    profiles = tuple(read_profile(path, secret) for path in sorted(folder.glob("*.json"))) if folder else ()
    uses = [(profile.model_sha256, profile.scanner) for profile in profiles]
    if len(set(uses)) < len(uses):
        raise InvalidProfile(
            "Two site profiles are for the same model and the same scanner.",
            expected="one profile for each model and scanner.",
            advice="Move the older file out of COUNTERPART_PROFILES.",
        )
    return SiteProfiles(profiles=profiles, any_scanner=any_scanner)


def _sign(sha256: str, key: str) -> str:
    return hmac.new(key.encode(), sha256.encode(), hashlib.sha256).hexdigest()
