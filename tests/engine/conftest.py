"""Fixtures that several test folders share."""

import json
from pathlib import Path

import pytest

CAPTIONS = Path(__file__).parents[1] / "data" / "photographs.json"


def find_photograph(name: str) -> Path:
    """A photograph that ships inside scikit-image or scikit-learn: nothing is downloaded."""
    import skimage
    import sklearn

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    return next(path for folder in folders for path in sorted(folder.glob(f"{name}.*")))


@pytest.fixture(scope="session")
def photograph_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten real photographs with captions as a ShareGPT4V data set: (path of the JSON file, image folder)."""
    root = tmp_path_factory.mktemp("photographs")
    records = []
    for name, caption in json.loads(CAPTIONS.read_text()).items():
        source = find_photograph(name)
        image = root / "images" / source.name
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(source.read_bytes())
        question = "What do you see in this picture?\n<image>"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
        records.append({"id": name, "image": f"images/{source.name}", "conversations": turns})
    path = root / "captions.json"
    path.write_text(json.dumps(records))
    return path, root
