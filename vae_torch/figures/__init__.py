"""All pictures: grids as tensors in [0, 1], plots as matplotlib figures.

`save_png` writes either. Nothing here touches pyplot's global state or needs a screen.
"""

from vae_torch.figures.grids import (
    growth_frame,
    image_grid,
    manifold_grid,
    reconstruction_grid,
    sample_grid,
)
from vae_torch.figures.latents import spherical_interpolation
from vae_torch.figures.pictures import (
    NoPicturesError,
    as_pictures,
    pictures,
    read_png,
    save_gif,
    save_png,
    shrunk,
    to_pixels,
    to_png,
)
from vae_torch.figures.plots import (
    DIGIT_COLOURS,
    import_matplotlib,
    kl_figure,
    latent_scatter,
    log_px_map,
    name_of,
    new_axes,
)
from vae_torch.figures.tables import (
    image_table,
    interpolation_figure,
    reconstruction_figure,
    traversal_figure,
)

__all__ = [
    "DIGIT_COLOURS",
    "NoPicturesError",
    "as_pictures",
    "growth_frame",
    "image_grid",
    "image_table",
    "import_matplotlib",
    "interpolation_figure",
    "kl_figure",
    "latent_scatter",
    "log_px_map",
    "manifold_grid",
    "name_of",
    "new_axes",
    "pictures",
    "read_png",
    "reconstruction_figure",
    "reconstruction_grid",
    "sample_grid",
    "save_gif",
    "save_png",
    "shrunk",
    "spherical_interpolation",
    "to_pixels",
    "to_png",
    "traversal_figure",
]
