"""Scans from elsewhere: heads of the bundle's own sequence, and what it must refuse, other sequences and body parts."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from PIL import Image

from app.ingest import read
from app.volume import FloatArray, Volume
from training.archives import unpack
from training.config import data_root
from training.data import load_volume

# Pictures without a pixel spacing get a head's: this field of view, the kindest assumption.
FIELD_OF_VIEW_MM = 200.0
PER_CLASS = 40
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


def heads() -> Iterator[Foreign]:
    """T1 with skull, of other scanners: 20 healthy volunteers of IXI, a template, and two DICOM series."""
    root = data_root()
    for path in sorted((root / "ixi_2mm" / "t1").glob("*.nii.gz")):
        yield Foreign("IXI", path.name[:6], load_volume(path))
    yield Foreign("template", "MNI152", load_volume(root / "nifti_misc" / "MNI152_T1_2mm.nii.gz"))
    for kind, name in (("UIH", "uih_umr770_t1_sag_32of160"), ("studyforrest", "studyforrest_t1_defaced_96of384")):
        with TemporaryDirectory() as folder:
            unpack(root / "dicom" / f"{name}.tar.xz", Path(folder))
            yield Foreign(kind, name, read(Path(folder), scratch=Path(folder)).volume)


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


def all_foreign() -> Iterator[Foreign]:
    """Every foreign scan, whole volumes first."""
    yield from volumes()
    yield from lgg()
    yield from mednist()
