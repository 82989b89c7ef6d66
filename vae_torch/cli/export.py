"""`export.py`, `vae-torch export`: a run's release, a small folder to share."""

from collections.abc import Sequence

from vae_torch.cli.messages import refuse, shown, tell_interrupts
from vae_torch.cli.settings_line import parser, settings_of
from vae_torch.config import ConfigError, ExportConfig


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: settings, weights, folder."""
    tell_interrupts()
    line = parser(
        "export", "A run's release: weights, settings, model card; load_run reads it.", ExportConfig
    )
    config = settings_of(line.parse_args(arguments), ExportConfig)
    from vae_torch.checkpoint import CheckpointError
    from vae_torch.export import export_run

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
    except (ConfigError, CheckpointError) as error:
        line_of = str(error)
        refuse(
            line_of
            if line_of.startswith(("out=", "half=", "formats=", "explorer=", "releases"))
            else f"run={line_of}"
        )
    except OSError as error:
        refuse(f"out={config.out}: cannot be written ({error.strerror}); name another folder")
    print(shown(path.absolute()))
