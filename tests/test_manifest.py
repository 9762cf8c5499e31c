"""Manifest: it is read as it was written, or refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from app.manifest import Manifest, Range
from app.runtime.bundle import shipped_models
from tests.support.bundle import tiny_manifest

Change = Callable[[dict[str, Any]], object]


def read_changed(change: Change) -> Manifest:
    """Change the JSON of the tiny manifest and read it."""
    data = json.loads(tiny_manifest().model_dump_json())
    change(data)
    return Manifest.model_validate_json(json.dumps(data))


def test_manifest_is_read_as_it_was_written() -> None:
    manifest = tiny_manifest()
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert read_changed(lambda _: None) == manifest


OPTIONAL: dict[str, Change] = {
    "method": lambda m: m.pop("method"),
    "views": lambda m: m.pop("views"),
    "window": lambda m: m["preprocessing"].pop("window"),
    "head box": lambda m: m["preprocessing"].pop("head_box"),
    "brain only": lambda m: m["preprocessing"].pop("brain_only"),
    "denoiser in int8": lambda m: m["files"].pop("denoiser_int8"),
    "non-commercial": lambda m: m["licence"].pop("non_commercial"),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_fields_have_defaults(name: str) -> None:
    assert read_changed(OPTIONAL[name]) == tiny_manifest()


def test_ct_may_have_a_window_instead_of_a_percentile() -> None:
    changed = read_changed(lambda m: (m.update(modality="CT"), m["preprocessing"].update(WINDOW)))
    assert changed.preprocessing.window == (0.0, 80.0)


def test_denoiser_in_int8_needs_one_in_float32() -> None:
    int8 = {"name": "denoiser.int8.onnx", "sha256": "0" * 64}
    assert read_changed(lambda m: m["files"].update(denoiser_int8=int8)).files.denoiser_int8 is not None
    with pytest.raises(ValidationError):
        read_changed(lambda m: (m["files"].update(denoiser_int8=int8), m.update(precision="float16")))


def test_preprocessing_may_have_a_head_box() -> None:
    box = read_changed(lambda m: m["preprocessing"].update(head_box=HEAD_BOX)).preprocessing.head_box
    assert box is not None
    assert (box.rows, box.columns, box.reach_mm) == (48, 40, None)


def test_derived_properties() -> None:
    manifest = tiny_manifest()
    assert manifest.id == "tiny-0.0.1"
    assert manifest.latent_shape == (3, 16, 14)
    assert manifest.preprocessing.voxel_ml == 0.027


def test_range_contains_its_ends() -> None:
    healthy = Range(low=1.0, high=2.0)
    assert [healthy.contains(v) for v in (0.999, 1.0, 1.5, 2.0, 2.001)] == [False, True, True, True, False]
    assert not healthy.contains(float("nan"))


def test_manifest_is_frozen() -> None:
    manifest = tiny_manifest()
    with pytest.raises(ValidationError, match="frozen"):
        manifest.kl.threshold = 1.0  # type: ignore[misc]


HEAD_BOX = {"rows": 48, "columns": 40, "foreground_level": 0.3}
WINDOW = {"window": [0.0, 80.0], "intensity_percentile": None, "intensity_level": None}
REFUSED: dict[str, Change] = {
    "an unknown field": lambda m: m.update(colour="red"),
    "an unknown field in a part": lambda m: m["kl"].update(colour="red"),
    "an unknown format version": lambda m: m.update(format_version=2),
    "a missing part": lambda m: m.pop("ood"),
    "a name with a slash": lambda m: m.update(name="../tiny"),
    "a name in capitals": lambda m: m.update(name="Tiny"),
    "an unknown modality": lambda m: m.update(modality="PET"),
    "a time step of 0": lambda m: m["kl"].update(timesteps=[0, 500]),
    "a time step of T": lambda m: m["kl"].update(timesteps=[500, 1000]),
    "a reverse time step of 0": lambda m: m["reverse"].update(timesteps=[500, 0]),
    "no noise levels": lambda m: m["kl"].update(timesteps=[]),
    "no reverse steps": lambda m: m["reverse"].update(timesteps=[]),
    "reverse steps that ascend": lambda m: m["reverse"].update(timesteps=[100, 500]),
    "a repeated reverse step": lambda m: m["reverse"].update(timesteps=[500, 500, 100]),
    "a shape that is not a multiple of the down-sampling": lambda m: m["preprocessing"].update(shape=[63, 56]),
    "a reversed range": lambda m: m["ood"].update(reconstruction_range={"low": 2.0, "high": 1.0}),
    "a noise level without a range": lambda m: m["ood"].update(timesteps=[400, 500]),
    "no intensity mapping": lambda m: m["preprocessing"].update(intensity_level=None),
    "a window and a percentile": lambda m: (m.update(modality="CT"), m["preprocessing"].update(window=[0.0, 80.0])),
    "a window of an MR": lambda m: m["preprocessing"].update(WINDOW),
    "a head box larger than the slice": lambda m: m["preprocessing"].update(head_box={**HEAD_BOX, "rows": 65}),
    "an empty head box": lambda m: m["preprocessing"].update(head_box={**HEAD_BOX, "columns": 0}),
    "a head box for brains": lambda m: m["preprocessing"].update(head_box=HEAD_BOX, brain_only=True),
    "a reversed window": lambda m: (m.update(modality="CT"), m["preprocessing"].update(WINDOW, window=[80.0, 0.0])),
    "a median filter of even side": lambda m: m["residual"].update(median_pixels=4),
    # No value exceeds NaN, so every scan would be healthy.
    "a threshold of NaN": lambda m: m["kl"].update(threshold=float("nan")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_manifest_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        read_changed(REFUSED[name])


def test_default_method_is_not_written() -> None:
    """A bundle that was written before methods were registered keeps its bytes."""
    path = next(shipped_models().glob("headct-[0-9]*/manifest.json"))
    assert Manifest.model_validate_json(path.read_text()).to_json() == path.read_text()
    other = tiny_manifest().model_copy(update={"method": "another"})
    assert Manifest.model_validate_json(other.to_json()) == other
