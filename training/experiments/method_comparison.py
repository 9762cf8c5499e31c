"""Comparison of a bundle with the method of its paper and with baselines, on the same scans.

`python -m training.experiments.method_comparison CONFIG PAPER_CONFIG` trains every network that is missing, measures
every method that has no stored result for these bundles, and writes docs/evaluation/NAME-methods.json and .md.

All denoisers and autoencoders are trained on the same slices with the same augmentation. A map is the mean over the
views of the bundle, or of one view if the name of the method states so. The variant, the filter and the extent of a
finding of a baseline are chosen on validation scans. The threshold of each method comes from healthy validation scans
by one rule. The lesions are outlined tumours for `flair` and synthetic for the other bundles.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tqdm import tqdm

from app.manifest import Manifest, Residual, View
from app.pipeline.diffusion import Networks
from app.pipeline.findings import dice, label_findings
from app.pipeline.scores import augment, average_views
from app.runtime.bundle import Bundle, load_bundle
from app.volume import BoolArray, FloatArray
from training.calibrate import residual_settings, separate_slices
from training.config import ROOT, Config
from training.experiments import baselines, denoising_autoencoder, method_comparison_page
from training.experiments.ablation import KlCalibration
from training.experiments.cases import Case
from training.experiments.comparison_scans import Scans, gaps_of
from training.experiments.experiment import code_version
from training.experiments.manifests import changed
from training.experiments.method_comparison_page import Comparison, LesionScores, MethodResult
from training.experiments.methods import Budget
from training.experiments.metrics import average_precision, best_dice
from training.experiments.segmentation import (
    BATCH,
    FILTERS,
    NO_FILTER,
    AnomalyMap,
    ComparedMethod,
    choose,
    count_scores,
    counterpart_map,
    mask_map,
)
from training.networks import load_networks

# Steps of 32 slices of an autoencoder, which are as many slices as in the last training of the denoiser of the bundle
# (docs/decisions/0029-longer-training-for-other-scanners.md and 0005-noise-levels-in-training.md).
AUTOENCODER_STEPS = {"t1": 3000, "headct": 4000, "flair": 5250}
# Shares of the threshold down to which a finding of a baseline may extend.
EXTENT_SHARES = (0.6, 1.0)
# Scans with a lesion on which `--times` measures the time of all methods.
TIMED_SCANS = 5
# Suffix of a variant whose map is multiplied by the intensity of the slice.
TIMES_INTENSITY = " times intensity"


# ---- methods -----------------------------------------------------------------------------------


def autoencoder_budget(name: str, bundle: str) -> Budget:
    """Return the training budget of an autoencoder for a bundle, both by name."""
    return Budget(name, AUTOENCODER_STEPS[bundle], 32, 1e-3)


def in_views(compute: AnomalyMap, views: Sequence[View]) -> AnomalyMap:
    """Return a map that is the mean of `compute` over views, (M, H, W), in the identity view."""

    def averaged(case: Case) -> FloatArray:
        return average_views([compute(view_case(case, view)) for view in views], views)

    return averaged


def times_intensity(compute: AnomalyMap) -> AnomalyMap:
    """Return a map that is multiplied by the slice, for a sequence in which lesions are bright."""

    def weighted(case: Case) -> FloatArray:
        return compute(case) * case.x[:, 0]

    return weighted


def view_case(case: Case, view: View) -> Case:
    """Return a case with the slices of one view. Its truth and its evaluated pixels are not changed."""
    slices = replace(case.slices, x=augment(case.slices.x, view), foreground=augment(case.slices.foreground, view))
    return replace(case, slices=slices)


@dataclass
class NetworkClock:
    """Seconds that the networks of a method take, and slices that its main network processes."""

    seconds: float = 0.0
    evaluations: int = 0

    def timed(self, network: Callable[..., FloatArray], *, counted: bool = False) -> Callable[..., FloatArray]:
        """Wrap a network so that its time is added to `seconds`, and its slices to `evaluations` if they count."""

        def run(*arrays: npt.NDArray[Any]) -> FloatArray:
            start = time.perf_counter()
            output = network(*arrays)
            self.seconds += time.perf_counter() - start
            self.evaluations += len(arrays[0]) * counted
            return output

        return run

    def timed_networks(self, networks: Networks) -> Networks:
        """Wrap the three networks of a bundle. The slices of the denoiser count."""
        return Networks(
            encode=self.timed(networks.encode),
            denoise=self.timed(networks.denoise, counted=True),
            decode=self.timed(networks.decode),
        )


@dataclass(frozen=True)
class Candidate:
    """Method of the comparison.

    Attributes
    ----------
    method : ComparedMethod
    clock : NetworkClock
        Clock of its networks.
    extent_shares : tuple of float
        Shares of the threshold down to which a finding may extend. The one with the highest Dice on validation scans
        is used.
    """

    method: ComparedMethod
    clock: NetworkClock = field(default_factory=NetworkClock)
    extent_shares: tuple[float, ...] = EXTENT_SHARES


class Methods:
    """Methods of the comparison. Networks are trained and loaded when they are used.

    Parameters
    ----------
    config, paper : Config
        Configurations of the bundle and of the paper's method.
    """

    def __init__(self, config: Config, paper: Config) -> None:
        self.config, self._paper = config, paper
        self.bundle, self.paper_bundle = load_bundle(config.bundle_folder), load_bundle(paper.bundle_folder)
        views = self.bundle.manifest.views
        several = f"{len(views)} views"
        own, paper_id = self.bundle.manifest, self.paper_bundle.manifest.id
        self.makers: dict[str, Callable[[], Candidate]] = {
            f"{own.id}, {several}": lambda: self._shipped(own),
            f"{own.id}, 1 view": lambda: self._shipped(changed(own, views=views[:1])),
            f"{paper_id}, 1 view": self._paper_method,
            f"{paper_id} with the steps of {config.name}, float32, 1 view": self._paper_networks,
            f"denoising autoencoder, {several}": lambda: self._denoising_autoencoder(views),
            "denoising autoencoder, 1 view": lambda: self._denoising_autoencoder(views[:1]),
            f"dense autoencoder, {several}": lambda: self._autoencoder("dense-ae", views),
            f"spatial autoencoder, {several}": lambda: self._autoencoder("spatial-ae", views),
            f"variational autoencoder, {several}": lambda: self._autoencoder("vae", views),
            f"VQ-VAE, {several}": lambda: self._vqvae(views),
            "mean healthy slice": self._mean_difference,
            "intensity threshold": lambda: Candidate(baselines.intensity_threshold(config)),
        }

    @property
    def reference(self) -> str:
        """Name of the method that the others are compared with: the bundle."""
        return next(iter(self.makers))

    def _shipped(self, manifest: Manifest) -> Candidate:
        return self._diffusion(self.bundle, self.config, manifest)

    def _paper_method(self) -> Candidate:
        return self._diffusion(self.paper_bundle, self._paper, self.paper_bundle.manifest, has_choices=True)

    def _paper_networks(self) -> Candidate:
        """Return the networks of the paper's method with the noise levels, the mask and the filter of the bundle."""
        # In float32, because int8 of the paper's bundle was calibrated only at that bundle's noise levels.
        bundle = load_bundle(self._paper.bundle_folder, quantised=False)
        own = self.bundle.manifest
        calibration = KlCalibration(own.kl, self.config, bundle.networks.in_batches(BATCH, lambda _: None))
        manifest = changed(own, views=own.views[:1], kl=calibration.change(percentile=own.kl.percentile))
        return self._diffusion(bundle, self._paper, manifest)

    def _diffusion(self, bundle: Bundle, config: Config, manifest: Manifest, *, has_choices: bool = False) -> Candidate:
        """Return a method with the networks of a bundle, as the manifest says or with the choices of a baseline."""
        clock, networks = NetworkClock(), load_networks(config.bundle_folder, config)
        timed = clock.timed_networks(bundle.networks.in_batches(BATCH, lambda _: None))
        parameters = baselines.count_parameters(networks.encoder, networks.denoiser, networks.decoder)
        if has_choices:
            maps = self._weighted(with_local_contrast(timed, manifest))
            return Candidate(ComparedMethod(manifest.id, maps, parameters=parameters), clock)
        method = ComparedMethod(manifest.id, {"": counterpart_map(timed, manifest)}, (NO_FILTER,), parameters)
        return Candidate(method, clock, (self.config.detection.extent_share,))

    def _weighted(self, maps: dict[str, AnomalyMap]) -> dict[str, AnomalyMap]:
        """Add variants that are multiplied by the intensity, if the bundle multiplies its own residual by it."""
        if not self.config.detection.weighted_by_intensity:
            return maps
        return maps | {(v + TIMES_INTENSITY).strip(): times_intensity(compute) for v, compute in maps.items()}

    def _denoising_autoencoder(self, views: Sequence[View]) -> Candidate:
        denoising_autoencoder.train(self.config)
        network = denoising_autoencoder.load(self.config)
        parameters = baselines.count_parameters(network)
        return self._reconstructing(denoising_autoencoder.NAME, baselines.reconstructor(network), parameters, views)

    def _autoencoder(self, name: str, views: Sequence[View]) -> Candidate:
        budget = autoencoder_budget(name, self.config.name)
        baselines.train(budget, self.config)
        network = baselines.load(budget, self.config)
        return self._reconstructing(name, baselines.reconstructor(network), baselines.count_parameters(network), views)

    def _vqvae(self, views: Sequence[View]) -> Candidate:
        networks = load_networks(self.config.bundle_folder, self.config)
        parameters = baselines.count_parameters(networks.encoder, networks.decoder)
        return self._reconstructing("vqvae", baselines.vqvae_reconstructor(networks), parameters, views)

    def _mean_difference(self) -> Candidate:
        method = baselines.mean_difference(self.config)
        return Candidate(replace(method, variants=self._weighted(method.variants)))

    def _reconstructing(
        self, name: str, reconstruct: baselines.Reconstruct, parameters: int, views: Sequence[View]
    ) -> Candidate:
        """Return a method whose map is the difference between slices and their reconstruction, over views."""
        clock = NetworkClock()
        maps = baselines.reconstruction_maps(clock.timed(reconstruct, counted=True))
        in_all_views = {variant: in_views(compute, views) for variant, compute in maps.items()}
        return Candidate(ComparedMethod(name, self._weighted(in_all_views), parameters=parameters), clock)


def with_local_contrast(networks: Networks, manifest: Manifest) -> dict[str, AnomalyMap]:
    """Return the map of the paper's method and the one divided by the local contrast, as the baselines have them."""
    divided = changed(manifest.residual, contrast_floor=baselines.CONTRAST_FLOOR)
    return {
        baselines.DIFFERENCE: counterpart_map(networks, manifest),
        baselines.OVER_CONTRAST: counterpart_map(networks, changed(manifest, residual=divided)),
    }


# ---- measurement -------------------------------------------------------------------------------


def measure(name: str, candidate: Candidate, scans: Scans, config: Config, manifest: Manifest) -> MethodResult:
    """Choose, calibrate and measure one method.

    Parameters
    ----------
    name : str
    candidate : Candidate
    scans : Scans
    config : Config
        Its rule for the threshold is used for every method, without `min_threshold`.
    manifest : Manifest
        Its grid gives the volumes.
    """
    voxel_ml, clock, archive = manifest.preprocessing.voxel_ml, candidate.clock, config.data.image_archive
    # In the calibration, each image of an archive without order counts alone, as in `training.calibrate`.
    separate = (lambda values: values) if archive is None or archive.ordered else separate_slices
    # The choice of a filter and the choice of an extent need the same maps.
    method = replace(candidate.method, variants={v: cache(compute) for v, compute in candidate.method.variants.items()})
    choice = choose(method, scans.choices)

    def compute(case: Case) -> FloatArray:
        return mask_map(FILTERS[choice.smoothing](method.variants[choice.variant](case)), case)

    def found(values: FloatArray, settings: Residual) -> BoolArray:
        return label_findings(values, settings, voxel_ml)[0] > 0

    def found_ml(values: FloatArray, settings: Residual) -> float:
        return round(float(found(values, settings).sum()) * voxel_ml, 3)

    healthy, simulated = (
        [separate(compute(case)) for case in tqdm(cases, desc=f"{name}: calibration", unit="scan")]
        for cases in (scans.calibration, scans.simulated)
    )
    several = len(candidate.extent_shares) > 1
    chosen_on = [(compute(case), case.truth) for case in scans.choices] if several else []
    settings = max(
        (calibrate_thresholds(healthy, simulated, config, share) for share in candidate.extent_shares),
        key=lambda s: sum(dice(found(values, s), truth) for values, truth in chosen_on),
    )
    false_ml = {
        group: {
            case.subject: found_ml(separate_slices(compute(case), gaps_of(case)), settings)
            for case in tqdm(cases, desc=f"{name}: {group}")
        }
        for group, cases in scans.healthy.items()
    }
    lesions = scans.lesions
    clock.seconds, clock.evaluations = 0.0, 0
    maps = [compute(case) for case in tqdm(lesions, desc=f"{name}: lesions", unit="scan")]
    slices = sum(len(case.slice_indices) for case in lesions)
    return MethodResult(
        variant=choice.variant,
        smoothing=choice.smoothing,
        threshold=settings.threshold,
        extent_threshold=settings.extent_threshold,
        parameters=method.parameters,
        evaluations_per_slice=clock.evaluations / slices,
        ms_per_slice=clock.seconds * 1000 / slices,
        found_ml=false_ml,
        lesions=tuple(
            _score(values, case, scans.shape_of(case), found(values, settings))
            for values, case in zip(maps, lesions, strict=True)
        ),
        code=code_version(),
    )


def measure_times(document: Comparison, makers: dict[str, Callable[[], Candidate]], scans: Scans) -> Comparison:
    """Measure the time of all measured methods again, in one run and on the same scans, so that the times compare."""
    timed = scans.lesions[:TIMED_SCANS]
    slices = sum(len(case.slice_indices) for case in timed)
    results = {}
    for name, result in document.methods.items():
        candidate = makers[name]()
        compute = candidate.method.variants[result.variant]
        compute(timed[0])  # the first run of a network takes longer
        candidate.clock.seconds = 0.0
        for case in tqdm(timed, desc=f"{name}: time", unit="scan"):
            compute(case)
        results[name] = changed(result, ms_per_slice=candidate.clock.seconds * 1000 / slices)
    return changed(document, methods=results)


def calibrate_thresholds(
    healthy: list[FloatArray], simulated: list[FloatArray], config: Config, extent_share: float
) -> Residual:
    """Calibrate the thresholds of a method on its maps (M, H, W) of healthy scans, also on simulated scanners."""
    rule = changed(config.detection, min_threshold=0.0, extent_share=extent_share)
    return residual_settings(healthy, changed(config, detection=rule), simulated)


def _score(values: FloatArray, case: Case, shape: str, found: BoolArray) -> LesionScores:
    counts = count_scores([values], [case])
    return LesionScores(
        kind=case.kind,
        subject=case.subject,
        shape=shape,
        auprc=round(counts.pooled(average_precision), 4),
        best_dice=round(counts.pooled(best_dice), 4),
        dice=round(dice(found, case.truth), 4),
    )


def empty_document(config: Config, bundle: Bundle, paper: Bundle, choices: int, calibration: int) -> Comparison:
    """Return the document of a comparison before anything is measured.

    Parameters
    ----------
    config : Config
    bundle, paper : Bundle
    choices, calibration : int
        Number of validation scans with a lesion and without one.
    """
    return Comparison(
        bundle=bundle.manifest.id,
        bundle_sha256=bundle.sha256,
        paper_bundle=paper.manifest.id,
        paper_sha256=paper.sha256,
        calibration_scans=calibration,
        choice_scans=choices,
        false_positive_ml=config.detection.false_positive_ml,
        simulated_ml=config.detection.simulated_false_positive_ml or None,
        autoencoder_budget=str(autoencoder_budget("vae", config.name)),
        denoising_autoencoder_budget=f"{denoising_autoencoder.STEPS} x {denoising_autoencoder.BATCH} slices",
        methods={},
    )


def run(config: Config, paper: Config, wanted: Sequence[str], *, times: bool = False) -> None:
    """Measure the methods that have no result for these bundles, and write the page after each of them.

    Parameters
    ----------
    config, paper : Config
    wanted : sequence of str
        Methods that are measured again.
    times : bool
        Measure the time of all methods again.
    """
    if config.name not in method_comparison_page.TEXTS:
        raise SystemExit(f"method_comparison_page.TEXTS has no text about the scans of {config.name}. Add it.")
    methods = Methods(config, paper)
    scans = Scans(config, methods.bundle)
    assert all(case.truth.any() for case in scans.choices), "a scan without a lesion would favour high thresholds"
    path = ROOT / "docs" / "evaluation" / f"{config.name}-methods.json"
    counts = len(scans.choices), len(scans.calibration)
    document = empty_document(config, methods.bundle, methods.paper_bundle, *counts)
    if path.exists():
        stored = Comparison.model_validate_json(path.read_text())
        if changed(stored, methods={}) == document:
            document = stored
    if wanted and methods.reference not in document.methods:
        raise SystemExit(f"{path} has no result of {methods.reference}. Measure all methods first.")
    for name in wanted or methods.makers:
        if name not in document.methods or wanted:
            result = measure(name, methods.makers[name](), scans, config, methods.bundle.manifest)
            results = document.methods | {name: result}
            document = changed(document, methods={n: results[n] for n in methods.makers if n in results})
            path.write_text(document.model_dump_json(indent=1) + "\n")
            path.with_suffix(".md").write_text(method_comparison_page.page(document))
    if times:
        document = measure_times(document, methods.makers, scans)
        path.write_text(document.model_dump_json(indent=1) + "\n")
    path.with_suffix(".md").write_text(method_comparison_page.page(document))


def main() -> None:
    """Compare the methods of two configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration of the bundle")
    parser.add_argument("paper", type=Path, help="configuration of the bundle with the paper's method")
    parser.add_argument("--methods", nargs="*", default=[], help="measure only these methods, again")
    parser.add_argument("--times", action="store_true", help="measure the time of all methods again, in one run")
    options = parser.parse_args()
    run(Config.load(options.config), Config.load(options.paper), options.methods, times=options.times)


if __name__ == "__main__":
    main()
