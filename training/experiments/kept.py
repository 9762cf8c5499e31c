"""What was measured before and still holds: outcomes and rows in the repository, below docs/results/.

A row counts while the data, the split, and all of the bundle that decides it are the same as now: a version that
differs in its gate alone has the rows of the one before, and one with another denoiser those of the opponents. Outcomes
have the counts of every case, so that a method that is added later is paired with them. Rows whose outcome is lost stay
as their document has them.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.config import ROOT
from training.experiments.methods import OURS
from training.experiments.metrics import Counts, IntArray
from training.experiments.opponents import budget
from training.experiments.segmentation import Choice, Outcome, table

RESULTS = ROOT / "docs" / "results"
# What must be the same for any row to count.
SAME = ("data_sha256", "split_sha256")
# And what of the bundle, by method: all that decides its own map, its VQ-VAE, or no more than the slices.
DECIDED_BY = {
    OURS: "detection_sha256",
    **dict.fromkeys(("vqvae", "transformer", "transformer-ensemble"), "codes_sha256"),
}
OPPONENTS_BY = "cases_sha256"
# What differs from row to row of a document.
OF_A_ROW = ("seed", "code", "threads", "cases_sha256", "codes_sha256", "detection_sha256")
OF_A_RUN = ("whole_seconds", "learnt_from")
# Bins of an outcome that is kept: AUPRC and Dice move by less than 0.005.
STORED_BINS = 256

Document = dict[str, Any]


def fits(kept: Document, now: Document, method: str = OURS) -> bool:
    """Whether a method's numbers belong to the data and the split of now, and to a bundle that decides them alike."""
    return all(kept.get(key) == now[key] for key in (*SAME, DECIDED_BY.get(method, OPPONENTS_BY)))


def outcome_path(part: str, method: str) -> Path:
    """Where a method's outcome on a part lies."""
    return RESULTS / "outcomes" / f"{part}-{method}.npz"


def as_stored(outcome: Outcome) -> Outcome:
    """The outcome in fewer bins: what is shown is computed from what is kept."""
    coarse = {kind: counts.coarse(STORED_BINS) for kind, counts in outcome.counts.items()}
    return Outcome(coarse, outcome.per_scan, outcome.choice, outcome.seconds_per_slice, outcome.parameters)


def save_outcome(path: Path, outcome: Outcome, provenance: Document) -> None:
    """Keep an outcome and what it belongs to."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for kind, counts in as_stored(outcome).counts.items():
        arrays |= {f"positive {kind}": _packed(counts.positive), f"negative {kind}": _packed(counts.negative)}
        arrays |= {f"scan {key} {kind}": np.array(values) for key, values in outcome.per_scan[kind].items()}
    facts = {
        "choice": asdict(outcome.choice),
        "seconds_per_slice": outcome.seconds_per_slice,
        "parameters": outcome.parameters,
        "provenance": provenance,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)


def load_outcome(path: Path) -> tuple[Outcome, Document]:
    """An outcome that was kept, and its provenance."""
    with np.load(path, allow_pickle=False) as kept:
        names = [name for name in kept.files if name != "facts"]
        kinds = [name.removeprefix("positive ") for name in names if name.startswith("positive ")]
        counts = {k: Counts(_unpacked(kept[f"positive {k}"]), _unpacked(kept[f"negative {k}"])) for k in kinds}
        scans: dict[str, dict[str, list[float]]] = {k: {} for k in kinds}
        for name in names:
            if name.startswith("scan "):
                _, key, kind = name.split(" ", 2)
                scans[kind][key] = kept[name].tolist()
        facts: Document = json.loads(str(kept["facts"]))
    choice = Choice(**facts["choice"])
    return Outcome(counts, scans, choice, facts["seconds_per_slice"], facts["parameters"]), facts["provenance"]


def _packed(counts: IntArray) -> npt.NDArray[np.uint8]:
    """Byte by byte: the high ones are nearly all zero, and take no room once compressed."""
    return np.moveaxis(counts.astype("<u4")[..., None].view(np.uint8), -1, 0)


def _unpacked(planes: npt.NDArray[np.uint8]) -> IntArray:
    counts = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view("<u4")[..., 0]
    return counts.astype(np.int64)


def load_outcomes(part: str, names: Iterable[str], now: Document) -> dict[str, tuple[Outcome, Document]]:
    """The outcomes of a part that still count, by method."""
    paths = {name: outcome_path(part, name) for name in names}
    found = {name: load_outcome(path) for name, path in paths.items() if path.exists()}
    return {
        name: kept for name, kept in found.items() if fits(kept[1], now, name) and _learnt_alike(name, kept[1], now)
    }


def _learnt_alike(method: str, provenance: Document, now: Document) -> bool:
    """Whether a row is of an opponent with the budget of now against the bundle of `now`."""
    expected = budget(method, now["bundle"].rpartition("-")[0])
    return bool(provenance.get("learnt_from", expected) == expected)


def known_rows(part: str, now: Document) -> Document:
    """The rows of a part's document that still count; each method with a provenance of its own."""
    path = RESULTS / f"{part}.json"
    if not path.exists():
        return {"kinds": {}, "methods": {}}
    document = current_rows(json.loads(path.read_text()))
    of_all = document["provenance"]
    counts = {m for m, row in document["methods"].items() if fits(of_all | row["provenance"], now, m)}
    found = _only(document, counts)
    if OURS not in counts:  # and whoever was compared with it is compared with nothing
        for of in found["kinds"].values():
            for row in of.values():
                row.pop("behind", None)
    return found


def current_rows(document: Document) -> Document:
    """A document without the rows of opponents whose budget was another one than now.

    Rows from before rows had a provenance have that of their document.
    """
    shared = {key: document["provenance"][key] for key in OF_A_ROW if key in document["provenance"]}
    rows = {name: {"provenance": shared, **row} for name, row in document.get("methods", {}).items()}
    alike = {name for name, row in rows.items() if _learnt_alike(name, row["provenance"], document["provenance"])}
    return _only({**document, "methods": rows}, alike)


def _only(document: Document, methods: set[str]) -> Document:
    """A document with the rows of these methods alone."""
    kinds = {kind: {m: r for m, r in of.items() if m in methods} for kind, of in document.get("kinds", {}).items()}
    rows = {m: row for m, row in document["methods"].items() if m in methods}
    return {**document, "kinds": {kind: of for kind, of in kinds.items() if of}, "methods": rows}


def merged(part: str, names: Iterable[str], now: Document) -> Document:
    """All rows that are known of a part: from outcomes, and from its document where the outcome is lost."""
    names = list(names)
    outcomes = load_outcomes(part, names, now)
    document = known_rows(part, now)
    fresh = table({name: outcome for name, (outcome, _) in outcomes.items()})
    kinds: Document = {}
    for kind in [*fresh, *(k for k in document["kinds"] if k not in fresh)]:
        rows = document["kinds"].get(kind, {}) | fresh.get(kind, {})
        kinds[kind] = {name: rows[name] for name in names if name in rows}
    facts = document["methods"] | {name: _facts(part, name, *kept) for name, kept in outcomes.items()}
    return {"kinds": kinds, "methods": {name: facts[name] for name in names if name in facts}}


def _facts(part: str, name: str, outcome: Outcome, provenance: Document) -> Document:
    return {
        "choice": asdict(outcome.choice),
        "seconds_per_slice": outcome.seconds_per_slice,
        "parameters": outcome.parameters,
        "outcome": str(outcome_path(part, name).relative_to(RESULTS)),
        "provenance": {key: provenance[key] for key in (*OF_A_ROW, *OF_A_RUN) if key in provenance},
    }


def missing(part: str, wanted: list[str], names: Iterable[str], now: Document, pair: str) -> list[str]:
    """Which methods have to run, in the order of what is asked.

    Parameters
    ----------
    wanted : list of str
        Asked for by name: those without an outcome. If empty, those of which nothing is known.
    pair : str
        The method that all others are compared with: it runs too, where another does and its outcome is lost.
    """
    kept = load_outcomes(part, names, now)
    known = set() if wanted else set(known_rows(part, now)["methods"])
    lacking = [name for name in wanted or list(names) if name not in kept and name not in known]
    if lacking and pair not in kept and pair not in lacking:
        return [pair, *lacking]
    return lacking


def read(part: str) -> Document:
    """The numbers of a part."""
    document: Document = json.loads((RESULTS / f"{part}.json").read_text())
    return document


def write(part: str, document: Document) -> None:
    """Keep them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{part}.json").write_text(json.dumps(document, indent=1) + "\n")
