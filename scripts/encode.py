"""Latents, ELBO and log p(x) of images under a run's model, as a file.

python scripts/encode.py run=DIR images=FOLDER out=latents.npz
"""

import sys

try:
    from vae_torch.cli.encode import main
except ModuleNotFoundError as missing:
    print(f"encode.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
