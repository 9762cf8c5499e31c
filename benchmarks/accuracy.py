"""Best-achievable Dice and AUPRC on synthetic lesions of validation subjects, on a stated sample of slices."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from app.errors import CounterpartError
from app.pipeline import diffusion, residual
from app.pipeline.preprocess import analysed_slices, to_slices
from app.volume import Volume
from benchmarks.methods import PERCENTILE, Peers
from benchmarks.rows import UNTRAINED
from benchmarks.statistics import average_precision
from training.config import Config
from training.data import load_volume, subject_path
from training.evaluate import best_dice
from training.lesions import gold_shape, insert_lesion
from training.splits import load_split

if TYPE_CHECKING:
    from benchmarks.worker import Measured

SHAPES = ("patient11", "patient15", "patient22", "patient28", "patient09")
CONTRASTS = (0.35, -0.35)
# Of each case: so many slices with the lesion, and as many without.
SLICES = 4
# Of so many healthy validation subjects, for the paper's threshold.
HEALTHY_SLICES = 4
HEALTHY_SUBJECTS = 3


@dataclass(frozen=True, eq=False)
class Case:
    """A scan with a lesion, and its truth on its own grid."""

    volume: Volume
    truth: npt.NDArray[np.bool_]


def make_cases(config: Config) -> list[Case]:
    """Each shape and contrast in one validation subject."""
    subjects = load_split(config.data.splits).validation
    cases = []
    for i, (shape, contrast) in enumerate(itertools.product(SHAPES, CONTRASTS)):
        volume = load_volume(subject_path(config, subjects[i % len(subjects)]))
        made = insert_lesion(volume, gold_shape(shape), contrast, i)
        cases.append(Case(made.volume, made.truth))
    return cases


def chosen_slices(truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Some slices with the lesion and as many without, each evenly spread, (N, H, W) -> (K,)."""
    seen = truth.any(axis=(1, 2))
    parts = [np.flatnonzero(part) for part in (seen, ~seen)]
    picked = [p[np.unique(np.linspace(0, len(p) - 1, SLICES).round().astype(int))] for p in parts if len(p)]
    return np.sort(np.concatenate(picked))


def judge(measured: "Measured") -> dict[str, Any]:
    """Each case's numbers, or the reason why there are none."""
    row, job = measured.row, measured.job
    if not row.trained:
        return {"reason": UNTRAINED}
    config = Config.load(job.config)
    if row.sample is not None:
        measured.peers.threshold = healthy_threshold(measured.peers, config)
    dices, precisions, refused = [], [], 0
    for case in make_cases(config)[: job.cases]:
        slices = to_slices(case.volume, measured.manifest.preprocessing)
        known = analysed_slices(slices, measured.manifest.preprocessing)
        truth = slices.grid.sample_volume(case.truth.astype(np.float32))[known] > 0.5
        if not truth.any():
            continue
        picked = chosen_slices(truth)
        try:
            found = _map(measured, case.volume, slices.x[known[picked]], slices.foreground[known[picked]], picked)
        except CounterpartError:
            refused += 1
            found = np.zeros(truth[picked].shape, np.float32)
        dices.append(best_dice(found, truth[picked]))
        precisions.append(average_precision(found, truth[picked]))
    return {"dice": dices, "auprc": precisions, "refused": refused, "slices": 2 * SLICES}


def _map(measured: "Measured", volume: Volume, x: Any, foreground: Any, picked: Any) -> npt.NDArray[np.float32]:
    """A row's anomaly map of some slices."""
    if measured.row.sample is None:
        detection = measured.detect(volume)
        return np.asarray(detection.anomaly[np.flatnonzero(detection.analysed)[picked]], dtype=np.float32)
    # Judged alike: the edge of the brain counts for nobody.
    inner = residual.erode_foreground(foreground, measured.manifest.residual.erosion)
    return np.asarray(measured.peers.method(measured.row)(x, foreground) * inner, dtype=np.float32)


def healthy_threshold(peers: Peers, config: Config) -> float:
    """The paper's: a percentile of the KL of healthy validation latents."""
    values = []
    for subject in load_split(config.data.splits).validation[:HEALTHY_SUBJECTS]:
        slices = to_slices(load_volume(subject_path(config, subject)), peers.manifest.preprocessing)
        known = analysed_slices(slices, peers.manifest.preprocessing)
        some = known[np.unique(np.linspace(0, len(known) - 1, HEALTHY_SLICES + 2).round().astype(int))[1:-1]]
        latents = diffusion.latent_foreground(slices.foreground[some], peers.manifest.latent.downsampling)
        values.append(peers.latent_kl(slices.x[some])[latents])
    return float(np.percentile(np.concatenate(values), PERCENTILE))
