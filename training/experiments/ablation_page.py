"""The section of docs/RESULTS.md on what each choice of the detection does."""

from training.experiments.ablation import POOLED
from training.experiments.pages import Row, belongs, case_count, cell


def ablation_section(documents: list[Row]) -> list[str]:
    """What each choice of the detection does."""
    if not documents:
        return []
    lines = [
        "## What each choice does",
        "",
        "Synthetic lesions in healthy slices of validation subjects, half of them bright and half dark: these may",
        "choose what a bundle does, so that no test subject is in it. Each row changes one thing against what is",
        "shipped; a KL threshold that this moves comes from healthy validation scans again. AUPRC of each kind, and",
        f"what is gained in AUPRC and best-achievable Dice over {' and '.join(POOLED)} together: bold where the paired",
        "interval is on one side of zero. Of `flair`, the tumours of validation patients stand beside it; real lesions",
        "choose nothing. Networks are float32.",
        "",
    ]
    for told in documents:
        lines += [belongs(told["provenance"]), f"Code `{told['provenance']['code']}`.", ""]
        lines += [*candidates_table(told["kinds"]), "", *thresholds_table(told["thresholds"]), ""]
    return lines


def gained(interval: dict[str, float]) -> str:
    """A difference; bold where it is one."""
    text = f"{interval['value']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"
    return f"**{text}**" if interval["low"] > 0 or interval["high"] < 0 else text


def candidates_table(kinds: Row) -> list[str]:
    """Every candidate of one bundle."""
    pooled = " and ".join(POOLED)
    single = [kind for kind in kinds if kind != pooled]
    heads = [f"{kind}, {case_count(kinds[kind])} cases" for kind in single]
    lines = [f"| | {' | '.join(heads)} | gain in AUPRC | gain in Dice |", "| --- " * (len(single) + 3) + "|"]
    for name, row in kinds[pooled].items():
        cells = [cell(kinds[kind][name]["auprc"]) for kind in single]
        gains = [gained(row["gain"][key]) if "gain" in row else "" for key in ("auprc", "dice")]
        lines.append(f"| {name} | {' | '.join([*cells, *gains])} |")
    return lines


def thresholds_table(rows: list[Row]) -> list[str]:
    """Dice of the mask for every rule of the thresholds."""
    kinds = list(rows[0]["dice"])
    lines = [
        "Dice of the mask, mean over the cases, for rules that make both thresholds from healthy validation scans:",
        "",
        f"| median healthy scan shows at most, ml | findings reach down to | threshold | {' | '.join(kinds)} |",
        "| --- " * (len(kinds) + 3) + "|",
    ]
    for row in rows:
        cells = [cell(row["dice"][kind]) for kind in kinds]
        mark = "**" if row["shipped"] else ""
        ml = f"{mark}{row['false_positive_ml']:g}{mark}"
        rule = f"{ml} | {row['extent_share']:g} of it | {row['threshold']:.3f}"
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return [*lines, "", "Bold is what the bundle does."]
