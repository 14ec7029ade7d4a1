"""Work done once per data set: units and recaptions, resumable at any record, whatever stops them."""

import base64
import io
import json
import os
from collections import Counter
from functools import partial

import pytest
from PIL import Image
from scripted_judge import ScriptedServer, plain_answer

from balcaprl.cli.main import main
from balcaprl.config import RewardConfig, TrainConfig
from balcaprl.data import load_dataset
from balcaprl.files.ownership import ForeignPathError, PathInUseError, claim_file
from balcaprl.rewards.endpoint.prepare import prepare_units, recaption
from balcaprl.rewards.endpoint.protocol import TASKS
from balcaprl.rewards.endpoint.reference_units import UnitStore, open_for_append, units_path
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


def with_server(config, **server):
    return config.model_copy(
        update={
            "reward": RewardConfig.model_validate(
                {"judge": "endpoint", "protocol": {"model": server.pop("protocol", "")}}
            ),
            "endpoint": config.endpoint.model_copy(
                update={"servers": [config.endpoint.servers[0].model_copy(update=server)]}
            ),
        }
    )


@pytest.mark.parametrize(("first", "second"), [({"model": "a"}, {"model": "b"}), ({"protocol": "a"}, {"protocol": "b"}),
    ({"protocol": "p", "model": "a"}, {"protocol": "p", "model": "b"})])  # fmt: skip
def test_units_of_another_model_do_not_count_and_that_is_said(data, first, second, caplog):
    with ScriptedServer() as server:
        plain = config(data, server)
        assert prepare_units(with_server(plain, **first)).num_done == 11
        assert prepare_units(with_server(plain, **second)).num_done == 11
        assert "not used" in caplog.text
        assert prepare_units(with_server(plain, **first)).num_present == 11
        assert prepare_units(with_server(plain, **second)).num_present == 11
        assert server.counts["requests"] == 22


@pytest.mark.parametrize("units", ["abc", [], ["a", ""], ["a", 5], {"a": 1}, None, ["x"] * 5000])
def test_units_that_are_no_list_of_texts_are_broken(tmp_path, units):
    path = tmp_path / "u"
    record = {"reference": "r", "prompt": TASKS["decompose"].identity, "model": "m", "units": units}
    path.write_text(json.dumps(record) + "\n")
    assert (len(UnitStore(path)), UnitStore(path).num_broken) == (0, 1)


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


# ------------------------------------------------------------------------------------------------- what is not ours


def linked(data, way):
    """Another name of the data set itself."""
    path = data.with_name("another name.jsonl")
    if way == "the same":
        return data
    if way == "a hard link":
        path.hardlink_to(data)
    elif way == "a link":
        path.symlink_to(data)
    else:
        (data.parent / "folder").symlink_to(data.parent)
        path = data.parent / "folder" / ".." / data.parent.name / data.name
    return path


@pytest.mark.parametrize("way", ["the same", "a hard link", "a link", "a linked folder"])
def test_recaption_never_writes_over_what_it_reads(data, way):
    out = linked(data, way)
    with ScriptedServer() as server:
        written = data.with_name("ours.jsonl")
        recaption(config(data, server), written)
        data.write_bytes(written.read_bytes())  # of ours, and nevertheless the data set that is read
        before, asked = data.read_bytes(), server.counts["requests"]
        with pytest.raises(ForeignPathError, match=r"--out: .*data\.path"):
            recaption(config(data, server), out)
        assert server.counts["requests"] == asked
    assert data.read_bytes() == before


FOREIGN = [
    b'{"note": "mine"}\n{"note": "no newline at its end"}',
    b'{"note": "no newline at its end"}',
    b'{"id": "r0", "image": "0.png", "reference": "of an earlier version"}\n',
    b"\n",
    b"half",
    b"\x00\xff" * 50,
    b"[" * 10_000 + b"\n",
]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("command", ["recaption", "prepare"])
def test_no_foreign_file_is_touched_and_nothing_is_asked(data, tmp_path, command, content):
    path = tmp_path / "theirs.jsonl"
    path.write_bytes(content)
    names = sorted(p.name for p in tmp_path.iterdir())
    with ScriptedServer() as server:
        settings = config(data, server, units=str(path))
        run = prepare_units if command == "prepare" else partial(recaption, out=path)
        with pytest.raises(ForeignPathError, match=r"theirs\.jsonl exists and is no"):
            run(settings)
        assert server.counts["requests"] == 0
    assert path.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_a_unit_store_does_not_append_to_a_foreign_file(tmp_path):
    path = tmp_path / "captions.json.units.jsonl"
    path.write_bytes(b"mine, without an end")
    with pytest.raises(ForeignPathError):
        UnitStore(path).add("A cup.", ["A cup"], "m")
    assert path.read_bytes() == b"mine, without an end"


def test_one_process_at_a_time(data, tmp_path):
    out = tmp_path / "new.jsonl"
    with ScriptedServer() as server:
        with claim_file(out, option="--out"), pytest.raises(PathInUseError, match=str(os.getpid())):
            recaption(config(data, server), out)
        with claim_file(units_path(data), option="x"), pytest.raises(PathInUseError, match=str(os.getpid())):
            prepare_units(config(data, server))
        assert server.counts["requests"] == 0


def test_records_that_changed_are_asked_anew_and_what_else_is_there_stays(data, tmp_path):
    out = tmp_path / "new.jsonl"
    with ScriptedServer() as server:
        recaption(config(data, server), out)
        lines = [json.loads(line) for line in data.read_text().splitlines()]
        lines[3]["reference"] = "Another cup."
        del lines[5]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out.write_bytes(out.read_bytes() + b'{"a note": "of mine"}')
        report = recaption(config(data, server), out)
    assert (report.num_done, report.num_present) == (1, 10)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("id") for line in found] == [*(f"r{i}" for i in range(12) if i != 5), "r5", None]
    assert found[3]["reference"] == "Anew: Another cup."
    assert found[-1] == {"a note": "of mine"}


def test_a_whole_last_line_that_an_editor_left_without_its_end_is_kept(data, tmp_path):
    out = tmp_path / "new.jsonl"
    with ScriptedServer() as server:
        recaption(config(data, server), out)
        whole = out.read_bytes()
        out.write_bytes(whole.removesuffix(b"\n"))
        assert recaption(config(data, server), out).num_done == 0
    assert out.read_bytes() == whole


def test_recaption_through_a_link_writes_its_target(data, tmp_path):
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(target)
    with ScriptedServer() as server:
        recaption(config(data, server), link)
    assert link.is_symlink()
    assert len(target.read_bytes().splitlines()) == 12


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
