"""`sample.py`, `vae-torch sample`: images from a run's model, as a picture or as numbers."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from vae_torch.cli.messages import refuse, shown, tell_interrupts
from vae_torch.cli.settings_line import parser, settings_of
from vae_torch.config import ConfigError, SampleConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, model, images, file."""
    tell_interrupts()
    line = parser("sample", "Images from a run's model: out=grid.png, out=x.npz.", SampleConfig)
    config = settings_of(line.parse_args(arguments), SampleConfig)
    from vae_torch.checkpoint import CheckpointError

    try:
        path = sample_run(config)
    except (ConfigError, CheckpointError) as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"out={config.out}: cannot be written ({error.strerror}); name another file")
    print(shown(path.absolute()))


def sample_run(config: SampleConfig) -> Path:
    """Write the file that `out` names."""
    path = Path(config.out).expanduser()
    if path.suffix not in (".png", ".npz"):
        raise ConfigError(f"out={config.out}: must end in .png or .npz")
    import numpy as np

    from vae_torch.checkpoint import load_run
    from vae_torch.figures import image_grid, to_png
    from vae_torch.files import write_atomically
    from vae_torch.machine import resolve_device, set_products, tune_cpu
    from vae_torch.samples import draw_samples

    tune_cpu(None)
    device = resolve_device(config.device)
    set_products("fp32", device)
    vae, _ = load_run(
        config.run, checkpoint=config.checkpoint, device=device, plugins=config.plugins
    )
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
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=images.cpu().numpy(), z=z.cpu().numpy())
        content = buffer.getvalue()
    else:
        content = to_png(image_grid(images, math.ceil(math.sqrt(config.n))), scale=3)
    write_atomically(path, content)
    return path
