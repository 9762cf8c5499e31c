"""Contract of a detection method. Every entry of the registry must fulfil it.

A method returns a `Detection` that follows these rules:

- Shapes and dtypes are those of the docstring of `Detection`: a KL map in latents, maps in pixels, one pair of
  `median_kl_range` for each time step of the out-of-distribution check, one number of reversed slices for each view.
- Slices that are not analysed, and pixels of the anomaly map outside the foreground, are NaN.
- The anomaly map is highest at the lesion. The counterpart equals the slices where nothing was changed.
- The same seed gives the same bytes. Another seed gives other noise, so the result changes, but the scan score hardly.
- The batch size changes nothing, and the volume is not changed.

A method without random noise or without a KL map does not fulfil the contract.
"""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nibabel import affines

from app.manifest import Manifest
from app.pipeline.detect import Detection
from app.pipeline.diffusion import Networks
from app.pipeline.methods import METHODS
from app.volume import Volume
from tests.support.phantom import LESION_MM

ROOT = Path(__file__).parents[2]
ARRAYS = ("kl", "latent_mask", "counterpart", "anomaly", "analysed")


def run(volume: Volume, networks: Networks, manifest: Manifest, seed: int | None = None) -> Detection:
    """Analyse a volume with the method of a manifest."""
    return METHODS[manifest.method](volume, networks, manifest, seed)


@pytest.fixture(scope="module", params=sorted(METHODS))
def manifest_of_method(request: pytest.FixtureRequest, manifest: Manifest) -> Manifest:
    """Return the tiny manifest with each method in turn."""
    return manifest.model_copy(update={"method": request.param})


@pytest.fixture(scope="module")
def detection(volume_with_lesion: Volume, networks: Networks, manifest_of_method: Manifest) -> Detection:
    return run(volume_with_lesion, networks, manifest_of_method)


def to_bytes(d: Detection) -> bytes:
    arrays = [getattr(d, name).tobytes() for name in ARRAYS]
    return b"".join(arrays) + repr(replace(d.scores, slices=d.scores.slices.tolist())).encode()


def test_default_method_is_registered(manifest: Manifest) -> None:
    assert manifest.method in METHODS


def test_maps_have_the_shape_of_the_slices(detection: Detection, manifest_of_method: Manifest) -> None:
    d, count = detection, len(detection.slices.x)
    assert d.slices.x.shape == (count, 1, *manifest_of_method.preprocessing.shape)
    assert d.slices.x.dtype == d.kl.dtype == d.counterpart.dtype == d.anomaly.dtype == np.float32
    assert d.analysed.shape == (count,)
    assert d.kl.shape == d.latent_mask.shape == (count, *manifest_of_method.latent_shape[1:])
    assert d.counterpart.shape == d.anomaly.shape == (count, *manifest_of_method.preprocessing.shape)
    assert d.scores.slices.shape == (int(d.analysed.sum()),)
    assert len(d.scores.median_kl_range) == len(manifest_of_method.ood.timesteps)
    assert len(d.reversed_slices) == len(manifest_of_method.views)
    assert all(0 <= n <= d.analysed.sum() for n in d.reversed_slices)


def test_slices_that_are_not_analysed_are_nan(detection: Detection) -> None:
    d = detection
    assert 0 < d.analysed.sum() < len(d.analysed)
    for values in (d.kl, d.counterpart, d.anomaly):
        assert np.isnan(values[~d.analysed]).all()
    assert not d.latent_mask[~d.analysed].any()
    assert not np.isfinite(d.anomaly[~d.slices.foreground]).any()
    assert np.isfinite(d.counterpart[d.analysed]).all()


def test_lesion_is_found(detection: Detection) -> None:
    above = np.argwhere(np.nan_to_num(detection.anomaly) > 0.5 * np.nanmax(detection.anomaly))
    centroid = affines.apply_affine(detection.slices.grid.affine, above).mean(axis=0)
    assert centroid == pytest.approx(LESION_MM, abs=5.0)


def test_counterpart_equals_the_slices_where_nothing_was_changed(detection: Detection) -> None:
    d = detection
    changed = d.latent_mask.any(axis=(1, 2))
    assert changed.any()
    same = d.analysed & ~changed
    np.testing.assert_array_equal(d.counterpart[same], d.slices.x[same, 0])
    outside = ~d.slices.foreground & d.analysed[:, None, None]
    np.testing.assert_array_equal(d.counterpart[outside], d.slices.x[:, 0][outside])
    assert np.nanmin(d.counterpart) >= 0
    assert np.nanmax(d.counterpart) <= 1


def test_result_is_deterministic(
    volume_with_lesion: Volume, networks: Networks, manifest_of_method: Manifest, detection: Detection
) -> None:
    assert to_bytes(run(volume_with_lesion, networks, manifest_of_method)) == to_bytes(detection)
    assert to_bytes(run(volume_with_lesion, networks, manifest_of_method, seed=manifest_of_method.seed)) == to_bytes(
        detection
    )


def test_result_does_not_depend_on_the_batch_size(
    volume_with_lesion: Volume, networks: Networks, manifest_of_method: Manifest, detection: Detection
) -> None:
    """The noise of a slice must be keyed by its index."""
    for size in (1, 7, 16):
        batched = networks.in_batches(size, lambda _: None)
        assert to_bytes(run(volume_with_lesion, batched, manifest_of_method)) == to_bytes(detection)


def test_seed_of_the_caller_replaces_that_of_the_manifest(
    volume_with_lesion: Volume, networks: Networks, manifest_of_method: Manifest, detection: Detection
) -> None:
    other = run(volume_with_lesion, networks, manifest_of_method, seed=0)
    assert to_bytes(other) != to_bytes(detection)
    # Twenty times the largest difference of 12 seeds with the default method, 0.5 %.
    assert other.scores.scan == pytest.approx(detection.scores.scan, rel=0.1)


def test_scan_is_not_changed(volume_with_lesion: Volume, networks: Networks, manifest_of_method: Manifest) -> None:
    before = volume_with_lesion.array.copy()
    run(volume_with_lesion, networks, manifest_of_method)
    np.testing.assert_array_equal(volume_with_lesion.array, before)


# ---- use of the registry -----------------------------------------------------------------------


def parse_modules(*packages: str) -> Iterator[tuple[str, ast.Module]]:
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def names_defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_only_the_registry_imports_a_method() -> None:
    """A module that imports `detect` would evaluate a bundle of another method with the default method."""
    importers = [
        name
        for name, module in parse_modules("app", "training", "benchmarks")
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module == "app.pipeline.detect"
        if any(alias.name == "detect" for alias in node.names)
    ]
    assert importers == ["app/pipeline/methods.py"]


def test_the_name_of_the_registry_is_unique() -> None:
    modules = parse_modules("app", "training", "benchmarks", "tests")
    found = [name for name, module in modules for node in module.body if "METHODS" in names_defined_by(node)]
    assert found == ["app/pipeline/methods.py"]
