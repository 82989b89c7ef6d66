"""The evaluation card of a run: printed, and written to evaluation.json.

python scripts/evaluate.py DIR [eval.num_samples=5000 ...]
"""

import sys

try:
    from vae_torch.cli.evaluate import main
except ModuleNotFoundError as missing:
    print(f"evaluate.py: {missing}: source .venv/bin/activate, or make install", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
