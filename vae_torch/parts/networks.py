"""Networks: an encoder turns an image into features, a decoder turns z into parameters.

A network is a class with two methods, which get shapes only:

    @networks.register("mine")
    class Mine:
        def __init__(self, *, width: int = 32) -> None: ...
        def encoder(self, shape) -> nn.Module: ...  # (B, *shape) -> (B, features), any number
        def decoder(self, latent_dim, shape) -> nn.Module: ...  # (B, latent_dim) -> (B, *shape)

`shape` is (channels, height, width), also for flat images that are square. Other flat images have
(pixels,). A class whose `flat` is true always gets (pixels,). In a conditional model the encoder's
shape has more channels than an image; the decoder's has more where the likelihood needs several
numbers per pixel. Convolutions here are laid out channels last, in which processors run them
faster. Where `glorot` is true, the model initialises the weights as Keras does;
otherwise they stay as the class made them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from vae_torch.config import ConfigError, Count
from vae_torch.parts.registry import Table

Activation = Literal["relu", "tanh", "silu", "gelu"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}

networks: "Table[type]" = Table("model", "model.options")


class Network(Protocol):
    """The contract of a network."""

    def encoder(self, shape: tuple[int, ...]) -> nn.Module:
        """(B, *shape) -> (B, features)."""

    def decoder(self, latent_dim: int, shape: tuple[int, ...]) -> nn.Module:
        """(B, latent_dim) -> (B, *shape)."""


class Features(nn.Module):
    """An encoder: (B, *shape) -> (B, features)."""

    def __init__(self, trunk: nn.Module, features: int) -> None:
        super().__init__()
        self.trunk, self.features = trunk, features

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, features)."""
        return self.trunk(x)  # type: ignore[no-any-return]


class Output(nn.Module):
    """A decoder: hidden layers, then the layer that makes the pixels."""

    def __init__(self, trunk: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.trunk, self.out = trunk, out

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) -> (B, *shape)."""
        return self.out(self.trunk(z))  # type: ignore[no-any-return]


@networks.register("mlp")
class MLP:
    """Dense layers, as in the notebook."""

    flat = True
    glorot = True

    def __init__(
        self, *, intermediate_dim: int = 512, depth: int = 1, activation: Activation = "relu"
    ) -> None:
        self.width, self.depth, self.activation = intermediate_dim, depth, activation

    def encoder(self, shape: tuple[int, ...]) -> nn.Module:
        """(B, pixels) -> (B, intermediate_dim)."""
        return Features(self.trunk(shape[0]), self.width)

    def decoder(self, latent_dim: int, shape: tuple[int, ...]) -> nn.Module:
        """(B, latent_dim) -> (B, pixels)."""
        return Output(self.trunk(latent_dim), nn.Linear(self.width, shape[0]))

    def trunk(self, inputs: int) -> nn.Sequential:
        """(B, inputs) -> (B, intermediate_dim)."""
        layers: list[nn.Module] = []
        for fan_in in [inputs] + [self.width] * (self.depth - 1):
            layers += [nn.Linear(fan_in, self.width), ACTIVATIONS[self.activation]()]
        return nn.Sequential(*layers)


@networks.register("residual")
class Residual(MLP):
    """Dense residual blocks."""

    def trunk(self, inputs: int) -> nn.Sequential:
        """(B, inputs) -> (B, intermediate_dim)."""
        blocks = [ResidualBlock(self.width, self.activation) for _ in range(self.depth)]
        return nn.Sequential(nn.Linear(inputs, self.width), *blocks, nn.LayerNorm(self.width))


class ResidualBlock(nn.Module):
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
        """(B, width) -> (B, width)."""
        return x + self.body(x)  # type: ignore[no-any-return]


@networks.register("conv")
class Conv:
    """Two strided convolutions and a dense layer; the decoder mirrors them."""

    glorot = True

    def __init__(self, *, intermediate_dim: int = 512, activation: Activation = "relu") -> None:
        self.width, self.activation = intermediate_dim, ACTIVATIONS[activation]

    def encoder(self, shape: tuple[int, ...]) -> nn.Module:
        """(B, channels, height, width) -> (B, intermediate_dim)."""
        channels, height, width = _image(shape)
        act = self.activation
        return Features(
            nn.Sequential(
                nn.Identity(),  # keeps the layer numbers of older checkpoints
                nn.Conv2d(channels, 32, 4, stride=2, padding=1),  # (B, 32, height/2, width/2)
                act(),
                nn.Conv2d(32, 64, 4, stride=2, padding=1),  # (B, 64, height/4, width/4)
                act(),
                nn.Flatten(),
                nn.Linear(64 * (height // 4) * (width // 4), self.width),
                act(),
            ),
            self.width,
        ).to(memory_format=torch.channels_last)

    def decoder(self, latent_dim: int, shape: tuple[int, ...]) -> nn.Module:
        """(B, latent_dim) -> (B, channels, height, width)."""
        channels, height, width = _image(shape)
        act = self.activation
        small = (64, height // 4, width // 4)
        # one pixel more where halving a side lost one
        first = (height // 2 % 2, width // 2 % 2)
        last = (height % 2, width % 2)
        layers = nn.Sequential(
            nn.Linear(latent_dim, self.width),
            act(),
            nn.Linear(self.width, math.prod(small)),
            act(),
            nn.Unflatten(1, small),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1, output_padding=first),
            act(),
            nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1, output_padding=last),
        )
        return Output(nn.Identity(), layers).to(memory_format=torch.channels_last)


@networks.register("resnet")
class ResNet:
    """Convolutions that halve the image until a side has four pixels or fewer, and residual blocks.

    The blocks follow every halving but the first, where they would take most of the time. The
    decoder mirrors the encoder.

    Args:
        depth: Blocks after a halving, on each side.
        activation: The nonlinearity.
        channels: Channels after the first halving; each further one doubles them.
    """

    glorot = True

    def __init__(
        self, *, depth: int = 1, activation: Activation = "relu", channels: Count = 32
    ) -> None:
        self.depth, self.channels = depth, channels
        self.activation = ACTIVATIONS[activation]

    def encoder(self, shape: tuple[int, ...]) -> nn.Module:
        """(B, channels, height, width) -> (B, features)."""
        scales = self.scales(shape)
        layers: list[nn.Module] = []
        for large, small in itertools.pairwise(scales):
            layers += [nn.Conv2d(large[0], small[0], 4, stride=2, padding=1)]
            layers += [*self.blocks(small, scales), self.activation()]
        features = Features(nn.Sequential(*layers, nn.Flatten()), math.prod(scales[-1]))
        return features.to(memory_format=torch.channels_last)

    def decoder(self, latent_dim: int, shape: tuple[int, ...]) -> nn.Module:
        """(B, latent_dim) -> (B, channels, height, width)."""
        scales = self.scales(shape)
        layers: list[nn.Module] = [nn.Linear(latent_dim, math.prod(scales[-1]))]
        layers += [nn.Unflatten(1, scales[-1])]
        for small, large in itertools.pairwise(reversed(scales)):
            lost = (large[1] % 2, large[2] % 2)  # one pixel more where halving a side lost one
            layers += [*self.blocks(small, scales), self.activation()]
            layers += [
                nn.ConvTranspose2d(small[0], large[0], 4, stride=2, padding=1, output_padding=lost)
            ]
        out = Output(nn.Identity(), nn.Sequential(*layers))
        return out.to(memory_format=torch.channels_last)

    def scales(self, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """(channels, height, width) of the image and after each halving."""
        found = [_image(shape)]
        while len(found) == 1 or min(found[-1][1:]) > 4:
            _, height, width = found[-1]
            found.append((self.channels * 2 ** (len(found) - 1), height // 2, width // 2))
        return found

    def blocks(
        self, scale: tuple[int, int, int], scales: Sequence[tuple[int, int, int]]
    ) -> list[nn.Module]:
        """The blocks at one scale."""
        depth = 0 if scale == scales[1] else self.depth
        return [ConvBlock(scale[0], self.activation) for _ in range(depth)]


class ConvBlock(nn.Module):
    """x + s * conv(act(conv(act(x)))), with a scale s per channel that starts at 0.

    He et al., *Identity Mappings in Deep Residual Networks* (2016); the scale instead of a
    normalisation: De and Smith, *Batch Normalization Biases Residual Blocks Towards the Identity
    Function in Deep Networks* (NeurIPS 2020), section 4.
    """

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.body = nn.Sequential(
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
            activation(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> the same."""
        return x + self.scale * self.body(x)  # type: ignore[no-any-return]


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ConfigError(
            f"architecture is 'conv' and an image has shape {tuple(shape)}; it must be (channels, "
            "height, width), (height, width), or flat and square, with sides of 4 pixels or more"
        )
    channels, height, width = shape
    return channels, height, width


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(channels, height, width) of an image, or (pixels,) if it is flat and not square."""
    sides = tuple(n for n in shape if n != 1)
    if len(sides) == 1:
        side = math.isqrt(sides[0])
        return (1, side, side) if side**2 == sides[0] else sides
    return (1, *sides) if len(sides) == 2 else sides or (1,)
