"""Writer of docs/BENCHMARKS.md. All numbers but those of "Earlier measurements" come from docs/BENCHMARKS.json."""

from typing import Any

import numpy as np

from benchmarks.rows import ONNX_ROWS, ROWS, SERVICE, TRANSFORMER, Row
from benchmarks.summary import ratio, seconds_outside_networks, summarise, volume_seconds, warm_seconds
from benchmarks.targets import compare_targets
from benchmarks.trace import PHASES
from training.experiments.markdown import Page, bold

NOT_MEASURED = "Not measured in this run."
EMPTY = "-"
INTRODUCTION = """Time, memory and accuracy of Counterpart beside other methods, on the same scan, machine and networks.
`python -m benchmarks` measures, `python -m benchmarks --render` writes this page from BENCHMARKS.json. A time is the
median of the repeats, with the smallest and the largest in brackets."""
CONDITIONS = """
- Rows: each runs in a process of its own, and all take turns. A ratio is taken repeat by repeat.
- Whole volumes: Counterpart, its float32 row and its method in torch are timed from the volume in memory to the
  detection, with resampling. The other methods are timed on preprocessed slices, from the encoder to the anomaly map,
  which favours them.
- Samples: a time that was measured on a sample of slices is scaled to all slices. If only one in so many noise levels
  was evaluated, the time of that loop is multiplied, because each level costs the same. The time of an ensemble is that
  of one member, multiplied.
- Transformers: they work on the codes of the autoencoder with a cache of keys and values, and an evaluation is one
  position. After a forward pass for the likelihood, 2.5 % of the codes of a slice are resampled: position by position,
  or with the known codes between two draws fed at once ("known codes at once"), which draws the same codes. The small
  one has the size of the experiments in [RESULTS.md](RESULTS.md). The published one has width 256, 12 layers and 8
  heads, as the code of King's College London, with exact instead of linear attention. Its ensemble has eight orderings,
  according to a public summary of Pinaya et al. 2021.
- Pixel-space diffusion: AnoDDPM (Wyatt et al. 2022) with the U-Net of the denoiser on one channel of pixels. These
  weights and those of the transformers are untrained, so these rows have no accuracy.
- Accuracy: mean over synthetic lesions in validation subjects, at the best threshold of each case. All rows are scored
  on the same slices, up to four with the lesion and four without, with all noise levels. Slice by slice and in batches
  are the same algorithm and have the same accuracy.
- CT series: made from a real head, resampled to 512 x 512 x 200, with noise. Counterpart is timed from upload to mask,
  the other rows once on the preprocessed slices.
"""
EARLIER = """
These were measured on the machine above by commands that were deleted after commit `bf94f0d`.

- Optimisations, as time without divided by time with: fewer evaluations (1 + 1 noise levels in 4 views instead of
  200 + 50 in one view) 20.8; batches of 16 slices 1.4; 2 threads 1.6; blocked channels (NCHWc) 1.65; int8 convolutions
  1.2; skipped slices without brain 1.2; skipped slices with an empty mask 1.0; maps compressed in parallel 2.05;
  oblique scans resampled in parallel 1.9; lazy imports of `counterpart --help` 11.
- No gain, or not adopted: maps in int16 1.56 (int16 has no NaN); JPEG-LS in threads 0.89; JPEG 2000 through GDCM 0.52;
  pinned threads 0.85; two processes of one thread instead of one of two threads 1.4 (a single scan is then slower).
- Upload to mask by size: a quarter, half, three quarters and all of 181 slices take 2.9, 5.0, 6.6 and 7.4 s. Voxels of
  2, 1.5, 1 and 0.7 mm take 5.4, 5.5, 6.3 and 9.7 s.
- Parallel scans: 1, 2 and 4 scans take 7.3, 15.1 and 29.9 s with one worker (1.2 GB), and 9.2, 11.9 and 24.5 s with two
  workers (2.2 GB) on the same 2 cores.
- GFLOP per slice: Counterpart 17, the paper 365 (50 DDIM steps) or 1019 (500 ancestral steps), pixel-space diffusion
  1521 (250 steps) or 3041 (500 steps), small transformer 11, published transformer 75. A matrix product reaches 303
  GFLOP/s in float32 and 2200 GOP/s in int8; Counterpart's networks reach 182 GFLOP/s.
- Share of each network's time: convolutions 99 % (encoder); convolutions 28 %, normalisation 11 % (denoiser);
  convolutions 46 %, code search 52 % (decoder).
- First network evaluation of `counterpart detect` on the golden pair: 0.66 s after the start of the process.
"""


def render(document: dict[str, Any], figure: str) -> str:
    """Return the page. `figure` is the path of the waterfall."""
    page = Page("Benchmarks")
    page.paragraph(INTRODUCTION)
    page.paragraph(_provenance(document))
    _add_targets(page, document)
    page.heading("Conditions")
    if notes := [*document["notes"], *_failures(document)]:
        page.bullets(notes)
    page.raw(CONDITIONS)
    page.heading("Methods side by side")
    _add_rows(page, document)
    page.heading("From upload to mask")
    _add_uploads(page, document)
    page.heading("Phases of one scan")
    _add_phases(page, document, figure)
    page.heading("Earlier measurements")
    page.raw(EARLIER)
    return page.render()


def _provenance(document: dict[str, Any]) -> str:
    done = [
        f"{name} on {part['measured']} ({part['repeats']} repeats, {part['seconds'] / 60:.1f} min)"
        for name, part in document["parts"].items()
        if "measured" in part
    ]
    return (
        f"Measured with version {document['version']} on {document['machine']}, `{document['bundle']}` on "
        f"`{document['scan']}`: {'; '.join(done) or 'nothing'}."
    )


def _failures(document: dict[str, Any]) -> list[str]:
    parts = document["parts"].items()
    return [f"The last run of {name} failed: {part['failed'].rstrip('.')}." for name, part in parts if "failed" in part]


def _add_targets(page: Page, document: dict[str, Any]) -> None:
    targets = compare_targets(document)
    page.heading("Targets")
    count = sum(target.met is True for target in targets)
    page.paragraph(
        f"The targets were set before they were measured. {count} of {len(targets)} are met. "
        "[Decision 19](decisions/0019-bars-out-of-reach.md) explains the missed ones."
    )
    page.table(("target", "measured", ""), [(t.text, t.found or EMPTY, t.verdict) for t in targets])


def _add_rows(page: Page, document: dict[str, Any]) -> None:
    if "rows" not in document:
        page.paragraph(NOT_MEASURED)
        return
    header = (
        "method", "T1 volume, s", "times Counterpart", "slice, ms", "timed on", "CT series, s",
        "denoiser evaluations per slice", "peak memory, MB", "cold start, s", "best Dice", "AUPRC",
    )  # fmt: skip
    page.table(header, [row_cells(row, document) for row in ROWS if row.name in document["rows"]])


def row_cells(row: Row, document: dict[str, Any]) -> list[str]:
    """Return the table line of a row."""
    found, service = document["rows"][row.name], document["rows"].get(SERVICE)
    seconds, last = volume_seconds(found), found["repeats"][-1]
    evaluations = last["counts"].get("denoise", 0) * last["stride"] / last["sample"]
    return [
        row.title + ("" if row.is_trained else " (untrained)"),
        summarise(seconds),
        summarise(ratio(seconds, volume_seconds(service)), 1) if service else EMPTY,
        summarise([1000 * s / last["slices"] for s in seconds], 1),
        _timed_on(row, last),
        _ct_cell(row, document.get("ct")),
        f"{evaluations:.1f}",
        f"{found['peak_bytes'] / 1e6:.0f}",
        f"{found['cold_seconds']:.1f}",
        *_accuracy_cells(row, found["accuracy"]),
    ]


def _timed_on(row: Row, repeat: dict[str, Any]) -> str:
    looped = "members" if row.family == TRANSFORMER else "noise levels"
    thinned = f", 1 of {repeat['stride']} {looped}" if repeat["stride"] > 1 else ""
    if repeat["sample"] == repeat["slices"]:
        return f"all {repeat['slices']} slices{thinned}"
    return f"{repeat['sample']} of {repeat['slices']} slices{thinned}"


def _ct_cell(row: Row, ct: dict[str, Any] | None) -> str:
    if ct is None:
        return EMPTY
    if row.name == SERVICE:
        return f"{summarise(warm_seconds(ct), 1)}, upload to mask"
    if row.name in ONNX_ROWS or row.name not in ct["rows"]:
        return EMPTY
    scope = "volume in memory" if row.sample is None else "slices, scaled"
    return f"{volume_seconds(ct['rows'][row.name])[-1]:.1f}, {scope}"


def _accuracy_cells(row: Row, found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["not measured" if row.is_trained else EMPTY] * 2
    return [f"{np.mean(found[key]):.3f}" for key in ("dice", "auprc")]


def _add_uploads(page: Page, document: dict[str, Any]) -> None:
    lines = []
    for key, name in (("volume", "T1 volume"), ("ct", "CT series, 512 x 512 x 200")):
        if (found := document.get(key)) is None:
            continue
        uploads = [run["upload"] for run in found["runs"]]
        lines.append(
            (
                name,
                found["runs"][0]["id"],
                f"{found['megabytes']:.0f}",
                f"{found['runs'][0]['seconds']:.2f}",
                summarise(warm_seconds(found)),
                summarise(uploads),
                f"{found['peak_bytes'] / 1e6:.0f}",
            )
        )
    if not lines:
        page.paragraph(NOT_MEASURED)
        return
    header = ("scan", "bundle", "upload, MB", "first scan, s", "later scans, s", "upload alone, s", "peak memory, MB")
    page.table(header, lines)
    page.paragraph(
        "`counterpart serve` over HTTP, from the first byte of the upload to the last byte of the mask. The first scan "
        "after the start opens the networks. Memory is the sum of the peaks of all processes."
    )


def _add_phases(page: Page, document: dict[str, Any], figure: str) -> None:
    if (found := document.get("waterfall")) is None:
        page.paragraph(NOT_MEASURED)
        return
    page.image("Waterfall of one scan", figure)
    page.paragraph(
        "Before: the same scan, bundle and noise levels, with the networks in eager torch, one slice at a time. It is "
        "measured once. After: the service, the repeat with the median time. The bundle is already loaded. The time "
        "runs from the file to the results, and a phase does not include the phases inside it."
    )
    page.table(("phase", "before, s", "after, s", "share", "in networks, s"), phase_lines(found))
    outside = seconds_outside_networks(found["after"]["phases"])
    page.paragraph(f"Outside the networks, the service takes {outside:.2f} s.")


def phase_lines(found: dict[str, Any]) -> list[list[str]]:
    """Return the table lines of the waterfall."""
    after, before = found["after"]["phases"], found.get("before", {}).get("phases", {})
    whole = sum(phase["seconds"] for phase in after.values())
    lines = []
    for name in (name for name in PHASES if name in after or name in before):
        line = [name, f"{before[name]['seconds']:.2f}" if name in before else EMPTY]
        if name in after:
            seconds, network = after[name]["seconds"], after[name]["network"]
            line += [f"{seconds:.2f}", f"{100 * seconds / whole:.0f} %", f"{network:.2f}"]
        else:
            line += [EMPTY] * 3
        lines.append(line)
    whole_before = sum(phase["seconds"] for phase in before.values())
    network = sum(phase["network"] for phase in after.values())
    sums = [f"{whole_before:.2f}" if before else EMPTY, f"{whole:.2f}", "100 %", f"{network:.2f}"]
    lines.append([bold(cell) for cell in ("all", *sums)])
    return lines
