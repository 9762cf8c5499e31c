"""The transformers on a machine that is lent by the minute, as `training.accelerator` does for a bundle's own networks.

    python -m training.experiments.accelerator pack training/configs/t1.toml FOLDER    # here: slices, codes of cases
    python -m training.experiments.accelerator learn FOLDER/t1.opponent.xz OUT         # there
    python -m training.experiments.accelerator unpack OUT/t1.opponent                  # here

There it learns, and draws anew what is unlikely in the slices of every case: `training.experiments.healing` then finds
what was drawn, and draws on the CPU what it does not find. Times are always those of a CPU.
"""

import io
import itertools
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from training.accelerator import WORKERS, Packed, healthy_of, packed_slices, read_packed
from training.config import ROOT, Config
from training.data import data_hash
from training.experiments import transformer
from training.experiments.cases import Case, segmented
from training.experiments.experiment import CALIBRATION_SCANS, Experiment
from training.experiments.healed import Healed, drawing, healed_path
from training.experiments.healing import Transformer
from training.experiments.methods import vqvae_networks
from training.experiments.opponents import build, opponent_of, run_of, train
from training.loop import device
from training.networks import Decode, build_vqvae
from training.splits import load_split

NAME = "transformer"
# Slices that are drawn at once: 25 GB of keys and values at 1,920 codes.
BATCH = 2048


def pack(name: str, folder: Path) -> Path:
    """Write the slices that a transformer learns from, and the codes of every case, seen both ways round."""
    e = Experiment(name)
    networks = vqvae_networks(e.config)
    made = Transformer(networks, build(NAME, e.config), e.config.seed)
    validation = e.validation()
    packed = {
        **packed_slices(e.config),
        "opponent": repr(opponent_of(NAME, name)),
        "encoder": networks.encoder.encoder.state_dict(),
        "codes": networks.decoder.codes,
        "healthy": [codes_both_ways(made, case)[0] for case in validation[:CALIBRATION_SCANS]],
        "cases": [
            codes for case in (*validation, *segmented(e.config, e.manifest)) for codes in codes_both_ways(made, case)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.opponent.xz"
    with lzma.open(path, "wb") as file:
        torch.save(packed, file)
    return path


@torch.inference_mode()
def codes_both_ways(made: Transformer, case: Case) -> list[torch.Tensor]:
    """Of a case's slices as they are and mirrored, (N, L) each."""
    x = torch.from_numpy(np.ascontiguousarray(case.x))
    return [made.codes(seen).flatten(1).to(torch.int16) for seen in (x, x.flip(-1))]


def learn(path: Path, out: Path, workers: int = WORKERS) -> None:
    """Learn, draw, and write what `unpack` reads."""
    packed = read_packed(lzma.decompress(path.read_bytes()))
    config = Config.model_validate_json(packed["config"])
    _check(packed, config)
    healthy = healthy_of(packed)
    vqvae = build_vqvae(config).to(device()).eval()
    vqvae.encoder.load_state_dict(packed["encoder"])
    decoder = Decode(vqvae, {"shift": torch.zeros(1, device=device()), "scale": torch.ones(1, device=device())})
    decoder.codes = packed["codes"].to(device())

    @torch.no_grad()
    def codes(x: torch.Tensor) -> torch.Tensor:
        return decoder.nearest(vqvae.encoder(x)).flatten(1)

    train(opponent_of(NAME, config.name), config, healthy, codes, workers)
    network = build(NAME, config).to(device())
    state = read_packed((config.run_folder / f"opponent-{NAME}.pt").read_bytes())["modules"]["network"]
    network.load_state_dict(state)
    learnt = {name: state[name] for name, _ in network.named_parameters()}  # its masks are large, and known
    out.mkdir(parents=True, exist_ok=True)
    curve = (config.run_folder / f"opponent-{NAME}.csv").read_text()
    # Before and after each draw: what is there when the time is up is not lost.
    for healed in itertools.chain([None], draws(network.eval(), packed, config.seed)):
        back = {key: packed[key] for key in ("config", "data", "opponent")} | {"network": learnt, "curve": curve}
        if healed is not None:
            written = io.BytesIO()
            healed.save(written)
            back["healed"] = torch.from_numpy(np.frombuffer(written.getvalue(), np.uint8).copy())
        temporary = out / f"{config.name}.tmp"
        torch.save(back, temporary)
        temporary.replace(out / f"{config.name}.opponent")


@torch.inference_mode()
def draws(network: torch.nn.Module, packed: Packed, seed: int) -> Iterator[Healed]:
    """What is drawn anew in every case, draw by draw, below the threshold of healthy slices."""
    likely = [
        transformer.log_likelihood(network, part.long().to(device()))
        for codes in packed["healthy"]
        for part in codes.split(16)
    ]
    threshold = float(np.quantile(torch.cat([part.flatten() for part in likely]).cpu().numpy(), transformer.QUANTILE))
    cases = [codes.long() for codes in packed["cases"]]
    sizes, healed = [len(codes) for codes in cases], Healed()
    flat = torch.cat(cases).to(device())
    for own in range(transformer.DRAWS):
        name = drawing(network, threshold, seed + own)
        by = torch.cat([transformer.uniforms(codes, seed + own) for codes in cases]).to(device())
        found = transformer.heal_unlikely(network, flat, threshold, by, BATCH, transformer.heal)
        parts = (part.cpu().split(sizes) for part in found)
        for codes, *pair in zip(cases, *parts, strict=True):
            healed.add(codes, torch.arange(len(codes)), name, (pair[0], pair[1]))
        yield healed


def unpack(path: Path) -> None:
    """Put network and draws where the experiments look for them."""
    back = read_packed(path.read_bytes())
    config = Config.load(ROOT / "training" / "configs" / f"{path.name.split('.')[0]}.toml")
    _check(back, config)
    data = data_hash(config, load_split(config.data.splits).train)
    if back["data"] != data:
        raise SystemExit("It learnt from other scans than those that are here.")
    network = build(NAME, config)
    network.load_state_dict(network.state_dict() | back["network"])
    opponent = opponent_of(NAME, config.name)
    run = run_of(opponent, config, network, data)
    run.save(opponent.steps)
    (config.run_folder / f"{run.name}.csv").write_text(back["curve"])
    if "healed" in back:
        healed_path(config).write_bytes(back["healed"].numpy().tobytes())


def _check(packed: Packed, config: Config) -> None:
    """Another VQ-VAE has other codes, and another budget is another opponent."""
    learnt, now = Config.model_validate_json(packed["config"]), opponent_of(NAME, config.name)
    if learnt.version != config.version or packed["opponent"] != repr(now):
        told = f"{learnt.name}-{learnt.version} and {packed['opponent']}"
        raise SystemExit(f"This was packed for {told}: pack it again for {config.name}-{config.version}, {now}.")


def main(arguments: list[str]) -> None:
    """One of the three commands."""
    command, *rest = arguments
    if command == "pack":
        path = pack(Config.load(Path(rest[0])).name, Path(rest[1]))
        sys.stdout.write(f"{path}: {path.stat().st_size / (1 << 20):.1f} MiB\n")
    elif command == "learn":
        learn(Path(rest[0]), Path(rest[1]))
    elif command == "unpack":
        unpack(Path(rest[0]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
