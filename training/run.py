"""Command that runs all stages of the training of a bundle (`make train`). It does not run the evaluation.

Each stage is also a separate command, e.g. `python -m training.train_vqvae CONFIG`. An interrupted stage resumes from
its checkpoint, and a finished one takes a few seconds.
"""

from training import bundle, calibrate, export, train_denoiser, train_vqvae
from training.config import Config, parse_config


def run(config: Config) -> None:
    """Train the networks, export and calibrate them, and write the bundle."""
    if config.vqvae is not None:
        train_vqvae.train(config)
    train_denoiser.train(config)
    export.export(config)
    calibrate.calibrate(config)
    bundle.write_bundle(config)


if __name__ == "__main__":
    run(parse_config(__doc__))
