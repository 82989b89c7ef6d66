"""Writes a release: what another person needs of a run, and no more.

    model.safetensors   the weights, without the optimiser
    config.json         settings, shape of the images, hashes of the data, versions
    README.md           the model card
    encoder.onnx, ...   encoder and decoder in other formats, on request
    explorer.html       the page to walk through the latent space, on request
    evaluation.json     the evaluation card, where the run has one of these weights
    SHA256SUMS          of the files above, but for README.md; `sha256sum -c` reads it

The first two have the names that the Hugging Face Hub expects. Nothing in a release is unpickled.
"""

import json
import math
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vae_torch.checkpoint import load_checkpoint
from vae_torch.config import Config, ConfigError
from vae_torch.deploy import SUFFIXES, portable_files
from vae_torch.release import CARD, SETTINGS, SUMS, WEIGHTS, safetensors_torch, sha256_of
from vae_torch.stored import load_run, stored_model

# Number of test images whose exact log p(x) a reader can check in seconds.
FIRST = 500


def export_run(
    run_dir: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "last",
    half: bool = False,
    formats: Sequence[str] = (),
    explorer: bool = False,
    plugins: Sequence[str] = (),
) -> Path:
    """Write a run's release. Needs the extra `hub`.

    Args:
        run_dir: The run's folder.
        out: The release's folder; made here, so it must be absent or empty.
        checkpoint: `last`, or `best`.
        half: Store the weights as 16-bit floats; `load_run` converts them back to 32-bit.
        formats: Add encoder and decoder as `onnx` or `torchscript`: see `vae_torch.deploy`.
        explorer: Add the page that `scripts/explore.py` has written in the run's folder.
        plugins: With formats: modules with parts of your own that the run has.

    Returns:
        The folder.

    Raises:
        CheckpointError: Not a run folder, no checkpoint in it, or a damaged one.
        ConfigError: `out` is not empty, a weight is too large for 16 bits, a format is not
            available, there is no page, or safetensors is not installed.
        OSError: `out` cannot be written.
    """
    safetensors = safetensors_torch()
    run_dir, out = Path(run_dir), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is not empty; name a new folder")
    stored = stored_model(run_dir, checkpoint)
    state = load_checkpoint(stored.path)
    kept = {name: weight.contiguous() for name, weight in stored.weights.items()}
    if half:
        kept = {name: w.half() if w.is_floating_point() else w for name, w in kept.items()}
        if large := [name for name, weight in kept.items() if weight.isinf().any()]:
            raise ConfigError(f"half=true: {large[0]} has weights above 65504; use half=false")
    weights = safetensors.save(kept, metadata={"format": "pt"})
    settings = {
        "library": "vae_torch",
        "config": _without_folders(stored.config),
        "input_shape": list(stored.input_shape),
        "classes": stored.classes,
        "checkpoint": checkpoint,
        "epoch": stored.epoch,
        "source_sha256": stored.sha256,
        "data_sha256": state.get("data_sha256"),
        "versions": state.get("versions"),
        "own_parts": list(stored.own_parts),
        "test_loss": _test_loss(run_dir) if checkpoint == "last" else None,
    }
    card = _card_of(run_dir, stored.path)
    files = {WEIGHTS: weights, SETTINGS: _json(settings)}
    if card:
        files[CARD] = _json(card)
    if formats:
        vae, _ = load_run(run_dir, checkpoint=checkpoint, plugins=plugins)
        files |= portable_files(vae, formats)
    if explorer:
        page = run_dir / "explorer.html"
        if not page.exists():
            raise ConfigError(f"explorer=true: {page} is absent; write it with scripts/explore.py")
        files[page.name] = page.read_bytes()
    sums = "".join(f"{sha256_of(content)}  {name}\n" for name, content in files.items())
    files[SUMS] = sums.encode()
    files["README.md"] = _model_card(stored.config, settings, card, formats).encode()
    scratch = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    scratch.mkdir(parents=True)
    try:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        if out.exists():
            out.rmdir()
        Path(scratch).replace(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return out


def _without_folders(config: Config) -> dict[str, Any]:
    """Settings without the folders of the machine that made the run."""
    values = config.to_dict()
    values["data"]["root"] = "data"
    values["train"]["resume"] = values["train"]["init_from"] = None
    values["train"]["init_checkpoint"] = "last"
    return values


def _card_of(run_dir: Path, checkpoint: Path) -> dict[str, Any] | None:
    """The run's evaluation card, if it is of these very weights."""
    try:
        card: dict[str, Any] = json.loads((run_dir / CARD).read_text("utf-8"))
        if card["checkpoint"]["sha256"] != sha256_of(checkpoint.read_bytes()):
            return None
        if exact := card.get("log_px_exact"):
            with np.load(run_dir / "evaluation.npz") as each:
                first = each["log_px_exact"][:FIRST]
            exact["first"] = {"num_images": len(first), "value": float(first.mean())}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return card


def _test_loss(run_dir: Path) -> float | None:
    """The test loss of the run's last epoch; the objective need not be the card's elbo."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text("utf-8"))
        return float(summary["final"]["test/loss"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _model_card(
    config: Config, settings: dict[str, Any], card: dict[str, Any] | None, formats: Sequence[str]
) -> str:
    """Markdown: what it is, its data, its figures, how to load it."""
    shape = " x ".join(map(str, settings["input_shape"]))
    hashes = settings["data_sha256"] or {}
    data = "".join(f"- {split}: SHA-256 `{sha256}`\n" for split, sha256 in hashes.items())
    plugins = ""
    arguments = '"path/to/this/folder"'
    if config.plugins:
        listed = ", ".join(f'"{name}"' for name in config.plugins)
        arguments += f", plugins=[{listed}]"
        plugins = (
            f"\nIt has parts that are not in `vae_torch`: it loads only where {listed} can be "
            "imported.\n"
        )
    given = ""
    if settings["classes"]:
        given = ", y=0"
        plugins += (
            f"\nIt is conditional: it sees the label of an image, 0 to {settings['classes'] - 1}.\n"
        )
    figures = "It has not been evaluated: `scripts/evaluate.py` measures it.\n"
    if card:
        rows = "".join(
            f"| `{name}` | {_figure(entry)} | {_images(entry)} | "
            + entry["definition"].replace("|", r"\|")
            + " |\n"
            for name, entry in card.items()
            if isinstance(entry, dict) and isinstance(entry.get("value"), int | float)
        )
        figures = (
            f"| figure | value | images | what it is |\n|---|---|---|---|\n{rows}\n"
            "± is the standard error over images.\n"
        )
    portable = ""
    for kind in formats:
        portable += (
            f"\nFor {kind}: `encoder{SUFFIXES[kind]}` turns images (B, {shape.replace(' x', ',')}) "
            f"in [0, 1] into mean and log-variance of q(z|x); `decoder{SUFFIXES[kind]}` turns z "
            f"(B, {config.model.latent_dim}) into expected pixels.\n"
        )
    return f"""---
library_name: vae_torch
tags: [vae, pytorch]
---

# A variational autoencoder of {config.data.name}

A `{config.model.name}` network with {config.model.latent_dim} latent dimensions and images of
shape {shape}: likelihood `{config.likelihood}`, prior `{config.prior}`, posterior
`{config.posterior}`, objective `{config.objective.name}`, {settings["epoch"]} epochs, seed
{config.seed}. `config.json` holds every setting.
{plugins}
## Data

`{config.data.name}`, binarize `{config.data.binarize}`.

{data}
## Figures

{figures}
## How to load it

```python
from vae_torch import load_run

vae, config = load_run({arguments})
images = vae.sample(16{given})
```
{portable}"""


def _figure(entry: dict[str, Any]) -> str:
    """`-149.85 ± 0.51 nats per image`, with two digits of the error."""
    value, error = entry["value"], entry.get("standard_error")
    if not error:
        return f"{value} {entry['unit']}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f} {entry['unit']}"


def _images(entry: dict[str, Any]) -> str:
    """`10,000`, or `200 of 10,000` where only some were estimated."""
    some = f"{entry['estimated_images']:,} of " if "estimated_images" in entry else ""
    return f"{some}{entry['num_images']:,}"


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
