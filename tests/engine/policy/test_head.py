"""The head as the model has it: adapted, biased, scaled, capped, kept twice; its values, and every gradient."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from balcaprl.policy import Group, Policy, PolicyMismatchError
from balcaprl.torchvision_compat import ensure_importable

ensure_importable()
import transformers as hf  # noqa: E402

peft = pytest.importorskip("peft", reason="LoRA is an extra: pip install 'balcaprl[lora]'")
VOCAB = 96
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
PROCESSOR = SimpleNamespace(pad_token_id=0, eos_token_id=1)


class OtherLogits(hf.Qwen2ForCausalLM):
    """Does to its logits what ``config.does`` says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        logits, config = output.logits, self.config
        output.logits = {
            "scale": lambda: logits * config.logit_scale,
            "divide": lambda: logits / config.logits_scaling,
            "cap": lambda: torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping,
            "scale and cap": lambda: (
                torch.tanh(logits * config.output_multiplier / config.logits_soft_cap) * config.logits_soft_cap
            ),
            "cube": lambda: logits**3,
            "shift": lambda: logits + torch.linspace(0, 1, logits.shape[-1]),
        }[config.does]()
        return output


RULES = {
    "scale": {"logit_scale": 0.0625},
    "divide": {"logits_scaling": 8.0},
    "cap": {"final_logit_softcapping": 5.0},
    "scale and cap": {"output_multiplier": 3.0, "logits_soft_cap": 12.0},
}


def make_model(tied=False, does=None, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = hf.Qwen2Config(**SIZES, tie_word_embeddings=tied)
        for name, value in fields.items():
            setattr(config, name, value)
        config.does = does
        model = (OtherLogits if does else hf.Qwen2ForCausalLM)(config)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)
    return model


def adapted(tied, **options):
    """All that peft can do to a head."""
    model = make_model(tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "lora_magnitude" in name:
                    parameter += 0.05 * torch.randn(parameter.shape)
    return model


def biased():
    model = make_model()
    head = nn.Linear(48, VOCAB)
    head.weight.data = model.lm_head.weight.data
    head.bias.data = torch.linspace(-2, 2, VOCAB)
    model.lm_head = head
    return model


def biased_and_adapted():
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["lm_head"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(biased(), config)


HEADS = {
    "plain": make_model,
    "adapter": lambda: adapted(False, target_modules=["q_proj", "lm_head"]),
    "adapter on a tied head": lambda: adapted(True, target_modules=["q_proj", "lm_head"]),
    "adapter on the embedding": lambda: adapted(True, target_modules=["q_proj", "embed_tokens"]),
    "kept twice": lambda: adapted(False, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "dora": lambda: adapted(False, target_modules=["lm_head"], use_dora=True),
    "adapter with a bias": lambda: adapted(False, target_modules=["lm_head"], lora_bias=True),
    "rank-stabilised": lambda: adapted(False, target_modules=["lm_head"], use_rslora=True),
    "bias": biased,
    "bias and adapter": biased_and_adapted,
    **{name: (lambda name=name: make_model(does=name, **RULES[name])) for name in RULES},
}


def groups():
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(10, VOCAB, (count,), generator=generator)

    return [Group(ids(5), [ids(4), ids(2)], {}), Group(ids(3), [ids(3)], {})]


def stock_logprobs(model, temperature=1.0):
    parts = []
    for group in groups():
        for completion in group.completions:
            ids = torch.cat([group.prompt_ids, completion])[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(group.prompt_ids) - 1 : -1]
            parts.append((logits / temperature).log_softmax(-1).gather(-1, completion[:, None])[:, 0])
    return torch.cat(parts)


def gradients(model, logprobs):
    model.zero_grad()
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharing", ["shared", "repeated"])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_the_models(kind, sharing):
    model = HEADS[kind]()
    policy = Policy.from_model(model, PROCESSOR)
    expected = stock_logprobs(model, 0.7)
    expected_gradients = gradients(model, expected)
    found = policy.logprobs(policy.pack(groups(), sharing), 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found_gradients = gradients(model, found)
    assert found_gradients.keys() == expected_gradients.keys()
    largest = max(float(each.norm()) for each in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        # A key's bias shifts all scores of a query alike: its true gradient is 0, and only rounding is left of it.
        floor = 0.01 * largest if name.endswith("k_proj.bias") else 1e-6 * largest
        assert (found_gradients[name] - gradient).norm() <= 1e-4 * max(gradient.norm(), floor), name


@pytest.mark.parametrize("kind", ["adapter", "adapter on a tied head", "bias", "dora", *RULES])
def test_banned_ids_leave_the_distribution_of_any_head(kind, monkeypatch):
    model = HEADS[kind]()
    policy = Policy.from_model(model, PROCESSOR)
    monkeypatch.setattr(Policy, "image_token_ids", property(lambda self: (2, 3, 7)))
    packed = policy.pack(groups())
    with torch.no_grad():
        logits = policy.head.logits(policy.hidden_states(packed))
        logits[:, [2, 3, 7]] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, packed.targets[:, None])[:, 0]
        found = policy.logprobs(packed, exclude_banned=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_of_a_head_can_be_disabled():
    model = HEADS["adapter"]()
    policy = Policy.from_model(model, PROCESSOR)
    with_adapter = policy.logprobs(policy.pack(groups())).detach()
    with policy.adapter_disabled(), model.disable_adapter():
        without, expected = policy.logprobs(policy.pack(groups())).detach(), stock_logprobs(model).detach()
    torch.testing.assert_close(without, expected, rtol=1e-4, atol=1e-4)
    assert (without - with_adapter).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RULES)
def test_the_rule_is_found_whatever_the_size_of_a_fresh_models_logits(kind, dtype, caplog):
    """Small logits hardly show a cap; trained ones would."""
    model = make_model(does=kind, **RULES[kind])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    with caplog.at_level(logging.INFO):
        rule = Policy.from_model(model.to(dtype), PROCESSOR).logit_rule
    scale = {"scale": 0.0625, "divide": 0.125, "cap": 1.0, "scale and cap": 3.0}[kind]
    assert (rule.scale, rule.softcap) == (scale, {"cap": 5.0, "scale and cap": 12.0}.get(kind))
    assert "logits are scaled by" in caplog.text


@pytest.mark.parametrize("kind", ["cube", "shift"])
def test_other_logits_are_refused_with_what_is_known(kind):
    with pytest.raises(PolicyMismatchError, match=r"'qwen2': its logits are not .* differ by .*logit_scale = 2"):
        Policy.from_model(make_model(does=kind, logit_scale=2.0), PROCESSOR)


def test_a_cap_that_is_configured_and_not_used_is_not_applied():
    model = make_model(final_logit_softcapping=5.0)
    assert Policy.from_model(model, PROCESSOR).logit_rule.softcap is None


def test_loading_touches_no_random_state():
    model = make_model()
    before = torch.get_rng_state()
    Policy.from_model(model, PROCESSOR)
    assert torch.equal(before, torch.get_rng_state())
    assert model.generation_config.max_new_tokens is None, "what generate is told for the comparison does not stay"
    assert not model.model._forward_hooks
