"""Comparison of methods at equal budgets: the bundle, the method of its paper, and baselines, on the same scans.

`python -m training.experiments.method_comparison CONFIG PAPER_CONFIG` trains every network that is missing, measures
every method that has no stored result for these bundles, and writes docs/evaluation/NAME-methods.json and .md.

Every method is trained on the same slices with the same augmentation. Every network sees each slice in the views of
the bundle, except where the name of the method states one view. The variant and the filter of a baseline are chosen on
validation scans. The threshold of each method comes from healthy validation scans by one rule.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.manifest import Manifest, Residual, View
from app.pipeline.diffusion import Networks
from app.pipeline.findings import dice, label_findings
from app.pipeline.scores import augment, average_views
from app.runtime.bundle import Bundle, load_bundle
from app.volume import FloatArray
from training.bundle_runs import extract_brain_if_needed
from training.calibrate import residual_settings
from training.config import ROOT, Config
from training.data import load_scan, load_split
from training.experiments import baselines, denoising_autoencoder, method_comparison_page
from training.experiments.ablation import KlCalibration
from training.experiments.cases import GRADES, Case, for_choices, make_case, multiple_sclerosis, synthetic
from training.experiments.experiment import code_version
from training.experiments.manifests import changed
from training.experiments.method_comparison_page import HOME, OTHER_SCANNERS, Comparison, LesionScores, MethodResult
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
from training.unseen_scans import load_unseen_list, load_unseen_scan

# Healthy validation scans that the threshold of each method comes from.
CALIBRATION_SCANS = 10
# As many slices as in the last training of `t1` (docs/decisions/0029-longer-training-for-other-scanners.md).
BUDGETS = {name: Budget(name, 3000, 32, 1e-3) for name in ("dense-ae", "spatial-ae", "vae")}
# Shares of the threshold down to which a finding of a baseline may extend. The one with the higher Dice on validation
# scans is used.
EXTENT_SHARES = (0.6, 1.0)
LESION_GRADES = ("grade 2", "grade 3")


# ---- methods -----------------------------------------------------------------------------------


def in_views(compute: AnomalyMap, views: Sequence[View]) -> AnomalyMap:
    """Return the mean of a map over views of the slices, mapped back to the identity view."""

    def averaged(case: Case) -> FloatArray:
        return average_views([compute(view_case(case, view)) for view in views], views)

    return averaged


def view_case(case: Case, view: View) -> Case:
    """Return a case with the slices of one view. Its truth and its evaluated pixels are not changed."""
    slices = replace(case.slices, x=augment(case.slices.x, view), foreground=augment(case.slices.foreground, view))
    return replace(case, slices=slices)


def method_in_views(method: ComparedMethod, views: Sequence[View]) -> ComparedMethod:
    """Return a baseline whose maps are means over views."""
    return replace(method, variants={name: in_views(compute, views) for name, compute in method.variants.items()})


@dataclass
class NetworkClock:
    """Seconds that the networks of a diffusion method have taken, and slices that its denoiser has processed."""

    seconds: float = 0.0
    denoised: int = 0

    def timed(self, networks: Networks) -> Networks:
        """Return the same networks, which are timed."""

        def denoise(z_t: FloatArray, t: npt.NDArray[np.int64]) -> FloatArray:
            self.denoised += len(z_t)
            return self._run(networks.denoise, z_t, t)

        return Networks(
            encode=lambda x: self._run(networks.encode, x),
            denoise=denoise,
            decode=lambda z0: self._run(networks.decode, z0),
        )

    def _run(self, network: Callable[..., FloatArray], *arrays: npt.NDArray[Any]) -> FloatArray:
        start = time.perf_counter()
        output = network(*arrays)
        self.seconds += time.perf_counter() - start
        return output


@dataclass(frozen=True)
class Candidate:
    """Method of the comparison.

    Attributes
    ----------
    method : ComparedMethod
    clock : NetworkClock, optional
        Set for a diffusion method. Its preparation of the scan is then not part of the time.
    evaluations : int
        Network evaluations per slice, if there is no clock.
    """

    method: ComparedMethod
    clock: NetworkClock | None = None
    evaluations: int = 0


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
        self.makers: dict[str, Callable[[], Candidate]] = {
            f"{self.bundle.manifest.id}, {several}": lambda: self._diffusion(self.bundle, self.bundle.manifest),
            f"{self.bundle.manifest.id}, 1 view": lambda: self._diffusion(
                self.bundle, changed(self.bundle.manifest, views=views[:1])
            ),
            f"{self.paper_bundle.manifest.id}, 1 view": lambda: self._diffusion(
                self.paper_bundle, self.paper_bundle.manifest
            ),
            f"{self.paper_bundle.manifest.id} with the steps of {config.name}, 1 view": self._white_noise_low_levels,
            f"denoising autoencoder, {several}": lambda: self._denoising_autoencoder(views),
            "denoising autoencoder, 1 view": lambda: self._denoising_autoencoder(views[:1]),
            f"dense autoencoder, {several}": lambda: self._autoencoder("dense-ae", views),
            f"spatial autoencoder, {several}": lambda: self._autoencoder("spatial-ae", views),
            f"variational autoencoder, {several}": lambda: self._autoencoder("vae", views),
            f"VQ-VAE, {several}": lambda: self._vqvae(views),
            "mean healthy slice": lambda: Candidate(baselines.mean_difference(config)),
            "intensity threshold": lambda: Candidate(baselines.intensity_threshold(config)),
        }

    def _diffusion(self, bundle: Bundle, manifest: Manifest) -> Candidate:
        clock = NetworkClock()
        networks = clock.timed(bundle.networks.in_batches(BATCH, lambda _: None))
        torch_networks = load_networks(self.config.bundle_folder.with_name(bundle.manifest.id), self.config)
        parameters = baselines.count_parameters(torch_networks.encoder, torch_networks.denoiser, torch_networks.decoder)
        maps = {"": counterpart_map(networks, manifest)}
        return Candidate(ComparedMethod(manifest.id, maps, (NO_FILTER,), parameters), clock)

    def _white_noise_low_levels(self) -> Candidate:
        """Return the networks of the paper's method with the noise levels and the mask of the bundle."""
        # In float32, because the ranges of int8 are valid only at the noise levels of the bundle.
        bundle = load_bundle(self._paper.bundle_folder, quantised=False)
        own = self.bundle.manifest
        calibration = KlCalibration(own.kl, self.config, bundle.networks.in_batches(BATCH, lambda _: None))
        return self._diffusion(
            bundle, changed(own, views=own.views[:1], kl=calibration.change(percentile=own.kl.percentile))
        )

    def _denoising_autoencoder(self, views: Sequence[View]) -> Candidate:
        denoising_autoencoder.train(self.config)
        network = denoising_autoencoder.load(self.config)

        method = baselines.autoencoder_difference(denoising_autoencoder.NAME, network)
        return Candidate(method_in_views(method, views), evaluations=len(views))

    def _autoencoder(self, name: str, views: Sequence[View]) -> Candidate:
        baselines.train(BUDGETS[name], self.config)
        method = baselines.autoencoder_difference(name, baselines.load(BUDGETS[name], self.config))
        return Candidate(method_in_views(method, views), evaluations=len(views))

    def _vqvae(self, views: Sequence[View]) -> Candidate:
        method = baselines.vqvae_difference(load_networks(self.config.bundle_folder, self.config))
        return Candidate(method_in_views(method, views), evaluations=len(views))


# ---- scans -------------------------------------------------------------------------------------


class Scans:
    """Scans of the comparison, each loaded once.

    Parameters
    ----------
    config : Config
    bundle : Bundle
        Its preprocessing makes the slices of every method.
    """

    def __init__(self, config: Config, bundle: Bundle) -> None:
        self._config, self._bundle, self._split = config, bundle, load_split(config.data.splits)

    @property
    def _manifest(self) -> Manifest:
        return self._bundle.manifest

    @cached_property
    def choices(self) -> list[Case]:
        """Validation scans with a lesion, on which the variant and the filter of a baseline are chosen."""
        return for_choices(self._config, self._manifest)

    @cached_property
    def calibration(self) -> list[Case]:
        """Healthy validation scans, which the thresholds come from."""
        subjects = self._split.validation
        chosen = np.linspace(0, len(subjects) - 1, CALIBRATION_SCANS).round().astype(int)
        return self._healthy([subjects[i] for i in chosen])

    @cached_property
    def healthy(self) -> dict[str, list[Case]]:
        """Healthy test scans at home, and of people on scanners that no training saw."""
        return {HOME: self._healthy(self._split.test), OTHER_SCANNERS: list(self._other_scanners())}

    @cached_property
    def lesions(self) -> list[Case]:
        """Test scans with a synthetic lesion, and the real lesions of two patients."""
        inserted = [c for c in synthetic(self._config, self._manifest, "test") if c.kind in LESION_GRADES]
        return [*inserted, *multiple_sclerosis(self._manifest, "T1")]

    def shape_of(self, case: Case) -> str:
        """Return the lesion shape of a test scan, as `cases.shape_inserter` selects it."""
        if case.kind not in GRADES:
            return case.subject
        names = self._split.shapes_test
        return names[self._split.test.index(case.subject) % len(names)]

    def _healthy(self, subjects: Sequence[str]) -> list[Case]:
        volumes = [(subject, load_scan(self._config, subject).volume) for subject in subjects]
        return [make_case(s, "healthy", v, np.zeros(v.shape, np.bool_), self._manifest) for s, v in volumes]

    def _other_scanners(self) -> Iterator[Case]:
        for scan in tqdm(load_unseen_list().people, desc="other scanners", unit="scan"):
            volume = extract_brain_if_needed(load_unseen_scan(scan), self._bundle)
            yield make_case(scan.person, "healthy", volume, np.zeros(volume.shape, np.bool_), self._manifest)


# ---- measurement -------------------------------------------------------------------------------


def measure(name: str, candidate: Candidate, scans: Scans, config: Config, manifest: Manifest) -> MethodResult:
    """Choose, calibrate and measure one method.

    Parameters
    ----------
    name : str
    candidate : Candidate
    scans : Scans
    config : Config
        Its rule for the threshold is used for every method, without a lower limit and without simulated scanners. A
        baseline also chooses the share of the threshold down to which a finding extends.
    manifest : Manifest
        Its grid gives the volumes.
    """
    method, voxel_ml = candidate.method, manifest.preprocessing.voxel_ml
    choice = choose(method, scans.choices if len(method.variants) * len(method.smoothing) > 1 else [])

    def compute(case: Case) -> FloatArray:
        return mask_map(FILTERS[choice.smoothing](method.variants[choice.variant](case)), case)

    healthy = [compute(case) for case in tqdm(scans.calibration, desc=f"{name}: calibration", unit="scan")]
    shares = (config.detection.extent_share,) if candidate.clock else EXTENT_SHARES
    validation = [(compute(case), case) for case in scans.choices] if len(shares) > 1 else []
    settings = max(
        (calibrated_settings(healthy, config, share) for share in shares),
        key=lambda s: sum(dice(label_findings(m, s, voxel_ml)[0] > 0, case.truth) for m, case in validation),
    )
    found = {
        group: {case.subject: _found_ml(compute(case), settings, voxel_ml) for case in cases}
        for group, cases in scans.healthy.items()
    }
    clock = candidate.clock or NetworkClock()
    clock.seconds, clock.denoised, start = 0.0, 0, time.perf_counter()
    maps = [compute(case) for case in tqdm(scans.lesions, desc=f"{name}: lesions", unit="scan")]
    seconds, slices = time.perf_counter() - start, sum(len(case.slice_indices) for case in scans.lesions)
    return MethodResult(
        variant=choice.variant,
        smoothing=choice.smoothing,
        threshold=settings.threshold,
        extent_threshold=settings.extent_threshold,
        parameters=method.parameters,
        evaluations_per_slice=clock.denoised / slices if candidate.clock else candidate.evaluations,
        ms_per_slice=(clock.seconds if candidate.clock else seconds) * 1000 / slices,
        found_ml=found,
        lesions=tuple(_score(m, case, scans, settings, voxel_ml) for m, case in zip(maps, scans.lesions, strict=True)),
        code=code_version(),
    )


def calibrated_settings(healthy: list[FloatArray], config: Config, extent_share: float) -> Residual:
    """Return the thresholds that the maps of healthy validation scans give to a method, without a lower limit."""
    rule = changed(config.detection, min_threshold=0.0, extent_share=extent_share)
    return residual_settings(healthy, changed(config, detection=rule))


def _found_ml(values: FloatArray, settings: Residual, voxel_ml: float) -> float:
    return round(float((label_findings(values, settings, voxel_ml)[0] > 0).sum()) * voxel_ml, 3)


def _score(values: FloatArray, case: Case, scans: Scans, settings: Residual, voxel_ml: float) -> LesionScores:
    counts = count_scores([values], [case])
    return LesionScores(
        kind=case.kind,
        subject=case.subject,
        shape=scans.shape_of(case),
        auprc=round(counts.pooled(average_precision), 4),
        best_dice=round(counts.pooled(best_dice), 4),
        dice=round(dice(label_findings(values, settings, voxel_ml)[0] > 0, case.truth), 4),
    )


def run(config: Config, paper: Config, wanted: Sequence[str]) -> None:
    """Measure the methods that have no result for these bundles, and write the page after each of them."""
    methods = Methods(config, paper)
    scans = Scans(config, methods.bundle)
    path = ROOT / "docs" / "evaluation" / f"{config.name}-methods.json"
    document = Comparison(
        bundle=methods.bundle.manifest.id,
        bundle_sha256=methods.bundle.sha256,
        paper_bundle=methods.paper_bundle.manifest.id,
        paper_sha256=methods.paper_bundle.sha256,
        calibration_scans=CALIBRATION_SCANS,
        false_positive_ml=config.detection.false_positive_ml,
        autoencoder_budget=str(next(iter(BUDGETS.values()))),
        denoising_autoencoder_budget=f"{denoising_autoencoder.STEPS} x {denoising_autoencoder.BATCH} slices",
        methods={},
    )
    if path.exists():
        stored = Comparison.model_validate_json(path.read_text())
        if changed(stored, methods={}) == document:
            document = stored
    for name in wanted or methods.makers:
        if name not in document.methods or wanted:
            result = measure(name, methods.makers[name](), scans, config, methods.bundle.manifest)
            results = document.methods | {name: result}
            document = changed(document, methods={n: results[n] for n in methods.makers if n in results})
            path.write_text(document.model_dump_json(indent=1) + "\n")
            path.with_suffix(".md").write_text(method_comparison_page.page(document))
    path.with_suffix(".md").write_text(method_comparison_page.page(document))


def main() -> None:
    """Compare the methods of two configurations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="configuration of the bundle")
    parser.add_argument("paper", type=Path, help="configuration of the bundle with the paper's method")
    parser.add_argument("--methods", nargs="*", default=[], help="measure only these methods, again")
    options = parser.parse_args()
    run(Config.load(options.config), Config.load(options.paper), options.methods)


if __name__ == "__main__":
    main()
