"""All five stages of one bundle: `python -m training.run training/configs/t1.toml`.

Each stage is a command of its own as well (`python -m training.train_vqvae CONFIG`, ...). A stage
that was stopped goes on from its checkpoint; a finished one costs a few seconds.
"""

import sys
from pathlib import Path

from training import bundle, calibrate, export, train_denoiser, train_vqvae
from training.config import Config


def main(path: Path) -> None:
    """Train, export, calibrate, and write the bundle of a configuration."""
    config = Config.load(path)
    train_vqvae.train(config)
    train_denoiser.train(config)
    export.export(config)
    calibrate.calibrate(config)
    bundle.write_bundle(config)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
