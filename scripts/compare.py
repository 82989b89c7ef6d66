"""Two evaluated runs, image by image: paired differences and a picture.

python scripts/compare.py run=A run=B [metric=log_px] [out=comparison.png]
"""

import sys

try:
    from vae_torch.cli.compare import main
except ModuleNotFoundError as missing:
    print(f"compare.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
