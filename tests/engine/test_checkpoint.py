"""Checkpoints: whole or absent, the newest kept, readable without pickle."""

import pytest
import torch

from balcaprl.checkpoint import TrainerState, list_checkpoints, load_state, save_checkpoint


def state(step):
    tensors = {"exp_avg.w": torch.arange(6.0).view(2, 3).T, "rng": torch.get_rng_state()}
    return TrainerState(step, step + 1, {"epoch": 0, "position": 8 * step}, {"seed": 0}, tensors)


def save_model(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3, 10):
        save_checkpoint(tmp_path, state(step), save_model, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    loaded = load_state(list_checkpoints(tmp_path)[-1])
    assert (loaded.step, loaded.policy_version, loaded.data) == (10, 11, {"epoch": 0, "position": 80})
    assert torch.equal(loaded.tensors["exp_avg.w"], state(10).tensors["exp_avg.w"])
    assert torch.equal(loaded.tensors["rng"], torch.get_rng_state())


def test_a_save_that_dies_leaves_the_previous_one(tmp_path):
    save_checkpoint(tmp_path, state(1), save_model, keep=1)

    def dies(folder):
        save_model(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, state(2), dies, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]
    save_checkpoint(tmp_path, state(2), save_model, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002"]


def test_saving_one_step_twice_keeps_the_first(tmp_path):
    save_checkpoint(tmp_path, state(1), save_model, keep=1)
    save_checkpoint(tmp_path, state(1), lambda folder: pytest.fail("written again"), keep=1)


def test_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="no trainer state"):
        load_state(tmp_path)
