"""Checkpoints: whole or absent, the newest whole one taken, damage told by name, readable without pickle."""

import errno
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from balcaprl.checkpoints import checkpoint as module
from balcaprl.checkpoints.checkpoint import (
    CheckpointError,
    SaveError,
    TrainerState,
    clear_partial_checkpoints,
    list_checkpoints,
    load_state,
    newest_whole,
    save_checkpoint,
)
from balcaprl.files import manifest


def state(step):
    tensors = {"exp_avg.w": torch.arange(6.0).view(2, 3).T, "rng": torch.get_rng_state()}
    origin = {"judge": "noisy", "data": None}
    return TrainerState(step, step + 1, {"epoch": 0, "position": 8 * step}, {"seed": 0}, tensors, origin)


def save_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.arange(3000.0)}, folder / "model.safetensors")


def save(out, *steps, keep=2):
    return [save_checkpoint(out, state(step), save_model, keep=keep) for step in steps][-1]


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_round_trip_and_keep(tmp_path):
    save(tmp_path, 1, 2, 3, 10)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    path, loaded = newest_whole(tmp_path)
    assert path.name == "step_00000010"
    assert (loaded.step, loaded.policy_version, loaded.data) == (10, 11, {"epoch": 0, "position": 80})
    assert (loaded.origin, loaded.format) == ({"judge": "noisy", "data": None}, 1)
    assert torch.equal(loaded.tensors["exp_avg.w"], state(10).tensors["exp_avg.w"])
    assert torch.equal(loaded.tensors["rng"], torch.get_rng_state())


def test_saving_one_step_twice_keeps_the_first(tmp_path):
    save(tmp_path, 1)
    save_checkpoint(tmp_path, state(1), lambda folder: pytest.fail("written again"), keep=1)


def test_nothing_is_dropped_where_all_are_to_be_kept(tmp_path):
    save(tmp_path, 1, 2)
    save(tmp_path, 3, keep=None)
    assert len(list_checkpoints(tmp_path)) == 3


def test_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path) == []
    assert newest_whole(tmp_path) is None
    with pytest.raises(CheckpointError, match="no trainer state"):
        load_state(tmp_path)


# ---------------------------------------------------------------------------------------------------- damage


def flip(path, count=1):
    data = bytearray(path.read_bytes())
    for i in range(count):
        data[-1 - 7 * i] ^= 1 << (i % 8)
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def edit_state(change):
    def damage(folder):
        path = folder / "trainer_state.json"
        plain = json.loads(path.read_text())
        change(plain)
        path.write_text(json.dumps(plain))

    return damage


def edit_tensors(change):
    def damage(folder):
        path = folder / "trainer" / "optimizer.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return damage


FILES = ("config.json", "model.safetensors", "trainer_state.json", "trainer/optimizer.safetensors", "manifest.json")
BY_MANIFEST = {
    **{f"{name} missing": (lambda folder, n=name: (folder / n).unlink(), name) for name in FILES},
    **{f"{name} cut": (lambda folder, n=name: cut(folder / n), name) for name in FILES},
    **{f"{name} emptied": (lambda folder, n=name: (folder / n).write_bytes(b""), name) for name in FILES},
    **{f"{name} flipped": (lambda folder, n=name: flip(folder / n), name) for name in FILES[:-1]},
    "200 bits flipped": (lambda folder: flip(folder / "model.safetensors", 200), "model.safetensors"),
    "moments removed": (edit_tensors(lambda tensors: tensors.pop("exp_avg.w")), "optimizer.safetensors"),
    "a foreign shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "model.safetensors.index.json is no part",
    ),
    "a pickle beside": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        "pytorch_model.bin is no part",
    ),
}
RESEALED = {
    "unknown key": (edit_state(lambda plain: plain.update(reward=1)), "unknown key 'reward'"),
    "missing key": (edit_state(lambda plain: plain.pop("data")), "lacks data"),
    "wrong type": (edit_state(lambda plain: plain.update(step="3")), "step is '3', expected int"),
    "negative": (edit_state(lambda plain: plain.update(policy_version=-1)), "policy_version is -1"),
    "true": (edit_state(lambda plain: plain.update(step=True)), "step is True"),
    "another step": (edit_state(lambda plain: plain.update(step=7)), "trainer_state.json is of step 7"),
    "another format": (edit_state(lambda plain: plain.update(format=99)), "has format 99"),
    "no object": (lambda folder: (folder / "trainer_state.json").write_text("[1]"), "holds no object"),
    "no JSON": (lambda folder: (folder / "trainer_state.json").write_text("{"), "trainer_state.json is no valid JSON"),
    "deep JSON": (lambda folder: (folder / "trainer_state.json").write_text("[" * 100_000), "trainer_state.json|recursion"),
    "no rng": (edit_tensors(lambda tensors: tensors.pop("rng")), "lacks rng"),
    "a short rng": (edit_tensors(lambda tensors: tensors.update(rng=torch.zeros(3, dtype=torch.uint8))), "no random state"),
    "no tensors": (lambda folder: (folder / "trainer/optimizer.safetensors").write_bytes(b"x" * 99), "optimizer.safetensors"),
    "a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
}  # fmt: skip


def damaged_in(case):
    if case in BY_MANIFEST:
        return BY_MANIFEST[case]
    damage, message = RESEALED[case]

    def sealed(folder):
        damage(folder)
        manifest.write_manifest(folder)

    return sealed, message


@pytest.mark.parametrize("case", [*BY_MANIFEST, *RESEALED])
def test_damage_is_told_by_name_and_the_older_one_is_taken(tmp_path, case, caplog):
    newest = save(tmp_path, 2, 4)
    damage, message = damaged_in(case)
    damage(newest)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state(newest)
    assert str(newest) in str(caught.value)
    path, loaded = newest_whole(tmp_path)
    assert (path.name, loaded.step) == ("step_00000002", 2)
    assert "step_00000004" in caplog.text
    assert "the run goes on from step_00000002" in caplog.text
    assert names(tmp_path) == ["damaged_step_00000004", "step_00000002"]
    save(tmp_path, 4, 6)
    assert names(tmp_path) == ["damaged_step_00000004", "step_00000004", "step_00000006"]


def test_if_all_are_damaged_nothing_is_started_over_or_changed(tmp_path):
    save(tmp_path, 2, 4)
    for path in list_checkpoints(tmp_path):
        cut(path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"step_00000004 is damaged.*step_00000002 is damaged.*Nothing was changed"
    ):
        newest_whole(tmp_path)
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_damaged_ones_of_one_step_are_all_kept(tmp_path):
    save(tmp_path, 2)
    for _ in range(2):
        cut(save(tmp_path, 4, keep=5) / "config.json")
        newest_whole(tmp_path)
    assert names(tmp_path) == ["damaged_step_00000004", "damaged_step_00000004_2", "step_00000002"]


def test_notes_and_pictures_beside_a_model_do_no_harm(tmp_path):
    path = save(tmp_path, 2)
    (path / "NOTES.md").write_text("the good one")
    (path / "curve.png").write_bytes(b"x")
    assert load_state(path).step == 2


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "a/../../b", "..\\b"])
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path, name):
    path = save(tmp_path, 2)
    plain = json.loads((path / "manifest.json").read_text())
    plain["files"][name] = {"bytes": 1, "sha256": "0"}
    (path / "manifest.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="names a file outside"):
        load_state(path)


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_warning(tmp_path, caplog):
    path = save(tmp_path, 2)
    (path / "manifest.json").unlink()
    edit_state(lambda plain: (plain.pop("format"), plain.pop("origin")))(path)
    loaded = load_state(path)
    assert (loaded.step, loaded.format, loaded.origin) == (2, 0, {})
    assert "damage cannot be told" in caplog.text
    cut(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
        load_state(path)


# ---------------------------------------------------------------------------------------------------- saving


def dies_with(error):
    def dies(*_args, **_kwargs):
        raise error

    return dies


FULL = OSError(errno.ENOSPC, "No space left on device")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
PLACES = ["save_file", "os.replace", "manifest.write_manifest", "_fsync", "json.dumps", "save_model"]


@pytest.mark.parametrize(
    "error", [FULL, READ_ONLY, SafetensorError("I/O error: No space left on device (os error 28)")]
)
@pytest.mark.parametrize("place", PLACES)
def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, place, error):
    save(tmp_path, 1, keep=1)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def writes_half(folder):
        save_model(folder)
        raise error

    with monkeypatch.context() as patch:
        if place != "save_model":
            patch.setattr(f"balcaprl.checkpoints.checkpoint.{place}", dies_with(error))
        with pytest.raises(SaveError, match=r"step_00000002 could not be saved: .*(No space|Read-only).*before it are"):
            save_checkpoint(tmp_path, state(2), writes_half if place == "save_model" else save_model, keep=1)
    after = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    save(tmp_path, 2, keep=1)
    assert newest_whole(tmp_path)[1].step == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), RuntimeError("a bug")])
def test_a_save_that_is_cut_short_leaves_nothing_and_its_own_error(tmp_path, error):
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, state(2), lambda folder: (save_model(folder), dies_with(error)()), keep=1)
    assert names(tmp_path) == []


def test_an_old_one_that_cannot_be_removed_does_not_lose_the_new_one(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(module.shutil, "rmtree", dies_with(READ_ONLY))
    save(tmp_path, 2, keep=1)
    assert newest_whole(tmp_path)[1].step == 2
    assert "cannot be removed" in caplog.text


def test_leftovers_of_killed_saves_are_cleared(tmp_path):
    path = save(tmp_path, 1)
    for name in (".partial_step_00000002", ".partial_old_step_00000000"):
        shutil.copytree(path, path.with_name(name))
    (tmp_path / "checkpoints" / "mine").mkdir()
    clear_partial_checkpoints(tmp_path)
    assert names(tmp_path) == ["mine", "step_00000001"]
    clear_partial_checkpoints(tmp_path / "elsewhere")
