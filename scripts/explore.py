"""One HTML page to walk through a run's latent space.

python scripts/explore.py DIR [--open]
"""

import sys

try:
    from vae_torch.cli.explore import main
except ModuleNotFoundError as missing:
    print(f"explore.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
