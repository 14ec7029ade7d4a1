from pathlib import Path

import pytest
from PIL import Image

from balcaprl.reporting.eval_images import eval_image_path, save_eval_image


@pytest.mark.parametrize("sample_id", ["../../etc/passwd", "/abs", "a/b.jpg", "..", "x" * 400, "é:\x00", "\ud800"])
def test_image_paths_stay_in_their_folder(tmp_path, sample_id):
    path = save_eval_image(tmp_path, sample_id, Image.new("L", (4, 4)))
    assert path.resolve().parent == (tmp_path / "eval_images").resolve()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_plain_ids_name_their_image():
    assert eval_image_path(Path("run"), "scene-7") == Path("run/eval_images/scene-7.png")
    long_ids = {eval_image_path(Path("run"), "x" * 300 + end) for end in "ab"}
    assert len(long_ids) == 2
