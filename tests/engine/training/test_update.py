"""The update: the same with shared and repeated prompts, and however the batch is cut."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from device_watch import as_on_a_gpu

from balcaprl.config import SamplingConfig, TrainConfig
from balcaprl.data import load_dataset
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.policy import Policy
from balcaprl.policy.head import LogitRule
from balcaprl.rollout.hf import HFRollout
from balcaprl.training.optim import PolicyOptimizer
from balcaprl.training.reference import StartingWeights, WithoutAdapter
from balcaprl.training.update import PolicyUpdate

CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
NUM_STEPS = 5


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return build_tiny_qwen(
        tmp_path_factory.mktemp("model"), CORPUS, hidden_size=48, intermediate_size=64, num_layers=2, num_heads=4,
        vision_hidden_size=32, vision_intermediate_size=48, vision_depth=2, vision_num_heads=2, full_attention=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batches(tiny_model):
    """Rollouts of ``NUM_STEPS`` steps: 4 groups of 5 each, ragged, some without advantage, one group without any."""
    policy = Policy.from_pretrained(tiny_model, device="cpu")
    samples = load_dataset(TrainConfig().data, seed=0).train_stream(seed=0).next_decodable(4 * NUM_STEPS)
    prompts = [policy.prepare(sample) for sample in samples]
    steps = []
    for step in range(NUM_STEPS):
        mine = prompts[4 * step : 4 * step + 4]
        groups = HFRollout(policy).generate(mine, 5, SamplingConfig(max_completion_tokens=14), seed=step)
        generator = torch.Generator().manual_seed(step)
        for index, group in enumerate(groups):
            for place, rollout in enumerate(group.rollouts):
                length = min(len(rollout.completion.token_ids), 14 - 3 * ((place + index) % 4))
                ids, values = rollout.completion.token_ids, rollout.completion.sampling_logprobs
                rollout.completion = replace(
                    rollout.completion, token_ids=ids[:length], sampling_logprobs=values[:length]
                )
                advantage = float(torch.randn((), generator=generator))
                rollout.advantage = 0.0 if index == 3 or place == 1 else advantage
        steps.append(groups)
    return steps


def train(tiny_model, batches, *, adapter=False, begin=False, policy=None, loss=None, model=None, **optim):
    """Weights after the given steps, and the metrics of each."""
    options = {"lr": 1e-3, "warmup_steps": 0, "eps": 1e-4, **optim}
    config = TrainConfig.model_validate(
        {"steps": len(batches), "optim": options, "loss": loss or {}, "model": model or {}}
    )
    settings = config.model
    policy = policy or Policy.from_pretrained(tiny_model, device="cpu", freeze_vision=settings.freeze_vision)
    if settings.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    reference = None
    if config.loss.kl_coef:
        reference = Policy.from_pretrained(tiny_model, device="cpu")
        if settings.freeze_vision:
            reference.share_frozen_tower(policy)
    if adapter:
        reference = WithoutAdapter(policy)
    optimizer = PolicyOptimizer(
        policy.model.named_parameters(), config.optim, len(batches) * config.optim.epochs_per_batch
    )
    update = PolicyUpdate(policy, optimizer, config, reference)
    metrics = []
    for scored in batches:
        groups = with_advantages(scored, lambda rollout: math.nan)
        if begin:
            update.begin(groups)
        for group, known in zip(groups, scored, strict=True):
            for rollout, of in zip(group.rollouts, known.rollouts, strict=True):
                rollout.advantage = of.advantage
        metrics.append(update.run(groups))
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}, metrics


def with_advantages(groups, advantage_of):
    """A copy; as they come from the sampler no advantage is known."""
    groups = copy.deepcopy(groups)
    for group in groups:
        for rollout in group.rollouts:
            rollout.advantage = advantage_of(rollout)
    return groups


def assert_same(first, second, *, weights=2e-6):
    """Weights of steps of 1e-3 agree within float32 noise, and so does what was logged."""
    for a, b in zip(first[1], second[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for name in ("clip_fraction", "ratio_mean", "ratio_max", "kl", "sampling_kl"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5, nan_ok=True), name
    assert first[0].keys() == second[0].keys()
    for name, value in first[0].items():
        assert (second[0][name] - value).abs().max() < weights, name


CASES = {
    "plain": {},
    "sequence-mean": {"loss": {"reduction": "sequence-mean"}},
    "several-epochs": {"epochs_per_batch": 2},
    "reference": {"loss": {"kl_coef": 0.1}, "epochs_per_batch": 2},
    "frozen-tower": {"loss": {"kl_coef": 0.1}, "epochs_per_batch": 2, "model": {"freeze_vision": True}},
    "sampling-ratio": {"loss": {"sampling_ratio_cap": 1.0}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("case", CASES)
def test_shared_prompts_equal_their_repeated_twin(tiny_model, batches, case):
    shared = train(tiny_model, batches[:2], prompt_sharing="shared", **CASES[case])
    repeated = train(tiny_model, batches[:2], prompt_sharing="repeated", **CASES[case])
    assert shared[1][0]["shared_prompts"] == 1
    assert repeated[1][0]["shared_prompts"] == 0
    assert shared[1][0]["forward_tokens"] < 0.6 * repeated[1][0]["forward_tokens"]
    assert_same(shared, repeated)


def test_the_learning_curve_is_that_of_repeated_prompts(tiny_model, batches):
    """Step after step from the same rollouts, the weights of each following from those before."""
    shared = train(tiny_model, batches, prompt_sharing="shared")
    repeated = train(tiny_model, batches, prompt_sharing="repeated")
    assert_same(shared, repeated, weights=5e-6)
    start = dict(Policy.from_pretrained(tiny_model, device="cpu").model.named_parameters())
    moved = max((value - start[name]).abs().max() for name, value in shared[0].items())
    assert moved > 1e-3, "the policy must have learnt something"


@pytest.mark.parametrize(
    "options",
    [
        *CASES.values(),
        {"accumulation_steps": 3},
        {"token_budget": 150},
        {"prompt_sharing": "repeated", "accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_forward_made_before_the_scores_changes_nothing(tiny_model, batches, options):
    """Rollouts whose advantage turns out to be 0 take part in it, and add nothing."""
    plain = train(tiny_model, batches[:2], **options)
    begun = train(tiny_model, batches[:2], begin=True, **options)
    assert (begun[1][0]["forward_tokens"] > plain[1][0]["forward_tokens"]) == ("kl_coef" not in options.get("loss", {}))
    for a, b in zip(plain[1], begun[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for name, value in plain[0].items():
        assert (begun[0][name] - value).abs().max() < 2e-6, name


def test_a_forward_made_for_a_batch_without_advantages_is_dropped(tiny_model, batches):
    flat = with_advantages(batches[0], lambda rollout: 0.0)
    weights, (skipped, after) = train(tiny_model, [flat, batches[0]], begin=True)
    assert skipped["num_skipped_updates"] == 1
    assert after["num_skipped_updates"] == 0
    expected, _ = train(tiny_model, [flat, batches[0]])
    assert all((weights[name] - value).abs().max() < 2e-6 for name, value in expected.items())


def test_a_forward_of_another_batch_is_refused(tiny_model, batches):
    config = TrainConfig.model_validate({"steps": 1})
    policy = Policy.from_pretrained(tiny_model, device="cpu")
    update = PolicyUpdate(policy, PolicyOptimizer(policy.model.named_parameters(), config.optim, 1), config)
    update.begin(batches[0])
    with pytest.raises(RuntimeError, match="another batch"):
        update.run(copy.deepcopy(batches[0]))
    assert not math.isnan(update.run(batches[0])["loss"]), "what was begun is forgotten"


@pytest.mark.parametrize("prompt_sharing", ["shared", "repeated"])
def test_no_cut_changes_the_update(tiny_model, batches, prompt_sharing):
    """In 1, 2 or 3 parts, and under budgets that split groups: the same weights."""
    whole = train(tiny_model, batches[:1], prompt_sharing=prompt_sharing)
    assert whole[1][0]["num_parts"] == 1
    longest = max(len(g.prompt.prompt_ids) for g in batches[0]) + 14
    for cut in (
        {"accumulation_steps": 2},
        {"accumulation_steps": 3},
        {"token_budget": 2 * longest},
        {"token_budget": longest},
    ):
        parts = train(tiny_model, batches[:1], prompt_sharing=prompt_sharing, **cut)
        assert parts[1][0]["num_parts"] > 1
        assert_same(parts, whole)
        if cut == {"token_budget": longest}:
            assert parts[1][0]["num_split_groups"] > 0


def test_adapters_equal_their_repeated_twin(tiny_model, batches):
    peft = pytest.importorskip("peft", reason="LoRA is an extra: pip install 'balcaprl[lora]'")

    def adapted():
        stock = Policy.from_pretrained(tiny_model, device="cpu")
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return Policy.from_model(peft.get_peft_model(stock.model, config), stock.processor)

    options = {"adapter": True, "loss": {"kl_coef": 0.1}, "epochs_per_batch": 2}
    shared = train(tiny_model, batches[:2], policy=adapted(), prompt_sharing="shared", **options)
    repeated = train(tiny_model, batches[:2], policy=adapted(), prompt_sharing="repeated", **options)
    assert shared[1][0]["kl"] > 0
    assert all("lora_" in name for name in shared[0])
    assert_same(shared, repeated)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_head_that_is_no_matrix_trains_alike(tiny_model, batches, epochs):
    """A cap far above all logits changes nothing, but has the logits computed as the model does."""
    policies = [Policy.from_pretrained(tiny_model, device="cpu") for _ in range(2)]
    policies[1].logit_rule = LogitRule(softcap=1e5)
    assert [policy.head.is_linear for policy in policies] == [True, False]
    options = {"loss": {"kl_coef": 0.1}, "epochs_per_batch": epochs}
    assert_same(*(train(tiny_model, batches, policy=policy, **options) for policy in policies), weights=1e-4)


def test_on_policy_ratios_are_exactly_one_and_no_forward_is_repeated(tiny_model, batches, monkeypatch):
    forwards = []
    original = Policy.hidden_states
    policies = [Policy.from_pretrained(tiny_model, device="cpu") for _ in range(2)]  # which has forwards of its own
    monkeypatch.setattr(Policy, "hidden_states", lambda self, packed: forwards.append(1) or original(self, packed))
    _, (once,) = train(tiny_model, batches[:1], policy=policies[0])
    assert (once["ratio_mean"], once["ratio_max"]) == (1.0, 1.0)
    assert len(forwards) == 1
    _, (twice,) = train(tiny_model, batches[:1], policy=policies[1], epochs_per_batch=2)
    assert twice["ratio_max"] > 1.0
    assert len(forwards) == 3


def test_rollouts_without_advantage_stay_out_of_the_forward(tiny_model, batches):
    groups = copy.deepcopy(batches[0])
    _, (metrics,) = train(tiny_model, [groups])
    live = [(g, [r for r in g.rollouts if r.advantage and r.completion.token_ids]) for g in groups]
    expected = sum(
        len(g.prompt.prompt_ids) + sum(len(r.completion.token_ids) - 1 for r in each) for g, each in live if each
    )
    assert metrics["forward_tokens"] == expected
    for group in groups:
        for rollout in group.rollouts:
            rollout.advantage = 0.0
    weights, (metrics,) = train(tiny_model, [groups])
    assert metrics["num_skipped_updates"] == 1
    assert math.isnan(metrics["loss"])
    start = dict(Policy.from_pretrained(tiny_model, device="cpu").model.named_parameters())
    assert all(torch.equal(value, start[name]) for name, value in weights.items())


@pytest.mark.parametrize("prompt_sharing", ["shared", "repeated"])
def test_a_budget_below_one_completion_names_the_sample(tiny_model, batches, prompt_sharing):
    with pytest.raises(
        ValueError, match=r"token_budget: groups\[\d\] \(.*\) needs \d+ tokens .* the budget is 10: raise"
    ):
        train(tiny_model, batches[:1], prompt_sharing=prompt_sharing, token_budget=10)


@pytest.mark.parametrize("epochs", [1, 2])
def test_on_a_gpu_the_host_reads_metrics_and_nothing_before(tiny_model, batches, monkeypatch, epochs):
    """In two parts, with a reference. Later epochs also read how many tokens are left that the clip did not stop."""
    pytest.importorskip("triton", reason="the path of a GPU needs triton")
    policy = Policy.from_pretrained(tiny_model, device="cpu", fused_layers=False)
    config = TrainConfig.model_validate(
        {"optim": {"epochs_per_batch": epochs, "accumulation_steps": 2}, "loss": {"kl_coef": 0.1}}
    )
    optimizer = PolicyOptimizer(policy.model.named_parameters(), config.optim, epochs)
    reference = StartingWeights(policy, policy)
    update = PolicyUpdate(policy, optimizer, config, reference)
    watch = as_on_a_gpu(monkeypatch)
    parts, _ = update.pack_parts(batches[0])
    assert len(parts) == 2
    watch.put_policy(policy, *(part.packed for part in parts))
    watch.put([value for _, value in reference._pairs])
    for epoch in range(epochs):
        with watch.watching():
            update._accumulate(batches[0], parts, 100.0)
        metrics = {("tolist", "training/update.py _accumulate"): 1}
        clipped = {("item", "head/triton_chunks.py tokens"): 2} if epoch else {}
        assert watch.waits == metrics | clipped
        watch.waits.clear()
    assert all(watch.checked)
    assert len(watch.checked) == 2 + 2 * epochs, "those of the reference and of the losses"
