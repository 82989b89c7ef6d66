"""Encoder and decoder as ONNX and TorchScript files, for programs that lack this package."""

import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vae_torch.config import ConfigError
from vae_torch.parts.pixelcnn import PixelCNN
from vae_torch.parts.posteriors import gaussian_of
from vae_torch.vae import VAE, _decoded, in_eval_mode

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt"}
_CLOSE = 1e-5  # largest absolute and relative difference from PyTorch


@in_eval_mode
@torch.no_grad()
def portable_files(vae: VAE, formats: Sequence[str]) -> dict[str, bytes]:
    """`encoder.onnx`, `decoder.onnx`, `encoder.pt`, `decoder.pt`: each checked against PyTorch.

    Encoders turn images (B, *input_shape) in [0, 1] into the posterior's mean and logvar, both
    (B, latent_dim); decoders turn z (B, latent_dim) into expected pixels (B, *input_shape).

    Args:
        vae: A model with a Gaussian posterior.
        formats: `onnx` (needs the extra `onnx`), `torchscript`.

    Returns:
        The files by name.

    Raises:
        ConfigError: The posterior is not Gaussian, the model is conditional, its likelihood draws
            images one pixel at a time, a library is not installed, or torch cannot export a part,
            or not exactly.
    """
    if vae.classes:
        raise ConfigError(
            f"formats=[{','.join(formats)}] with model.conditional=true: these files take no "
            "labels; leave the formats out"
        )
    if isinstance(vae.likelihood, PixelCNN):
        raise ConfigError(
            f"formats=[{','.join(formats)}] with likelihood=pixelcnn: its images are drawn pixel "
            "by pixel, which these files cannot do; leave the formats out"
        )
    weight = next(vae.parameters())
    x, z = torch.rand(3, *vae.input_shape).to(weight), torch.randn(3, vae.latent_dim).to(weight)
    gaussian_of(vae.encode(x), f"formats=[{','.join(formats)}]")
    parts: dict[str, tuple[nn.Module, Tensor]] = {
        "encoder": (_Encoder(vae), x),
        "decoder": (_Decoder(vae), z),
    }
    files = {}
    for kind in formats:
        make = _onnx if kind == "onnx" else _torchscript
        for name, (part, example) in parts.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch, about what will change in it
                    content, found = make(part.eval(), example)
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"formats=[{kind}]: needs {error.name}, which is not installed; pip install "
                    f"-e '.[{kind}]'"
                ) from None
            except Exception as error:  # whatever torch raises for a network of the user's own
                line = str(error).strip().partition("\n")[0]
                raise ConfigError(
                    f"formats=[{kind}]: torch cannot export the {name} ({line[:200]}); leave the "
                    "format out"
                ) from error
            for ours, theirs in zip(_tuple(part(example)), found, strict=True):
                if not torch.allclose(ours.cpu(), theirs.cpu(), rtol=_CLOSE, atol=_CLOSE):
                    off = (ours.cpu() - theirs.cpu()).abs().max().item()
                    raise ConfigError(
                        f"formats=[{kind}]: the {name} differs from PyTorch by {off:.2g}, which is "
                        f"more than {_CLOSE:g}; leave the format out"
                    )
            files[f"{name}{SUFFIXES[kind]}"] = content
    return files


class _Encoder(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder, self.posterior, self.shape = vae.encoder, vae.posterior, vae._shape

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        # not vae.encode: Python's len(image) would be a constant in the file
        mean, logvar = self.posterior(self.encoder(image.reshape(-1, *self.shape)))
        return mean, logvar


class _Decoder(nn.Module):
    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.likelihood = vae.decoder, vae.likelihood
        self.shape, self.outputs = vae.input_shape, vae.outputs

    def forward(self, z: Tensor) -> Tensor:
        params = _decoded(self.decoder, z, self.shape, self.outputs)
        return self.likelihood.mean(params)  # type: ignore[no-any-return]


def _onnx(part: nn.Module, example: Tensor) -> tuple[bytes, Sequence[Tensor]]:
    """The file, and what ONNX Runtime makes of the example."""
    import onnxruntime
    import onnxscript  # noqa: F401 - torch needs it, and says so less clearly

    any_number = ({0: torch.export.Dim("batch")},)
    # two rows here, three in the example: shows that the number of rows is free
    exported: Any = torch.onnx.export(
        part, (example[:2],), dynamo=True, dynamic_shapes=any_number, verbose=False
    )
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found = session.run(None, {given.name: example.cpu().numpy()})
    return content, [torch.from_numpy(value) for value in found]


def _torchscript(part: nn.Module, example: Tensor) -> tuple[bytes, Sequence[Tensor]]:
    """The file, and what it makes of the example once it is read, at the second call."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(part, (example[:2],)), file)
    content = file.getvalue()
    read: Any = torch.jit.load(io.BytesIO(content))
    read(example)  # random numbers would be others at the second call
    return content, _tuple(read(example))


def _tuple(found: Any) -> Sequence[Tensor]:
    return found if isinstance(found, tuple) else (found,)
