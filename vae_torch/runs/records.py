"""A run's records: metrics.jsonl, TensorBoard, figures and summary.json, all in its folder."""

import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vae_torch.checkpoint import history_lines
from vae_torch.config import INCIDENTAL, Config, flatten
from vae_torch.figures import (
    DIGIT_COLOURS,
    NoPicturesError,
    growth_frame,
    interpolation_figure,
    kl_figure,
    latent_scatter,
    manifold_grid,
    name_of,
    pictures,
    read_png,
    reconstruction_figure,
    sample_grid,
    save_gif,
    save_png,
    shrunk,
    to_png,
    traversal_figure,
)
from vae_torch.files import write_atomically
from vae_torch.images import Batch
from vae_torch.parts.metrics import metrics
from vae_torch.runs.identity import git_commit, versions
from vae_torch.training.errors import StoppedError
from vae_torch.vae import VAE

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from tensorboard.compat.proto.summary_pb2 import Summary

_log = logging.getLogger("vae_torch")

_CURVES = {  # titles of TensorBoard's charts
    "elbo": "elbo: lower bound on log p(x); higher is better",
    "reconstruction": "reconstruction: log p(x | z); higher is better",
    "kl": "kl: what the latents cost",
    "loss": "loss: what is minimised",
}
# In a group of its own, with a chart for each of 40 latents. It must come after `train/`:
# TensorBoard's hparams show the first five metrics by alphabet, and only runs that have all five.
_KL_DIMS = "z_test_kl"
# TensorBoard's first page sorts groups by alphabet: pictures come after the curves and before the
# many charts of `_KL_DIMS`.
_VISUALS = "visuals"
# In TensorBoard's order, with its description of each.
_PICTURES = {
    "reconstructions": "Test images over their reconstructions; under each, -log p(x | z) in nats.",
    "samples": "Decoded samples from the prior, with the same z at every step.",
    "latent": "Posterior means of test images by class; the two latents that vary most.",
    "manifold": "The decoded latent plane at coordinates that cut the prior into equal masses "
    "(Kingma and Welling, figure 4). The first latent grows to the right, the second upwards.",
    "traversal": "One test image, decoded while one latent moves: a row for each active latent.",
    "interpolation": "From one test image to another: straight, and in an arc around the origin.",
    "kl": "KL to N(0, 1) of each latent, in nats per image, largest first.",
}
_GIF_FRAMES = 100  # at most, for long runs: 25 s, about 8 MB
_GRID_SCALE = 3  # a 28-pixel digit is tiny on today's screens
_GRID_WIDTH = 1300  # pixels; larger images get a smaller scale
_THUMBNAIL = 64  # pixels per side; the projector's sheet of images has 8192 at most
# For a conditional model, in addition.
_OF_A_CLASS = {
    "samples": "A row for each class, with the same z.",
    "manifold": "Decoded with the class of the first test image.",
    "traversal": "Decoded with its class.",
    "interpolation": "Both of one class, with which all are decoded.",
}
# TensorBoard's description for images without classes.
_UNLABELLED = {"latent": "Posterior means of test images; the two latents that vary most."}


class Records:
    """Writes a run's progress into its folder.

    Args:
        run_dir: The folder; made if absent.
        config: The run's settings.
        config_text: The resolved config, as a user reads it.
        history: The finished epochs of a run that is resumed, from its checkpoint. `metrics.jsonl`
            is rewritten from it, so that no epoch is missing or doubled.
        class_names: Names of the classes in pictures, by label; numbers if absent.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        *,
        config_text: str,
        history: dict[str, list[Any]] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which only runs need

        self.run_dir = run_dir
        self.config = config
        self.class_names = class_names
        self._warned: set[str] = set()  # pictures that could not be drawn
        # all folders now: one that is moved away later must not be made again
        (run_dir / "figures" / "growth").mkdir(parents=True, exist_ok=True)
        self._metrics = run_dir / "metrics.jsonl"
        lines = history_lines(history or {})
        write_atomically(self._metrics, "".join(lines).encode())
        # also in a first epoch: a run killed in it may have left points
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=len(lines) + 1)
        self._add(_text("command", _verbatim(shlex.join(_command(run_dir)))), 0)
        self._add(_text("config", _verbatim(config_text)), 0)
        # regular expressions: a plain `kl` would match kl_per_dim too
        charts = {
            title: ["Multiline", [f"^train/{name}$", f"^test/{name}$"]]
            for name, title in _CURVES.items()
        }
        layout = {"train and test, nats per image": charts}
        if config.prior == "standard":
            each = {"a line for each latent": ["Multiline", [f"^{_KL_DIMS}/"]]}
            layout["KL of each latent, test, nats per image"] = each
        self._writer.add_custom_scalars(layout)

    def log(self, metrics: dict[str, Any]) -> None:
        """Write one epoch: a line of metrics.jsonl, and points in TensorBoard.

        They are in their files when this returns; the following checkpoint relies on it.
        """
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        epoch = metrics["epoch"]
        for name, value in metrics.items():
            if isinstance(value, list):
                for dim, part in enumerate(value, 1):  # z₁ is the first, as in the pictures
                    self._writer.add_scalar(f"{_KL_DIMS}/z{dim}", part, epoch)
            elif name == "seconds":
                self._writer.add_scalar("train/seconds_per_epoch", value, epoch)
            elif name != "epoch":
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def figures(self, epoch: int, vae: VAE, x: Tensor, labels: Tensor | None) -> None:
        """Draw figures of the model as PNG files, replacing older ones, and in TensorBoard.

        The first ten of the test images x (N, *shape) are reconstructed, and all are encoded.
        Without labels no picture shows classes.
        """
        ten, first = Batch(x, labels).rows(slice(10)), Batch(x, labels).rows(slice(1))
        draw: dict[str, Callable[[], Tensor | Figure]] = {
            "latent": lambda: latent_scatter(vae, x, labels, class_names=self.class_names)
        }
        if self._draws_images(vae, x):
            draw["reconstructions"] = lambda: reconstruction_figure(vae.of(ten), ten.x)
            draw["samples"] = lambda: sample_grid(vae)
            draw["traversal"] = lambda: traversal_figure(vae, x, labels)
            if (end := _other_end(labels, len(x), same=vae.classes is not None)) is not None:
                draw["interpolation"] = lambda: interpolation_figure(vae.of(first), x[[0, end]])
            if vae.latent_dim == 2:
                draw["manifold"] = lambda: manifold_grid(vae.of(first))
        if _has_kl_per_dim(vae.of(first), x):
            draw["kl"] = lambda: kl_figure(vae, x, labels)
        for place, (name, description) in enumerate(_PICTURES.items(), 1):
            if name not in draw:
                continue
            with self._warning_of(name):
                picture = draw[name]()
                scale = 1
                if isinstance(picture, Tensor):
                    most = 2 if name == "manifold" else _GRID_SCALE
                    scale = max(1, min(most, _GRID_WIDTH // picture.shape[1]))
                png = to_png(picture, scale=scale)
                write_atomically(self.run_dir / "figures" / f"{name}.png", png)
                told = _UNLABELLED.get(name, description) if labels is None else description
                if vae.classes and name in _OF_A_CLASS:
                    told += f" {_OF_A_CLASS[name]}"
                self._add(_image(f"{_VISUALS}/{place}_{name}", png, told), epoch)
        self._writer.flush()

    def growth(self, epoch: int, vae: VAE, x: Tensor, labels: Tensor | None = None) -> None:
        """Keep a frame for the animation of `finish`: reconstructions of x (n, *shape)."""
        if not self._draws_images(vae, x):
            return
        with self._warning_of("growth"):
            path = self.run_dir / "figures" / "growth" / f"{epoch:06}.png"
            ten = Batch(x, labels).rows(slice(10))
            save_png(growth_frame(vae, ten.x, epoch, labels=ten.y), path)

    def _draws_images(self, vae: VAE, x: Tensor) -> bool:
        """Whether the model's images can be drawn; if not, warn once."""
        try:
            pictures(vae, x[:1])
        except NoPicturesError as error:
            if "images" not in self._warned:
                _log.warning("figures: only those without images (%s)", error)
            self._warned.add("images")
            return False
        return True

    def projector(self, vae: VAE, x: Tensor, labels: Tensor | None) -> None:
        """Write posterior means for TensorBoard's projector, with classes and thumbnails."""
        with self._warning_of("projector"):
            means = torch.cat([q.mean for q in vae.of(Batch(x, labels)).encode_parts(x)])
            if vae.latent_dim < 3:  # the projector's PCA needs three
                means = torch.nn.functional.pad(means, (0, 3 - vae.latent_dim))
            numbers = [] if labels is None else labels.tolist()
            names = [name_of(label, self.class_names) for label in numbers] or None
            # add_embedding would recreate a missing folder
            (self.run_dir / "tensorboard").stat()
            self._writer.add_embedding(
                means,
                metadata=names,
                label_img=_thumbnails(vae, x, labels) if self._draws_images(vae, x) else None,
                tag="latents",
                global_step=self.config.train.epochs,
            )

    @contextmanager
    def _warning_of(self, picture: str) -> Iterator[None]:
        """Inside the block, a picture that cannot be drawn causes one warning and no error."""
        try:
            yield
        except (OSError, StoppedError):  # a full disk, Ctrl-C
            raise
        except Exception as error:
            if picture not in self._warned:
                _log.warning("figures: no %s (%s: %s)", picture, type(error).__name__, error)
            self._warned.add(picture)

    def finish(self, history: dict[str, list[Any]], facts: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json and the hparams, and close. A run without summary.json is unfinished.

        `history` is what `train` returned; `facts` are further entries: data hashes, device.
        """
        final = {
            name: values[-1]
            for name, values in history.items()
            if name.startswith(("train/", "test/"))
        }
        summary = {
            "final": final,
            "unit": "nats per image; elbo and reconstruction: higher is better",
            "better": {
                name: known.better
                for name in final
                if (known := metrics.get(name.rpartition("/")[2]))
            },
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
        self._write_hparams()
        self._writer.close()
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.run_dir / "summary.json", text.encode())
        return summary

    def close(self) -> None:
        """Close the files of a run that did not finish."""
        self._writer.close()

    def _add(self, summary: "Summary", step: int) -> None:
        self._writer._get_file_writer().add_summary(summary, step)

    def _write_hparams(self) -> None:
        """Write the settings only: TensorBoard then treats all scalars of the run as metrics.

        torch's `add_hparams` would also declare the parameters and metrics. TensorBoard takes those
        of the first run for all, and does not see which differ.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        known = {
            key: value
            for key, value in flatten(self.config.to_dict()).items()
            if isinstance(value, bool | int | float | str) and key not in INCIDENTAL
        }
        self._add(hparams_pb(known, trial_id=trial_name(self.run_dir)), 0)


def _other_end(labels: Tensor | None, count: int, *, same: bool) -> int | None:
    """The image that an interpolation from the first leads to: of the same or another class."""
    if labels is None:
        return 1 if count > 1 else None
    others = ((labels[1:] == labels[0]) == same).nonzero()
    return int(others[0]) + 1 if len(others) else None


@torch.no_grad()
def _has_kl_per_dim(vae: VAE, x: Tensor) -> bool:
    return vae.kl_per_dim(vae.encode(x[:1])) is not None


def _thumbnails(vae: VAE, x: Tensor, labels: Tensor | None) -> Tensor:
    """(N, 3, side, side) for the projector, which has a white page and no colours at first.

    Grey images are drawn as ink on white, in the colour of their class; colour images unchanged.
    """
    images = shrunk(pictures(vae, x), _THUMBNAIL)
    if images.ndim == 3:
        inks = torch.zeros(len(images), 3)
        if labels is not None:
            colours = torch.tensor([list(bytes.fromhex(c[1:])) for c in DIGIT_COLOURS]) / 255
            inks = colours[labels.cpu() % len(colours)]  # (N, 3)
        images = 1 - images[:, None] * (1 - inks[:, :, None, None])
    height, width = images.shape[-2:]
    left, top = max(height - width, 0) // 2, max(width - height, 0) // 2
    right, bottom = max(height - width, 0) - left, max(width - height, 0) - top
    # the projector needs squares
    return torch.nn.functional.pad(images, (left, right, top, bottom), value=1.0)


def _command(run_dir: Path) -> list[str]:
    """The command as typed; for a job of a sweep, the command of that job alone."""
    import yaml

    typed = ["python", *sys.orig_argv[1:]]
    try:
        hydra, overrides = (
            yaml.safe_load((run_dir / ".hydra" / f"{name}.yaml").read_text("utf-8"))
            for name in ("hydra", "overrides")
        )
        in_sweep = hydra["hydra"]["mode"] == "MULTIRUN"
        job = [str(override) for override in overrides]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return typed  # a run without Hydra
    # settings of the sweep: where its jobs run, and its folder
    own = [override for override in job if not override.startswith(("where=", "sweep.dir="))]
    return ["python", "scripts/train.py", *own] if in_sweep else typed


def trial_name(run_dir: Path) -> str:
    """The run's name in TensorBoard, overrides first, because long names are cut at the end.

    Of `outputs/<date>/<time>_<overrides>`: `<overrides> (outputs/<date>/<time>)`.
    """
    folder = run_dir.resolve()
    time, _, overrides = folder.name.partition("_")
    if re.fullmatch(r"\d\d-\d\d-\d\d", time):
        return f"{overrides or 'defaults'} ({folder.with_name(time)})"
    return f"{folder.name} ({folder.parent})"


def _image(tag: str, png: bytes, description: str) -> "Summary":
    """An image for TensorBoard: the bytes of the PNG file, with a description.

    torch's `add_image` would encode it again and has no description.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.image.metadata import create_summary_metadata

    width, height = (str(int.from_bytes(png[at : at + 4], "big")) for at in (16, 20))
    tensor = TensorProto(
        dtype="DT_STRING",
        string_val=[width.encode(), height.encode(), png],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=3)]),
    )
    about = create_summary_metadata(display_name="", description=description)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=about)])


def _text(tag: str, markdown: str) -> "Summary":
    """A text for TensorBoard under its own name: torch's `add_text` appends `/text_summary`."""
    from torch.utils.tensorboard.summary import text

    summary = text(tag, markdown)
    summary.value[0].tag = tag
    return summary


def add_evaluation(
    run_dir: Path, card: dict[str, Any], epoch: int, log_px_map: "Figure | None" = None
) -> None:
    """Add the evaluation card to a run's TensorBoard: figures as points, the card as text.

    A map of log p(x), if there is one, also goes to `figures/`.
    """
    from torch.utils.tensorboard import SummaryWriter

    rows = ["| figure | value | standard error | unit | definition |", "|---|---|---|---|---|"]
    with SummaryWriter(str(run_dir / "tensorboard"), filename_suffix=".evaluation") as writer:
        for name, entry in card.items():
            if isinstance(entry, dict) and isinstance(entry.get("value"), int | float):
                # not `evaluation`: its points would come before the curves, see _KL_DIMS
                writer.add_scalar(f"trained/{name}", entry["value"], epoch)
                cells = (entry["value"], entry["standard_error"], entry["unit"])
                rows.append(f"| {name} | {' | '.join(map(str, cells))} | {entry['definition']} |")
        verdict = "\n".join(f"- {sentence}" for sentence in card["verdict"])
        records = [_text("evaluation", "\n".join(rows) + f"\n\n{verdict}")]
        if log_px_map is not None:
            png = to_png(log_px_map)
            (run_dir / "figures").mkdir(exist_ok=True)  # somebody may have removed it
            write_atomically(run_dir / "figures" / "log_px.png", png)
            about = "Exact log p(x) of test images at their posterior means, and some posteriors."
            records.append(_image(f"{_VISUALS}/{len(_PICTURES) + 1}_log_px", png, about))
        for record in records:
            writer._get_file_writer().add_summary(record, epoch)


def _verbatim(text: str) -> str:
    """Markdown that shows any text unchanged: an indented block needs no end mark."""
    return "\n".join(f"    {line}" for line in text.splitlines())
