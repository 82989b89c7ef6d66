"""One HTML page to walk through a run's latent space, written to explorer.html in its folder.

python scripts/explore.py run=DIR [--open]
"""

import sys
import webbrowser
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from _common import (
    quote_paths,
    refuse,
    refuse_broken_files,
    resolve_device,
    set_products,
    shown,
    tell_interrupts,
    tune_cpu,
    typed,
)
from vae_torch.config import ConfigError, ExploreConfig, check_explore

ConfigStore.instance().store(name="schema_explore", node=ExploreConfig)

_OPEN = "--open" in sys.argv  # no override: Hydra would refuse it
sys.argv[:] = [argument for argument in sys.argv if argument != "--open"]


def main(cfg: DictConfig) -> None:
    """Settings, model, data, page."""
    from vae_torch.checkpoint import CheckpointError
    from vae_torch.explorer import ExplorerError

    try:
        if OmegaConf.is_missing(cfg, "run"):
            raise ConfigError("run is missing: name a run folder, run=outputs/<date>/<time>")
        config = typed(cfg, ExploreConfig)
        check_explore(config)
        path = explore_run(config)
    except ExplorerError as error:
        refuse(f"run={cfg.run}: {error}")
    except (ConfigError, CheckpointError) as error:
        refuse(str(error))
    print(shown(path))
    if not _OPEN:
        print(f"open it in a browser: {path.as_uri()}")
    elif not webbrowser.open(path.as_uri()):
        print(f"no browser was found here; open {path.as_uri()} yourself", file=sys.stderr)


def explore_run(config: ExploreConfig) -> Path:
    """Write the page of a run, without points where its images cannot be had."""
    from vae_torch.checkpoint import load_run, write_atomically
    from vae_torch.data import DataError, image_dataset, loaders_of
    from vae_torch.explorer import explorer_page, run_facts, run_notes

    tune_cpu(None)
    device = resolve_device(config.device)
    set_products("fp32", device)
    run_dir = Path(config.run).resolve()
    vae, run_config = load_run(config.run, checkpoint=config.checkpoint, device=device)
    notes, epochs = run_notes(run_dir, run_config)
    if config.data_root:
        run_config.data.root = config.data_root
    x = labels = None
    try:
        test_set = image_dataset(loaders_of(run_config, device)[1])
        x, labels = test_set.first(len(test_set))
    except DataError as error:
        print(f"no points: {error}", file=sys.stderr)
        notes.append(
            f"The images of {run_config.data.name} were not to be had from disk when this page was "
            "written, so no points are shown. Everything else works. Write the page again with "
            "data_root=FOLDER to see them."
        )
    page = explorer_page(
        vae,
        x,
        labels,
        title="/".join(run_dir.parts[-2:]),
        facts=run_facts(run_config, epochs),
        notes=notes,
        data_name=run_config.data.name,
        points=config.points,
    )
    path = run_dir / "explorer.html"
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise ConfigError(f"run={config.run}: cannot be written ({error.strerror})") from None
    return path


if __name__ == "__main__":
    tell_interrupts()
    refuse_broken_files()
    quote_paths("run", "data_root")
    hydra.main(version_base="1.3", config_path="../conf", config_name="explore")(main)()
