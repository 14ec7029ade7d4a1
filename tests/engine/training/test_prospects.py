"""What is certain to teach nothing is refused before anything is loaded; what is likely to is told once."""

import logging
import subprocess
import sys

import pytest

from balcaprl.cli.main import main
from balcaprl.config import TrainConfig
from balcaprl.config.recipe import RecipeError, check_recipe
from balcaprl.training.prospects import doubts, largest_change, refuse_hopeless, warn_of_doubts

REFERENCES = ["A large red circle is above a small blue square in the middle of the picture."] * 3
CUSTOM = {"name": "mine", "source": "json:loads"}
FIRST = {"precision_weight": 1, "recall_weight": 0, "linguistic_weight": 0}
NONE = {"precision_weight": 0, "recall_weight": 0, "linguistic_weight": 0}

HOPELESS = [
    ({"rollout": {"sampling": {"temperature": 1e-6}}}, "rollout.sampling.temperature: 1e-06 is greedy"),
    ({"rollout": {"group_size": 1}}, "rollout.group_size must be at least 2"),
    ({"reward": NONE}, "no reward has a weight above 0"),
    ({"reward": {"judge": "none"}}, "reward.judge is none, and no reward has a weight"),
    ({"reward": {"judge": "none", "custom": [{**CUSTOM, "weight": 0}]}}, "no reward has a weight above 0"),
    (
        {"reward": {**FIRST, "conditions": [{"reward": "precision", "on": "recall", "at_least": 1.5}]}},
        "reward.conditions: precision would never count",
    ),
    (
        {
            "reward": {
                "judge": "none",
                "custom": [CUSTOM],
                "conditions": [{"reward": "mine", "on": "recall", "at_least": 0.1}],
            }
        },
        "reward.conditions: mine would never count",
    ),
]


@pytest.mark.parametrize(("plain", "reason"), HOPELESS)
def test_what_is_certain_to_teach_nothing_is_refused(plain, reason):
    with pytest.raises(ValueError, match=reason):
        refuse_hopeless(TrainConfig.model_validate(plain))


@pytest.mark.parametrize(
    "plain",
    [
        {"rollout": {"group_size": 0}},
        {"rollout": {"sampling": {"temperature": 0}}},
        {"rollout": {"sampling": {"max_completion_tokens": 0}}},
        {"rollout": {"sampling": {"stop": ["", "x"]}}},
        {"rollout": {"prompts_per_step": 0}},
        {"optim": {"lr": 0}},
        {"optim": {"max_grad_norm": 0}},
        {"optim": {"epochs_per_batch": 0}},
        {"optim": {"beta1": 1}},
        {"loss": {"sampling_ratio_cap": 0}},
        {"loss": {"clip_low": 1}},
    ],
)
def test_fields_refuse_by_themselves_what_teaches_nothing(plain):
    with pytest.raises(RecipeError):
        check_recipe(plain)


DOUBTFUL = [
    ({"rollout": {"sampling": {"temperature": 0.01}}}, "temperature is 0.01"),
    ({"rollout": {"sampling": {"max_completion_tokens": 1}}}, "max_completion_tokens is 1: no caption fits"),
    ({"rollout": {"sampling": {"max_completion_tokens": 7}}}, "references have about 16 words"),
    ({"rollout": {"sampling": {"stop": [" "]}}}, "stop ends captions at"),
    ({"rollout": {"sampling": {"stop": ["e"]}}}, "stop ends captions at"),
    (
        {"reward": {"conditions": [{"reward": "precision", "on": "recall", "at_least": 1.5}]}},
        "precision will never count",
    ),
    ({"optim": {"lr": 1e-12}}, "optim.lr"),
    ({"optim": {"eps": 1e9}}, "optim.eps"),
    ({"optim": {"max_grad_norm": 1e-15}}, "optim.max_grad_norm"),
    ({"optim": {"warmup_steps": 10**9}}, "optim.warmup_steps"),
    ({"advantage": {"eps": 1e9}, "optim": {"eps": 1e-3}}, "advantage.eps"),
    ({"loss": {"sampling_ratio_cap": 1e-15}}, "loss.sampling_ratio_cap"),
    ({"loss": {"kl_coef": 1e6}}, "loss.kl_coef"),
    ({"reward": {**FIRST, "precision_weight": 1e-20}}, "rewards' weights"),
]


@pytest.mark.parametrize(("plain", "reason"), DOUBTFUL)
def test_what_is_likely_to_teach_nothing_is_one_warning(plain, reason, caplog):
    config = TrainConfig.model_validate(plain)
    refuse_hopeless(config)
    with caplog.at_level(logging.WARNING):
        warn_of_doubts(config, REFERENCES)
    assert len(caplog.records) == 1
    assert "this run may learn little or nothing" in caplog.text
    assert reason in caplog.text


ORDINARY = [
    {},
    {"steps": 1},
    {"rollout": {"sampling": {"max_completion_tokens": 8, "temperature": 0.6, "stop": ["\n", "."]}}},
    {"reward": {"length_rule": "none"}, "rollout": {"sampling": {"max_completion_tokens": 5}}},
    {"reward": {"judge": "none", "custom": [CUSTOM]}},
    {"reward": {"conditions": [{"reward": "precision", "on": "recall", "at_least": 1.0}]}},
    {
        "reward": {"custom": [CUSTOM], "conditions": [{"reward": "precision", "on": "mine", "at_least": 5}]},
        "loss": {"clip_low": 0, "clip_high": 0},
    },
    {"optim": {"lr": 1e-7}, "loss": {"kl_coef": 0.1, "sampling_ratio_cap": 2.0}},
]


@pytest.mark.parametrize("plain", ORDINARY)
def test_ordinary_runs_are_not_warned_of(plain):
    config = TrainConfig.model_validate(plain)
    refuse_hopeless(config)
    assert doubts(config, REFERENCES) == []


@pytest.mark.parametrize("plain", [plain for plain, _ in (*HOPELESS, *DOUBTFUL)])
def test_a_run_without_steps_is_not_meant_to_learn(plain, caplog):
    config = TrainConfig.model_validate({"steps": 0, **plain})
    refuse_hopeless(config)
    warn_of_doubts(config, REFERENCES)
    assert not caplog.records


def test_the_largest_change_of_an_ordinary_run_is_its_learning_rate():
    assert largest_change(TrainConfig()) == pytest.approx(1e-4, rel=1e-3)
    assert largest_change(TrainConfig(steps=1)) == pytest.approx(1e-4 / 5, rel=1e-3)


def test_the_command_refuses_before_it_loads_or_writes_anything(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["train", "--output_dir", str(out), "--rollout.sampling.temperature", "1e-6"]
    assert main(arguments) == 1
    assert "is greedy" in capsys.readouterr().err
    assert not out.exists()
    script = (
        f"import sys; from balcaprl.cli.main import main; rc = main({arguments!r}); print(rc, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]
