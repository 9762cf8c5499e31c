"""Sections of the page: each has a figure and a table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.cluster_bootstrap import MIN_CLUSTERS, Interval, quantile
from training.experiments.markdown import table
from training.formats import show_interval, show_share
from training.results_page import figures
from training.results_page.aims import HOME_ML, UNAFFECTED_ML, UNSEEN_HIGH_ML, UNSEEN_ML, UPLOADS
from training.results_page.formats import NO_VALUE, number_of
from training.results_page.groups import (
    HIGH,
    HOME_SOURCES,
    Haemorrhage,
    Healthy,
    Outlined,
    compared_lesions,
    haemorrhage_groups,
    home_groups,
    inserted_dice,
    outlined_groups,
    phases,
    resampled,
    together,
    unseen_groups,
    warm_seconds,
)
from training.results_page.records import Records

NOT_MEASURED = "Not measured."
MODALITIES = {"t1": "T1", "flair": "FLAIR", "headct": "head CT", "ct": "head CT"}
INSERTED_NOTE = """\
Lesions that a program inserted into these heads, and into the test scans of ds002748. Tissue from another place of the
same brain is a lesion that the training never used."""
HEALTHY_HEADER = ("n", "analysed", "false findings, ml: median", "90th percentile")


def figure(caption: str, name: str) -> str:
    """Return the Markdown of a figure."""
    return f"![{caption}](figures/results-{name}.png)"


def make_home(records: Records, folder: Path) -> str:
    """Make the figure and the table of the scanners of the training."""
    groups = home_groups(records)
    if not groups:
        return NOT_MEASURED
    lesions = {HOME_SOURCES[part.model]: part for part in records.find("lesions")}
    dice = {
        source: (inserted_dice(part.rows, bright=True), inserted_dice(part.rows, bright=False))
        for source, part in lesions.items()
    }
    figures.draw_home(folder / "results-home.png", groups, dice, HOME_ML)
    rows = []
    for group in groups:
        part = lesions.get(group.source)
        cells = [show_interval(found) for found in dice[group.source]] if part else ["", ""]
        note = f"; Dice: {part.label}" if part and part.label != group.label else ""
        rows.append([group.label + note, f"{MODALITIES[group.model]}, {group.source}", *_healthy_cells(group), *cells])
    header = ["model", "healthy scans", *HEALTHY_HEADER, "Dice of inserted bright lesions, median", "of dark ones"]
    caption = "False findings in healthy scans, and Dice of inserted lesions, by model and source of the scans"
    changes = sorted({abs(row["contrast"]) for part in lesions.values() for row in part.rows})
    texts = [figure(caption, "home"), table(header, rows)]
    if changes:
        percent = " or ".join(f"{100 * change:.0f}" for change in changes)
        texts.append(f"Inserted lesions change the intensity by {percent} % of its range.")
    return "\n\n".join(texts)


INSERTED_NOTE = """\
Lesions that a program inserted into these heads, and into the test scans of ds002748. Tissue from another place of the
same brain is a lesion that the training never used."""
HEALTHY_HEADER = ("n", "analysed", "false findings, ml: median", "90th percentile")


def _healthy_cells(group: Healthy) -> list[str]:
    high = show_interval(group.percentile(HIGH)) if len(group.ml) >= MIN_CLUSTERS else ""
    return [number_of(group), show_share(len(group.ml), group.scans), show_interval(group.percentile(50)), high]


def make_unseen(records: Records, folder: Path) -> str:
    """Make the figure and the table of the other scanners, and the comparison of inserted lesions with home."""
    groups = unseen_groups(records)
    if not groups:
        return NOT_MEASURED
    whole = together(groups)
    figures.draw_unseen(folder / "results-unseen.png", groups, whole, (UNSEEN_ML, UNSEEN_HIGH_ML))
    rows = [
        [f"**{whole.source}**", *_healthy_cells(whole)],
        *([group.source, *_healthy_cells(group)] for group in groups),
    ]
    texts = [
        figure("False findings in healthy T1 heads, by scanner", "unseen"),
        f"Model: {whole.label}.",
        table(["scanner", *HEALTHY_HEADER], rows),
    ]
    if compared := compared_lesions(records):
        lines = [
            [
                title,
                f"{show_interval(each.unseen)}, {each.unseen_count} lesions",
                f"{show_interval(each.home)}, {each.home_count} lesions",
                show_interval(each.ratio),
            ]
            for title, each in compared
        ]
        texts += [
            INSERTED_NOTE,
            table(["measured in inserted lesions", "other scanners", "home", "other divided by home"], lines),
        ]
    return "\n\n".join(texts)


def make_real(records: Records, folder: Path) -> str:
    """Make the figure and the table of the real lesions."""
    groups = outlined_groups(records)
    if not groups:
        return NOT_MEASURED
    figures.draw_real(folder / "results-real.png", groups)
    header = [
        "lesions",
        "model",
        "n",
        "analysed",
        "Dice of the analysed scans: median",
        "lowest to highest",
        "lesions found",
    ]
    rows = [[group.title, group.label, str(group.scans), *_outlined_cells(group)] for group in groups]
    texts = [figure("Dice of each scan with outlined lesions", "real"), table(header, rows)]
    pooled = [row for part in records.find("tumours") for row in part.rows if row.get("method") == "counterpart"]
    if pooled:
        dice = Interval(*pooled[0]["shipped_pooled"])
        texts.append(f"Dice of the gliomas over all voxels of all patients together: {show_interval(dice)}.")
    return "\n\n".join(texts)


def _outlined_cells(group: Outlined) -> list[str]:
    analysed = f"{len(group.dice)} of {group.scans}"
    found = f"{sum(group.found)} of {len(group.found)}" if group.found is not None else NO_VALUE
    if not group.dice:
        return [analysed, "", "", found]
    people = [str(i) for i in range(len(group.dice))]
    ends = f"{min(group.dice):.2f} to {max(group.dice):.2f}" if len(group.dice) > 1 else ""
    return [analysed, show_interval(resampled(quantile(group.dice), people)), ends, found]


def make_haemorrhage(records: Records, folder: Path) -> str:
    """Make the figure and the table of real haemorrhage."""
    groups = haemorrhage_groups(records)
    if not groups:
        return NOT_MEASURED
    figures.draw_haemorrhage(folder / "results-haemorrhage.png", groups, UNAFFECTED_ML)
    columns = [_haemorrhage_cells(group) for group in groups]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    caption = "Marked volume in adults with and without haemorrhage, and ROC curve by slice"
    texts = [figure(caption, "haemorrhage"), table(["adults", *(group.label for group in groups)], rows)]
    texts.append(
        "A slice can show several kinds of haemorrhage. Fresh blood is brighter than the counterpart. `report.json` "
        "states the difference of each finding."
    )
    if all(group.model != "headct" for group in groups):
        texts.append(
            "No record has real haemorrhage with `headct`. [Decision 26](decisions/0026-head-ct-inside-the-skull.md) "
            "compares it with `ct`."
        )
    return "\n\n".join(texts)


def _haemorrhage_cells(group: Haemorrhage) -> dict[str, str]:
    with_all, without_all = (
        len(group.affected) + group.refused_affected,
        len(group.unaffected) + group.refused_unaffected,
    )
    marked = [ml > 0 for ml, bleeds in zip(group.slice_ml, group.slice_bleeds, strict=True) if bleeds]
    low, high = np.percentile(group.unaffected or [np.nan], (50, HIGH))
    kinds = group.summary["slices_found_by_kind"]
    return {
        "analysed with haemorrhage": f"{len(group.affected)} of {with_all}",
        "analysed without haemorrhage": f"{len(group.unaffected)} of {without_all}",
        **{
            f"AUROC by {name}, {text}": show_interval(Interval(*group.summary[f"{name}_auroc_{key}"]))
            for name in ("patient", "slice")
            for key, text in (("volume", "marked volume"), ("brighter", "marked volume that is brighter"))
        },
        "slices with haemorrhage and a mark": f"{sum(marked)} of {len(marked)}",
        **{f"{kind} haemorrhage: slices with a mark": f"{hit} of {count}" for kind, (hit, count) in kinds.items()},
        "Dice in outlined slices, each patient": ", ".join(f"{dice:.2f}" for dice in group.outlined_dice),
        "false findings without haemorrhage, ml: median, 90th percentile": f"{low:.2f}, {high:.2f}",
        "the same, only brighter than the counterpart": ", ".join(
            f"{ml:.2f}" for ml in group.summary["false_positive_brighter_ml"]
        ),
    }


def make_time(records: Records, folder: Path) -> str:
    """Make the figure and the table of the times."""
    rows = []
    for part, (text, _) in UPLOADS.items():
        if seconds := warm_seconds(records, part):
            label = records.bundles.label_id(records.benchmarks[part]["runs"][0]["id"])
            rows.append([text, label, _median_and_range(seconds), f"1 scan, {len(seconds)} runs"])
    for found in records.find("healthy"):
        if seconds := [row["seconds"] for row in found.rows if "seconds" in row]:
            text = f"{MODALITIES[found.model]}, only detection, test scans of home"
            rows.append([text, found.label, _median_and_range(seconds), f"{len(seconds)} scans"])
    if not rows:
        return NOT_MEASURED
    header = ["scan", "model", "seconds: median (lowest to highest)", "n"]
    shown = phases(records)
    texts = []
    if shown:
        figures.draw_time(folder / "results-time.png", shown)
        whole = sum(phase.network + phase.other for phase in shown)
        label = records.bundles.label_id(records.benchmarks["bundle"])
        scope = (
            f"The figure shows one T1 volume with {label} on {records.benchmarks['machine']}, {whole:.1f} s in total."
        )
        texts = [
            figure("Seconds of each phase of one T1 volume", "time"),
            f"{scope} [method.md](method.md) explains the phases.",
        ]
    note = (
        "The times of the detection come from the evaluations. Other programs may have used the machine at that time."
    )
    return "\n\n".join([*texts, table(header, rows), note])


def _median_and_range(seconds: Sequence[float]) -> str:
    return f"{np.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
