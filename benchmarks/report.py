"""docs/BENCHMARKS.md from the JSON beside it: no number is typed by hand."""

from typing import Any

import numpy as np

from benchmarks.bars import bars_table, told
from benchmarks.statistics import Summary
from benchmarks.tables import (
    ceilings,
    gains_table,
    main_table,
    overlap,
    phase_table,
    profile_table,
    scaling_tables,
    served_table,
)
from benchmarks.verdict import int8_verdict
from benchmarks.waterfall import BEFORE

ABSENT = "Not measured in this run."
CONDITIONS = """Brackets are least and largest; a ratio is taken repeat by repeat. The service and its method in torch
are timed from the volume in memory to the detection, resampling included; the others on prepared slices, without it, to
their advantage; they start with the encoder and end with the anomaly map on the slices. What was measured on a sample
is multiplied by slices / sample; where one in so many noise levels was measured, the seconds of that loop are
multiplied too, for each level costs the same. An ensemble is one member's seconds multiplied. The transformer has a
cache of keys and values, and an evaluation of it is one position; each code is judged by a forward pass, then 2.5 % of
a slice's are drawn anew: position by position, or with the known codes between two draws fed at once, which draws the
same codes. Its published size is that of King's College's code (width 256, 12 layers, 8 heads; its attention is a
linear approximation, here it is exact) and its ensemble the eight orderings that a public summary of Pinaya et al. 2021
tells of. The pixel-space network is the denoiser on one channel of pixels. Accuracy: mean over synthetic lesions of
validation subjects, on up to four slices of each case with the lesion and four without, the same for every row, with
all noise levels, at the threshold that suits each case best; slice by slice and batched are one algorithm, judged once.
Operations count two for a multiply and an add, of convolutions and matrix products; ceilings are one matrix product
through onnxruntime, in the same turns. The CT series is made of a real head, resampled and with noise; the service
takes it from upload to mask, the other rows on its slices as its bundle prepares them, once.""".replace("\n", " ")
AFTER_PHASES = (
    "From the file to the results, the bundle loaded: of the repeats, the one that took the median time; before, once. "
    "Time belongs to the innermost phase; `everything else` is what no traced function does."
)


def render(document: dict[str, Any], waterfall: str, scaling: str) -> str:
    """The whole page, with paths of its two figures."""
    lines = ["# Benchmarks", "", *bars_table(document), "", _conditions(document), ""]
    lines += ["## The table", "", *_main(document)]
    lines += ["", "## From upload to mask", "", *_served(document)]
    lines += ["", "## Where the seconds of one scan go", "", *_waterfall(document, waterfall)]
    lines += ["", "## What bounds the networks", "", *_profile(document)]
    lines += ["", "## What each gain was worth", "", *_gains(document)]
    lines += ["", "## Scaling", "", *_scaling(document, scaling)]
    lines += ["", "## Start", "", _start(document)]
    return "\n".join(lines) + "\n"


def _conditions(document: dict[str, Any]) -> str:
    """How all of it was measured, and what was not."""
    parts = document["parts"]
    done = [
        f"{name} {part['measured']} ({part['seconds'] / 60:.1f} min, repeats: {part['repeats']})"
        for name, part in parts.items()
        if "measured" in part
    ]
    failed = [f"{name} failed in the last run: {part['failed']}" for name, part in parts.items() if "failed" in part]
    where = (
        f"Written by `python -m benchmarks` (version {document['version']}) on {document['machine']}, "
        f"`{document['bundle']}` on `{document['scan']}`; parts: {'; '.join(done) or 'none'}."
    )
    return " ".join([where, *(f"{text.rstrip('.')}." for text in failed), *document.get("notes", ()), CONDITIONS])


def _main(document: dict[str, Any]) -> list[str]:
    if "rows" not in document:
        return [ABSENT]
    ceiling = {k: Summary.of([c[k] for c in document["ceiling"]]) for k in ("float32", "int8")}
    bound = (
        f"Ceiling of this machine, in the same turns: float32 {told(ceiling['float32'], 0)} GFLOP/s, int8 "
        f"{told(ceiling['int8'], 0)} GOP/s."
    )
    return [*main_table(document), "", bound, "", int8_verdict(document)]


def _served(document: dict[str, Any]) -> list[str]:
    if "volume" not in document and "ct" not in document:
        return [ABSENT]
    after = (
        "`counterpart serve`, asked over HTTP: from the first byte of the upload to the last of the mask. The first "
        "scan after the start opens the networks. Memory: the largest that each process ever held, added."
    )
    return [*served_table(document), "", after]


def _waterfall(document: dict[str, Any], figure: str) -> list[str]:
    if (found := document.get("waterfall")) is None:
        return [ABSENT]
    runs = document.get("volume", {}).get("runs", [])
    received = float(np.median([run["upload"] for run in runs])) if runs else None
    past = [BEFORE] if "before" in found else []
    return [f"![Waterfall of one scan]({figure})", "", *past, "", *phase_table(found, received), "", AFTER_PHASES]


def _profile(document: dict[str, Any]) -> list[str]:
    found, ceiling = document.get("profile"), document.get("waterfall", document).get("ceiling")
    if found is None or ceiling is None:
        return [ABSENT]
    after = (
        f"By onnxruntime's profiler, a batch of {found['batch']}. The memory of this machine copies "
        f"{found['memory']:.0f} GB/s, read and written; bytes are those of inputs, weights and outputs, of which "
        "caches hold some. An operator that reaches half of a ceiling is called bound by it; one that "
        "reaches neither waits for its threads, or has too little work to fill them."
    )
    return [*profile_table(found, ceilings(ceiling)), "", after]


def _gains(document: dict[str, Any]) -> list[str]:
    if "gains" not in document:
        return [ABSENT]
    more = None
    if "scaling" in document and "waterfall" in document:
        more = overlap(document["scaling"], document["waterfall"])
    after = (
        "Times are those without it over those with it, of the same work in turns; the prediction is a formula or a "
        "constant in `benchmarks.switches` or `switches_host`, written before it was measured."
    )
    return [*gains_table([*document["gains"], *([more] if more else [])]), "", after]


def _scaling(document: dict[str, Any], figure: str) -> list[str]:
    if (found := document.get("scaling")) is None:
        return [ABSENT]
    after = f"Over HTTP, from upload to mask; all workers share {found['cores']} cores. Memory: as above."
    return [f"![Time against slices, resolution and scans at once]({figure})", "", *scaling_tables(found), "", after]


def _start(document: dict[str, Any]) -> str:
    if (start := document.get("start")) is None:
        return ABSENT
    return (
        f"`counterpart --help`: {told(Summary.of(start['help']))} s. First network evaluation of `counterpart detect`, "
        f"from the start of its process: on the golden pair {told(Summary.of(start['golden']))} s, on the scan "
        f"{told(Summary.of(start['scan']))} s."
    )
