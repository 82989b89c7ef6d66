"""`evaluate.py`, `vae-torch evaluate`: the evaluation card of a run.

Printed, written to evaluation.json, added to TensorBoard.
"""

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_torch.cli.line import parser, settings_of
from vae_torch.cli.messages import leave_disk_errors_to_main, refuse, shown, tell_interrupts
from vae_torch.config import ConfigError, EvaluateConfig

_NOT_PRINTED = ("kl_per_dim", "verdict", "data", "checkpoint")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, model, data, card."""
    tell_interrupts()
    line = parser(
        "evaluate", "The evaluation card of a run, as evaluation.json too.", EvaluateConfig
    )
    config = settings_of(line.parse_args(arguments), EvaluateConfig)
    from vae_torch.checkpoint import CheckpointError
    from vae_torch.data import DataError

    threading.excepthook = leave_disk_errors_to_main
    try:
        evaluate_run(config)
    except (ConfigError, CheckpointError, DataError) as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"run={config.run}: cannot be written ({error.strerror}); run it again once it can")


def evaluate_run(config: EvaluateConfig) -> None:
    """Load a run, evaluate it on its own test set, write the card."""
    import torch

    from vae_torch.checkpoint import (
        CheckpointError,
        load_checkpoint,
        load_run,
        refuse_other_data,
        write_atomically,
    )
    from vae_torch.data import data_hash, image_dataset, loaders_of
    from vae_torch.evaluate import evaluate_model
    from vae_torch.figures import log_px_map
    from vae_torch.machine import resolve_device, set_products, tune_cpu
    from vae_torch.quadrature import exact_log_px
    from vae_torch.runlog import add_evaluation

    tune_cpu(None)
    device = resolve_device(config.device)
    set_products("fp32", device)
    run_dir = Path(config.run)
    vae, run_config = load_run(run_dir, checkpoint=config.eval.checkpoint, device=device)
    vae = vae.to(memory_format=torch.channels_last)  # convolutions decode a third faster
    if config.eval.exact and vae.latent_dim > 2:
        raise ConfigError(
            f"eval.exact=true: integration needs latent_dim 1 or 2, this run has {vae.latent_dim}; "
            "use eval.exact=null, log_px is importance sampling"
        )
    if config.data_root:
        run_config.data.root = config.data_root
    train_loader, test_loader = loaders_of(run_config, device)
    path = run_dir / "checkpoints" / f"{config.eval.checkpoint}.pt"
    hashes = {"train": data_hash(train_loader), "test": data_hash(test_loader)}
    state = load_checkpoint(path)
    epoch = state.get("epoch")
    if not isinstance(epoch, int):
        raise CheckpointError(f"{path}: does not say of which epoch it is")
    refuse_other_data(path, state, hashes, run_config.data.root)
    if config.eval.limit:
        run_config.data.limit_test = config.eval.limit
        _, test_loader = loaders_of(run_config, device)
        hashes["test"] = data_hash(test_loader)
    card = evaluate_model(
        vae,
        test_loader,
        train_loader=train_loader,
        num_samples=config.eval.num_samples,
        fit_images=config.eval.fit_images,
        chunk=config.eval.chunk,
        exact=config.eval.exact,
        seed=config.eval.seed,
        progress=True,
    )
    card["data"] = {
        "name": run_config.data.name,
        "binarize": run_config.data.binarize,
        "split": "held-out training" if run_config.data.hold_out else "test",
        "limit": config.eval.limit,
        "sha256": hashes["test"],
    }
    card["checkpoint"] = {
        "name": config.eval.checkpoint,
        "epoch": epoch,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    print_card(card)
    written = run_dir / "evaluation.json"
    write_atomically(written, (json.dumps(card, indent=2) + "\n").encode())
    picture = None
    if vae.latent_dim == 2 and config.eval.exact is not False:
        x, _ = image_dataset(test_loader).first(2000)
        picture = log_px_map(vae, x, exact_log_px(vae, x).log_px)
    add_evaluation(run_dir, card, epoch, picture)
    print(f"\nwritten to {shown(written.resolve())}")


def print_card(card: dict[str, Any]) -> None:
    """The card as a table, then its verdict."""
    data = card["data"]
    print(f"{data['name']}, {data['split']} images, binarize={data['binarize']}\n")
    for name, entry in card.items():
        if name in _NOT_PRINTED:
            continue
        error = entry["standard_error"]
        value = f"{entry['value']:10.3f}" if isinstance(entry["value"], float) else entry["value"]
        spread = f"± {error:.3f}" if error is not None else ""
        unit = "nats" if entry["unit"] == "nats per image" else entry["unit"]
        print(f"{name:22}{value:>10} {spread:9} {unit:18}  {entry['definition']}")
    if "kl_per_dim" in card:
        dims = sorted(card["kl_per_dim"]["value"], reverse=True)
        listed = " ".join(f"{kl:.2f}" for kl in dims[:20]) + (" ..." if len(dims) > 20 else "")
        print(f"{'kl_per_dim':22}{listed}")
    print()
    for sentence in card["verdict"]:
        print(f"- {sentence}")
