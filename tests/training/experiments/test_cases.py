"""What is called healthy in a case is healthy: real tumours of validation patients lie in no judged slice."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from app.runtime.bundle import load_bundle
from training.config import ROOT, Config
from training.experiments.cases import synthetic
from training.tumours import load_tumour_scan


@pytest.mark.data
def test_sprites_are_judged_in_slices_without_a_tumour(real_scans: Path) -> None:
    assert real_scans.exists()
    config = Config.load(ROOT / "training" / "configs" / "flair.toml")
    manifest = load_bundle(config.bundle_folder).manifest
    ill = 0
    for case in islice(synthetic(config, manifest, "validation"), 3):
        real = load_tumour_scan(config, case.subject)
        tumour = case.slices.placement.from_source(real.truth.astype(np.float32)).max(axis=(1, 2)) > 0
        ill += int(tumour.sum())
        assert not tumour[case.known].any(), f"a tumour of {case.subject} is judged"
        assert case.truth.any(), "no sprite in what is left"
    assert ill, "patients without a tumour show nothing here"
