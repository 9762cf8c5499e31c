"""What is called healthy in a case is healthy: real tumours of validation patients lie in no judged slice."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from app.runtime.bundle import load_bundle
from training.config import ROOT, Config
from training.experiments.cases import RADIUS_PIXELS, synthetic
from training.tumours import load_tumour_scan


@pytest.mark.data
def test_sprites_are_judged_in_slices_without_a_tumour(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(ROOT / "training" / "configs" / "flair.toml")
    manifest = load_bundle(config.bundle_folder).manifest
    ill = 0
    for case in islice(synthetic(config, manifest, "validation"), 3):
        real = load_tumour_scan(config, case.subject)
        tumour = case.slices.grid.sample_volume(real.truth.astype(np.float32)).max(axis=(1, 2)) > 0
        ill += int(tumour.sum())
        assert not tumour[case.known].any(), f"a tumour of {case.subject} is judged"
        assert case.truth.any(), "no sprite in what is left"
    assert ill, "patients without a tumour show nothing here"


@pytest.mark.data
@pytest.mark.parametrize("name", ["headct", "flair"])
def test_sprites_are_as_large_as_they_say_in_pixels_of_the_model(name: str, real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(ROOT / "training" / "configs" / f"{name}.toml")
    manifest = load_bundle(config.bundle_folder).manifest
    areas = [
        int(a) for case in islice(synthetic(config, manifest, "validation"), 4) for a in case.truth.sum(axis=(1, 2))
    ]
    radii = np.sqrt(np.array([a for a in areas if a]) / np.pi)
    # A fitted head is a little larger or smaller than the typical one, and the brain's edge cuts some of them.
    assert 0.7 * RADIUS_PIXELS[0] < np.median(radii) < 1.15 * RADIUS_PIXELS[1]
    assert radii.max() < 1.4 * RADIUS_PIXELS[1]
