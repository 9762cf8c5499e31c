"""Page of the comparison of methods, and its stored results. Needs no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from training.cluster_bootstrap import IntArray, Interval, cluster_weights, crossed_weights, interval, mean, quantile
from training.experiments.markdown import bullets, format_interval, refill, table
from training.experiments.results import Record

HOME, OTHER_SCANNERS = "home", "other scanners"
# Kinds of lesions with fewer scans have no interval and no row of differences.
MIN_SCANS = 5


class LesionScores(Record):
    """Scores of one scan with a lesion, 0 to 1. `dice` is that of the mask at the calibrated threshold."""

    kind: str
    subject: str
    shape: str
    auprc: float
    best_dice: float
    dice: float


class MethodResult(Record):
    """Result of one method.

    Attributes
    ----------
    variant, smoothing : str
        Chosen on validation scans. The variant is empty for a bundle.
    threshold, extent_threshold : float
        In units of the map of the method.
    parameters : int
    evaluations_per_slice : float
        Of the denoiser, or of the network of a baseline.
    ms_per_slice : float
        Milliseconds of the networks.
    found_ml : dict of str to dict of str to float
        Millilitres of findings in healthy scans, by group and subject. Not every bundle has scans of other scanners.
    lesions : tuple of LesionScores
    code : str
        Commit.
    """

    variant: str
    smoothing: str
    threshold: float
    extent_threshold: float
    parameters: int
    evaluations_per_slice: float
    ms_per_slice: float
    found_ml: dict[str, dict[str, float]]
    lesions: tuple[LesionScores, ...]
    code: str


class Comparison(Record):
    """Results of all methods by name. The first one is the bundle, and the reference of the differences."""

    bundle: str
    bundle_sha256: str
    paper_bundle: str
    paper_sha256: str
    calibration_scans: int
    choice_scans: int
    false_positive_ml: float
    simulated_ml: float | None
    autoencoder_budget: str
    denoising_autoencoder_budget: str
    methods: dict[str, MethodResult]


def of_kinds(result: MethodResult, kinds: Sequence[str]) -> list[LesionScores]:
    """Return the scores of some kinds of lesions."""
    return [score for score in result.lesions if score.kind in kinds]


def kinds_by_size(result: MethodResult) -> tuple[list[str], list[str]]:
    """Return the kinds of lesions with enough scans for an interval, and the others, in their order."""
    kinds = list(dict.fromkeys(score.kind for score in result.lesions))
    large = [kind for kind in kinds if len(of_kinds(result, [kind])) >= MIN_SCANS]
    return large, [kind for kind in kinds if kind not in large]


def mean_score(scores: Sequence[LesionScores], score: str) -> Interval:
    """Return the mean of a score over scans, with an interval over subjects and lesion shapes."""
    return interval(mean([getattr(each, score) for each in scores]), _weights(scores))


def mean_gain(first: Sequence[LesionScores], second: Sequence[LesionScores], score: str) -> Interval:
    """Return the mean difference of a score, first minus second, with an interval over subjects and lesion shapes."""
    pairs = list(zip(first, second, strict=True))
    assert all((a.kind, a.subject) == (b.kind, b.subject) for a, b in pairs), "both have the same scans"
    return interval(mean([getattr(a, score) - getattr(b, score) for a, b in pairs]), _weights(first))


def _weights(scores: Sequence[LesionScores]) -> IntArray:
    subjects, shapes = ([getattr(each, name) for each in scores] for name in ("subject", "shape"))
    # A lesion that only one subject has varies with the subject.
    return cluster_weights(subjects, seed=0) if subjects == shapes else crossed_weights(subjects, shapes)


def median_ml(found: dict[str, float]) -> Interval:
    """Return the median volume of findings, with an interval over people."""
    return interval(quantile(list(found.values())), cluster_weights(list(found), seed=0))


# ---- text --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanTexts:
    """Sentences about the scans of one bundle."""

    holds_for: str
    test: str
    training: str = ""
    images: str = ""
    budget: str = ""
    grade: str = "lesions of grade 2"
    variants: str = "the difference and the difference divided by the local contrast"
    intensity: str = "bright, dark, or far from the median"
    earlier_version: str = ""


IMAGES_ALONE = (
    " In this calibration each image counts alone. In test scans, findings of adjacent images are joined, so that more "
    "of them reach the smallest volume of a finding."
)
TEXTS = {
    "t1": ScanTexts(
        holds_for="The numbers hold for skull-stripped T1. Lesions were inserted into scans of one scanner (ds002748), "
        "except for two patients with multiple sclerosis.",
        training=" The VQ-VAE is the exception: it was trained on ds002748 only.",
        budget=" Earlier trainings of `t1` had more.",
        test="12 healthy people of ds002748 (home). 15 healthy people of other scanners, of which no training has "
        "scans. Each person of ds002748 with one lesion shape of a patient with multiple sclerosis: in grade 2, the "
        "intensity changes by 20 % of the range of the brain, in grade 3 by 35 %; half of the lesions are bright. Two "
        "test patients with multiple sclerosis.",
        earlier_version=", next to version 1.6.0",
    ),
    "flair": ScanTexts(
        holds_for="The numbers hold for FLAIR with skull of TCGA-LGG (several hospitals). All test lesions are real.",
        training=" These are slices without a tumour of patients with a glioma.",
        images=IMAGES_ALONE,
        test="27 patients with an outlined lower-grade glioma. Slices up to 115 mm below the highest one are used. In "
        "four patients, these are more slices than in [flair](flair.md). The slices without a tumour also serve as "
        "healthy scans (home), if a patient has any. The part of a tumour outside of these slices is not counted for "
        "any method.",
        grade="bright ellipses of 8 to 17 mm radius in slices without a tumour (the intensity changes by 20 % of the "
        "range of the brain)",
        variants="the difference and the difference divided by the local contrast, each with and without the factor "
        "of the intensity that the bundle has",
        intensity="bright",
        earlier_version=", next to version 1.2.0, which has the same networks and analyses fewer slices",
    ),
    "headct": ScanTexts(
        holds_for="The numbers hold for head CT of MedNIST, at 64 x 64 pixels. All lesions are synthetic.",
        budget=" Earlier trainings of `headct` had more.",
        images=IMAGES_ALONE,
        test="28 stacks of MedNIST (scanners unknown). In each, every third image has an ellipse of 15 to 30 mm "
        "radius: in grade 2, the intensity changes by 20 % of the range of the brain, in grade 3 by 35 %; half of the "
        "stacks have bright lesions.",
    ),
}

INTRODUCTION = """# {bundle} compared with the paper's method and with baselines

Written by `python -m training.experiments.method_comparison`. {texts.holds_for}

## Protocol

The same for every method:

- **Training scans.** All denoisers and autoencoders were trained on the scans of `{bundle}`, with its
  augmentation.{texts.training}
- **Threshold.** {calibration_scans} healthy validation scans determine it. Their median may have at most
  {false_positive_ml:g} ml of findings{simulated}. This is the
  rule of `{bundle}`, with fewer scans and without its lower limit.{texts.images}
- **Test scans.** {texts.test}
- **Statistics.** Means over scans, and medians of the false findings. Brackets are 95 % intervals of a bootstrap over
  {resampled}.

Nothing on this page was chosen on test scans. But earlier results on these scans were known when `{bundle}` was made.

The methods:

- **`{bundle}`**: coarse patches in training, one low noise level for the KL map, one reverse step, as in the service.
- **`{paper_bundle}`**: the paper's method (Pinaya et al. 2022). The training of its denoiser starts from that of
  `{bundle}` and continues with white noise at all time steps, without a weight of the loss. The KL map is the mean over
  five time steps from 400 to 600. The mask contains the latents above the 97.5th percentile of healthy scans. The
  reverse process starts at t = 500. The authors of this page could not read all settings of the paper. So the five time
  steps, the percentile, the 25 reverse steps, the size of a latent and the thresholds of the findings are ours.
- **The same with the steps of `{name}`**: its networks with the noise level, the smoothed KL map, the percentile and
  the reverse step of `{bundle}`, and the same treatment of the residual. The difference to `{bundle}` with one view is
  the training with coarse patches.
- **Denoising autoencoder** (Kascenas et al. 2022): a U-Net of the size of the denoiser that removes the same patches of
  coarse noise in pixels, without latents and without diffusion. The training starts from the inner layers of the
  denoiser of `{bundle}` and takes {denoising_autoencoder_budget}, fewer than those of the other autoencoders.
- **Dense, spatial and variational autoencoder** (Baur et al. 2021): trained from random weights with
  {autoencoder_budget}, as many as in the last training of `{name}`.{texts.budget}{not_measured}
- **VQ-VAE**: the difference between a slice and its reconstruction by the VQ-VAE of `{bundle}`.
- **Mean healthy slice** and **intensity threshold**: no network. The map is the difference from the mean training
  slice, or the intensity ({texts.intensity}).

The paper's method and the baselines choose a filter and the extent of a finding (down to 60 or 100 % of the threshold)
on {choice_scans} validation scans with {texts.grade}. They also choose between
{texts.variants}. The settings of `{bundle}` were chosen on validation scans, too.

The transformer of Pinaya et al. 2021 is missing: for `t1`, a training with as many slices takes about eight hours on
two cores ([decision 20](../decisions/0020-training-on-a-borrowed-gpu.md) has the time of half of them).
[comparison.md](../results/comparison.md) has its result with a smaller budget{texts.earlier_version}.
"""


def page(document: Comparison) -> str:
    """Return the page."""
    parts = [_introduction(document)]
    if document.methods:
        parts += [_accuracy(document), _false_findings(document), _differences(document), _choices(document)]
    return "\n".join(parts)


def _introduction(document: Comparison) -> str:
    name = document.bundle.rpartition("-")[0]
    simulated = document.simulated_ml
    has_autoencoders = any(method.startswith("variational autoencoder") for method in document.methods)
    fields = document.model_dump(exclude={"methods", "bundle_sha256", "paper_sha256"})
    text = INTRODUCTION.format(
        **fields,
        name=name,
        texts=TEXTS[name],
        not_measured="" if has_autoencoders else " They are not measured yet.",
        simulated="" if simulated is None else f", and at most {simulated:g} ml if another scanner is simulated",
        resampled="subjects and lesion shapes" if name == "t1" else "subjects",
    )
    return refill(text) + "\n"


def _rows(document: Comparison, cells: Callable[[MethodResult], Sequence[str]]) -> list[list[str]]:
    return [[name, *cells(result)] for name, result in document.methods.items()]


def _accuracy(document: Comparison) -> str:
    reference = next(iter(document.methods.values()))
    kinds, small = kinds_by_size(reference)
    scores = {"auprc": "AUPRC", "best_dice": "best Dice", "dice": "Dice"}

    def cells(result: MethodResult) -> list[str]:
        values = [format_interval(mean_score(of_kinds(result, [kind]), score)) for kind in kinds for score in scores]
        few = [
            f"{np.mean([getattr(each, s) for each in of_kinds(result, [kind])]):.2f}" for kind in small for s in scores
        ]
        return [*values, *few]

    titles = [f"{kind} ({len(of_kinds(reference, [kind]))} scans)" for kind in [*kinds, *small]]
    header = ["method", *(f"{text}, {title}" for title in titles for text in scores.values())]
    text = (
        "**AUPRC** and **best Dice** need no threshold: best Dice is that of the best threshold of each scan. **Dice** "
        "is that of the mask at the threshold above."
    )
    return f"## Accuracy\n\n{text}\n\n{table(header, _rows(document, cells))}\n"


def _false_findings(document: Comparison) -> str:
    def cells(result: MethodResult) -> list[str]:
        volumes = [
            cell
            for found in result.found_ml.values()
            for cell in (format_interval(median_ml(found)), f"{np.percentile(list(found.values()), 90):.1f}")
        ]
        return [
            *volumes,
            f"{result.evaluations_per_slice:.1f}",
            f"{result.ms_per_slice:.1f}",
            f"{result.parameters / 1e6:.1f}",
        ]

    text = (
        "**Time** is that of the networks for scans with a lesion, on the processors of one machine. The bundles run "
        "in onnxruntime with convolutions in int8, except where the name states float32, and include the "
        "out-of-distribution check. The other networks run in torch in float32. So these times do not show which "
        "architecture is faster. **Evaluations** are those of the denoiser or of the autoencoder."
    )
    groups = next(iter(document.methods.values())).found_ml
    header = [
        "method",
        *(
            title
            for group, found in groups.items()
            for title in (f"false findings, {group} ({len(found)} scans), ml", f"90th percentile, {group}")
        ),
        "evaluations per slice",
        "ms per slice",
        "parameters, millions",
    ]
    return f"## False findings and cost\n\n{text}\n\n{table(header, _rows(document, cells))}\n"


def _differences(document: Comparison) -> str:
    reference_name, reference = next(iter(document.methods.items()))
    kinds, _ = kinds_by_size(reference)
    own = of_kinds(reference, kinds)

    def cells(result: MethodResult) -> list[str]:
        gains = [mean_gain(own, of_kinds(result, kinds), score) for score in ("auprc", "best_dice")]
        return [format_interval(gain, signed=True) for gain in gains]

    rows = [row for row in _rows(document, cells) if row[0] != reference_name]
    text = f"{reference_name} minus each method, paired by scan, {' and '.join(kinds)}. Above 0, it is better."
    return f"## Differences\n\n{text}\n\n{table(['method', 'AUPRC', 'best Dice'], rows)}\n"


def _choices(document: Comparison) -> str:
    chosen = bullets(
        f"{name}: {', '.join(filter(None, (result.variant, result.smoothing)))}, extent "
        f"{result.extent_threshold / result.threshold:.0%}"
        for name, result in document.methods.items()
    )
    commits = ", ".join(sorted({f"`{result.code}`" for result in document.methods.values()}))
    return (
        f"## Filter and extent of each method\n\n{chosen}\n\nCode: {commits}. Bundles: `{document.bundle}` "
        f"(`{document.bundle_sha256[:12]}`), `{document.paper_bundle}` (`{document.paper_sha256[:12]}`).\n"
    )
