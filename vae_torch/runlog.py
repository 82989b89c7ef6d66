"""A run's records: metrics.jsonl, TensorBoard, figures and summary.json, all in its folder."""

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vae_torch.checkpoint import history_lines, write_atomically
from vae_torch.config import Config
from vae_torch.figures import (
    growth_frame,
    interpolation_figure,
    kl_figure,
    latent_scatter,
    manifold_grid,
    read_png,
    reconstruction_figure,
    sample_grid,
    save_gif,
    save_png,
    squares,
    to_pixels,
    traversal_figure,
)
from vae_torch.model import VAE
from vae_torch.prior import StandardNormal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVES = ("loss", "elbo", "reconstruction", "kl")
# where a run took place, not what it was
_NO_HYPERPARAMETERS = ("data.root", "device", "threads", "train.resume", "train.figure_every")
_GIF_FRAMES = 100  # of a long run at most: 25 s, about 8 MB
_GRID_SCALE = 3  # a 28-pixel digit is a postage stamp on today's screens


class RecordError(ValueError):
    """A run's records are damaged: one line that names the file."""


class RunLog:
    """Writes what happens in a run into its folder.

    Args:
        run_dir: The folder; made if absent.
        config: Of the run.
        config_text: The resolved config as the user would read it.
        history: Of the epochs already done, when a run is continued: what its checkpoint holds.
            `metrics.jsonl` is written anew from it, so that no epoch is there twice, or lacking.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        *,
        config_text: str,
        history: dict[str, list[Any]] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second that only runs should pay

        self.run_dir = run_dir
        self.config = config
        (run_dir / "figures").mkdir(parents=True, exist_ok=True)
        self._metrics = run_dir / "metrics.jsonl"
        lines = history_lines(history or {})
        write_atomically(self._metrics, "".join(lines).encode())
        # of a first epoch too: a run killed in it may have left points
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=len(lines) + 1)
        self._writer.add_text("config", _verbatim(config_text))
        self._writer.add_text("command", _verbatim(shlex.join(["python", *sys.orig_argv[1:]])))
        # regular expressions: `kl` alone would draw kl_per_dim too
        charts = {n: ["Multiline", [f"^train/{n}$", f"^test/{n}$"]] for n in _CURVES}
        self._writer.add_custom_scalars({"train and test, nats per image": charts})

    def log(self, metrics: dict[str, Any]) -> None:
        """One epoch: a line of metrics.jsonl, and its points in TensorBoard.

        They are in their files when this returns: the checkpoint that follows counts on them.
        """
        with self._metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        epoch = metrics["epoch"]
        for name, value in metrics.items():
            if isinstance(value, list):
                for dim, part in enumerate(value):
                    self._writer.add_scalar(f"{name}/{dim}", part, epoch)
            elif name != "epoch":
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def figures(self, epoch: int, vae: VAE, x: Tensor, labels: Tensor) -> None:
        """Draw what the model does now, as PNG files and in TensorBoard.

        Args:
            epoch: Its step in TensorBoard; the PNG files show the latest.
            vae: The model.
            x: (N, *shape) test images; the first ten are reconstructed, all are encoded.
            labels: (N,).
        """
        pictures: dict[str, Tensor | Figure] = {
            "reconstructions": reconstruction_figure(vae, x[:10]),
            "samples": sample_grid(vae),
            "latent": latent_scatter(vae, x, labels),
            "traversal": traversal_figure(vae, x),
        }
        others = (labels != labels[0]).nonzero()
        if len(others):  # a way from one class to another
            pictures["interpolation"] = interpolation_figure(vae, x[[0, int(others[0])]])
        if vae.latent_dim == 2:
            pictures["manifold"] = manifold_grid(vae)
        if isinstance(vae.prior, StandardNormal):
            pictures["kl"] = kl_figure(vae, x)
        for name, picture in pictures.items():
            pixels = to_pixels(picture)
            if isinstance(picture, Tensor):
                scale = 2 if name == "manifold" else _GRID_SCALE
                pixels = pixels.repeat(scale, 0).repeat(scale, 1)
            save_png(pixels, self.run_dir / "figures" / f"{name}.png")
            self._writer.add_image(
                name, pixels, epoch, dataformats="HW" if pixels.ndim == 2 else "HWC"
            )
        self._writer.flush()

    def growth(self, epoch: int, vae: VAE, x: Tensor) -> None:
        """Keep a frame of the animation that `finish` writes: `figures/growth/`.

        Args:
            epoch: Its place.
            vae: The model.
            x: (n, *shape): the images to reconstruct.
        """
        folder = self.run_dir / "figures" / "growth"
        folder.mkdir(exist_ok=True)
        save_png(growth_frame(vae, x, epoch), folder / f"{epoch:06}.png")

    def projector(self, vae: VAE, x: Tensor, labels: Tensor) -> None:
        """Posterior means for TensorBoard's projector, with classes and thumbnails.

        Args:
            vae: The trained model.
            x: (N, *shape) images.
            labels: (N,).
        """
        means, _ = vae.encode(x)
        if vae.latent_dim < 3:  # the projector's own PCA shows nothing of fewer than three
            means = torch.nn.functional.pad(means, (0, 3 - vae.latent_dim))
        names = [str(label) for label in labels.tolist()]
        thumbnails = 1 - squares(x)[:, None]  # dark on light, as the projector's page is
        self._writer.add_embedding(
            means, metadata=names, label_img=thumbnails, tag="latents",
            global_step=self.config.train.epochs,
        )  # fmt: skip

    def finish(self, history: dict[str, list[Any]], facts: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json and the hparams, and close. A run without summary.json is unfinished.

        Args:
            history: What `train` returned.
            facts: What the caller knows besides: data hashes, device.

        Returns:
            The summary.
        """
        final = {
            name: values[-1]
            for name, values in history.items()
            if name.startswith(("train/", "test/"))
        }
        summary = {
            "final": final,
            "unit": "nats per image; elbo and reconstruction: higher is better",
            "epochs": len(history["epoch"]),
            "best_test_elbo": max(history["test/elbo"]),
            "seconds": round(sum(history["seconds"]), 1),
            **facts,
            "versions": versions(),
            "git_commit": git_commit(),
            "config": self.config.to_dict(),
        }
        frames = sorted((self.run_dir / "figures" / "growth").glob("*.png"))
        if len(frames) > 1:
            spread = torch.linspace(0, len(frames) - 1, min(len(frames), _GIF_FRAMES))
            shown = [read_png(frames[i]) for i in spread.round().int()]
            save_gif(shown, self.run_dir / "figures" / "growth.gif")
        self._write_hparams(final)
        self._writer.close()
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.run_dir / "summary.json", text.encode())
        return summary

    def close(self) -> None:
        """Close the files of a run that did not finish."""
        self._writer.close()

    def _write_hparams(self, final: dict[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        flat: dict[str, Any] = {}
        for key, value in self.config.to_dict().items():
            if isinstance(value, dict):
                flat |= {f"{key}.{inner}": v for inner, v in value.items()}
            else:
                flat[key] = value
        known = {
            k: v
            for k, v in flat.items()
            if isinstance(v, bool | int | float | str) and k not in _NO_HYPERPARAMETERS
        }
        metrics = {f"final/{name}": final[f"test/{name}"] for name in _CURVES}
        for record in hparams(known, metrics):
            self._writer._get_file_writer().add_summary(record)
        # after the last epoch: a run that is killed here and continued purges them, and no others
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, self.config.train.epochs + 1)


def add_evaluation(run_dir: Path, card: dict[str, Any], epoch: int) -> None:
    """The evaluation card in a run's TensorBoard: its figures as points, the card as text."""
    from torch.utils.tensorboard import SummaryWriter

    rows = ["| figure | value | standard error | unit | definition |", "|---|---|---|---|---|"]
    with SummaryWriter(str(run_dir / "tensorboard"), filename_suffix=".evaluation") as writer:
        for name, entry in card.items():
            if isinstance(entry, dict) and isinstance(entry.get("value"), int | float):
                writer.add_scalar(f"evaluation/{name}", entry["value"], epoch)
                cells = (entry["value"], entry["standard_error"], entry["unit"])
                rows.append(f"| {name} | {' | '.join(map(str, cells))} | {entry['definition']} |")
        verdict = "\n".join(f"- {sentence}" for sentence in card["verdict"])
        writer.add_text("evaluation", "\n".join(rows) + f"\n\n{verdict}", epoch)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The epochs in metrics.jsonl; a last line torn by a crash is left out.

    Raises:
        RecordError: Another line is damaged.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    epochs = []
    for number, line in enumerate(lines, 1):
        try:
            epochs.append(json.loads(line))
            if not isinstance(epochs[-1]["epoch"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            del epochs[number - 1 :]
            if number < len(lines):
                raise RecordError(f"{path}: line {number} is not the JSON of an epoch") from None
    return epochs


def _verbatim(text: str) -> str:
    """Markdown that shows any text as it is: an indented block has no end that it could contain."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def versions() -> dict[str, str]:
    """Of what decides a run's numbers."""
    import numpy
    import torchvision

    from vae_torch import __version__

    return {
        "vae_torch": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def git_commit() -> str | None:
    """The commit of the code, with `-dirty` where files differ from it; None outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        got = subprocess.run(
            [*command, "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return got.stdout.strip() or None
