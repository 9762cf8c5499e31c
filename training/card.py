"""The model card, from the manifest: no number in it is typed by hand."""

from pathlib import Path

from app.manifest import Manifest
from training.config import Config
from training.export import Parity
from training.figures import read_curve
from training.splits import load_split

TEMPLATE = Path(__file__).with_name("MODEL_CARD.template.md")


def write_card(path: Path, config: Config, manifest: Manifest, parity: Parity) -> None:
    """Write MODEL_CARD.md."""
    split = load_split(config.data.splits)
    curve = read_curve(config.run_folder / "vqvae.csv")
    channels, h, w = manifest.latent_shape
    rows, columns = manifest.preparation.shape
    path.write_text(
        TEMPLATE.read_text().format(
            m=manifest,
            p=manifest.provenance,
            prep=manifest.preparation,
            split=config.data.splits,
            test=len(split.test),
            rows=rows,
            columns=columns,
            spacing=" x ".join(f"{s:g}" for s in manifest.preparation.spacing_mm),
            channels=channels,
            h=h,
            w=w,
            codes=config.vqvae.codes,
            codes_used=int(curve["val_codes_used"][-1]),
            vq_batch=config.vqvae.batch,
            batch=config.denoiser.batch,
            l1=curve["val_l1_foreground"][-1],
            parity=parity,
            flipped=parity.decoder_flipped,
            subjects=", ".join(manifest.calibration.subjects),
            empty=config.detection.empty_share,
            kl_steps=", ".join(map(str, manifest.kl.timesteps)),
            reverse_steps=", ".join(map(str, manifest.reverse.timesteps)),
            ab_low=manifest.kl.alpha_bar[0],
            ab_high=manifest.kl.alpha_bar[1],
            deviations=config.detection.gate_deviations,
            low=manifest.preparation.extent_mm[0],
            high=manifest.preparation.extent_mm[1],
        )
    )
