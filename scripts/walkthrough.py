# %% [markdown]
# # A variational autoencoder on MNIST, from the data to the latent space
#
# This tutorial follows the five steps of the Keras notebook with `vae_torch`. It then walks through
# the latent space, which the notebook promised and did not do. The last part shows why the
# notebook's loss draws ten equal blurs, and the loss that does not.
#
# Open it as a notebook in Jupyter (with jupytext) or VS Code, or run it: `python
# scripts/walkthrough.py`. It trains two models, in a few minutes on two cores. Data goes to `data/`
# and pictures to `outputs/walkthrough/` in the checkout.
#
# Environment variables change what it does: `WALKTHROUGH_EPOCHS` (10), `WALKTHROUGH_IMAGES` (60000
# training images), `WALKTHROUGH_DATA` (mnist), and the folders `WALKTHROUGH_ROOT` and
# `WALKTHROUGH_OUT`. For a quick trial: `WALKTHROUGH_EPOCHS=2 WALKTHROUGH_IMAGES=5000 python
# scripts/walkthrough.py`.

# %%
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from vae_torch import VAE, ObjectiveConfig, kl_standard_normal, mnist_loaders, train
from vae_torch.data.sources import FAMILY
from vae_torch.figures import (
    image_table,
    interpolation_figure,
    latent_scatter,
    manifold_grid,
    reconstruction_figure,
    sample_grid,
    save_png,
    to_pixels,
    traversal_figure,
)

IN_NOTEBOOK = "get_ipython" in globals()
HELP = """usage: python scripts/walkthrough.py

The VAE notebook with vae_torch, from the data to the latent space. It has no options. Environment
variables change what it does:

  WALKTHROUGH_EPOCHS   epochs of each of the two trainings (10)
  WALKTHROUGH_IMAGES   training images (60000)
  WALKTHROUGH_DATA     mnist, fashion_mnist, kmnist, emnist or qmnist (mnist)
  WALKTHROUGH_ROOT     folder of the data (data/ of the checkout)
  WALKTHROUGH_OUT      folder of the pictures (outputs/walkthrough/ of the checkout)

For a quick trial: WALKTHROUGH_EPOCHS=2 WALKTHROUGH_IMAGES=5000 python scripts/walkthrough.py"""


def refuse(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"walkthrough.py: {message}", file=sys.stderr)
    sys.exit(2)


def checkout() -> Path:
    """The folder that holds scripts/walkthrough.py; a kernel may start in any folder below it."""
    here = Path(globals().get("__file__", "walkthrough.py")).absolute()
    for folder in here.parents:
        if (folder / "scripts" / "walkthrough.py").is_file():
            return folder
    return Path.cwd()


def count(name: str, default: int) -> int:
    """A whole number from an environment variable."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < 1:
        refuse(f"{name}={value}: must be a whole number, 1 or more")
    return int(value)


if not IN_NOTEBOOK and sys.argv[1:]:  # a kernel has other arguments
    if sys.argv[1] not in ("-h", "--help"):
        refuse(f"{sys.argv[1]}: has no options; --help names its environment variables")
    print(HELP)
    sys.exit()

EPOCHS = count("WALKTHROUGH_EPOCHS", 10)
IMAGES = count("WALKTHROUGH_IMAGES", 60000)
DATA = os.environ.get("WALKTHROUGH_DATA", "mnist")
if DATA not in FAMILY:
    refuse(f"WALKTHROUGH_DATA={DATA}: must be one of {', '.join(FAMILY)}")
ROOT = Path(os.environ.get("WALKTHROUGH_ROOT", checkout() / "data"))
PICTURES = Path(os.environ.get("WALKTHROUGH_OUT", checkout() / "outputs" / "walkthrough"))
print(f"data in {ROOT}, pictures in {PICTURES}")

torch.set_flush_denormal(True)  # without it, steps become nearly twice as slow
torch.manual_seed(0)
PICTURES.mkdir(parents=True, exist_ok=True)


def show(name: str, picture: Any, scale: int = 1) -> None:
    """Save a picture; in a notebook, show it under its cell as well."""
    path = PICTURES / f"{name}.png"
    save_png(picture, path, scale=scale)
    print(path)
    if IN_NOTEBOOK:
        from IPython.display import display  # type: ignore[import-not-found, unused-ignore]

        with Image.open(path) as image:
            display(image)


# %% [markdown]
# ## 1. The data
#
# Images in [0, 1], flat, in batches of 128. The test images are the validation set, as in the
# notebook.

# %%
train_loader, test_loader = mnist_loaders(ROOT, name=DATA, batch_size=128, limit_train=IMAGES)
x, labels = next(iter(test_loader))  # (1000, 784), (1000,)
print("a batch of test images:", tuple(x.shape), "from", x.min().item(), "to", x.max().item())

# %% [markdown]
# ## 2. The encoder, the decoder and the sampler between them
#
# The encoder maps 784 pixels to 512 units and then to a Gaussian over two latents. The sampler
# draws a latent from it, and the decoder maps it back to pixels.

# %%
vae = VAE(input_shape=(784,), latent_dim=2, intermediate_dim=512)
print(vae.encoder, vae.decoder, sep="\n")

# %% [markdown]
# ## 3. The loss
#
# The evidence lower bound (ELBO), in nats per image. It is the reconstruction term, summed over
# pixels, minus the KL divergence, summed over latents.

# %%
out = vae(x)
print("logits", tuple(out.logits.shape), "z", tuple(out.z.shape))
print(f"KL before training: {kl_standard_normal(out.mean, out.logvar).mean():.2f} nats")

# %% [markdown]
# ## 4. Training

# %%
history = train(vae, train_loader, test_loader, epochs=EPOCHS)
for name in ("elbo", "reconstruction", "kl"):
    print(f"test {name:15}{history[f'test/{name}'][-1]:9.2f} nats per image")

# %% [markdown]
# ## 5. Ten reconstructions
#
# Originals above, reconstructions below. The numbers are -log p(x | z) in nats.

# %%
show("1_reconstructions", reconstruction_figure(vae, x[:10]))

# %% [markdown]
# ## 6. The latent space
#
# Each point is a test image, at the mean of its posterior.

# %%
show("2_latent", latent_scatter(vae, x, labels))

# %% [markdown]
# The decoded latent plane, at coordinates that cut the prior into equal masses (Kingma and Welling,
# figure 4).

# %%
show("3_manifold", manifold_grid(vae, rows=20), scale=2)

# %% [markdown]
# One image while one latent moves, then an interpolation from one image to another.

# %%
show("4_traversal", traversal_figure(vae, x))
other = int((labels != labels[0]).nonzero()[0])
show("5_interpolation", interpolation_figure(vae, x[[0, other]]))

# %% [markdown]
# New images: decoded samples from the prior.

# %%
show("6_samples", sample_grid(vae, rows=8), scale=3)

# %% [markdown]
# ## 7. The collapse, and its cure
#
# The notebook's loss averages the cross-entropy over 784 pixels but sums the KL over the latents.
# The KL then weighs 784 times too much, and the cheapest solution is to ignore the latents. The KL
# falls to zero, and every reconstruction is the same blur, the mean of all images.

# %%
torch.manual_seed(0)
collapsed = VAE(input_shape=(784,), latent_dim=2, intermediate_dim=512)
keras = train(
    collapsed, train_loader, test_loader, epochs=EPOCHS, objective=ObjectiveConfig(name="keras")
)

# %% [markdown]
# Ten test images; below them the reconstructions with the notebook's loss, then with the ELBO.

# %%
some = x[:10]
models = {"the notebook's loss": collapsed, "the ELBO": vae}
images = torch.cat([some, *(model.reconstruct(some) for model in models.values())])
names = [str(label) for label in labels[:10].tolist()]
show("7_collapse_and_cure", image_table(images, rows=["image", *models], columns=names))

# %% [markdown]
# Their latent spaces, side by side: one does not separate the digits, the other does.

# %%
planes = []
for name, model in models.items():
    plane = latent_scatter(model, x, labels)
    plane.suptitle(name, weight="bold")
    planes.append(to_pixels(plane))
show("8_latent_collapse_and_cure", np.hstack(planes))

# %%
print(f"{'test, nats per image':24}{'the notebook':>14}{'the ELBO':>14}")
for name in ("elbo", "reconstruction", "kl"):
    theirs, ours = keras[f"test/{name}"][-1], history[f"test/{name}"][-1]
    print(f"{name:24}{theirs:14.4f}{ours:14.4f}")

# %% [markdown]
# The cure is one word: sum. By default, `train` minimises the negative ELBO.
