"""docs/RESULTS.md, from the numbers below docs/results/: nothing in it is typed by hand."""

import json
from typing import Any

from training.config import ROOT
from training.experiments import pages
from training.experiments.ablation import PART
from training.experiments.ablation_page import ablation_section
from training.experiments.bars import bars_section
from training.experiments.kept import RESULTS, current_rows
from training.experiments.methods import OURS
from training.experiments.opponents import OPPONENTS, opponent_of, slices_seen
from training.experiments.pages import cell

PAGE = ROOT / "docs" / "RESULTS.md"
FIGURE = ROOT / "docs" / "figures" / "results.png"

TITLES = {
    "imagewise": "1. Which picture is not healthy (MedNIST HeadCT)",
    "sprites": "2a. Synthetic lesions: sprites in MedNIST HeadCT",
    "shapes": "2b. Synthetic lesions: shapes of MS lesions in T1 volumes",
    "tumours": "3a. Real lesions: gliomas in FLAIR (TCGA-LGG, test patients)",
    "ms-t1": "3b. Real lesions: multiple sclerosis in T1; two patients, too few for a claim",
    "stripped": "3c. Real lesions in skull-stripped FLAIR, which `flair` does not know; five patients",
}
NAMES = {
    OURS: "**Counterpart**",
    "intensity": "intensity threshold",
    "mean": "difference from the mean healthy slice",
    "vqvae": "VQ-VAE without diffusion",
    "transformer-ensemble": "transformer, ensemble",
    **{o.name: o.title for o in OPPONENTS.values()},
}
SEGMENTATION_HEAD = (
    "| method | AUPRC | Dice | mean of each scan's AUPRC | Dice at each scan's best | shipped "
    "| Counterpart ahead by: AUPRC, Dice |"
)
HEAD = """# Results

Written by `python -m training.experiments`, on test subjects that chose nothing. Brackets are bootstrap 95 % intervals
over subjects. Every method sees the same slices and is judged inside the same head without its edge. What is done to an
opponent's map (smoothing, division by local contrast, the transformer's mask, which way an intensity counts) was chosen
by AUPRC on synthetic lesions of grade 2 in healthy slices of validation subjects; they chose Counterpart's own too. But
on FLAIR an intensity counts upwards: what is ill is bright there, which half of those lesions are not.
"Dice" is best-achievable: at the one threshold that suits all test scans of the row best. "Shipped" is the mean Dice of
a scan at the bundle's own threshold, which comes from those healthy slices; the gate refuses nothing here.
Slices that a bundle does not analyse count for no method; `docs/evaluation` counts what lies there as missed.
Milliseconds were taken beside other work on the same machine: [benchmarks](BENCHMARKS.md) has times to rely on.

"Learnt from" has what each opponent saw: {usual} slices; the denoisers saw 168,000 and more
([decision 5](decisions/0005-noise-levels-in-training.md)). The transformer is a small one, and
its errors still fell at the end. That of T1 saw {in_t1}, in as many steps, on a CPU
([what more of them bring](decisions/0019-missed-targets.md)). Its milliseconds are the mean of twelve slices of as
many test scans, on a CPU where known codes are fed at once, which gives the same codes sooner than step by step does
([benchmarks](BENCHMARKS.md) has both, and the published size); the others' are the mean of all.
[What was tried about the bars that are missed](decisions/0019-missed-targets.md) is a decision of its own.

A row may be older than the version of its bundle that a table names: it counts while all that decides it is the same.
"Code" is the commit, and "-dirty" where code differed from it. In rows of `ecdf172` and before, any file that was not
committed counted, the results of another row among them.
""".format(usual=slices_seen(opponent_of("transformer", "headct")), in_t1=slices_seen(opponent_of("transformer", "t1")))
SHOWN = """The first test subjects of `t1` and `headct`, synthetic lesions of grade 3 and 2 in turns, bright and dark;
of each scan the slice with most of the lesion. None was picked by its result. Orange is what Counterpart marks at the
shipped threshold, green is the truth; the patient's left is on the right. T1: ds002748 (CC0), lesion shapes of Lesjak
et al. 2018 (CC BY); CT: MedNIST (CC BY-SA 4.0, B. Erickson, Mayo Clinic)."""

Row = dict[str, Any]


def verdict(behind: dict[str, dict[str, float]] | None) -> str:
    """Ours minus this method's, AUPRC and Dice; bold where an interval is not above zero."""
    if behind is None:
        return ""
    told = []
    for key in ("auprc", "dice"):
        gap = behind[key]
        text = f"{gap['value']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})"
        told.append(text if gap["low"] > 0 else f"**{text}**")
    return ", ".join(told)


def version(row: Row) -> str:
    """With which code a row was measured."""
    return f"`{row['provenance']['code']}`"


def segmentation_tables(document: Row) -> list[str]:
    """One table for each kind of case."""
    lines = []
    for kind, rows in document["kinds"].items():
        count = next(iter(rows.values()))["cases"]
        lines += [
            f"### {kind}, {count} scans",
            "",
            SEGMENTATION_HEAD,
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name, row in rows.items():
            shipped = cell(row["scan_shipped"]) if "scan_shipped" in row else ""
            lines.append(
                f"| {NAMES[name]} | {cell(row['auprc'])} | {cell(row['dice'])} | {cell(row['scan_auprc'])} "
                f"| {cell(row['scan_dice'])} | {shipped} | {verdict(row.get('behind'))} |"
            )
        lines.append("")
    return [*lines, *budget_table(document["methods"])]


def budget_table(methods: Row) -> list[str]:
    """What each method cost, and what was chosen for it."""
    own = methods.get(OURS, {}).get("seconds_per_slice")
    lines = [
        "| method | parameters, millions | ms a slice | times ours | chosen on validation | learnt from | code |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in methods.items():
        budget = row.get("provenance", {}).get("learnt_from", "")
        choice = row["choice"]
        chosen = "" if name == OURS else f"{choice['variant']}, {choice['smoothing']}"
        ratio = f"{row['seconds_per_slice'] / own:.2f}" if own else ""
        lines.append(
            f"| {NAMES[name]} | {row['parameters'] / 1e6:.1f} | {row['seconds_per_slice'] * 1e3:.1f} | {ratio} "
            f"| {chosen} | {budget} | {version(row)} |"
        )
    return lines


def imagewise_tables(document: Row) -> list[str]:
    """AUROC of each kind, and what a sensitivity costs."""
    methods = document["methods"]
    kinds = list(next(iter(methods.values()))["kinds"])
    lines = [
        "AUROC against healthy test pictures; near is a sprite of grade 2, 4 to 8 pixels in radius.",
        "A score is chosen by near pictures of validation subjects. Sizes are not checked here, so that models judge",
        "pictures that preparation would refuse.",
        "",
        "| method | " + " | ".join(kinds) + " | score, chosen on validation | ms a picture |",
        "| --- " * (len(kinds) + 3) + "|",
    ]
    for name, row in methods.items():
        cells = [cell(row["kinds"][kind]["auroc"]) for kind in kinds]
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} | {row['score']} | {row['seconds'] * 1e3:.1f} |")
    lines += [
        "",
        "| method | AUPRC of near | false positives at 95 %, 99 %, 99.9 % of near found | code |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in methods.items():
        near = row["kinds"]["near"]
        rates = ", ".join(f"{near[f'fpr{s}']:.2f}" for s in ("0.95", "0.99", "0.999"))
        lines.append(f"| {NAMES[name]} | {cell(near['auprc'])} | {rates} | {version(row)} |")
    own = methods.get(OURS)
    if own:
        lines += ["", "Every score of Counterpart's:", "", f"| score | {' | '.join(kinds)} |"]
        lines.append("| --- " * (len(kinds) + 1) + "|")
        for score in next(iter(own["kinds"].values()))["every_score"]:
            cells = [f"{own['kinds'][kind]['every_score'][score]:.2f}" for kind in kinds]
            lines.append(f"| {score} | {' | '.join(cells)} |")
    return lines


def part_section(part: str, document: Row) -> list[str]:
    """A part under its title, with what it belongs to."""
    document = current_rows(document)
    table = imagewise_tables if part == "imagewise" else segmentation_tables
    return [f"## {TITLES[part]}", "", pages.belongs(document["provenance"]), "", *table(document), ""]


def write() -> None:
    """The page, from the parts that have been measured."""
    known = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    lines = [HEAD, *bars_section(known, pages.evaluations(), NAMES)]
    for part in TITLES:
        if part in known:
            lines += part_section(part, known[part])
            if part == "imagewise":
                lines += pages.reliability_section(known[part]["methods"].get(OURS, {}))
    lines += pages.bounds_section(known.get("bounds"))
    lines += pages.curve_section(known.get("curve"))
    parts = [f"{PART}-{name}" for name in pages.BUNDLES]
    lines += ablation_section([known[part] for part in parts if part in known])
    lines += pages.calibration_section(known)
    if FIGURE.exists():
        lines += ["## A dozen slices", "", SHOWN, "", "![Twelve slices](figures/results.png)"]
    PAGE.write_text("\n".join(lines).rstrip() + "\n")
