"""Registry of detection methods. It is the one place where a new method is registered, hence a module of its own."""

from typing import Protocol

from app.manifest import Manifest
from app.pipeline.detect import Detection, detect
from app.pipeline.networks import Networks
from app.volume import Volume


class Method(Protocol):
    """Detection method. tests/pipeline/test_methods.py states its contract."""

    def __call__(self, volume: Volume, networks: Networks, manifest: Manifest, seed: int | None = None) -> Detection:
        """Analyse a volume with the networks and settings of a bundle. `seed` replaces that of the manifest."""


# By the name that a manifest gives in `method`.
METHODS: dict[str, Method] = {"coarse-patch-diffusion": detect}


def run_method(volume: Volume, networks: Networks, manifest: Manifest, seed: int | None = None) -> Detection:
    """Run the method that the manifest names. `app.runtime.bundle.read_manifest` refuses unknown names."""
    return METHODS[manifest.method](volume, networks, manifest, seed)
