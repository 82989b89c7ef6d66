"""Images from a run's model.

python scripts/sample.py DIR [n=64 out=grid.png temperature=1.0 pixels=mean]
"""

import sys

try:
    from vae_torch.cli.sample import main
except ModuleNotFoundError as missing:
    print(f"sample.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
