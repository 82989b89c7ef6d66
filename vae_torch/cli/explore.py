"""`explore.py`, `vae-torch explore`: one page to walk through a run's latent space.

Written to explorer.html in the run's folder.
"""

import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from vae_torch.cli.messages import refuse, shown, tell_interrupts, told
from vae_torch.cli.settings_line import open_run, parser, settings_of
from vae_torch.config import ExploreConfig, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, model, data, page."""
    tell_interrupts()
    line = parser(
        "explore",
        "A page to walk through a run's latent space, in one file: DIR/explorer.html.",
        ExploreConfig,
    )
    line.add_argument("--open", action="store_true", help="open the page in a browser")
    options = line.parse_args(arguments)
    config = settings_of(options, ExploreConfig)
    from vae_torch.explorer import ExplorerError

    try:
        path = explore_run(config)
    except ExplorerError as error:
        refuse(f"run={config.run}: {error}")
    except UserError as error:
        refuse(str(error))
    print(shown(path))
    if not options.open:
        print(f"open it in a browser: {path.as_uri()}")
    elif not webbrowser.open(path.as_uri()):
        print(f"no browser was found here; open {path.as_uri()} yourself", file=sys.stderr)


def explore_run(config: ExploreConfig) -> Path:
    """Write the page of a run; without points if its images are not available."""
    from vae_torch.data import DataError, image_dataset, loaders_of
    from vae_torch.explorer import explorer_page, run_facts, run_notes
    from vae_torch.files import write_atomically

    vae, run_config, device = open_run(config, config.checkpoint)
    run_dir = Path(config.run).resolve()
    notes, epochs = run_notes(run_dir, run_config)
    if config.data_root:
        run_config.data.root = config.data_root
    x = labels = names = available = None
    try:
        test_set = image_dataset(loaders_of(run_config, device)[1])
        x, labels = test_set.first(config.points)
        names, available = test_set.classes, len(test_set)
    except DataError as error:
        print(f"no points: {error}", file=sys.stderr)
        notes.append(
            f"The images of {run_config.data.name} were not available when the page was made, "
            "so no points are shown. Everything else works. To see points, make the page again "
            "with data_root=FOLDER."
        )
    page = explorer_page(
        vae,
        x,
        labels,
        title="/".join(run_dir.parts[-2:]),
        facts=run_facts(run_config, epochs),
        notes=notes,
        data_name=run_config.data.name,
        class_names=names,
        available=available,
        points=config.points,
    )
    path = run_dir / "explorer.html"
    with told(f"run={config.run}", "run it again once it can"):
        write_atomically(path, page.encode())
    return path
