"""Scans from elsewhere: heads of the bundle's own sequence, and what it must refuse, other sequences and body parts."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from app.ingest.reader import read_scan
from app.volume import FloatArray, Volume
from training.archives import unpack
from training.config import Config, data_root
from training.data import load_volume
from training.pictures import BLOCK, UInt8Array, in_units, picture_affine

# Pictures without a pixel spacing get a head's: this field of view, the kindest assumption.
FIELD_OF_VIEW_MM = 200.0
PER_CLASS = 40
OTHER_CLASSES = "mednist_ood_5x400"
LGG_SLICES = 40


class Foreign(NamedTuple):
    """One scan that is not of the model's kind, and what it is."""

    kind: str
    name: str
    volume: Volume


def picture(pixels: FloatArray) -> Volume:
    """A single slice, (rows, columns) as seen: anterior above, the patient's right on the left."""
    spacing = FIELD_OF_VIEW_MM / max(pixels.shape)
    affine = np.diag([-spacing, -spacing, spacing, 1.0])  # columns run to the left, rows to the back
    return Volume(pixels.T[:, :, None], affine)


def mednist(archive: str) -> dict[str, dict[str, UInt8Array]]:
    """Pictures (64, 64) of an archive of MedNIST by class, in order, and by name, as they lie in it."""
    found: dict[str, dict[str, UInt8Array]] = {}
    with tarfile.open(data_root() / "mednist" / f"{archive}.tar.xz") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".jpeg") else None
            if file is not None:
                pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("L"))
                found.setdefault(member.name.split("/")[0], {})[member.name] = pixels
    return dict(sorted(found.items()))


def mednist_pictures() -> Iterator[Foreign]:
    """Single pictures of HeadCT, the data of another bundle, and of five foreign classes, in grey values."""
    for archive in ("mednist_headct_9000", OTHER_CLASSES):
        for label, pictures in mednist(archive).items():
            for name in list(pictures)[:: max(1, len(pictures) // PER_CLASS)][:PER_CLASS]:
                pixels = pictures[name].astype(np.float32)
                if pixels.min() < pixels.max():
                    yield Foreign(f"MedNIST {label}, slice", name, picture(pixels))


def mednist_stacks(config: Config) -> Iterator[Foreign]:
    """The five foreign classes in stacks like a subject of the model's own pictures, in the model's units."""
    for label, pictures in mednist(OTHER_CLASSES).items():
        names = list(pictures)
        for first in range(0, len(names), BLOCK):
            stack = np.stack([pictures[name] for name in names[first : first + BLOCK]])
            volume = Volume(in_units(stack, config).transpose(2, 1, 0), picture_affine(config))
            yield Foreign(label, f"{label} {first}", volume)


def lgg() -> Iterator[Foreign]:
    """FLAIR slices with skull, the data of another bundle."""
    with np.load(data_root() / "lgg_flair" / "lgg_flair_192_u8.npz") as data:
        images = data["images"]
        for i in np.linspace(0, len(images) - 1, LGG_SLICES).astype(int):
            yield Foreign("TCGA-LGG FLAIR with skull, slice", str(i), picture(images[i].astype(np.float32)))


def heads() -> Iterator[Foreign]:
    """T1 with skull, of other scanners: 20 healthy volunteers of IXI, a template, and two DICOM series."""
    root = data_root()
    for path in sorted((root / "ixi_2mm" / "t1").glob("*.nii.gz")):
        yield Foreign("IXI", path.name[:6], load_volume(path))
    yield Foreign("template", "MNI152", load_volume(root / "nifti_misc" / "MNI152_T1_2mm.nii.gz"))
    for kind, name in (("UIH", "uih_umr770_t1_sag_32of160"), ("studyforrest", "studyforrest_t1_defaced_96of384")):
        with TemporaryDirectory() as folder:
            unpack(root / "dicom" / f"{name}.tar.xz", Path(folder))
            yield Foreign(kind, name, read_scan(Path(folder), scratch=Path(folder)).volume)


def volumes() -> Iterator[Foreign]:
    """Whole scans of other sequences and preparations."""
    root = data_root()
    for path in sorted((root / "brats2013").glob("*_flair_u8.nii.gz")):
        yield Foreign("BRATS FLAIR, skull-stripped", path.name, load_volume(path))
    for path in sorted((root / "ms_open_ms_data").glob("*FLAIR_mni_brain*.nii.gz")):
        yield Foreign("MS FLAIR, skull-stripped", path.name, load_volume(path))
    for name, kind in (
        ("clinical_scct_ct_template", "CT template"),
        ("clinical_scct_stripped", "CT template, skull-stripped"),
        ("clinical_stroke_T2", "T2"),
        ("M2208_T2w", "T2"),
        ("clinical_gg_flair_template", "FLAIR template"),
    ):
        yield Foreign(kind, name, load_volume(root / "nifti_misc" / f"{name}.nii.gz"))


def all_foreign(config: Config) -> Iterator[Foreign]:
    """Every foreign scan, whole volumes first; for a model of MedNIST, its other classes in stacks as wide as heads."""
    yield from volumes()
    yield from lgg()
    yield from mednist_pictures()
    if config.data.pictures is not None and config.data.pictures.kind == "mednist":
        for kind, name, volume in mednist_stacks(config):
            narrow = volume.affine @ np.diag(
                [*(FIELD_OF_VIEW_MM / np.array(volume.shape[:2]) / volume.spacing[:2]), 1, 1]
            )
            told = f"MedNIST {kind}, stack of {BLOCK}, as Hounsfield units"
            yield Foreign(told, name, Volume(volume.array, narrow))
