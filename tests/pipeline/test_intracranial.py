"""Space inside the skull of a head CT: openings of bone, clots at the skull, any grid of the scan."""

import numpy as np
import numpy.typing as npt
import pytest
from nibabel import affines

from app.errors import WrongFieldOfView
from app.manifest import Preprocessing
from app.pipeline.findings import dice
from app.pipeline.intracranial import intracranial_mask
from app.pipeline.preprocess import Slices, analysed_slices, to_slices
from app.volume import Affine, BoolArray, Volume
from tests.support.grids import tilted
from tests.support.phantom import grid, positions

AIR, SCALP, BONE, BRAIN, CLOT = -1000.0, 40.0, 1000.0, 35.0, 70.0
# Half axes of the space inside the skull: right-left, anterior-posterior, inferior-superior.
INNER_MM = np.array([66.0, 82.0, 70.0])
SKULL_MM, SCALP_MM = 8.0, 6.0
SETTINGS = Preprocessing(
    subject="the inside of a skull",
    advice="Send a head.",
    spacing_mm=(5.0, 2.0, 2.0),
    shape=(96, 80),
    extent_mm=((100.0, 120.0, 0.0), (170.0, 205.0, 200.0)),
    window=(0.0, 80.0),
    intracranial=True,
    min_foreground_cm2=25.0,
)


def _to_centre(shape: tuple[int, int, int]) -> Affine:
    """Return the translation that puts the middle of an array at the origin."""
    affine = np.eye(4)
    affine[:3, 3] = -(np.array(shape) - 1) / 2
    return affine


GRIDS = {
    "1.5 mm": ((120, 140, 110), grid((120, 140, 110), 1.5)),
    "thick axial": ((140, 160, 34), grid((140, 160, 34), (1.3, 1.3, 5.0))),
    "thick sagittal": ((40, 160, 126), grid((40, 160, 126), (4.5, 1.3, 1.3))),
    "oblique": ((80, 90, 78), tilted(grid((80, 90, 78), 2.5), 10, -15, 20)),
    "mirrored": ((126, 160, 40), np.diag([-1.5, -1.3, 4.5, 1.0]) @ _to_centre((126, 160, 40))),
}


def inside(points: npt.NDArray[np.floating], margin_mm: float = 0.0) -> BoolArray:
    """Return which points (..., 3) lie inside the inner surface of the skull, moved outwards by a margin."""
    return np.asarray((points**2 / (INNER_MM + margin_mm) ** 2).sum(axis=-1) < 1)


def head_ct(shape: tuple[int, int, int], affine: Affine, *, opening_mm: float = 0.0, clot: bool = False) -> Volume:
    """Return a head: scalp, skull and brain. An opening of the skull in front, of that width, is below the middle."""
    p = positions(shape, affine)
    array = np.full(shape, AIR, dtype=np.float32)
    array[inside(p, SKULL_MM + SCALP_MM)] = SCALP
    is_bone = inside(p, SKULL_MM) & ~inside(p)
    is_open = (np.abs(p[..., 0]) < opening_mm / 2) & (p[..., 1] > 0) & (p[..., 2] < -25) & (p[..., 2] > -50)
    array[is_bone & ~is_open] = BONE
    array[inside(p)] = BRAIN
    if clot:  # a layer of five millimetres at the left side of the skull
        array[inside(p) & ~inside(p, -5.0) & (p[..., 0] < -30) & (np.abs(p[..., 2]) < 30)] = CLOT
    return Volume(array, affine)


def placed(slices: Slices) -> BoolArray:
    """Return the true space on the grid of the slices."""
    return inside(positions(slices.grid.shape, slices.grid.affine))


FINE = ((128, 128, 40), (1.5, 1.5, 5.0))


@pytest.mark.parametrize("opening_mm", [0.0, 8.0, 25.0])
def test_space_ends_at_bone_and_does_not_leak_through_openings(opening_mm: float) -> None:
    slices = to_slices(head_ct(FINE[0], grid(*FINE), opening_mm=opening_mm), SETTINGS)
    assert dice(slices.foreground, placed(slices)) > 0.97


def test_clot_at_the_skull_is_inside_and_keeps_its_value() -> None:
    slices = to_slices(head_ct(FINE[0], grid(*FINE), clot=True), SETTINGS)
    middle = len(slices.x) // 2
    row = slices.x[middle, 0, 48]
    columns = np.flatnonzero(slices.foreground[middle, 48])
    points = affines.apply_affine(slices.grid.affine, [(middle, 48, c) for c in columns])
    in_clot = (points[:, 0] < -INNER_MM[0] + 4) & (points[:, 0] > -INNER_MM[0] + 1)
    assert in_clot.any()
    assert row[columns[in_clot]] == pytest.approx(CLOT / 80, abs=0.1)


def test_value_at_the_edge_is_that_of_the_brain() -> None:
    """Neither bone nor air may change it, because thin bleeding lies there."""
    slices = to_slices(head_ct(FINE[0], grid(*FINE)), SETTINGS)
    values = slices.x[analysed_slices(slices, SETTINGS)][:, 0]
    values = values[slices.foreground[analysed_slices(slices, SETTINGS)]]
    assert np.percentile(values, 1) == pytest.approx(BRAIN / 80, abs=0.02)
    assert np.percentile(values, 98) == pytest.approx(BRAIN / 80, abs=0.05)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_grid_of_the_scan_does_not_matter(name: str) -> None:
    shape, affine = GRIDS[name]
    slices = to_slices(head_ct(shape, affine), SETTINGS)
    assert dice(slices.foreground, placed(slices)) > 0.93


def test_calcification_belongs_to_the_space() -> None:
    hu = np.full((5, 140, 140), BRAIN, dtype=np.float32)
    rows, columns = np.mgrid[-70:70, -70:70]
    radius = np.hypot(rows, columns)
    hu[:, radius > 50] = BONE
    hu[:, radius > 58] = AIR
    hu[2, 68:72, 68:72] = 300.0
    mask = intracranial_mask(hu, 1.0)
    assert mask[2, 70, 70]
    assert dice(mask[2], radius < 50) > 0.98


def test_scan_of_the_trunk_is_refused_before_its_skull_is_searched_for() -> None:
    volume = head_ct((32, 32, 130), grid((32, 32, 130), (10.0, 10.0, 5.0)))
    with pytest.raises(WrongFieldOfView, match="310 x 310 x 645 mm"):
        to_slices(volume, SETTINGS)


def test_scan_without_a_skull_is_refused() -> None:
    p = positions(FINE[0], grid(*FINE))
    volume = Volume(np.where(inside(p), BRAIN, AIR), grid(*FINE))
    with pytest.raises(WrongFieldOfView, match="No bone encloses"):
        to_slices(volume, SETTINGS)
