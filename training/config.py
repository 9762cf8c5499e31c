"""Configuration of one bundle: a TOML file with all settings from its data to its calibration."""

import argparse
import hashlib
import os
import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveFloat, field_validator, model_validator

from app.manifest import DEFAULT_METHOD, FrozenModel, NoiseSchedule, Preprocessing, View
from app.pipeline.methods import METHODS

DATA_VARIABLE = "COUNTERPART_DATA"
ROOT = Path(__file__).resolve().parents[1]
SPLITS_FOLDER = Path(__file__).with_name("splits")
# Preprocessing fields that do not change the pixels of a slice: texts, and whether serving extracts the brain first.
NON_PIXEL_FIELDS = {"subject", "advice", "brain_only"}

EvaluationPart = Literal[
    "healthy", "lesions", "heads", "unseen_lesions", "pathology", "foreign", "single", "tumours", "haemorrhage"
]


def data_root() -> Path:
    """Return the folder of the real scans: `COUNTERPART_DATA`, or `shared/data` next to the checkout."""
    return Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data"))


class ImageArchiveConfig(FrozenModel):
    """Archive of 2-D images in place of volumes (`training.image_archive`)."""

    kind: Literal["mednist", "lgg", "ct_ich"] = Field(description="File format of the archive.")
    pixel_mm: float = Field(description="Assumed pixel size, because the images have none.")
    window_low_grey: float = Field(default=0.0, description="Grey value at the lower end of a CT window.")
    window_high_grey: float = Field(default=255.0, description="Grey value at the upper end of a CT window.")
    air_below_grey: int = Field(default=0, description="Smaller grey values are air, in a CT window. 0: none are.")
    bone_above_grey: int = Field(default=255, description="Larger grey values are bone, in a CT window. 255: none are.")
    ordered: bool = Field(default=False, description="Consecutive images of a subject are neighbours in the head.")
    exclusions: str = Field(default="", description="CSV file of excluded images in training/splits.")
    series_spacing_mm: tuple[tuple[int, PositiveFloat], ...] | None = Field(
        default=None,
        description="Slice spacing of scans with outlined tumours, by the number of slices of the whole series: pairs "
        "of the largest number and the spacing in mm, ascending. None: the spacing of the model.",
    )
    above_stack_mm: float | None = Field(
        default=None,
        description="Height of the head above the highest image of a stack. A scan in service shows it, so the height "
        "that is analysed in scans with outlined tumours is smaller by it.",
    )

    @model_validator(mode="after")
    def _check_series(self) -> Self:
        if self.series_spacing_mm is None:
            return self
        if self.kind != "lgg":
            raise ValueError("only the archive of TCGA-LGG states the number of slices. Remove series_spacing_mm")
        numbers = [number for number, _ in self.series_spacing_mm]
        if numbers != sorted(set(numbers)):
            raise ValueError("series_spacing_mm must be ascending in the number of slices")
        return self


class AdditionalDataConfig(FrozenModel):
    """Data set of another scanner, whose subjects are in the same split."""

    folder: str = Field(description="Folder of the volumes, below the data root.")
    pattern: str = Field(description="File name with {subject}.")
    mask_pattern: str = Field(description="Path of the brain mask with {subject}, relative to the folder.")


class DataConfig(FrozenModel):
    """Healthy scans, their split and their augmented copies."""

    folder: str = Field(description="Folder of the volumes, below the data root.")
    pattern: str = Field(description="File name with {subject}, or the file name of the image archive.")
    splits: str = Field(description="File of the frozen split in training/splits.")
    tilted_copies: int = Field(description="Tilted and scaled copies of each training scan, in addition to itself.")
    tilt_sd_degrees: float = Field(description="Standard deviation of the tilt about each axis.")
    pitch_sd_degrees: float | None = Field(
        default=None, description="Standard deviation of the tilt about the left-right axis, if it differs."
    )
    scale_sd: float = Field(description="Standard deviation of the logarithm of the scale.")
    max_slice_mm: float = Field(
        default=0.0, description="Half of the tilted copies get thicker slices, up to this thickness. 0 for none."
    )
    additional: tuple[AdditionalDataConfig, ...] = Field(default=(), description="Data sets of other scanners.")
    image_archive: ImageArchiveConfig | None = Field(default=None, description="Set if the slices are 2-D images.")

    @model_validator(mode="after")
    def _check_copies(self) -> Self:
        if self.image_archive is not None and self.tilted_copies:
            raise ValueError("2-D images cannot be tilted. Set tilted_copies = 0")
        return self


class ScannerConfig(FrozenModel):
    """Simulated differences in sharpness and noise between scanners (`training.augment.simulate_scanner`)."""

    probability: float = Field(description="Share of the training slices that are changed.")
    max_noise_sd: float = Field(description="Largest standard deviation of the noise, in slice values.")
    max_blur_sd_pixels: float = Field(description="Largest standard deviation of the Gaussian blur.")
    max_sharpening: float = Field(description="Largest amount of unsharp masking.")


class AugmentationConfig(FrozenModel):
    """In-plane and intensity changes that are small enough to keep a healthy slice healthy."""

    max_rotation_degrees: float = Field(description="Largest rotation in the plane.")
    max_scale: float = Field(description="Largest relative change of the size: 0.04 is 4 %.")
    max_shift_pixels: float = Field(description="Largest shift along rows and columns.")
    max_gain: float = Field(description="Largest relative change of the intensity: 0.06 is 6 %.")
    max_log_gamma: float = Field(description="Largest absolute value of the logarithm of gamma.")
    anchor: float = Field(
        default=1.0, description="Slice value that gamma and tissue shifts keep: preprocessing scales scans to it."
    )
    tissue_levels: tuple[float, ...] = Field(default=(), description="Slice values of the tissues that are shifted.")
    tissue_shift_sd: float = Field(default=0.0, description="Standard deviation of the shift of each tissue level.")
    bias_field_sd: float = Field(
        default=0.0, description="Standard deviation of each coefficient of the logarithmic bias field."
    )
    erosion_probability: float = Field(
        default=0.0,
        description="Share of slices whose brain mask is eroded by one pixel, or by two in a third of them.",
    )
    fluid_rim_probability: float = Field(
        default=0.0,
        description="Share of slices that lose the dark rim of the brain, as brain masks without fluid do.",
    )
    fluid_rim_levels: tuple[float, float] = Field(
        default=(0.2, 0.45), description="Range of the level below which the rim is removed, in slice values."
    )
    warp_sd_pixels: float | None = Field(
        default=None,
        description="Standard deviation of a smooth random displacement of the anatomy, in each direction.",
    )
    wide_fluid_probability: float | None = Field(
        default=None, description="Share of slices whose fluid spaces are widened in places, as by atrophy."
    )
    scanner: ScannerConfig = Field(description="Simulated scanners.")


class CoarseNoiseConfig(FrozenModel):
    """Patches of coarse noise that the denoiser learns to remove (`training.augment.add_coarse_noise`)."""

    probability: float = Field(description="Share of the training slices that get coarse noise.")
    patch_scale_pixels: tuple[float, float] = Field(description="Smallest and largest scale of a patch.")
    covered_fraction: tuple[float, float] = Field(description="Smallest and largest share of the head in each set.")
    amplitude: tuple[float, float] = Field(description="Smallest and largest change, in slice values.")
    modulation_scale_pixels: tuple[float, float] = Field(description="Range of scales at which the amplitude varies.")
    modulation_sd: float = Field(description="Standard deviation of that variation, relative to the amplitude.")
    edge_sd_pixels: tuple[float, float] = Field(description="Smallest and largest blur of a patch's edge.")


def check_start(warm_start: str, steps: int) -> None:
    """Raise a ValueError if a stage would ship random weights."""
    if not warm_start and not steps:
        raise ValueError("the network would keep its random weights. Set steps, or the version in warm_start")


class VqvaeConfig(FrozenModel):
    """Architecture and training of the VQ-VAE."""

    warm_start: str = Field(
        description="Version of this bundle whose VQ-VAE the training starts from, or NAME-VERSION of another bundle. "
        "Empty: random weights."
    )
    channels: tuple[int, ...] = Field(description="Channels of each level. Each level halves rows and columns.")
    residual_layers: int = Field(description="Residual layers of each level.")
    embedding_dim: int = Field(description="Channels C of a latent.")
    codes: int = Field(description="Size of the codebook.")
    codebook_decay: float = Field(description="Decay of the moving averages of the codebook at each step.")
    commitment_cost: float = Field(description="Weight of the commitment term in the loss.")
    dead_code_fraction: float = Field(description="A code used less than this share of the mean use is restarted.")
    dead_code_interval: int = Field(description="Steps between two restarts of dead codes.")
    batch: int = Field(description="Slices per step.")
    steps: int = Field(description="Training steps. 0 takes the networks of `warm_start` unchanged.")
    learning_rate: float = Field(description="Learning rate of AdamW at the start. It falls as a cosine.")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        check_start(self.warm_start, self.steps)
        return self


class PixelLatentsConfig(FrozenModel):
    """Pixels in place of a VQ-VAE: each block of fold x fold pixels is one latent. Nothing is trained or lost."""

    fold: int = Field(ge=1, description="Rows and columns of pixels in one latent.")


class DenoiserConfig(FrozenModel):
    """Architecture and training of the denoising network."""

    warm_start: str = Field(
        description="Version of this bundle whose denoiser the training starts from, or NAME-VERSION of another "
        "bundle, whose layers of another shape are not used. Empty: random weights."
    )
    channels: tuple[int, ...] = Field(description="Channels of each level of the U-Net.")
    residual_blocks: int = Field(description="Residual blocks of each level.")
    attention_levels: tuple[bool, ...] = Field(description="Whether each level has self-attention.")
    head_channels: int = Field(description="Channels of one attention head.")
    batch: int = Field(description="Slices per step.")
    steps: int = Field(description="Training steps. 0 takes the network of `warm_start` unchanged.")
    learning_rate: float = Field(
        description="Largest learning rate of AdamW, after the warm-up. It then falls as a cosine."
    )
    warmup_steps: int = Field(description="Steps in which the learning rate rises from 0.")
    ema_decay: float = Field(description="Decay of the moving average of the weights at each step.")
    min_snr_gamma: float = Field(description="Limit of the signal-to-noise ratio in the loss weight (Min-SNR).")
    low_noise_below: int = Field(description="Time steps below this one are the noise levels of the KL map.")
    low_noise_probability: float = Field(description="Probability of drawing only from those time steps.")

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        check_start(self.warm_start, self.steps)
        return self


class ExportConfig(FrozenModel):
    """Options of the exported graphs."""

    int8: bool = Field(default=False, description="Also export a denoiser in int8 for CPUs (`training.quantise`).")


class DetectionConfig(FrozenModel):
    """Decisions of the detection method. Thresholds are calibrated from them on healthy scans."""

    method: str = Field(
        default=DEFAULT_METHOD, description="Name in `app.pipeline.methods.METHODS`. The manifest gets it."
    )
    kl_timesteps: tuple[int, ...] = Field(description="Noise levels t of the KL map.")
    kl_mean: Literal["arithmetic", "geometric"] = Field(description="Mean of the KL map over the noise levels.")
    kl_smoothing_mm: float = Field(description="Standard deviation of the Gaussian over the KL map. 0 for none.")
    kl_percentile: float = Field(description="Percentile of healthy foreground latents that gives the KL threshold.")
    empty_slice_fraction: float = Field(
        description="Share of healthy slices whose latent mask must be empty. 0 keeps components of every size."
    )
    grow: int = Field(description="Number of dilations of the latent mask, by one latent each.")
    reverse_timesteps: tuple[int, ...] = Field(description="Descending noise levels t of the partial reverse process.")
    views: tuple[View, ...] = Field(description="Views of test-time augmentation, the identity view first.")
    contrast_floor: float = Field(
        description="The residual is divided by this plus the local contrast, in slice values. 0 for no division."
    )
    weighted_by_intensity: bool = Field(
        default=False, description="Multiply the residual by the slice, for sequences with bright lesions."
    )
    erosion: int = Field(description="Pixels at the edge of the foreground that are not analysed.")
    median_pixels: int = Field(default=1, description="Side of the median filter over the anomaly map. 1 for none.")
    smoothing_mm: float = Field(description="Standard deviation of the Gaussian over the anomaly map. 0 for none.")
    false_positive_ml: float = Field(description="Median volume of findings allowed in healthy scans.")
    simulated_scanners: int = Field(
        default=0, description="Simulated scanners per healthy scan that the threshold of the anomaly map must suit."
    )
    simulated_false_positive_ml: float = Field(
        default=0.0, description="Median volume of findings allowed in healthy scans on simulated scanners."
    )
    extent_share: float = Field(description="A finding extends to voxels above this share of the threshold.")
    min_threshold: float = Field(description="Smallest allowed threshold of the anomaly map.")
    min_lesion_ml: float = Field(description="Volume of the smallest finding.")
    ood_timesteps: tuple[int, ...] = Field(
        description="Noise levels t at which the out-of-distribution check takes the median KL."
    )
    ood_simulated_scanners: int = Field(description="Simulated scanners per healthy scan in the calibration.")
    ood_refused_share: float = Field(description="Share of healthy scans that all scores together may refuse.")
    ood_max_outlier_fraction: float = Field(
        description="Share of foreground latents that may be outside the healthy range."
    )
    ood_checks_solidity: bool = Field(
        default=False, description="Refuse a foreground with deep gaps in its outline, such as the fingers of a hand."
    )
    ood_checks_white_matter: bool = Field(
        default=False, description="Refuse a scan whose white matter is not brighter than other tissue, as it is in T1."
    )
    ood_max_outlier_slice_fraction: float | None = Field(
        default=None, description="Share of slices whose score may be out of range. Null disables this check."
    )

    @model_validator(mode="after")
    def _check_simulated_scanners(self) -> Self:
        if bool(self.simulated_scanners) != bool(self.simulated_false_positive_ml):
            raise ValueError("set both simulated_scanners and simulated_false_positive_ml, or none of them")
        return self

    @field_validator("method")
    @classmethod
    def _check_method(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"no detection method has this name. Expected one of {', '.join(sorted(METHODS))}")
        return name


class EvaluationConfig(FrozenModel):
    """Parts of the evaluation on test subjects (`training.evaluate`)."""

    parts: tuple[EvaluationPart, ...] = Field(description="Parts to run. `healthy` and `lesions` are required.")
    scope: str = Field(
        default="", description="Scanners of the test scans, and what was known about these scans before. For the page."
    )


class BundleConfig(FrozenModel):
    """Texts of the manifest and the model card."""

    title: str = Field(description="Name of the model for users.")
    intended_use: str = Field(description="Intended use, in one or two sentences.")
    named_only: bool = Field(default=False, description="Early version: used only if the caller names it.")
    modality: Literal["MR", "CT"] = Field(description="DICOM modality of the scans. The selection of a model uses it.")
    sequence: str = Field(
        description="MR sequence, or body part for CT: T1, FLAIR, head. The selection of a model uses it."
    )
    data: str = Field(description="Name and origin of the training data.")
    licence: str = Field(description="Licence of the training data, as an SPDX identifier.")
    attribution: str = Field(description="Attribution that the licence requires.")
    non_commercial: bool = Field(default=False, description="The data allow neither published images nor services.")
    card: str = Field(description="Sections of the model card in Markdown. {m} is the manifest, {spacing} in mm.")


class Config(FrozenModel):
    """Whole configuration of one bundle."""

    name: str = Field(description="Name of the bundle and of the TOML file.")
    version: str = Field(description="Version of the bundle. Each release has a new one.")
    seed: int = Field(description="Seed of the training, of the calibration and of the keyed noise.")
    data: DataConfig = Field(description="Training data.")
    preprocessing: Preprocessing = Field(description="From a scan to slices. The manifest gets it.")
    schedule: NoiseSchedule = Field(description="Noise schedule. The manifest gets it.")
    augmentation: AugmentationConfig = Field(description="Augmentation of the slices for both networks.")
    coarse_noise: CoarseNoiseConfig = Field(description="Patches in the input of the denoiser.")
    vqvae: VqvaeConfig | None = Field(default=None, description="Encoder and decoder of the latents.")
    pixel_latents: PixelLatentsConfig | None = Field(default=None, description="Latents without a VQ-VAE.")
    denoiser: DenoiserConfig = Field(description="Denoising network.")
    export: ExportConfig = Field(description="Exported graphs.")
    detection: DetectionConfig = Field(description="Detection method and its calibration.")
    evaluation: EvaluationConfig = Field(description="Evaluation on test subjects.")
    bundle: BundleConfig = Field(description="Texts of the manifest and the model card.")

    @model_validator(mode="after")
    def _check_latents(self) -> Self:
        if (self.vqvae is None) == (self.pixel_latents is None):
            raise ValueError("give one of [vqvae] and [pixel_latents]")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a configuration. An unknown or a missing key raises pydantic's ValidationError."""
        return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))

    @property
    def training_preprocessing(self) -> Preprocessing:
        """Preprocessing of the training scans. It is that of serving, but 2-D images have no height to cut at."""
        head_box = self.preprocessing.head_box
        if self.data.image_archive is None or head_box is None:
            return self.preprocessing
        return self.preprocessing.model_copy(update={"head_box": head_box.model_copy(update={"reach_mm": None})})

    @property
    def downsampling(self) -> int:
        """Slice pixels along one side of a latent."""
        if self.pixel_latents is not None:
            return self.pixel_latents.fold
        return int(2 ** len(self.vqvae_settings.channels))

    @property
    def latent_channels(self) -> int:
        """Channels C of a latent."""
        return self.vqvae_settings.embedding_dim if self.pixel_latents is None else self.pixel_latents.fold**2

    @property
    def vqvae_settings(self) -> VqvaeConfig:
        """The VQ-VAE section of a configuration that has one."""
        assert self.vqvae is not None, "this configuration has pixels as latents"
        return self.vqvae

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one slice."""
        rows, columns = self.preprocessing.shape
        return self.latent_channels, rows // self.downsampling, columns // self.downsampling

    @property
    def sha256(self) -> str:
        """SHA-256 of all values. The default method is left out, so that earlier configurations keep their hash."""
        exclude = {"detection": {"method"}} if self.detection.method == DEFAULT_METHOD else None
        return hashlib.sha256(self.model_dump_json(exclude=exclude).encode()).hexdigest()

    @property
    def run_folder(self) -> Path:
        """Folder of checkpoints, cached slices and training curves. Git ignores it."""
        return ROOT / "runs" / f"{self.name}-{self.version}"

    @property
    def bundle_folder(self) -> Path:
        """Folder of the finished bundle."""
        return ROOT / "models" / f"{self.name}-{self.version}"


def parse_config(description: str | None) -> Config:
    """Read the configuration named by the only command-line argument of a training stage."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="configuration, e.g. training/configs/t1.toml")
    return Config.load(parser.parse_args().config)
