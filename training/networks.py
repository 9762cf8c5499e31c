"""VQ-VAE and denoiser from MONAI, as serving calls them, and with the weights of a finished bundle."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from monai.networks.nets.vqvae import VQVAE
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

from app.pipeline.diffusion import Networks
from app.runtime.bundle import GOLDEN_FLIPPED, GOLDEN_TOLERANCE
from app.volume import FloatArray, IntArray
from training.config import Config

Weights = dict[str, torch.Tensor]
# Smallest share of the parameters that another bundle must provide as start weights.
MIN_SAME_SHARE = 0.9
# MONAI's normalisation layer in front of each kind of layer, by the end of the layer's name.
NORM_BEFORE = {
    "conv1.conv": "norm1",
    "conv2.conv": "norm2",
    "attn.to_q": "norm",
    "attn.to_k": "norm",
    "attn.to_v": "norm",
    "out.2.conv": "out.0",
}


def build_vqvae(config: Config) -> VQVAE:
    """Build the VQ-VAE; each entry of `channels` halves rows and columns."""
    c = config.vqvae_settings
    levels = len(c.channels)
    return VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=c.channels,
        num_res_layers=c.residual_layers,
        num_res_channels=c.channels,
        downsample_parameters=((2, 4, 1, 1),) * levels,
        upsample_parameters=((2, 4, 1, 1, 0),) * levels,
        num_embeddings=c.codes,
        embedding_dim=c.embedding_dim,
        decay=c.codebook_decay,
        commitment_cost=c.commitment_cost,
        ddp_sync=False,
    )


def build_denoiser(config: Config) -> DiffusionModelUNet:
    """Build the U-Net that predicts the noise in z_t: (N, C, h, w) and t (N,) -> epsilon (N, C, h, w)."""
    c = config.denoiser
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_res_blocks=c.residual_blocks,
        channels=c.channels,
        attention_levels=c.attention_levels,
        num_head_channels=c.head_channels,
    )


class Encoder(nn.Module):
    """Encoder x (N, 1, H, W) -> z0 (N, C, h, w): unquantised, shifted and scaled to unit variance."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, encoder: nn.Module, latent: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("shift", latent["shift"])
        self.register_buffer("scale", latent["scale"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.encoder(x)
        return (z - self.shift) / self.scale


class Decoder(nn.Module):
    """Decoder z0 (N, C, h, w) -> x (N, 1, H, W) in [0, 1], with quantisation first."""

    shift: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor

    def __init__(self, vqvae: VQVAE, latent: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.decoder = vqvae.decoder
        self.register_buffer("codes", vqvae.quantizer.quantizer.embedding.weight.detach().clone())
        self.register_buffer("shift", latent["shift"])
        self.register_buffer("scale", latent["scale"])

    def nearest(self, z0: torch.Tensor) -> torch.Tensor:
        """Return the index of the nearest code of each latent, (N, h, w)."""
        z = z0 * self.scale + self.shift
        flat = z.permute(0, 2, 3, 1)  # (N, h, w, C)
        # |z - e|^2 without |z|^2, which is the same for every code.
        distance = (self.codes**2).sum(1) - 2 * flat @ self.codes.T  # (N, h, w, codes)
        return distance.argmin(-1)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode code indices (N, h, w) -> x (N, 1, H, W) in [0, 1]."""
        x: torch.Tensor = self.decoder(self.codes[codes].permute(0, 3, 1, 2))
        return x.clamp(0, 1)

    def forward(self, z0: torch.Tensor) -> torch.Tensor:
        return self.decode_codes(self.nearest(z0))


class PixelDecoder(nn.Module):
    """Decoder z0 (N, C, h, w) -> x (N, 1, H, W) in [0, 1] of latents that are blocks of pixels."""

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, fold: int, latent: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.fold = fold
        self.register_buffer("shift", latent["shift"])
        self.register_buffer("scale", latent["scale"])

    def forward(self, z0: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(z0 * self.scale + self.shift, self.fold).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class TorchNetworks:
    """Encoder, denoiser and decoder on the CPU, without gradients."""

    encoder: Encoder
    denoiser: nn.Module
    decoder: Decoder | PixelDecoder

    @property
    def code_decoder(self) -> Decoder:
        """The decoder of a bundle with a VQ-VAE, which decodes codes."""
        assert isinstance(self.decoder, Decoder), "this bundle has pixels as latents"
        return self.decoder

    def models(self) -> Networks:
        """Wrap the networks for the pipeline, which calls them with numpy arrays."""

        def run(network: nn.Module, *arrays: FloatArray | IntArray) -> FloatArray:
            with torch.inference_mode():
                result: FloatArray = network(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)).numpy()
            return result

        return Networks(
            lambda x: run(self.encoder, x), lambda z, t: run(self.denoiser, z, t), lambda z0: run(self.decoder, z0)
        )


def load_networks(folder: Path, config: Config) -> TorchNetworks:
    """Build MONAI's networks with the weights in the ONNX graphs of a bundle, by parameter name.

    Raises
    ------
    SystemExit
        The graphs do not have the parameters of this configuration, or the networks do not reproduce the golden pair.
    """
    denoiser = build_denoiser(config)
    _load_strictly(denoiser, _denoiser_weights(onnx.load(folder / "denoiser.onnx").graph, denoiser), folder)
    read_coders = _read_vqvae_coders if config.pixel_latents is None else _read_pixel_coders
    encoder, decoder = read_coders(folder, config)
    networks = TorchNetworks(encoder, denoiser, decoder)
    for network in (networks.encoder, networks.denoiser, networks.decoder):
        network.eval().requires_grad_(requires_grad=False)
    _check_golden_pair(networks, folder)
    return networks


def _read_pixel_coders(folder: Path, config: Config) -> tuple[Encoder, PixelDecoder]:
    """Return the encoder and the decoder of pixel latents with the shift and scale of a bundle."""
    assert config.pixel_latents is not None, "chosen by the caller"
    fold, weights = config.pixel_latents.fold, _initializers(onnx.load(folder / "encoder.onnx").graph)
    latent = {name: weights[name] for name in ("shift", "scale")}
    return Encoder(nn.PixelUnshuffle(fold), latent), PixelDecoder(fold, latent)


def _read_vqvae_coders(folder: Path, config: Config) -> tuple[Encoder, Decoder]:
    """Return the encoder and the decoder of a VQ-VAE with the weights of a bundle."""
    vqvae = build_vqvae(config)
    encoder, decoder = (_initializers(onnx.load(folder / f"{name}.onnx").graph) for name in ("encoder", "decoder"))
    codebook = {name: w for name, w in vqvae.state_dict().items() if name.startswith("quantizer.")}
    # The exporter stores the codebook transposed under a generic name. Only its shape is unique.
    shape = (config.vqvae_settings.embedding_dim, config.vqvae_settings.codes)
    codes = [w for w in decoder.values() if tuple(w.shape) == shape]
    if len(codes) != 1:
        raise SystemExit(
            f"{folder.name}/decoder.onnx has {len(codes)} tensors of shape {shape}. Expected one codebook."
        )
    codebook["quantizer.quantizer.embedding.weight"] = codes[0].T.clone()
    _load_strictly(vqvae, {**encoder, **decoder, **codebook}, folder)
    latent = {name: encoder[name] for name in ("shift", "scale")}
    return Encoder(vqvae.encoder, latent), Decoder(vqvae, latent)


def stage_weights(folder: Path, config: Config, stage: str) -> Weights:
    """Return the weights of a bundle's VQ-VAE or denoiser, for a training stage to start from.

    Parameters
    ----------
    folder : Path
        Folder of the bundle.
    config : Config
    stage : {"vqvae", "denoiser"}

    Raises
    ------
    SystemExit
        See `load_networks`.
    """
    networks = load_networks(folder, config)
    if stage == "denoiser":
        weights: Weights = networks.denoiser.state_dict()
        return weights
    vqvae = build_vqvae(config)
    vqvae.encoder.load_state_dict(networks.encoder.encoder.state_dict())
    vqvae.decoder.load_state_dict(networks.code_decoder.decoder.state_dict())
    codebook = vqvae.quantizer.quantizer
    # A bundle has no moving averages of the codebook: start as if each code had been used once.
    codebook.embedding.weight.data = networks.code_decoder.codes.clone()
    codebook.ema_w.copy_(networks.code_decoder.codes)
    codebook.ema_cluster_size.fill_(1.0)
    restored: Weights = vqvae.state_dict()
    return restored


def matching_denoiser_weights(folder: Path, denoiser: nn.Module) -> Weights:
    """Return the weights of another bundle's denoiser that have the shape of this one, and this one's own weights else.

    The first and the last layer differ, because latents of another kind have other channels.

    Raises
    ------
    SystemExit
        Less than nine tenths of the parameters have the same shape.
    """
    found, own = _denoiser_weights(onnx.load(folder / "denoiser.onnx").graph, denoiser), denoiser.state_dict()
    same = {name: found[name] for name, w in own.items() if name in found and found[name].shape == w.shape}
    if sum(w.numel() for w in same.values()) < MIN_SAME_SHARE * sum(w.numel() for w in own.values()):
        raise SystemExit(
            f"The denoiser of {folder.name} has another shape. Expected the channels of the section [denoiser]. "
            "Change that section, or choose another bundle in warm_start."
        )
    return own | same


def _initializers(graph: onnx.GraphProto) -> Weights:
    return {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}


def _load_strictly(network: nn.Module, weights: Weights, folder: Path) -> None:
    """Load parameters by name. Raise SystemExit if one is missing or has another shape."""
    state = network.state_dict()
    wrong = [name for name, w in state.items() if name not in weights or weights[name].shape != w.shape]
    if wrong:
        raise SystemExit(
            f"{len(wrong)} of {len(state)} parameters are not in {folder.name}, or in another shape, e.g. {wrong[0]}. "
            "Check the sections [vqvae] and [denoiser] of the configuration."
        )
    network.load_state_dict({name: weights[name] for name in state})


def _denoiser_weights(graph: onnx.GraphProto, network: nn.Module) -> Weights:
    """Return the initializers of a denoiser's graph by torch parameter name.

    The exporter renames two kinds of parameters: transposed matrices of linear layers (in, out), which precede the
    addition of a named bias, and weights and biases of group normalisations (C, 1, 1), which precede a named layer. The
    next named layer in the graph therefore identifies a renamed parameter.
    """
    weights, parameters = _initializers(graph), set(network.state_dict())
    renamed = set(weights) - parameters
    consumers = _consumers(graph)
    for node in graph.node:
        for name in renamed.intersection(node.input):
            weight = weights[name]
            if node.op_type == "MatMul" and weight.ndim == 2:
                weights[f"{_next_layer(consumers, node, parameters)}.weight"] = weight.T
            elif node.op_type in {"Mul", "Add"} and weight.ndim == 3:
                layer = _next_layer(consumers, node, parameters)
                kind = "weight" if node.op_type == "Mul" else "bias"
                for end, norm in NORM_BEFORE.items():
                    if layer.endswith(end):
                        weights[f"{layer.removesuffix(end)}{norm}.{kind}"] = weight.reshape(-1)
    return weights


def _consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that read each tensor, by its name."""
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return consumers


def _next_layer(consumers: dict[str, list[onnx.NodeProto]], start: onnx.NodeProto, parameters: set[str]) -> str:
    """Return the name of the first layer with a named parameter, at a node or after it, or an empty string."""
    queue = [start]
    for node in queue:
        for name in node.input:
            if name in parameters:
                return str(name).rpartition(".")[0]
        queue += [following for output in node.output for following in consumers.get(output, [])]
    return ""


def _check_golden_pair(networks: TorchNetworks, folder: Path) -> None:
    models = networks.models()
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        difference = max(
            float(np.abs(models.encode(golden["x"]) - golden["z0"]).max()),
            float(np.abs(models.denoise(golden["z_t"], golden["t"]) - golden["epsilon"]).max()),
        )
        flipped = float(np.mean(np.abs(models.decode(golden["z0"]) - golden["decoded"]) > GOLDEN_TOLERANCE))
    if difference > GOLDEN_TOLERANCE or flipped > GOLDEN_FLIPPED:
        raise SystemExit(
            f"torch and the golden pair of {folder.name} differ by {difference:.2g}, and in {flipped:.1%} of pixels. "
            f"Expected at most {GOLDEN_TOLERANCE:g} and {GOLDEN_FLIPPED:.1%}. Export the bundle again."
        )
