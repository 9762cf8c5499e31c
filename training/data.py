"""Splits, healthy scans and cached slices. Slices are made by the preprocessing of the service."""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from app.manifest import FrozenModel, Preprocessing
from app.pipeline.preprocess import Slices, analysed_slices, foreground_cm2, to_slices
from app.volume import BoolArray, Volume
from training.config import NON_PIXEL_FIELDS, SPLITS_FOLDER, AdditionalDataConfig, Config, DataConfig, data_root
from training.image_archive import archive_hash, load_stack

UInt16Array = npt.NDArray[np.uint16]
UINT16_MAX = 65535


class Split(FrozenModel):
    """Frozen split by subject, and the patients whose lesions are used as shapes.

    training/splits/README.md describes how each split was drawn.
    """

    source: str
    seed: int
    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    shapes_validation: tuple[str, ...]
    shapes_test: tuple[str, ...]
    shapes_test_small: tuple[str, ...]


def load_split(name: str) -> Split:
    """Read a split and check that no subject and no lesion shape is in two parts."""
    split = Split.model_validate_json((SPLITS_FOLDER / name).read_text(encoding="utf-8"))
    subjects = split.train + split.validation + split.test
    assert len(set(subjects)) == len(subjects), "a subject is in two parts of the split"
    shapes = split.shapes_validation + split.shapes_test + split.shapes_test_small
    assert len(set(shapes)) == len(shapes), "a lesion shape is in two parts of the split"
    return split


def unpack_archive(archive: Path, folder: Path) -> None:
    """Unpack a tar archive of the project's data into a folder.

    Members that would leave the folder are rejected by Python 3.11.4 and later.
    """
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder)  # noqa: S202  # the project's own data


def subject_path(config: Config, subject: str) -> Path:
    """Return the path of a subject's scan: in the folder of its data set, or in `volumes/` below it.

    Raises
    ------
    FileNotFoundError
        No data set of the configuration has the subject.
    """
    sources: tuple[DataConfig | AdditionalDataConfig, ...] = (config.data, *config.data.additional)
    for source in sources:
        folder, name = data_root() / source.folder, source.pattern.format(subject=subject)
        for path in (folder / "volumes" / name, folder / name):
            if path.exists():
                return path
    raise FileNotFoundError(f"no data set of {config.name} has the subject {subject}")


def _mask_path(config: Config, subject: str) -> Path | None:
    """Return the path of a subject's brain mask; None if its scan is skull-stripped."""
    paths = (data_root() / s.folder / s.mask_pattern.format(subject=subject) for s in config.data.additional)
    return next((path for path in paths if path.is_file()), None)


def load_volume(path: Path) -> Volume:
    """Read a NIfTI file of the project's data, without the service's checks of hostile files."""
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return Volume(np.asarray(image.dataobj, dtype=np.float32), np.asarray(image.affine))


@dataclass(frozen=True, eq=False)
class HealthyScan:
    """Scan of one subject, with its healthy slices.

    Attributes
    ----------
    volume : Volume
    healthy : (Z,) ndarray of bool or None
        Healthy images of a stack, inferior to superior. None if the whole scan is healthy.
    """

    volume: Volume
    healthy: BoolArray | None = None

    def usable_slices(self, slices: Slices, preprocessing: Preprocessing) -> npt.NDArray[np.int64]:
        """Return the indices (M,) of the healthy slices with enough foreground."""
        if self.healthy is None:
            return analysed_slices(slices, preprocessing)
        enough = foreground_cm2(slices, preprocessing) >= preprocessing.min_foreground_cm2
        return np.flatnonzero(enough & self.healthy_slices(slices))

    def healthy_slices(self, slices: Slices) -> BoolArray:
        """Return which slices (N,) show no known disease."""
        if self.healthy is None:
            return np.ones(len(slices.x), dtype=np.bool_)
        # The grid of slices may start above the lowest image and end below the highest one.
        heights = slices.grid.affine[2, 0] * np.arange(len(slices.x)) + slices.grid.affine[2, 3]
        images = np.rint((heights - self.volume.affine[2, 3]) / self.volume.affine[2, 2]).astype(np.int64)
        found: BoolArray = self.healthy[images]
        return found


def load_scan(config: Config, subject: str) -> HealthyScan:
    """Load the scan of a subject, or the stack of its images."""
    if config.data.image_archive is None:
        volume, mask = load_volume(subject_path(config, subject)), _mask_path(config, subject)
        if mask is not None:
            brain = np.where(load_volume(mask).array > 0, volume.array, np.float32(0))
            volume = Volume(brain, volume.affine)
        return HealthyScan(volume)
    stack = load_stack(config, subject)
    return HealthyScan(stack.volume, stack.healthy)


def data_hash(config: Config, subjects: tuple[str, ...]) -> str:
    """Return the SHA-256 of the names and bytes of the subjects' scans."""
    if config.data.image_archive is not None:
        return archive_hash(config, subjects)
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(subject.encode())
        digest.update(hashlib.sha256(subject_path(config, subject).read_bytes()).digest())
    return digest.hexdigest()


def tilt(volume: Volume, config: Config, rng: np.random.Generator) -> Volume:
    """Return the volume with a random tilt and scale in its affine. The array is shared."""
    transform = np.eye(4)
    pitch = config.data.pitch_sd_degrees
    tilt_sd = config.data.tilt_sd_degrees
    angles = rng.normal(0, [tilt_sd if pitch is None else pitch, tilt_sd, tilt_sd])
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    transform[:3, :3] = rotation * np.exp(rng.normal(0, config.data.scale_sd))
    return Volume(volume.array, transform @ volume.affine)


def copy_scan(volume: Volume, config: Config, rng: np.random.Generator) -> Volume:
    """Return a copy of a training scan with a random tilt and scale, and perhaps thicker slices."""
    tilted = tilt(volume, config, rng)
    return thicken_slices(tilted, config, rng) if config.data.max_slice_mm else tilted


def thicken_slices(volume: Volume, config: Config, rng: np.random.Generator) -> Volume:
    """Return half of the volumes with thicker slices along a random axis, as a scan with thick slices shows them.

    Parameters
    ----------
    volume : Volume
        Skull-stripped brain. The background is 0.
    config : Config
    rng : Generator

    Returns
    -------
    Volume
        Each new slice is the mean over the brain in two or more old slices, and 0 where most of them are background.
    """
    axis, is_thick = rng.integers(3), rng.random() < 0.5
    largest = int(config.data.max_slice_mm / volume.spacing[axis])
    if not is_thick or largest < 2:
        return volume
    count = rng.integers(2, largest, endpoint=True)
    array = np.moveaxis(volume.array, axis, 0)
    blocks = array[: len(array) // count * count].reshape(-1, count, *array.shape[1:])
    inside = (blocks > 0).sum(axis=1)
    mean = blocks.sum(axis=1) / np.maximum(inside, 1) * (2 * inside >= count)
    step = np.eye(4)
    step[axis, axis], step[axis, 3] = count, (count - 1) / 2
    return Volume(np.moveaxis(mean, 0, axis).astype(np.float32), volume.affine @ step)


def cached_slices(config: Config, part: str) -> UInt16Array:
    """Return the usable slices of one part of the split, made once and then read from the run folder.

    Training scans are followed by their tilted copies.

    Returns
    -------
    (N, H, W) ndarray of uint16
        0 to 65535 for slice values 0 to 1.
    """
    split = load_split(config.data.splits)
    subjects: tuple[str, ...] = getattr(split, part)
    copies = config.data.tilted_copies if part == "train" else 0
    preprocessing = config.preprocessing.model_dump(exclude=NON_PIXEL_FIELDS, exclude_none=True)
    key = json.dumps(
        [preprocessing, config.data.model_dump(exclude_none=True), config.seed, data_hash(config, subjects), copies]
    )
    path = config.run_folder / "cache" / f"{part}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = []
        for i, subject in enumerate(tqdm(subjects, desc=f"preprocess {part}", unit="scan")):
            scan = load_scan(config, subject)
            rng = np.random.default_rng([config.seed, i])
            for volume in [scan.volume, *(copy_scan(scan.volume, config, rng) for _ in range(copies))]:
                slices = to_slices(volume, config.training_preprocessing)
                usable = scan.usable_slices(slices, config.training_preprocessing)
                parts.append(np.round(slices.x[usable, 0] * UINT16_MAX).astype(np.uint16))
        np.save(path, np.concatenate(parts))
    stack: UInt16Array = np.load(path, mmap_mode="r")
    return stack


@dataclass(frozen=True, eq=False)
class HealthySlices:
    """Healthy slices for training and validation.

    Attributes
    ----------
    train, validation : (N, H, W) ndarray of uint16
        0 to 65535 for slice values 0 to 1.
    data : str
        SHA-256 of the training scans.
    """

    train: UInt16Array
    validation: UInt16Array
    data: str

    @classmethod
    def of(cls, config: Config) -> "HealthySlices":
        """Load the slices of a configuration from the cache, or make them from the scans."""
        data = data_hash(config, load_split(config.data.splits).train)
        return cls(cached_slices(config, "train"), cached_slices(config, "validation"), data)
