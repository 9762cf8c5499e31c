"""Slices and sizes of the synthetic cases."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from app.runtime.bundle import load_bundle
from training.config import ROOT, Config
from training.experiments.cases import RADIUS_PIXELS, synthetic
from training.image_archive import load_tumour_scan


@pytest.mark.data
def test_ellipses_are_evaluated_in_slices_without_a_tumour(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(ROOT / "training" / "configs" / "flair.toml")
    manifest = load_bundle(config.bundle_folder).manifest
    tumour_slices = 0
    for case in islice(synthetic(config, manifest, "validation"), 3):
        real = load_tumour_scan(config, case.subject)
        tumour = case.slices.grid.sample_volume(real.truth.astype(np.float32)).max(axis=(1, 2)) > 0
        tumour_slices += int(tumour.sum())
        assert not tumour[case.slice_indices].any()
        assert case.truth.any()
    assert tumour_slices


@pytest.mark.data
@pytest.mark.parametrize("name", ["headct", "flair"])
def test_ellipses_have_their_radius_in_pixels_of_the_model(name: str, real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(ROOT / "training" / "configs" / f"{name}.toml")
    manifest = load_bundle(config.bundle_folder).manifest
    areas = [
        int(a) for case in islice(synthetic(config, manifest, "validation"), 4) for a in case.truth.sum(axis=(1, 2))
    ]
    radii = np.sqrt(np.array([a for a in areas if a]) / np.pi)
    # A head that is resampled to the head box changes its size a little, and the edge of the brain cuts ellipses.
    assert 0.7 * RADIUS_PIXELS[0] < np.median(radii) < 1.15 * RADIUS_PIXELS[1]
    assert radii.max() < 1.4 * RADIUS_PIXELS[1]
