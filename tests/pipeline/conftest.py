"""Settings of the property tests, and what several files start from."""

import pytest
from hypothesis import settings

from app.manifest import Manifest
from app.pipeline.diffusion import Schedule
from app.pipeline.networks import Networks
from app.volume import Volume
from tests.support.bundle import tiny_manifest
from tests.support.oracle import gaussian_networks
from tests.support.phantom import LESION_MM, RADIUS_MM, brain, with_lesion

# The same examples on every run, however busy the machine.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """Decisions of the tiny bundle."""
    return tiny_manifest()


@pytest.fixture(scope="session")
def networks(manifest: Manifest) -> Networks:
    """Its exact models."""
    s = manifest.schedule
    return gaussian_networks(Schedule.linear(s.steps, s.beta_start, s.beta_end))


@pytest.fixture(scope="session")
def healthy() -> Volume:
    """A brain that the models know."""
    return brain()


@pytest.fixture(scope="session")
def sick(healthy: Volume) -> Volume:
    """The same with a lesion."""
    return with_lesion(healthy, LESION_MM, RADIUS_MM, 1.5)
