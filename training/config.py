"""One TOML file describes one bundle, from its data to its calibration."""

import os
import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from app.manifest import FrozenModel, NoiseSchedule, Preprocessing, View

DATA_VARIABLE = "COUNTERPART_DATA"
ROOT = Path(__file__).resolve().parents[1]
# Fields of a preparation that change no slice of a brain: words, and whether serving takes it out of a head.
NOT_OF_THE_SLICES = {"subject", "advice", "brain_only"}


def data_root() -> Path:
    """Folder of the real scans: the environment's, else the one beside the checkout."""
    return Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data"))


class PicturesConfig(FrozenModel):
    """Slices that come from an archive of 2D pictures instead of volumes (`training.pictures`)."""

    kind: Literal["mednist", "lgg"]
    pixel_mm: float = Field(description="Of a picture, by a guess: nothing says it.")
    black: float = Field(default=0.0, description="Of a CT: the grey value of the window's lower end ...")
    white: float = Field(default=255.0, description="... and of its upper one.")
    exclusions: str = Field(default="", description="List of the pictures that are left out, below training/splits.")


class DataConfig(FrozenModel):
    folder: str = Field(description="Folder of the volumes, below the data root.")
    pattern: str = Field(description="File name with {subject}; of pictures, of their archive.")
    splits: str = Field(description="File of the frozen split, below training/splits.")
    copies: int = Field(description="Tilted and scaled copies of each training scan, beside itself.")
    tilt_degrees: float = Field(description="Standard deviation of the tilt about each axis.")
    scale_sd: float = Field(description="Standard deviation of the scale.")
    pictures: PicturesConfig | None = Field(default=None, description="Where the slices are pictures.")

    @model_validator(mode="after")
    def _whole_heads(self) -> Self:
        if self.pictures is not None and self.copies:
            raise ValueError("pictures cannot be tilted: no copies")
        return self


class ScannerConfig(FrozenModel):
    """How sharp and how noisy another scanner's images of the same head may be (`training.scanner`)."""

    share: float = Field(description="Share of the training slices that look as if from another scanner.")
    noise: float = Field(description="Largest standard deviation of the noise, in slice values.")
    blur_pixels: float = Field(description="Largest standard deviation of a Gaussian.")
    sharpen: float = Field(description="Largest share of the fine detail that is added once more.")


class AugmentationConfig(FrozenModel):
    """In-plane and intensity changes small enough that a healthy slice stays healthy."""

    rotate_degrees: float
    scale: float
    shift_pixels: float
    gain: float
    gamma: float
    scanner: ScannerConfig


class VqvaeConfig(FrozenModel):
    warm_start: str = Field(description="Version of this bundle whose VQ-VAE this one starts from; empty for none.")
    channels: tuple[int, ...]
    residual_layers: int
    embedding_dim: int
    codes: int
    decay: float
    commitment: float
    dead_below: float = Field(description="Share of the uniform use under which a code is restarted.")
    restart_every: int
    batch: int
    steps: int
    learning_rate: float


class CoarseNoiseConfig(FrozenModel):
    """Patches of coarse noise that the denoiser learns to take away (`training.coarse`)."""

    share: float = Field(description="Share of the training slices that carry any.")
    patch_pixels: tuple[float, float] = Field(description="Smallest and largest scale of a patch.")
    covered: tuple[float, float] = Field(description="Smallest and largest share of the head under each of two sets.")
    strength: tuple[float, float] = Field(description="Smallest and largest change, in slice values.")
    level_pixels: tuple[float, float] = Field(description="Smallest and largest scale on which the strength varies.")
    level_sd: float = Field(description="Standard deviation of that variation, as a share of the strength.")
    edge_pixels: tuple[float, float] = Field(description="Smallest and largest softness of a patch's edge.")


class DenoiserConfig(FrozenModel):
    warm_start: str = Field(description="Version of this bundle whose denoiser this one starts from; empty for none.")
    channels: tuple[int, ...]
    residual_blocks: int
    attention: tuple[bool, ...]
    head_channels: int
    batch: int
    steps: int
    learning_rate: float
    warmup: int
    ema_decay: float
    snr_limit: float = Field(description="Signal-to-noise ratio up to which an error of the noise is weighed.")
    focus_below: int = Field(description="Time steps under it are drawn with `focus_share`: where the KL map looks.")
    focus_share: float


class ExportConfig(FrozenModel):
    averaged: bool = Field(description="Whether the averaged weights of the denoiser are served, or its last ones.")
    int8: bool = Field(default=False, description="Whether it computes in int8 on a CPU (`training.quantise`).")


class DetectionConfig(FrozenModel):
    """Choices of METHOD's detection; what follows from them is calibrated on healthy scans."""

    kl_timesteps: tuple[int, ...]
    kl_mean: Literal["arithmetic", "geometric"]
    kl_smoothing_mm: float
    kl_percentile: float
    empty_share: float = Field(description="Share of healthy slices whose mask must come out empty; 0 drops nothing.")
    grow: int
    reverse_timesteps: tuple[int, ...]
    views: tuple[View, ...] = Field(description="Ways to look at a slice, the plain one first.")
    reference: Literal["image", "reconstruction"]
    contrast_floor: float
    weighted_by_kl: bool
    weighted_by_intensity: bool = False
    erosion: int
    median_pixels: int = Field(default=1, description="Side of the median over the anomaly map; 1 for none.")
    smoothing_mm: float
    false_positive_ml: float = Field(description="Median volume of findings that healthy scans may show.")
    extent_share: float = Field(description="How far a finding reaches: share of the threshold.")
    least_threshold: float
    min_lesion_ml: float
    gate_timesteps: tuple[int, ...]
    gate_scanners: int = Field(description="Other scanners that the gate is calibrated on, for each healthy scan.")
    gate_refused: float = Field(description="Share of healthy scans that the gate's scores together may refuse.")
    gate_fraction_out: float
    gate_slices_out: float | None = Field(
        default=None, description="Share of slices that may look like no healthy one; null: the gate does not ask."
    )


class BundleConfig(FrozenModel):
    """Words of the manifest and the card."""

    title: str
    intended_use: str
    modality: Literal["MR", "CT"]
    sequence: str
    data: str
    licence: str
    attribution: str
    non_commercial: bool = Field(default=False, description="Data that neither pictures nor services may be made of.")


class Config(FrozenModel):
    name: str
    version: str
    seed: int
    data: DataConfig
    preprocessing: Preprocessing
    schedule: NoiseSchedule
    augmentation: AugmentationConfig
    coarse_noise: CoarseNoiseConfig
    vqvae: VqvaeConfig
    denoiser: DenoiserConfig
    export: ExportConfig
    detection: DetectionConfig
    bundle: BundleConfig

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a configuration; an unknown or missing key is an error."""
        return cls.model_validate(tomllib.loads(path.read_text()))

    @property
    def training_preparation(self) -> Preprocessing:
        """How training's scans become slices: as in serving, but that pictures have no height to be cut at."""
        fit = self.preprocessing.head_box
        if self.data.pictures is None or fit is None:
            return self.preprocessing
        return self.preprocessing.model_copy(update={"fit": fit.model_copy(update={"reach_mm": None})})

    @property
    def downsampling(self) -> int:
        """Pixels of a slice along one side of a latent."""
        return int(2 ** len(self.vqvae.channels))

    @property
    def run_folder(self) -> Path:
        """Checkpoints, cached slices and curves of this bundle; ignored by git."""
        return ROOT / "runs" / f"{self.name}-{self.version}"

    @property
    def bundle_folder(self) -> Path:
        """Where its bundle lies, once it is made."""
        return ROOT / "models" / f"{self.name}-{self.version}"
