"""Files that ship with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent


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
