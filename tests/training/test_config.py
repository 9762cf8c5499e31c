"""Tests of every configuration in training/configs.

A new bundle is a configuration, a splits file and the folder in models/ that `make train` writes.
"""

import hashlib
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import training.config  # noqa: E402
from app import __version__  # noqa: E402
from app.manifest import DEFAULT_METHOD, FrozenModel, Manifest  # noqa: E402
from app.pipeline.diffusion import Schedule  # noqa: E402
from app.pipeline.methods import METHODS  # noqa: E402
from app.runtime.bundle import CARD, find_bundles, read_manifest  # noqa: E402
from training import bundle  # noqa: E402
from training.calibrate import calibration_path, residual_settings  # noqa: E402
from training.config import ROOT, SPLITS_FOLDER, Config  # noqa: E402
from training.data import load_split  # noqa: E402
from training.evaluate import PARTS  # noqa: E402
from training.export import Parity  # noqa: E402
from training.image_archive import read_exclusions  # noqa: E402
from training.networks import build_denoiser, build_vqvae  # noqa: E402
from training.quantise import noise_levels  # noqa: E402
from training.unseen_scans import UNSEEN  # noqa: E402

pytestmark = pytest.mark.training

CONFIGS = sorted((ROOT / "training" / "configs").glob("*.toml"))


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> Config:
    """Load each configuration."""
    loaded = Config.load(request.param)
    assert loaded.name == request.param.stem
    return loaded


def test_split_exists_and_is_disjoint(config: Config) -> None:
    split = load_split(config.data.splits)
    parts = [set(split.train), set(split.validation), set(split.test)]
    assert all(parts)
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert len(split.validation) >= 3, "the calibration needs several subjects"


def test_no_splits_file_is_unused() -> None:
    loaded = [Config.load(path) for path in CONFIGS]
    used = {c.data.splits for c in loaded} | {
        c.data.image_archive.exclusions for c in loaded if c.data.image_archive and c.data.image_archive.exclusions
    }
    # An older bundle that is still shipped names its split too.
    used |= {read_manifest(folder).provenance.split for folder in find_bundles(ROOT / "models")}
    used.add(UNSEEN)
    assert {path.name for path in SPLITS_FOLDER.iterdir()} - {"README.md"} == used


def test_exclusions_exist(config: Config) -> None:
    archive = config.data.image_archive
    if archive is not None and archive.exclusions:
        assert read_exclusions(archive.exclusions)


def test_networks_accept_the_shapes_of_the_configuration(config: Config) -> None:
    x = torch.zeros(1, 1, *config.preprocessing.shape)
    fold = config.pixel_latents.fold if config.pixel_latents else 0
    encoder = torch.nn.PixelUnshuffle(fold) if fold else build_vqvae(config).eval().encoder
    with torch.no_grad():
        z0 = encoder(x)
        epsilon = build_denoiser(config).eval()(z0, torch.zeros(1, dtype=torch.int64))
    assert z0.shape[1:] == epsilon.shape[1:] == config.latent_shape


def test_noise_levels_lie_within_the_schedule(config: Config) -> None:
    schedule = Schedule.from_settings(config.schedule)
    assert all(0 < t < len(schedule.beta) for t in noise_levels(config))
    assert config.denoiser.low_noise_below > max(config.detection.kl_timesteps)


def test_evaluation_parts_exist(config: Config) -> None:
    assert set(config.evaluation.parts) <= set(PARTS)
    assert {"healthy", "lesions"} <= set(config.evaluation.parts)


def test_code_does_not_depend_on_the_name_of_a_bundle() -> None:
    names = {f'"{path.stem}"' for path in CONFIGS}
    for path in (ROOT / "training").glob("*.py"):
        assert not [name for name in names if name in path.read_text()], path.name


def field_descriptions() -> dict[str, str | None]:
    """Return the description of each field of each section of a configuration."""
    found: dict[str, str | None] = {}
    for part in vars(training.config).values():
        if isinstance(part, type) and issubclass(part, FrozenModel) and part.__module__ == training.config.__name__:
            found |= {f"{part.__name__}.{name}": field.description for name, field in part.model_fields.items()}
    return found


def test_every_field_is_described() -> None:
    """docs/training.md refers to these descriptions."""
    assert [name for name, text in field_descriptions().items() if not text] == []


@pytest.mark.parametrize("stage", ["vqvae", "denoiser"])
def test_a_network_without_start_weights_needs_steps(config: Config, stage: str) -> None:
    values = config.model_dump()
    if values[stage] is None:  # a configuration with pixels as latents has no VQ-VAE
        values |= {"vqvae": Config.load(CONFIGS[0].with_name("t1.toml")).vqvae_settings.model_dump()}
        values["pixel_latents"] = None
    values[stage] |= {"warm_start": "", "steps": 0}
    with pytest.raises(ValueError, match="random weights"):
        Config.model_validate(values)
    values[stage]["steps"] = 1
    Config.model_validate(values)


# ---- method ------------------------------------------------------------------------------------


def with_method(config: Config, name: str) -> Config:
    values = config.model_dump()
    values["detection"]["method"] = name
    return Config.model_validate(values)


def test_method_must_be_registered(config: Config) -> None:
    with pytest.raises(ValueError, match="no detection method has this name"):
        with_method(config, "no-such-method")


def test_default_method_does_not_change_the_hash_of_a_configuration(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = with_method(config, DEFAULT_METHOD)
    before = usual.model_dump(mode="json")
    assert before["detection"].pop("method") == DEFAULT_METHOD
    text = json.dumps(before, separators=(",", ":"), ensure_ascii=False)
    assert usual.sha256 == hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setitem(METHODS, "another", METHODS[DEFAULT_METHOD])
    assert with_method(config, "another").sha256 != usual.sha256


# ---- manifest and card -------------------------------------------------------------------------


@pytest.fixture
def manifest(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Make the manifest of a shipped bundle again from the configuration and the calibrated parts."""
    shipped = read_manifest(config.bundle_folder)
    calibrated = shipped.model_dump(mode="json", include={"kl", "reverse", "residual", "ood", "calibration"})
    folder = config.bundle_folder
    monkeypatch.setattr("training.config.ROOT", tmp_path)
    calibration_path(config).parent.mkdir(parents=True)
    calibration_path(config).write_text(json.dumps(calibrated))
    p = shipped.provenance
    provenance = {
        "vqvae": {"data": p.data_sha256, "step": str(p.vqvae_steps)},
        "denoiser": {"data": p.data_sha256, "step": str(p.denoiser_steps)},
    }
    made = bundle.make_manifest(config, folder, provenance)
    monkeypatch.setitem(METHODS, "another", METHODS[DEFAULT_METHOD])
    assert bundle.make_manifest(with_method(config, "another"), folder, provenance).method == "another"
    # The hash of the configuration and the version of the code are those of the day of the training.
    then = p.model_copy(update={"config_sha256": made.provenance.config_sha256, "code_version": __version__})
    assert made == shipped.model_copy(update={"provenance": then})
    return made


def test_manifest_follows_from_the_configuration(config: Config, manifest: Manifest) -> None:
    d = config.detection
    assert (manifest.kl.timesteps, manifest.reverse.timesteps) == (d.kl_timesteps, d.reverse_timesteps)
    assert (manifest.kl.percentile, manifest.kl.smoothing_mm, manifest.kl.grow) == (
        d.kl_percentile,
        d.kl_smoothing_mm,
        d.grow,
    )
    assert manifest.ood.timesteps == d.ood_timesteps
    assert manifest.ood.max_outlier_fraction == d.ood_max_outlier_fraction
    assert manifest.ood.max_outlier_slice_fraction == d.ood_max_outlier_slice_fraction
    assert (manifest.ood.min_solidity is not None) == d.ood_checks_solidity
    assert (manifest.ood.min_white_matter_contrast is not None) == d.ood_checks_white_matter
    own = manifest.residual
    empty = [torch.zeros(3, *config.preprocessing.shape).numpy()]
    settings = residual_settings(empty, config, empty if d.simulated_scanners else ())
    assert settings.threshold == d.min_threshold
    assert settings.model_copy(update={"threshold": own.threshold, "extent_threshold": own.extent_threshold}) == own


def test_card_of_the_bundle_is_the_generated_one(
    config: Config, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare all lines except those with measurements of the training."""
    monkeypatch.setattr(bundle, "read_curve", lambda _: {"val_codes_used": [512.0], "val_l1_foreground": [0.0]})
    card = bundle.model_card(config, manifest, Parity(0.0, 0.0, 0.0, 0.0 if config.export.int8 else None))
    measured = ("| reconstruction error", "| onnxruntime against torch", "| on a CPU")
    committed = " ".join((ROOT / "models" / manifest.id / CARD).read_text().split())
    for line in card.splitlines():
        assert line.startswith(measured) or " ".join(line.split()) in committed, line
