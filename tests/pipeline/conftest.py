"""Settings of the property tests and common fixtures."""

import pytest
from hypothesis import settings

from app.manifest import Manifest
from app.pipeline.detect import Detection, detect
from app.pipeline.diffusion import Networks, Schedule
from app.volume import Volume
from tests.support.bundle import tiny_manifest
from tests.support.oracle import gaussian_networks
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, with_lesion

# The same examples on every run, without a time limit.
settings.register_profile("deterministic", deadline=None, derandomize=True, database=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Return the manifest of the tiny bundle."""
    return tiny_manifest()


@pytest.fixture(scope="session")
def networks(manifest: Manifest) -> Networks:
    """Return the exact networks of the tiny bundle."""
    return gaussian_networks(Schedule.from_settings(manifest.schedule))


@pytest.fixture(scope="session")
def healthy() -> Volume:
    """Return a brain from the prior of the networks."""
    return brain()


@pytest.fixture(scope="session")
def volume_with_lesion(healthy: Volume) -> Volume:
    """Return the same brain with a lesion."""
    return with_lesion(healthy, LESION_MM, RADIUS_MM, 1.5)


@pytest.fixture(scope="session")
def found(volume_with_lesion: Volume, networks: Networks, manifest: Manifest) -> Detection:
    """Return the detection on the brain with a lesion."""
    return detect(volume_with_lesion, networks, manifest)
