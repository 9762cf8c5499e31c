"""Stage 5: graphs, golden pair, manifest, card and figures -> a folder under models/."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

from app import __version__
from app.manifest import File, Files, Latent, Licence, Manifest, Provenance
from app.runtime.bundle import CARD, MANIFEST, load_bundle
from training.calibrate import calibration_path
from training.card import write_card
from training.config import ROOT, Config
from training.export import INT8, check_parity, graphs_folder, trained_networks
from training.figures import draw_curves, draw_validation
from training.splits import load_split

FILES = {"encoder": "encoder.onnx", "denoiser": "denoiser.onnx", "decoder": "decoder.onnx", "golden": "golden.npz"}
MAX_BYTES = 25_000_000


def bundle_files(config: Config) -> dict[str, str]:
    """Names of the files of a bundle, by their part in its manifest."""
    return FILES | ({"denoiser_int8": INT8} if config.export.int8 else {})


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_manifest(config: Config, folder: Path, provenance: dict[str, dict[str, str]]) -> Manifest:
    """Configuration, calibration and hashes in one contract."""
    calibrated = json.loads(calibration_path(config).read_text())
    split = load_split(config.data.splits)
    b = config.bundle
    return Manifest.model_validate(
        {
            "name": config.name,
            "version": config.version,
            "title": b.title,
            "intended_use": b.intended_use,
            "modality": b.modality,
            "sequence": b.sequence,
            "preprocessing": config.preprocessing,
            "latent": Latent(channels=config.vqvae.embedding_dim, downsampling=config.downsampling),
            "schedule": config.schedule,
            "seed": config.seed,
            "views": config.detection.views,
            **calibrated,
            "files": Files(**{k: File(name=n, sha256=sha256(folder / n)) for k, n in bundle_files(config).items()}),
            "licence": Licence(
                data=b.data, licence=b.licence, attribution=b.attribution, non_commercial=b.non_commercial
            ),
            "provenance": Provenance(
                code_version=__version__,
                config_sha256=hashlib.sha256(config.model_dump_json().encode()).hexdigest(),
                data_sha256=provenance["vqvae"]["data"],
                split=config.data.splits,
                train_subjects=len(split.train),
                validation_subjects=len(split.validation),
                seed=config.seed,
                vqvae_steps=int(provenance["vqvae"]["step"]),
                denoiser_steps=int(provenance["denoiser"]["step"]),
                warm_start=config.denoiser.warm_start,
            ),
        }
    )


def write_bundle(config: Config, models: Path = ROOT / "models") -> Path:
    """Write the bundle, load it as serving does, and draw its figures."""
    networks, provenance = trained_networks(config)
    parity = check_parity(config, networks, graphs_folder(config))
    folder = models / f"{config.name}-{config.version}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INT8).unlink(missing_ok=True)
    for name in bundle_files(config).values():
        shutil.copyfile(graphs_folder(config) / name, folder / name)
    manifest = make_manifest(config, folder, provenance)
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    write_card(folder / CARD, config, manifest, parity)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_BYTES:
        raise SystemExit(f"{folder.name} has {size / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} MB may be committed.")
    bundle = load_bundle(folder)
    figures = ROOT / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    # Where a stage learnt nothing new, the figure is that of the version that it starts from.
    if config.vqvae.steps and config.denoiser.steps:
        draw_curves(config, figures / f"{config.name}-curves.png")
    # Pictures of non-commercial data stay out of the repository.
    shown = config.run_folder if config.bundle.non_commercial else figures
    draw_validation(config, bundle, shown / f"{config.name}-validation.png")
    return folder


if __name__ == "__main__":
    sys.stdout.write(f"{write_bundle(Config.load(Path(sys.argv[1]))).name}\n")
