"""What decision 15 measures with: peaks inside skulls, and who resembles whom."""

import numpy as np
import pytest

from app.volume import FloatArray, Volume
from scripts.headct_window import as_pictures, inside_skulls, neighbour_distances, peak


def heads(count: int, *, closed: bool = True) -> FloatArray:
    """Discs of bone, brain and ventricle, of 255, 107 and 44, with a little noise inside."""
    y, x = np.indices((64, 64)) - 31.5
    apart = np.hypot(y, x)
    head = np.select([apart < 4, apart < 22, apart < 25], [44.0, 107.0, 255.0], 25.0)
    if not closed:
        head[31:33, 40:] = 25
    noise = np.random.default_rng(1).normal(0, 4, (count, 64, 64)) * (apart < 22)
    pictures: FloatArray = np.round(head + noise).astype(np.float32)
    return pictures


def test_tissues_are_told_apart_inside_of_closed_skulls() -> None:
    inside = inside_skulls(np.concatenate([heads(8), heads(2, closed=False)]), bone=200, dark=85)
    assert inside.skulls == 8
    assert peak(inside.brain, 1.0) == pytest.approx(107, abs=1)
    assert peak(inside.ventricles, 1.0) == pytest.approx(44, abs=1)
    # A core: a pixel in from the ventricle's edge of 4, of 8 heads.
    assert inside.ventricles.size == 8 * 32


def test_a_peak_lies_in_the_middle_of_its_bin() -> None:
    values = np.array([-3.2, 9.5, 9.5, 9.5, 28.0, 28.0], np.float32)
    assert peak(values, 0.5) == 9.5


def test_pictures_of_another_pixel_size_keep_their_values() -> None:
    array = np.zeros((128, 96, 2), np.float32)
    array[32:96, 24:72] = 40
    pictures = as_pictures(Volume(array, np.diag([0.95, 0.95, 5.0, 1.0])), 3.8)
    assert pictures.shape == (2, 32, 24)
    assert pictures[0, 16, 12] == pytest.approx(40)
    assert pictures.sum() * 16 == pytest.approx(array.sum(), rel=0.01)


def test_the_nearest_neighbour_is_looked_for_in_all_pictures() -> None:
    rng = np.random.default_rng(2)
    base = rng.integers(80, 255, (5, 64, 64))
    grey = np.concatenate([base, base]) + rng.integers(-3, 1, (10, 64, 64))
    assert set(neighbour_distances(grey.astype(np.uint8), seed=1)) == {5}
