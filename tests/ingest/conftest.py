"""Fixtures of the ingest tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from app.ingest import reader
from app.volume import Scan, Volume
from tests.support.geometry import SPACING, make_affine
from training.data import unpack_archive

Read = Callable[..., Scan]


@pytest.fixture
def read_scan(tmp_path: Path) -> Read:
    """`app.ingest.reader.read_scan` with a scratch folder."""

    def call(path: Path, **options: object) -> Scan:
        return reader.read_scan(path, scratch=tmp_path / "scratch", **options)  # type: ignore[arg-type]

    return call


@pytest.fixture(scope="session")
def archives(real_scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the unpacked DICOM archives; a test is skipped if the real scans are missing."""
    folder = tmp_path_factory.mktemp("archives")
    for path in sorted((real_scans / "dicom").glob("*.tar.xz")):
        unpack_archive(path, folder / path.name.removesuffix(".tar.xz").split("_")[0])
    return folder


@pytest.fixture(scope="session")
def volume() -> Volume:
    """Whole numbers without symmetry and anisotropic voxels, so that every flip and transposition shows."""
    rng = np.random.default_rng(7)
    array = rng.integers(0, 300, (32, 34, 14)).astype(np.float32)
    array[22:28, 5:13, 8:12] += 3000
    return Volume(array, make_affine(SPACING))
