"""Stage 5: write the bundle: graphs, golden pair, manifest and model card, and the figures of its training."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from app import __version__
from app.manifest import File, Files, Latent, Licence, Manifest, Provenance, View
from app.pipeline.out_of_distribution import SAMPLED_SLICES
from app.runtime.bundle import CARD, MANIFEST, load_bundle
from training import export
from training.calibrate import SOLIDITY_PERCENTILE, calibration_path
from training.config import ROOT, Config, parse_config
from training.data import load_split
from training.export import INT8, Parity, check_parity, graphs_folder, trained_networks
from training.plots import draw_curves, draw_validation, read_curve

FILES = {"encoder": "encoder.onnx", "denoiser": "denoiser.onnx", "decoder": "decoder.onnx", "golden": "golden.npz"}
MAX_BYTES = 25_000_000
CARD_TEMPLATE = Path(__file__).with_name("MODEL_CARD.template.md")


def bundle_files(config: Config) -> dict[str, str]:
    """Return the file names of a bundle by their field in the manifest."""
    return FILES | ({"denoiser_int8": INT8} if config.export.int8 else {})


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_manifest(config: Config, folder: Path, provenance: export.Provenance) -> Manifest:
    """Return the manifest from the configuration, the calibration and the files in a folder."""
    calibrated = json.loads(calibration_path(config).read_text(encoding="utf-8"))
    split = load_split(config.data.splits)
    b = config.bundle
    return Manifest(
        name=config.name,
        version=config.version,
        title=b.title,
        intended_use=b.intended_use,
        modality=b.modality,
        sequence=b.sequence,
        named_only=b.named_only,
        method=config.detection.method,
        preprocessing=config.preprocessing,
        latent=Latent(channels=config.latent_channels, downsampling=config.downsampling),
        schedule=config.schedule,
        seed=config.seed,
        views=config.detection.views,
        files=Files(**{k: File(name=n, sha256=sha256(folder / n)) for k, n in bundle_files(config).items()}),
        licence=Licence(data=b.data, licence=b.licence, attribution=b.attribution, non_commercial=b.non_commercial),
        provenance=Provenance(
            code_version=__version__,
            config_sha256=config.sha256,
            data_sha256=provenance["denoiser"]["data"],
            split=config.data.splits,
            train_subjects=len(split.train),
            validation_subjects=len(split.validation),
            seed=config.seed,
            vqvae_steps=int(provenance["vqvae"]["step"]),
            denoiser_steps=int(provenance["denoiser"]["step"]),
            warm_start=config.denoiser.warm_start,
        ),
        **calibrated,
    )


def write_bundle(config: Config, models: Path = ROOT / "models") -> Path:
    """Write the bundle, load it as serving does, and draw its figures.

    Raises
    ------
    SystemExit
        The bundle is larger than `MAX_BYTES`.
    """
    networks, provenance = trained_networks(config)
    parity = check_parity(config, networks, graphs_folder(config))
    folder = models / f"{config.name}-{config.version}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INT8).unlink(missing_ok=True)
    for name in bundle_files(config).values():
        shutil.copyfile(graphs_folder(config) / name, folder / name)
    manifest = make_manifest(config, folder, provenance)
    (folder / MANIFEST).write_text(manifest.to_json())
    (folder / CARD).write_text(model_card(config, manifest, parity))
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(
            f"{folder.name} has {size / 1e6:.1f} MB. Expected at most {MAX_BYTES / 1e6:.0f} MB. Use smaller networks."
        )
    bundle = load_bundle(folder)
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    # If a stage was not trained in this version, the curves of the version it starts from remain.
    if config.denoiser.steps and (config.vqvae is None or config.vqvae.steps):
        draw_curves(config, figures / f"{config.name}-curves.png")
    # Images of non-commercial data stay out of the repository.
    destination = config.run_folder if config.bundle.non_commercial else figures
    draw_validation(config, bundle, destination / f"{config.name}-validation.png")
    return folder


def model_card(config: Config, manifest: Manifest, parity: Parity) -> str:
    """Fill the template of the model card from the configuration and the manifest."""
    channels, h, w = manifest.latent_shape
    rows, columns = manifest.preprocessing.shape
    spacing = " x ".join(f"{s:g}" for s in manifest.preprocessing.spacing_mm)
    return CARD_TEMPLATE.read_text(encoding="utf-8").format(
        m=manifest,
        p=manifest.provenance,
        prep=manifest.preprocessing,
        split=config.data.splits,
        test=len(load_split(config.data.splits).test),
        rows=rows,
        columns=columns,
        head_box=_head_box(manifest),
        card=config.bundle.card.format(m=manifest, spacing=spacing).strip(),
        spacing=spacing,
        channels=channels,
        h=h,
        w=w,
        training=_training(config, manifest),
        **_autoencoder(config),
        parity=parity,
        int8=_int8(parity),
        subjects=", ".join(manifest.calibration.subjects),
        empty=config.detection.empty_slice_fraction,
        kl_steps=", ".join(map(str, manifest.kl.timesteps)),
        reverse_steps=", ".join(map(str, manifest.reverse.timesteps)),
        views=len(manifest.views),
        view_names=", ".join(map(_view_name, manifest.views)),
        kl_mean=f", {manifest.kl.mean} mean" if len(manifest.kl.timesteps) > 1 else "",
        alpha_bar=" down to ".join(map(str, dict.fromkeys(manifest.kl.alpha_bar))),
        weighting=_weighting(manifest),
        simulated=_simulated(manifest),
        ood=_ood(config, manifest),
        low=manifest.preprocessing.extent_mm[0],
        high=manifest.preprocessing.extent_mm[1],
    )


def _autoencoder(config: Config) -> dict[str, str]:
    """Return the card's texts on the latents: those of a VQ-VAE, or blocks of pixels."""
    if config.pixel_latents is not None:
        fold = config.pixel_latents.fold
        text = f"; each latent is a block of {fold} x {fold} pixels, without an autoencoder"
        return {"latents": "pixels", "codes": text, "reconstruction": ""}
    curve = read_curve(config.run_folder / "vqvae.csv")
    used, l1 = int(curve["val_codes_used"][-1]), curve["val_l1_foreground"][-1]
    return {
        "latents": "a VQ-VAE",
        "codes": f"; {used} of {config.vqvae_settings.codes} codes used on validation slices",
        "reconstruction": f"| reconstruction error | {l1:.4f} of the intensity range (L1, foreground of validation "
        "slices) |\n",
    }


def _ood(config: Config, manifest: Manifest) -> str:
    """Return the card's rows on the KL scores of the out-of-distribution check."""
    start, refused, minimum = "| out-of-distribution check,", config.detection.ood_refused_share, SAMPLED_SLICES
    lines = [
        f"{start} median KL of a slice at t = {t} | {r.low} to {r.high} "
        f"| prediction interval; all scores together refuse {refused:.0%} of healthy scans |"
        for t, r in zip(manifest.ood.timesteps, manifest.ood.median_kl_range, strict=True)
    ]
    share, healthy = manifest.ood.max_outlier_slice_fraction, manifest.calibration.slice_score
    if share is not None:
        lines.append(
            f"{start} outlier slice fraction | at most {share:.0%} of the slices | mean KL outside {healthy.low} to "
            f"{healthy.high} nats; replaces the median KL for a scan of fewer than {minimum} slices |"
        )
    if manifest.ood.min_solidity is not None:
        lines.append(
            f"{start} solidity of the outline | median over slices at least {manifest.ood.min_solidity} "
            f"| percentile {SOLIDITY_PERCENTILE:g} of healthy slices |"
        )
    if manifest.ood.min_white_matter_contrast is not None:
        lines.append(
            f"{start} white matter, divided by all tissue | at least {manifest.ood.min_white_matter_contrast} "
            "| halfway between 1 and the lower end of the prediction interval of healthy scans |"
        )
    return "\n".join(lines)


def _training(config: Config, manifest: Manifest) -> str:
    """Return the card's text on the training steps of this version and its start weights."""
    p, decision = manifest.provenance, "docs/decisions/0005-noise-levels-in-training.md"
    is_other = bool(p.warm_start) and (ROOT / "models" / p.warm_start).is_dir()
    earlier = p.warm_start if is_other else f"{manifest.name}-{p.warm_start}"
    weights = "weights of the same shape" if is_other else "weights"
    if not p.vqvae_steps and not p.denoiser_steps:
        return f"none in this version: the networks are those of {earlier} ({decision})"
    start = f", from the {weights} of {earlier} ({decision})" if p.warm_start else ""
    vqvae = f"VQ-VAE {p.vqvae_steps} steps of {config.vqvae_settings.batch}, " if p.vqvae_steps else ""
    return f"{vqvae}denoiser {p.denoiser_steps} steps of {config.denoiser.batch}{start}, seed {p.seed}"


def _int8(parity: Parity) -> str:
    """Return the card's row on the denoiser in int8; empty without one."""
    if parity.int8 is None:
        return ""
    return (
        "\n| on a CPU | the convolutions of the denoiser compute in int8, which adds "
        f"{parity.int8:.1%} to the squared error of the predicted noise |"
    )


def _view_name(view: View) -> str:
    """Return the card's name of a view."""
    parts = ["mirrored"] * view.mirrored + ["shifted by one pixel"] * any(view.shift)
    return " and ".join(parts) or "identity"


def _weighting(manifest: Manifest) -> str:
    """Return the card's text on the weights and the median filter of the residual."""
    r = manifest.residual
    parts = {
        f", divided by {r.contrast_floor:g} plus the local contrast": bool(r.contrast_floor),
        ", multiplied by the intensity": r.weighted_by_intensity,
        f", median of {r.median_pixels} x {r.median_pixels} pixels": r.median_pixels > 1,
    }
    return "".join(text for text, used in parts.items() if used)


def _simulated(manifest: Manifest) -> str:
    """Return the card's text on the volume of findings that the threshold allows on simulated scanners."""
    limit = manifest.residual.simulated_false_positive_ml
    return "" if limit is None else f", and on simulated scanners at most {limit:g} ml"


def _head_box(manifest: Manifest) -> str:
    """Return the card's text on the head box. It is empty if there is no head box."""
    box = manifest.preprocessing.head_box
    if box is None:
        return ""
    reach = "" if box.reach_mm is None else f"; reach {box.reach_mm:g} mm below the top of the head"
    return f" for a typical head: every head is stretched in its planes to {box.rows:g} x {box.columns:g} pixels{reach}"


if __name__ == "__main__":
    sys.stdout.write(f"{write_bundle(parse_config(__doc__)).name}\n")
