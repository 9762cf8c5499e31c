"""Models that count what they are asked; without torch, so that the service's row is measured as it is."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from app.pipeline.networks import Networks
from app.volume import FloatArray


def counting(models: Networks, counts: Counter[str]) -> Networks:
    """The same models; `counts` tells how many slices each network was asked for."""

    def counted(name: str, network: Callable[..., FloatArray]) -> Callable[..., FloatArray]:
        def call(*arrays: Any) -> FloatArray:
            counts[name] += len(arrays[0])
            return network(*arrays)

        return call

    return Networks(
        counted("encode", models.encode), counted("denoise", models.denoise), counted("decode", models.decode)
    )
