"""No image is on both sides of the split, however it is named; sets of few images are split too."""

import base64
import json
import logging
import os
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from balcaprl.config import DataConfig
from balcaprl.data import load_dataset

NUM_IMAGES = 12


def noise(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path):
    for index in range(NUM_IMAGES):
        noise(index).save(tmp_path / f"{index}.png")
    return tmp_path


def load(root, records, seed=0, num_eval=4, **options):
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return load_dataset(DataConfig(kind="jsonl", path=root / "data.jsonl", num_eval=num_eval, **options), seed=seed)


def ids(source):
    return [source[i].sample_id for i in range(len(source))]


def pixels(source):
    return {source[i].load_image().tobytes() for i in range(len(source))}


def same_path(root, index, copy):
    return f"{index}.png"


def copied(root, index, copy):
    os.makedirs(root / f"copy{copy}", exist_ok=True)
    shutil.copy(root / f"{index}.png", root / f"copy{copy}" / f"other{index}.png")
    return f"copy{copy}/other{index}.png"


def linked(root, index, copy):
    (root / f"link{index}-{copy}.png").symlink_to(root / f"{index}.png")
    return f"link{index}-{copy}.png"


def spelled(root, index, copy):
    return [
        f"{index}.png",
        f"./{index}.png",
        str(root / f"{index}.png"),
        f"file://{root}/{index}.png",
        f".//{index}.png",
    ][copy]


def embedded(root, index, copy):
    data = base64.b64encode((root / f"{index}.png").read_bytes()).decode()
    return data if copy % 2 else f"data:image/png;base64,{data}"


def mixed(root, index, copy):
    return (embedded, copied, same_path)[copy % 3](root, index, copy)


@pytest.mark.parametrize("name_of", [same_path, copied, linked, spelled, embedded, mixed])
@pytest.mark.parametrize("order", ["together", "rounds"])
def test_no_image_is_on_both_sides(root, name_of, order):
    pairs = [(i, k) for i in range(NUM_IMAGES) for k in range(5)]
    pairs = pairs if order == "together" else sorted(pairs, key=lambda pair: pair[1])
    records = [{"image": name_of(root, i, k), "reference": f"Caption {k} of {i}."} for i, k in pairs]
    for seed in range(3):
        dataset = load(root, records, seed)
        assert (len(dataset.train), len(dataset.evaluation)) == (5 * (NUM_IMAGES - 4), 20)
        assert len(pixels(dataset.train)) == NUM_IMAGES - 4
        assert not pixels(dataset.train) & pixels(dataset.evaluation)
        assert "20 held-out samples of 4 images" in str(dataset.report)
        assert len({dataset.evaluation[i].image_identity for i in range(20)}) == 4


def test_without_header_checks_paths_name_images(root):
    records = [{"image": spelled(root, i, k), "reference": "A."} for i in range(NUM_IMAGES) for k in range(5)]
    dataset = load(root, records, check_headers=False)
    assert (len(dataset.train), len(dataset.evaluation)) == (40, 20)
    assert not pixels(dataset.train) & pixels(dataset.evaluation)


def test_images_alike_in_length_beginning_and_end_are_told_apart(root):
    for index in range(6):
        picture = Image.new("RGB", (100, 100))
        picture.putpixel((50, 50), (index, 0, 0))
        picture.save(root / f"alike{index}.bmp")
    assert len({(root / f"alike{i}.bmp").stat().st_size for i in range(6)}) == 1
    dataset = load(root, [{"image": f"alike{i}.bmp", "reference": "A."} for i in range(6)], num_eval=2)
    assert (len(dataset.train), dataset.report.num_eval_images) == (4, 2)


@pytest.mark.parametrize("form", ["feature", "bytes", "list"])
@pytest.mark.parametrize("check_headers", [True, False])
def test_rows_of_one_image_stay_together(root, form, check_headers):
    rows = [i for i in range(NUM_IMAGES) for _ in range(2)]
    data = {i: (root / f"{i}.png").read_bytes() for i in rows}
    values = [{"bytes": data[i], "path": f"{n}.png"} if form == "feature" else data[i] for n, i in enumerate(rows)]
    values = [[value] for value in values] if form == "list" else values
    table = datasets.Dataset.from_dict({"image": values, "text": ["A."] * len(rows)})
    if form == "feature":
        table = table.cast_column("image", datasets.Image())
    table.save_to_disk(str(root / "hf"))
    config = DataConfig(kind="hf", path=root / "hf", num_eval=4, check_headers=check_headers)
    dataset = load_dataset(config, seed=1)
    assert (len(dataset.train), len(dataset.evaluation)) == (16, 8)
    assert not pixels(dataset.train) & pixels(dataset.evaluation)


def test_where_each_image_has_one_record_the_split_is_a_shuffle_of_records(root):
    records = [{"image": f"{i}.png", "reference": "A.", "id": str(i)} for i in range(NUM_IMAGES)]
    for seed in range(4):
        order = np.random.Generator(np.random.PCG64(seed)).permutation(NUM_IMAGES)
        dataset = load(root, records, seed)
        assert ids(dataset.evaluation) == [str(i) for i in order[-4:]]
        assert ids(dataset.train) == [str(i) for i in sorted(order[:-4])]


@pytest.mark.parametrize(
    ("num_images", "num_eval", "held_out"),
    [
        (21, 128, 10), (128, 128, 64), (129, 128, 64), (255, 128, 127), (256, 128, 128), (300, 128, 128), (1, 128, 0),
        (2, 128, 1), (3, 2, 2), (3, 3, 1), (3, 50, 1), (1, 1, 0), (5, 0, 0), (300, 200, 200),
    ],
)  # fmt: skip
def test_few_images_are_shared_out_and_said_so(tmp_path, num_images, num_eval, held_out, caplog):
    caplog.set_level(logging.WARNING)
    for index in range(num_images):
        Image.new("RGB", (2, 2), (index % 256, index // 256, 0)).save(tmp_path / f"{index}.png")
    records = [{"image": f"{index}.png", "reference": "A."} for index in range(num_images)]
    dataset = load(tmp_path, records, num_eval=num_eval)
    assert (len(dataset.train), len(dataset.evaluation)) == (num_images - held_out, held_out)
    said = [m for m in caplog.messages if "data.num_eval" in m]
    assert len(said) == (held_out != num_eval)
    assert all(f"{held_out} are held out" in m for m in said)
