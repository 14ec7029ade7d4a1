"""Work done once per data set: units and recaptions, resumable at any record, whatever stops them."""

import base64
import io
import json
from collections import Counter

import pytest
from PIL import Image
from scripted_judge import ScriptedServer, plain_answer

from balcaprl.cli import main
from balcaprl.config import TrainConfig
from balcaprl.data import load_dataset
from balcaprl.rewards.prepare import prepare_units, recaption
from balcaprl.rewards.reference_units import UnitStore, open_for_append, units_path
from balcaprl.types import JudgeStoppedError


@pytest.fixture
def data(tmp_path):
    """12 records, two of them with the same reference."""
    lines = []
    for i in range(12):
        Image.new("RGB", (32, 32), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
        reference = f"A cup of number {i % 11} stands. A dog sleeps."
        lines.append({"id": f"r{i}", "image": f"{i}.png", "reference": reference, "facts": {"n": i}})
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(data, server, **endpoint):
    return TrainConfig.model_validate(
        {
            "data": {"kind": "jsonl", "path": str(data), "num_eval": 2},
            "reward": {"judge": "endpoint", "protocol": {"model": "m"}},
            "endpoint": {
                "servers": [{"url": server.url}], "cache": None, "retry_wait_s": 0.01, "max_attempts": 2, **endpoint,
            },
        }
    )  # fmt: skip


def test_every_reference_is_taken_apart_once(data):
    with ScriptedServer() as server:
        report = prepare_units(config(data, server))
        assert (report.num_done, report.num_present, server.counts["requests"]) == (11, 0, 11)
        again = prepare_units(config(data, server))
        assert (again.num_done, again.num_present, server.counts["requests"]) == (0, 11, 11)
    store = UnitStore(units_path(data))
    assert store.get("A cup of number 3 stands. A dog sleeps.") == ("A cup of number 3 stands", "A dog sleeps")
    assert store.get("unknown") is None
    assert "11 done" in str(report)


def test_what_fails_is_counted_and_tried_again_next_time(data):
    def answer(asked):
        if "number 3" in asked.data["reference"]:
            raise ValueError("400")
        return plain_answer(asked)

    with ScriptedServer(answer) as server:
        report = prepare_units(config(data, server))
        assert report.num_done == 10
        assert report.errors == Counter({"decompose: the server answered HTTP 400": 1})
    with ScriptedServer() as server:
        assert prepare_units(config(data, server)).num_done == 1


@pytest.mark.parametrize("budget", [150, 300, 450])
def test_prepare_goes_on_where_a_budget_stopped_it(data, budget):
    with ScriptedServer() as server:
        with pytest.raises(JudgeStoppedError, match="token_budget"):
            prepare_units(config(data, server, token_budget=budget))
        first = len(UnitStore(units_path(data)))
        assert first == server.counts["valid"]
        report = prepare_units(config(data, server))
        assert (report.num_present, report.num_done) == (first, 11 - first)


def test_half_a_line_is_cut_away_and_broken_ones_are_left_out(data):
    path = units_path(data)
    with ScriptedServer() as server:
        prepare_units(config(data, server))
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + b"not json\n" + lines[5][: len(lines[5]) // 2])
        store = UnitStore(path)
        assert len(store) == 5
        assert store.num_broken == 2
        assert prepare_units(config(data, server)).num_done == 6
    assert len(UnitStore(path)) == 11


def test_units_of_another_prompt_do_not_count(data):
    path = units_path(data)
    with ScriptedServer() as server:
        prepare_units(config(data, server))
    path.write_text(path.read_text().replace("decompose.v1.", "decompose.v0."))
    assert len(UnitStore(path)) == 0


@pytest.mark.parametrize("content", [b"", b"a\n", b"half", b"a\nhalf", b"a\n" + b"h" * 200_000])
def test_open_for_append_cuts_what_is_half(tmp_path, content):
    path = tmp_path / "f"
    path.write_bytes(content)
    with open_for_append(path) as file:
        file.write(b"new\n")
    assert path.read_bytes() == (b"a\n" if content.startswith(b"a") else b"") + b"new\n"


def test_recaption_writes_a_data_set_in_order(data, tmp_path):
    out = tmp_path / "better.jsonl"
    with ScriptedServer(keep_bodies=True, latency_s=0.01) as server:
        report = recaption(config(data, server), out)
        assert report.num_done == 12
        assert all(asked.image is not None for asked in server.asked)
        assert recaption(config(data, server), out).num_present == 12
        assert server.counts["requests"] == 12
        old = load_dataset(config(data, server).data, seed=0)
        new = load_dataset(config(out, server).data, seed=0)
    assert len(new.train) == 10
    for i in range(10):
        assert new.train[i].sample_id == old.train[i].sample_id
        assert new.train[i].reference == "Anew: " + old.train[i].reference
        assert new.train[i].facts == old.train[i].facts
        assert new.train[i].load_image().tobytes() == old.train[i].load_image().tobytes()


@pytest.mark.parametrize("kept", [0, 1, 7, 12])
def test_recaption_goes_on_at_any_record(data, tmp_path, kept):
    out = tmp_path / "better.jsonl"
    with ScriptedServer() as server:
        recaption(config(data, server), out)
        whole = out.read_bytes()
        lines = whole.splitlines(keepends=True)
        out.write_bytes(b"".join(lines[:kept]) + (lines[kept][:20] if kept < 12 else b""))
        report = recaption(config(data, server), out)
        assert (report.num_present, report.num_done) == (kept, 12 - kept)
    assert out.read_bytes() == whole


def test_an_image_that_does_not_decode_is_counted(data, tmp_path):
    image = data.parent / "3.png"
    image.write_bytes(image.read_bytes()[:60])
    with ScriptedServer() as server:
        report = recaption(config(data, server), tmp_path / "out.jsonl")
    assert report.num_done == 11
    assert report.errors.total() == 1


def test_data_without_files_are_refused(tmp_path):
    scenes = TrainConfig.model_validate({"data": {"kind": "scenes"}})
    with pytest.raises(ValueError, match=r"data\.path"):
        prepare_units(scenes)
    with pytest.raises(ValueError, match=r"data\.kind"):
        recaption(scenes, tmp_path / "x")


# ------------------------------------------------------------------------------------------------------ command line


def arguments(data, server):
    servers = json.dumps([{"url": server.url}])
    return [
        "--data.kind", "jsonl", "--data.path", str(data), "--data.num_eval", "2", "--reward.judge", "endpoint",
        "--reward.protocol.model", "m", "--endpoint.servers", servers, "--endpoint.cache", str(data.parent / "c.db"),
        "--endpoint.retry_wait_s", "0.01",
    ]  # fmt: skip


def test_the_commands(data, tmp_path, capsys):
    with ScriptedServer() as server:
        assert main(["prepare", *arguments(data, server)]) == 0
        assert "11 done" in capsys.readouterr().out
        assert main(["recaption", *arguments(data, server), "--out", str(tmp_path / "new.jsonl")]) == 0
        assert "12 done" in capsys.readouterr().out
    assert main(["judge-cache", "--cache", str(data.parent / "c.db")]) == 0
    told = capsys.readouterr().out
    assert "23 replies" in told
    assert "recaption.v1, m: 12" in told
    assert main(["judge-cache", "--cache", str(data.parent / "c.db"), "--unused_days", "0"]) == 0
    assert "dropped 23 entries" in capsys.readouterr().out
    assert main(["judge-cache", "--cache", str(tmp_path / "none.db")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_recaption_refuses_images_that_have_no_file(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    record = {"image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), "reference": "A."}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    config = TrainConfig.model_validate({"data": {"kind": "jsonl", "path": str(tmp_path / "d.jsonl")}})
    with pytest.raises(ValueError, match="1 records hold their images themselves"):
        recaption(config, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
