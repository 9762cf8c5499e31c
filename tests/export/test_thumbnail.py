"""The thumbnail and the image for viewers: they show the scan and the surest finding."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from app.export.outputs import to_smallest_type
from app.export.preview import MASK_COLOUR
from app.export.report import build_report
from app.export.thumbnail import SIZE, choose_plane, choose_square, draw_thumbnail, write_thumbnail
from app.ingest.reader import read_scan
from app.pipeline.findings import ScanResult, to_scan_result
from app.pipeline.methods import METHODS
from app.runtime.bundle import Bundle, load_bundle
from app.volume import Affine, Scan, Source, Volume
from tests.support.dicom import Series, write_series
from tests.support.grids import tilted
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, grid, with_lesion
from tests.support.results import MODEL, run_analysis

SHAPE = (58, 70, 52)
CENTRE, RADIUS = (25.0, 10.0, 20.0), 15.0
GRIDS = {"axial": grid(SHAPE), "oblique": tilted(grid(SHAPE), 6, -9, 14)}


@pytest.fixture(scope="module")
def bundle(tiny_models: Path) -> Bundle:
    return load_bundle(tiny_models / "tiny-0.0.1", threads=1)


def analyse(bundle: Bundle, volume: Volume) -> ScanResult:
    networks = bundle.networks.in_batches(bundle.batch, lambda _: None)
    detection = METHODS[bundle.manifest.method](volume, networks, bundle.manifest)
    return to_scan_result(volume, detection, bundle.manifest)


@pytest.mark.parametrize("affine", GRIDS.values(), ids=GRIDS)
def test_outline_surrounds_the_surest_finding(bundle: Bundle, affine: Affine, tmp_path: Path) -> None:
    result = analyse(bundle, with_lesion(brain(SHAPE, affine), CENTRE, RADIUS))
    report = build_report(Scan(result.volume, Source("nifti")), result, MODEL, bundle.manifest, None, {})
    surest = max(report.findings, key=lambda finding: finding.peak_score)
    write_thumbnail(tmp_path / "a.png", result)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (SIZE, SIZE, 3)
    rows, columns = np.nonzero((pixels == MASK_COLOUR).all(axis=-1))
    assert choose_plane(result) == pytest.approx(surest.key_z_mm, abs=0.01)
    # Right is left, anterior is up.
    drawn = choose_square(result).points(choose_plane(result))[rows, columns, :2]
    assert drawn.mean(axis=0) == pytest.approx(CENTRE[:2], abs=4)
    assert np.ptp(drawn, axis=0) == pytest.approx(2 * RADIUS, abs=10)


def test_healthy_scan_shows_the_brain_on_a_dark_background(bundle: Bundle) -> None:
    pixels = draw_thumbnail(analyse(bundle, brain(SHAPE, GRIDS["axial"])))
    assert not (pixels == MASK_COLOUR).all(axis=-1).any()
    corners = pixels[:8, :8], pixels[-8:, :8], pixels[:8, -8:], pixels[-8:, -8:]
    assert max(corner.mean() for corner in corners) < 30
    assert pixels[SIZE // 2 - 20 : SIZE // 2 + 20, SIZE // 2 - 20 : SIZE // 2 + 20].mean() > 60


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ((0, 1000, -1024, 32767, -32768), np.int16),
        ((0, 32768), np.float32),
        ((0, -32769), np.float32),
        ((0, 0.5), np.float32),
        ((0, 1e30), np.float32),
    ],
)
def test_image_is_int16_only_if_no_value_changes(values: tuple[float, ...], dtype: type) -> None:
    array = np.zeros((3, 4, 5), np.float32)
    array.flat[-len(values) :] = values
    small = to_smallest_type(array)
    assert small.dtype == dtype
    np.testing.assert_array_equal(small, array)


def test_image_of_a_dicom_scan_has_its_voxels_and_no_patient_data(bundle: Bundle, tmp_path: Path) -> None:
    write_series(tmp_path / "series", with_lesion(brain(), LESION_MM, RADIUS_MM), Series())
    scan = read_scan(tmp_path / "series", scratch=tmp_path)
    run_analysis(tmp_path / "series", tmp_path / "out", bundle)
    image = nib.load(tmp_path / "out" / "image.nii.gz")
    assert isinstance(image, nib.Nifti1Image)
    np.testing.assert_array_equal(np.asarray(image.dataobj), scan.volume.array)
    np.testing.assert_allclose(image.affine, scan.volume.affine, atol=1e-4)
    texts = {name: bytes(image.header[name]) for name in ("descrip", "aux_file", "intent_name", "db_name")}
    assert texts.pop("descrip").rstrip(b"\0") == b"counterpart: scan, as it was read; research use only"
    assert {value.rstrip(b"\0") for value in texts.values()} == {b""}
    assert list(image.header.extensions) == []
