"""Models on the Hugging Face Hub, by its library, which is imported where it is used."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE = "model.safetensors"
"""A model's file in its repository."""

PATTERNS = [f"{folder}{name}" for folder in ("", "unet/", "scheduler/") for name in ("*.json", "*.safetensors")]
"""The patterns of the files to download: descriptions and tensors, no code and no pickles."""


def pull(name: str, revision: str | None = None) -> Path:
    """Download a repository's model; returns its folder."""
    return Path(_library().snapshot_download(name, revision=revision, allow_patterns=PATTERNS))


def push(name: str, write: Callable[[Path], Any], private: bool = False) -> str:
    """Upload what ``write(path)`` writes as the model of the repository ``name``; returns its address."""
    api = _library().HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / FILE)
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="A model of diffkern")
    return str(address)


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            "expected huggingface_hub for models on the Hub, got none: pip install huggingface_hub"
        ) from None
    return huggingface_hub
