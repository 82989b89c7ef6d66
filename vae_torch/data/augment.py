"""Training images that are moved or mirrored at random."""

import torch
from torch import Tensor

_REACH = 8  # a shift is at most this fraction of a side


def augment_images(x: Tensor, how: str, *, generator: torch.Generator) -> Tensor:
    """Move or mirror every image of a batch at random.

    Args:
        x: (B, C, H, W).
        how: `shift`: by up to an eighth of a side, up or down and left or right, each whole number
            of pixels as likely; the edge is repeated. `flip`: left and right exchanged in every
            other image.
        generator: Of the CPU: the same choices on every device.

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
    """Which row or column each one shows, (count, side)."""
    reach = max(1, side // _REACH)
    by = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    return (torch.arange(side) - by).clamp(0, side - 1)
