"""Siemens mosaics."""

from pathlib import Path

import numpy as np
import pytest

from app.errors import NotAVolume
from app.volume import Volume
from tests.ingest.conftest import Read
from tests.support.dicom import Plane, Series, reorient, save
from tests.support.enhanced import make_enhanced
from tests.support.geometry import OBLIQUE, SPACING, make_affine
from tests.support.mosaic import make_mosaic


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize("plane", ["axial", "sagittal"])  # 14 and 32 tiles, 2 and 4 of them empty
def test_tiles_become_slices_at_their_positions(
    tmp_path: Path, read_scan: Read, volume: Volume, plane: Plane, *, is_reversed: bool
) -> None:
    rotated = Volume(volume.array, make_affine(SPACING, OBLIQUE))
    (path,) = save(tmp_path, [make_mosaic(rotated, Series(plane=plane), is_reversed=is_reversed)])
    scan = read_scan(path)
    array, affine = reorient(rotated, plane)
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-6)
    assert scan.source.instances == (path,)


def test_two_mosaics_are_refused(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    both = [make_mosaic(volume), make_mosaic(volume, Series(name="later"))]
    both[1].SeriesInstanceUID = both[0].SeriesInstanceUID
    save(tmp_path / "s", both)
    with pytest.raises(NotAVolume, match="2 Siemens mosaics"):
        read_scan(tmp_path / "s")


@pytest.mark.parametrize("missing", ["header", "distance", "size"])
def test_a_mosaic_without_positions_of_its_tiles_is_refused(
    tmp_path: Path, read_scan: Read, volume: Volume, missing: str
) -> None:
    dataset = make_mosaic(volume)
    if missing == "header":
        dataset.remove_private_tags()
    elif missing == "distance":
        del dataset.SpacingBetweenSlices
    else:
        dataset.Rows -= 1
    (path,) = save(tmp_path, [dataset])
    with pytest.raises(NotAVolume, match="private header"):
        read_scan(path)


@pytest.mark.parametrize("kind", ["interoperable", "enhanced"])
def test_a_mosaic_of_software_xa_is_refused_with_advice(
    tmp_path: Path, read_scan: Read, volume: Volume, kind: str
) -> None:
    """Software XA writes a block of group 0021 instead of the CSA header, also in enhanced images."""
    if kind == "enhanced":
        dataset = make_enhanced(volume)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE", "MOSAIC"]
    else:
        dataset = make_mosaic(volume)
        dataset.remove_private_tags()
    dataset.Manufacturer, dataset.SoftwareVersions = "Siemens Healthineers", "syngo MR XA30"
    dataset.private_block(0x0021, "SIEMENS MR SDI 02", create=True).add_new(0x4F, "US", 14)
    (path,) = save(tmp_path, [dataset])
    with pytest.raises(NotAVolume) as refused:
        read_scan(path)
    assert "Siemens mosaics" in refused.value.found
    assert "XA" in refused.value.advice
