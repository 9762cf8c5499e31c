"""One bundle with all methods that are compared with it, and the provenance of its results."""

import hashlib
import json
import shutil
import subprocess
from functools import cached_property
from pathlib import Path

import torch

from app.pipeline.diffusion import Networks
from app.runtime.bundle import Bundle, load_bundle
from training.config import ROOT, SPLITS_FOLDER, Config
from training.data import data_hash, load_split
from training.experiments import baselines
from training.experiments.cases import Case, Part, for_choices
from training.experiments.manifests import cases_hash, codes_hash, detection_hash
from training.experiments.methods import COUNTERPART, ENSEMBLE, TRANSFORMER
from training.experiments.resampling import transformer_method
from training.experiments.results import Provenance
from training.experiments.segmentation import BATCH, NO_FILTER, ComparedMethod, counterpart_map
from training.networks import load_networks

# Validation scans that the transformer's threshold comes from.
CALIBRATION_SCANS = 4
# Paths whose code decides a result.
CODE = ("app", "training", "pyproject.toml")


def code_version(root: Path = ROOT) -> str:
    """Return the commit, with "-dirty" if code was changed since; "unknown" outside of a repository."""
    git = shutil.which("git")

    def run(*arguments: str) -> str:
        done = subprocess.run([git or "", *arguments], cwd=root, capture_output=True, check=False)  # noqa: S603
        return done.stdout.decode().strip()

    commit = run("rev-parse", "--short", "HEAD") if git else ""
    return commit + ("-dirty" if run("status", "--porcelain", "--", *CODE) else "") if commit else "unknown"


def scans_hash(config: Config, subjects: tuple[str, ...]) -> str:
    """Return the SHA-256 of the subjects' scans, and of the slice spacing that the configuration gives to tumours."""
    scans, archive = data_hash(config, subjects), config.data.image_archive
    if archive is None or archive.series_spacing_mm is None:
        return scans
    return hashlib.sha256(json.dumps([scans, archive.series_spacing_mm]).encode()).hexdigest()


class Experiment:
    """One bundle and all methods that are compared with it."""

    def __init__(self, name: str) -> None:
        self.config = Config.load(ROOT / "training" / "configs" / f"{name}.toml")
        self.bundle: Bundle = load_bundle(self.config.bundle_folder)
        self.manifest = self.bundle.manifest
        self.networks = self.bundle.networks.in_batches(BATCH, lambda _: None)

    @cached_property
    def float32_networks(self) -> Networks:
        """The networks in float32. The ranges of int8 are valid only at the noise levels of the bundle."""
        return load_bundle(self.config.bundle_folder, quantised=False).networks.in_batches(BATCH, lambda _: None)

    def method(self, name: str) -> ComparedMethod:
        """Return a method that can run. A baseline without weights is trained first."""
        if name == "intensity":
            return baselines.intensity_threshold(self.config)
        if name == "mean":
            return baselines.mean_difference(self.config)
        networks = load_networks(self.config.bundle_folder, self.config)
        if name == COUNTERPART:
            parameters = baselines.count_parameters(networks.encoder, networks.denoiser, networks.decoder)
            maps = {"": counterpart_map(self.networks, self.manifest)}
            return ComparedMethod(COUNTERPART, maps, (NO_FILTER,), parameters)
        if name == "vqvae":
            return baselines.vqvae_difference(networks)
        if name in (TRANSFORMER, ENSEMBLE):
            healthy = [case.x.copy() for case in self.validation[:CALIBRATION_SCANS]]
            return transformer_method(name, self.config, networks, healthy)
        return baselines.autoencoder_difference(name, baselines.train_and_load(name, self.config))

    @cached_property
    def validation(self) -> list[Case]:
        """Validation cases, on which the variant and smoothing of a method are chosen."""
        return for_choices(self.config, self.manifest)

    def provenance(self, part: Part = "test") -> Provenance:
        """Return the provenance of results on a part of the split."""
        split = load_split(self.config.data.splits)
        return Provenance(
            bundle=self.manifest.id,
            bundle_sha256=self.bundle.sha256,
            cases_sha256=cases_hash(self.manifest),
            codes_sha256=codes_hash(self.manifest),
            detection_sha256=detection_hash(self.manifest),
            data_sha256=scans_hash(self.config, split.test if part == "test" else split.validation),
            split=self.config.data.splits,
            split_sha256=hashlib.sha256((SPLITS_FOLDER / self.config.data.splits).read_bytes()).hexdigest(),
            seed=self.config.seed,
            code=code_version(),
            threads=torch.get_num_threads(),
        )
