"""The training step: the same however it is split, unharmed by bad scores, exact when it goes on."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.config import TrainConfig
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.files.ownership import PathInUseError
from balcaprl.policy import Policy
from balcaprl.reporting.metrics import is_reproducible, read_jsonl
from balcaprl.rewards.scenes.judge import SceneJudge
from balcaprl.training.learning import NothingToLearnError
from balcaprl.training.trainer import Trainer
from balcaprl.types import RewardBreakdown

CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return build_tiny_qwen(
        folder, [*CORPUS, *["Describe the image."] * 2], hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4,
        vision_hidden_size=32, vision_intermediate_size=48, vision_depth=2, vision_num_heads=2,
    )  # fmt: skip


def config(tiny_model, out, **changes):
    plain = {
        "output_dir": str(out),
        "steps": 3,
        "model": {"path": str(tiny_model)},
        "data": {"num_eval": 2},
        "rollout": {
            "sampler": "hf",
            "prompts_per_step": 4,
            "group_size": 3,
            "sampling": {"max_completion_tokens": 12},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 0},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }
    for section, values in changes.items():
        plain[section] = {**plain.get(section, {}), **values} if isinstance(values, dict) else values
    return TrainConfig.model_validate(plain)


def run(settings, judge=None):
    trainer = Trainer(settings, judge=judge)
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def final_weights(out):
    return load_file(list_checkpoints(out)[-1] / "model.safetensors")


def reproducible_metrics(out):
    return [{k: v for k, v in line.items() if is_reproducible(k)} for line in read_jsonl(out / "metrics.jsonl")]


class NoisyJudge:
    """Scores that differ within every group, so that every rollout carries a gradient."""

    name = "noisy"

    def score(self, sample, captions):
        seed = sum(map(ord, sample.sample_id))
        values = np.random.default_rng(seed).uniform(0.1, 0.9, size=(len(captions), 3))
        return [RewardBreakdown(*map(float, row)) for row in values]


class BrokenJudge(NoisyJudge):
    """Misbehaves in one given way, on some captions or on all."""

    def __init__(self, way):
        self.way = way

    def score(self, sample, captions):
        if self.way == "raises":
            raise RuntimeError("the endpoint is down")
        answers = super().score(sample, captions)
        if self.way == "all nan":
            return [RewardBreakdown() for _ in answers]
        if self.way == "some nan":
            return [RewardBreakdown(precision=0.5, recall=math.nan, linguistic=a.linguistic) for a in answers]
        if self.way == "flat":
            return [RewardBreakdown(0.5, 0.5, 0.5) for _ in answers]
        if self.way == "too few":
            return answers[:-1]
        if self.way == "out of range":
            return [RewardBreakdown(7.0, math.inf, -1.0) for _ in answers]
        return answers


# ---------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize("reduction", ["token-mean", "sequence-mean", "constant"])
def test_accumulation_does_not_change_the_update(tiny_model, tmp_path, reduction):
    """One batch in 1, 2 or 4 parts: weights agree within 2e-6 after a step of 1e-3 (float32 rounding alone)."""
    results = []
    for parts in (1, 2, 4):
        settings = config(
            tiny_model, tmp_path / str(parts), steps=1, optim={"accumulation_steps": parts, "eps": 1e-4},
            loss={"reduction": reduction},
        )  # fmt: skip
        trainer = run(settings, NoisyJudge())
        results.append((weights(trainer), read_jsonl(settings.output_dir / "metrics.jsonl")[0]))
    (whole, whole_metrics), *split = results
    start = dict(Policy.from_pretrained(tiny_model).model.named_parameters())
    assert any(not torch.equal(start[n], p) for n, p in whole.items())
    for part, metrics in split:
        assert metrics["loss"] == pytest.approx(whole_metrics["loss"], rel=1e-5, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(whole_metrics["grad_norm"], rel=1e-5)
        for name, value in whole.items():
            assert (part[name] - value).abs().max() < 2e-6, name


def test_several_epochs_keep_the_first_old_logprobs(tiny_model, tmp_path):
    """In the second epoch the ratio leaves 1; with one epoch it is exactly 1."""
    once = config(tiny_model, tmp_path / "1", steps=1)
    twice = config(tiny_model, tmp_path / "2", steps=1, optim={"epochs_per_batch": 2, "lr": 3e-3})
    run(once, NoisyJudge())
    run(twice, NoisyJudge())
    assert read_jsonl(once.output_dir / "metrics.jsonl")[0]["ratio_max"] == 1.0
    assert read_jsonl(twice.output_dir / "metrics.jsonl")[0]["ratio_max"] > 1.0


def test_divergence_holds_the_policy_near_its_reference(tiny_model, tmp_path):
    free = config(tiny_model, tmp_path / "free", steps=4, loss={"kl_coef": 1e-9})
    held = config(tiny_model, tmp_path / "held", steps=4, loss={"kl_coef": 10.0})
    distance = []
    for settings in (free, held):
        run(settings, NoisyJudge())
        distance.append(read_jsonl(settings.output_dir / "metrics.jsonl")[-1]["kl"])
    assert 0 < distance[1] < 0.7 * distance[0]


@pytest.mark.parametrize("method", ["c-gdpo", "gdpo", "grpo"])
@pytest.mark.parametrize("length_rule", ["mask", "linear", "none"])
def test_every_method_and_length_rule_trains(tiny_model, tmp_path, method, length_rule):
    settings = config(tiny_model, tmp_path, steps=1, advantage={"method": method}, reward={"length_rule": length_rule})
    trainer = run(settings, NoisyJudge())
    assert all(torch.isfinite(p).all() for p in weights(trainer).values())
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 0


def test_a_frozen_tower_stays(tiny_model, tmp_path):
    start = {n: p.detach().clone() for n, p in Policy.from_pretrained(tiny_model).model.named_parameters()}
    trainer = run(config(tiny_model, tmp_path, model={"freeze_vision": True}), NoisyJudge())
    moved = {n for n, p in weights(trainer).items() if not torch.equal(p, start[n])}
    assert moved
    assert not any("visual.blocks" in name or "patch_embed" in name for name in moved)


def test_the_policy_follows_its_reward(tiny_model, tmp_path):
    """A judge that likes long words makes them more frequent."""

    class LikesLongWords(NoisyJudge):
        def score(self, sample, captions):
            rates = [min(1.0, len(c) / 60) for c in captions]
            return [RewardBreakdown(rate, rate, rate) for rate in rates]

    settings = config(
        tiny_model, tmp_path, steps=30, optim={"lr": 1e-2}, data={"num_eval": 0}, rollout={"group_size": 8},
        reward={"length_rule": "none"},
    )  # fmt: skip
    run(settings, LikesLongWords())
    recall = [line["reward/recall"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert np.mean(recall[-3:]) > np.mean(recall[:3]) + 0.1


# ---------------------------------------------------------------------------------------------------- bad scores


@pytest.mark.parametrize("way", ["raises", "all nan", "some nan", "flat", "too few", "out of range"])
def test_a_judge_that_misbehaves_harms_nothing(tiny_model, tmp_path, way, caplog):
    """What it does not score is left out; a run that is never given its scores, or never any that differ, says so."""
    settings = config(tiny_model, tmp_path, steps=2, reward={"length_rule": "none"})
    start = {n: p.detach().clone() for n, p in Policy.from_pretrained(tiny_model).model.named_parameters()}
    if way == "flat":
        trainer = run(settings, BrokenJudge(way))
        assert "the run has learnt nothing: in all 2 steps no reward tells" in caplog.text
    else:
        trainer = Trainer(settings, judge=BrokenJudge(way))
        lacking = "recall for 0%" if way == "some nan" else "precision for 0%, recall for 0%, linguistic for 0%"
        with pytest.raises(NothingToLearnError, match=f"in all 2 steps too few scores .* came of {lacking}"):
            trainer.train()
        trainer.close()
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(lines) == 2
    assert list_checkpoints(tmp_path)[-1].name == "step_00000002"
    unchanged = all(torch.equal(p, start[n]) for n, p in weights(trainer).items())
    if way in ("raises", "all nan", "too few", "out of range"):
        assert lines[0]["num_unscorable"] == 12
        assert lines[0]["num_skipped_updates"] == 1
        assert unchanged
    elif way == "flat":
        assert lines[0]["num_flat_groups"] == 4
        assert lines[0]["num_skipped_updates"] == 1
        assert unchanged
    else:
        assert lines[0]["num_missing_scores"] > 0
        assert not unchanged


def test_a_judge_that_fails_now_and_then_loses_only_those(tiny_model, tmp_path):
    class Flaky(NoisyJudge):
        def score(self, sample, captions):
            if sample.sample_id.endswith(("1", "5", "9")):
                raise TimeoutError("no answer")
            return super().score(sample, captions)

    trainer = run(config(tiny_model, tmp_path, steps=3), Flaky())
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert 0 < sum(line["num_unscorable"] for line in lines) < 36
    assert all(torch.isfinite(p).all() for p in weights(trainer).values())


def test_a_group_of_one_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="group_size"):
        Trainer(config(tiny_model, tmp_path, rollout={"group_size": 1}))


@pytest.mark.parametrize("way", ["raises", "all nan", "some nan", "too few"])
def test_a_reward_that_fails_step_after_step_ends_the_run(tiny_model, tmp_path, way):
    """After three steps, saved, with the reward's name and the error, however many steps were asked for."""
    trainer = Trainer(config(tiny_model, tmp_path, steps=50), judge=BrokenJudge(way))
    with pytest.raises(NothingToLearnError, match=r"3 steps in a row .* recall for 0%.* saved at step 3") as caught:
        trainer.train()
    trainer.close()
    assert ("the endpoint is down" in str(caught.value)) == (way == "raises")
    assert list_checkpoints(tmp_path)[-1].name == "step_00000003"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return {'score': 1.0}", "dict is no number"),
        ("raise KeyError('colour')", "KeyError"),
        ("return float('nan')", ""),
        ("return [1.0]", "list is no number"),
    ],
)
def test_a_custom_reward_that_fails_step_after_step_ends_the_run(tiny_model, tmp_path, body, reason):
    path = tmp_path / "mine.py"
    path.write_text(f"def mine(sample, caption):\n    {body}\n")
    reward = {"judge": "none", "custom": [{"name": "mine", "source": f"{path}:mine"}], "length_rule": "none"}
    trainer = Trainer(config(tiny_model, tmp_path / "run", steps=50, reward=reward))
    with pytest.raises(NothingToLearnError, match=rf"mine for 0%.*{reason}"):
        trainer.train()
    trainer.close()
    assert trainer.step == 3


def test_a_reward_with_enough_scores_goes_on(tiny_model, tmp_path):
    """``required_share`` may be lowered for a reward that is meant for some images."""
    settings = config(tiny_model, tmp_path, steps=5, reward={"required_share": 0.0, "length_rule": "none"})
    assert run(settings, BrokenJudge("some nan")).step == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rollout": {"sampling": {"max_completion_tokens": 8, "temperature": 2e-5}}}, "each image are the same"),
        ({"rollout": {"sampling": {"max_completion_tokens": 1}}}, "no reward tells the completions of an image apart"),
    ],
)  # fmt: skip
def test_a_run_with_nothing_to_learn_ends_after_some_steps(tiny_model, tmp_path, changes, reason):
    settings = config(tiny_model, tmp_path, steps=50, reward={"max_flat_steps": 4}, **changes)
    trainer = Trainer(settings, judge=SceneJudge())
    with pytest.raises(NothingToLearnError, match=rf"for 4 steps in a row .*{reason}"):
        trainer.train()
    trainer.close()
    assert trainer.step == 4


def test_weights_that_all_are_zero_are_refused(tiny_model, tmp_path):
    zero = dict.fromkeys(("precision_weight", "recall_weight", "linguistic_weight"), 0)
    for reward in (zero, {"judge": "none"}, {"judge": "none", **zero}):
        with pytest.raises(ValueError, match="no reward has a weight above 0"):
            Trainer(config(tiny_model, tmp_path, reward=reward))


# ---------------------------------------------------------------------------------------------------- the run


def test_two_runs_are_equal_bit_for_bit(tiny_model, tmp_path):
    for name in ("a", "b"):
        run(config(tiny_model, tmp_path / name), SceneJudge())
    first, second = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert reproducible_metrics(tmp_path / "a") == reproducible_metrics(tmp_path / "b")
    assert (tmp_path / "a/completions.jsonl").read_bytes() == (tmp_path / "b/completions.jsonl").read_bytes()


def test_seeds_differ(tiny_model, tmp_path):
    for seed in (0, 1):
        run(config(tiny_model, tmp_path / str(seed), steps=1, seed=seed), NoisyJudge())
    assert (tmp_path / "0/completions.jsonl").read_bytes() != (tmp_path / "1/completions.jsonl").read_bytes()


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path):
    whole = config(tiny_model, tmp_path / "whole", steps=4, optim={"schedule": "constant"})
    run(whole, NoisyJudge())
    parts = config(tiny_model, tmp_path / "parts", steps=4, checkpoint={"every": 2})
    trainer = Trainer(parts, judge=NoisyJudge())
    original = trainer.save_if_due

    def stop_after_two():
        original()
        if trainer.step == 2:
            trainer.stop_signal = 15

    trainer.save_if_due = stop_after_two
    trainer.train()
    assert trainer.step == 2
    resumed = run(parts, NoisyJudge())
    assert resumed.resumed_from == 2
    first, second = final_weights(tmp_path / "whole"), final_weights(tmp_path / "parts")
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert reproducible_metrics(tmp_path / "whole") == reproducible_metrics(tmp_path / "parts")
    again = run(parts, NoisyJudge())
    assert again.resumed_from == 4
    assert len(reproducible_metrics(tmp_path / "parts")) == 4


def test_a_run_is_not_resumed_under_another_configuration(tiny_model, tmp_path):
    run(config(tiny_model, tmp_path, steps=1), NoisyJudge())
    with pytest.raises(ValueError, match="optim"):
        Trainer(config(tiny_model, tmp_path, steps=2, optim={"lr": 5e-4}))
    with pytest.raises(ValueError, match="another output_dir"):
        Trainer(config(tiny_model, tmp_path, steps=2, checkpoint={"resume": False}))


def test_a_run_of_before_there_were_marks_goes_on(tiny_model, tmp_path):
    run(config(tiny_model, tmp_path, steps=1), NoisyJudge())
    (tmp_path / ".balcaprl-run").unlink()
    (tmp_path / "eval_images" / "mine.png").write_bytes(b"mine")
    assert run(config(tiny_model, tmp_path, steps=2), NoisyJudge()).resumed_from == 1
    assert (tmp_path / ".balcaprl-run").is_file()
    assert (tmp_path / "eval_images" / "mine.png").read_bytes() == b"mine"


def test_two_trainers_do_not_share_a_folder(tiny_model, tmp_path):
    first = Trainer(config(tiny_model, tmp_path, steps=1), judge=NoisyJudge())
    try:
        with pytest.raises(PathInUseError, match=r"output_dir: .* this very process"):
            Trainer(config(tiny_model, tmp_path, steps=1), judge=NoisyJudge())
    finally:
        first.close()
    Trainer(config(tiny_model, tmp_path, steps=1), judge=NoisyJudge()).close()


def test_a_trainer_evaluates_and_saves_before_it_trains(tiny_model, tmp_path):
    """The log is opened by its first line: a run that goes on from what was saved has all of it."""
    settings = config(tiny_model, tmp_path, steps=2)
    trainer = Trainer(settings, judge=NoisyJudge())
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n')
    saved = trainer.save()
    assert saved.name == "step_00000000"
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 7}]
    results = trainer.evaluate()
    assert not read_jsonl(tmp_path / "metrics.jsonl")
    lines = read_jsonl(tmp_path / "evaluations.jsonl")
    assert [line["b_capscore"] for line in lines] == [each.scores["b_capscore"] for each in results.values()]
    trainer.close()
    assert run(settings, NoisyJudge()).resumed_from == 0
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in read_jsonl(tmp_path / "evaluations.jsonl")] == [0, 0, 2, 2]
    assert len(list((tmp_path / "eval_images").glob("*.png"))) == 2


def test_an_evaluation_before_training_changes_no_number(tiny_model, tmp_path):
    for name in ("plain", "looked"):
        trainer = Trainer(config(tiny_model, tmp_path / name), judge=NoisyJudge())
        if name == "looked":
            trainer.evaluate()
        trainer.train()
        trainer.close()
    assert reproducible_metrics(tmp_path / "plain") == reproducible_metrics(tmp_path / "looked")
    first, second = (read_jsonl(tmp_path / name / "evaluations.jsonl") for name in ("plain", "looked"))
    assert second == first[:2] + first


HOPELESS = {
    "greedy": {"rollout": {"sampling": {"temperature": 1e-6, "max_completion_tokens": 8}}},
    "a group of one": {"rollout": {"group_size": 1}},
    "no reward": {"reward": {"precision_weight": 0, "recall_weight": 0, "linguistic_weight": 0}},
}
"""Settings that are refused where something is to be learnt."""


@pytest.mark.parametrize("changes", [{}, *HOPELESS.values()], ids=["ordinary", *HOPELESS])
def test_zero_steps_still_evaluates_and_reports(tiny_model, tmp_path, changes):
    run(config(tiny_model, tmp_path, steps=0, **changes), NoisyJudge())
    modes = {e["mode"]: e["b_capscore"] for e in read_jsonl(tmp_path / "evaluations.jsonl")}
    assert set(modes) == {"sampled", "greedy"}
    assert all(0 <= score <= 1 for score in modes.values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["before"] == summary["after"]
    assert summary["steps"] == 0
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_what_a_run_leaves_behind(tiny_model, tmp_path):
    run(config(tiny_model, tmp_path, steps=2, logging={"tensorboard": True}), NoisyJudge())
    line = read_jsonl(tmp_path / "metrics.jsonl")[-1]
    for key in ("reward/precision", "reward/recall", "reward/linguistic", "reward/b_capscore", "length_ratio", "loss",
                "sampling_kl", "grad_norm", "lr", "tokens_per_second", "time/sample", "time/score", "time/update",
                "time/sync", "num_unscorable", "num_flat_groups", "masked_fraction"):  # fmt: skip
        assert isinstance(line[key], int | float), key
    assert abs(line["sampling_kl"]) < 1e-4
    assert len(read_jsonl(tmp_path / "completions.jsonl")) == 2 * 12
    modes = [(e["step"], e["mode"]) for e in read_jsonl(tmp_path / "evaluations.jsonl")]
    assert modes == [(0, "sampled"), (0, "greedy"), (2, "sampled"), (2, "greedy")]
    assert list((tmp_path / "tensorboard").iterdir())
    assert len(list((tmp_path / "eval_images").glob("*.png"))) == 2
    assert json.loads((tmp_path / "summary.json").read_text())["sampler"] == "hf"


def test_training_again_after_a_stop_goes_on_and_keeps_the_log(tiny_model, tmp_path):
    """As one run without a stop does: the same lines, weights and evaluations."""
    run(config(tiny_model, tmp_path / "whole", steps=4))
    trainer = Trainer(config(tiny_model, tmp_path / "stopped", steps=4))
    log_step = trainer.log_step

    def stop_after_two(*args):
        log_step(*args)
        if trainer.step == 2:
            trainer.stop_signal = 2

    trainer.log_step = stop_after_two
    try:
        trainer.train()
        assert trainer.step == 2
        assert trainer.train()["status"] == "finished"
    finally:
        trainer.close()
    assert reproducible_metrics(tmp_path / "stopped") == reproducible_metrics(tmp_path / "whole")
    steps = [line["step"] for line in read_jsonl(tmp_path / "stopped" / "evaluations.jsonl")]
    assert steps == [line["step"] for line in read_jsonl(tmp_path / "whole" / "evaluations.jsonl")]
    ours, theirs = final_weights(tmp_path / "stopped"), final_weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
