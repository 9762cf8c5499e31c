"""What several files of ingestion start from."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nibabel import affines

from app.ingest.reader import read_scan
from app.volume import Affine, Scan, Volume
from training.archives import unpack

Read = Callable[..., Scan]


@pytest.fixture
def read_scan(tmp_path: Path) -> Read:
    """`read` with a scratch folder of its own."""

    def call(path: Path, **options: object) -> Scan:
        return read_scan(path, scratch=tmp_path / "scratch", **options)  # type: ignore[arg-type]

    return call


@pytest.fixture(scope="session")
def archives(real_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The DICOM archives of the real scans, unpacked; without them, what needs them is skipped."""
    folder = tmp_path_factory.mktemp("archives")
    for path in sorted((real_scans / "dicom").glob("*.tar.xz")):
        unpack(path, folder / path.name.removesuffix(".tar.xz").split("_")[0])
    return folder


@pytest.fixture(scope="session")
def volume() -> Volume:
    """Whole numbers of no symmetry, so that every flip and transposition shows; anisotropic voxels."""
    rng = np.random.default_rng(7)
    array = rng.integers(0, 300, (32, 34, 14)).astype(np.float32)
    array[22:28, 5:13, 8:12] += 3000  # one block off centre: its centroid is a place
    return Volume(array, placed((0.9, 1.1, 2.0)))


def placed(spacing: tuple[float, float, float], angles: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Affine:
    """Affine of a grid turned by Euler angles in radians, with an origin that is not round."""
    affine = np.eye(4)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, :3] = affine[:3, :3] * spacing
    affine[:3, 3] = -17.25, 31.5, -42.125
    return affine


def centroid_mm(volume: Volume) -> Affine:
    """Where the bright block lies, RAS+ mm."""
    return np.asarray(affines.apply_affine(volume.affine, np.argwhere(volume.array > 1000)).mean(axis=0))
