"""Stage 3: trained networks -> ONNX graphs that give the same numbers; for CPUs, a denoiser in int8 that is near."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from scipy import ndimage
from torch import nn

from app.pipeline.diffusion import Schedule
from app.runtime.bundle import GOLDEN_FLIPPED, GOLDEN_INT8, GOLDEN_TOLERANCE
from app.runtime.session import as_callable, open_session
from app.volume import FloatArray
from training.config import Config
from training.data import UINT16_MAX, cached_slices
from training.latents import load_vqvae
from training.loop import load_modules
from training.networks import Decode, Encode, build_denoiser
from training.quantise import KEPT, healthy, noise_error, quantise, share_weights

OPSET = 18
PARITY_SLICES = 16
INT8 = "denoiser.int8.onnx"
# Error of the noise that int8 may add to float32's own, squared: thresholds are the same for both.
MOST_INT8_ERROR = 0.01
GRAPHS = {"encoder": (("x",), "z0"), "denoiser": (("z_t", "t"), "epsilon"), "decoder": (("z0",), "x")}


@dataclass(frozen=True)
class Parity:
    """Largest difference between onnxruntime and torch on real validation slices.

    Attributes
    ----------
    int8 : float or None
        Of the denoiser in int8: what it adds to the squared error of the noise, as a share of float32's own.
    """

    encoder: float
    denoiser: float
    decoder_flipped: float
    int8: float | None = None


def trained_networks(config: Config) -> tuple[dict[str, nn.Module], dict[str, dict[str, str]]]:
    """The three networks as serving calls them, on the CPU, and each stage's provenance."""
    vqvae, latent, from_vqvae = load_vqvae(config)
    denoiser = build_denoiser(config)
    averaged = torch.optim.swa_utils.AveragedModel(denoiser)  # a copy
    from_denoiser = load_modules(config, "denoiser", {"averaged": averaged, "denoiser": denoiser})
    networks: dict[str, nn.Module] = {
        "encoder": Encode(vqvae, latent),
        "denoiser": averaged.module if config.export.averaged else denoiser,
        "decoder": Decode(vqvae, latent),
    }
    for network in networks.values():
        network.cpu().eval().requires_grad_(False)
    return networks, {"vqvae": from_vqvae, "denoiser": from_denoiser}


def graphs_folder(config: Config) -> Path:
    """Where the exported graphs wait for the bundle."""
    return config.run_folder / "onnx"


def denoiser_graph(config: Config) -> Path:
    """The denoiser that a CPU is served."""
    return graphs_folder(config) / (INT8 if config.export.int8 else "denoiser.onnx")


def write_graph(name: str, network: nn.Module, example: tuple[torch.Tensor, ...], path: Path) -> None:
    """Export one network with a dynamic batch axis, weights inside the file."""
    inputs, output = GRAPHS[name]
    batch = torch.export.Dim("n", min=1)
    torch.onnx.export(
        network,
        example,
        str(path),
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[output],
        dynamic_shapes=tuple({0: batch} for _ in example),
        verbose=False,
    )
    strip_debug(path)


def strip_debug(path: Path) -> None:
    """Remove what the exporter notes for debugging: stack traces, with the paths of the machine they come from."""
    model = onnx.load(path)
    parts = [model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output]
    parts += [node for function in model.functions for node in function.node]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, path)


def golden_pair(config: Config, networks: dict[str, nn.Module]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype]]:
    """Synthetic slices (no patient's), and what the networks make of them."""
    rng = np.random.default_rng(config.seed)
    height, width = config.preprocessing.shape
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    head = (rows**2 / 0.8 + columns**2 / 0.7) < 1
    texture = ndimage.gaussian_filter(rng.standard_normal((2, height, width)), (0, 2, 2))
    x = (np.clip(0.5 + 0.8 * texture, 0, 1) * head)[:, None].astype(np.float32)
    schedule = Schedule.linear(config.schedule.steps, config.schedule.beta_start, config.schedule.beta_end)
    t = np.array([500, 200], dtype=np.int64)
    with torch.no_grad():
        z0 = networks["encoder"](torch.from_numpy(x)).numpy()
        z_t = schedule.diffuse(z0, rng.standard_normal(z0.shape, dtype=np.float32), t)
        epsilon = networks["denoiser"](torch.from_numpy(z_t), torch.from_numpy(t)).numpy()
        decoded = networks["decoder"](torch.from_numpy(z0)).numpy()
    return {"x": x, "z0": z0, "z_t": z_t, "t": t, "epsilon": epsilon, "decoded": decoded}


def write_int8(config: Config) -> None:
    """Quantise the exported denoiser, where the configuration asks for it."""
    folder, target = graphs_folder(config), graphs_folder(config) / INT8
    if not config.export.int8:
        target.unlink(missing_ok=True)
        return
    encode = as_callable(open_session(folder / "encoder.onnx", "cpu"))
    quantise(folder / "denoiser.onnx", target, healthy(config, encode, "train").feeds("denoiser"), KEPT)
    share_weights(target, folder / "denoiser.onnx")


def int8_error(config: Config) -> float | None:
    """As of `Parity`, at the worst noise level of serving; fail above the stated share.

    Raises
    ------
    SystemExit
        int8 is another denoiser.
    """
    if not config.export.int8:
        return None
    folder = graphs_folder(config)
    encode, exact, denoise = (
        as_callable(open_session(path, "cpu"))
        for path in (folder / "encoder.onnx", folder / "denoiser.onnx", denoiser_graph(config))
    )
    worst = max(noise_error(denoise, exact, healthy(config, encode, "validation", PARITY_SLICES)).values())
    if worst > MOST_INT8_ERROR:
        raise SystemExit(
            f"In int8 the denoiser adds {worst:.1%} to the error of the noise; at most {MOST_INT8_ERROR:.0%} may be "
            "served: keep more convolutions in float32 (`training.quantise.KEPT`)."
        )
    return worst


def check_parity(config: Config, networks: dict[str, nn.Module], folder: Path) -> Parity:
    """Compare onnxruntime with torch on real validation slices; fail above the stated tolerance.

    Raises
    ------
    SystemExit
        A graph computes something else than the network it came from.
    """
    stack = cached_slices(config, "validation")
    chosen = np.linspace(0, len(stack) - 1, PARITY_SLICES).astype(int)
    x = stack[chosen].astype(np.float32)[:, None] / UINT16_MAX
    schedule = Schedule.linear(config.schedule.steps, config.schedule.beta_start, config.schedule.beta_end)
    t = np.linspace(10, 990, PARITY_SLICES).astype(np.int64)
    run = {name: as_callable(open_session(folder / f"{name}.onnx", "cpu")) for name in GRAPHS}
    with torch.no_grad():
        z0 = networks["encoder"](torch.from_numpy(x)).numpy()
        noise = np.random.default_rng(0).standard_normal(z0.shape, dtype=np.float32)
        z_t = schedule.diffuse(z0, noise, t)
        epsilon = networks["denoiser"](torch.from_numpy(z_t), torch.from_numpy(t)).numpy()
        decoded = networks["decoder"](torch.from_numpy(z0)).numpy()

    def worst(a: FloatArray, b: FloatArray) -> float:
        return float(np.abs(a - b).max())

    parity = Parity(
        encoder=worst(run["encoder"](x), z0),
        denoiser=worst(run["denoiser"](z_t, t), epsilon),
        decoder_flipped=float(np.mean(np.abs(run["decoder"](z0) - decoded) > GOLDEN_TOLERANCE)),
        int8=int8_error(config),
    )
    if max(parity.encoder, parity.denoiser) > GOLDEN_TOLERANCE or parity.decoder_flipped > GOLDEN_FLIPPED:
        raise SystemExit(f"onnxruntime {onnxruntime.__version__} and torch {torch.__version__} disagree: {parity}")
    return parity


def export(config: Config) -> Parity:
    """Write the graphs and the golden pair, and compare them with torch."""
    networks, _ = trained_networks(config)
    golden = golden_pair(config, networks)
    folder = graphs_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (inputs, _) in GRAPHS.items():
        example = tuple(torch.from_numpy(golden[i]) for i in inputs)
        write_graph(name, networks[name], example, folder / f"{name}.onnx")
    write_int8(config)
    if config.export.int8:
        golden[GOLDEN_INT8] = as_callable(open_session(denoiser_graph(config), "cpu"))(golden["z_t"], golden["t"])
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **golden)
    return check_parity(config, networks, folder)


if __name__ == "__main__":
    sys.stdout.write(f"{export(Config.load(Path(sys.argv[1])))}\n")
