"""Page of the comparison of methods at equal budgets, and its stored results. Needs no torch."""

from collections.abc import Callable, Sequence

import numpy as np

from training.cluster_bootstrap import IntArray, Interval, cluster_weights, crossed_weights, interval, mean, quantile
from training.experiments.markdown import bullets, format_interval, table
from training.experiments.results import Record

HOME, OTHER_SCANNERS = "home", "other scanners"
REAL = "MS lesions, T1"


class LesionScores(Record):
    """Scores of one scan with a lesion. `dice` is that of the mask at the calibrated threshold."""

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
        Chosen on validation scans. Empty for a method without a choice.
    threshold, extent_threshold : float
    parameters : int
    evaluations_per_slice : float
        Of the denoiser, or of the network of a baseline.
    ms_per_slice : float
        Time of the networks.
    found_ml : dict of str to dict of str to float
        Volume of findings in healthy scans, by group and subject.
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
    false_positive_ml: float
    autoencoder_budget: str
    denoising_autoencoder_budget: str
    methods: dict[str, MethodResult]


def of_kinds(result: MethodResult, kinds: Sequence[str]) -> list[LesionScores]:
    """Return the scores of some kinds of lesions."""
    return [score for score in result.lesions if score.kind in kinds]


def synthetic_kinds(result: MethodResult) -> list[str]:
    """Return the kinds of synthetic lesions, in their order."""
    return list(dict.fromkeys(score.kind for score in result.lesions if score.kind != REAL))


def mean_score(scores: Sequence[LesionScores], score: str) -> Interval:
    """Return the mean of a score over scans, with an interval over subjects and lesion shapes."""
    return interval(mean([getattr(each, score) for each in scores]), _weights(scores))


def mean_gain(first: Sequence[LesionScores], second: Sequence[LesionScores], score: str) -> Interval:
    """Return the mean difference of a score, first minus second, with an interval over subjects and lesion shapes."""
    pairs = list(zip(first, second, strict=True))
    assert all((a.kind, a.subject) == (b.kind, b.subject) for a, b in pairs), "both have the same scans"
    return interval(mean([getattr(a, score) - getattr(b, score) for a, b in pairs]), _weights(first))


def _weights(scores: Sequence[LesionScores]) -> IntArray:
    return crossed_weights([each.subject for each in scores], [each.shape for each in scores])


def median_ml(found: dict[str, float]) -> Interval:
    """Return the median volume of findings, with an interval over people."""
    return interval(quantile(list(found.values())), cluster_weights(list(found), seed=0))


# ---- text --------------------------------------------------------------------------------------

INTRODUCTION = """# {bundle} compared with other methods at equal budgets

Written by `python -m training.experiments.method_comparison`. All numbers of the page come from one run of it on one
machine. They hold for skull-stripped T1, and the lesions were inserted into scans of one scanner (ds002748), except for
the two patients with multiple sclerosis.

The same for every method:

- **Training scans and augmentation** are those of `{bundle}`.
- **Threshold**: the lowest one at which the median of {calibration_scans} healthy validation scans has at most
  {false_positive_ml:g} ml of findings. The service uses a higher threshold for `{bundle}`, which also suits simulated
  scanners. So the false findings here are not those of the service.
- **Scans**: 12 healthy test subjects of ds002748 (home), 15 healthy people of seven other scanners that no training
  saw, each home subject with one lesion shape of a patient with multiple sclerosis (grade 2: intensity moved by 20 %
  of the range of the brain, grade 3: by 35 %; half of them bright, half dark), and the two test patients with real
  lesions. No test scan was used for a choice.
- **Statistics**: means over scans, or medians of the false findings. Brackets are 95 % intervals of a bootstrap over
  subjects and lesion shapes.

What differs:

- `{paper_bundle}` is **the paper's method**: the denoiser of `{bundle}`, trained further with white noise at all time
  steps and without a weight of the loss. Its KL map is the mean over t = 400 to 600. The mask contains the latents
  above the 97.5th percentile of healthy scans. The reverse process starts at t = 500. The number of its steps (25) and
  the rule for the threshold of the residual are ours, because the authors of this page could not read them in the
  paper.
- The **denoising autoencoder** (Kascenas et al. 2022) is a U-Net of the size of the denoiser. It removes the same
  patches of coarse noise, but in pixels. It starts from the inner layers of the denoiser of `{bundle}` and was trained
  for {denoising_autoencoder_budget}.
- **Dense, spatial and variational autoencoder** (Baur et al. 2021) were trained from random weights for
  {autoencoder_budget}. The last training of `t1` had as many slices. Its denoiser has seen more in earlier versions.
- **Baselines** choose a variant (the difference, or the difference divided by the local contrast), a filter, and how
  far a finding extends (down to 60 or 100 % of the threshold). The choice is made on 12 validation scans with lesions
  of grade 2. The settings of `{bundle}` were chosen on such scans, too.
- **Time** is that of the networks on the processors of this machine. `{bundle}` and `{paper_bundle}` run in onnxruntime
  with convolutions in int8, except where the row states float32. All others run in torch in float32. So the times of
  the two groups do not show which architecture is faster.

The transformer of Pinaya et al. 2021 is missing: on two cores, training it on as many slices would take days.
[comparison.md](../results/comparison.md) has its result with a smaller budget, next to version 1.6.0.
"""


def page(document: Comparison) -> str:
    """Return the page."""
    fields = document.model_dump(exclude={"methods", "bundle_sha256", "paper_sha256"})
    parts = [INTRODUCTION.format(**fields)]
    if document.methods:
        parts += [_accuracy(document), _false_findings(document), _differences(document), _choices(document)]
    return "\n".join(parts)


def _rows(document: Comparison, cells: Callable[[MethodResult], Sequence[str]]) -> list[list[str]]:
    return [[name, *cells(result)] for name, result in document.methods.items()]


def _accuracy(document: Comparison) -> str:
    kinds = synthetic_kinds(next(iter(document.methods.values())))
    scores = {"auprc": "AUPRC", "best_dice": "best Dice", "dice": "Dice"}

    def cells(result: MethodResult) -> list[str]:
        inserted = [format_interval(mean_score(of_kinds(result, [kind]), score)) for kind in kinds for score in scores]
        real = [f"{np.mean([getattr(each, s) for each in of_kinds(result, [REAL])]):.2f}" for s in scores]
        return [*inserted, *real]

    header = ["method", *(f"{text}, {kind}" for kind in [*kinds, "MS (2 patients)"] for text in scores.values())]
    text = (
        "**AUPRC** and **best Dice** need no threshold: best Dice is that of the best threshold of each scan. **Dice** "
        "is that of the mask at the threshold above."
    )
    return f"## Accuracy\n\n{text}\n\n{table(header, _rows(document, cells))}\n"


def _false_findings(document: Comparison) -> str:
    def cells(result: MethodResult) -> list[str]:
        other = result.found_ml[OTHER_SCANNERS]
        return [
            format_interval(median_ml(result.found_ml[HOME])),
            format_interval(median_ml(other)),
            f"{np.percentile(list(other.values()), 90):.1f}",
            f"{result.evaluations_per_slice:.1f}",
            f"{result.ms_per_slice:.1f}",
            f"{result.parameters / 1e6:.1f}",
        ]

    header = [
        "method",
        "false findings at home, ml",
        "on other scanners, ml",
        "90th percentile",
        "evaluations per slice",
        "ms per slice",
        "parameters, millions",
    ]
    return f"## False findings and cost\n\n{table(header, _rows(document, cells))}\n"


def _differences(document: Comparison) -> str:
    reference_name, reference = next(iter(document.methods.items()))
    kinds = synthetic_kinds(reference)
    own = of_kinds(reference, kinds)

    def cells(result: MethodResult) -> list[str]:
        gains = [mean_gain(own, of_kinds(result, kinds), score) for score in ("auprc", "best_dice")]
        return [format_interval(gain, signed=True) for gain in gains]

    rows = [row for row in _rows(document, cells) if row[0] != reference_name]
    text = f"{reference_name} minus each method, paired by scan, {' and '.join(kinds)} together. Above 0, it is better."
    return f"## Differences\n\n{text}\n\n{table(['method', 'AUPRC', 'best Dice'], rows)}\n"


def _choices(document: Comparison) -> str:
    chosen = bullets(
        f"{name}: {result.variant}, {result.smoothing}, extent {result.extent_threshold / result.threshold:.0%}"
        for name, result in document.methods.items()
        if result.variant
    )
    commits = ", ".join(sorted({f"`{result.code}`" for result in document.methods.values()}))
    return (
        f"## Chosen on validation scans\n\n{chosen}\n\nCode: {commits}. Bundles: `{document.bundle}` "
        f"(`{document.bundle_sha256[:12]}`), `{document.paper_bundle}` (`{document.paper_sha256[:12]}`).\n"
    )
