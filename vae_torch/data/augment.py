"""Data augmentation: training images shifted or mirrored at random."""

import torch
from torch import Tensor

_REACH = 8  # a shift is at most 1/8 of a side


def augment_images(x: Tensor, how: str, *, generator: torch.Generator) -> Tensor:
    """Shift or mirror every image of a batch at random.

    Args:
        x: (B, C, H, W).
        how: `shift`: move by up to an eighth of a side, vertically and horizontally, with equal
            probability for each number of pixels; edges are repeated. `flip`: mirror left and right
            with probability 1/2.
        generator: A CPU generator, so that every device makes the same choices.

    Returns:
        (B, C, H, W), on the device of `x`.
    """
    count, _, height, width = x.shape
    if how == "flip":
        mirrored = torch.rand(count, generator=generator) < 0.5
        return torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
    rows = _moved(count, height, generator).to(x.device)  # (B, H)
    columns = _moved(count, width, generator).to(x.device)  # (B, W)
    image = torch.arange(count, device=x.device)[:, None, None]
    moved = x.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.movedim(3, 1)


def _moved(count: int, side: int, generator: torch.Generator) -> Tensor:
    """The row or column that each one shows, (count, side)."""
    reach = max(1, side // _REACH)
    by = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    return (torch.arange(side) - by).clamp(0, side - 1)
