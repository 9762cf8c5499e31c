"""Networks of a bundle in torch on a GPU: fixed batches, CUDA graphs, float16. On the CPU without CUDA graphs."""

from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from app.pipeline.diffusion import Networks
from app.volume import FloatArray
from training.networks import TorchNetworks


class Float16Denoiser(nn.Module):
    """Denoiser in float16 with float32 inputs and outputs."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = deepcopy(denoiser).half()

    def forward(self, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        epsilon: torch.Tensor = self.denoiser(z_t.half(), t)
        return epsilon.float()


class FixedBatchNetwork:
    """Network for batches of one size with inputs at fixed addresses, optionally captured as a CUDA graph.

    Parameters
    ----------
    network : Module
        Already on its device.
    size : int
        Slices in a batch.
    graphs : bool
        Capture a CUDA graph and replay it.
    """

    def __init__(self, network: nn.Module, size: int, *, graphs: bool) -> None:
        self._network, self._size, self._graphs = network, size, graphs
        self._device = next(chain(network.parameters(), network.buffers())).device
        self._inputs: list[torch.Tensor] = []
        self._graph: Any = None
        self._output: torch.Tensor | None = None

    def __call__(self, *arrays: Any) -> FloatArray:
        """Evaluate (N, ...) -> (N, ...) for any N."""
        with torch.inference_mode():
            starts = range(0, len(arrays[0]), self._size)
            return np.concatenate([self._evaluate([a[i : i + self._size] for a in arrays]) for i in starts])

    def _evaluate(self, arrays: list[Any]) -> FloatArray:
        if not self._inputs:
            self._allocate(arrays)
        count = len(arrays[0])
        for tensor, array in zip(self._inputs, arrays, strict=True):
            tensor[:count].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        if self._graph is None:
            output = self._network(*self._inputs)
        else:
            self._graph.replay()
            output = self._output
        result: FloatArray = output[:count].cpu().numpy()
        return result

    def _allocate(self, arrays: list[Any]) -> None:
        """Allocate the inputs and capture the graph."""
        for array in arrays:
            dtype = torch.from_numpy(array[:0]).dtype
            self._inputs.append(torch.zeros((self._size, *array.shape[1:]), dtype=dtype, device=self._device))
        if not self._graphs:
            return
        # The first evaluations choose algorithms and allocate memory, which must not happen during the capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._network(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._network(*self._inputs)


def move_to_device(
    networks: TorchNetworks, device: str, size: int, *, graphs: bool, float16: bool, channels_last: bool
) -> Networks:
    """Copy networks to a device and wrap them for the pipeline.

    Parameters
    ----------
    networks : TorchNetworks
        Networks. They are not modified.
    device : {"cpu", "cuda"}
    size : int
        Slices in a batch.
    graphs : bool
        Use CUDA graphs.
    float16 : bool
        Evaluate the denoiser in float16.
    channels_last : bool
        Memory layout of the denoiser's weights.
    """
    denoiser = Float16Denoiser(networks.denoiser) if float16 else deepcopy(networks.denoiser)
    if channels_last:
        denoiser = denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    modules = (deepcopy(networks.encoder), denoiser, deepcopy(networks.decoder))
    wrapped: list[Any] = [FixedBatchNetwork(module.to(device).eval(), size, graphs=graphs) for module in modules]
    return Networks(*wrapped)
