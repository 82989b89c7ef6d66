"""One table of many runs: which setting won, by how much, and whether that is more than luck.

python scripts/summarize.py DIR [--metric log_px] [--group-by KEY ...] [--where KEY=VALUE ...]
"""

import sys

try:
    from vae_torch.cli.summarize import main
except ModuleNotFoundError as missing:
    print(f"summarize.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
