"""Releases on the Hugging Face Hub; needs the extra `hub`, and an account to push.

HubRelease("release").push_to_hub("me/my-vae")
vae, config = load_run(HubRelease.from_pretrained("me/my-vae").folder)
"""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download


class HubRelease(ModelHubMixin, library_name="vae_torch", tags=["vae", "pytorch"]):
    """A release's folder with the Hub's `save_pretrained`, `from_pretrained` and `push_to_hub`.

    Args:
        folder: What `scripts/export.py` has written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,  # part of the superclass's contract; unused here
    ) -> "HubRelease":
        del model_kwargs
        if Path(model_id).is_dir():
            return cls(model_id)
        return cls(
            snapshot_download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        )
