"""Tests of the page of an evaluation."""

import json
from hashlib import sha256
from typing import Any

import pytest

pytest.importorskip("torch")

from app.manifest import Manifest
from app.pipeline.risk_control import FACTORS
from app.runtime.bundle import MANIFEST
from tests.support.bundle import tiny_manifest
from training.config import ROOT, Config
from training.evaluate import EVALUATION
from training.evaluation_page import EARLIER, evaluation_page
from training.site_profile_page import site_profile_table
from training.unseen_page import heads_table, pathology_table, unseen_lesion_table

# Scores of a refused scan.
NOTHING = {"dice": 0.0, "best_dice": 0.0}


def head(name: str, ml: float | None, *, kind: str = "S", **fields: Any) -> dict[str, Any]:
    """Return the row of an analysed head; of a refused one without a volume."""
    row = {"kind": kind, "name": name, "person": name, "in_training": False, "counted": True, "known_from": ""}
    row |= {"voxel_mm": [1.4, 1.4, 1.2]}
    if ml is None:
        row |= {"outcome": "out_of_distribution", "found": "..."}
    else:
        row |= {"outcome": "analysed", "found_ml": ml, "largest_ml": ml / 2, "findings": 2}
    return row | fields


def lesion(subject: str, shape: str, dice: float, **fields: Any) -> dict[str, Any]:
    """Return the row of a bright lesion with a large part that is found and a small one that is not."""
    row: dict[str, Any] = {"group": "not in training", "family": "intensity", "subject": subject, "shape": shape}
    row |= {"contrast": 0.35, "seed": 0, "outcome": "analysed", "truth_ml": 3.0, "dice": dice, "best_dice": dice}
    row |= {"lesions": [(0.1, False), (3.0, True)], "false_findings": 4, "false_ml": 0.5}
    return row | fields


def test_first_row_counts_people_and_leaves_out_second_files() -> None:
    rows = [head(str(ml), ml) for ml in (0.0, 1.0, 2.0, 3.0, 4.0)] + [head("refused", None)]
    rows += [head("0.0", 100.0, kind="S, DICOM", counted=False), head("ixi", 50.0, kind="IXI", in_training=True)]
    lines = heads_table(rows)
    together = next(line for line in lines if "6 people" in line)
    assert "| 5 of 6 (36 to 100 %) | 2.00 (0.00 to 4.00) | 3.60 (" in together
    assert together.endswith("| 2.0 | out_of_distribution 1 |")
    assert "| S, DICOM (not in the first row) | 1 of 1 | 100.00 |  | 2.0 |  |" in lines
    assert "| IXI (scanner in training, people not) | 1 of 1 | 50.00 |  | 2.0 |  |" in lines
    assert "| 1.0 | S | 1.4 x 1.4 x 1.2 |  | analysed | 1.00 | 0.50 | 2 |" in lines
    assert "| refused | S | 1.4 x 1.4 x 1.2 |  | out_of_distribution |  |  |  |" in lines
    assert not [line for line in lines if line.startswith("| ixi |")]


def test_site_profile_is_measured_on_heads_that_it_was_not_made_from() -> None:
    """With equal volumes, the threshold of the others suits each head. One large head never chooses its own."""
    at = 4.0 / FACTORS
    rows = [head(str(i), 4.0, kind="IXI", volumes_ml=at.tolist()) for i in range(12)]
    rows += [head("few", 1.0, volumes_ml=at.tolist())]
    unchanged, first, second = (line.split(" | ") for line in site_profile_table(rows) if line.startswith("| IXI"))
    assert (unchanged[2], unchanged[3]) == ("none", "4.00 (4.00 to 4.00)")
    # Ten losses L and a bound of 5 T: (10 L + 5 T) / 11 <= T, so L is at most 0.6 T.
    for row, target in ((first, 1.0), (second, 0.5)):
        assert 0.6 * target / 1.1 - 0.005 < float(row[3].split()[0]) <= 0.6 * target
    assert not any(line.startswith("| S |") for line in site_profile_table(rows))
    larger = [row | {"volumes_ml": (at * (50 if row["name"] == "0" else 1)).tolist()} for row in rows[:12]]
    line = next(line for line in site_profile_table(larger) if "| none |" in line)
    assert line.split(" | ")[5].startswith("20.33")


def test_lesions_are_compared_with_home() -> None:
    rows = [lesion(s, shape, 0.3) for s in "pq" for shape in "ab"]
    home = [
        {k: v for k, v in lesion(s, shape, 0.6).items() if k not in ("group", "family")} for s in "xy" for shape in "ab"
    ]
    lines = unseen_lesion_table(rows, home)
    dice = "0.30 (0.30 to 0.30), n = 4 | 0.60 (0.60 to 0.60), n = 4 | 0.50 (0.50 to 0.50)"
    assert f"| c = +0.35 | {dice} |" in lines
    share = next(line for line in lines if line.startswith("| c = +0.35, all sizes |"))
    assert "0.50 (0.50 to 0.50), n = 8 | 0.50 (0.50 to 0.50), n = 8 | 1.00 (" in share
    assert next(line for line in lines if line.startswith("| both signs, 0.05 to 0.5 ml |")).count("0.00") >= 3
    assert next(line for line in lines if line.startswith("| both signs, 2 to 10 ml |")).count("1.00 (") == 3
    assert not [line for line in lines if "10 ml and more" in line]
    assert any(
        line.startswith("| false findings in a scan, c = +0.35 | 4.00 (4.00 to 4.00), n = 4 |") for line in lines
    )


def test_lesions_without_home_are_not_compared() -> None:
    line = next(line for line in unseen_lesion_table([lesion("p", "a", 0.3)], []) if line.startswith("| c = +0.35 |"))
    assert line == "| c = +0.35 | 0.30 (0.30 to 0.30), n = 1 | not measured with this bundle |  |"


def test_scans_with_pathology_are_counted_once() -> None:
    rows = [
        lesion("-", "-", 0.4, kind="tumour", name="a", outline="whole", found_ml=2.0),
        lesion("-", "-", 0.2, kind="tumour", name="a", outline="core", found_ml=2.0),
        head("b", None) | {"kind": "tumour", "outline": "whole", "truth_ml": 9.0, "lesions": [(9.0, False)]} | NOTHING,
    ]
    lines = pathology_table(rows)
    assert "| a | tumour: whole | 3.0 | analysed | 2.0 | 0.40 | 0.40 | 1 of 2 |" in lines
    assert "| b | tumour: whole | 9.0 | out_of_distribution |  | 0.00 | 0.00 | 0 of 1 |" in lines
    assert lines[-1] == "1 of 2 scans were analysed."


@pytest.mark.parametrize(("home_hash", "missing"), [("b", 0), ("a", 1)])
def test_home_is_compared_only_if_one_bundle_measured_both(home_hash: str, missing: int) -> None:
    home = [lesion("x", "a", 0.6)]
    document = {
        "unseen_lesions": {"bundle_sha256": "b", "rows": [lesion("p", "a", 0.3)]},
        "lesions": {"bundle_sha256": home_hash, "rows": home},
    }
    page = evaluation_page(document, tiny_manifest(), "b", "Scope of the numbers.")
    assert ("not measured with this bundle" in page) == bool(missing)
    assert "Scope of the numbers." in page


def test_parts_of_an_earlier_bundle_are_marked() -> None:
    rows = [{"kind": "T2", "outcomes": {"out_of_distribution": 2}}]
    measured = {"bundle_sha256": "b", "rows": [head("d", 1.0)]}
    document = {"foreign": {"bundle_sha256": "a", "rows": rows}, "heads": measured}
    heads, foreign = evaluation_page(document, tiny_manifest(), "a").split(
        "### Scans outside the training distribution"
    )
    assert EARLIER in heads
    assert "with a site profile" not in heads  # one head is too few
    assert EARLIER not in foreign
    assert "| T2 | 2 of 2 | out_of_distribution 2 |" in foreign
    noted = evaluation_page({"heads": measured | {"note": "Only keys were renamed."}}, tiny_manifest(), "a")
    assert "Only keys were renamed." in noted
    assert EARLIER not in noted


@pytest.mark.parametrize("name", ["t1", "flair", "headct", "ct"])
def test_committed_page_is_that_of_the_record(name: str) -> None:
    config = Config.load(ROOT / "training" / "configs" / f"{name}.toml")
    path = config.bundle_folder / MANIFEST
    manifest, digest = Manifest.model_validate_json(path.read_text()), sha256(path.read_bytes()).hexdigest()
    record = EVALUATION / f"{name}.json"
    page = evaluation_page(json.loads(record.read_text()), manifest, digest, config.evaluation.scope)
    assert record.with_suffix(".md").read_text() == page
