"""The contract between training and serving: what training decided, and serving obeys."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# In which a denoiser computes, its convolutions above all; its inputs and outputs are float32.
Precision = Literal["float32", "float16", "int8"]


class Part(BaseModel):
    """A frozen part of a manifest; an unknown field, or a number that is none, is an error, not a surprise."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Fit(Part):
    """A model of pictures without millimetres: every head is stretched in its planes to the same size (decision 15)."""

    rows: float = Field(
        gt=0, description="The box around the largest axial slice of the head, posterior to anterior ..."
    )
    columns: float = Field(gt=0, description="... and left to right, in pixels.")
    foreground_level: float = Field(
        gt=0, lt=1, description="The head starts at this share of the brightest one percent, smoothed to a pixel."
    )
    reach_mm: float | None = Field(
        default=None, gt=0, description="Slices further below the top of the head are not analysed: training had none."
    )


class Preparation(Part):
    """How a scan becomes slices (`app.pipeline.prepare`)."""

    subject: str = Field(description="What the model knows, for messages: 'a skull-stripped brain'.")
    advice: str = Field(description="What to do with a scan of another size.")
    spacing_mm: tuple[float, float, float] = Field(description="Slice, row and column spacing.")
    shape: tuple[int, int] = Field(description="Rows and columns of a slice.")
    extent_mm: tuple[tuple[float, float, float], tuple[float, float, float]] = Field(
        description="Smallest and largest foreground, right-left, anterior-posterior, inferior-superior."
    )
    intensity_percentile: float | None = Field(
        default=None, description="Percentile of the foreground that is mapped ..."
    )
    intensity_level: float | None = Field(
        default=None, description="... to this slice value; the background is mapped to 0."
    )
    window: tuple[float, float] | None = Field(
        default=None, description="In place of them, of a CT: Hounsfield units that are mapped to 0 and to 1."
    )
    min_foreground_cm2: float = Field(description="A slice with less foreground is not analysed.")
    brain_only: bool = Field(
        default=False, description="The model knows brains without their heads: a scan with skull is extracted first."
    )
    fit: Fit | None = Field(
        default=None, description="Heads are stretched to one size; `spacing_mm` is then that of a typical head."
    )

    @property
    def voxel_ml(self) -> float:
        """Volume of one pixel of a slice."""
        dz, dy, dx = self.spacing_mm
        return dz * dy * dx / 1000

    @model_validator(mode="after")
    def _one_intensity(self) -> "Preparation":
        relative = (self.intensity_percentile is not None, self.intensity_level is not None)
        if relative != ((self.window is None,) * 2):
            raise ValueError("intensities need a percentile and its level, or a window")
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("a window must not be empty or upside down")
        return self

    @model_validator(mode="after")
    def _fitting(self) -> "Preparation":
        if self.fit is not None and (self.fit.rows > self.shape[0] or self.fit.columns > self.shape[1]):
            raise ValueError("the box of a fitted head must lie inside the slice")
        if self.fit is not None and self.brain_only:
            raise ValueError("a fitted head is a whole one: it cannot be a brain alone")
        return self


def latent_sigma(smoothing_mm: float, preparation: Preparation, downsampling: int) -> tuple[float, float, float]:
    """Millimetres as slices, rows and columns of latents."""
    dz, dy, dx = preparation.spacing_mm
    return smoothing_mm / dz, smoothing_mm / (dy * downsampling), smoothing_mm / (dx * downsampling)


class NoiseSchedule(Part):
    """Linear beta: METHOD's symbols (`app.pipeline.schedule`)."""

    steps: int = Field(description="T.")
    beta_start: float
    beta_end: float


class Latent(Part):
    """Shape of z0: (channels, rows / downsampling, columns / downsampling), unit variance."""

    channels: int
    downsampling: int


class Range(Part):
    """What healthy validation scans span, margin included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether a value lies inside, ends included."""
        return self.low <= value <= self.high

    @model_validator(mode="after")
    def _upright(self) -> "Range":
        if self.low > self.high:
            raise ValueError("a range must not be upside down")
        return self


class View(Part):
    """How a slice is shown to the networks (`app.pipeline.views`)."""

    mirrored: bool = Field(default=False, description="Left and right exchanged.")
    shift: tuple[int, int] = Field(default=(0, 0), description="Rows and columns that it is moved by, in pixels.")


class KlMap(Part):
    """Where the model is surprised."""

    timesteps: tuple[int, ...] = Field(description="S: noise levels t, each one evaluation of the network a slice.")
    alpha_bar: tuple[float, float] = Field(description="The same range as signal: alpha_bar at its first and last t.")
    mean: Literal["arithmetic", "geometric"] = Field(default="arithmetic", description="Over the noise levels.")
    smoothing_mm: float = Field(default=0.0, description="Standard deviation of the Gaussian over the KL map.")
    percentile: float = Field(description="Percentile of healthy foreground latents that became the threshold.")
    threshold: float = Field(description="A latent above it, in nats, is masked.")
    min_component: int = Field(description="Connected masked latents, fewer are dropped.")
    grow: int = Field(description="Latents by which the mask is grown before the reverse process.")


class Reverse(Part):
    """The partial reverse process with inpainting."""

    timesteps: tuple[int, ...] = Field(description="Descending t of the DDIM sub-sequence; it ends at z0.")


class Residual(Part):
    """From the counterpart to the anomaly map and the mask."""

    reference: Literal["image", "reconstruction"] = Field(
        description="What the decoded counterpart is compared with: x, or D(z0), in which the autoencoder's own "
        "error cancels."
    )
    contrast_floor: float = Field(
        default=0.0, description="The residual is divided by this plus the counterpart's local contrast; 0: it is not."
    )
    weighted_by_kl: bool = Field(default=False, description="Multiplied by the up-sampled KL over its threshold.")
    weighted_by_intensity: bool = Field(
        default=False, description="Multiplied by the slice itself, in a sequence where what is ill is bright."
    )
    erosion: int = Field(default=0, description="Pixels at the foreground's edge that are not judged.")
    median_pixels: int = Field(
        default=1, ge=1, description="Side of the median over the anomaly map within a slice; 1 for none."
    )
    smoothing_mm: float = Field(description="Standard deviation of the Gaussian over the anomaly map; 0 for none.")
    threshold: float = Field(description="A finding rises above it somewhere ...")
    extent_threshold: float = Field(description="... and reaches as far as the anomaly map stays above this.")
    healthy_false_positive_ml: float = Field(description="Median volume of what is found in healthy validation scans.")
    min_lesion_ml: float = Field(description="Smaller connected findings are dropped.")

    @model_validator(mode="after")
    def _odd(self) -> "Residual":
        if self.median_pixels % 2 == 0:
            raise ValueError("the square of a median has a middle: an odd side")
        return self


class Gate(Part):
    """Which scans are the kind of image that the model knows."""

    timesteps: tuple[int, ...] = Field(description="Noise levels at which the typical KL of a scan is taken.")
    typical: tuple[Range, ...] = Field(
        description="At each, the median KL of a slice: the greatest over slices reaches the low end, the least "
        "does not pass the high end."
    )
    reconstruction: Range = Field(description="Mean |x - D(z0)| over the foreground of a scan.")
    latent: Range = Field(description="KL of a single healthy latent.")
    max_fraction_out: float = Field(description="Share of foreground latents outside `latent` that is still accepted.")
    max_slices_out: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of slices whose own score may lie outside `calibration.slice_score`; null: not asked. Where "
        "it is asked, it alone speaks of how a scan of few slices looks: `typical` compares extremes over many.",
    )


class Calibration(Part):
    """Ranges that are reported beside a scan's own scores."""

    subjects: tuple[str, ...] = Field(description="Healthy validation subjects that every threshold comes from.")
    slice_score: Range
    scan_score: Range


class File(Part):
    """A file of the bundle and what its bytes must be."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_.-]*$", description="Beside the manifest, and nowhere else.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Files(Part):
    encoder: File
    denoiser: File
    denoiser_int8: File | None = Field(
        default=None,
        description="On a CPU, in place of the denoiser: the same, its convolutions in int8; thresholds were "
        "calibrated with it.",
    )
    decoder: File
    golden: File


class Licence(Part):
    data: str = Field(description="What it was trained on.")
    licence: str = Field(description="SPDX expression of the weights.")
    attribution: str
    non_commercial: bool = Field(
        default=False, description="It serves only when asked for by name, and where the operator allows it."
    )


class Provenance(Part):
    """Where the weights come from."""

    code_version: str
    config_sha256: str
    data_sha256: str = Field(description="Over the names and bytes of the training scans.")
    split: str
    train_subjects: int
    validation_subjects: int
    seed: int
    vqvae_steps: int
    denoiser_steps: int
    warm_start: str = Field(default="", description="Version whose denoiser this one went on from, if any.")


class ExtractorFiles(Part):
    coarse: File
    fine: File
    golden: File


class ExtractorManifest(Part):
    """What finds the brain in a head (`app.brain`), and where it comes from."""

    format_version: Literal[1] = 1
    method: str
    version: str
    licence: str = Field(description="SPDX expression of code and weights.")
    attribution: str
    source_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Of the package with the weights.")
    files: ExtractorFiles


class Manifest(Part):
    """All that serving needs to know of a bundle.

    Raises
    ------
    ValueError
        The parts contradict each other (pydantic's ValidationError).
    """

    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    version: str = Field(pattern=r"^\d+(\.\d+)*(-?(a|b|rc)\d+)?$")
    title: str
    intended_use: str
    modality: Literal["MR", "CT"]
    sequence: str = Field(description="T1, FLAIR, ...; for people and for the choice of a bundle.")
    preparation: Preparation
    latent: Latent
    schedule: NoiseSchedule
    seed: int = Field(description="Default seed of the keyed noise.")
    views: tuple[View, ...] = Field(
        default=(View(),),
        description="Ways to look at a slice, the plain one first; residuals and counterparts are averaged.",
    )
    kl: KlMap
    reverse: Reverse
    residual: Residual
    gate: Gate
    calibration: Calibration
    files: Files
    licence: Licence
    provenance: Provenance
    precision: Literal["float32", "float16"] = Field(
        default="float32",
        description="In which `files.denoiser` computes; its inputs and outputs are float32.",
    )

    @property
    def id(self) -> str:
        """`name-version`: the folder's name, and the model's in every answer."""
        return f"{self.name}-{self.version}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of z0."""
        rows, columns = self.preparation.shape
        f = self.latent.downsampling
        return self.latent.channels, rows // f, columns // f

    @property
    def kl_sigma(self) -> tuple[float, float, float]:
        """Smoothing of the KL map in slices, rows and columns of latents."""
        return latent_sigma(self.kl.smoothing_mm, self.preparation, self.latent.downsampling)

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        levels = (*self.kl.timesteps, *self.reverse.timesteps, *self.gate.timesteps)
        if not self.kl.timesteps or not self.reverse.timesteps or not all(0 < t < self.schedule.steps for t in levels):
            raise ValueError("every time step must lie between 1 and T - 1")
        if list(self.reverse.timesteps) != sorted(set(self.reverse.timesteps), reverse=True):
            raise ValueError("the reverse time steps must descend")
        if not self.views or self.views[0] != View():
            raise ValueError("the first view must be the plain one")
        if len(self.gate.timesteps) != len(self.gate.typical):
            raise ValueError("the gate needs one range for each of its time steps")
        if self.preparation.window is not None and self.modality != "CT":
            raise ValueError("a window is in Hounsfield units, which only a CT has")
        if self.precision == "float16" and self.files.denoiser_int8 is not None:
            raise ValueError("a bundle in float16 has no denoiser in int8")
        if any(side % self.latent.downsampling for side in self.preparation.shape):
            raise ValueError("the slice shape must be a multiple of the down-sampling")
        return self
