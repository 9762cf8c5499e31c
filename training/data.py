"""Slices for training, made by the service's own `prepare` and kept in a cache."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.transform import Rotation
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from app.manifest import Preprocessing
from app.pipeline.preprocess import Slices, analysed_slices, foreground_cm2, to_slices
from app.volume import BoolArray, Volume
from training.config import NOT_OF_THE_SLICES, AugmentationConfig, Config, data_root
from training.pictures import load_stack, pictures_hash
from training.scanner import another_scanner
from training.splits import load_split

UInt16Array = npt.NDArray[np.uint16]
UINT16_MAX = 65535


def subject_path(config: Config, subject: str) -> Path:
    """Where a subject's scan lies: in `volumes/`, or beside it for the two published as they are."""
    folder = data_root() / config.data.folder
    name = config.data.pattern.format(subject=subject)
    inner = folder / "volumes" / name
    return inner if inner.exists() else folder / name


def load_volume(path: Path) -> Volume:
    """Read a NIfTI file as the service does, without its checks of hostile files."""
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return Volume(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine))


@dataclass(frozen=True, eq=False)
class HealthyScan:
    """What is learnt from of one subject.

    Attributes
    ----------
    volume : Volume
    healthy : (N,) ndarray of bool, or None
        Of a stack of pictures, inferior to superior: which may be learnt from. None: a whole, healthy scan.
    """

    volume: Volume
    healthy: BoolArray | None = None

    def known(self, slices: Slices, preparation: Preprocessing) -> npt.NDArray[np.int64]:
        """Indices of the slices that are healthy and show enough, (K,)."""
        if self.healthy is None:
            return analysed_slices(slices, preparation)
        enough = foreground_cm2(slices, preparation) >= preparation.min_foreground_cm2
        return np.flatnonzero(enough & self.healthy_slices(slices))

    def healthy_slices(self, slices: Slices) -> BoolArray:
        """Which slices show nothing that is known to be ill, (N,)."""
        if self.healthy is None:
            return np.ones(len(slices.x), dtype=np.bool_)
        # Which picture a slice is; above and below the head there may be pictures without one.
        heights = slices.grid.affine[2, 0] * np.arange(len(slices.x)) + slices.grid.affine[2, 3]
        pictures = np.rint((heights - self.volume.affine[2, 3]) / self.volume.affine[2, 2]).astype(np.int64)
        found: BoolArray = self.healthy[pictures]
        return found


def load_scan(config: Config, subject: str) -> HealthyScan:
    """The scan of a subject, or its pictures as one."""
    if config.data.pictures is None:
        return HealthyScan(load_volume(subject_path(config, subject)))
    stack = load_stack(config, subject)
    return HealthyScan(stack.volume, stack.healthy)


def data_hash(config: Config, subjects: tuple[str, ...]) -> str:
    """SHA-256 over the names and bytes of the scans of some subjects."""
    if config.data.pictures is not None:
        return pictures_hash(config, subjects)
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(subject.encode())
        digest.update(hashlib.sha256(subject_path(config, subject).read_bytes()).digest())
    return digest.hexdigest()


def tilted(volume: Volume, config: Config, rng: np.random.Generator) -> Volume:
    """The same head held a little differently, and a little larger or smaller: only its affine changes."""
    turn = np.eye(4)
    rotation = Rotation.from_euler("xyz", rng.normal(0, config.data.tilt_degrees, 3), degrees=True).as_matrix()
    turn[:3, :3] = rotation * np.exp(rng.normal(0, config.data.scale_sd))
    return Volume(volume.array, turn @ volume.affine)


def cached_slices(config: Config, part: str) -> UInt16Array:
    """The analysed slices of one part of the split, (N, H, W), 0..65535 for 0..1.

    Training scans come with `copies` tilted copies. The cache is keyed by all that decides it.
    """
    split = load_split(config.data.splits)
    subjects: tuple[str, ...] = getattr(split, part)
    copies = config.data.copies if part == "train" else 0
    preparation = config.preprocessing.model_dump(exclude=NOT_OF_THE_SLICES, exclude_none=True)
    key = json.dumps(
        [preparation, config.data.model_dump(exclude_none=True), config.seed, data_hash(config, subjects), copies]
    )
    path = config.run_folder / "cache" / f"{part}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for i, subject in enumerate(tqdm(subjects, desc=f"prepare {part}", unit="scan")):
            scan = load_scan(config, subject)
            rng = np.random.default_rng([config.seed, i])
            for view in [scan.volume, *(tilted(scan.volume, config, rng) for _ in range(copies))]:
                slices = to_slices(view, config.training_preparation)
                keep = scan.known(slices, config.training_preparation)
                parts.append(np.round(slices.x[keep, 0] * UINT16_MAX).astype(np.uint16))
        np.save(path, np.concatenate(parts))
    stack: UInt16Array = np.load(path, mmap_mode="r")
    return stack


@dataclass(frozen=True, eq=False)
class HealthySlices:
    """The healthy slices that a bundle learns from, and those that it is watched on.

    Attributes
    ----------
    train, validation : (N, H, W) ndarray
        0..65535 for 0..1.
    data : str
        Hash of the training scans.
    """

    train: UInt16Array
    validation: UInt16Array
    data: str

    @classmethod
    def of(cls, config: Config) -> "HealthySlices":
        """From the scans, or the cache of their slices."""
        data = data_hash(config, load_split(config.data.splits).train)
        return cls(cached_slices(config, "train"), cached_slices(config, "validation"), data)


@dataclass(frozen=True)
class Batches(Dataset[torch.Tensor]):
    """Batches of slices, the same for the same seed and step however often a run was stopped."""

    stack: UInt16Array
    size: int
    seed: int
    augmentation: AugmentationConfig | None

    def __getitem__(self, step: int) -> torch.Tensor:
        """Batch of one step, (B, 1, H, W) in [0, 1]."""
        rng = np.random.default_rng([self.seed, step])
        # Epoch by epoch without replacement: the order is a permutation keyed by the epoch.
        first = step * self.size
        epoch, start = divmod(first, len(self.stack) - len(self.stack) % self.size)
        order = np.random.default_rng([self.seed, 1_000_003, epoch]).permutation(len(self.stack))
        chosen = np.sort(order[start : start + self.size])
        x = torch.from_numpy(self.stack[chosen].astype(np.float32) / UINT16_MAX)[:, None]
        return augment(x, self.augmentation, rng) if self.augmentation else x


def augment(x: torch.Tensor, config: AugmentationConfig, rng: np.random.Generator) -> torch.Tensor:
    """Mirror, small affine, gain and gamma, another scanner: healthy stays healthy.

    Parameters
    ----------
    x : (B, 1, H, W) tensor in [0, 1]
    """
    n, _, height, width = x.shape
    angle = np.deg2rad(rng.uniform(-1, 1, n) * config.rotate_degrees)
    scale = 1 + rng.uniform(-1, 1, n) * config.scale
    mirror = rng.choice([-1.0, 1.0], n)
    aspect = height / width
    theta = np.zeros((n, 2, 3))
    theta[:, 0, 0] = np.cos(angle) * scale * mirror
    theta[:, 0, 1] = -np.sin(angle) * scale * aspect
    theta[:, 1, 0] = np.sin(angle) * scale * mirror / aspect
    theta[:, 1, 1] = np.cos(angle) * scale
    theta[:, :, 2] = rng.uniform(-1, 1, (n, 2)) * config.shift_pixels * 2 / [width, height]
    grid = F.affine_grid(torch.from_numpy(theta).float(), [n, 1, height, width], align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", align_corners=False)
    gain = torch.from_numpy(1 + rng.uniform(-1, 1, (n, 1, 1, 1)) * config.gain).float()
    gamma = torch.from_numpy(np.exp(rng.uniform(-1, 1, (n, 1, 1, 1)) * config.gamma)).float()
    seen = (moved.clamp(0, 1) ** gamma * gain).clamp(0, 1).numpy()
    for i in np.flatnonzero(rng.random(n) < config.scanner.share):
        seen[i] = another_scanner(seen[i], config.scanner, rng)
    return torch.from_numpy(seen)
