"""Scans of other kinds than the training data, which a bundle must refuse."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from app.volume import FloatArray, Volume
from training.config import Config, data_root
from training.data import load_volume
from training.image_archive import SUBJECT_FILES, UInt8Array, read_jpegs, stack_affine, to_model_units

# Field of view of images without a pixel size: that of a head, because a wrong size by itself must not cause a refusal.
FIELD_OF_VIEW_MM = 200.0
PER_CLASS = 40
OTHER_CLASSES = "mednist_ood_5x400"
LGG_SLICES = 40


class ExternalScan(NamedTuple):
    """Scan from outside the training data, with its kind and its name."""

    kind: str
    name: str
    volume: Volume


def single_slice(pixels: FloatArray) -> Volume:
    """Return an image (rows, columns) as a volume of one axial slice: rows run to posterior, columns to the left."""
    spacing = FIELD_OF_VIEW_MM / max(pixels.shape)
    return Volume(pixels.T[:, :, None], np.diag([-spacing, -spacing, spacing, 1.0]))


def read_mednist_classes(archive: str) -> dict[str, dict[str, UInt8Array]]:
    """Read the images (64, 64) of a MedNIST archive by class, sorted, and by name in the archive's order."""
    found: dict[str, dict[str, UInt8Array]] = {}
    for name, grey in read_jpegs(data_root() / "mednist" / f"{archive}.tar.xz").items():
        found.setdefault(name.split("/")[0], {})[name] = grey
    return dict(sorted(found.items()))


def mednist_slices() -> Iterator[ExternalScan]:
    """Yield single images of MedNIST's head CT and of five other classes, in grey values."""
    for archive in ("mednist_headct_9000", OTHER_CLASSES):
        for label, images in read_mednist_classes(archive).items():
            for name in list(images)[:: max(1, len(images) // PER_CLASS)][:PER_CLASS]:
                pixels = images[name].astype(np.float32)
                if pixels.min() < pixels.max():
                    yield ExternalScan(f"MedNIST {label}, slice", name, single_slice(pixels))


def mednist_stacks(config: Config) -> Iterator[ExternalScan]:
    """Yield the five other classes in stacks like those of the model's own images, in the model's units."""
    for label, images in read_mednist_classes(OTHER_CLASSES).items():
        names = list(images)
        for first in range(0, len(names), SUBJECT_FILES):
            stack = np.stack([images[name] for name in names[first : first + SUBJECT_FILES]])
            volume = Volume(to_model_units(stack, config).transpose(2, 1, 0), stack_affine(config))
            yield ExternalScan(label, f"{label} {first}", volume)


def lgg_slices() -> Iterator[ExternalScan]:
    """Yield single FLAIR slices with skull."""
    with np.load(data_root() / "lgg_flair" / "lgg_flair_192_u8.npz") as data:
        images = data["images"]
        for i in np.linspace(0, len(images) - 1, LGG_SLICES).astype(int):
            yield ExternalScan("TCGA-LGG FLAIR with skull, slice", str(i), single_slice(images[i].astype(np.float32)))


def other_volumes() -> Iterator[ExternalScan]:
    """Yield whole scans of other sequences and preparations."""
    root = data_root()
    for path in sorted((root / "brats2013").glob("*_flair_u8.nii.gz")):
        yield ExternalScan("BRATS FLAIR, skull-stripped", path.name, load_volume(path))
    for path in sorted((root / "ms_open_ms_data").glob("*FLAIR_mni_brain*.nii.gz")):
        yield ExternalScan("MS FLAIR, skull-stripped", path.name, load_volume(path))
    for name, kind in (
        ("clinical_scct_ct_template", "CT template"),
        ("clinical_scct_stripped", "CT template, skull-stripped"),
        ("clinical_stroke_T2", "T2"),
        ("M2208_T2w", "T2"),
        ("clinical_gg_flair_template", "FLAIR template"),
    ):
        yield ExternalScan(kind, name, load_volume(root / "nifti_misc" / f"{name}.nii.gz"))


def foreign_scans(config: Config) -> Iterator[ExternalScan]:
    """Yield every scan outside the training distribution, whole volumes first.

    For a model of MedNIST, its other classes also come in stacks with the field of view of a head.
    """
    yield from other_volumes()
    yield from lgg_slices()
    yield from mednist_slices()
    if config.data.image_archive is not None and config.data.image_archive.kind == "mednist":
        for label, name, volume in mednist_stacks(config):
            scale = FIELD_OF_VIEW_MM / np.array(volume.shape[:2]) / volume.spacing[:2]
            kind = f"MedNIST {label}, stack of {SUBJECT_FILES}, as Hounsfield units"
            yield ExternalScan(kind, name, Volume(volume.array, volume.affine @ np.diag([*scale, 1, 1])))
