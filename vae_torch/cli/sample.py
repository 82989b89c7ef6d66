"""`sample.py`, `vae-torch sample`: images from a run's model, as a picture or as arrays."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae_torch.cli.messages import shown, tell_interrupts, told
from vae_torch.cli.settings_line import asked, open_run
from vae_torch.config import Config, ConfigError, SampleConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, model, images, file."""
    tell_interrupts()
    about = "Images from a run's model: out=grid.png, out=x.npz."
    config = asked("sample", about, SampleConfig, arguments)
    with told(f"out={config.out}", "name another file"):
        path = sample_run(config)
    print(shown(path.absolute()))


def sample_run(config: SampleConfig) -> Path:
    """Write the file that `out` names."""
    path = Path(config.out).expanduser()
    if path.suffix not in (".png", ".npz"):
        raise ConfigError(f"out={config.out}: must end in .png or .npz")
    if config.reconstruct and (config.temperature, config.pixels) != (1, "mean"):
        raise ConfigError(
            f"temperature={config.temperature}, pixels={config.pixels} with reconstruct=true: both "
            "are for samples; leave them out"
        )
    import numpy as np
    import torch

    from vae_torch.figures import NoPicturesError, image_grid, pictures, shrunk, to_png
    from vae_torch.files import replaced
    from vae_torch.images import Batch
    from vae_torch.samples import draw_samples

    vae, run_config, device = open_run(config, config.checkpoint)
    columns = math.ceil(math.sqrt(config.n))
    if config.reconstruct:
        x, y = _test_images(config, run_config, device)
        images = vae.of(Batch(x, y)).reconstruct(x)
        arrays = {"x": x, "reconstruction": images}
        tiles, columns = torch.stack([x, images], 1).flatten(0, 1), 2 * columns  # side by side
    else:
        if (vae.classes is None) != (config.y is None) or (config.y or 0) >= (vae.classes or 1):
            said = "null" if config.y is None else config.y
            needed = f"a class from 0 to {vae.classes - 1}" if vae.classes else "null"
            raise ConfigError(f"y={said}: must be {needed} with the model of this run")
        images, z = draw_samples(
            vae,
            config.n,
            y=config.y,
            temperature=config.temperature,
            pixels=config.pixels,
            seed=config.seed,
        )
        arrays, tiles = {"x": images, "z": z}, images
    with replaced(path) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            stored: Any = {name: each.cpu().numpy() for name, each in arrays.items()}
            np.savez_compressed(file, **stored)
            return path
        try:
            grid = image_grid(shrunk(pictures(vae, tiles), 128), columns)
        except NoPicturesError as error:
            raise ConfigError(f"out={config.out}: {error}; write a .npz") from None
        file.write(to_png(grid, scale=max(1, min(3, 1300 // grid.shape[1]))))
    return path


def _test_images(
    config: SampleConfig, run_config: Config, device: "torch.device"
) -> "tuple[Tensor, Tensor | None]":
    """The run's first n test images, and their labels."""
    from vae_torch.data import image_dataset, loaders_of

    if config.data_root:
        run_config.data.root = config.data_root
    _, loader = loaders_of(run_config, device)
    return image_dataset(loader).first(config.n)
