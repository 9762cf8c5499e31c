"""Registry of detection methods: a separate module, because it imports every method, and each method imports the rest.

The service, training and the benchmarks call ``METHODS[manifest.method]``, so that a bundle is evaluated with the
method that its manifest names. `app.runtime.bundle.read_manifest` refuses unknown names.
"""

from typing import Protocol

from app.manifest import DEFAULT_METHOD, Manifest
from app.pipeline.detect import Detection, detect
from app.pipeline.diffusion import Networks
from app.volume import Volume


class Method(Protocol):
    """Detection method. The docstring of tests/pipeline/test_methods.py lists the rules that it must follow."""

    def __call__(self, volume: Volume, networks: Networks, manifest: Manifest, seed: int | None = None) -> Detection:
        """Analyse a volume with the networks and settings of a bundle. `seed` replaces that of the manifest."""


# Method of the paper: the same steps with other settings and another training (docs/method.md, "The paper's method").
PINAYA_2022 = "pinaya2022"

# The key is the value of `method` in a manifest.
METHODS: dict[str, Method] = {DEFAULT_METHOD: detect, PINAYA_2022: detect}
