"""Volume: its properties, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from app.errors import ConstantVoxels, CounterpartError, InvalidGeometry, InvalidVoxels, NotAVolume
from app.volume import Volume

ARRAY = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
SECRET = 31415.9265


@given(
    st.tuples(*[st.floats(-180, 180)] * 3),
    st.tuples(*[st.floats(0.2, 8)] * 3),
    st.tuples(*[st.booleans()] * 3),
)
def test_spacing_is_independent_of_orientation(
    degrees: tuple[float, ...], spacing: tuple[float, ...], mirrored: tuple[bool, ...]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() * np.array(spacing)
    affine[:3, :3] *= np.where(mirrored, -1, 1)
    volume = Volume(ARRAY, affine)
    assert volume.spacing == pytest.approx(spacing)
    assert volume.voxel_ml == pytest.approx(np.prod(spacing) / 1000)


def test_volume_of_a_sheared_voxel() -> None:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[0, 2] = 4.0  # tilted gantry: the third axis is 5 mm long and rises by 3 mm
    volume = Volume(ARRAY, affine)
    assert volume.spacing == pytest.approx([2, 2, 5])
    assert volume.voxel_ml == pytest.approx(0.012)


def test_array_is_float32_and_affine_float64() -> None:
    affine = np.diag([0.1, 0.1, 0.1, 1])
    volume = Volume(ARRAY.astype(np.int16), affine)
    assert volume.array.dtype.name == "float32"
    assert volume.affine.dtype.name == "float64"
    np.testing.assert_array_equal(volume.array, ARRAY)
    np.testing.assert_array_equal(volume.affine, affine)
    assert volume.shape == (2, 3, 4)
    assert Volume(ARRAY, affine.tolist()).affine[0, 0] == 0.1  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4,), (4, 4), (2, 3, 4, 2), (2, 3, 4, 1), (0, 3, 4)])
def test_other_numbers_of_axes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(NotAVolume):
        Volume(np.zeros(shape, dtype=np.float32), np.eye(4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_invalid_voxels_are_counted(bad: float) -> None:
    array = ARRAY.astype(np.float32)
    array[0, 0, :2] = bad
    with pytest.raises(InvalidVoxels, match="2 of 24 voxels"):
        Volume(array, np.eye(4))


def test_value_too_large_for_float32_is_invalid() -> None:
    array = ARRAY.astype(np.float64)
    array[0, 0, 0] = 1e39
    with pytest.raises(InvalidVoxels, match="1 of 24 voxels"):
        Volume(array, np.eye(4))  # type: ignore[arg-type]


def test_constant_image_is_refused() -> None:
    with pytest.raises(ConstantVoxels):
        Volume(np.full((2, 3, 4), 5.0, dtype=np.float32), np.eye(4))


FLAT = np.diag([1.0, 1.0, 0.0, 1.0])
PARALLEL = np.array([[1.0, 1.0, 0, 0], [0, 1e-7, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
ALMOST_PARALLEL = np.array([[1.0, 1.0, 0, 0], [0, 1e-4, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
PERSPECTIVE = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 1]])


@pytest.mark.parametrize(
    "affine",
    [
        FLAT,
        PARALLEL,
        ALMOST_PARALLEL,
        np.full((4, 4), np.nan),
        np.diag([1, 1, np.inf, 1]),
        np.diag([0.005, 1.0, 1.0, 1.0]),
        np.eye(3),
        PERSPECTIVE,
    ],
    ids=["flat", "parallel", "almost parallel", "nan", "infinite", "tiny voxel", "3 x 3", "last row"],
)
def test_unusable_affine_is_refused(affine: np.ndarray) -> None:
    with pytest.raises(InvalidGeometry):
        Volume(ARRAY, affine)


def test_very_small_voxels_are_accepted() -> None:
    assert Volume(ARRAY, np.diag([0.02, 0.02, 0.02, 1.0])).spacing == pytest.approx(0.02)


def test_messages_contain_no_value_of_the_scan() -> None:
    array = np.full((2, 3, 4), SECRET, dtype=np.float32)
    invalid = array.copy()
    invalid[0, 0, 0] = np.nan
    for given_array, affine in (
        (array, np.eye(4)),
        (invalid, np.eye(4)),
        (ARRAY, FLAT * SECRET),
        (array[0], np.eye(4)),
    ):
        with pytest.raises(CounterpartError) as caught:
            Volume(given_array, affine)
        assert "31415" not in str(caught.value)
