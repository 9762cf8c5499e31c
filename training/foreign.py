"""Scans that a bundle must refuse: other sequences, body parts; and heads of its own sequence, from elsewhere."""

import io
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from app.volume import FloatArray, Volume
from training.config import data_root
from training.data import load_volume

# Pictures without a pixel spacing get a head's: this field of view, the kindest assumption.
FIELD_OF_VIEW_MM = 200.0
PER_CLASS = 40
LGG_SLICES = 40
IXI_SCANS = 20


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


def mednist() -> Iterator[Foreign]:
    """HeadCT, the data of another bundle, and five foreign classes."""
    for archive in ("mednist_headct_9000", "mednist_ood_5x400"):
        with tarfile.open(data_root() / "mednist" / f"{archive}.tar.xz") as tar:
            members = [m for m in tar if m.isfile() and m.name.endswith(".jpeg")]
            classes = sorted({m.name.split("/")[0] for m in members})
            for label in classes:
                mine = [m for m in members if m.name.startswith(label)]
                for member in mine[:: max(1, len(mine) // PER_CLASS)][:PER_CLASS]:
                    file = tar.extractfile(member)
                    assert file is not None
                    pixels = np.asarray(Image.open(io.BytesIO(file.read())).convert("L"), dtype=np.float32)
                    if pixels.min() < pixels.max():
                        yield Foreign(f"MedNIST {label}, slice", member.name, picture(pixels))


def lgg() -> Iterator[Foreign]:
    """FLAIR slices with skull, the data of another bundle."""
    with np.load(data_root() / "lgg_flair" / "lgg_flair_192_u8.npz") as data:
        images = data["images"]
        for i in np.linspace(0, len(images) - 1, LGG_SLICES).astype(int):
            yield Foreign("TCGA-LGG FLAIR with skull, slice", str(i), picture(images[i].astype(np.float32)))


def volumes() -> Iterator[Foreign]:
    """Whole scans of other sequences and preparations."""
    root = data_root()
    for path in sorted((root / "ixi_2mm" / "t1").glob("*.nii.gz"))[:IXI_SCANS]:
        yield Foreign("IXI T1, its brain taken out", path.name, load_volume(path))
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
        ("MNI152_T1_2mm", "T1 template, its brain taken out"),
    ):
        yield Foreign(kind, name, load_volume(root / "nifti_misc" / f"{name}.nii.gz"))


def all_foreign() -> Iterator[Foreign]:
    """Every foreign scan, whole volumes first."""
    yield from volumes()
    yield from lgg()
    yield from mednist()
