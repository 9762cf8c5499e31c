"""Coarse noise: what the forward process adds beside white noise, so that the model learns to take a patch away.

White noise of one latent hides nothing that is larger than a latent: the model sees through it, and
keeps a lesion of some size because its surroundings agree. Noise with structure over several
scales is what anomaly detection by diffusion wants (AnoDDPM, Wyatt et al. 2022), and coarse noise
alone teaches a plain denoising network to heal (Kascenas et al. 2022). Here it lies in patches, in
the image, before encoding; the target stays the healthy latent. No lesion's shape is known to it.
"""

import math

import torch

from training.config import CoarseNoiseConfig

# The strength varies between these shares of what was drawn.
LEVELS = (0.2, 1.8)


def add_coarse_noise(x: torch.Tensor, config: CoarseNoiseConfig, rng: torch.Generator) -> torch.Tensor:
    """Slices with patches of coarse noise on their foreground, where the slices are.

    Parameters
    ----------
    x : (B, 1, H, W) tensor in [0, 1]
    rng : torch.Generator
        Of the same device.

    Returns
    -------
    (B, 1, H, W) tensor in [0, 1]
        A share of the slices is left as it is.
    """
    head = x[:, 0] > 0
    carries = _uniform((0.0, 1.0), len(x), rng) < config.share
    change = torch.where(head & carries, _patches(head, config, rng), 0.0)
    return (x + change[:, None]).clamp(0, 1)


def _patches(head: torch.Tensor, config: CoarseNoiseConfig, rng: torch.Generator) -> torch.Tensor:
    """How much each slice is changed, (B, H, W): two sets of patches, each brighter or darker."""
    count = len(head)
    where = _smooth(head.shape, _log_uniform(config.patch_pixels, count, rng), rng)
    level = 1 + config.level_sd * _smooth(head.shape, _uniform(config.level_pixels, count, rng), rng)
    change = torch.zeros_like(where)
    for field in (where, -where):
        covered = field > _quantile(field, head, 1 - _uniform(config.covered, count, rng))
        # Even on a logarithmic scale: faint patches are the hard ones.
        strength = _log_uniform(config.strength, count, rng)
        sign = _uniform((-1.0, 1.0), count, rng).sign()
        change += strength * sign * _gaussian(covered.float(), _uniform(config.edge_pixels, count, rng))
    return change * level.clamp(*LEVELS)


def _uniform(span: tuple[float, float], count: int, rng: torch.Generator) -> torch.Tensor:
    """One number for each slice, (B, 1, 1)."""
    low, high = span
    return low + (high - low) * torch.rand(count, 1, 1, generator=rng, device=rng.device)


def _log_uniform(span: tuple[float, float], count: int, rng: torch.Generator) -> torch.Tensor:
    return _uniform((math.log(span[0]), math.log(span[1])), count, rng).exp()


def _smooth(shape: torch.Size, sigma: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """A smooth Gaussian field of unit variance for each slice, (B, H, W)."""
    field = _gaussian(torch.randn(shape, generator=rng, device=rng.device), sigma)
    return (field - field.mean((1, 2), keepdim=True)) / field.std((1, 2), keepdim=True)


def _gaussian(values: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A Gaussian of its own width (B, 1, 1) over each slice (B, H, W), whose opposite edges touch: by its spectrum."""
    height, width = values.shape[1:]
    rows = torch.fft.fftfreq(height, device=values.device)[:, None]
    columns = torch.fft.rfftfreq(width, device=values.device)
    spectrum = torch.exp(-2 * (math.pi * sigma) ** 2 * (rows**2 + columns**2))
    blurred: torch.Tensor = torch.fft.irfft2(torch.fft.rfft2(values) * spectrum, s=(height, width))
    return blurred


def _quantile(values: torch.Tensor, inside: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The quantile q (B, 1, 1) of what lies inside, of each slice; -inf where nothing does."""
    ordered, _ = values.masked_fill(~inside, -torch.inf).flatten(1).sort(1)
    count = inside.flatten(1).sum(1)
    place = ordered.shape[1] - count + (q[:, 0, 0] * (count - 1).clamp(min=0)).long()
    return ordered.gather(1, place.clamp(max=ordered.shape[1] - 1)[:, None])[..., None]
