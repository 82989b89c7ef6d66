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
    """Within, the module is in eval mode; then each part of it is in the mode that it was in."""
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
    """A function of a model that looks at it in eval mode, and leaves it in the mode it was in."""

    @wraps(function)
    def wrapped(vae: "VAE", /, *args: P.args, **kwargs: P.kwargs) -> R:
        with evaluating(vae):
            return function(vae, *args, **kwargs)

    return wrapped


class VAEOutput(NamedTuple):
    """What one forward pass knows."""

    logits: Tensor  # (B, *input_shape), or (B, *input_shape, outputs)
    mean: Tensor  # (B, latent_dim)
    logvar: Tensor | None  # (B, latent_dim); None where q(z|x) is no Gaussian
    z: Tensor  # (B, latent_dim)


class Encoder(nn.Module):
    """The notebook's encoder alone: features of a network, then a Gaussian's two heads.

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
    """The notebook's decoder alone: one output per pixel, before any sigmoid; see `Encoder`."""

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
    """A variational autoencoder; its first three arguments are the Keras notebook's.

    Kernels start Glorot-uniform and biases at zero, as in Keras; modules that are passed in keep
    the weights that they have.

    With `classes` the model is conditional, p(x|y) = ∫ p(x|z, y) p(z) dz: encoder and decoder see
    each image's label y as a one-hot vector beside what they see else. Kingma et al.,
    *Semi-supervised Learning with Deep Generative Models* (2014), section 2 (M2, y observed);
    Sohn, Lee and Yan, *Learning Structured Output Representation* (2015). Then `encode`, `decode`,
    `sample`, ... need a y, and `given(y)` is the same model with y set, which takes none.

    Args:
        input_shape: Shape of one image: (784,), (1, 28, 28), or (3, 32, 32): channels, height and
            width. A flat image is taken for a square and grey one by networks that need its sides.
        latent_dim: Dimensions of z.
        intermediate_dim: Units of a hidden layer.
        architecture: `mlp`, `residual`, `conv`, or a network of your own: see `parts.networks`.
        depth: Hidden layers (mlp) or blocks (residual) on each side.
        activation: `relu`, `tanh`, `silu` or `gelu`.
        posterior: `gaussian`, `flow`, one of your own, or a module: see `parts.posteriors`.
        likelihood: `bernoulli`, `continuous_bernoulli`, `gaussian`, `discretized_logistic`, one of
            your own, or a module: see `parts.likelihoods`.
        prior: `standard`, `mixture`, `vamp`, `flow`, one of your own, or a module: see
            `parts.priors`.
        prior_components: Components of the mixture or VampPrior.
        classes: How many classes the labels of a conditional model have; None for a model that sees
            no labels.
        encoder: A module instead of the architecture's: (B, *shape) -> (B, features). With classes
            it gets as many channels more, or numbers where images are flat.
        decoder: The same: (B, latent_dim) -> (B, *shape), or as many numbers more as the likelihood
            has outputs for a pixel. With classes it gets (B, latent_dim + classes).
        model_options: Options of an architecture of your own.
        posterior_options: Options of the posterior.
        likelihood_options: Options of the likelihood.
        prior_options: Options of the prior.

    Raises:
        ValueError: A size below 1, a name that is none of the above, an option that a part has not,
            modules that do not fit the shape, or classes with a prior that encodes images.

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
        # what `save_run` writes, so that `load_run` can make the model again; None for a module
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
        # modules whose methods their contracts name, which nn.Module does not know
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
            likelihood = likelihoods.build(likelihood, likelihood_options or {})
        self.outputs: int = getattr(likelihood, "outputs", 1)
        # each part in the order in which its weights are drawn
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
                    "model.conditional=true with a prior that encodes images of its own, as "
                    "prior=vamp does: these have no labels; use prior=mixture or prior=flow"
                )
            see(self)
        self._start_as_keras(network, own=(encoder is not None, decoder is not None))
        self._check_decoder()

    @classmethod
    def from_config(
        cls, config: Config, input_shape: Sequence[int] = (784,), classes: int | None = None
    ) -> "VAE":
        """The model that a run's config describes, with fresh weights.

        Raises:
            ConfigError: `model.conditional=true` and nobody says how many classes there are.
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

    def given(self, y: Tensor | int) -> "VAE":
        """The model of images with these labels, p(x|y), which needs no y any more.

        It has the parts and weights of this one. `exact_log_px(vae.given(7), sevens)` and every
        other function of a model take it for one that knows of no labels.

        Args:
            y: A class, or (B,) of one for each of the B images that it will see.

        Raises:
            ValueError: The model sees no labels, or these are no classes of it.
        """
        if self.classes is None:
            raise ValueError("y is given and the model sees no labels; make it with classes=N")
        y = torch.as_tensor(y, device=next(self.parameters()).device)
        if y.ndim > 1:
            raise ValueError(f"y has shape {tuple(y.shape)}; it must be one class, or (B,)")
        check_labels(y, self.classes)
        same = object.__new__(type(self))  # not copy.copy, which torch.compile does not trace
        same.__dict__.update(self.__dict__)
        same.y = y
        return same

    def of(self, batch: Batch) -> "VAE":
        """The model for these images: given their labels where it sees labels, else as it is."""
        if self.classes is None or self.y is not None or batch.y is None:
            return self
        return self.given(batch.y)

    def _labels(self, like: Tensor, count: Sequence[int]) -> Tensor:
        """One-hot labels (*count, classes) in the type of `like`."""
        if self.y is None:
            raise ValueError(
                f"the model sees labels, and there are none: give y, a class from 0 to "
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
                `input_shape` is flat. Every training step comes through here, so the values are not
                looked at: see `check`.
            y: Of a conditional model: a class, or (B,) of one for each image.

        Returns:
            A `Posterior`; for a Gaussian a pair of mean and logvar, (B, latent_dim) each.

        Raises:
            ValueError: Another shape, or integer pixels; labels that are absent, no classes of the
                model, or given to one that sees none.
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
        """Encode, draw z, decode. `eps` or `generator` fix the draw; see `reparameterize`."""
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
        check_pixels(x)  # a Gaussian's too: what it draws is held inside [0, 1]
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
        """Expected pixels of n draws from the prior: (n, *input_shape) in [0, 1].

        Args:
            n: How many.
            y: Of a conditional model: a class, or (n,) of one for each image.
            generator: Where the draws come from.

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
        """Draw the weights of those parts that start as in Keras, in one order."""
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
        """Whether it gives as many numbers as the likelihood needs: on one latent, in eval mode.

        Not asked of a model without memory, into which `load_run` puts weights: a pass of torch's
        meta device imports its compiler, which takes seconds.
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
    """What a network is told of the shape of an image."""
    return (math.prod(shape),) if getattr(network, "flat", False) else image_shape(shape)


def _features(encoder: nn.Module, shape: Sequence[int]) -> int:
    """How many features an encoder gives: known of the built-in ones, else seen in one pass.

    Raises:
        ValueError: It takes no images of this shape, or gives no (B, features).
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
    """What a module makes of one input of zeros; it stays in the mode that it is in."""
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
