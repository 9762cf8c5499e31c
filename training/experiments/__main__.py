"""Command that runs experiments and writes docs/results/comparison.md: `python -m training.experiments PART`.

A part can also be `all` or `report`. `report` writes the page and redraws the two diagrams from stored results, without
measuring anything. A part measures only what has no valid result below docs/results.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

from training.experiments import (
    ablation,
    accuracy_vs_evaluations,
    baselines,
    figures,
    image_level,
    ood,
    oracle_ablation,
    reliability,
    report,
    results_cache,
)
from training.experiments.cases import SEGMENTED, Case
from training.experiments.experiment import Experiment
from training.experiments.methods import BUDGETS, COUNTERPART, METHOD_INFO, TRANSFORMER, describe_budget
from training.experiments.resampling import CodeResampler
from training.experiments.results import (
    ByBundle,
    CurveScores,
    ImageLevelResults,
    ImageLevelScores,
    RunProvenance,
)
from training.experiments.segmentation import score_method
from training.networks import load_networks

IMAGE_LEVEL = "image_level"
IMAGE_LEVEL_METHODS = (COUNTERPART, "vqvae", *BUDGETS)


def run_segmentation(part: str, wanted: Sequence[str]) -> None:
    """Run the methods of a part that have no valid outcome."""
    bundle, load_cases = SEGMENTED[part]
    experiment = Experiment(bundle)
    now = experiment.provenance()
    test: list[Case] = []
    for name in results_cache.missing_methods(part, wanted or METHOD_INFO, now):
        start = time.perf_counter()
        test = test or list(load_cases(experiment.config, experiment.manifest))
        outcome = score_method(experiment.method(name), experiment.validation, test, experiment.manifest)
        seconds = time.perf_counter() - start
        provenance = RunProvenance(
            **now.model_dump(), total_seconds=seconds, training_budget=describe_budget(name, bundle)
        )
        results_cache.save_outcome(results_cache.outcome_path(part, name), outcome, provenance)
        results_cache.save(part, results_cache.collect(part, now))


def run_image_level(wanted: Sequence[str]) -> None:
    """Run the methods of experiment 1 that have no valid scores."""
    experiment = Experiment("headct")
    config, manifest, now = experiment.config, experiment.manifest, experiment.provenance()
    stored = results_cache.load(IMAGE_LEVEL, ImageLevelResults)
    known = stored.methods if stored else {}
    rows = {name: row for name, row in known.items() if results_cache.is_valid(row.provenance, now, name)}
    missing = [name for name in wanted or IMAGE_LEVEL_METHODS if name not in rows]
    if not missing:
        return
    validation = image_level.load_healthy_and_near(config, manifest, "validation")
    test = [*image_level.load_healthy_and_near(config, manifest, "test"), *image_level.load_far(config, manifest)]
    for name in missing:
        start = time.perf_counter()
        scores = _image_scores(experiment, name)
        validated, tested = ([image_level.score_images(scores, i) for i in images] for images in (validation, test))
        chosen = image_level.choose_score(*validated)
        rows[name] = ImageLevelScores(
            score=chosen,
            seconds=tested[0].seconds,
            kinds=image_level.evaluate(chosen, tested[0], tested[1:]),
            reliability=reliability.evaluate(chosen, validated, tested) if name == COUNTERPART else None,
            provenance=RunProvenance(
                **now.model_dump(),
                total_seconds=time.perf_counter() - start,
                training_budget=describe_budget(name, config.name),
            ),
        )
        ordered = {n: rows[n] for n in IMAGE_LEVEL_METHODS if n in rows}
        results_cache.save(IMAGE_LEVEL, ImageLevelResults(provenance=now, methods=ordered))


def _image_scores(experiment: Experiment, name: str) -> image_level.ImageScores:
    config, models = experiment.config, experiment.networks
    if name == COUNTERPART:
        return image_level.counterpart_scores(models, experiment.manifest)
    if name == "vqvae":
        return image_level.reconstruction_scores(lambda x: models.decode(models.encode(x)))
    if name == TRANSFORMER:
        networks = load_networks(config.bundle_folder, config)
        network = baselines.train_and_load(TRANSFORMER, config)
        return image_level.likelihood_scores(CodeResampler(networks, network, config.seed))
    return image_level.reconstruction_scores(baselines.reconstructor(baselines.train_and_load(name, config)))


def draw_examples() -> None:
    """Draw the example slices."""
    examples = []
    for name in figures.SHOWN:
        experiment = Experiment(name)
        examples += figures.make_examples(experiment.config, experiment.networks, experiment.manifest)
    figures.draw_examples(examples)


def write_report() -> None:
    """Write the page and draw its diagrams from stored results."""
    curve = results_cache.load(accuracy_vs_evaluations.PART, ByBundle[CurveScores])
    if curve is not None:
        figures.draw_curve(curve)
    images = results_cache.load(IMAGE_LEVEL, ImageLevelResults)
    own = images.methods.get(COUNTERPART) if images else None
    if own is not None and own.reliability is not None:
        figures.draw_reliability(own.reliability)
    report.write()


PARTS: dict[str, Callable[[Sequence[str]], None]] = {
    IMAGE_LEVEL: run_image_level,
    **{part: partial(run_segmentation, part) for part in SEGMENTED},
    accuracy_vs_evaluations.PART: lambda _: accuracy_vs_evaluations.run(),
    ablation.PART: lambda _: ablation.run(),
    oracle_ablation.PART: lambda _: oracle_ablation.run(),
    ood.PART: lambda _: ood.run(),
    "examples": lambda _: draw_examples(),
}


def main() -> None:
    """Run the parts that are named on the command line, then write the page."""
    parser = argparse.ArgumentParser(prog="python -m training.experiments", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=["all", "report", *PARTS], help="parts to run")
    parser.add_argument("--methods", nargs="*", default=[], choices=list(METHOD_INFO), help="only these methods")
    options = parser.parse_args()
    for part in PARTS if "all" in options.parts else [p for p in options.parts if p in PARTS]:
        PARTS[part](options.methods)
        write_report()
    write_report()


if __name__ == "__main__":
    main()
