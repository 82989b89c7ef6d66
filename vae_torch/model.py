"""Encoder, decoder, and the VAE that joins them.

x (B, *input_shape) -> q(z|x) = N(mean, exp(logvar)) -> z (B, latent_dim)
                    -> logits (B, *input_shape)
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae_torch.config import CHOICES, Config
from vae_torch.likelihood import LIKELIHOODS, UNIT_INTERVAL, as_images, check_pixels
from vae_torch.prior import Mixture, StandardNormal, VampPrior

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class VAEOutput(NamedTuple):
    """What one forward pass knows."""

    logits: Tensor  # (B, *input_shape)
    mean: Tensor  # (B, latent_dim)
    logvar: Tensor  # (B, latent_dim)
    z: Tensor  # (B, latent_dim)


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A draw of q(z|x) that gradients pass through: z = mean + exp(logvar / 2) * eps.

    Kingma and Welling, *Auto-Encoding Variational Bayes* (2013), section 2.4. It samples always;
    no module's `.eval()` turns it into the mean.

    Args:
        mean: (..., latent_dim).
        logvar: (..., latent_dim), natural log of the variance.
        eps: Standard normal noise that broadcasts against `mean`; drawn when absent.
        generator: Where to draw `eps` from.

    Returns:
        The shape of `mean`, or of `eps` where that has leading dimensions.

    Raises:
        ValueError: mean and logvar have different shapes, or eps does not broadcast.
    """
    if mean.shape != logvar.shape:
        raise ValueError(
            f"mean has shape {tuple(mean.shape)} and logvar {tuple(logvar.shape)}; they must agree"
        )
    if eps is None:
        eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    elif any(m != n and 1 not in (m, n) for m, n in zip(eps.shape[::-1], mean.shape[::-1])):  # noqa: B905
        raise ValueError(
            f"eps has shape {tuple(eps.shape)} and mean {tuple(mean.shape)}; eps must end in the "
            "shape of mean"
        )
    return mean + torch.exp(0.5 * logvar) * eps


class Encoder(nn.Module):
    """q(z|x): one trunk of features, then two linear heads.

    Args:
        input_shape: Shape of one image.
        latent_dim: Dimensions of z.
        intermediate_dim: Units of a hidden layer.
        architecture: `mlp`, `residual` or `conv`.
        depth: Hidden layers (mlp) or blocks (residual).
        activation: `relu`, `tanh`, `silu` or `gelu`.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (784,),
        latent_dim: int = 2,
        intermediate_dim: int = 512,
        *,
        architecture: str = "mlp",
        depth: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        pixels = math.prod(input_shape)
        if architecture == "conv":
            self.trunk: nn.Module = _conv_encoder(input_shape, intermediate_dim, activation)
        else:
            self.trunk = _dense_trunk(architecture, pixels, intermediate_dim, depth, activation)
        self.mean = nn.Linear(intermediate_dim, latent_dim)
        self.logvar = nn.Linear(intermediate_dim, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *shape) -> mean (B, latent_dim), logvar (B, latent_dim)."""
        h = self.trunk(x.flatten(1))  # (B, intermediate_dim)
        # under bf16 autocast the products are bf16; everything that is summed later is not
        return self.mean(h).to(x.dtype), self.logvar(h).to(x.dtype)


class Decoder(nn.Module):
    """p(x|z): from z to one output per pixel, before any sigmoid. Arguments as in `Encoder`."""

    def __init__(
        self,
        output_shape: Sequence[int] = (784,),
        latent_dim: int = 2,
        intermediate_dim: int = 512,
        *,
        architecture: str = "mlp",
        depth: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.output_shape = tuple(output_shape)
        pixels = math.prod(output_shape)
        if architecture == "conv":
            self.trunk: nn.Module = nn.Identity()
            self.out: nn.Module = _conv_decoder(
                output_shape, latent_dim, intermediate_dim, activation
            )
        else:
            self.trunk = _dense_trunk(architecture, latent_dim, intermediate_dim, depth, activation)
            self.out = nn.Linear(intermediate_dim, pixels)

    def forward(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (..., *output_shape)."""
        logits = self.out(self.trunk(z.reshape(-1, z.shape[-1])))
        return logits.to(z.dtype).reshape(*z.shape[:-1], *self.output_shape)  # type: ignore[no-any-return]


class VAE(nn.Module):
    """A variational autoencoder; its first three arguments are the Keras notebook's.

    Kernels start Glorot-uniform and biases at zero, as in Keras.

    Args:
        input_shape: Shape of one image: (784,), (1, 28, 28), or (3, 32, 32). `conv` reads it as
            (channels, height, width); for it a flat image is square and grey.
        latent_dim: Dimensions of z.
        intermediate_dim: Units of a hidden layer.
        architecture: `mlp`, `residual` or `conv`.
        depth: Hidden layers (mlp) or blocks (residual) on each side.
        activation: `relu`, `tanh`, `silu` or `gelu`.
        likelihood: `bernoulli`, `continuous_bernoulli` or `gaussian`.
        prior: `standard`, `mixture` or `vamp`.
        prior_components: Components of the mixture or VampPrior.

    Raises:
        ValueError: A size below 1, a name that is none of the above, or a shape that `conv` cannot
            halve twice.

    Example:
        >>> vae = VAE(latent_dim=2)
        >>> vae(torch.rand(8, 784)).logits.shape
        torch.Size([8, 784])
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (784,),
        latent_dim: int = 2,
        intermediate_dim: int = 512,
        *,
        architecture: str = "mlp",
        depth: int = 1,
        activation: str = "relu",
        likelihood: str = "bernoulli",
        prior: str = "standard",
        prior_components: int = 500,
    ) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.latent_dim = latent_dim
        self.intermediate_dim = intermediate_dim
        sizes = {
            "latent_dim": latent_dim,
            "intermediate_dim": intermediate_dim,
            "depth": depth,
            "prior_components": prior_components,
            **{f"input_shape[{i}]": size for i, size in enumerate(self.input_shape)},
        }
        for argument, size in sizes.items():
            if size < 1 or size != int(size):
                raise ValueError(f"{argument} is {size}; it must be a whole number, 1 or more")
        words = {
            "architecture": (architecture, "model.name"),
            "activation": (activation, "model.activation"),
            "likelihood": (likelihood, "likelihood"),
            "prior": (prior, "prior"),
        }
        for argument, (word, key) in words.items():
            if word not in CHOICES[key]:
                raise ValueError(f"{argument} is {word!r}; known are {', '.join(CHOICES[key])}")

        shape: dict[str, Any] = {
            "architecture": architecture,
            "depth": depth,
            "activation": activation,
        }
        self.encoder = Encoder(self.input_shape, latent_dim, intermediate_dim, **shape)
        self.decoder = Decoder(self.input_shape, latent_dim, intermediate_dim, **shape)
        self.likelihood = LIKELIHOODS[likelihood]()
        self.prior: StandardNormal | Mixture | VampPrior
        if prior == "mixture":
            self.prior = Mixture(latent_dim, prior_components)
        elif prior == "vamp":
            self.prior = VampPrior(self.input_shape, prior_components)
        else:
            self.prior = StandardNormal(latent_dim)
        self.apply(_keras_init)

    @classmethod
    def from_config(cls, config: Config, input_shape: Sequence[int] = (784,)) -> "VAE":
        """The model that a run's config describes, with fresh weights."""
        return cls(
            input_shape,
            config.model.latent_dim,
            config.model.intermediate_dim,
            architecture=config.model.name,
            depth=config.model.depth,
            activation=config.model.activation,
            likelihood=config.likelihood,
            prior=config.prior,
            prior_components=config.prior_components,
        )

    @classmethod
    def from_keras_weights(cls, weights: Sequence[Any]) -> "VAE":
        """The notebook's trained model in torch.

        Args:
            weights: The ten arrays of `encoder.get_weights() + decoder.get_weights()`: kernel (in,
                out) and bias (out,) of the encoder's hidden layer, z_mean, z_log_var, the decoder's
                hidden layer and its output layer.

        Raises:
            ValueError: Not ten arrays, or shapes that do not chain.
        """
        arrays = [torch.tensor(w, dtype=torch.float32) for w in weights]
        if len(arrays) != 10:
            raise ValueError(f"got {len(arrays)} arrays; the notebook's two models have ten")
        kernel_shapes = [tuple(a.shape) for a in arrays[::2]]
        if any(len(shape) != 2 for shape in kernel_shapes):
            raise ValueError(f"kernels have shapes {kernel_shapes}; each must be (in, out)")
        (pixels, hidden), (_, latent_dim) = kernel_shapes[:2]
        vae = cls((pixels,), latent_dim, hidden)
        layers = [m for m in vae.modules() if isinstance(m, nn.Linear)]  # in Keras' order
        with torch.no_grad():
            for layer, kernel, bias in zip(layers, arrays[::2], arrays[1::2], strict=True):
                if kernel.T.shape != layer.weight.shape or bias.shape != layer.bias.shape:
                    raise ValueError(
                        f"a kernel of shape {tuple(kernel.shape)} and bias {tuple(bias.shape)} "
                        f"stand where {tuple(layer.weight.T.shape)} and {tuple(layer.bias.shape)} "
                        f"belong in a {pixels}-{hidden}-{latent_dim}-{hidden}-{pixels} model"
                    )
                layer.weight.copy_(kernel.T)
                layer.bias.copy_(bias)
        return vae

    @torch.no_grad()
    def init_output_bias(self, mean_image: Tensor) -> None:
        """Start an untrained decoder at the mean image; for Bernoulli pixels.

        The output bias becomes that image's logit, as in the code of Burda et al. (2016). Otherwise
        the first steps go into the mean image, and latents that help little with it are shut.

        Args:
            mean_image: Of the training images: as many values in [0, 1] as an image has pixels.

        Raises:
            ValueError: Another number of pixels, values outside [0, 1], or a decoder that ends in
                no linear layer.
        """
        if not isinstance(self.decoder.out, nn.Linear):
            raise ValueError("the decoder has no bias per pixel; use architecture mlp or residual")
        pixels = self.decoder.out.bias.numel()
        if mean_image.numel() != pixels:
            raise ValueError(f"mean_image has {mean_image.numel()} pixels, an image {pixels}")
        check_pixels(mean_image)
        logits = torch.logit(mean_image.clamp(0.001, 0.999))
        self.decoder.out.bias.copy_(logits.flatten())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x).

        Args:
            x: (B, *input_shape) or (B, pixels) in [0, 1]; (B, *any) with as many pixels where
                `input_shape` is flat. Every training step comes through here, so the values are not
                looked at: see `check`.

        Returns:
            mean (B, latent_dim) and logvar (B, latent_dim).

        Raises:
            ValueError: Another shape, or integer pixels.
        """
        return self.encoder(as_images(x, self.input_shape))  # type: ignore[no-any-return]

    def check(self, x: Tensor) -> Tensor:
        """Images from outside in this model's shape and type, after a look at their values.

        Args:
            x: (B, *input_shape) or (B, pixels); (B, *any) with as many pixels where `input_shape`
                is flat.

        Returns:
            (B, *input_shape), in the type of the weights.

        Raises:
            ValueError: Another shape, integer pixels, or pixels that the likelihood has no density
                for: outside [0, 1], for a Gaussian NaN or infinite.
        """
        x = as_images(x, self.input_shape)
        check_pixels(x, getattr(self.likelihood, "pixels", UNIT_INTERVAL))
        return x.to(next(self.parameters()).dtype)

    def decode(self, z: Tensor) -> Tensor:
        """Decoder outputs before any sigmoid: (..., latent_dim) -> (..., *input_shape).

        Raises:
            ValueError: The last dimension of z is not `latent_dim`, or z holds integers.
        """
        if z.ndim < 1 or z.shape[-1] != self.latent_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; it must end in {self.latent_dim}")
        if not z.is_floating_point():
            raise ValueError(f"z is {z.dtype}; latents are floats")
        return self.decoder(z)  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, *, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> VAEOutput:
        """Encode, draw z, decode. `eps` or `generator` fix the draw; see `reparameterize`."""
        mean, logvar = self.encode(x)
        z = reparameterize(mean, logvar, eps=eps, generator=generator)
        return VAEOutput(self.decode(z), mean, logvar, z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log-density of the prior, in nats: (..., latent_dim) -> (...)."""
        return self.prior.log_prob(z, self.encoder)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Expected pixels at the posterior mean: (B, *shape) -> (B, *input_shape) in [0, 1].

        Raises:
            ValueError: Images of another shape, or pixels outside [0, 1].
        """
        x = self.check(x)
        check_pixels(x)  # a Gaussian's too: what it draws is held inside [0, 1]
        mean, _ = self.encode(x)
        return self.likelihood.mean(self.decode(mean))

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Expected pixels of n draws from the prior: (n, *input_shape) in [0, 1].

        Raises:
            ValueError: n is below 1.
        """
        if n < 1:
            raise ValueError(f"n is {n}; it must be 1 or more")
        weight = next(self.parameters())
        z = self.prior.sample(n, self.encoder, generator)
        return self.likelihood.mean(self.decode(z.to(weight)))


def _keras_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _ResidualBlock(nn.Module):
    """x + W2 act(W1 norm(x)): He et al., *Identity Mappings in Deep Residual Networks* (2016)."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            ACTIVATIONS[activation](),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)  # type: ignore[no-any-return]


def _dense_trunk(
    architecture: str, inputs: int, width: int, depth: int, activation: str
) -> nn.Sequential:
    if architecture == "residual":
        blocks = [_ResidualBlock(width, activation) for _ in range(depth)]
        return nn.Sequential(nn.Linear(inputs, width), *blocks, nn.LayerNorm(width))
    layers: list[nn.Module] = []
    for fan_in in [inputs] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def _conv_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of an image; a flat one is square and grey."""
    sizes = [n for n in shape if n != 1]
    if len(sizes) == 1:
        sizes = [math.isqrt(sizes[0])] * 2
    if len(sizes) == 2:
        sizes = [1, *sizes]
    pixels = math.prod(shape)
    if len(sizes) != 3 or math.prod(sizes) != pixels or sizes[1] % 4 or sizes[2] % 4:
        raise ValueError(
            f"architecture is 'conv' and an image has shape {tuple(shape)}, {pixels} pixels; it "
            "must be (channels, height, width), (height, width), or flat and square, with a height "
            "and a width that 4 divides"
        )
    channels, height, width = sizes
    return channels, height, width


def _conv_encoder(shape: Sequence[int], width: int, activation: str) -> nn.Sequential:
    channels, high, wide = _conv_shape(shape)
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Unflatten(1, (channels, high, wide)),
        nn.Conv2d(channels, 32, 4, stride=2, padding=1),  # (B, 32, high/2, wide/2)
        act(),
        nn.Conv2d(32, 64, 4, stride=2, padding=1),  # (B, 64, high/4, wide/4)
        act(),
        nn.Flatten(),
        nn.Linear(4 * high * wide, width),
        act(),
    )


def _conv_decoder(
    shape: Sequence[int], latent_dim: int, width: int, activation: str
) -> nn.Sequential:
    channels, high, wide = _conv_shape(shape)
    act = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Linear(latent_dim, width),
        act(),
        nn.Linear(width, 4 * high * wide),
        act(),
        nn.Unflatten(1, (64, high // 4, wide // 4)),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # (B, 32, high/2, wide/2)
        act(),
        nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1),  # (B, channels, high, wide)
    )
