"""Healthy T1 scans of scanners that no training saw, and lesion shapes that no training uses."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from app.ingest.reader import read_scan
from app.manifest import FrozenModel
from app.volume import Volume
from training.config import SPLITS_FOLDER, data_root
from training.data import load_volume, unpack_archive

UNSEEN = "t1_unseen.json"
DICOM_ARCHIVE = ".tar.xz"
# IXI is a scanner of the training. Its heads with skull are of subjects that no training saw.
IXI = "IXI"


class UnseenScan(FrozenModel):
    """Entry of the list of scans.

    Attributes
    ----------
    scanner : str
        Scanner as far as it is known. A row of the table has the scans of one scanner.
    person : str
    path : str
        File below the data root, or an archive of a DICOM series.
    known_from : str
        Decision that lists this person's result with an earlier version; empty if no decision does.
    counted : bool
        False for a second file of a person, and for a mean of many people. A summary leaves them out.
    """

    scanner: str
    person: str
    path: str
    known_from: str = ""
    counted: bool = True


class UnseenList(FrozenModel):
    """Frozen list of scans, and of lesion shapes by their use: as outlines of foreign patches, and as large strokes."""

    source: str
    scans: tuple[UnseenScan, ...]
    patch_shapes: tuple[str, ...]
    stroke_shapes: tuple[str, ...]

    @property
    def people(self) -> tuple[UnseenScan, ...]:
        """One scan of each person."""
        return tuple(scan for scan in self.scans if scan.counted)


@dataclass(frozen=True, eq=False)
class HealthyHead:
    """Healthy scan with its scanner.

    Attributes
    ----------
    kind, name : str
        Scanner, and file without its suffix.
    person : str
    in_training : bool
        Other people's scans of this scanner are in the training.
    known_from : str
    counted : bool
        See `UnseenScan`.
    volume : Volume
    """

    kind: str
    name: str
    person: str
    in_training: bool
    known_from: str
    counted: bool
    volume: Volume


def load_unseen_list() -> UnseenList:
    """Read the list and check that no person is counted twice and no shape has two uses."""
    unseen = UnseenList.model_validate_json((SPLITS_FOLDER / UNSEEN).read_text(encoding="utf-8"))
    people = [scan.person for scan in unseen.people]
    assert len(set(people)) == len(people), "a person is counted twice"
    shapes = unseen.patch_shapes + unseen.stroke_shapes
    assert len(set(shapes)) == len(shapes), "a lesion shape has two uses"
    return unseen


def load_unseen_scan(scan: UnseenScan) -> Volume:
    """Read a file of the list, or the DICOM series of an archive as the service reads it."""
    path = data_root() / scan.path
    if not scan.path.endswith(DICOM_ARCHIVE):
        return load_volume(path)
    with TemporaryDirectory() as folder:
        unpack_archive(path, Path(folder))
        return read_scan(Path(folder), scratch=Path(folder)).volume


def load_unseen_head(scan: UnseenScan) -> HealthyHead:
    """Return a scan of the list with its volume."""
    name = Path(scan.path).name.partition(".")[0]
    return HealthyHead(scan.scanner, name, scan.person, False, scan.known_from, scan.counted, load_unseen_scan(scan))


def healthy_heads() -> Iterator[HealthyHead]:
    """Yield the scans of the list, then the IXI heads with skull, which are in no part of any split."""
    for scan in load_unseen_list().scans:
        yield load_unseen_head(scan)
    for path in sorted((data_root() / "ixi_2mm").glob("t1/*.nii.gz")):
        yield HealthyHead(IXI, path.name[:6], path.name[:6], True, "decision 22", True, load_volume(path))


def load_stroke_shape(name: str) -> Volume:
    """Load the lesion mask of a patient with chronic stroke in MNI space (Pustina et al. 2018)."""
    shape = load_volume(data_root() / "stroke_shapes" / f"{name}.nii.gz")
    return Volume((shape.array > 0).astype(np.float32), shape.affine)
