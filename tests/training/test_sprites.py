"""Sprites in a head of CT: they lie in the brain, change it by their contrast, and are the same for a seed."""

import numpy as np
import pytest

from app.volume import Volume
from training.lesions import brain_in_ct, insert_sprites

SPACING = (3.8, 3.8, 5.0)
AIR, BONE, BRAIN, VENTRICLE = -1000.0, 1200.0, 32.0, 3.0


@pytest.fixture
def head() -> Volume:
    """Skull around a brain with a ventricle; a small neck below."""
    x, y, z = np.indices((64, 64, 12))
    radius = np.hypot((x - 32) / 0.8, y - 32)
    array = np.full(radius.shape, AIR, np.float32)
    array[radius < 23] = BONE
    array[radius < 20] = BRAIN
    array[radius < 3] = VENTRICLE
    neck = z < 3
    array[neck] = AIR
    array[neck & (radius < 6)] = BRAIN
    return Volume(array, np.diag([*SPACING, 1.0]))


def test_brain_lies_within_the_skull_and_has_its_ventricle(head: Volume) -> None:
    brain = brain_in_ct(head)
    assert not brain[:, :, :3].any(), "a neck is no brain"
    assert brain[32, 32, 3:].all(), "a ventricle belongs to the brain"
    assert not brain[head.array == BONE].any()
    inside = (head.array == BRAIN)[:, :, 3:]
    assert brain[:, :, 3:][inside].mean() > 0.9


@pytest.mark.parametrize("contrast", [0.35, -0.35])
def test_sprites_change_the_brain_alone_and_by_their_contrast(head: Volume, contrast: float) -> None:
    made = insert_sprites(head, 12.0, contrast, seed=1)
    change = made.volume.array - head.array
    assert made.truth.any()
    assert not made.truth[~brain_in_ct(head)].any()
    assert not change[~brain_in_ct(head)].any()
    assert (np.sign(change[made.truth]) == np.sign(contrast)).all()
    pictures = np.any(made.truth, axis=(0, 1))
    assert isinstance(pictures, np.ndarray)
    assert not pictures[:-1][pictures[1:]].any(), "in one picture of three"


def test_a_larger_radius_makes_a_larger_sprite_and_a_seed_another_place(head: Volume) -> None:
    ml = [insert_sprites(head, mm, 0.35, seed=2).truth_ml for mm in (8.0, 16.0)]
    assert ml[1] > 2 * ml[0]
    again = insert_sprites(head, 8.0, 0.35, seed=2)
    assert again.truth_ml == ml[0]
    assert not np.array_equal(again.truth, insert_sprites(head, 8.0, 0.35, seed=3).truth)
