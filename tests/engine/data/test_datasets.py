"""Data sets: every bad record is counted under its reason, every bad data set is a clear error at start."""

import base64
import json
import logging
import sys

import datasets
import pytest
import torch
from PIL import Image

from balcaprl.config import DataConfig
from balcaprl.data import DatasetError, ImageError, load_dataset
from balcaprl.data.records import json_files
from balcaprl.rollout.prompts import PromptMaker, held_out_prompts
from balcaprl.types import Prompt


def share_record(image, caption="A cat.", question="<image>\nWhat is it?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": caption}]
    return {"image": image, "conversations": turns, **more}


@pytest.fixture
def root(tmp_path):
    """An image folder with six good images and some bad files."""
    folder = tmp_path / "root"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (32, 24), (40 * index, 0, 0)).save(folder / f"{index}.png")
    Image.new("1", (5000, 5000)).save(folder / "huge.png")
    (folder / "text.png").write_text("no image")
    (tmp_path / "outside.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "leaves.png").symlink_to(tmp_path / "outside.png")
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(folder / "truncated.jpg", quality=95)
    whole = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def load(kind, path, seed=0, **options):
    return load_dataset(DataConfig(kind=kind, path=path, **{"num_eval": 0, **options}), seed=seed)


def write_json(root, content, name="data.json"):
    (root / name).write_text(json.dumps(content))
    return root / name


def write_lines(root, lines, name="data.jsonl"):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / name).write_bytes("\n".join(texts).encode("utf-8", "surrogatepass"))
    return root / name


def samples(source):
    return [source[i] for i in range(len(source))]


def counts(dataset):
    return {reason: entry.count for reason, entry in dataset.report.exclusions.items()}


def test_sharegpt4v_records(root):
    path = write_json(
        root,
        [
            share_record("0.png", " A red cat. ", "<image>\nWhat do you see?", id="a"),
            share_record("1.png", "Two.", "What do you see?\n<image>", id="a"),
            share_record("2.png", "Three.", "<image>", id=7),
            share_record("3.png", "Four."),
        ],
    )
    loaded = samples(load("sharegpt4v", path, instruction="Default?").train)
    assert [s.reference for s in loaded] == ["A red cat.", "Two.", "Three.", "Four."]
    assert [s.instruction for s in loaded] == ["What do you see?", "What do you see?", "Default?", "What is it?"]
    assert [s.sample_id for s in loaded] == ["a", "a (record 1)", "7", "3.png"]
    assert loaded[2].load_image().getpixel((0, 0)) == (80, 0, 0)


def test_the_first_answer_to_the_first_question_is_the_reference(root):
    turns = [
        ("system", "Be kind."),
        ("human", "<image>\nOne?"),
        ("gpt", "First."),
        ("human", "Two?"),
        ("gpt", "Second."),
    ]
    record = {"image": "0.png", "conversations": [{"from": a, "value": b} for a, b in turns]}
    (sample,) = samples(load("sharegpt4v", write_json(root, [record])).train)
    assert (sample.instruction, sample.reference) == ("One?", "First.")


BAD_RECORDS = {
    "missing.png": "missing file",
    "/etc/hostname": "absolute path",
    "../outside.png": "path leaves the image folder",
    "leaves.png": "path leaves the image folder",
    "https://example.com/a.png": "URL",
    "text.png": "not an image",
    "huge.png": "too large",
}


@pytest.mark.parametrize("kind", ["sharegpt4v", "jsonl"])
def test_bad_records_are_counted_and_logged_in_one_message(root, kind, caplog):
    caplog.set_level(logging.INFO)
    if kind == "sharegpt4v":
        records = [share_record(image) for image in ["0.png", *BAD_RECORDS]]
        records += [share_record("1.png", "  "), share_record("1.png", None), {"image": "1.png"}, "no object"]
        records += [{"conversations": share_record("")["conversations"]}, share_record(["0.png", "1.png"])]
        dataset = load(kind, write_json(root, records), max_source_pixels=1_000_000)
    else:
        records = [{"image": image, "reference": "A cat."} for image in ["0.png", *BAD_RECORDS]]
        records += [{"image": "1.png", "reference": " "}, {"image": "1.png", "reference": 3}, {"image": "1.png"}, "[1]"]
        records += [{"reference": "A cat."}, {"image": 3, "reference": "A cat."}]
        dataset = load(kind, write_lines(root, records), max_source_pixels=1_000_000)
    expected = {reason: list(BAD_RECORDS.values()).count(reason) for reason in BAD_RECORDS.values()}
    expected |= {"not an object": 1}
    if kind == "sharegpt4v":
        expected |= {"empty caption": 1, "no caption": 2, "no image": 1, "several images": 1}
    else:
        expected |= {"empty caption": 1, "caption is not text": 1, "no caption": 1, "no image": 1}
        expected["not an image"] += 1
    assert counts(dataset) == expected
    assert (dataset.report.num_records, dataset.report.num_excluded, len(dataset.train)) == (14, 13, 1)
    (message,) = [r.getMessage() for r in caplog.records]
    assert caplog.records[0].levelno == logging.WARNING
    assert "13 of 14 records left out" in message
    assert all(reason in message for reason in counts(dataset))
    assert "missing.png" in message


def test_a_clean_data_set_logs_no_warning(root, caplog):
    caplog.set_level(logging.INFO)
    load("jsonl", write_lines(root, [{"image": "0.png", "reference": "A."}]))
    assert [r.levelname for r in caplog.records] == ["INFO"]


def test_broken_lines_are_named_by_their_number(root):
    lines = [
        '{"image": "0.png", "reference": "A."}',
        "",
        '{"image": ',
        "[" * 100_000,
        '{"image": "1.png", "reference": "B."}',
    ]
    path = write_lines(root, lines)
    with open(path, "ab") as file:
        file.write(b'\n{"image": "2.png", "reference": "\xff"}\n')
    dataset = load("jsonl", path)
    assert counts(dataset) == {"broken line": 3}
    assert [e.split(":")[0] for e in dataset.report.exclusions["broken line"].examples] == [
        "line 3",
        "line 4",
        "line 6",
    ]
    assert (len(dataset.train), dataset.report.num_records) == (2, 5)


def test_jsonl_keeps_its_own_instruction_and_mends_lone_surrogates(root):
    lines = [
        {"image": "0.png", "reference": "A.", "instruction": "<image>Why?", "id": "x"},
        '{"image": "1.png", "reference": "A \\ud83d."}',
    ]
    first, second = samples(load("jsonl", write_lines(root, lines), instruction="Default?").train)
    assert (first.sample_id, first.instruction) == ("x", "Why?")
    assert (second.sample_id, second.instruction) == ("1.png", "Default?")
    assert second.reference == "A ?."
    second.reference.encode()


def test_a_line_too_long_is_skipped_and_what_follows_is_found_again(root, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_LINE_BYTES", 3000)
    data = base64.b64encode((root / "3.png").read_bytes()).decode()
    lines = [
        {"image": "0.png", "reference": "x" * 5000},
        {"image": data, "reference": "A."},
        {"image": "1.png", "reference": "B."},
    ]
    dataset = load("jsonl", write_lines(root, lines))
    assert counts(dataset) == {"line too long": 1}
    assert [s.load_image().getpixel((0, 0)) for s in samples(dataset.train)] == [(120, 0, 0), (40, 0, 0)]
    (root / "data.jsonl").write_text("")  # the file changes under the run
    with pytest.raises(ImageError, match="no image"):
        dataset.train[0].load_image()


@pytest.mark.parametrize(
    "own_id", ["\x1b[2J\nERROR forged", "\u202e", "x" * 100_000, {"a": 1}, ["b"], None, True, 1.5, ""]
)
def test_ids_are_one_printable_line_of_bounded_length(root, own_id, caplog):
    lines = [
        {"image": name, "reference": "A.", "id": own_id} for name in ("0.png", "0.png", "none.png", "no\x1b[2Jne.png")
    ]
    dataset = load("jsonl", write_lines(root, lines))
    ids = [s.sample_id for s in samples(dataset.train)]
    assert len(set(ids)) == 2
    assert all(i and i.isprintable() and len(i) < 300 for i in ids)
    assert all(line.isprintable() and len(line) < 900 for line in str(dataset.report).split("\n"))


def test_only_a_few_examples_of_each_reason_are_kept(root):
    lines = [{"image": "0.png", "reference": "A."}] + [{"image": f"no{i}.png", "reference": "A."} for i in range(50)]
    entry = load("jsonl", write_lines(root, lines)).report.exclusions["missing file"]
    assert (entry.count, len(entry.examples)) == (50, 3)


def test_without_header_checks_bad_files_are_found_when_drawn(root):
    lines = [{"image": name, "reference": "A."} for name in ("0.png", "text.png", "../outside.png", "missing.png")]
    dataset = load("jsonl", write_lines(root, lines), check_headers=False)
    assert counts(dataset) == {"path leaves the image folder": 1, "missing file": 1}
    stream = dataset.train_stream(seed=0)
    assert [s.sample_id for s in stream.next_decodable(3)] == ["0.png"] * 3
    assert stream.num_undecodable == 1


def test_truncated_files_pass_at_start_and_fail_when_drawn(root):
    path = write_lines(root, [{"image": "truncated.jpg", "reference": "A."}, {"image": "0.png", "reference": "B."}])
    dataset = load("jsonl", path)
    assert counts(dataset) == {}
    with pytest.raises(ImageError, match=r"truncated\.jpg"):
        dataset.train[0].load_image()


def test_held_out_images_depend_on_the_seed_alone(root):
    path = write_lines(root, [{"image": f"{i}.png", "reference": "A."} for i in range(6)])
    ids = {}
    for seed in (0, 0, 1, 2, 3):
        dataset = load("jsonl", path, seed=seed, num_eval=2)
        held_out = [s.sample_id for s in samples(dataset.evaluation)]
        assert ids.setdefault(seed, held_out) == held_out
        assert sorted(held_out + [s.sample_id for s in samples(dataset.train)]) == [f"{i}.png" for i in range(6)]
        assert (dataset.report.num_train, dataset.report.num_eval) == (4, 2)
    assert len({tuple(sorted(v)) for v in ids.values()}) > 1


def prompt_of(sample):
    return Prompt(sample, torch.zeros(3, dtype=torch.long), {}, sample.load_image(), "")


def test_held_out_images_that_do_not_decode_are_left_out_and_logged(root, caplog):
    lines = [{"image": name, "reference": "A."} for name in ("0.png", "1.png", "truncated.jpg")]
    for seed in range(20):
        dataset = load("jsonl", write_lines(root, lines), seed=seed, num_eval=2)
        if "truncated.jpg" in [s.sample_id for s in samples(dataset.evaluation)]:
            break
    caplog.clear()
    held_out = held_out_prompts(dataset, PromptMaker(prompt_of))
    (prompt,) = held_out.prompts
    assert prompt.sample.load_image() is prompt.sample.load_image()
    assert held_out.num_excluded == 1
    assert "1 of 2 held-out samples cannot be used: truncated.jpg" in caplog.text


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("sharegpt4v", '{"image": 1}', "no usable record"),
        ("sharegpt4v", "[1, 2", "not valid JSON"),
        ("sharegpt4v", "", "no usable record"),
        ("sharegpt4v", "[" * 100_000, "not valid JSON"),
        ("sharegpt4v", "[]", "no usable record"),
        ("sharegpt4v", json.dumps([share_record("no.png")]), "no usable record.*(?s:.*)missing file: 1"),
        ("jsonl", "", "no usable record"),
        ("hf", "", "expects the folder"),
    ],
)
def test_bad_data_sets_are_errors_at_start(root, kind, content, message):
    (root / "data").write_text(content)
    with pytest.raises(DatasetError, match=message):
        load(kind, root / "data")


def test_missing_paths_are_errors_at_start(root):
    with pytest.raises(DatasetError, match=r"data\.path: needed"):
        load("jsonl", None)
    with pytest.raises(DatasetError, match="does not exist"):
        load("jsonl", root / "none.jsonl")
    with pytest.raises(DatasetError, match="expects a file"):
        load("jsonl", root)
    path = write_lines(root, [{"image": "0.png", "reference": "A."}])
    with pytest.raises(DatasetError, match=r"data\.image_root"):
        load("jsonl", path, image_root=root / "none")


def save_hf(tmp_path, columns, features=None):
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "hf")
    return tmp_path / "hf"


def test_hf_image_feature(root, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    images = [str(root / "0.png"), str(root / "3.png"), None, str(root / "text.png"), str(root / "1.png")]
    path = save_hf(tmp_path, {"image": images, "caption": ["A.", "B.", "C.", "D.", ""]}, features)
    dataset = load("hf", path)
    assert counts(dataset) == {"no image": 1, "not an image": 1, "empty caption": 1}
    assert [s.sample_id for s in samples(dataset.train)] == ["row 0", "row 1"]
    assert dataset.train[1].load_image().getpixel((0, 0)) == (120, 0, 0)
    assert dataset.train[1].reference == "B."


def test_hf_bytes_and_paths(root, tmp_path):
    column = [(root / "2.png").read_bytes()]
    more = {"text": ["ignored"], "reference": ["R."], "id": ["x"], "instruction": ["Why?"]}
    (sample,) = samples(load("hf", save_hf(tmp_path / "a", {"image": column, **more})).train)
    assert (sample.sample_id, sample.reference, sample.instruction) == ("x", "R.", "Why?")
    assert sample.load_image().getpixel((0, 0)) == (80, 0, 0)
    paths = ["4.png", "../outside.png", str(root.parent / "outside.png")]
    dataset = load("hf", save_hf(tmp_path / "b", {"image": paths, "text": ["A."] * 3}), image_root=root)
    assert counts(dataset) == {"path leaves the image folder": 1, "absolute path": 1}
    assert dataset.train[0].load_image().getpixel((0, 0)) == (160, 0, 0)


def test_hf_splits(root, tmp_path):
    one = datasets.Dataset.from_dict({"image": [(root / "0.png").read_bytes()], "text": ["A."]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    assert len(load("hf", tmp_path / "both").train) == 1
    datasets.DatasetDict({"a": one, "b": one}).save_to_disk(tmp_path / "neither")
    with pytest.raises(DatasetError, match=r"splits \['a', 'b'\]"):
        load("hf", tmp_path / "neither")


def test_hf_errors(root, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="save_to_disk"):
        load("hf", root)
    path = save_hf(tmp_path, {"picture": ["0.png"], "text": ["A."]})
    with pytest.raises(DatasetError, match=r"columns \['picture', 'text'\]"):
        load("hf", path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install .*datasets"):
        load("hf", path)


def test_scenes_are_drawn_on_the_fly():
    dataset = load_dataset(DataConfig(kind="scenes", num_eval=5, instruction="What?"), seed=0)
    held_out = samples(dataset.evaluation)
    assert len(held_out) == 5
    drawn = dataset.train_stream(seed=0).next_decodable(5)
    assert {s.reference for s in drawn} != {s.reference for s in held_out}
    assert {s.instruction for s in drawn} == {"What?"}
    assert drawn[0].load_image().mode == "RGB"


def test_the_real_photographs(photograph_set):
    path, root = photograph_set
    dataset = load_dataset(
        DataConfig(kind="sharegpt4v", path=path, image_root=root, num_eval=2, max_pixels=40_000), seed=0
    )
    assert dataset.report.num_excluded == 0
    drawn = dataset.train_stream(seed=0).next_decodable(len(dataset.train)) + samples(dataset.evaluation)
    assert len({s.sample_id for s in drawn}) == len(drawn) >= 8
    assert {s.instruction for s in drawn} == {"What do you see in this picture?"}
    assert all(s.load_image().width * s.load_image().height <= 40_000 for s in drawn)
