"""Random seeds: many independent streams of noise from one seed of a run."""

import hashlib
from enum import IntEnum

import torch


class Stream(IntEnum):
    """The streams of noise of one seed. A change of a value changes every run's bits.

    The order of an epoch's images is seeded by (seed, epoch) alone.
    """

    PIXELS = 1  # dynamic binarisation: (seed, epoch, PIXELS), and the step in mid-epoch
    NOISE = 2  # z in training: (seed, epoch, NOISE), and the step in mid-epoch
    BOUND = 3  # z of the ELBO in evaluation: (seed, BOUND)
    IMPORTANCE = 4  # importance samples of an image: (seed, image, IMPORTANCE)
    FIT = 5  # fitted posteriors: (seed, FIT), and (seed, FIT, 1) for their ELBO
    AGGREGATE = 6  # the aggregate posterior: (seed, AGGREGATE)
    CHOICE = 7  # the images whose posteriors are fitted: (seed, CHOICE)
    ANNEAL = 8  # AIS chains: (seed, first image, ANNEAL); (seed, ANNEAL, 1) from both ends
    PROPOSAL = 9  # fitted proposals: (seed, first image, PROPOSAL)
    SIMULATED = 10  # images sampled from the model, and the images they are compared with
    AUGMENT = 16  # data augmentation: (seed, epoch, AUGMENT, step)


# Static binarisation does not depend on the run's seed or the machine. Its seeds are
# (BINARIZE_SEED, STATIC_TRAIN) and (BINARIZE_SEED, STATIC_TEST). (BINARIZE_SEED, HOLD_OUT) chooses
# the held-out images.
BINARIZE_SEED = 2016
STATIC_TRAIN, STATIC_TEST, HOLD_OUT = 0, 1, 2


def mix_seed(*parts: int) -> int:
    """One 32-bit seed from several small numbers; seeds of neighbouring numbers are unrelated."""
    words = ",".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:4], "little")


def seeded_generator(device: torch.device | str, *parts: int) -> torch.Generator:
    """A generator on `device`, seeded by `mix_seed(*parts)`."""
    return torch.Generator(device).manual_seed(mix_seed(*parts))
