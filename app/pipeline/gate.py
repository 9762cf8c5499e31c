"""Which scans are the kind of image that the model knows (METHOD, step 7; decision 2)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.errors import OutOfDistribution
from app.manifest import Gate, Manifest, Range
from app.pipeline import anomaly
from app.pipeline.models import Models
from app.pipeline.prepare import BoolArray
from app.pipeline.seen import Seen
from app.volume import FloatArray

# The gate decodes this many slices, spread over the scan, to see whether the autoencoder knows them.
GATE_SLICES = 8


@dataclass(frozen=True, eq=False)
class Scores:
    """What the gate looks at, and what a report tells.

    Attributes
    ----------
    scan : float
        Mean KL over the foreground latents of the analysed slices, nats.
    slices : (K,) ndarray
        The same for each analysed slice; NaN where it has no foreground latent.
    typical : tuple of (float, float)
        Median KL of a slice at each of the gate's noise levels, least and greatest over some slices.
    reconstruction : float
        Mean |x - D(z0)| over the foreground of some slices.
    fraction_out : float
        Share of foreground latents outside the healthy range of a latent.
    """

    scan: float
    slices: FloatArray
    typical: tuple[tuple[float, float], ...]
    reconstruction: float
    fraction_out: float


def gate_slices(count: int) -> npt.NDArray[np.int64]:
    """Which of so many slices the gate decodes."""
    return np.unique(np.linspace(0, count - 1, GATE_SLICES).round().astype(np.int64))


def typical_kl(seen: Seen, timesteps: tuple[int, ...]) -> tuple[tuple[float, float], ...]:
    """Median KL of a slice's foreground latents, least and greatest over the slices of the gate, in nats.

    One pair at each noise level: low levels see texture, high ones anatomy and contrast, and another
    sequence differs in one or the other. A lesion raises the median of its own slices too, since the
    network sees a slice as a whole: the least one is that of a slice without it.
    """
    some = gate_slices(len(seen.x))
    some = some[seen.latents[some].any(axis=(1, 2))]

    def medians(t: int) -> list[float]:
        kl = anomaly.kl_map(seen.z0[some], seen.known[some], seen.diffusion, (t,))
        return [float(np.median(k[inside])) for k, inside in zip(kl, seen.latents[some], strict=True)] or [float("nan")]

    # numpy's least and greatest, not Python's: NaN, of a model gone wrong, stays NaN.
    return tuple((float(np.min(m)), float(np.max(m))) for m in map(medians, timesteps))


def reconstruction_error(seen: Seen, models: Models) -> float:
    """Mean |x - D(z0)| over the foreground of the gate's slices."""
    some = gate_slices(len(seen.x))
    return float(np.abs(models.decode(seen.z0[some]) - seen.x[some])[:, 0][seen.foreground[some]].mean())


def image_scores(kl: FloatArray, seen: Seen, models: Models, gate: Gate) -> Scores:
    """Image-wise scores of the analysed slices (K) with their KL map (K, h, w)."""
    inside = kl[seen.latents]
    out = (inside < gate.latent.low) | (inside > gate.latent.high)
    return Scores(
        scan=anomaly.score(kl, seen.latents),
        slices=slice_scores(kl, seen.latents),
        typical=typical_kl(seen, gate.timesteps),
        reconstruction=reconstruction_error(seen, models),
        fraction_out=float(out.mean()),
    )


def slice_scores(kl: FloatArray, latents: BoolArray) -> FloatArray:
    """Mean KL over the foreground latents of each slice, (K,), nats; NaN where it has none."""
    scores = [anomaly.score(k, f) if f.any() else np.nan for k, f in zip(kl, latents, strict=True)]
    return np.array(scores, np.float32)


def check_gate(scores: Scores, manifest: Manifest) -> None:
    """Refuse a scan that the model does not know everywhere, rather than segment it.

    Raises
    ------
    OutOfDistribution
        A score is outside the healthy range, on either side; the typical KL, in every slice; the mean KL of a slice, in
        more slices than the manifest accepts.
    """
    gate, few = manifest.gate, len(scores.slices) < GATE_SLICES
    # Extremes over a few slices are not those of a stack: where the gate asks each slice, that says enough.
    reasons = [] if few and gate.max_slices_out is not None else _untypical(scores, gate)
    if gate.max_slices_out is not None:
        healthy = manifest.calibration.slice_score
        out = slices_out(scores.slices, healthy)
        if out > gate.max_slices_out:
            reasons.append(
                f"{out:.0%} of its slices have a mean KL outside {healthy.low:.3g} to {healthy.high:.3g}, "
                f"at most {gate.max_slices_out:.0%} are accepted"
            )
    if not gate.reconstruction.holds(scores.reconstruction):
        reasons.append(
            f"its reconstruction error is {scores.reconstruction:.3g}, "
            f"healthy scans span {gate.reconstruction.low:.3g} to {gate.reconstruction.high:.3g}"
        )
    if scores.fraction_out > gate.max_fraction_out:
        reasons.append(
            f"{scores.fraction_out:.0%} of its latents are outside the healthy range, at most "
            f"{gate.max_fraction_out:.0%} are accepted"
        )
    if reasons:
        raise OutOfDistribution(
            "The scan as a whole does not look like what the model was trained on: " + "; ".join(reasons) + ".",
            expected="the sequence, body part and preparation that the model's card names.",
            advice=("Send the whole series: one slice, or a few, say little. " if few else "")
            + "Check that the right series was sent, prepared as the model card says, or choose another model.",
        )


def _untypical(scores: Scores, gate: Gate) -> list[str]:
    """Noise levels at which no slice is as surprising as slices of healthy scans are."""
    return [
        f"the median KL of its slices at t = {t} spans {least:.3g} to {greatest:.3g}, "
        f"healthy scans have slices between {healthy.low:.3g} and {healthy.high:.3g}"
        for t, (least, greatest), healthy in zip(gate.timesteps, scores.typical, gate.typical, strict=True)
        if not (least <= healthy.high and greatest >= healthy.low)
    ]


def slices_out(slices: FloatArray, healthy: Range) -> float:
    """Share of slices whose score, (K,), is none of a healthy slice; one without a score is none either."""
    return float(1 - ((slices >= healthy.low) & (slices <= healthy.high)).mean())
