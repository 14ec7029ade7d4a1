"""The warm start: what ships is what its recipe says, and the recipe runs."""

import hashlib
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from balcaprl.assets import demo_model_path
from balcaprl.data.scenes import FlawRates, make_scene
from balcaprl.data.scenes.world import COLOURS, SHAPES
from balcaprl.demo.warmstart import Phase, WarmstartConfig, build_warmstart, grid_targets
from balcaprl.policy import Policy

TINY = WarmstartConfig(
    batch_size=4,
    bucket=1,
    hidden_size=48,
    num_layers=1,
    vision_hidden_size=32,
    vision_depth=1,
    tower=Phase("tower", steps=2, lr=1e-3),
    phases=(
        Phase("labels", steps=2, lr=1e-3),
        Phase("clean", steps=2, lr=1e-3),
        Phase("flawed", steps=2, lr=1e-3),
    ),
)


def test_what_ships_is_small_and_what_its_recipe_says():
    folder = demo_model_path()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 8 << 20
    recipe = json.loads((folder / "warmstart.json").read_text())
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == recipe["sha256"]
    # The recipe is today's default: `balcaprl warmstart` rebuilds what ships.
    assert recipe["config"] == json.loads(json.dumps(asdict(WarmstartConfig())))
    policy = Policy.from_pretrained(folder)
    assert 1e6 <= policy.num_parameters <= 4e6
    assert all(torch.isfinite(p).all() for p in policy.model.parameters())


def test_flaws_come_from_the_stated_rates_alone():
    assert asdict(WarmstartConfig().rates) == asdict(FlawRates())


def test_a_build_writes_a_checkpoint_and_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "model"
    build_warmstart(folder, TINY, lambda _: None)
    first = (folder / "model.safetensors").read_bytes()
    assert Policy.from_pretrained(folder, dtype="bfloat16").num_parameters > 0
    messages = []
    build_warmstart(folder, TINY, messages.append)
    assert sum("taken from" in m for m in messages) == 4
    assert (folder / "model.safetensors").read_bytes() == first
    messages.clear()
    changed = replace(TINY, rates=FlawRates(repetition=0.9))
    build_warmstart(folder, changed, messages.append)
    assert sum("taken from" in m for m in messages) == 3
    assert (folder / "model.safetensors").read_bytes() != first


@pytest.mark.parametrize("seed", range(5))
def test_grid_targets_name_what_is_there(seed):
    scene = make_scene(seed)
    targets = grid_targets(scene, 4)
    assert targets.shape == (16, 7)
    present = targets[targets[:, 0] == 1]
    assert 1 <= len(present) <= len(scene.objects)
    told = {(SHAPES[int(row[3])], list(COLOURS)[int(row[4])]) for row in present}
    assert told <= {(o.shape, o.colour) for o in scene.objects}
    assert np.array_equal(targets[:, 1], np.repeat(range(4), 4))
    assert bool((targets[targets[:, 0] == 0][:, 3:] == -100).all())
