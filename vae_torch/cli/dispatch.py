"""`vae-torch COMMAND ...`: the commands of an installed package without its checkout."""

import importlib
import sys

COMMANDS = {
    "train": "one run, or with -m a sweep",
    "evaluate": "how good a run is: the evaluation card",
    "encode": "latents, ELBO and log p(x) of images, as a file",
    "explore": "a page to walk through a run's latent space",
    "sample": "images from a run's model",
    "export": "a run's release, a small folder to share",
    "summarize": "one table of many runs",
    "compare": "two evaluated runs, image by image",
}


def main() -> None:
    """Pass the rest of the line to a command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        wrong = name not in ("-h", "--help")
        listed = "\n".join(f"  {command:10} {words}" for command, words in COMMANDS.items())
        text = f"usage: vae-torch COMMAND ...\n\n{listed}\n\nvae-torch COMMAND --help says more"
        if wrong:
            text = f"vae-torch: {name}: must be one of {', '.join(COMMANDS)}"
        print(text, file=sys.stderr if wrong else sys.stdout)
        raise SystemExit(2 if wrong else 0)
    sys.argv[:2] = [f"{sys.argv[0]} {name}"]
    importlib.import_module(f"vae_torch.cli.{name}").main()
