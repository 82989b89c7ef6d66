"""`encode.py`, `vae-torch encode`: latents, ELBO and log p(x) of images, as a file.

The file is written batch by batch, so images and results need not fit into memory.
"""

import csv
import importlib.util
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vae_torch.cli.messages import shown, tell_interrupts, told
from vae_torch.cli.settings_line import asked, open_run
from vae_torch.config import Config, ConfigError, DataConfig, EncodeConfig, validated
from vae_torch.files import replaced

if TYPE_CHECKING:
    import torch

    from vae_torch.data import ImageDataset
    from vae_torch.encode import Encoded
    from vae_torch.vae import VAE

_BATCH = 256  # images


class Source(NamedTuple):
    """Images to encode, with their file and class names."""

    images: "ImageDataset"
    files: Sequence[str] | None  # names, if they come from a folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, model, images, file."""
    tell_interrupts()
    about = "Latents, ELBO and log p(x) of images: run=DIR images=FOLDER out=latents.npz"
    config = asked("encode", about, EncodeConfig, arguments)
    with told(f"out={config.out}", smaller=f"use a chunk below {config.chunk}"):
        write = writer_of(config)  # fails before any work
        print(encode_run(config, write))


Writer = Callable[[Path, Iterator["Encoded"], Source], None]


def writer_of(config: EncodeConfig) -> Writer:
    """The function that writes files of this type; refuses unknown types."""
    if not config.out:
        raise ConfigError("out is missing: name the file to write, latents.npz")
    kind = Path(config.out).suffix.lower()
    writers: dict[str, Writer] = {
        ".npz": write_npz, ".csv": write_csv, ".parquet": write_parquet
    }  # fmt: skip
    if kind not in writers:
        raise ConfigError(f"out={config.out}: must end in {', '.join(writers)}")
    if kind == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(
            f"out={config.out}: needs pyarrow, which is not installed; pip install pyarrow, or "
            "write a .csv or .npz"
        )
    if config.reconstructions and kind != ".npz":
        raise ConfigError(
            f"reconstructions=true with out={config.out}: a table holds no images; write a .npz"
        )
    if not Path(config.out).absolute().parent.is_dir():
        raise ConfigError(f"out={config.out}: its folder does not exist; make it first")
    return writers[kind]


def encode_run(config: EncodeConfig, write: Writer) -> str:
    """Load a run, encode the images, write the file; return a line about it."""
    from vae_torch.data import image_dataset, image_loader, loaders_of
    from vae_torch.encode import encoded_batches

    vae, run_config, device = open_run(config, config.checkpoint)
    if config.images is None:
        if config.data_root:
            run_config.data.root = config.data_root
        run_config.data.augment = "none"  # images unchanged and in order
        own = dict(zip(("train", "test"), loaders_of(run_config, device), strict=True))
        source = Source(image_dataset(own[config.split]), None)
    else:
        source = other_images(config, run_config, vae, device)
    if vae.classes and source.images.labels is None:
        raise ConfigError(
            f"images={config.images}: have no labels, which the run's model needs "
            "(model.conditional=true); put them into a folder for each class"
        )
    batches = encoded_batches(
        vae,
        image_loader(source.images, _BATCH),
        num_samples=config.num_samples,
        chunk=config.chunk,
        seed=config.seed,
        reconstructions=config.reconstructions,
        progress=True,
    )
    elbo = log_px = 0.0

    def summed() -> "Iterator[Encoded]":
        nonlocal elbo, log_px
        for found in batches:
            elbo += found.elbo.sum().item()
            log_px += found.log_px.sum().item()
            yield found

    out = Path(str(config.out))
    write(out, summed(), source)
    n = len(source.images)
    means = f"elbo {elbo / n:.2f}, log p(x) {log_px / n:.2f}"
    count = f"{n:,} image{'' if n == 1 else 's'}"
    return f"{shown(out.absolute())}: {count}, in the mean {means} nats"


def other_images(
    config: EncodeConfig, run_config: Config, vae: "VAE", device: "torch.device"
) -> Source:
    """The images of a folder or a file, in the form that the run's model takes."""
    from vae_torch.data import ImageDataset, binarize_images
    from vae_torch.data.folder import image_files
    from vae_torch.data.table import load_source
    from vae_torch.images import check_shape
    from vae_torch.parts.networks import image_shape
    from vae_torch.seeds import STATIC_TEST

    root = Path(str(config.images))
    settings: dict[str, Any] = {
        "root": str(root),
        "batch_size": _BATCH,
        "binarize": "none",
        "hold_out": 0,
    }
    if root.is_dir():
        shape = image_shape(vae.input_shape)
        if len(shape) != 3:
            raise ConfigError(
                f"images={root}: a folder of images, but this model takes vectors of "
                f"{shape[0]} values; give a .npy or .npz"
            )
        settings |= {"name": "folder", "size": list(shape[1:]), "channels": shape[0]}
        if run_config.data.background is not None:
            settings["background"] = run_config.data.background
    elif root.suffix in (".npy", ".npz") and root.is_file():
        layout = {"layout": run_config.data.options.get("layout", "auto")}
        settings |= {"name": "array", "options": layout if run_config.data.name == "array" else {}}
    else:
        raise ConfigError(f"images={root}: must be a folder of images, or a .npz or .npy file")
    found = load_source(validated(DataConfig, settings))
    tested = found.test is not None and config.split == "test"
    images, labels = found.test if found.test is not None and tested else found.train
    try:
        check_shape(images, vae.input_shape)
    except ValueError as error:
        raise ConfigError(f"images={root}: {error}") from None
    if run_config.data.binarize != "none":  # like the run's own test images
        images = binarize_images(images, salt=STATIC_TEST)
    classes = found.classes
    if vae.classes and classes and labels is not None:
        labels, classes = as_the_run_numbers(labels, classes, config, run_config, vae.classes)
    flat = len(vae.input_shape) == 1
    dataset = ImageDataset(images, labels, flat=flat, classes=classes, device=device)
    files = image_files(root)[1 if tested else 0] if root.is_dir() else None
    return Source(dataset, files)


def as_the_run_numbers(
    labels: Any, names: Sequence[str], config: EncodeConfig, run_config: Config, count: int
) -> tuple[Any, Sequence[str]]:
    """Labels in the numbers of the run's classes, and these: a folder may lack some of them."""
    import torch

    from vae_torch.data import image_dataset, loaders_of

    if config.data_root:
        run_config.data.root = config.data_root
    known = image_dataset(loaders_of(run_config, "cpu")[0]).classes
    known = known or [str(number) for number in range(count)]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"images={config.images}: class {name} is not in the run, whose classes are "
                f"{', '.join(known)}"
            )
    return torch.tensor([known.index(name) for name in names])[labels.long()], known


def write_npz(path: Path, batches: "Iterator[Encoded]", source: Source) -> None:
    """Write `mean`, `logvar`, `elbo`, `log_px`, `labels`, `reconstruction`; `classes`, `files`."""
    import numpy as np

    count, done = len(source.images), 0
    names = {"classes": source.images.classes, "files": source.files}
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".encode-") as scratch:
        arrays: dict[str, np.ndarray] = {}
        for found in batches:
            for name, value in found._asdict().items():
                if value is None:
                    continue
                rows = value.numpy()
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        f"{scratch}/{name}.npy", "w+", rows.dtype, (count, *rows.shape[1:])
                    )
                arrays[name][done : done + len(rows)] = rows
            done += len(found.mean)
        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        for name, words in names.items():
            if words is not None:
                np.save(f"{scratch}/{name}.npy", np.array(list(words)))
        with replaced(path.absolute()) as part, zipfile.ZipFile(part, "w") as archive:
            for file in sorted(Path(scratch).iterdir()):
                archive.write(file, file.name)


def write_csv(path: Path, batches: "Iterator[Encoded]", source: Source) -> None:
    """Write a line for each image, below a line with column names."""
    with replaced(path.absolute()) as part, part.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        header: list[str] = []
        for columns in tables(batches, source):
            if not header:
                header = list(columns)
                lines.writerow(header)
            lines.writerows(zip(*columns.values(), strict=True))


def write_parquet(path: Path, batches: "Iterator[Encoded]", source: Source) -> None:
    """Write the table of `write_csv`, with a row group per batch."""
    arrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    with replaced(path.absolute()) as part:
        opened = None
        for columns in tables(batches, source):
            table = arrow.table(columns)
            opened = opened or parquet.ParquetWriter(part, table.schema)
            opened.write_table(table)
        if opened:
            opened.close()


def tables(batches: "Iterator[Encoded]", source: Source) -> Iterator[dict[str, list[Any]]]:
    """The columns of each batch, by name."""
    done, classes = 0, source.images.classes
    for found in batches:
        end = done + len(found.mean)
        columns: dict[str, list[Any]] = {"image": list(range(done, end))}
        if source.files is not None:
            columns["file"] = list(source.files[done:end])
        if found.labels is not None:
            columns["label"] = found.labels.tolist()
            if classes is not None:
                columns["class"] = [classes[label] for label in columns["label"]]
        columns |= {"elbo": found.elbo.tolist(), "log_px": found.log_px.tolist()}
        for name, value in (("mean", found.mean), ("logvar", found.logvar)):
            if value is not None:
                for dim, column in enumerate(value.T.tolist(), 1):
                    columns[f"{name}_{dim}"] = column
        yield columns
        done = end
