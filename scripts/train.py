"""Train a VAE: one run, or with -m a sweep.

python scripts/train.py [key=value ...]
"""

import sys

try:
    from vae_torch.cli.train import main
except ModuleNotFoundError as missing:
    print(f"train.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
