"""`export.py`, `vae-torch export`: a run's release, a small folder to share."""

from collections.abc import Sequence

from vae_torch.cli.messages import refuse, shown, tell_interrupts, told
from vae_torch.cli.settings_line import asked
from vae_torch.config import ExportConfig, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, weights, folder."""
    tell_interrupts()
    about = "A run's release: weights, settings, model card; load_run reads it."
    config = asked("export", about, ExportConfig, arguments)
    from vae_torch.export import export_run

    with told(f"out={config.out}", "name another file"):
        try:
            path = export_run(
                config.run,
                config.out,
                checkpoint=config.checkpoint,
                half=config.half,
                formats=config.formats,
                explorer=config.explorer,
                plugins=config.plugins,
            )
        except UserError as error:
            line = str(error)
            known = ("out=", "half=", "formats=", "explorer=", "releases")
            refuse(line if line.startswith(known) else f"run={line}")
    print(shown(path.absolute()))
