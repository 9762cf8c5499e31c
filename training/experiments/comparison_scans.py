"""Scans of the comparison of methods: for choices, for the threshold, healthy ones and those with lesions."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.manifest import Manifest
from app.runtime.bundle import Bundle
from app.volume import Volume
from training.bundle_runs import extract_brain_if_needed
from training.calibrate import CONTRAST_STREAM, simulate_other_scanner
from training.config import Config
from training.data import load_scan, load_split
from training.experiments.ablation import POOLED
from training.experiments.cases import GRADES, Case, for_choices, make_case, multiple_sclerosis, synthetic, tumours
from training.experiments.method_comparison_page import HOME, OTHER_SCANNERS
from training.unseen_scans import load_unseen_list, load_unseen_scan

# Healthy validation scans that the threshold of each method comes from.
CALIBRATION_SCANS = 10


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
        """Validation scans with a lesion, on which the variant and the filter of a baseline are chosen.

        If the residual of the bundle is multiplied by the intensity, lesions are bright, and only these choose.
        """
        signs = (1, 1) if self._config.detection.weighted_by_intensity else (1, -1)
        return for_choices(self._config, self._manifest, signs)

    @cached_property
    def calibration(self) -> list[Case]:
        """Healthy validation scans, which the thresholds come from."""
        healthy = self._healthy(self._split.validation)
        chosen = np.linspace(0, len(healthy) - 1, min(CALIBRATION_SCANS, len(healthy))).round().astype(int)
        return [healthy[i] for i in chosen]

    @cached_property
    def simulated(self) -> list[Case]:
        """The healthy validation scans on simulated scanners (`training.calibrate`), if the rule has any."""
        if not self._config.detection.simulated_scanners:
            return []
        return [simulated_case(case, i, self._config, self._manifest) for i, case in enumerate(self.calibration)]

    @cached_property
    def healthy(self) -> dict[str, list[Case]]:
        """Healthy test scans at home, and of people on scanners of which no training has scans."""
        home = {HOME: self._healthy(self._split.test)}
        return home | (
            {OTHER_SCANNERS: list(self._other_scanners())} if "heads" in self._config.evaluation.parts else {}
        )

    @cached_property
    def lesions(self) -> list[Case]:
        """Test scans with lesions: outlined tumours, or synthetic lesions and the real ones of two patients."""
        if "tumours" in self._config.evaluation.parts:
            return [case for case in tumours(self._config, self._manifest) if case.truth.any()]
        inserted = [c for c in synthetic(self._config, self._manifest, "test") if c.kind in POOLED]
        real = multiple_sclerosis(self._manifest, "T1") if self._config.bundle.sequence == "T1" else ()
        return [*inserted, *real]

    def shape_of(self, case: Case) -> str:
        """Return the lesion shape of a test scan, as `cases.shape_inserter` selects it, or the subject."""
        if case.kind not in GRADES or self._config.data.image_archive is not None:
            return case.subject
        names = self._split.shapes_test
        return names[self._split.test.index(case.subject) % len(names)]

    def _healthy(self, subjects: Sequence[str]) -> list[Case]:
        """Return the healthy slices of subjects that have any."""
        cases = []
        for subject in subjects:
            scan = load_scan(self._config, subject)
            nothing = np.zeros(scan.volume.shape, np.bool_)
            cases.append(make_case(subject, "healthy", scan.volume, nothing, self._manifest, scan.healthy_slices))
        return [case for case in cases if len(case.slice_indices)]

    def _other_scanners(self) -> Iterator[Case]:
        for scan in tqdm(load_unseen_list().people, desc="other scanners", unit="scan"):
            volume = extract_brain_if_needed(load_unseen_scan(scan), self._bundle)
            yield make_case(scan.person, "healthy", volume, np.zeros(volume.shape, np.bool_), self._manifest)


def simulated_case(case: Case, number: int, config: Config, manifest: Manifest) -> Case:
    """Return a healthy scan with the contrast, noise and sharpness of another scanner.

    Its volume is the stack of the changed slices, so that every method prepares the same scan.
    """
    rng = np.random.default_rng([config.seed, CONTRAST_STREAM, number])
    x = case.slices.x[:, 0].copy()
    x[case.slice_indices] = simulate_other_scanner(case.x[:, 0], config, rng)
    dz, dy, dx = manifest.preprocessing.spacing_mm
    # Slices, rows and columns of the grid of slices ascend along z, y and x of RAS+.
    volume = Volume(np.ascontiguousarray(x.transpose(2, 1, 0)), np.diag([dx, dy, dz, 1.0]))
    return make_case(case.subject, case.kind, volume, np.zeros(volume.shape, np.bool_), manifest)


def gaps_of(case: Case) -> npt.NDArray[np.int64]:
    """Return the evaluated slices whose neighbour below is not evaluated, as positions in a map (M, H, W)."""
    return np.flatnonzero(np.diff(case.slice_indices) > 1) + 1
