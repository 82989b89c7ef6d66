"""`sample.py`, `vae-torch sample`: images from a run's model, as a picture or as numbers."""

import math
from collections.abc import Sequence
from pathlib import Path

from vae_torch.cli.messages import shown, tell_interrupts, told
from vae_torch.cli.settings_line import asked, open_run
from vae_torch.config import ConfigError, SampleConfig


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
    import numpy as np

    from vae_torch.figures import image_grid, to_png
    from vae_torch.files import replaced
    from vae_torch.samples import draw_samples

    vae, _, _ = open_run(config, config.checkpoint)
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
    with replaced(path) as part, part.open("wb") as file:
        if path.suffix == ".npz":
            np.savez_compressed(file, x=images.cpu().numpy(), z=z.cpu().numpy())
        else:
            file.write(to_png(image_grid(images, math.ceil(math.sqrt(config.n))), scale=3))
    return path
