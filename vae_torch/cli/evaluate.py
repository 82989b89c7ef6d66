"""`evaluate.py`, `vae-torch evaluate`: the evaluation card of a run.

Printed, written to evaluation.json, added to TensorBoard.
"""

import hashlib
import json
import re
import textwrap
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from vae_torch.cli.messages import leave_disk_errors_to_main, shown, tell_interrupts, told
from vae_torch.cli.settings_line import asked, open_run
from vae_torch.config import ConfigError, EvaluateConfig

_LONG = timedelta(minutes=10)  # an evaluation that calls for fewer images
_WIDTH = 100  # columns of the printed card
_LABEL = 24  # of them for the names

PER_IMAGE = "evaluation.npz"  # beside the card: the values per image
PARTIAL = "evaluation.npz.part"  # finished images of an unfinished evaluation

# Each figure in a few words; the card has the whole definitions.
_MEANINGS = {
    "elbo": "lower bound on log p(x)",
    "reconstruction": "E log p(x|z), z from q(z|x)",
    "kl": "KL(q(z|x) || p(z))",
    "residual": "rms of x - E[x|z], best sigma",
    "active_units": "latents that vary with the image",
    "train_elbo": "elbo of the training images",
    "entropy_floor": "highest possible reconstruction",
    "mutual_information": "I(x; z), a lower bound",
    "mutual_information_upper": "an upper bound on it",
    "marginal_kl": "KL(q(z) || p(z)), an upper bound",
    "marginal_kl_lower": "a lower bound on it",
    "train_log_px": "log p(x) of training images",
    "train_gap": "its distance from their elbo",
    "linear_probe_accuracy": "labels found from z, linearly",
    "knn_accuracy": "labels found by 10 neighbours",
    "log_px_exact": "log p(x) by integration",
    "log_px": "log p(x), fitted proposals",
    "bits_per_dim": "-log_px in bits, by pixel and channel",
    "log_px_encoder": "by {samples:,} samples from q(z|x)",
    "log_px_ais": "log p(x) by annealing",
    "ais_difference": "log_px_ais - log_px",
    "ais_width": "annealing's error on samples, at most",
    "effective_samples": "of {samples:,} per image",
    "interval_coverage": "z inside the encoder's 95%",
    "sample_auc": "samples told from test images",
    "nearest_train_image": "distance of samples to it",
    "fitted_gap": "gap of images drawn at random",
    "approximation_gap": "part due to the kind of q(z|x)",
    "amortisation_gap": "part due to the encoder",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, model, data, card."""
    tell_interrupts()
    about = "The evaluation card of a run, as evaluation.json too."
    config = asked("evaluate", about, EvaluateConfig, arguments)
    threading.excepthook = leave_disk_errors_to_main
    smaller = "use a smaller eval.chunk; what is computed is kept"
    with told(f"run={config.run}", "run it again once it can", smaller):
        evaluate_run(config)


def evaluate_run(config: EvaluateConfig) -> None:
    """Load a run, evaluate it on its test set, write the card."""
    import numpy as np

    from vae_torch.checkpoint import CheckpointError, load_checkpoint, refuse_other_data
    from vae_torch.data import data_hash, image_dataset, loaders_of
    from vae_torch.evaluate import evaluate_images
    from vae_torch.evaluation.partial import Partial
    from vae_torch.figures import log_px_map
    from vae_torch.files import replaced, write_atomically
    from vae_torch.release import is_release
    from vae_torch.runs.identity import code_hash, versions
    from vae_torch.runs.records import add_evaluation

    run_dir = Path(config.run)
    if is_release(run_dir):
        raise ConfigError(
            f"run={config.run}: is a release, and its evaluation card is sealed; measure it again "
            f"with reproduce.py verify {run_dir.name} pretrained={run_dir.parent}, or evaluate the "
            "run that it was made from"
        )
    vae, run_config, device = open_run(config, config.eval.checkpoint)
    # fits into a core's cache, or keeps a GPU busy and into its memory
    busy = max(1024, 65536 // vae.outputs) if device.type == "cuda" else 1024
    chunk = config.eval.chunk or busy
    if config.eval.exact and vae.latent_dim > 2:
        raise ConfigError(
            f"eval.exact=true: integration needs latent_dim 1 or 2, this run has {vae.latent_dim}; "
            "use eval.exact=null, log_px is importance sampling"
        )
    asked_images = config.eval.log_px_images
    if config.eval.ais and asked_images and config.eval.ais > asked_images:
        raise ConfigError(
            f"eval.ais={config.eval.ais}: annealing checks log_px, so at most "
            f"eval.log_px_images={asked_images}"
        )
    if config.data_root:
        run_config.data.root = config.data_root
    train_loader, test_loader = loaders_of(run_config, device)
    path = run_dir / "checkpoints" / f"{config.eval.checkpoint}.pt"
    hashes = {"train": data_hash(train_loader), "test": data_hash(test_loader)}
    state = load_checkpoint(path)
    epoch = state.get("epoch")
    if not isinstance(epoch, int):
        raise CheckpointError(f"{path}: does not record its epoch")
    refuse_other_data(path, state, hashes, run_config.data.root)
    if config.eval.limit:
        run_config.data.limit_test = config.eval.limit
        _, test_loader = loaders_of(run_config, device)
        hashes["test"] = data_hash(test_loader)
    test_set = image_dataset(test_loader)
    written = run_dir / "evaluation.json"
    integrates = vae.latent_dim <= 2 and config.eval.exact is not False
    instead = refuse_smaller(config, len(test_set), integrates)
    few = min(max(8, chunk // config.eval.num_samples), 256)
    one_class = vae.given(0) if vae.classes else vae
    estimated = min(asked_images or len(test_set), len(test_set))
    tell_duration(one_class, test_set.first(few)[0], estimated, config, chunk)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    samples = (config.eval.num_samples, config.eval.fit_samples, config.eval.seed)
    code = code_hash(("vae_torch.evaluation.card",))
    protocol = repr((sha256, hashes, samples, device.type, code, versions()))
    partial = Partial(run_dir / PARTIAL, protocol)
    if partial.begun:
        print("resuming an interrupted evaluation")
    card, per_image = evaluate_images(
        vae,
        test_loader,
        train_loader=train_loader,
        num_samples=config.eval.num_samples,
        fit_samples=config.eval.fit_samples,
        fit_images=config.eval.fit_images,
        log_px_images=asked_images,
        ais=config.eval.ais,
        chunk=chunk,
        exact=config.eval.exact,
        seed=config.eval.seed,
        progress=True,
        store=partial,
    )
    card["data"] = {
        "name": run_config.data.name,
        "binarize": run_config.data.binarize,
        "split": "held-out training" if run_config.data.hold_out else "test",
        "limit": config.eval.limit,
        "sha256": hashes["test"],
    }
    card["model"] = {
        "likelihood": run_config.likelihood,
        "levels": getattr(vae.likelihood, "levels", None),  # of discretized pixels
        "conditional": run_config.model.conditional,
    }
    card["checkpoint"] = {
        "name": config.eval.checkpoint,
        "epoch": epoch,
        "sha256": sha256,
    }
    print_card(card)
    arrays: Any = {name: each.cpu().numpy() for name, each in per_image.items()}
    with replaced(run_dir / PER_IMAGE) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)
    write_atomically(written, (json.dumps(card, indent=2) + "\n").encode())
    partial.remove()
    picture = None
    if vae.latent_dim == 2 and "log_px_exact" in per_image:
        x, labels = test_set.first(2000)
        picture = log_px_map(vae, x, per_image["log_px_exact"][: len(x)], labels)
    add_evaluation(run_dir, card, epoch, picture)
    print(f"\nwritten to {shown(written.resolve())}{instead}")


def refuse_smaller(config: EvaluateConfig, images: int, integrates: bool) -> str:
    """Refuse to replace a card of this checkpoint that has more images or samples, or an integral.

    Returns words about a card that will be replaced.
    """
    asked, path = config.eval, Path(config.run) / "evaluation.json"
    try:
        card = json.loads(path.read_text("utf-8"))
        name, sha256 = (card["checkpoint"][key] for key in ("name", "sha256"))
        fitted = "log_px_encoder" in card  # older cards have only one log_px
        encoder = card["log_px_encoder" if fitted else "log_px"]
        annealed = card.get("log_px_ais", {"num_images": 0})
        known = [  # name, its value in that card, and its value in the next
            ("images", encoder["num_images"], images),
            (
                "images with log_px",
                encoder.get("estimated_images", encoder["num_images"]),
                min(asked.log_px_images or images, images),
            ),
            ("importance samples", encoder["num_samples"], asked.num_samples),
            (
                "fitted images",
                card["approximation_gap"]["num_images"],
                min(asked.fit_images, images),
            ),
            ("annealed images", annealed["num_images"], min(asked.ais or 0, images)),
        ]
        if fitted:
            samples = card["log_px"]["num_samples"]
            known.append(("samples from fitted proposals", samples, asked.fit_samples))
        known = [(what, int(had), asks) for what, had, asks in known if int(had)]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError):
        return ", in place of a damaged one"
    checkpoint = path.parent / "checkpoints" / f"{name}.pt"
    have = hashlib.sha256(checkpoint.read_bytes()).hexdigest() if checkpoint.exists() else None
    listed = ", ".join(f"{had:,} {what}" for what, had, _ in known)
    words = f"a card of checkpoint {name}: {listed}"
    fewer = [f"{asks:,} {what}" for what, had, asks in known if asks < had]
    if "log_px_exact" in card and not integrates:
        fewer.append("no log_px_exact")
    if have == sha256 and fewer and not asked.overwrite:
        raise ConfigError(
            f"{path}: holds {words}; this one would have {', '.join(fewer)}; "
            "add eval.overwrite=true to replace it"
        )
    return f", in place of {words}"


def tell_duration(vae: Any, x: Any, images: int, config: EvaluateConfig, chunk: int) -> None:
    """Print the time that the longest part will take, estimated from a few images x (B, *shape)."""
    from vae_torch.evaluate import importance_log_px
    from vae_torch.evaluation.proposals import fits_noise_of

    samples = config.eval.num_samples
    took = 0.0
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        importance_log_px(vae, x, num_samples=samples, chunk=chunk).log_px.sum().item()
        took = time.perf_counter() - began
    left = timedelta(seconds=round(took * images / len(x)))
    few = " (eval.log_px_images=200 is quicker)" if left > _LONG and images > 200 else ""
    fits_noise = fits_noise_of(vae.encode(x[:1]))
    long = "several times as" if fits_noise else "about as"
    print(
        f"log p(x) of {images:,} images, {samples:,} samples each: about {left} (h:mm:ss), and "
        f"{long} long again from fitted proposals{few}",
        flush=True,
    )


def print_card(card: dict[str, Any]) -> None:
    """Print the card as a table, then its verdict, in lines of a hundred characters or less."""
    data, checkpoint = card["data"], card["checkpoint"]
    print(
        f"\n{data['name']}, {data['split']} images, binarize={data['binarize']}; "
        f"checkpoint {checkpoint['name']} of epoch {checkpoint['epoch']}\n"
    )
    for name, entry in card.items():
        if name == "kl_per_dim":
            dims = [f"{kl:9.3f}" for kl in sorted(entry["value"], reverse=True)]
            for start in range(0, len(dims), 7):
                print(f"{'' if start else name:{_LABEL}} {' '.join(dims[start : start + 7])}")
        elif isinstance(entry, dict) and "definition" in entry:
            print(_line(name, entry, card))
    print("\n± is the standard error over images; random seeds, binarisation and bias add to it")
    print()
    for sentence in card["verdict"]:
        print(_wrapped(sentence, "- ", "  "))


def _line(name: str, entry: dict[str, Any], card: dict[str, Any]) -> str:
    """One figure: value ± standard error, unit, number of images, meaning."""
    from vae_torch.evaluation.figures import name_of_log_px

    value, error = entry["value"], entry["standard_error"]
    number = f"{value:.3f}" if isinstance(value, float) else str(value)
    spread = f"± {error:.3f}" if error is not None else ""
    unit = entry["unit"].removesuffix(" dimensions")
    unit = re.sub(r"^(nats|bits|share) .*", r"\1", unit)
    images = entry["num_images"]
    count = f"{images:,} image{'s' if images > 1 else ''}"
    if "estimated_images" in entry:
        count = f"{entry['estimated_images']:,} / {images:,}"
    meaning = _MEANINGS.get(name, "").format(samples=entry["num_samples"]) or entry["definition"]
    conditional = card.get("model", {}).get("conditional", False)
    log_px = name_of_log_px(conditional=conditional, grey="entropy_floor" in card)
    meaning = meaning.replace("log p(x)", log_px)
    if name == "gap":
        meaning = "log_px_exact - elbo" if "log_px_exact" in card else "log_px - elbo"
    line = f"{name:{_LABEL}} {number:>9} {spread:8} {unit:7} {count:14} {meaning}"
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 3]}..."


def _wrapped(text: str, first: str, others: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=first, subsequent_indent=others)
