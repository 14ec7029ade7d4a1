"""Going on: the same weights, whoever holds them; the same reference, judge and data; what may change and what it does."""

import json
import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from balcaprl.checkpoints.checkpoint import CheckpointError, list_checkpoints
from balcaprl.config import DataConfig, TrainConfig
from balcaprl.data.digest import data_digest
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.evaluation.standalone import evaluate_checkpoint
from balcaprl.files import manifest
from balcaprl.policy import Policy
from balcaprl.reporting.metrics import read_jsonl
from balcaprl.rollout.hf import HFRollout
from balcaprl.training.resume import changed_fields, refuse_changed_config, tell_learning_rate
from balcaprl.training.trainer import Trainer
from balcaprl.types import DivergedError, RewardBreakdown, RunStoppedError

CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2,
    "vision_hidden_size": 32, "vision_intermediate_size": 48, "vision_depth": 1, "vision_num_heads": 2,
}  # fmt: skip


class NoisyJudge:
    name = "noisy"

    def score(self, sample, captions):
        seed = sum(map(ord, sample.sample_id))
        values = np.random.default_rng(seed).uniform(0.1, 0.9, size=(len(captions), 3))
        return [RewardBreakdown(*map(float, row)) for row in values]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return [build_tiny_qwen(root / str(seed), CORPUS, seed=seed, **SIZES) for seed in (0, 1)]


def config(model, out, **changes):
    plain = {
        "output_dir": str(out),
        "steps": 4,
        "threads": 1,
        "model": {"path": str(model)},
        "data": {"num_eval": 0},
        "rollout": {"sampler": "hf", "prompts_per_step": 2, "group_size": 3, "sampling": {"max_completion_tokens": 6}},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "checkpoint": {"every": 0},
        "logging": {"tensorboard": False},
    }
    for section, values in changes.items():
        plain[section] = {**plain.get(section, {}), **values} if isinstance(values, dict) else values
    return TrainConfig.model_validate(plain)


def run(settings, *, stop_at=None, judge=None, **parts):
    trainer = Trainer(settings, judge=judge or NoisyJudge(), **parts)
    if stop_at is not None:
        original = trainer.save_if_due

        def stop():
            original()
            if trainer.step == stop_at:
                trainer.stop_signal = 15

        trainer.save_if_due = stop
    try:
        trainer.train()
    finally:
        trainer.close()
    return trainer


def trained(policy):
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def whole(model, **options):
    return Policy.from_pretrained(model, device="cpu", **options)


def adapted(model, *, begun=False, seed=7, **options):
    peft = pytest.importorskip("peft", reason="LoRA is an extra: pip install 'balcaprl[lora]'")
    stock = whole(model)
    torch.manual_seed(seed)
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    settings = peft.LoraConfig(r=4, init_lora_weights=not begun, **options)
    return Policy.from_model(peft.get_peft_model(stock.model, settings), stock.processor)


POLICIES = {
    "whole": whole,
    "bfloat16": lambda model: whole(model, dtype="bfloat16"),
    "frozen tower": lambda model: whole(model, freeze_vision=True),
    "adapter": adapted,
    "adapter and norms": lambda model: adapted(model, modules_to_save=["norm"]),
    "begun adapter": lambda model: adapted(model, begun=True),
}


# ------------------------------------------------------------------------------------------------ a policy handed in


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_that_is_handed_in_again_goes_on_from_the_checkpoint(models, tmp_path, kind, kl_coef):
    """A fresh policy, as the script makes it each time, ends with the bits of a run that was never interrupted."""
    make, loss = POLICIES[kind], {"kl_coef": kl_coef}
    uninterrupted = make(models[0])
    run(config(models[0], tmp_path / "one", loss=loss), policy=uninterrupted)
    run(config(models[0], tmp_path / "two", loss=loss), policy=make(models[0]), stop_at=2)
    again = make(models[0])
    fresh = trained(again)
    resumed = run(config(models[0], tmp_path / "two", loss=loss), policy=again)
    assert resumed.resumed_from == 2
    assert same(trained(again), trained(uninterrupted))
    assert not same(trained(again), fresh)
    lines = [read_jsonl(tmp_path / out / "metrics.jsonl") for out in ("one", "two")]
    for name in ("loss", "kl", "grad_norm"):
        assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]], name
    if kl_coef:
        assert lines[0][0]["kl"] < 1e-6
        assert lines[0][-1]["kl"] > 1e-6


ADAPTERS = {
    "attention": {},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "tokens": {"trainable_token_indices": [1, 2, 3]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize(("kind", "kl_coef"), [*((kind, 0.0) for kind in ADAPTERS), ("attention", 0.1)])
def test_an_adapter_alone_goes_on_without_the_policy_too(models, tmp_path, kind, kl_coef):
    """The adapter's checkpoint and ``model.path`` are all that is needed."""
    loss = {"kl_coef": kl_coef}
    uninterrupted = adapted(models[0], **ADAPTERS[kind])
    run(config(models[0], tmp_path / "one", loss=loss), policy=uninterrupted)
    run(config(models[0], tmp_path / "two", loss=loss), policy=adapted(models[0], **ADAPTERS[kind]), stop_at=2)
    resumed = run(config(models[0], tmp_path / "two", loss=loss))
    assert same(trained(resumed.policy), trained(uninterrupted))


def test_an_adapter_alone_is_evaluated_on_the_model_that_the_user_names(models, tmp_path):
    policy = adapted(models[0])
    run(config(models[0], tmp_path / "run", steps=2), policy=policy)
    checkpoint = list_checkpoints(tmp_path / "run")[-1]
    scores = evaluate_checkpoint(checkpoint, config(models[0], tmp_path / "x", data={"num_eval": 2}), None)
    assert scores["greedy"]["num_samples"] == 2
    loaded = Policy.from_pretrained(checkpoint, device="cpu", base=models[0])
    assert same(trained(loaded), trained(policy))
    with pytest.raises(ValueError, match="name the model that it belongs to"):
        Policy.from_pretrained(checkpoint, device="cpu")


WRONG = {
    "another model": (whole, lambda models: build_other(models), "is of another model"),
    "an adapter": (
        whole,
        lambda models: adapted(models[0]),
        "holds a whole model, and the policy .* trains an adapter",
    ),
    "a whole model": (
        adapted,
        lambda models: whole(models[0]),
        "holds an adapter, and the policy .* trains a whole model",
    ),
    "another base": (adapted, lambda models: adapted(models[1]), "belongs to another model"),
    "another adapter": (adapted, lambda models: adapted(models[0], modules_to_save=["norm"]), "not that of the policy"),
}


def build_other(models):
    folder = models[0].parent / "wider"
    return whole(folder if folder.exists() else build_tiny_qwen(folder, CORPUS, **{**SIZES, "intermediate_size": 64}))


@pytest.mark.parametrize("case", WRONG)
def test_a_policy_that_the_checkpoint_does_not_fit_is_refused(models, tmp_path, case):
    make, make_wrong, message = WRONG[case]
    run(config(models[0], tmp_path, steps=1), policy=make(models[0]))
    with pytest.raises(ValueError, match=message):
        Trainer(config(models[0], tmp_path), judge=NoisyJudge(), policy=make_wrong(models))


def test_parameters_that_no_checkpoint_would_hold_are_refused(models, tmp_path):
    policy = adapted(models[0])
    name, parameter = next((n, p) for n, p in policy.model.named_parameters() if n.endswith("input_layernorm.weight"))
    parameter.requires_grad_(True)
    with pytest.raises(ValueError, match=f"{re.escape(name)} is trained beside the adapter"):
        Trainer(config(models[0], tmp_path), judge=NoisyJudge(), policy=policy)


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("kind", POLICIES)
def test_the_reference_of_a_policy_that_is_handed_in_is_what_training_starts_from(models, tmp_path, kind):
    """``model.path`` names another model, and is not asked."""
    policy = POLICIES[kind](models[0])
    run(config(models[1], tmp_path, steps=3, loss={"kl_coef": 0.1}), policy=policy)
    kl = [line["kl"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert kl[0] < (1e-3 if kind == "bfloat16" else 1e-6)
    assert kl[-1] > 1e-5


def test_a_reference_that_is_another_model_is_refused_before_the_first_update(models, tmp_path):
    policy = whole(models[0])
    trainer = Trainer(config(models[0], tmp_path, loss={"kl_coef": 0.1}), judge=NoisyJudge(), policy=policy)
    trainer.update.reference = whole(models[1])
    before = trained(policy)
    with pytest.raises(RunStoppedError, match="the reference is not what training starts from"):
        trainer.train()
    trainer.close()
    assert same(before, trained(policy))


@pytest.mark.parametrize("handed_in", [True, False])
@pytest.mark.parametrize("make", [whole, lambda model: adapted(model, begun=True)], ids=["whole", "begun adapter"])
def test_a_resumed_run_keeps_its_reference_or_is_refused(models, tmp_path, make, handed_in):
    settings = config(models[0], tmp_path, loss={"kl_coef": 0.1})
    run(settings, policy=make(models[0]), stop_at=1)
    policy = make(models[0])
    with torch.no_grad():
        next(p for p in policy.model.parameters() if p.requires_grad).add_(0.1)
    if handed_in:
        with pytest.raises(ValueError, match="reference of the run to resume were other weights"):
            Trainer(settings, judge=NoisyJudge(), policy=policy)
    elif make is whole:
        assert run(settings).step == 4, "model.path holds what the run began with"
    else:
        with pytest.raises(ValueError, match="the reference is of another model"):
            Trainer(settings, judge=NoisyJudge())


def test_a_configured_reference_that_changed_on_disk_is_refused(models, tmp_path):
    import shutil

    model = shutil.copytree(models[0], tmp_path / "model")
    settings = config(model, tmp_path / "run", loss={"kl_coef": 0.1})
    run(settings, stop_at=1)
    shutil.copyfile(models[1] / "model.safetensors", model / "model.safetensors")
    with pytest.raises(ValueError, match="reference of the run to resume were other weights"):
        Trainer(settings, judge=NoisyJudge())


# ------------------------------------------------------------------------------------------------ other parts handed in


def test_a_run_goes_on_with_the_judge_and_the_sampler_that_it_began_with(models, tmp_path):
    settings = config(models[0], tmp_path)
    run(settings, stop_at=1)
    with pytest.raises(ValueError, match=r"began with Trainer\(judge=...\), called 'noisy', and now none is passed"):
        Trainer(settings)
    policy = whole(models[0])
    with pytest.raises(ValueError, match="began without a sampler of its own, and now 'hf' is passed"):
        Trainer(settings, judge=NoisyJudge(), policy=policy, sampler=HFRollout(policy))
    assert run(settings).step == 4


def test_a_sampler_of_another_policy_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="samples from another policy"):
        Trainer(config(models[0], tmp_path), judge=NoisyJudge(), sampler=HFRollout(whole(models[0])))


def test_a_sampler_that_is_handed_in_again_is_shown_the_weights(models, tmp_path):
    class Told(HFRollout):
        versions = ()

        def sync(self, policy_version):
            self.versions = (*self.versions, policy_version)
            return super().sync(policy_version)

    for stop_at, expected in ((2, (1, 2)), (None, (2, 3, 4))):
        policy = whole(models[0])
        sampler = Told(policy)
        run(config(models[0], tmp_path), policy=policy, sampler=sampler, stop_at=stop_at)
        assert sampler.versions == expected


# ------------------------------------------------------------------------------------------------ damage


def test_a_damaged_newest_checkpoint_costs_steps_and_not_the_run(models, tmp_path, caplog):
    run(config(models[0], tmp_path / "whole"))
    settings = config(models[0], tmp_path / "hurt", checkpoint={"every": 1, "keep": 2})
    run(settings, stop_at=3)
    data = bytearray((list_checkpoints(tmp_path / "hurt")[-1] / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (list_checkpoints(tmp_path / "hurt")[-1] / "model.safetensors").write_bytes(data)
    resumed = run(settings)
    assert resumed.resumed_from == 2
    assert "model.safetensors is not what was saved" in caplog.text
    ends = [load_file(list_checkpoints(tmp_path / out)[-1] / "model.safetensors") for out in ("whole", "hurt")]
    assert same(*ends)


def test_an_optimiser_of_other_parameters_is_told_with_its_path(models, tmp_path):
    settings = config(models[0], tmp_path)
    run(settings, stop_at=1)
    path = list_checkpoints(tmp_path)[-1]
    file = path / "trainer" / "optimizer.safetensors"
    tensors = load_file(file)
    removed = next(name for name in tensors if name.startswith("exp_avg."))
    save_file({name: value for name, value in tensors.items() if name != removed}, file)
    manifest.write_manifest(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: the optimiser state lacks {re.escape(removed)}"):
        Trainer(settings, judge=NoisyJudge())


def test_leftovers_of_a_killed_save_are_gone_after_the_next_start(models, tmp_path):
    left = tmp_path / "checkpoints" / ".partial_step_00000003"
    run(config(models[0], tmp_path), stop_at=1)
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x" * 1000)
    run(config(models[0], tmp_path), stop_at=2)
    assert not left.exists()


# ------------------------------------------------------------------------------------------------ what may change


def test_a_changed_recipe_is_refused_key_by_key():
    before = TrainConfig.model_validate({"optim": {"lr": 1e-3}, "reward": {"tau_low": 0.4}})
    after = TrainConfig.model_validate({"optim": {"lr": 5e-4, "weight_decay": 0.1}, "steps": 7, "seed": 3})
    with pytest.raises(ValueError, match=r"resume: ") as caught:
        refuse_changed_config(before.model_dump(mode="json"), after)
    message = str(caught.value)
    for change in (
        "optim.lr: 0.001 -> 0.0005",
        "optim.weight_decay: 0.0 -> 0.1",
        "seed: 0 -> 3",
        "reward.tau_low: 0.4 -> 0.5",
    ):
        assert change in message
    assert "beta1" not in message
    assert "steps" not in message


def test_a_listed_change_is_made_and_said(caplog):
    before = TrainConfig().model_dump(mode="json")
    after = TrainConfig.model_validate({"optim": {"lr": 0.5}, "checkpoint": {"allow_changes": ["optim.lr"]}})
    refuse_changed_config(before, after)
    assert "resuming with optim.lr changed: 0.0001 -> 0.5" in caplog.text
    after = TrainConfig.model_validate(
        {"optim": {"lr": 0.5, "eps": 1e-3}, "checkpoint": {"allow_changes": ["optim.lr"]}}
    )
    with pytest.raises(ValueError, match=r"optim\.eps: 1e-08 -> 0\.001\. Use"):
        refuse_changed_config(before, after)
    after = TrainConfig.model_validate({"optim": {"lr": 0.5, "eps": 1e-3}, "checkpoint": {"allow_changes": ["optim"]}})
    refuse_changed_config(before, after)


@pytest.mark.parametrize("name", ["seed", "model.path", "model.dtype", "optim.lrr", "optimizer", "data", "", "model"])
def test_a_change_that_cannot_be_allowed_is_refused(name):
    with pytest.raises(ValidationError, match="allow_changes"):
        TrainConfig.model_validate({"checkpoint": {"allow_changes": [name]}})


def test_fields_that_an_older_checkpoint_does_not_know_count_as_defaults():
    saved = TrainConfig().model_dump(mode="json")
    del saved["optim"]["max_update_ratio"]
    assert changed_fields(saved, TrainConfig()) == {}
    saved["optim"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"none of this version of balcaprl: optim\.momentum"):
        changed_fields(saved, TrainConfig())


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_more_steps_under_a_schedule_say_what_the_learning_rate_does(schedule, caplog):
    optim = {"schedule": schedule, "lr": 1e-3, "warmup_steps": 0, "min_lr_ratio": 0.1}
    before = TrainConfig.model_validate({"steps": 100, "optim": optim}).model_dump(mode="json")
    tell_learning_rate(before, TrainConfig.model_validate({"steps": 200, "optim": optim}), 100)
    if schedule == "constant":
        assert not caplog.records
    else:
        assert "at update 101 it is 0.00055 (it would have been 0.0001), at the last 0.0001" in caplog.text
    caplog.clear()
    tell_learning_rate(before, TrainConfig.model_validate({"steps": 100, "optim": optim}), 50)
    assert not caplog.records


def test_a_learning_rate_can_be_changed_on_purpose(models, tmp_path):
    run(config(models[0], tmp_path), stop_at=2)
    changes = {"optim": {"lr": 1e-3}, "checkpoint": {"allow_changes": ["optim.lr"]}}
    run(config(models[0], tmp_path, **changes))
    assert [line["lr"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1e-2, 1e-2, 1e-3, 1e-3]
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.001 -> 0\.01"):
        Trainer(config(models[0], tmp_path), judge=NoisyJudge())


# ------------------------------------------------------------------------------------------------ data


def jsonl(root, captions):
    root.mkdir(exist_ok=True)
    for index in range(len(captions)):
        Image.new("RGB", (64, 64), (40 * index, 20, 90)).save(root / f"{index}.png")
    lines = [json.dumps({"image": f"{index}.png", "reference": caption}) for index, caption in enumerate(captions)]
    (root / "data.jsonl").write_text("\n".join(lines) + "\n")
    return root / "data.jsonl"


def test_data_of_the_same_length_and_other_content_are_refused(models, tmp_path):
    path = jsonl(tmp_path / "data", ["A red circle.", "A blue square.", "A green star."])
    data = {"kind": "jsonl", "path": str(path)}
    run(config(models[0], tmp_path / "run", data=data), stop_at=1)
    text = path.read_text()
    path.write_text(text.replace("red", "tan"))
    with pytest.raises(ValueError, match=r"data\.path: its content is not that which"):
        Trainer(config(models[0], tmp_path / "run", data=data), judge=NoisyJudge())
    allowed = {"allow_changes": ["data.path"]}
    assert run(config(models[0], tmp_path / "run", data=data, checkpoint=allowed), stop_at=2).step == 2
    path.write_text(text)
    with pytest.raises(ValueError, match=r"data\.path: its content"):
        Trainer(config(models[0], tmp_path / "run", data=data), judge=NoisyJudge())


def save_table(folder: Path, captions):
    import datasets

    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(captions))]
    datasets.Dataset.from_dict({"image": images, "caption": captions}).save_to_disk(str(folder))


def test_a_folders_digest_sees_every_byte_of_small_files_and_every_name(tmp_path):
    pytest.importorskip("datasets")
    settings = DataConfig(kind="hf", path=tmp_path / "a")
    save_table(tmp_path / "a", ["A red circle.", "A blue square."])
    digest = data_digest(settings)
    assert data_digest(settings) == digest
    table = next((tmp_path / "a").glob("*.arrow"))
    data = table.read_bytes()
    table.write_bytes(data.replace(b"red", b"tan"))
    assert data_digest(settings) != digest
    table.write_bytes(data)
    assert data_digest(settings) == digest
    table.rename(table.with_name("other.arrow"))
    assert data_digest(settings) != digest


def test_drawn_scenes_have_no_files():
    assert data_digest(DataConfig()) is None


# ------------------------------------------------------------------------------------------------ divergence


@pytest.mark.parametrize("lr", [1e2, 1e3, 1e9])
def test_a_learning_rate_without_sense_ends_the_run_and_ruins_nothing(models, tmp_path, lr):
    before = trained(whole(models[0]))
    settings = config(models[0], tmp_path, steps=20, optim={"lr": lr}, checkpoint={"every": 1, "keep": 1})
    trainer = Trainer(settings, judge=NoisyJudge())
    with pytest.raises(DivergedError, match=r"diverged in step 5: 5 updates in a row were refused.* lower optim\.lr"):
        trainer.train()
    trainer.close()
    assert same(trained(trainer.policy), before)
    assert len(list_checkpoints(tmp_path)) == 4, "none is dropped while updates are refused"
    lower = {"optim": {"lr": 1e-3}, "checkpoint": {"every": 1, "keep": 1, "allow_changes": ["optim.lr"]}}
    resumed = run(config(models[0], tmp_path, steps=6, **lower))
    assert resumed.resumed_from == 4
    assert not same(trained(resumed.policy), before)


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_damaged_moments_end_the_run_before_they_are_saved(models, tmp_path, moment):
    settings = config(models[0], tmp_path, steps=20, checkpoint={"every": 2, "keep": 1})
    trainer = Trainer(settings, judge=NoisyJudge())
    original = trainer.sync_weights

    def damage():
        original()
        if trainer.step == 2:
            next(iter(trainer.optimizer._adamw.state.values()))[moment].view(-1)[0] = math.nan

    trainer.sync_weights = damage
    with pytest.raises(
        DivergedError, match=rf"diverged in step 5: the {moment} of .* are not finite.* newest .*step_00000002"
    ):
        trainer.train()
    trainer.close()
    assert all(torch.isfinite(value).all() for value in trained(trainer.policy).values())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002"]
    assert run(config(models[0], tmp_path, steps=4, checkpoint={"every": 2, "keep": 1})).step == 4


def test_weights_that_become_nan_are_never_saved(models, tmp_path):
    """Something else than the optimiser breaks them: the last good checkpoint stays, and can be resumed from."""
    settings = config(models[0], tmp_path, steps=20, checkpoint={"every": 1, "keep": 1})
    trainer = Trainer(settings, judge=NoisyJudge())
    original = trainer.sync_weights

    def damage():
        original()
        if trainer.step == 2:
            with torch.no_grad():
                next(trainer.policy.model.parameters()).view(-1)[0] = math.nan

    trainer.sync_weights = damage
    with pytest.raises(DivergedError, match=r"the weights of .* are not finite"):
        trainer.train()
    trainer.close()
    assert run(config(models[0], tmp_path, steps=3)).resumed_from == 2


def test_a_policy_whose_samples_are_not_finite_ends_the_run(models, tmp_path):
    trainer = Trainer(config(models[0], tmp_path, steps=20), judge=NoisyJudge())
    with torch.no_grad():
        trainer.policy.lm_head_weight.fill_(math.nan)
    with pytest.raises(DivergedError, match="next-token distribution is not finite"):
        trainer.train()
    trainer.close()
    assert not list_checkpoints(tmp_path)


def test_logprobs_that_are_not_finite_end_the_run(models, tmp_path):
    """A sampler that does not notice by itself."""

    class Blind(HFRollout):
        def stream(self, prompts, group_size, sampling, *, seed, greedy=False):
            for draw in super().stream(prompts, group_size, sampling, seed=seed, greedy=greedy):
                draw.rollout.completion.sampling_logprobs[0] = math.nan
                yield draw

    policy = whole(models[0])
    trainer = Trainer(config(models[0], tmp_path), judge=NoisyJudge(), policy=policy, sampler=Blind(policy))
    with pytest.raises(DivergedError, match="log-probabilities of all that the policy samples"):
        trainer.train()
    trainer.close()


def test_a_disk_that_is_full_ends_the_run_and_leaves_the_last_checkpoint(models, tmp_path, monkeypatch):
    from balcaprl.checkpoints import checkpoint as module

    settings = config(models[0], tmp_path, steps=6, checkpoint={"every": 2, "keep": 1})
    run(settings, stop_at=2)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(OSError, match=r"step_00000004 could not be saved: No space left on device"):
            run(settings)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert run(settings).step == 6


def test_all_checkpoints_damaged_is_no_new_start(models, tmp_path):
    settings = config(models[0], tmp_path)
    run(settings, stop_at=1)
    (list_checkpoints(tmp_path)[-1] / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of them can be resumed from"):
        Trainer(settings, judge=NoisyJudge())


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.INFO)
