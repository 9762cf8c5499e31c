"""The bundle's networks in torch on a GPU: fixed batches, CUDA graphs, float16; on the CPU the same without graphs."""

from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from app.pipeline.networks import Networks
from app.volume import FloatArray
from training.restore import TorchNetworks


class Float16(nn.Module):
    """A denoiser in float16 behind float32 inputs and outputs."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = deepcopy(denoiser).half()

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        epsilon: torch.Tensor = self.denoiser(z_t.half(), t)
        return epsilon.float()


class Replayed:
    """A network for batches of one size, whose inputs stay at one place; captured once as a CUDA graph, or not.

    Parameters
    ----------
    network : Module
        On its device already.
    size : int
        Slices in a batch.
    graphs : bool
        Capture and replay.
    """

    def __init__(self, network: nn.Module, size: int, *, graphs: bool) -> None:
        self._network, self._size, self._graphs = network, size, graphs
        self._device = next(chain(network.parameters(), network.buffers())).device
        self._inputs: list[torch.Tensor] = []
        self._graph: Any = None
        self._output: torch.Tensor | None = None

    def __call__(self, *arrays: Any) -> FloatArray:
        """Evaluate (N, ...) -> (N, ...), whatever N."""
        with torch.inference_mode():
            starts = range(0, len(arrays[0]), self._size)
            return np.concatenate([self._batch([a[i : i + self._size] for a in arrays]) for i in starts])

    def _batch(self, arrays: list[Any]) -> FloatArray:
        if not self._inputs:
            self._place(arrays)
        count = len(arrays[0])
        for place, array in zip(self._inputs, arrays, strict=True):
            place[:count].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        if self._graph is None:
            output = self._network(*self._inputs)
        else:
            self._graph.replay()
            output = self._output
        result: FloatArray = output[:count].cpu().numpy()
        return result

    def _place(self, arrays: list[Any]) -> None:
        """Inputs on the device, and the graph: first runs choose algorithms and allocate, which none may capture."""
        for array in arrays:
            kind = torch.from_numpy(array[:0]).dtype
            self._inputs.append(torch.zeros((self._size, *array.shape[1:]), dtype=kind, device=self._device))
        if not self._graphs:
            return
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self._network(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._network(*self._inputs)


def on_device(
    networks: TorchNetworks, device: str, size: int, *, graphs: bool, float16: bool, channels_last: bool
) -> Networks:
    """Callables for the pipeline; the networks given stay where they are.

    Parameters
    ----------
    networks : TorchNetworks
    device : {"cpu", "cuda"}
    size : int
        Slices in a batch.
    graphs, float16, channels_last : bool
        CUDA graphs; the denoiser's precision; the order of its weights in memory.
    """
    denoiser = Float16(networks.denoiser) if float16 else deepcopy(networks.denoiser)
    if channels_last:
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts = (deepcopy(networks.encoder), denoiser, deepcopy(networks.decoder))
    made: list[Any] = [Replayed(part.to(device).eval(), size, graphs=graphs) for part in parts]
    return Networks(*made)
