"""Tests of coarse noise, simulated scanners and the augmentation of a batch."""

import numpy as np
import pytest
from scipy import ndimage

torch = pytest.importorskip("torch")

from app.volume import FloatArray  # noqa: E402
from training.augment import add_coarse_noise, augment, shift_tissues, simulate_contrast, simulate_scanner  # noqa: E402
from training.config import ROOT, AugmentationConfig, CoarseNoiseConfig, Config, ScannerConfig  # noqa: E402

pytestmark = pytest.mark.training

COARSE = Config.load(ROOT / "training" / "configs" / "t1.toml").coarse_noise
SCANNER = ScannerConfig(probability=0.5, max_noise_sd=0.0, max_blur_sd_pixels=0.5, max_sharpening=1.0)
# Augmentation that only mirrors.
STILL = AugmentationConfig(
    max_rotation_degrees=0.0,
    max_scale=0.0,
    max_shift_pixels=0.0,
    max_gain=0.0,
    max_log_gamma=0.0,
    scanner=SCANNER.model_copy(update={"probability": 0.0}),
)


def discs(count: int) -> FloatArray:
    """Return uniform discs on a black background, (N, 1, 96, 80)."""
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    disc = np.where(rows**2 + columns**2 < 0.7, 0.5, 0).astype(np.float32)
    return np.repeat(disc[None, None], count, axis=0)


def striped_discs() -> FloatArray:
    """Return discs with stripes of two pixels, (4, 96, 80)."""
    stripes = 0.5 + 0.1 * ((np.arange(80) // 2) % 2)
    return np.where(discs(4)[:, 0] > 0, stripes, 0).astype(np.float32)


def with_coarse_noise(x: FloatArray, config: CoarseNoiseConfig, seed: int) -> FloatArray:
    changed: FloatArray = add_coarse_noise(torch.from_numpy(x), config, torch.Generator().manual_seed(seed)).numpy()
    return changed


def changed_fraction(config: CoarseNoiseConfig) -> FloatArray:
    """Return the changed fraction of each of 300 discs."""
    x = discs(300)
    y = with_coarse_noise(x, config, 5)
    assert y.dtype == np.float32
    assert y.min() >= 0
    assert y.max() <= 1
    assert not y[x == 0].any(), "the background is unchanged"
    return np.asarray(((np.abs(y - x) > 0.05) & (x > 0)).sum(axis=(1, 2, 3)) / (x > 0).sum(axis=(1, 2, 3)))


def test_coarse_noise_leaves_some_slices_unchanged() -> None:
    unchanged = np.mean(changed_fraction(COARSE) == 0)
    assert unchanged == pytest.approx(1 - COARSE.probability, abs=0.12)  # some changes are below 0.05
    assert np.all(changed_fraction(COARSE.model_copy(update={"probability": 0.0})) == 0)


def test_patches_are_bright_and_dark_and_small() -> None:
    x = discs(300)
    change = with_coarse_noise(x, COARSE, 6) - x
    assert (change > 0.1).any(axis=(1, 2, 3)).mean() > 0.2
    assert (change < -0.1).any(axis=(1, 2, 3)).mean() > 0.2
    assert np.median(changed_fraction(COARSE)) < 0.2


def test_coarse_noise_depends_on_the_seed_only() -> None:
    x = discs(8)
    first, second, other = (with_coarse_noise(x, COARSE, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(x, discs(8))


def test_coarse_noise_covers_the_configured_fraction() -> None:
    """Two sets of patches each cover 1 to 12 % of the head."""
    update = {"probability": 1.0, "edge_sd_pixels": (0.01, 0.01), "modulation_sd": 0.0}
    config = COARSE.model_copy(update=update)
    x = discs(300)
    covered = (np.abs(with_coarse_noise(x, config, 7) - x) > 0.04).sum(axis=(1, 2, 3)) / (x > 0).sum(axis=(1, 2, 3))
    low, high = (2 * fraction for fraction in config.covered_fraction)
    assert low - 0.01 < covered.min()
    assert covered.max() < high + 0.01
    assert covered.mean() == pytest.approx((low + high) / 2, abs=0.015)


def test_coarse_noise_leaves_an_empty_slice_empty() -> None:
    x = np.zeros((3, 1, 96, 80), np.float32)
    np.testing.assert_array_equal(with_coarse_noise(x, COARSE, 8), x)


def detail(x: FloatArray) -> float:
    """Return the mean amount that a small Gaussian removes, well inside the disc."""
    inner = ndimage.binary_erosion(x > 0, iterations=4, structure=np.ones((1, 3, 3)))
    return float(np.abs(x - ndimage.gaussian_filter(x, (0, 1, 1)))[inner].mean())


def test_scanner_is_smoother_or_sharper_within_the_configuration() -> None:
    x = striped_discs()
    ratios = [detail(simulate_scanner(x, SCANNER, np.random.default_rng(i))) / detail(x) for i in range(60)]
    assert 0.75 < min(ratios) < 0.85
    assert 1.5 < max(ratios) < 2.1
    assert np.mean(np.array(ratios) <= 1) == pytest.approx(0.5, abs=0.2)


def test_scanner_noise_has_the_configured_strength() -> None:
    config = ScannerConfig(probability=1.0, max_noise_sd=0.04, max_blur_sd_pixels=0.0, max_sharpening=0.0)
    x = striped_discs()
    strengths = [float((simulate_scanner(x, config, np.random.default_rng(i)) - x)[x > 0].std()) for i in range(60)]
    assert max(strengths) == pytest.approx(0.04, rel=0.1)
    assert np.mean(strengths) == pytest.approx(0.02, rel=0.2)


def test_scanner_keeps_background_and_edge() -> None:
    x = discs(4)[:, 0]
    config = ScannerConfig(probability=1.0, max_noise_sd=0.0, max_blur_sd_pixels=1.0, max_sharpening=1.0)
    for i in range(10):
        np.testing.assert_allclose(simulate_scanner(x, config, np.random.default_rng(i)), x, atol=1e-5)


def test_augmentation_simulates_scanners_for_some_slices_and_depends_on_the_seed_only() -> None:
    still = STILL.model_copy(update={"scanner": SCANNER})
    x = torch.from_numpy(np.repeat(striped_discs()[:1], 200, axis=0)[:, None])
    y = augment(x, still, np.random.default_rng(3))
    assert torch.equal(y, augment(x, still, np.random.default_rng(3)))
    unchanged = [torch.allclose(a, x[0], atol=1e-4) or torch.allclose(a, x[0].flip(-1), atol=1e-4) for a in y]
    # A Gaussian of a fraction of a pixel changes nothing either.
    assert np.mean(unchanged) == pytest.approx(0.5 + 0.25 * 0.3, abs=0.1)


OTHER_SCANNERS = STILL.model_copy(
    update={
        "max_log_gamma": 0.3,
        "anchor": 0.75,
        "tissue_levels": (0.2, 0.48, 0.75),
        "tissue_shift_sd": 0.05,
        "bias_field_sd": 0.05,
        "erosion_probability": 0.5,
    }
)


def test_tissue_shift_is_monotonic_and_keeps_anchor_and_background() -> None:
    ramp = np.tile(np.linspace(0, 1, 81, dtype=np.float32), (50, 1, 1, 1))
    shifted = shift_tissues(torch.from_numpy(ramp), OTHER_SCANNERS, np.random.default_rng(0)).numpy()
    assert (np.diff(shifted, axis=-1) >= 0).all()
    assert not shifted[..., 0].any()
    np.testing.assert_allclose(shifted[..., 60], 0.75, atol=1e-6)
    assert shifted[..., 38].std() == pytest.approx(0.05, abs=0.03)


def test_dark_rim_is_removed_and_dark_tissue_inside_stays() -> None:
    """A bright disc with a dark rim and a dark centre."""
    x = discs(60) * 0.9
    depth = ndimage.distance_transform_edt(x[0, 0] > 0)
    assert depth.max() > 10
    x[:, 0, (depth > 0) & (depth <= 2)] = 0.15
    x[:, 0, depth > 8] = 0.15
    rimless = OTHER_SCANNERS.model_copy(
        update={"erosion_probability": 0.0, "fluid_rim_probability": 0.5, "fluid_rim_levels": (0.2, 0.4)}
    )
    plain = {"bias_field_sd": 0.0, "tissue_shift_sd": 0.0, "max_log_gamma": 0.0}
    changed = augment(torch.from_numpy(x), rimless.model_copy(update=plain), np.random.default_rng(2)).numpy()[:, 0]
    lost = (x[0, 0] > 0).sum() - (changed > 0.05).sum(axis=(1, 2))  # a mirror moves traces beyond the edge
    assert set(np.unique(lost)) == {0, int(((depth > 0) & (depth <= 2)).sum())}
    assert np.mean(lost > 0) == pytest.approx(0.5, abs=0.2)
    assert (changed[:, depth > 2] > 0).all()


def test_other_scanners_keep_the_background_and_erode_some_masks() -> None:
    x = discs(100)
    changed = augment(torch.from_numpy(x.copy()), OTHER_SCANNERS, np.random.default_rng(1)).numpy()
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert changed[x == 0].max() < 0.01  # interpolation at the edge
    area = (changed > 0.05).sum(axis=(1, 2, 3)) / (x > 0).sum(axis=(1, 2, 3))
    assert np.mean(area < 1) == pytest.approx(0.5, abs=0.15)
    assert area.min() > 0.85


def tissues() -> FloatArray:
    """Return a stack (12, 96, 80) of discs with four tissue levels in quadrants."""
    rows, columns = np.mgrid[-1:1:96j, -1:1:80j]
    levels = np.where(rows < 0, np.where(columns < 0, 0.2, 0.4), np.where(columns < 0, 0.6, 0.75))
    return np.repeat(np.where(discs(1)[0] > 0, levels, 0), 12, axis=0).astype(np.float32)


def test_simulated_contrast_is_one_curve_for_the_whole_head() -> None:
    config = Config.load(ROOT / "training" / "configs" / "t1.toml").augmentation
    config = config.model_copy(update={"bias_field_sd": 0.0})
    x = tissues()
    heads = [simulate_contrast(x, config, np.random.default_rng(i)) for i in range(20)]
    for y in heads:
        assert y.dtype == np.float32
        assert not y[x == 0].any(), "the background is unchanged"
        levels = [np.unique(y[x == np.float32(value)]) for value in (0.2, 0.4, 0.6, 0.75)]
        assert [len(level) for level in levels] == [1] * 4, "a tissue has one value in all slices"
        assert all(np.diff(np.concatenate(levels)) > 0), "the order of the tissues is unchanged"
        assert levels[-1][0] == pytest.approx(config.anchor, abs=1e-5)
    ratios = [y[x == np.float32(0.4)][0] / y[x == np.float32(0.75)][0] for y in heads]
    assert np.std(ratios) > 0.03, "heads differ in contrast"


def test_simulated_bias_field_is_smooth_over_the_whole_head() -> None:
    config = Config.load(ROOT / "training" / "configs" / "t1.toml").augmentation
    config = config.model_copy(update={"max_log_gamma": 0.0, "tissue_shift_sd": 0.0, "bias_field_sd": 0.1})
    x = np.full((12, 96, 80), 0.5, np.float32)
    for seed in range(5):
        field = np.log(simulate_contrast(x, config, np.random.default_rng(seed)) / x)
        for axis in range(3):
            third = np.diff(field, n=3, axis=axis)
            assert np.abs(third).max() < 1e-4, "a polynomial of second order has no third difference"
            assert np.abs(np.diff(field, axis=axis)).max() > 1e-3, "the field changes along each axis"


# ---- anatomy -----------------------------------------------------------------------------------


def augmented(x: FloatArray, seed: int = 0, **changes: float) -> FloatArray:
    """Augment slices by the given settings only. The heads are symmetric, so that the random mirror has no effect."""
    config = STILL.model_copy(update=changes)
    return np.asarray(augment(torch.from_numpy(x), config, np.random.default_rng(seed)).numpy())


def brains_with_fluid(count: int) -> FloatArray:
    """Return discs with a dark vertical gap of four pixels, and noise, (N, 1, 96, 80)."""
    x = discs(count)
    x[:, 0, 30:66, 38:42] = 0.2
    noise = np.random.default_rng(7).normal(0, 0.01, x.shape).astype(np.float32)
    return np.where(x > 0, x + noise, 0).astype(np.float32)


def test_warp_moves_the_outline_smoothly_and_by_the_configured_distance() -> None:
    x = discs(64)
    warped = augmented(x, warp_sd_pixels=1.5)
    # The edge of the disc in the middle row: its place is the sum of the row, divided by the value inside.
    widths = warped[:, 0, 48].sum(-1) / 0.5
    assert np.std(widths) == pytest.approx(1.5 * np.sqrt(2), rel=0.3), "two edges move independently"
    assert np.mean(widths) == pytest.approx(x[0, 0, 48].sum() / 0.5, abs=1.0)
    rows = (warped[:, 0, 40:56] / 0.5).sum(-1)
    assert np.abs(np.diff(rows, axis=1)).max() < 3, "neighbouring rows move together"


def test_fluid_widens_and_nothing_else_changes_much() -> None:
    x = brains_with_fluid(32)
    wide = augmented(x, wide_fluid_probability=1.0)
    still = augmented(x)
    np.testing.assert_array_equal(wide == 0, still == 0)
    beside_gap = np.r_[36:38, 42:44]
    darker = (still - wide)[:, 0, 32:64, beside_gap].mean(axis=(0, 1))
    assert darker.min() > 0.03, "the gap widens to both sides"
    far = np.zeros(x.shape, np.bool_)
    far[..., 20:76, 20:32] = True
    assert np.median((wide - still)[far]) == pytest.approx(-0.01, abs=0.01), "tissue loses about its noise"
    assert np.std(wide[far]) == pytest.approx(np.std(still[far]), rel=0.25), "the noise remains"


def test_some_slices_keep_their_fluid() -> None:
    x = brains_with_fluid(200)
    changed = (augmented(x, wide_fluid_probability=0.4) != augmented(x)).any(axis=(1, 2, 3))
    assert changed.mean() == pytest.approx(0.4, abs=0.1)
