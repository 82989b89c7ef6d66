"""`train.py`, `vae-torch train`: one run, or a sweep with -m.

Help and wrong keys are handled here; the rest is in `job.py`.
"""

import sys

from vae_torch.cli.early import refuse_malformed, refuse_unknown
from vae_torch.cli.messages import refuse, tell_interrupts
from vae_torch.config import Config, ConfigError

_FILES = ("--config", "-c", "hydra.searchpath=")  # these name settings files of the user


def main() -> None:
    """The command: reads `sys.argv`, as Hydra does."""
    tell_interrupts()
    typed = sys.argv[1:]
    try:
        refuse_malformed(typed)
        if not any(argument.startswith(_FILES) for argument in typed):  # they may bring groups
            refuse_unknown(typed, Config)
    except ConfigError as error:
        refuse(str(error))
    if {"-h", "--help"} & set(typed) and not any("plugins=" in argument for argument in typed):
        from vae_torch.cli.help import train_help

        print(train_help({}), end="")
    else:
        from vae_torch.cli.job import start

        start(typed)
