"""Codes that a transformer drew anew, on an accelerator or before: on a CPU, hours for an ensemble."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from training.config import Config

BoolArray = npt.NDArray[np.bool_]
# Codes that were drawn (K,), and where they stand (L,).
Drawn = tuple[npt.NDArray[np.int64], BoolArray]


@dataclass(frozen=True, eq=False)
class Healed:
    """What was drawn for which codes.

    Attributes
    ----------
    drawn : dict
        By `key`, of each slice.
    path : Path, optional
        Where it is kept.
    """

    drawn: dict[bytes, Drawn] = field(default_factory=dict)
    path: Path | None = None

    def lacking(self, codes: torch.Tensor, by: str) -> torch.Tensor:
        """Which slices (K,) of codes (N, L) were not drawn yet by so named a `drawing`."""
        which = [i for i, row in enumerate(codes) if key(row, by, i) not in self.drawn]
        return torch.tensor(which, dtype=torch.int64)

    def add(self, codes: torch.Tensor, which: torch.Tensor, by: str, found: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keep what was drawn for some slices (K,) of codes (N, L): healed codes, and which were drawn, (K, L) each."""
        for i, healed, anew in zip(which.tolist(), *found, strict=True):
            self.drawn[key(codes[i], by, i)] = healed[anew].numpy(), anew.numpy()
        if self.path:
            self.save(self.path)

    def find(self, codes: torch.Tensor, by: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Healed codes and which were drawn, (N, L) each; a KeyError where a slice is lacking."""
        pairs = [self.drawn[key(row, by, i)] for i, row in enumerate(codes)]
        anew = torch.from_numpy(np.stack([where for _, where in pairs]))
        values = torch.from_numpy(np.concatenate([values for values, _ in pairs]))
        return codes.masked_scatter(anew, values), anew

    def save(self, file: Path | BinaryIO) -> None:
        """Write it, whole or not at all."""
        if isinstance(file, Path):
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            with temporary.open("wb") as opened:
                self.save(opened)
            temporary.replace(file)
            return
        pairs = self.drawn.values()
        np.savez_compressed(
            file,
            allow_pickle=False,
            keys=np.frombuffer(b"".join(self.drawn), np.uint8).reshape(len(self.drawn), -1),
            anew=np.packbits(np.stack([anew for _, anew in pairs]), axis=1),
            values=np.concatenate([values for values, _ in pairs]).astype(np.uint16),
        )

    @classmethod
    def load(cls, path: Path) -> "Healed":
        """Read it; empty where there is no such file."""
        if not path.exists():
            return cls(path=path)
        with np.load(path, allow_pickle=False) as kept:
            # Codes come in eights: rows and columns are even, and one of them by four.
            anew = np.unpackbits(kept["anew"], axis=1).astype(np.bool_)
            values = np.split(kept["values"].astype(np.int64), anew.sum(axis=1).cumsum()[:-1])
            return cls({k.tobytes(): (v, a) for k, v, a in zip(kept["keys"], values, anew, strict=True)}, path)


def drawing(network: torch.nn.Module, threshold: float, seed: int) -> str:
    """A name for what decides what is drawn: the network, what is unlikely to it, and the seed of the `uniforms`.

    Of the threshold two digits: on another processor the others differ.
    """
    digest = hashlib.sha256()
    for weight in network.parameters():
        digest.update(weight.detach().cpu().numpy().tobytes())
    return f"{digest.hexdigest()} {threshold:.2f} {seed}"


def key(codes: torch.Tensor, by: str, row: int) -> bytes:
    """What the same codes (L,) in the same row of the same `drawing` have in common."""
    return hashlib.sha256(codes.to(torch.int16).numpy().tobytes() + f"{by} {row}".encode()).digest()


def healed_path(config: Config) -> Path:
    """Where a bundle's lie."""
    return config.run_folder / "opponent-healed.npz"
