"""Sections of docs/RESULTS.md beside the tables of the methods: reliability, the curve, calibration and the gate."""

import json
from collections import Counter
from typing import Any

import numpy as np

from training.config import ROOT
from training.experiments.curve import CLOSE, Point
from training.experiments.gate import LARGE_ML, REFUSED_AT_MOST
from training.experiments.methods import OURS
from training.experiments.reliability import BINS

EVALUATION = ROOT / "docs" / "evaluation"
# Where the Dice of a bundle is to be found.
DICE_OF = {"t1": "shapes", "headct": "sprites", "flair": "tumours"}
BUNDLES = tuple(DICE_OF)
# No part of the body that this bundle does not know; but in grey values, which are no Hounsfield units.
OWN_KIND = {"headct": "MedNIST HeadCT, slice"}

Row = dict[str, Any]


def cell(interval: dict[str, float]) -> str:
    """A number with its interval."""
    return f"{interval['value']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def belongs(p: Row) -> str:
    """What numbers belong to."""
    return (
        f"{p['bundle']} (`{p['bundle_sha256'][:12]}`), split {p['split']} (`{p['split_sha256'][:12]}`), "
        f"data `{p['data_sha256'][:12]}`, seed {p['seed']}, {p['threads']} thread(s)."
    )


def reliability_section(own: Row) -> list[str]:
    """Whether the score is a probability."""
    if "reliability" not in own:
        return []
    told = own["reliability"]
    lines = [
        "### Is the score a probability?",
        "",
        f"The chosen score ({told['score']}) becomes the probability of not being healthy by isotonic regression on",
        "validation pictures, healthy and near. On test pictures, what it predicts is compared with the share that is",
        f"observed, in {BINS} bins of equal count; brackets and bars are bootstrap 95 % intervals over subjects. Where",
        "fewer or more pictures are ill than on validation, the probabilities are off even if the order is right.",
        "",
        "| test pictures | share that is not healthy, fitted on and here | expected calibration error | Brier score |",
        "| --- | --- | --- | --- |",
    ]
    for kind, row in told["kinds"].items():
        shares = f"{row['share_fitted']:.2f}, {row['share']:.2f}"
        lines.append(f"| healthy and {kind} | {shares} | {cell(row['ece'])} | {cell(row['brier'])} |")
    return [*lines, "", "![Predicted and observed share](figures/reliability.png)", ""]


def bounds_section(document: Row | None) -> list[str]:
    """Which step loses a lesion."""
    if not document:
        return []
    lines = [
        "## What bounds the synthetic lesions",
        "",
        "Lesions in healthy slices of validation subjects; a diagnosis, and no result. One step after another is given",
        "the truth. The second row says how much of what is lost is lost by a pixel. The third and fourth say what",
        "false alarms and misses of the KL map cost. The gap between the fifth and the sixth row is what a better",
        "imagined counterpart would bring; the seventh row is what the error of the autoencoder leaves without a mask.",
        "The last row is what the mask alone gives away: a row that is no better says nothing of the image. AUPRC,",
        "Dice (best-achievable).",
        "",
    ]
    for told in document["bundles"].values():
        grades = told["grades"]
        lines += [belongs(told["provenance"]), f"Code `{told['provenance']['code']}`.", ""]
        lines += [f"| given | {' | '.join(f'{g}, {case_count(rows)} cases' for g, rows in grades.items())} |"]
        lines += ["| --- " * (len(grades) + 1) + "|"]
        for step in next(iter(grades.values())):
            cells = [f"{cell(rows[step]['auprc'])}, {cell(rows[step]['dice'])}" for rows in grades.values()]
            lines.append(f"| {step} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def case_count(rows: Row) -> int:
    """Cases of a grade."""
    return int(next(iter(rows.values()))["cases"])


def knee(points: dict[str, Row]) -> str:
    """The fewest evaluations at which neither Dice nor AUPRC is further from the best than `CLOSE`."""
    best = {key: max(row[key]["value"] for row in points.values()) for key in ("dice", "auprc")}
    good = [name for name, row in points.items() if all(row[k]["value"] >= best[k] - CLOSE for k in best)]
    # Two points can be best in one each: then the one that lacks the least.
    lacking = {name: max(best[k] - row[k]["value"] for k in best) for name, row in points.items()}
    return min(good or [min(lacking, key=lambda n: lacking[n])], key=lambda n: points[n]["evaluations_per_slice"])


def knee_sentence(told: Row) -> str:
    """Where the knee is, and how the shipped configuration compares."""
    points, own = told["points"], told["points"][told["shipped"]]
    name = knee(points)
    row = points[name]
    where = (
        f"**{told['provenance']['bundle']}**: the knee is at {row['evaluations_per_slice']:.1f} evaluations a slice "
        f"({name}): Dice {row['dice']['value']:.2f}, AUPRC {row['auprc']['value']:.2f}."
    )
    if name == told["shipped"]:
        return f"{where} That is what the bundle does."
    return (
        f"{where} The bundle asks for {own['evaluations_per_slice']:.1f}: Dice {own['dice']['value']:.2f}, "
        f"AUPRC {own['auprc']['value']:.2f}."
    )


def curve_section(document: Row | None) -> list[str]:
    """Dice and AUPRC against evaluations."""
    if not document:
        return []
    lines = [
        "## How many evaluations of the network",
        "",
        "Healthy validation subjects with synthetic lesions of grades 2 and 3, pooled; these choose, so that no test",
        "subject is in it. Dice is best-achievable. Evaluations are counted as they happen, those of the gate among",
        "them; the networks are float32. KL thresholds of other noise levels than the bundle's come from the same",
        "percentile of healthy validation latents. The knee is the fewest evaluations within",
        f"{CLOSE:g} of the best Dice and the best AUPRC.",
        "",
    ]
    for told in document["bundles"].values():
        if told["shipped"] not in told["points"]:
            continue  # another process is at it
        lines += [belongs(told["provenance"]), "", knee_sentence(told), "", *curve_table(told), ""]
    return [*lines, "![Dice and AUPRC against evaluations](figures/evaluations.png)", ""]


def curve_table(told: Row) -> list[str]:
    """Every point of one bundle, by evaluations."""
    lines = [
        "| views | KL at t | back over t | evaluations a slice | Dice | AUPRC | ms a slice | cases | code |",
        "| --- " * 9 + "|",
    ]
    for name, row in sorted(told["points"].items(), key=lambda each: each[1]["evaluations_per_slice"]):
        point = Point(row["views"], tuple(row["kl"]), tuple(row["reverse"]))
        mark = "**" if name == told["shipped"] else ""
        cells = [
            f"{mark}{point.views}{mark}",
            ", ".join(map(str, point.kl)),
            ", ".join(map(str, point.reverse)),
            f"{row['evaluations_per_slice']:.1f}",
            cell(row["dice"]),
            cell(row["auprc"]),
            f"{row['seconds_per_slice'] * 1e3:.0f}",
            str(row["cases"]),
            f"`{row['provenance']['code']}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Bold is what the bundle does."]


def evaluations() -> dict[str, Row]:
    """What `training.evaluate` has written of each bundle."""
    found = {name: EVALUATION / f"{name}.json" for name in BUNDLES}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def calibration_section(known: dict[str, Row]) -> list[str]:
    """What thresholds and gate, which come from healthy subjects alone, do on test subjects."""
    evaluated = evaluations()
    if not evaluated:
        return []
    return [
        "## What thresholds and gate do on test subjects",
        "",
        "Thresholds and gate come from healthy validation subjects alone; this is what they do on test subjects. From",
        "`docs/evaluation`, and Dice from the tables above. False positives are those of scans that were analysed.",
        'A "slice" is a picture in grey values, alone; a stack is like a subject of MedNIST: both as wide as heads.',
        "",
        *healthy_table(evaluated),
        "",
        *dice_table(known),
        "",
        *foreign_table(evaluated),
        "",
        *large_lines(known.get("gate")),
    ]


def healthy_table(evaluated: dict[str, Row]) -> list[str]:
    """False positives and refusals of healthy test scans."""
    lines = [
        "| bundle | healthy test scans | false positives, ml: median (least to greatest) | refused by mistake |",
        "| --- | --- | --- | --- |",
    ]
    for name, document in evaluated.items():
        rows = [r for r in document["healthy"]["rows"] if r["outcome"] != "no_healthy_slice"]
        ml = [r["false_positive_ml"] for r in rows if r["outcome"] == "analysed"]
        told = f"{np.median(ml):.2f} ({min(ml):.2f} to {max(ml):.2f})" if ml else ""
        bundle = f"{name} (`{document['healthy']['bundle_sha256'][:12]}`)"
        lines.append(f"| {bundle} | {len(rows)} | {told} | {len(rows) - len(ml)} |")
    return lines


def dice_table(known: dict[str, Row]) -> list[str]:
    """Dice at the threshold that is shipped, beside what no honest threshold reaches."""
    lines = [
        "| bundle | test scans with | shipped threshold | best one for all scans | best one for each scan |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in BUNDLES:
        document = known.get(DICE_OF[name], {"kinds": {}})
        for kind, rows in document["kinds"].items():
            own = rows.get(OURS)
            if own is not None:
                cells = [cell(own[key]) for key in ("scan_shipped", "dice", "scan_dice")]
                lines.append(f"| {document['provenance']['bundle']} | {kind} | {' | '.join(cells)} |")
    return lines


def foreign_table(evaluated: dict[str, Row]) -> list[str]:
    """Refused scans of another kind, by bundle."""
    names = [name for name, document in evaluated.items() if "foreign" in document]
    refused: dict[str, dict[str, str]] = {}
    for name in names:
        # The last row of the table is of nothing foreign: what the gate takes from those who send one slice.
        for row in [*evaluated[name]["foreign"]["rows"], *evaluated[name].get("single", {"rows": []})["rows"]]:
            outcomes = Counter(row["outcomes"])
            told = f"{outcomes.total() - outcomes['analysed']} of {outcomes.total()}"
            own = row["kind"] == OWN_KIND.get(name)
            refused.setdefault(row["kind"], {})[name] = f"heads in grey values: {told}" if own else told
    heads = [f"refused by {name} (`{evaluated[name]['foreign']['bundle_sha256'][:12]}`)" for name in names]
    lines = [f"| scans of another kind | {' | '.join(heads)} |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(row.get(name, '') for name in names)} |" for kind, row in refused.items()]
    return lines


def large_lines(document: Row | None) -> list[str]:
    """How many scans with a large lesion the gates refuse."""
    return [line for told in (document or {"bundles": {}})["bundles"].values() for line in _large(told)]


def _large(document: Row) -> list[str]:
    s, p = document["summary"], document["provenance"]
    share = s["share"]
    reached = "which is reached" if share["value"] <= REFUSED_AT_MOST else "which is missed"
    sizes = [r["truth_ml"] for r in document["rows"] if r["truth_ml"] >= LARGE_ML]
    shapes = ", ".join(dict.fromkeys(r["shape"] for r in document["rows"]))
    text = (
        f"Large lesions: of {s['scans']} healthy test scans with a synthetic lesion of {min(sizes):.0f} to "
        f"{max(sizes):.0f} ml ({shapes}; bright and dark, grade 3), {s['refused']} are refused: "
        f"{share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%}). The aim is at most "
        f"{REFUSED_AT_MOST:.0%}, {reached}. {belongs(p)} Code `{p['code']}`."
    )
    return [text, ""]
