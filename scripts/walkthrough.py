# %% [markdown]
# # A variational autoencoder on MNIST, from the data to the latent space
#
# The five steps of the Keras notebook with `vae_torch`; then what it promised and never did, a walk
# through the latent space; then why its loss draws ten equal blurs, beside the loss that does not.
#
# Open it as a notebook in Jupyter (with jupytext) or VS Code, or run it: `python
# scripts/walkthrough.py` writes its pictures to `outputs/walkthrough/`. A smaller budget:
# `WALKTHROUGH_EPOCHS=2 WALKTHROUGH_IMAGES=5000 python scripts/walkthrough.py`.

# %%
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vae_torch import VAE, ObjectiveConfig, kl_standard_normal, mnist_loaders, train
from vae_torch.figures import (
    image_grid,
    interpolation_figure,
    latent_scatter,
    manifold_grid,
    reconstruction_figure,
    sample_grid,
    save_png,
    to_pixels,
    traversal_figure,
)

EPOCHS = int(os.environ.get("WALKTHROUGH_EPOCHS", "10"))
IMAGES = int(os.environ.get("WALKTHROUGH_IMAGES", "60000"))
DATA = os.environ.get("WALKTHROUGH_DATA", "mnist")
ROOT = os.environ.get("WALKTHROUGH_ROOT", "data")
PICTURES = Path(os.environ.get("WALKTHROUGH_OUT", "outputs/walkthrough"))

torch.set_flush_denormal(True)  # a trained model's step is nearly twice as slow without
torch.manual_seed(0)
PICTURES.mkdir(parents=True, exist_ok=True)


def show(name: str, picture: Any, scale: int = 1) -> None:
    """Save a picture; in a notebook, show it under its cell as well."""
    path = PICTURES / f"{name}.png"
    save_png(picture, path, scale=scale)
    print(path)
    if "get_ipython" in globals():
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
# 784 pixels to 512 units to a Gaussian over two latents, a draw from it, and back.

# %%
vae = VAE(input_shape=(784,), latent_dim=2, intermediate_dim=512)
print(vae.encoder, vae.decoder, sep="\n")

# %% [markdown]
# ## 3. The loss
#
# The evidence lower bound, in nats per image: how well the image is explained, summed over its
# pixels, minus what its code costs, summed over the latents.

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
# Under each: how many nats the image costs, given its code.

# %%
show("1_reconstructions", reconstruction_figure(vae, x[:10]))

# %% [markdown]
# ## The latent space, which the notebook promised
#
# Where the test images lie: each point is an image, at the mean of its posterior.

# %%
show("2_latent", latent_scatter(vae, x, labels))

# %% [markdown]
# What the decoder makes of the plane, at coordinates that cut the prior into equal masses
# (Kingma and Welling, figure 4).

# %%
show("3_manifold", manifold_grid(vae, rows=20), scale=2)

# %% [markdown]
# One image while one latent moves, then the way from one image to another.

# %%
show("4_traversal", traversal_figure(vae, x))
other = int((labels != labels[0]).nonzero()[0])
show("5_interpolation", interpolation_figure(vae, x[[0, other]]))

# %% [markdown]
# New images: the decoder's answer to draws from the prior.

# %%
show("6_samples", sample_grid(vae, rows=8), scale=3)

# %% [markdown]
# ## The collapse, and its cure
#
# The notebook's loss averages the cross-entropy over 784 pixels and sums the KL over the latents,
# which makes the KL 784 times too dear. The cheapest answer is to use no code at all: the KL falls
# to nothing, and every reconstruction is the same blur, the mean of all images.

# %%
torch.manual_seed(0)
collapsed = VAE(input_shape=(784,), latent_dim=2, intermediate_dim=512)
keras = train(
    collapsed, train_loader, test_loader, epochs=EPOCHS, objective=ObjectiveConfig(name="keras")
)

# %% [markdown]
# Ten test images; under them what the notebook's loss makes of them, then what the ELBO does.

# %%
some = x[:10]
both = torch.cat([some, collapsed.reconstruct(some), vae.reconstruct(some)])
show("7_collapse_and_cure", image_grid(both, 10), scale=2)

# %% [markdown]
# And their latent spaces, side by side: a heap that tells no digit from another, and a map.

# %%
planes = [to_pixels(latent_scatter(model, x, labels)) for model in (collapsed, vae)]
show("8_latent_collapse_and_cure", np.hstack(planes))

# %%
print(f"{'test, nats per image':24}{'the notebook':>14}{'the ELBO':>14}")
for name in ("elbo", "reconstruction", "kl"):
    theirs, ours = keras[f"test/{name}"][-1], history[f"test/{name}"][-1]
    print(f"{name:24}{theirs:14.4f}{ours:14.4f}")

# %% [markdown]
# The cure is one word: sum. `train` minimises the true bound unless it is told otherwise.
