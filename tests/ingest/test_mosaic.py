from pathlib import Path

import numpy as np
import pytest

from app.errors import NotAVolume
from app.volume import Volume
from tests.ingest.conftest import Read, centroid_mm, placed
from tests.support.dicom import Plane, Series, save, scanned
from tests.support.enhanced import enhanced
from tests.support.mosaic import mosaic

OBLIQUE = (0.2, -0.35, 0.5)


@pytest.mark.parametrize("downwards", [False, True])
@pytest.mark.parametrize("plane", ["axial", "sagittal"])  # 14 and 32 tiles, 2 and 4 of them empty
def test_tiles_come_back_to_their_voxels_and_their_place(
    tmp_path: Path, read_scan: Read, volume: Volume, plane: Plane, *, downwards: bool
) -> None:
    turned = Volume(volume.array, placed((0.9, 1.1, 2.0), OBLIQUE))
    (path,) = save(tmp_path, [mosaic(turned, Series(plane=plane), downwards=downwards)])
    scan = read_scan(path)
    array, affine = scanned(turned, plane)
    np.testing.assert_array_equal(scan.volume.array, array)
    np.testing.assert_allclose(scan.volume.affine, affine, atol=1e-6)
    np.testing.assert_allclose(centroid_mm(scan.volume), centroid_mm(turned), atol=1e-5)
    assert scan.source.notes == (f"A Siemens mosaic: one image with {array.shape[2]} slices side by side.",)
    assert scan.source.instances == (path,)


def test_two_mosaics_are_a_time_series(tmp_path: Path, read_scan: Read, volume: Volume) -> None:
    both = [mosaic(volume), mosaic(volume, Series(name="later"))]
    both[1].SeriesInstanceUID = both[0].SeriesInstanceUID
    save(tmp_path / "s", both)
    with pytest.raises(NotAVolume, match="2 Siemens mosaics, each a whole volume of 14 slices: a time series"):
        read_scan(tmp_path / "s")


@pytest.mark.parametrize("missing", ["header", "distance", "size"])
def test_a_mosaic_that_does_not_say_where_its_tiles_lie(
    tmp_path: Path, read_scan: Read, volume: Volume, missing: str
) -> None:
    dataset = mosaic(volume)
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
def test_a_mosaic_of_software_xa_is_refused_with_a_way_out(
    tmp_path: Path, read_scan: Read, volume: Volume, kind: str
) -> None:
    """XA writes no CSA header: a block of group 0021 in its place, and in enhanced images a group for each frame."""
    if kind == "enhanced":
        dataset = enhanced(volume)
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "M", "NONE", "MOSAIC"]
    else:
        dataset = mosaic(volume)
        dataset.remove_private_tags()
    dataset.Manufacturer, dataset.SoftwareVersions = "Siemens Healthineers", "syngo MR XA30"
    dataset.private_block(0x0021, "SIEMENS MR SDI 02", create=True).add_new(0x4F, "US", 14)
    (path,) = save(tmp_path, [dataset])
    with pytest.raises(NotAVolume) as refused:
        read_scan(path)
    assert "Siemens mosaics" in refused.value.found
    assert "software (XA) writes none" in refused.value.found
    assert "enhanced images or single slices" in refused.value.advice
