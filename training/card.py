"""The model card, from the manifest: no number in it is typed by hand."""

from pathlib import Path

from app.manifest import Manifest
from app.pipeline.ood import SAMPLED_SLICES
from training.config import Config
from training.export import Parity
from training.figures import read_curve
from training.splits import load_split

TEMPLATE = Path(__file__).with_name("MODEL_CARD.template.md")
# What each bundle cannot do, in words: one file a name.
LIMITS = Path(__file__).with_name("limits")


def write_card(path: Path, config: Config, manifest: Manifest, parity: Parity) -> None:
    """Write MODEL_CARD.md."""
    split = load_split(config.data.splits)
    curve = read_curve(config.run_folder / "vqvae.csv")
    channels, h, w = manifest.latent_shape
    rows, columns = manifest.preprocessing.shape
    spacing = " x ".join(f"{s:g}" for s in manifest.preprocessing.spacing_mm)
    path.write_text(
        TEMPLATE.read_text().format(
            m=manifest,
            p=manifest.provenance,
            prep=manifest.preprocessing,
            split=config.data.splits,
            test=len(split.test),
            rows=rows,
            columns=columns,
            fit=_fit(manifest),
            limits=LIMITS.joinpath(f"{manifest.name}.md").read_text().format(m=manifest, spacing=spacing).rstrip(),
            spacing=spacing,
            channels=channels,
            h=h,
            w=w,
            codes=config.vqvae.codes,
            codes_used=int(curve["val_codes_used"][-1]),
            learnt=_learnt(config, manifest),
            l1=curve["val_l1_foreground"][-1],
            parity=parity,
            flipped=parity.decoder_flipped,
            int8=_int8(parity),
            subjects=", ".join(manifest.calibration.subjects),
            empty=config.detection.empty_share,
            kl_steps=", ".join(map(str, manifest.kl.timesteps)),
            reverse_steps=", ".join(map(str, manifest.reverse.timesteps)),
            views=len(manifest.views),
            kl_mean=f", {manifest.kl.mean} mean" if len(manifest.kl.timesteps) > 1 else "",
            ab=" down to ".join(map(str, dict.fromkeys(manifest.kl.alpha_bar))),
            weighing=_weighing(manifest),
            gate="\n".join(
                f"| gate, median KL of some slice at t = {t} | {r.low} to {r.high} "
                f"| but for {config.detection.gate_refused:.0%} of "
                "healthy scans, over all scores (Student's t, logarithms) |"
                for t, r in zip(manifest.gate.timesteps, manifest.gate.median_kl_range, strict=True)
            )
            + _slices_out(manifest),
            low=manifest.preprocessing.extent_mm[0],
            high=manifest.preprocessing.extent_mm[1],
        )
    )


def _slices_out(manifest: Manifest) -> str:
    """The gate's line on single slices, where it asks them."""
    share, healthy = manifest.gate.max_outlier_slice_fraction, manifest.calibration.slice_score
    if share is None:
        return ""
    rule = f"of {healthy.low} to {healthy.high} nats; of a scan of under {GATE_SLICES} slices in place of the medians"
    return f"\n| gate, slices whose mean KL is out of range | at most {share:.0%} | {rule} |"


def _learnt(config: Config, manifest: Manifest) -> str:
    """What the networks learnt in this version, and whose weights they began with."""
    p = manifest.provenance
    earlier = f"{manifest.name}-{p.warm_start}"
    if not p.vqvae_steps and not p.denoiser_steps:
        return f"none in this version: the networks are those of {earlier} (docs/decisions/0005)"
    after = f" after those of {earlier}, docs/decisions/0005" if p.warm_start else ""
    vqvae = f"VQ-VAE {p.vqvae_steps} steps of {config.vqvae.batch}, " if p.vqvae_steps else ""
    return f"{vqvae}denoiser {p.denoiser_steps} steps of {config.denoiser.batch}{after}, seed {p.seed}"


def _int8(parity: Parity) -> str:
    """The line of the denoiser in int8, where there is one."""
    if parity.int8 is None:
        return ""
    return (
        "\n| on a CPU | the denoiser's convolutions compute in int8; that adds "
        f"{parity.int8:.1%} to the squared error of the predicted noise |"
    )


def _weighing(manifest: Manifest) -> str:
    """What the residual is divided and multiplied by, in words."""
    settings = manifest.residual
    divided = f", over {settings.contrast_floor:g} plus the local contrast" if settings.contrast_floor else ""
    side = settings.median_pixels
    median = f", median of {side} x {side} pixels" if side > 1 else ""
    return divided + _weights(manifest) + median


def _weights(manifest: Manifest) -> str:
    settings = manifest.residual
    kl = ", weighted by KL" if settings.weighted_by_kl else ""
    return kl + (", times the intensity" if settings.weighted_by_intensity else "")


def _fit(manifest: Manifest) -> str:
    """What a head is stretched to, in words."""
    fit = manifest.preprocessing.fit
    if fit is None:
        return ""
    reach = "" if fit.reach_mm is None else f"; not further than {fit.reach_mm:g} mm below its top"
    size = f"{fit.rows:g} x {fit.columns:g} pixels"
    return f" for a typical head: every head is stretched in its planes to {size}{reach}"
