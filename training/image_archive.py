"""Archives of 2-D images (MedNIST head CT, TCGA-LGG FLAIR, head CT of ct-ich), read as stacks of slices.

The images have no pixel size. The head box of the preprocessing makes an assumed size harmless within the plane
(decision 15). Images that are not healthy are listed in a CSV file in the folder of the split.
"""

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from app.pipeline.preprocess import AIR_HU
from app.volume import Affine, BoolArray, FloatArray, Volume
from training.config import SPLITS_FOLDER, Config, ImageArchiveConfig, data_root

UInt8Array = npt.NDArray[np.uint8]
# MedNIST does not mark patients: so many consecutive files count as one subject.
SUBJECT_FILES = 40
# An image with a smaller share of pixels above the middle of the window counts as empty.
EMPTY_SHARE = 0.02
# Hounsfield units of compact bone.
BONE_HU = 1000.0
# Every so many pixels of an image are enough to compare it with its neighbour.
COARSE = 4
# In ct-ich, slices closer than this to a slice with haemorrhage may show a part of it.
HAEMORRHAGE_DISTANCE = 2
# In TCGA-LGG, slices closer than this to a slice with a tumour may show its edge or tumour that was not outlined.
TUMOUR_DISTANCE = 2


@dataclass(frozen=True, eq=False)
class ImageArchive:
    """All images of an archive.

    Attributes
    ----------
    names : tuple of str
        Unique name of each image.
    subjects : tuple of str
        Subject of each image.
    grey : (N, H, W) ndarray of uint8
    healthy : (N,) ndarray of bool
        False for an image with known disease.
    series_slices : dict of str to int
        Number of slices of the whole series of each subject, with those that the archive does not contain. Empty if the
        archive does not state it.
    """

    names: tuple[str, ...]
    subjects: tuple[str, ...]
    grey: UInt8Array
    healthy: BoolArray
    series_slices: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageStack:
    """Images of one subject as a volume, and which of its slices are healthy, inferior to superior."""

    volume: Volume
    healthy: BoolArray


@dataclass(frozen=True, eq=False)
class TumourScan:
    """Images of one patient with the outlined tumour.

    Attributes
    ----------
    subject : str
    volume : Volume
        (X, Y, Z), inferior to superior. The pixel size is assumed, and the slice spacing is assumed or estimated.
    truth : (X, Y, Z) ndarray of bool
        Outlined tumour on the grid of the volume.
    healthy : (Z,) ndarray of bool
        Slices without a tumour in them or in a neighbouring slice.
    """

    subject: str
    volume: Volume
    truth: BoolArray
    healthy: BoolArray


def archive_settings(config: Config) -> ImageArchiveConfig:
    """Return the image-archive section of a configuration that has one."""
    assert config.data.image_archive is not None, "this configuration is trained on volumes"
    return config.data.image_archive


def archive_path(config: Config) -> Path:
    """Return the path of the archive."""
    return data_root() / config.data.folder / config.data.pattern


def open_archive(config: Config) -> ImageArchive:
    """Return all images of a configuration's archive. The file is read once."""
    return _read_archive(archive_path(config), archive_settings(config))


@cache
def _read_archive(path: Path, settings: ImageArchiveConfig) -> ImageArchive:
    excluded = read_exclusions(settings.exclusions) if settings.exclusions else frozenset()
    return {"mednist": read_mednist, "lgg": read_lgg, "ct_ich": read_ct_ich}[settings.kind](path, excluded)


def read_exclusions(name: str) -> frozenset[str]:
    """Read the names of excluded images from a CSV file (`name,reason`) in training/splits."""
    with (SPLITS_FOLDER / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names), "an image is excluded twice"
    assert all(row["reason"] for row in rows), "an exclusion has no reason"
    return frozenset(names)


def load_stack(config: Config, subject: str) -> ImageStack:
    """Stack the images of one subject.

    MedNIST's images are in no anatomical order. Excluded and almost empty ones are left out, because the slices on both
    sides of a gap would be analysed as two heads.
    """
    settings, archive = archive_settings(config), open_archive(config)
    indices = [i for i, s in enumerate(archive.subjects) if s == subject]
    if settings.kind == "mednist":
        middle = (settings.window_low_grey + settings.window_high_grey) / 2
        shown = (archive.grey[indices] > middle).mean(axis=(1, 2)) >= EMPTY_SHARE
        indices = [i for i, enough in zip(indices, shown, strict=True) if enough and archive.healthy[i]]
    values = to_model_units(archive.grey[indices], config)
    return ImageStack(Volume(values.transpose(2, 1, 0), stack_affine(config)), archive.healthy[indices])


def stack_names(config: Config, subject: str) -> list[str]:
    """Return the names of all images of a subject, in the order of `load_stack` for archives with anatomical order."""
    archive = open_archive(config)
    return [name for name, s in zip(archive.names, archive.subjects, strict=True) if s == subject]


def to_model_units(grey: UInt8Array, config: Config) -> FloatArray:
    """Convert grey values to Hounsfield units if the model has a CT window, else to float32."""
    settings, window = archive_settings(config), config.preprocessing.window
    if window is None:
        return grey.astype(np.float32)
    low, high = settings.window_low_grey, settings.window_high_grey
    share = (grey.astype(np.float32) - low) / (high - low)
    units = np.asarray(window[0] + share * (window[1] - window[0]), dtype=np.float32)
    units[grey < settings.air_below_grey] = AIR_HU
    units[grey > settings.bone_above_grey] = BONE_HU
    return units


def slice_spacing(config: Config, subject: str) -> float:
    """Return the spacing in mm of the slices of a scan with an outlined tumour.

    Raises
    ------
    ValueError
        The series has more slices than the configuration has a spacing for.
    """
    by_number = archive_settings(config).series_spacing_mm
    if by_number is None:
        return config.preprocessing.spacing_mm[0]
    slices = open_archive(config).series_slices[subject]
    for largest, spacing in by_number:
        if slices <= largest:
            return spacing
    raise ValueError(f"series_spacing_mm has no spacing for {slices} slices of {subject}. Add one.")


def stack_affine(config: Config, slice_mm: float | None = None) -> Affine:
    """Return the affine of a stack: columns run to the left, rows to posterior, images to superior (RAS+ mm).

    Parameters
    ----------
    config : Config
    slice_mm : float, optional
        Spacing of the slices. By default that of the model.
    """
    pixel_mm = archive_settings(config).pixel_mm
    return np.diag([-pixel_mm, -pixel_mm, slice_mm or config.preprocessing.spacing_mm[0], 1.0])


def archive_hash(config: Config, subjects: tuple[str, ...]) -> str:
    """Return the SHA-256 of the archive, the subjects, and which of their images are healthy."""
    archive = open_archive(config)
    chosen = [
        (n, bool(h)) for n, s, h in zip(archive.names, archive.subjects, archive.healthy, strict=True) if s in subjects
    ]
    path = archive_path(config)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    digest.update(json.dumps([subjects, chosen]).encode())
    return digest.hexdigest()


def read_jpegs(path: Path) -> dict[str, UInt8Array]:
    """Read the JPEG files of a tar archive as grey values (H, W), by member name and in the archive's order."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".jpeg") else None
            if file is not None:
                found[member.name] = np.asarray(Image.open(io.BytesIO(file.read())).convert("L"))
    return found


def read_mednist(path: Path, excluded: frozenset[str]) -> ImageArchive:
    """Read a tar archive of JPEG files that are named by number; `SUBJECT_FILES` of them are one subject."""
    found = {Path(name).name: grey for name, grey in read_jpegs(path).items()}
    names = tuple(sorted(found))
    subjects = tuple(block_name(int(name.split(".")[0])) for name in names)
    healthy = np.array([name not in excluded for name in names])
    return ImageArchive(names, subjects, np.stack([found[name] for name in names]), healthy)


def block_name(number: int) -> str:
    """Return the subject of a MedNIST file: the first and the last file number of its block."""
    first = number // SUBJECT_FILES * SUBJECT_FILES
    return f"{first:06d}-{first + SUBJECT_FILES - 1:06d}"


def read_lgg(path: Path, excluded: frozenset[str]) -> ImageArchive:
    """Read an npz file of FLAIR slices with their patient, number, position and size of the outlined tumour.

    The position is (number - 0.5) / (number of slices of the series).
    """
    with np.load(path, allow_pickle=False) as data:
        patients, numbers, tumour = data["patient"], data["slice_no"], data["tumour_px_256"]
        order = np.lexsort((numbers, patients))
        patients, numbers, tumour, grey = patients[order], numbers[order], tumour[order], data["images"][order]
        in_series = np.rint((numbers - 0.5) / data["rel_pos"][order]).astype(int)
    names = tuple(f"{p}_{n:02d}" for p, n in zip(patients, numbers, strict=True))
    healthy = np.array([name not in excluded for name in names])
    for i, (patient, number) in enumerate(zip(patients, numbers, strict=True)):
        near = (patients == patient) & (np.abs(numbers.astype(int) - int(number)) < TUMOUR_DISTANCE)
        healthy[i] &= not tumour[near].any()
    series_slices = {str(patient): int(total) for patient, total in zip(patients, in_series, strict=True)}
    return ImageArchive(names, tuple(str(p) for p in patients), grey, healthy, series_slices)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read a tab-separated table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def read_ct_ich(path: Path, excluded: frozenset[str]) -> ImageArchive:
    """Read the slices of ct-ich (Hssayeni 2020), a folder of JPEG files beside `slices.tsv`.

    A slice is healthy if it is more than one slice away from every slice with haemorrhage and shows no fracture.
    """
    by_patient: dict[str, list[dict[str, str]]] = {}
    for row in read_table(path.with_name("slices.tsv")):
        by_patient.setdefault(f"{int(row['patient']):03d}", []).append(row)
    names: list[str] = []
    grey: list[UInt8Array] = []
    healthy: list[bool] = []
    for of_patient in by_patient.values():
        ordered = sorted(of_patient, key=lambda row: int(row["slice"]))
        images = np.stack([np.asarray(Image.open(path / row["file"]).convert("L")) for row in ordered])
        first = first_of_stack(images)
        order = [*range(first, len(ordered)), *range(first)]
        bleeds = np.array([ordered[i]["no_hemorrhage"] == "0" for i in order])
        near = ndimage.maximum_filter1d(bleeds.astype(np.uint8), 2 * HAEMORRHAGE_DISTANCE - 1, mode="constant") > 0
        for i, is_near in zip(order, near, strict=True):
            names.append(ordered[i]["file"])
            grey.append(images[i])
            fractured = ordered[i]["fracture_yes_no"] == "1"
            healthy.append(not is_near and not fractured and ordered[i]["file"] not in excluded)
    subjects = tuple(name.split("_")[0] for name in names)
    return ImageArchive(tuple(names), subjects, np.stack(grey), np.array(healthy))


def first_of_stack(images: UInt8Array) -> int:
    """Return the index of the lowest image of a stack (N, H, W) whose numbering may start in the middle.

    Some stacks of ct-ich begin in the brain, and their jaw follows the vertex. If the images form a ring, only one pair
    are not neighbours in the head: the vertex and the jaw. They differ most.
    """
    small = images[:, ::COARSE, ::COARSE].astype(np.float32)
    differences = np.abs(small - np.roll(small, 1, axis=0)).mean(axis=(1, 2))
    return int(differences.argmax())


def load_tumour_scan(config: Config, subject: str) -> TumourScan:
    """Load all images of one patient of a TCGA-LGG archive with the outlined tumour, at their slice spacing."""
    stack = load_stack(config, subject)
    volume = Volume(stack.volume.array, stack_affine(config, slice_spacing(config, subject)))
    truth = _read_outlines(archive_path(config))[subject].transpose(2, 1, 0)
    assert truth.shape == stack.volume.shape, "every image has one outline"
    return TumourScan(subject, volume, truth, stack.healthy)


def tumour_scans(config: Config, subjects: Sequence[str]) -> Iterator[TumourScan]:
    """Yield the scans of several patients."""
    return (load_tumour_scan(config, subject) for subject in subjects)


@cache
def _read_outlines(path: Path) -> dict[str, BoolArray]:
    """Read the outlines of each patient by slice number, (Z, H, W). The archive stores them as packed bits."""
    with np.load(path, allow_pickle=False) as data:
        patients, numbers, packed = data["patient"], data["slice_no"], data["masks"]
        height, width = data["images"].shape[1:]
    order = np.lexsort((numbers, patients))
    patients, packed = patients[order], packed[order]
    return {
        str(patient): np.unpackbits(packed[patients == patient], axis=1, count=height * width)
        .reshape(-1, height, width)
        .astype(np.bool_)
        for patient in np.unique(patients)
    }
