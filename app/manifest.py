"""Manifest of a bundle: the contract between training, which writes it, and serving, which reads it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Arithmetic of a denoiser, mainly of its convolutions. Its inputs and outputs are float32.
Precision = Literal["float32", "float16", "int8"]

DEFAULT_METHOD = "coarse-patch-diffusion"


class FrozenModel(BaseModel):
    """Base of every part of a manifest. It rejects unknown fields, NaN and infinity, and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class HeadBox(FrozenModel):
    """Box that the largest axial slice of every head is scaled to (decision 15).

    A model of images whose pixel size is unknown needs it.
    """

    rows: float = Field(gt=0, description="Height of the box, posterior to anterior, in pixels.")
    columns: float = Field(gt=0, description="Width of the box, left to right, in pixels.")
    foreground_level: float = Field(
        gt=0, lt=1, description="The head starts at this fraction of the 99th percentile of the smoothed scan."
    )
    reach_mm: float | None = Field(
        default=None,
        gt=0,
        description="Slices further below the top of the head are not analysed, because training had no such slices.",
    )


class Preprocessing(FrozenModel):
    """Settings that turn a scan into slices (`app.pipeline.preprocess`)."""

    subject: str = Field(description="Object that the model was trained on, for messages: 'a skull-stripped brain'.")
    advice: str = Field(description="Advice if a scan has another size.")
    spacing_mm: tuple[float, float, float] = Field(description="Slice, row and column spacing.")
    shape: tuple[int, int] = Field(description="Rows and columns of a slice.")
    extent_mm: tuple[tuple[float, float, float], tuple[float, float, float]] = Field(
        description="Smallest and largest foreground: right-left, anterior-posterior, inferior-superior."
    )
    intensity_percentile: float | None = Field(
        default=None, description="Percentile of the foreground that is mapped to `intensity_level`."
    )
    intensity_level: float | None = Field(
        default=None, description="Slice value of that percentile. The background is mapped to 0."
    )
    window: tuple[float, float] | None = Field(
        default=None,
        description="For CT, instead of a percentile: Hounsfield units that are mapped to 0 and to 1.",
    )
    min_foreground_cm2: float = Field(description="Smallest foreground area of a slice that is analysed.")
    brain_only: bool = Field(
        default=False, description="The model was trained on skull-stripped brains. Brain extraction runs first."
    )
    intracranial: bool = Field(
        default=False, description="For CT: the model was trained on the space inside the skull, found from bone."
    )
    head_box: HeadBox | None = Field(
        default=None,
        description="Every head is scaled to this box. `spacing_mm` is then the spacing of a typical head.",
    )

    @property
    def voxel_ml(self) -> float:
        """Volume of one pixel of a slice."""
        dz, dy, dx = self.spacing_mm
        return dz * dy * dx / 1000

    @model_validator(mode="after")
    def _check_intensity(self) -> "Preprocessing":
        relative = (self.intensity_percentile is not None, self.intensity_level is not None)
        if relative != ((self.window is None,) * 2):
            raise ValueError("give either a percentile and its level, or a window")
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("the lower end of the window must be below its upper end")
        return self

    @model_validator(mode="after")
    def _check_head_box(self) -> "Preprocessing":
        if self.head_box is not None and (self.head_box.rows > self.shape[0] or self.head_box.columns > self.shape[1]):
            raise ValueError("the box of the head must lie inside the slice")
        if self.head_box is not None and self.brain_only:
            raise ValueError("a box of the head needs whole heads, but the model takes brains only")
        return self

    @model_validator(mode="after")
    def _check_intracranial(self) -> "Preprocessing":
        if self.intracranial and (self.window is None or self.head_box is not None or self.brain_only):
            raise ValueError("the space inside the skull needs a window, no box of the head and no brain extraction")
        return self


def latent_sigma(smoothing_mm: float, settings: Preprocessing, downsampling: int) -> tuple[float, float, float]:
    """Convert a standard deviation from millimetres to slices, rows and columns of latents."""
    dz, dy, dx = settings.spacing_mm
    return smoothing_mm / dz, smoothing_mm / (dy * downsampling), smoothing_mm / (dx * downsampling)


class NoiseSchedule(FrozenModel):
    """Settings of a noise schedule whose beta is linear in t (`app.pipeline.diffusion.Schedule`)."""

    steps: int = Field(description="Number of time steps T.")
    beta_start: float = Field(description="Beta at t = 0.")
    beta_end: float = Field(description="Beta at t = T - 1.")


class Latent(FrozenModel):
    """Shape of z0: (channels, rows / downsampling, columns / downsampling). z0 has unit variance."""

    channels: int
    downsampling: int


class Range(FrozenModel):
    """Range over healthy validation scans, with a margin."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Return True if a value lies in the range. Both ends belong to it, NaN does not."""
        return self.low <= value <= self.high

    @model_validator(mode="after")
    def _check_order(self) -> "Range":
        if self.low > self.high:
            raise ValueError("the low end of a range must not exceed its high end")
        return self


class View(FrozenModel):
    """Test-time augmentation (`app.pipeline.scores.augment`)."""

    mirrored: bool = Field(default=False, description="Left and right are exchanged.")
    shift: tuple[int, int] = Field(default=(0, 0), description="Cyclic shift in rows and columns, in pixels.")


class KlMap(FrozenModel):
    """Settings of the KL map and of the latent mask."""

    timesteps: tuple[int, ...] = Field(description="Noise levels t. Each takes one denoiser evaluation per slice.")
    alpha_bar: tuple[float, float] = Field(description="alpha_bar at the first and last of these noise levels.")
    mean: Literal["arithmetic", "geometric"] = Field(default="arithmetic", description="Mean over the noise levels.")
    smoothing_mm: float = Field(default=0.0, description="Standard deviation of the Gaussian over the KL map.")
    percentile: float = Field(description="Percentile of healthy foreground latents that gave the threshold.")
    threshold: float = Field(description="Latents above it, in nats, are masked.")
    min_component: int = Field(description="Smallest connected component of the mask, in latents.")
    grow: int = Field(description="Number of dilations of the mask.")


class Reverse(FrozenModel):
    """Settings of the partial reverse process."""

    timesteps: tuple[int, ...] = Field(description="Descending t of the DDIM sub-sequence. The last step goes to z0.")


class Residual(FrozenModel):
    """Settings from the residual to the anomaly map and the mask."""

    contrast_floor: float = Field(
        default=0.0,
        description="The residual is divided by this plus the local contrast of the counterpart. 0: no division.",
    )
    weighted_by_intensity: bool = Field(
        default=False, description="The residual is multiplied by the slice, for sequences with bright lesions."
    )
    erosion: int = Field(default=0, description="Pixels at the edge of the foreground that are not analysed.")
    median_pixels: int = Field(
        default=1, ge=1, description="Side of the median filter over the residual within a slice. 1: no filter."
    )
    smoothing_mm: float = Field(description="Standard deviation of the Gaussian over the residual. 0: no smoothing.")
    threshold: float = Field(description="A finding exceeds this value somewhere.")
    extent_threshold: float = Field(description="A finding extends as far as the anomaly map exceeds this value.")
    healthy_false_positive_ml: float = Field(description="Median volume of findings in healthy validation scans.")
    simulated_false_positive_ml: float | None = Field(
        default=None,
        description="Median volume of findings in healthy validation scans on simulated scanners. Null: none was "
        "simulated.",
    )
    min_lesion_ml: float = Field(description="Smallest finding.")

    @model_validator(mode="after")
    def _check_median(self) -> "Residual":
        if self.median_pixels % 2 == 0:
            raise ValueError("the side of the median filter must be odd")
        return self


class OodCheck(FrozenModel):
    """Settings of the out-of-distribution check (`app.pipeline.out_of_distribution`)."""

    timesteps: tuple[int, ...] = Field(description="Noise levels at which the median KL of slices is checked.")
    median_kl_range: tuple[Range, ...] = Field(
        description="Healthy range of the median KL of a slice, one for each noise level. The largest median of a scan "
        "must reach the low end, and the smallest must not exceed the high end."
    )
    reconstruction_range: Range = Field(description="Healthy range of the mean |x - D(z0)| over the foreground.")
    latent_kl_range: Range = Field(description="Healthy range of the KL of a single latent.")
    max_outlier_fraction: float = Field(description="Largest fraction of foreground latents outside `latent_kl_range`.")
    max_outlier_slice_fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Largest fraction of slices whose score is outside `calibration.slice_score`. null: not checked. "
        "If it is set, it replaces the check of the median KL for a scan of few slices.",
    )
    min_solidity: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Smallest median over slices of the area of the foreground divided by that of its convex hull. "
        "null: not checked.",
    )
    min_white_matter_contrast: float | None = Field(
        default=None,
        ge=0,
        description="Smallest intensity of white matter, divided by that of all tissue: above 1 only in T1. null: not "
        "checked.",
    )


class Calibration(FrozenModel):
    """Healthy ranges that the report gives together with the scores of a scan."""

    subjects: tuple[str, ...] = Field(description="Healthy validation subjects that all thresholds come from.")
    slice_score: Range = Field(description="Mean KL of a slice, in nats.")
    scan_score: Range = Field(description="Mean KL of a scan, in nats.")


class File(FrozenModel):
    """File of a bundle with its checksum."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_.-]*$", description="Name in the folder of the manifest.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Files(FrozenModel):
    """Networks of a bundle and its golden pair."""

    encoder: File
    denoiser: File
    denoiser_int8: File | None = Field(
        default=None,
        description="Denoiser whose convolutions compute in int8. It is used on CPUs, and the thresholds were "
        "calibrated with it.",
    )
    decoder: File
    golden: File = Field(description="Inputs of the networks and their outputs at export (.npz).")


class Licence(FrozenModel):
    """Licence of a bundle."""

    data: str = Field(description="Training data.")
    licence: str = Field(description="SPDX expression of the weights.")
    attribution: str
    non_commercial: bool = Field(
        default=False, description="The model is used only if the caller names it and the operator allows it."
    )


class Provenance(FrozenModel):
    """Origin of the weights."""

    code_version: str
    config_sha256: str
    data_sha256: str = Field(description="SHA-256 of the names and bytes of the training scans.")
    split: str
    train_subjects: int
    validation_subjects: int
    seed: int
    vqvae_steps: int
    denoiser_steps: int
    warm_start: str = Field(default="", description="Version whose denoiser training started from, if any.")


class ExtractorFiles(FrozenModel):
    """Networks of the brain extractor and their golden pair."""

    coarse: File
    fine: File
    golden: File


class ExtractorManifest(FrozenModel):
    """Manifest of the brain extractor (`app.pipeline.brain_extraction`)."""

    format_version: Literal[1] = 1
    method: str
    version: str
    licence: str = Field(description="SPDX expression of code and weights.")
    attribution: str
    source_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the package with the weights.")
    files: ExtractorFiles


# Fields that were added after the first bundles, with the part that contains them. Their default value is not written,
# so that earlier bundles keep their bytes.
LATER_FIELDS = (
    ("", "method"),
    ("", "named_only"),
    ("preprocessing", "intracranial"),
    ("residual", "simulated_false_positive_ml"),
    ("ood", "min_solidity"),
    ("ood", "min_white_matter_contrast"),
)


class Manifest(FrozenModel):
    """Manifest of a bundle.

    Raises
    ------
    ValueError
        Two parts contradict each other (`pydantic.ValidationError`).
    """

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    version: str = Field(pattern=r"^\d+(\.\d+)*(-?(a|b|rc)\d+)?$")
    title: str
    intended_use: str
    modality: Literal["MR", "CT"]
    sequence: str = Field(description="T1, FLAIR, ... It is shown to users and selects the bundle for a scan.")
    named_only: bool = Field(
        default=False, description="Early version: the bundle is used only if the caller names it."
    )
    method: str = Field(
        default=DEFAULT_METHOD, description="Name of the detection method (`app.pipeline.methods.METHODS`)."
    )
    preprocessing: Preprocessing
    latent: Latent
    schedule: NoiseSchedule
    seed: int = Field(description="Default seed of the keyed noise.")
    views: tuple[View, ...] = Field(
        default=(View(),),
        description="Test-time augmentation, the identity view first. Residuals and counterparts are means over views.",
    )
    kl: KlMap
    reverse: Reverse
    residual: Residual
    ood: OodCheck
    calibration: Calibration
    files: Files
    licence: Licence
    provenance: Provenance
    precision: Literal["float32", "float16"] = Field(
        default="float32",
        description="Arithmetic of `files.denoiser`. Its inputs and outputs are float32.",
    )

    def to_json(self) -> str:
        """Return the text of manifest.json. Default values that earlier bundles lack are not written."""
        exclude: dict[str, Any] = {}
        for part_name, name in LATER_FIELDS:
            part = getattr(self, part_name) if part_name else self
            if getattr(part, name) == type(part).model_fields[name].default:
                (exclude.setdefault(part_name, {}) if part_name else exclude)[name] = True
        return self.model_dump_json(indent=1, exclude=exclude) + "\n"

    @property
    def is_only_named(self) -> bool:
        """True if the service uses the bundle only if the caller names it."""
        return self.named_only or self.licence.non_commercial

    @property
    def id(self) -> str:
        """`name-version`: the name of the folder, and the identifier of the model in the API."""
        return f"{self.name}-{self.version}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of one slice."""
        rows, columns = self.preprocessing.shape
        f = self.latent.downsampling
        return self.latent.channels, rows // f, columns // f

    @property
    def kl_sigma(self) -> tuple[float, float, float]:
        """Smoothing of the KL map in slices, rows and columns of latents."""
        return latent_sigma(self.kl.smoothing_mm, self.preprocessing, self.latent.downsampling)

    @model_validator(mode="after")
    def _check_consistency(self) -> "Manifest":
        levels = (*self.kl.timesteps, *self.reverse.timesteps, *self.ood.timesteps)
        if not self.kl.timesteps or not self.reverse.timesteps or not all(0 < t < self.schedule.steps for t in levels):
            raise ValueError("every time step must lie between 1 and T - 1")
        if list(self.reverse.timesteps) != sorted(set(self.reverse.timesteps), reverse=True):
            raise ValueError("the reverse time steps must descend")
        if not self.views or self.views[0] != View():
            raise ValueError("the first view must be the identity view")
        if len(self.ood.timesteps) != len(self.ood.median_kl_range):
            raise ValueError("the out-of-distribution check needs one range for each of its time steps")
        if self.preprocessing.window is not None and self.modality != "CT":
            raise ValueError("a window is in Hounsfield units, which only CT has")
        if self.precision == "float16" and self.files.denoiser_int8 is not None:
            raise ValueError("a bundle in float16 must not have a denoiser in int8")
        if any(side % self.latent.downsampling for side in self.preprocessing.shape):
            raise ValueError("the shape of a slice must be a multiple of the down-sampling")
        return self
