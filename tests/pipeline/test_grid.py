"""Slice grid: values on the slices return to their position in the scan."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st
from nibabel import affines

from app.pipeline import grid as grid_module
from app.pipeline.grid import SliceGrid
from app.pipeline.preprocess import to_slices
from app.volume import Volume
from tests.support.grids import CORNER_MM, GRIDS, PREPROCESSING, centroid_mm, preprocessed, reference, tilted
from tests.support.phantom import ball, brain, grid, with_lesion


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("at", [(25.0, 30.0, 12.0), (-31.0, -22.0, -17.0)])
def test_blob_keeps_its_position(name: str, at: tuple[float, float, float]) -> None:
    volume, slices = preprocessed(name)
    on = slices.grid
    indices = np.moveaxis(np.indices(on.shape), 0, -1)
    distance = np.linalg.norm(affines.apply_affine(on.affine, indices) - np.array(at), axis=-1)
    back = on.to_volume(np.exp(-((distance / 9) ** 2)).astype(np.float32))
    assert back.shape == volume.shape
    offset = affines.apply_affine(np.linalg.inv(volume.affine), centroid_mm(np.nan_to_num(back), volume.affine))
    assert offset == pytest.approx(affines.apply_affine(np.linalg.inv(volume.affine), np.array(at)), abs=0.3)
    # The volume at half-maximum is that of a ball, so no axis was scaled.
    radius = 9 * np.sqrt(np.log(2))
    assert (back > 0.5).sum() * volume.voxel_ml == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.15)


@pytest.mark.parametrize("name", GRIDS)
def test_lesion_keeps_its_position_in_the_slices(name: str) -> None:
    at = (28.0, -25.0, 14.0)
    volume, plain = preprocessed(name)
    sick = to_slices(with_lesion(volume, at, 12, 0.5), PREPROCESSING)
    change = np.where(plain.x[:, 0] - sick.x[:, 0] > 0.1, 1.0, 0.0)
    assert centroid_mm(change, plain.grid.affine) == pytest.approx(at, abs=0.9)  # 0.3 pixel


def test_values_beyond_the_slices_are_nan() -> None:
    volume, slices = reference()
    on = slices.grid
    back = on.to_volume(np.ones(on.shape, dtype=np.float32))
    inside = affines.apply_affine(
        np.linalg.inv(on.affine) @ volume.affine, np.moveaxis(np.indices(volume.shape), 0, -1)
    )
    reached = ((inside >= -0.5) & (inside <= np.array(on.shape) - 0.5)).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(back), reached)
    assert 0.3 < reached.mean() < 1
    np.testing.assert_allclose(back[reached], 1.0, atol=1e-6)


def test_unknown_pixels_stay_nan_and_do_not_spread() -> None:
    volume, slices = reference()
    stack = np.full(slices.grid.shape, 5.0, dtype=np.float32)
    stack[:10] = np.nan
    back = slices.grid.to_volume(stack)
    z = affines.apply_affine(slices.grid.affine, [10, 0, 0])[2]
    z_of = affines.apply_affine(volume.affine, np.column_stack([[26] * 48, [32] * 48, range(48)]))[:, 2]
    line = back[26, 32]
    assert np.isnan(line[z_of < z - 1.5]).all()
    known = (z_of >= z - 1.5) & (z_of <= -CORNER_MM[2] + 1.5)
    np.testing.assert_allclose(line[known], 5.0, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_voxel_beside_unknown_pixels_is_the_mean_of_known_ones(name: str) -> None:
    _, slices = preprocessed(name)
    stack = np.full(slices.grid.shape, 5.0, dtype=np.float32)
    stack[:20] = np.nan
    back = slices.grid.to_volume(stack)
    np.testing.assert_allclose(back[np.isfinite(back)], 5.0, atol=1e-4)


@given(st.tuples(*[st.floats(-180, 180)] * 3), st.tuples(*[st.floats(2.5, 5.0)] * 3))
@run(max_examples=8)
def test_ball_keeps_its_position_on_any_oblique_grid(
    degrees: tuple[float, ...], spacing: tuple[float, float, float]
) -> None:
    at = (20.0, -25.0, 10.0)
    x, y, z = (int(200 / s) for s in spacing)
    shape = (x, y, z)
    volume = brain(shape, tilted(grid(shape, spacing), *degrees))
    on = to_slices(volume, PREPROCESSING).grid
    stack = np.arange(np.prod(on.shape), dtype=np.float32).reshape(on.shape)
    on_stack = ball(Volume(stack, on.affine), at, 20.0)
    back = on.to_volume(on_stack.astype(np.float32)) > 0.5
    truth = ball(volume, at, 20)
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.93
    voxel = affines.apply_affine(np.linalg.inv(volume.affine), centroid_mm(back.astype(float), volume.affine))
    assert voxel == pytest.approx(affines.apply_affine(np.linalg.inv(volume.affine), np.array(at)), abs=0.3)


@pytest.mark.parametrize("name", GRIDS)
def test_aligned_interpolation_equals_the_oblique_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, slices = preprocessed(name)
    stack = np.random.default_rng(0).random(slices.grid.shape, dtype=np.float32)
    stack[slices.foreground == 0] = np.nan
    quick = slices.grid.to_volume(stack)
    monkeypatch.setattr(grid_module, "_axes_aligned", lambda _: False)
    monkeypatch.setattr(grid_module, "SLAB_VOXELS", 1)  # and in many slabs
    general = slices.grid.to_volume(stack)
    np.testing.assert_array_equal(np.isnan(quick), np.isnan(general))
    np.testing.assert_allclose(quick, general, atol=1e-6)


@pytest.mark.parametrize("steps", [(0.47, 0.47, 1.0), (-0.47, -0.47, 1.0), (0.9, -0.8, 1.7)])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_mirrored_and_permuted_grids_equal_the_oblique_interpolation(
    steps: tuple[float, float, float], order: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = np.random.default_rng(1).random((9, 14, 12), dtype=np.float32)
    stack[:, :4], stack[5] = np.nan, np.nan
    slices = np.zeros((4, 4))
    slices[0, 2], slices[1, 1], slices[2, 0], slices[3, 3] = 3.8, 3.8, 5, 1
    slices[:3, 3] = -20, -25, -20
    scan = np.eye(4)
    scan[:3, :3] = np.diag(steps)[:, order]
    shape = (60, 50, 45)
    scan[:3, 3] = -scan[:3, :3] @ (np.array(shape) / 2)
    placed = SliceGrid(slices, (9, 14, 12), scan, shape, 0.0, 1.0)
    assert grid_module._axes_aligned((np.linalg.inv(slices) @ scan)[:3, :3])
    quick = placed.to_volume(stack)
    monkeypatch.setattr(grid_module, "SLAB_VOXELS", 7000)
    # BLAS adds in another order for another size. In production the size of the slabs is constant.
    np.testing.assert_allclose(placed.to_volume(stack), quick, atol=1e-6)
    monkeypatch.setattr(grid_module, "_axes_aligned", lambda _: False)
    general = placed.to_volume(stack)
    assert np.isfinite(general).any()
    np.testing.assert_array_equal(np.isnan(quick), np.isnan(general))
    np.testing.assert_allclose(quick, general, atol=1e-6)


def test_number_of_threads_has_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid_module, "SLAB_VOXELS", 20_000)
    shape, spacing = (40, 44, 30), (3.7, 4.1, 5.0)
    slices = to_slices(brain(shape, tilted(grid(shape, spacing), 7.0, -4.0, 11.0)), PREPROCESSING)
    stack = np.where(slices.foreground, slices.x[:, 0], np.float32(np.nan))
    alone, several, default = (slices.grid.to_volume(stack, threads) for threads in (1, 3, 0))
    assert np.isfinite(alone).any()
    assert alone.tobytes() == several.tobytes() == default.tobytes()
