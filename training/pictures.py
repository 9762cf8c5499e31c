"""Archives of 2D pictures as scans: the pictures of one subject, stacked, with a pixel size that is a guess.

Nothing in a picture says how large its pixels are: `Preparation.fit` makes that of no consequence in
the planes. What is not healthy is left out by the list beside the split.
"""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from app.volume import Affine, BoolArray, Volume
from training.config import Config, PicturesConfig, data_root
from training.exclusions import excluded_pictures

UInt8Array = npt.NDArray[np.uint8]
# MedNIST: files that are consecutive by name and count as one subject (`training.splits`).
BLOCK = 40
# A picture with less than this share of its pixels above the middle of what the window shows is as good as empty.
EMPTY_SHARE = 0.02
# LGG: a slice this near to one with a tumour shows its edge, or what was not outlined.
CLEAR_OF_TUMOUR = 2


@dataclass(frozen=True, eq=False)
class Pictures:
    """All pictures of an archive.

    Attributes
    ----------
    names : tuple of str
        Of each picture, unique.
    subjects : tuple of str
        Whose it is.
    grey : (N, H, W) ndarray of uint8
    healthy : (N,) ndarray of bool
        Shows nothing that is known to be ill.
    """

    names: tuple[str, ...]
    subjects: tuple[str, ...]
    grey: UInt8Array
    healthy: BoolArray


@dataclass(frozen=True, eq=False)
class Stack:
    """The pictures of one subject as a scan, and which of its slices are healthy, inferior to superior."""

    volume: Volume
    healthy: BoolArray


def picture_subjects(pictures: Pictures) -> tuple[str, ...]:
    """Everyone in an archive, sorted."""
    return tuple(sorted(set(pictures.subjects)))


def load_stack(config: Config, subject: str) -> Stack:
    """The pictures of one subject, one above the other.

    Those of MedNIST come in no order, and none that is almost empty may cut the stack in two.
    """
    settings = config.data.pictures
    assert settings is not None, "volumes are read by training.data"
    pictures = open_pictures(config)
    of = [i for i, s in enumerate(pictures.subjects) if s == subject]
    if settings.kind == "mednist":
        middle = (settings.black + settings.white) / 2
        shown = (pictures.grey[of] > middle).mean(axis=(1, 2)) >= EMPTY_SHARE
        of = [i for i, enough in zip(of, shown, strict=True) if enough and pictures.healthy[i]]
    values = in_units(pictures.grey[of], config)
    return Stack(Volume(values.transpose(2, 1, 0), picture_affine(config)), pictures.healthy[of])


def in_units(grey: UInt8Array, config: Config) -> npt.NDArray[np.float32]:
    """Grey values as Hounsfield units, where the model has a window; else as they are."""
    settings, window = config.data.pictures, config.preprocessing.window
    assert settings is not None, "volumes have units"
    if window is None:
        return grey.astype(np.float32)
    share = (grey.astype(np.float32) - settings.black) / (settings.white - settings.black)
    return np.asarray(window[0] + share * (window[1] - window[0]), dtype=np.float32)


def picture_affine(config: Config) -> Affine:
    """Columns run to the left, rows to posterior, pictures upwards, one slice spacing apart."""
    settings = config.data.pictures
    assert settings is not None, "volumes have an affine"
    return np.diag([-settings.pixel_mm, -settings.pixel_mm, config.preprocessing.spacing_mm[0], 1.0])


def pictures_hash(config: Config, subjects: tuple[str, ...]) -> str:
    """SHA-256 over the archive, the subjects, and which of their pictures are healthy."""
    pictures = open_pictures(config)
    chosen = [
        (n, bool(h))
        for n, s, h in zip(pictures.names, pictures.subjects, pictures.healthy, strict=True)
        if s in subjects
    ]
    digest = hashlib.sha256(archive_path(config).read_bytes())
    digest.update(json.dumps([subjects, chosen]).encode())
    return digest.hexdigest()


def archive_path(config: Config) -> Path:
    """Where the pictures lie."""
    return data_root() / config.data.folder / config.data.pattern


def open_pictures(config: Config) -> Pictures:
    """Every picture of a configuration's archive; read once."""
    settings = config.data.pictures
    assert settings is not None, "volumes have no archive"
    return _read(archive_path(config), settings)


@cache
def _read(path: Path, settings: PicturesConfig) -> Pictures:
    excluded = excluded_pictures(settings.exclusions) if settings.exclusions else frozenset()
    return read_mednist(path, excluded) if settings.kind == "mednist" else read_lgg(path, excluded)


def read_mednist(path: Path, excluded: frozenset[str]) -> Pictures:
    """A tar of jpegs, named by number; `BLOCK` of them are a subject."""
    with tarfile.open(path) as archive:
        found = {}
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".jpeg") else None
            if file is not None:
                found[Path(member.name).name] = np.asarray(Image.open(io.BytesIO(file.read())).convert("L"))
    names = tuple(sorted(found))
    subjects = tuple(block_name(int(name.split(".")[0])) for name in names)
    healthy = np.array([name not in excluded for name in names])
    return Pictures(names, subjects, np.stack([found[name] for name in names]), healthy)


def block_name(number: int) -> str:
    """The block that a file of MedNIST lies in, by its first and last number."""
    first = number // BLOCK * BLOCK
    return f"{first:06d}-{first + BLOCK - 1:06d}"


def read_lgg(path: Path, excluded: frozenset[str]) -> Pictures:
    """An npz of slices with the patient, the slice's number, and the size of the outlined tumour."""
    with np.load(path, allow_pickle=False) as data:
        patients, numbers, tumour = data["patient"], data["slice_no"], data["tumour_px_256"]
        order = np.lexsort((numbers, patients))
        patients, numbers, tumour, grey = patients[order], numbers[order], tumour[order], data["images"][order]
    names = tuple(f"{p}_{n:02d}" for p, n in zip(patients, numbers, strict=True))
    healthy = np.array([_clear(p, n, patients, numbers, tumour) for p, n in zip(patients, numbers, strict=True)])
    healthy &= np.array([name not in excluded for name in names])
    return Pictures(names, tuple(str(p) for p in patients), grey, healthy)


def _clear(
    patient: str,
    number: int,
    patients: npt.NDArray[np.str_],
    numbers: npt.NDArray[np.int16],
    tumour: npt.NDArray[np.int32],
) -> bool:
    """No tumour in the slice or beside it."""
    near = (patients == patient) & (np.abs(numbers.astype(int) - int(number)) < CLEAR_OF_TUMOUR)
    return not bool(tumour[near].any())
