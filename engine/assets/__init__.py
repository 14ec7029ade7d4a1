"""Files that ship with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent

DEMO_TOKENIZER = _FOLDER / "demo_tokenizer.json"
"""Tokenizer of the warm start, trained on the captions of the scenes world, with one token for each word of that world.
It ships with the package, so that a change in how captions are written does not change what a token id means."""


def demo_model_path() -> Path:
    """Folder of the demo's warm start, a stock checkpoint.

    Raises:
        FileNotFoundError: this installation lacks the folder.
    """
    path = _FOLDER / "demo_model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo's warm start is missing at {path}: reinstall, or run `balcaprl warmstart {path}`"
        )
    return path
