"""The VAE: its five parts joined.

x (B, *input_shape) --encoder--> features --posterior--> q(z|x) --> z (B, latent_dim)
z --decoder--> the likelihood's parameters, for Bernoulli pixels logits (B, *input_shape)
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vae_torch.config import Config, ConfigError
from vae_torch.images import UNIT_INTERVAL, Batch, as_images, check_labels, check_pixels
from vae_torch.parts.likelihoods import likelihoods
from vae_torch.parts.networks import Features, Network, image_shape, networks
from vae_torch.parts.posteriors import DiagonalGaussian, Posterior, posteriors, reparameterize
from vae_torch.parts.priors import priors


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode inside the block, then restore the mode of every submodule."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


P = ParamSpec("P")
R = TypeVar("R")


def in_eval_mode(
    function: Callable[Concatenate["VAE", P], R],
) -> Callable[Concatenate["VAE", P], R]:
    """Run a function of a model in eval mode, then restore the model's mode."""

    @wraps(function)
    def wrapped(vae: "VAE", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with evaluating(vae):
            return function(vae, *args, **kwargs)

    return wrapped


class VAEOutput(NamedTuple):
    """The results of one forward pass."""

    logits: Tensor  # (B, *input_shape), or (B, *input_shape, outputs)
    mean: Tensor  # (B, latent_dim)
    logvar: Tensor | None  # (B, latent_dim); None where q(z|x) is not Gaussian
    z: Tensor  # (B, latent_dim)


class Encoder(nn.Module):
    """The notebook's encoder: network features, then two heads for a Gaussian's mean and logvar.

    Args:
        input_shape: Shape of one image.
        latent_dim: Dimensions of z.
        intermediate_dim: Units of a hidden layer.
        architecture: `mlp`, `residual`, `conv` or `resnet`.
        depth: Hidden layers (mlp) or blocks (residual, resnet).
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
        network = _network(architecture, intermediate_dim, depth, activation, {})
        self.shape = _shape_for(network, input_shape)
        self.network = network.encoder(self.shape)
        features = _features(self.network, self.shape)
        self.posterior = posteriors.build(
            "gaussian", {}, context={"features": features, "latent_dim": latent_dim}
        )

    def forward(self, x: Tensor) -> DiagonalGaussian:
        """(B, *shape) -> mean (B, latent_dim), logvar (B, latent_dim)."""
        return self.posterior(self.network(x.reshape(len(x), *self.shape)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """The notebook's decoder: one output per pixel, before the sigmoid. See `Encoder`."""

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
        network = _network(architecture, intermediate_dim, depth, activation, {})
        self.network = network.decoder(latent_dim, _shape_for(network, output_shape))

    def forward(self, z: Tensor) -> Tensor:
        """(..., latent_dim) -> (..., *output_shape)."""
        return _decoded(self.network, z, self.output_shape)


class VAE(nn.Module):
    """A variational autoencoder. Its first three arguments are those of the Keras notebook.

    Kernels start Glorot-uniform and biases at zero, as in Keras. Modules that are passed in keep
    their own weights.

    With `classes` the model is conditional, p(x|y) = ∫ p(x|z, y) p(z) dz: encoder and decoder also
    see each image's label y as a one-hot vector. Kingma et al., *Semi-supervised Learning with
    Deep Generative Models* (2014), section 2 (M2, y observed); Sohn, Lee and Yan, *Learning
    Structured Output Representation* (2015). `encode`, `decode`, `sample` and the others then need
    a y; `given(y)` returns the same model with y fixed.

    Args:
        input_shape: Shape of one image: (784,), (1, 28, 28), or (3, 32, 32): channels, height and
            width. Networks that need height and width take a flat image as square and grey.
        latent_dim: Dimensions of z.
        intermediate_dim: Units of a hidden layer.
        architecture: `mlp`, `residual`, `conv`, `resnet`, or a network of your own: see
            `parts.networks`.
        depth: Hidden layers (mlp) or blocks (residual, resnet) on each side.
        activation: `relu`, `tanh`, `silu` or `gelu`.
        posterior: `gaussian`, `flow`, `two_layer`, one of your own, or a module: see
            `parts.posteriors`.
        likelihood: `bernoulli`, `continuous_bernoulli`, `gaussian`, `discretized_logistic`,
            `pixelcnn`, one of your own, or a module: see `parts.likelihoods`.
        prior: `standard`, `mixture`, `vamp`, `flow`, `two_layer`, one of your own, or a module: see
            `parts.priors`.
        prior_components: Components of the mixture, of the VampPrior, or of the upper of two
            layers.
        classes: Number of classes of a conditional model; None for a model without labels.
        encoder: A module instead of the architecture's: (B, *shape) -> (B, features). With classes
            its input has one more channel per class, or one more number where images are flat.
        decoder: Likewise: (B, latent_dim) -> (B, *shape), or as many numbers per pixel as the
            likelihood needs. With classes its input is (B, latent_dim + classes).
        model_options: Options of the architecture: `channels` of `resnet`, or those of your own.
        posterior_options: Options of the posterior.
        likelihood_options: Options of the likelihood.
        prior_options: Options of the prior.

    Raises:
        ValueError: A size below 1, an unknown name, an option that the part does not have, modules
            that do not fit the shape, or classes with a prior that encodes images.

    Examples:
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
        posterior: str | nn.Module = "gaussian",
        likelihood: str | nn.Module = "bernoulli",
        prior: str | nn.Module = "standard",
        prior_components: int = 500,
        classes: int | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        model_options: Mapping[str, Any] | None = None,
        posterior_options: Mapping[str, Any] | None = None,
        likelihood_options: Mapping[str, Any] | None = None,
        prior_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # `save_run` writes this so that `load_run` can rebuild the model; None marks a module
        self.made_of: dict[str, Any] = {
            "architecture": architecture,
            "depth": depth,
            "activation": activation,
            "posterior": posterior if isinstance(posterior, str) else None,
            "likelihood": likelihood if isinstance(likelihood, str) else None,
            "prior": prior if isinstance(prior, str) else None,
            "prior_components": prior_components,
            "encoder": None if encoder else architecture,
            "decoder": None if decoder else architecture,
            "model_options": dict(model_options or {}),
            "posterior_options": dict(posterior_options or {}),
            "likelihood_options": dict(likelihood_options or {}),
            "prior_options": dict(prior_options or {}),
        }
        self.input_shape = tuple(input_shape)
        self.latent_dim = latent_dim
        self.intermediate_dim = intermediate_dim
        self.classes = classes
        self.y: Tensor | None = None  # see `given`
        # `Any`: the parts have methods that nn.Module does not declare
        self.encoder: Any
        self.posterior: Any
        self.decoder: Any
        self.likelihood: Any
        self.prior: Any
        sizes = {
            "latent_dim": latent_dim,
            "intermediate_dim": intermediate_dim,
            "depth": depth,
            "prior_components": prior_components,
            "classes": 1 if classes is None else classes,
            **{f"input_shape[{i}]": size for i, size in enumerate(self.input_shape)},
        }
        for argument, size in sizes.items():
            if size < 1 or size != int(size):
                raise ValueError(f"{argument} is {size}; it must be a whole number, 1 or more")

        network = _network(architecture, intermediate_dim, depth, activation, model_options or {})
        if isinstance(likelihood, str):
            likelihood = likelihoods.build(
                likelihood, likelihood_options or {}, context={"input_shape": self.input_shape}
            )
        self.outputs: int = getattr(likelihood, "outputs", 1)
        # this order of the parts decides the bits of the initial weights
        self._shape = _shape_for(network, self.input_shape)
        if encoder:
            self._shape = image_shape(self.input_shape)
        seen = (self._shape[0] + (classes or 0), *self._shape[1:])
        self.encoder = encoder or network.encoder(seen)
        if isinstance(posterior, str):
            context = {"features": _features(self.encoder, seen), "latent_dim": latent_dim}
            posterior = posteriors.build(posterior, posterior_options or {}, context=context)
        self.posterior = posterior
        channels, *sides = _shape_for(network, self.input_shape)
        self.decoder = decoder or network.decoder(
            latent_dim + (classes or 0), (self.outputs * channels, *sides)
        )
        self.likelihood = likelihood
        if isinstance(prior, str):
            prior = priors.build(
                prior,
                prior_options or {},
                shared={"components": (prior_components, prior_components)},
                context={"latent_dim": latent_dim, "input_shape": self.input_shape},
            )
        self.prior = prior
        if see := getattr(self.prior, "see", None):
            if classes:
                raise ConfigError(
                    "model.conditional=true does not go with a prior that encodes its own images, "
                    "such as prior=vamp: those have no labels; use prior=mixture or prior=flow"
                )
            see(self)
        self._start_as_keras(network, own=(encoder is not None, decoder is not None))
        self._check_decoder()

    @classmethod
    def from_config(
        cls, config: Config, input_shape: Sequence[int] = (784,), classes: int | None = None
    ) -> "VAE":
        """Build the model that a run's config describes, with fresh weights.

        Raises:
            ConfigError: `model.conditional=true` without a number of classes.
        """
        if config.model.conditional and classes is None:
            raise ConfigError("model.conditional=true: the number of classes is missing")
        return cls(
            input_shape,
            config.model.latent_dim,
            config.model.intermediate_dim,
            architecture=config.model.name,
            depth=config.model.depth,
            activation=config.model.activation,
            posterior=config.posterior,
            likelihood=config.likelihood,
            prior=config.prior,
            prior_components=config.prior_components,
            classes=classes if config.model.conditional else None,
            model_options=config.model.options,
            posterior_options=config.posterior_options,
            likelihood_options=config.likelihood_options,
            prior_options=config.prior_options,
        )

    @classmethod
    def from_keras_weights(cls, weights: Sequence[Any]) -> "VAE":
        """Build the notebook's model from trained Keras weights.

        Args:
            weights: The ten arrays of `encoder.get_weights() + decoder.get_weights()`: kernel (in,
                out) and bias (out,) of the encoder's hidden layer, z_mean, z_log_var, the decoder's
                hidden layer and its output layer.

        Raises:
            ValueError: Not ten arrays, or shapes that do not fit together.
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
        the first steps go into the mean image, and latents that help little with it collapse.

        Args:
            mean_image: Mean of the training images: one value in [0, 1] per pixel.

        Raises:
            ValueError: Another number of pixels, values outside [0, 1], or a decoder that does not
                end in a linear layer.
        """
        if not isinstance(self.decoder.out, nn.Linear):
            raise ValueError("the decoder has no bias per pixel; use architecture mlp or residual")
        pixels = self.decoder.out.bias.numel()
        if mean_image.numel() != pixels:
            raise ValueError(f"mean_image has {mean_image.numel()} pixels, not {pixels}")
        check_pixels(mean_image)
        logits = torch.logit(mean_image.clamp(0.001, 0.999))
        self.decoder.out.bias.copy_(logits.flatten())

    def given(self, y: Tensor | int) -> "VAE":
        """Fix the labels: the model p(x|y), which no longer needs a y.

        It shares its parts and weights with this model. `exact_log_px(vae.given(7), sevens)` and
        every other function treat it as a model without labels.

        Args:
            y: One class, or (B,): a class for each of the B images.

        Raises:
            ValueError: The model has no labels, or y is not one of its classes.
        """
        if self.classes is None:
            raise ValueError("y is given, but the model has no labels; make it with classes=N")
        y = torch.as_tensor(y, device=next(self.parameters()).device)
        if y.ndim > 1:
            raise ValueError(f"y has shape {tuple(y.shape)}; it must be one class, or (B,)")
        check_labels(y, self.classes)
        same = object.__new__(type(self))  # not copy.copy, which torch.compile does not trace
        same.__dict__.update(self.__dict__)
        same.y = y
        return same

    def of(self, batch: Batch) -> "VAE":
        """The model for these images: with their labels fixed if it is conditional."""
        if self.classes is None or self.y is not None or batch.y is None:
            return self
        return self.given(batch.y)

    def encode_parts(self, x: Tensor, *, at_once: int = 1000) -> Iterator[Any]:
        """q(z|x), some images at a time: limits the encoder's memory.

        Args:
            x: (N, *input_shape) or (N, pixels) in [0, 1].
            at_once: Images that are encoded together.

        Raises:
            ValueError: As `encode`.
        """
        if self.y is not None:
            self._labels(x, [len(x)])  # refuses another number of them
        each = None if self.y is None or self.y.numel() == 1 else self.y
        for first in range(0, len(x), at_once):
            some = slice(first, first + at_once)
            part = self if each is None else self.given(each[some])
            yield part.encode(x[some])

    def _labels(self, like: Tensor, count: Sequence[int]) -> Tensor:
        """One-hot labels (*count, classes) in the type of `like`."""
        if self.y is None:
            raise ValueError(
                f"the model is conditional and needs labels: give y, a class from 0 to "
                f"{(self.classes or 0) - 1}, or a label for each image; a loader gives (x, y)"
            )
        if self.y.ndim and len(self.y) not in (1, *count[-1:]):
            raise ValueError(
                f"y holds {len(self.y)} labels for {tuple(count)} images; give one class, or a "
                "label for each image"
            )
        hot = self.y.unsqueeze(-1) == torch.arange(self.classes or 0, device=like.device)
        return hot.to(like.dtype).expand(*count, -1)

    def encode(self, x: Tensor, y: Tensor | int | None = None) -> Any:
        """q(z|x), by default a Gaussian: `mean, logvar = vae.encode(x)`.

        Args:
            x: (B, *input_shape) or (B, pixels) in [0, 1]; (B, *any) with as many pixels where
                `input_shape` is flat. Pixel values are not checked, because every training step
                calls this: see `check`.
            y: For a conditional model: one class, or (B,): a class for each image.

        Returns:
            A `Posterior`; for a Gaussian a pair of mean and logvar, (B, latent_dim) each.

        Raises:
            ValueError: Another shape, or integer pixels; labels that are missing, out of range, or
                given to a model without labels.
        """
        if y is not None:
            return self.given(y).encode(x)
        x = as_images(x, self.input_shape)
        x = x.reshape(len(x), *self._shape)
        if self.classes:
            planes = self._labels(x, (len(x),))
            planes = planes.reshape(*planes.shape, *(1 for _ in self._shape[1:]))
            x = torch.cat([x, planes.expand(-1, -1, *self._shape[1:])], 1)
        return self.posterior(self.encoder(x))

    def check(self, x: Tensor) -> Tensor:
        """Check images from outside and return them in this model's shape and type.

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

    def decode(self, z: Tensor, y: Tensor | int | None = None) -> Tensor:
        """The likelihood's parameters: (..., latent_dim) -> (..., *input_shape).

        For Bernoulli pixels these are logits. A likelihood with several outputs for a pixel has
        (..., *input_shape, outputs). A conditional model needs y, a class or (B,) for z
        (..., B, latent_dim).

        Raises:
            ValueError: The last dimension of z is not `latent_dim`, or z holds integers; labels as
                in `encode`.
        """
        if y is not None:
            return self.given(y).decode(z)
        if z.ndim < 1 or z.shape[-1] != self.latent_dim:
            raise ValueError(f"z has shape {tuple(z.shape)}; it must end in {self.latent_dim}")
        if not z.is_floating_point():
            raise ValueError(f"z is {z.dtype}; latents are floats")
        if self.classes:
            z = torch.cat([z, self._labels(z, z.shape[:-1])], -1)
        return _decoded(self.decoder, z, self.input_shape, self.outputs)

    def forward(
        self,
        x: Tensor,
        *,
        y: Tensor | int | None = None,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VAEOutput:
        """Encode, sample z, decode. `eps` or `generator` fix the sample: see `reparameterize`."""
        if y is not None:
            return self.given(y).forward(x, eps=eps, generator=generator)
        q = self.encode(x)
        if isinstance(q, DiagonalGaussian):
            z = reparameterize(*q, eps=eps, generator=generator)
            return VAEOutput(self.decode(z), *q, z)
        if eps is None:
            eps = torch.randn(q.mean.shape, generator=generator, device=x.device, dtype=x.dtype)
        z = q.rsample(eps)
        return VAEOutput(self.decode(z), q.mean, None, z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Log-density of the prior, in nats: (..., latent_dim) -> (...)."""
        return self.prior.log_prob(z)  # type: ignore[no-any-return]

    def kl_per_dim(self, q: Posterior) -> Tensor | None:
        """KL(q(z|x) || p(z)) of each dimension, (B, latent_dim) nats, where it has a closed form.

        Kingma and Welling (2013), appendix B: for a Gaussian posterior and the standard prior.
        """
        closed_form = getattr(self.prior, "kl_per_dim", None)
        return closed_form(q) if closed_form else None

    @in_eval_mode
    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | int | None = None) -> Tensor:
        """Expected pixels at the posterior mean: (B, *shape) -> (B, *input_shape) in [0, 1].

        Raises:
            ValueError: Images of another shape, or pixels outside [0, 1]; labels as in `encode`.
        """
        if y is not None:
            return self.given(y).reconstruct(x)
        x = self.check(x)
        check_pixels(x)  # for a Gaussian too, whose mean is clamped to [0, 1]
        return self.likelihood.mean(self.decode(self.encode(x).mean))  # type: ignore[no-any-return]

    @in_eval_mode
    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        y: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Expected pixels of n samples from the prior: (n, *input_shape) in [0, 1].

        Args:
            n: How many.
            y: For a conditional model: one class, or (n,): a class for each image.
            generator: Source of the random numbers.

        Raises:
            ValueError: n is below 1; labels as in `encode`.
        """
        if y is not None:
            return self.given(y).sample(n, generator=generator)
        if n < 1:
            raise ValueError(f"n is {n}; it must be 1 or more")
        weight = next(self.parameters())
        z = self.prior.sample(n, generator)
        return self.likelihood.mean(self.decode(z.to(weight)))  # type: ignore[no-any-return]

    def _start_as_keras(self, network: Network, *, own: tuple[bool, bool]) -> None:
        """Initialise, in a fixed order, the parts that start as in Keras."""
        parts = [self.encoder, self.posterior, self.decoder]
        theirs = getattr(network, "glorot", False)
        start = (
            theirs and not own[0],
            getattr(self.posterior, "glorot", False),
            theirs and not own[1],
        )
        for part, wanted in zip(parts, start, strict=True):
            if wanted:
                part.apply(_keras_init)

    def _check_decoder(self) -> None:
        """Check, on one latent in eval mode, that it gives the numbers that the likelihood needs.

        Skipped on the meta device, where `load_run` builds models: a pass there imports torch's
        compiler, which takes seconds.
        """
        if next(self.decoder.parameters(), torch.zeros(())).is_meta:
            return
        shape = (*((self.outputs,) if self.outputs > 1 else ()), *self.input_shape)
        made = _one(self.decoder, (self.latent_dim + (self.classes or 0),), "decoder")
        if made.numel() != math.prod(shape):
            raise ValueError(
                f"decoder gives {tuple(made.shape[1:])} for an image; it must give "
                f"{math.prod(shape)} numbers, {shape}"
            )


def _network(
    name: str, width: int, depth: int, activation: str, options: Mapping[str, Any]
) -> Network:
    shared = {
        "intermediate_dim": (width, 512),
        "depth": (depth, 1),
        "activation": (activation, "relu"),
    }
    return networks.build(name, options, shared=shared)  # type: ignore[no-any-return]


def _shape_for(network: Network, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an image as the network expects it."""
    return (math.prod(shape),) if getattr(network, "flat", False) else image_shape(shape)


def _features(encoder: nn.Module, shape: Sequence[int]) -> int:
    """The number of an encoder's features: known for built-in ones, else found in one pass.

    Raises:
        ValueError: It does not take images of this shape, or does not return (B, features).
    """
    if isinstance(encoder, Features):
        return encoder.features
    features = _one(encoder, shape, "encoder")
    if features.ndim != 2:
        raise ValueError(
            f"encoder gives {tuple(features.shape)} for one image; it must be (1, features)"
        )
    return features.shape[1]


@torch.no_grad()
def _one(module: nn.Module, shape: Sequence[int], name: str) -> Tensor:
    """A module's output for one input of zeros; its mode does not change."""
    like = next(module.parameters(), torch.zeros(()))
    try:
        with evaluating(module):
            made = module(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} does not take {tuple(shape)}: {reason}") from None
    if not isinstance(made, Tensor):
        raise ValueError(f"{name} gives a {type(made).__name__}; it must give one tensor")
    return made


def _decoded(decoder: nn.Module, z: Tensor, shape: Sequence[int], outputs: int = 1) -> Tensor:
    """A decoder's output for z with any leading dimensions, in the type of z."""
    out = decoder(z.reshape(-1, z.shape[-1])).to(z.dtype)
    if outputs == 1:
        return out.reshape(*z.shape[:-1], *shape)  # type: ignore[no-any-return]
    out = out.reshape(*z.shape[:-1], outputs, *shape)
    return out.movedim(z.ndim - 1, -1)  # type: ignore[no-any-return]


def _keras_init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
