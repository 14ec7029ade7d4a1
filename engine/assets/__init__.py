"""Files that ship with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent

DEMO_TOKENIZER = _FOLDER / "demo_tokenizer.json"
"""The warm start's vocabulary: every word of the scenes world as one token, trained on its captions. It ships, so that
changing how captions are written does not change what a token id means."""


def demo_model_path() -> Path:
    """The demo's warm start, a stock checkpoint folder.

    Raises:
        FileNotFoundError: if this installation lacks it.
    """
    path = _FOLDER / "demo_model"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the demo's warm start is missing at {path}: reinstall, or run `balcaprl warmstart {path}`"
        )
    return path
