"""The bundle's networks as torch modules, made from its ONNX graphs and checked by its golden pair."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from app.pipeline.networks import Networks
from app.runtime.bundle import GOLDEN_FLIPPED, GOLDEN_TOLERANCE
from app.volume import FloatArray, IntArray
from training.config import Config
from training.networks import Decode, Encode, build_denoiser, build_vqvae

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TorchNetworks:
    """The three networks, on the CPU, without gradients."""

    encoder: Encode
    denoiser: nn.Module
    decoder: Decode

    def models(self) -> Networks:
        """As the pipeline calls them."""

        def run(network: nn.Module, *arrays: FloatArray | IntArray) -> FloatArray:
            with torch.inference_mode():
                result: FloatArray = network(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)).numpy()
            return result

        return Networks(
            lambda x: run(self.encoder, x), lambda z, t: run(self.denoiser, z, t), lambda z0: run(self.decoder, z0)
        )


def load_networks(folder: Path, config: Config) -> TorchNetworks:
    """MONAI's networks with the weights of a bundle.

    Raises
    ------
    SystemExit
        Configuration and bundle do not belong together, or the golden pair does not come out.
    """
    graphs = {name: onnx.load(folder / f"{name}.onnx").graph for name in ("encoder", "decoder", "denoiser")}
    known = {name: _named(graph) for name, graph in graphs.items()}
    vqvae, denoiser = build_vqvae(config), build_denoiser(config)
    named = {**known["encoder"], **known["decoder"]}
    state = vqvae.state_dict()
    vqvae.load_state_dict({name: named.get(name, state[name]) for name in state})
    # The exporter keeps the codes transposed, under a name of its own: (channels, codes).
    shape = (config.vqvae.embedding_dim, config.vqvae.codes)
    codes = next(w for w in known["decoder"].values() if tuple(w.shape) == shape)
    vqvae.quantizer.quantizer.embedding.weight.data = codes.T.clone()
    latent = {name: named[name] for name in ("shift", "scale")}
    _load_denoiser(denoiser, graphs["denoiser"], known["denoiser"], config)
    networks = TorchNetworks(Encode(vqvae, latent), denoiser, Decode(vqvae, latent))
    for network in (networks.encoder, networks.denoiser, networks.decoder):
        network.eval().requires_grad_(requires_grad=False)
    _check(networks, folder)
    return networks


def stage_weights(folder: Path, config: Config, stage: str) -> Weights:
    """What a stage of training goes on from: the weights of a bundle's VQ-VAE, or of its denoiser.

    Parameters
    ----------
    stage : {"vqvae", "denoiser"}

    Raises
    ------
    SystemExit
        As `load_networks`.
    """
    networks = load_networks(folder, config)
    if stage == "denoiser":
        weights: Weights = networks.denoiser.state_dict()
        return weights
    vqvae = build_vqvae(config)
    vqvae.encoder.load_state_dict(networks.encoder.encoder.state_dict())
    vqvae.decoder.load_state_dict(networks.decoder.decoder.state_dict())
    codebook = vqvae.quantizer.quantizer
    # A bundle has no moving averages: each code starts as the mean of one latent, itself.
    codebook.embedding.weight.data = networks.decoder.codes.clone()
    codebook.ema_w.copy_(networks.decoder.codes)
    codebook.ema_cluster_size.fill_(1.0)
    restored: Weights = vqvae.state_dict()
    return restored


def _named(graph: onnx.GraphProto) -> Weights:
    return {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}


def _load_denoiser(network: nn.Module, graph: onnx.GraphProto, known: Weights, config: Config) -> None:
    """By name; what the exporter folded and renamed, by the order in which it is used."""
    state = network.state_dict()
    missing = {name for name in state if name not in known}
    folded = _folded(graph, {name: w for name, w in known.items() if name not in state})
    rows, columns = (side // config.downsampling for side in config.preprocessing.shape)
    example = torch.zeros(1, config.vqvae.embedding_dim, rows, columns)
    order = [name for name in _used_order(network, example) if name in missing]
    weights = {name: known[name] for name in state if name in known}
    for name, weight in zip(order, folded, strict=False):
        straight = weight.T if weight.ndim == 2 else weight.reshape(-1)
        if straight.shape != state[name].shape:
            raise SystemExit(f"{name} has the shape {tuple(straight.shape)} in the bundle: another configuration.")
        weights[name] = straight
    if set(weights) != set(state):
        raise SystemExit(f"{len(set(state) - set(weights))} weights were not found in the graph: export it again.")
    network.load_state_dict(weights)


def _folded(graph: onnx.GraphProto, renamed: Weights) -> Iterator[torch.Tensor]:
    """Weights of normalisations (C, 1, 1) and of transposed matrices (in, out), as the graph uses them."""
    for node in graph.node:
        for name in node.input:
            weight = renamed.get(name)
            if weight is None or node.op_type not in {"Mul", "Add", "MatMul"}:
                continue
            if (node.op_type == "MatMul") == (weight.ndim == 2) and weight.ndim in {2, 3}:
                yield weight


def _used_order(network: nn.Module, example: torch.Tensor) -> list[str]:
    """Names of all parameters, in the order in which a forward pass comes by them."""
    seen: list[str] = []

    def note(prefix: str, module: nn.Module) -> None:
        seen.extend(f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))

    hooks = [
        module.register_forward_pre_hook(lambda m, _, prefix=prefix: note(prefix, m))
        for prefix, module in network.named_modules()
    ]
    with torch.inference_mode():
        network(example, torch.zeros(1, dtype=torch.int64))
    for hook in hooks:
        hook.remove()
    return seen


def _check(networks: TorchNetworks, folder: Path) -> None:
    models = networks.models()
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        off = [
            float(np.abs(models.encode(golden["x"]) - golden["z0"]).max()),
            float(np.abs(models.denoise(golden["z_t"], golden["t"]) - golden["epsilon"]).max()),
        ]
        flipped = float(np.mean(np.abs(models.decode(golden["z0"]) - golden["decoded"]) > GOLDEN_TOLERANCE))
    if max(off) > GOLDEN_TOLERANCE or flipped > GOLDEN_FLIPPED:
        raise SystemExit(f"torch and {folder.name} differ by {max(off):.2g}, {flipped:.1%} of decoded pixels.")
