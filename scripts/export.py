"""A run's release: weights, settings and model card in a small folder to share.

python scripts/export.py DIR out=RELEASE
"""

import sys

try:
    from vae_torch.cli.export import main
except ModuleNotFoundError as missing:
    print(f"export.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
