"""Writer of docs/results/comparison.md: the text of page.md with tables from docs/results and docs/evaluation."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.config import ROOT, Config
from training.experiments import results_cache
from training.experiments.markdown import bold, bullets, fill_template, format_interval, table
from training.experiments.methods import COUNTERPART, METHOD_INFO
from training.experiments.metrics import Interval
from training.experiments.results import (
    AblationScores,
    ByBundle,
    CurveScores,
    ImageLevelResults,
    LargeLesionScores,
    MethodScores,
    OracleScores,
    PointScores,
    Provenance,
    SegmentationResults,
)
from training.experiments.targets import FAR, Measured, compare_targets

TEMPLATE = Path(__file__).with_name("page.md")
PAGE = results_cache.RESULTS / "comparison.md"
EVALUATION = ROOT / "docs" / "evaluation"
BUNDLES = ("t1", "headct", "flair")
PARTS = {
    "shapes": ("2a", "Synthetic lesions in T1", "healthy T1 brains (ds002748) with real shapes of MS lesions"),
    "ellipses": ("2b", "Synthetic lesions in head CT", "stacks of healthy CT images (MedNIST) with ellipses"),
    "tumours": ("3a", "Gliomas in FLAIR", "patients with an outlined lower-grade glioma (TCGA-LGG)"),
    "ms-t1": (
        "3b",
        "Multiple sclerosis in T1",
        "skull-stripped scans with outlined lesions. Two scans are too few for a claim",
    ),
    "stripped": ("3c", "Skull-stripped FLAIR", "`flair` was trained only on FLAIR with the skull"),
}
# For the table of numbers: the test scans of each bundle, and the lesions that are inserted or outlined in them.
TEST_SCANS = {
    "t1": "test scans of ds002748 (one scanner, not named)",
    "headct": "test stacks of MedNIST (scanners unknown)",
    "flair": "test patients of TCGA-LGG (several hospitals, scanners unknown)",
}
INSERTED = {"t1": "five lesion shapes", "headct": "ellipses of 8, 12 and 16 mm radius"}
INSERTED_PARTS = {
    "shapes": "one lesion shape each",
    "ellipses": "ellipses of 15 to 30 mm radius",
    "tumours": "tumours in analysed slices",
}
KINDS = ("near", *FAR)
# Grades whose ablation gains are shown, and the kind of real lesions that is shown with them.
POOLED, TUMOURS = "grade 2 and grade 3", "tumours"
# Labels of stored results, as the page shows them.
SHOWN_LABELS = {
    "healthy and every foreign class": "healthy and all other body parts",
    "KL of the plain view": "KL of the identity view",
    "over local contrast": "divided by local contrast",
    ", as it is ": ", not smoothed ",
    "in one picture of 3": "in every third image",
    "in one picture of 2": "in every second image",
}
# A setting within this of the best Dice and AUPRC is as good.
CLOSE = 0.01
NOT_MEASURED = "Not measured."


@dataclass(frozen=True)
class Stored:
    """All stored results. A part that was not measured is None or missing."""

    image_level: ImageLevelResults | None
    segmented: dict[str, SegmentationResults]
    oracle: dict[str, OracleScores]
    curve: dict[str, CurveScores]
    ood: dict[str, LargeLesionScores]
    ablation: dict[str, AblationScores]
    evaluation: dict[str, Any]

    @classmethod
    def load(cls) -> "Stored":
        """Load docs/results and docs/evaluation."""
        segmented = {part: results_cache.load(part, SegmentationResults) for part in PARTS}
        oracle = results_cache.load("oracle_ablation", ByBundle[OracleScores])
        curve = results_cache.load("accuracy_vs_evaluations", ByBundle[CurveScores])
        ood = results_cache.load("ood", ByBundle[LargeLesionScores])
        ablation = {name: results_cache.load(f"ablation-{name}", AblationScores) for name in BUNDLES}
        evaluation = {name: EVALUATION / f"{name}.json" for name in BUNDLES}
        return cls(
            results_cache.load("image_level", ImageLevelResults),
            {part: found for part, found in segmented.items() if found},
            oracle.bundles if oracle else {},
            curve.bundles if curve else {},
            ood.bundles if ood else {},
            {name: found for name, found in ablation.items() if found},
            {name: json.loads(path.read_text()) for name, path in evaluation.items() if path.exists()},
        )

    @property
    def tumour_row(self) -> dict[str, Any] | None:
        """Counterpart's row of docs/evaluation over all tumour patients."""
        rows = self.evaluation.get("flair", {}).get("tumours", {}).get("rows", [])
        return next((row for row in rows if row.get("method") == COUNTERPART), None)

    def own_scores(self) -> Iterator[tuple[str, str, str, dict[str, MethodScores]]]:
        """Yield part, bundle, kind and the scores of all methods, if Counterpart has some."""
        for part, results in self.segmented.items():
            for kind, rows in results.kinds.items():
                if COUNTERPART in rows:
                    yield part, results.provenance.bundle, kind, rows


def write(path: Path = PAGE) -> None:
    """Write the page from the stored results."""
    stored = Stored.load()
    targets = compare_targets(Measured(stored.image_level, stored.segmented, stored.tumour_row))
    verdicts = Counter(target.met for target in targets)
    values = {
        "summary": make_summary(stored),
        "false_positives": ", ".join(
            f"{evaluated_bundle(name)} {np.median(ml):.2f} ml"
            for name, found in stored.evaluation.items()
            if (ml := false_positives(found))
        ),
        "methods": bullets(f"{bold(info.title)}: {info.definition}" for info in METHOD_INFO.values()),
        "target_counts": f"{verdicts[True]} are met, {verdicts[False]} missed and {verdicts[None]} not measured",
        "targets": table(["target", "measured", ""], [[t.text, t.found, t.verdict] for t in targets]),
        **make_image_level(stored.image_level),
        "number_guide": make_number_guide(stored),
        "segmentation": make_segmentation(stored.segmented),
        **make_costs(stored.segmented),
        **make_dice(stored),
        **make_test_subjects(stored),
        "oracle": make_oracle(stored.oracle),
        **make_curve(stored.curve),
        **make_ablation(stored.ablation),
        "provenance": make_provenance(stored),
    }
    for stored_label, shown in SHOWN_LABELS.items():
        values = {name: text.replace(stored_label, shown) for name, text in values.items()}
    path.write_text(fill_template(TEMPLATE.read_text(), values))


def make_summary(stored: Stored) -> str:
    """Make the main table: a row for each kind of lesion."""
    rows = []
    for part, bundle, kind, scores in stored.own_scores():
        own = scores[COUNTERPART]
        leads = {name: row.lead.auprc for name, row in scores.items() if row.lead is not None}
        closest = min(leads, key=lambda name: leads[name].value, default=None)
        rows.append(
            [
                bundle,
                PARTS[part][1] if kind == part else f"{PARTS[part][1]}: {kind}",
                str(own.cases),
                format_interval(own.auprc),
                format_interval(own.dice),
                format_interval(own.mean_shipped_dice),
                f"{format_interval(leads[closest], signed=True)}, {METHOD_INFO[closest].title}" if closest else "",
            ]
        )
    header = [
        "model",
        "lesions",
        "scans",
        "AUPRC",
        "Dice, best-achievable",
        "Dice, as shipped",
        "difference to the best baseline",
    ]
    return table(header, rows)


def evaluated_bundle(name: str) -> str:
    """Return the id of the bundle that docs/evaluation describes: the version of the configuration."""
    return f"{name}-{Config.load(ROOT / 'training' / 'configs' / f'{name}.toml').version}"


def make_number_guide(stored: Stored) -> str:
    """Make the table of the numbers of other pages: their scans, statistics and commands."""
    experiment = {part: f"`python -m training.experiments {part}`, this page" for part in PARTS}

    def evaluation(name: str, part: str) -> str:
        return f"`python -m training.evaluate training/configs/{name}.toml {part}`, [{name}](../evaluation/{name}.md)"

    rows = []
    for name, document in stored.evaluation.items():
        if ml := false_positives(document):
            number = f"{np.median(ml):.2f} ml of false findings"
            scans = f"{len(ml)} {TEST_SCANS[name]}, healthy slices"
            rows.append([evaluated_bundle(name), number, scans, "median", evaluation(name, "healthy")])
        found = [row["found_ml"] for row in document.get("heads", {}).get("rows", []) if _is_ixi(row)]
        if found:
            scans, number = f"{len(found)} analysed heads of IXI", f"{np.median(found):.2g} ml of false findings"
            rows.append([evaluated_bundle(name), number, scans, "median", evaluation(name, "heads")])
        if (inserted := document.get("lesions", {}).get("rows", [])) and name in ("t1", "headct"):
            number = f"Dice {np.median([row['dice'] for row in inserted]):.2f}, grade 3"
            scans = f"{len(inserted)} insertions of {INSERTED[name]} into {TEST_SCANS[name]}"
            rows.append(
                [evaluated_bundle(name), number, scans, "median, shipped threshold", evaluation(name, "lesions")]
            )
    for part, bundle, kind, scores in stored.own_scores():
        own = scores[COUNTERPART]
        if part in INSERTED_PARTS and own.mean_shipped_dice is not None:
            name = bundle.rpartition("-")[0]
            scans = f"{own.cases} {TEST_SCANS[name]} with {INSERTED_PARTS[part]}"
            number = f"Dice {own.mean_shipped_dice.value:.2f}" + (f", {kind}" if kind != part else "")
            rows.append([bundle, number, scans, "mean, shipped threshold", experiment[part]])
    if stored.tumour_row:
        number = f"Dice {stored.tumour_row['shipped_pooled'][0]:.2f}"
        patients = sum("subject" in row for row in stored.evaluation["flair"]["tumours"]["rows"])
        scans = f"{patients} {TEST_SCANS['flair']}, tumours in all slices"
        rows.append(
            [evaluated_bundle("flair"), number, scans, "pooled, shipped threshold", evaluation("flair", "tumours")]
        )
    return table(["model", "number", "scans", "statistic", "command and page"], rows)


def _is_ixi(row: dict[str, Any]) -> bool:
    return bool(row["kind"] == "IXI" and row["outcome"] == "analysed")


def make_image_level(results: ImageLevelResults | None) -> dict[str, str]:
    """Make the tables of experiment 1."""
    own = results.methods.get(COUNTERPART) if results else None
    if results is None or own is None or own.reliability is None:
        return dict.fromkeys(("image_level", "image_scores", "reliability"), NOT_MEASURED)
    rows = []
    for name, row in results.methods.items():
        near = row.kinds["near"]
        rates = ", ".join(f"{rate:.2f}" for rate in near.false_positive_rate.values())
        numbers = [format_interval(row.kinds[kind].auroc) for kind in KINDS]
        cost = f"{row.seconds * 1e3:.1f}"
        rows.append([METHOD_INFO[name].title, *numbers, format_interval(near.auprc), rates, row.score, cost])
    shown = [s for s in own.kinds["near"].auroc_by_score if "percentile" not in s or s == own.score]
    by_score = [[score, *(f"{own.kinds[kind].auroc_by_score[score]:.2f}" for kind in KINDS)] for score in shown]
    errors = [
        [
            f"healthy and {kind}",
            f"{found.fitted_share:.2f}, {found.share:.2f}",
            format_interval(found.calibration_error),
            format_interval(found.brier),
        ]
        for kind, found in own.reliability.kinds.items()
    ]
    shares = "anomalous share: fitted, here"
    header = ["method", *KINDS, "AUPRC, near", "FPR, near", "chosen score", "ms per image"]
    return {
        "image_level": table(header, rows),
        "image_scores": table(["score", *KINDS], by_score),
        "reliability": table(["test images", shares, "expected calibration error", "Brier score"], errors),
    }


def make_segmentation(segmented: dict[str, SegmentationResults]) -> str:
    """Make the sections of experiments 2 and 3."""
    sections = []
    for part, results in segmented.items():
        number, title, scans = PARTS[part]
        kinds = results.kinds
        header = [f"{kind}, {next(iter(rows.values())).cases} scans" for kind, rows in kinds.items()]
        rows = []
        for name in results.methods:
            cells = [kinds[kind].get(name) for kind in kinds]
            numbers = [f"{format_interval(c.auprc)}; {format_interval(c.dice)}" if c else "" for c in cells]
            method = METHOD_INFO[name].title
            rows.append([bold(method) if name == COUNTERPART else method, *numbers])
        sections += [
            f"### {number}. {title}",
            f"{results.provenance.bundle}: {scans}.",
            table(["method", *header], rows),
        ]
    return "\n\n".join(sections)


def make_costs(segmented: dict[str, SegmentationResults]) -> dict[str, str]:
    """Make the tables of what each method costs, and of what was chosen for it."""
    costs, choices = [], []
    for name, info in METHOD_INFO.items():
        runs = {part: results.methods[name] for part, results in segmented.items() if name in results.methods}
        sizes = dict.fromkeys(f"{run.parameters / 1e6:.1f}" for run in runs.values())
        budgets = dict.fromkeys(run.provenance.training_budget.removesuffix(" slices") for run in runs.values())
        times = [f"{runs[part].seconds_per_slice * 1e3:.1f}" if part in runs else "" for part in segmented]
        costs.append([info.title, " or ".join(sizes), " or ".join(filter(None, budgets)), *times])
        chosen = {
            run.provenance.bundle.rpartition("-")[0]: f"{run.choice.variant}, {run.choice.smoothing}"
            for run in runs.values()
        }
        if name != COUNTERPART:
            choices.append([info.title, *(chosen.get(bundle, "") for bundle in BUNDLES)])
    return {
        "costs": table(["method", "parameters", "training slices", *(f"ms, {part}" for part in segmented)], costs),
        "choices": table(["method", *BUNDLES], choices),
    }


def make_dice(stored: Stored) -> dict[str, str]:
    """Make the table of the Dice figures that differ, side by side."""
    rows = []
    for part, bundle, kind, scores in stored.own_scores():
        own, evaluated = scores[COUNTERPART], ""
        name = bundle.rpartition("-")[0]
        inserted = stored.evaluation.get(name, {}).get("lesions", {}).get("rows", [])
        if kind == "grade 3" and inserted:
            evaluated = f"{np.median([row['dice'] for row in inserted]):.2f}"
            # The evaluation can be that of a later version.
            evaluated += "" if evaluated_bundle(name) == bundle else f" ({evaluated_bundle(name)})"
        shipped = f"{own.mean_shipped_dice.value:.2f}" if own.mean_shipped_dice else ""
        best = [f"{own.dice.value:.2f}", format_interval(own.mean_scan_dice)]
        rows.append([bundle, f"{part}, {kind}", shipped, *best, evaluated])
    header = ["model", "part", "(1) shipped", "(2) best-achievable", "(3) best per scan", "(4) evaluation"]
    tumours, pooled = stored.tumour_row, NOT_MEASURED
    if tumours:
        shipped, at_best = (format_interval(Interval(*tumours[key])) for key in ("shipped_pooled", "best_pooled"))
        pooled = f"{shipped} shipped, {at_best} best-achievable"
    return {"dice": table(header, rows), "tumour_dice": pooled}


def false_positives(evaluation: dict[str, Any]) -> list[float]:
    """Return the millilitres that are found in each analysed healthy test scan."""
    return [row["false_positive_ml"] for row in evaluation["healthy"]["rows"] if row["outcome"] == "analysed"]


def make_test_subjects(stored: Stored) -> dict[str, str]:
    """Make the tables of false positives and refusals."""
    healthy = []
    refused: dict[str, dict[str, str]] = {}
    for name, document in stored.evaluation.items():
        scans = [row for row in document["healthy"]["rows"] if row["outcome"] != "no_healthy_slice"]
        ml = false_positives(document)
        spread = f"{np.median(ml):.2f} ({min(ml):.2f} to {max(ml):.2f})" if ml else ""
        healthy.append([name, str(len(scans)), spread, str(len(scans) - len(ml))])
        for part in ("foreign", "single"):
            for row in document.get(part, {"rows": []})["rows"]:
                outcomes = Counter(row["outcomes"])
                count = f"{outcomes.total() - outcomes['analysed']}/{outcomes.total()}"
                refused.setdefault(row["kind"].replace("as Hounsfield units", "in HU"), {})[name] = count
    large = []
    for found in stored.ood.values():
        sizes = [row.truth_ml for row in found.rows]
        shapes = ", ".join(dict.fromkeys(row.shape for row in found.rows))
        share = Interval(*(100 * n for n in (found.share.value, found.share.low, found.share.high)))
        large.append(
            f"{found.provenance.bundle}: {found.refused} of {found.scans} are refused, {format_interval(share, 1)} %. "
            f"The lesions have {min(sizes):.0f} to {max(sizes):.0f} ml ({shapes})."
        )
    names = list(stored.evaluation)
    foreign = [[kind, *(row.get(name, "") for name in names)] for kind, row in refused.items()]
    return {
        "healthy": table(["model", "healthy test scans", "false positives, ml", "false refusals"], healthy),
        "large_lesions": bullets(large) or NOT_MEASURED,
        "foreign": table(["scans", *names], foreign),
    }


def make_oracle(bundles: dict[str, OracleScores]) -> str:
    """Make the table of the oracle ablation."""
    columns = {f"{name}, {grade}": rows for name, found in bundles.items() for grade, rows in found.grades.items()}
    steps = next(iter(columns.values()), {})
    rows = [[step, *(format_interval(scores[step].auprc) for scores in columns.values())] for step in steps]
    return table(["given", *columns], rows)


def find_knee(points: dict[str, PointScores]) -> str:
    """Return the setting with the fewest evaluations within `CLOSE` of the best Dice and AUPRC.

    If no setting is close to both, those with the smallest shortfall count.
    """
    values = {name: np.array([p.dice.value, p.auprc.value]) for name, p in points.items()}
    best = np.max(list(values.values()), axis=0)
    shortfall = {name: float((best - each).max()) for name, each in values.items()}
    allowed = max(CLOSE, min(shortfall.values()))
    good = [name for name, lacking in shortfall.items() if lacking <= allowed]
    return min(good, key=lambda name: points[name].evaluations_per_slice)


def make_curve(bundles: dict[str, CurveScores]) -> dict[str, str]:
    """Make the table of Dice and AUPRC against evaluations, and the sentences about the knees."""
    knees = []
    settings: dict[str, PointScores] = {}
    for found in bundles.values():
        knee = found.points[find_knee(found.points)]
        shipped = found.points[found.shipped].evaluations_per_slice
        knees.append(
            f"{found.provenance.bundle}, {knee.cases} scans: the cheapest sufficient setting has "
            f"{knee.evaluations_per_slice:.1f} evaluations per slice, {shipped:.1f} are shipped."
        )
        settings |= found.points

    def cell(found: CurveScores, name: str) -> str:
        if name not in found.points:
            return ""
        point = found.points[name]
        text = f"{point.evaluations_per_slice:.1f}; {format_interval(point.dice)}; {format_interval(point.auprc)}"
        return bold(text) if name == found.shipped else text

    rows = []
    for name, point in sorted(settings.items(), key=lambda each: each[1].evaluations_per_slice):
        levels, steps = (", ".join(map(str, each)) for each in (point.kl, point.reverse))
        rows.append([str(point.views), levels, steps, *(cell(found, name) for found in bundles.values())])
    header = ["views", "KL at t", "reverse from t", *bundles]
    return {"knees": bullets(knees) or NOT_MEASURED, "curve": table(header, rows)}


def make_ablation(documents: dict[str, AblationScores]) -> dict[str, str]:
    """Make the table of gains, and that of the rules for the thresholds."""
    kinds = {
        name if kind == POOLED else f"{name}, {kind}": found.kinds[kind]
        for name, found in documents.items()
        for kind in (POOLED, TUMOURS)
        if kind in found.kinds
    }
    shipped = [next(iter(scores.values())) for scores in kinds.values()]
    header = [
        f"{name}: {own.cases} scans, shipped {own.auprc.value:.2f}" for name, own in zip(kinds, shipped, strict=True)
    ]
    changes = dict.fromkeys(change for scores in kinds.values() for change, row in scores.items() if row.gain)
    gains = []
    for change in changes:
        cells = []
        for scores in kinds.values():
            gain = scores[change].gain if change in scores else None
            text = format_interval(gain.auprc if gain else None, signed=True)
            cells.append(bold(text) if gain and (gain.auprc.low > 0 or gain.auprc.high < 0) else text)
        gains.append([change, *cells])
    rules: dict[tuple[str, str], dict[str, str]] = {}
    for name, found in documents.items():
        for rule in found.thresholds:
            text = f"{rule.threshold:.3f}: {', '.join(f'{dice.value:.2f}' for dice in rule.dice.values())}"
            row = rules.setdefault((f"{rule.false_positive_ml:g}", f"{rule.extent_share:g}"), {})
            row[name] = bold(text) if rule.shipped else text
    thresholds = [[*rule, *(row.get(name, "") for name in documents)] for rule, row in rules.items()]
    return {
        "ablation": table(["change", *header], gains),
        "thresholds": table(["ml", "share", *documents], thresholds),
    }


def make_provenance(stored: Stored) -> str:
    """Make the table of what the results belong to."""
    found: dict[str, Sequence[Provenance]] = {}
    if stored.image_level:
        found["1, `image_level`"] = [row.provenance for row in stored.image_level.methods.values()]
    for part, results in stored.segmented.items():
        found[f"{PARTS[part][0]}, `{part}`"] = [run.provenance for run in results.methods.values()]
    found["upper bounds, `oracle_ablation`"] = [each.provenance for each in stored.oracle.values()]
    found["evaluations, `accuracy_vs_evaluations`"] = [each.provenance for each in stored.curve.values()]
    found["large lesions, `ood`"] = [each.provenance for each in stored.ood.values()]
    found["ablation, `ablation`"] = [each.provenance for each in stored.ablation.values()]
    rows = []
    for part, every in found.items():
        columns = [
            [p.bundle for p in every],
            [f"`{p.data_sha256[:12]}`" for p in every],
            [f"`{p.code}`" for p in every],
        ]
        rows.append([part, *(", ".join(dict.fromkeys(column)) for column in columns)])
    return table(["part, and its name on the command line", "measured with", "data", "code"], rows)
