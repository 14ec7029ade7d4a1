"""Groups with their prompt once equal the stock forward of one sequence at a time, for every family."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from product_watch import ProductWatch, poisoned
from small_policies import (
    FAMILIES,
    IMAGE,
    TEXT,
    VOCAB,
    hf,
    make_group,
    make_groups,
    make_policy,
)

from balcaprl.config import SamplingConfig
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over
from balcaprl.policy import Group, Policy
from balcaprl.policy.layers.fused import stock_layers
from balcaprl.rollout.hf import HFRollout
from balcaprl.types import Prompt


def stock_logprobs(policy, groups):
    """What transformers itself says, one unpadded sequence at a time."""
    parts = []
    for each in groups:
        for completion in each.completions:
            ids = torch.cat([each.prompt_ids, completion])[None]
            extra = dict(each.image_inputs)
            if "image_grid_thw" in extra:
                extra["mm_token_type_ids"] = (ids == IMAGE).int()
            with stock_layers(policy.model):
                logits = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0]
            start = len(each.prompt_ids) - 1
            logprobs = logits[start : start + len(completion)].log_softmax(-1)
            parts.append(logprobs.gather(-1, completion[:, None])[:, 0])
    return torch.cat(parts)


def run(policy, function):
    """Log-probabilities and every parameter's gradient of a fixed weighting of them."""
    policy.model.zero_grad()
    logprobs = function()
    (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum().backward()
    return logprobs.detach(), {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}


def assert_equal(actual, expected, tolerance):
    """Relative errors, in the norm of each tensor."""
    (logprobs, gradients), (logprobs_expected, gradients_expected) = actual, expected
    assert (logprobs - logprobs_expected).norm() / logprobs_expected.norm() < tolerance
    assert gradients.keys() == gradients_expected.keys()
    largest = max(gradient.norm() for gradient in gradients_expected.values())
    for name, gradient in gradients_expected.items():
        # A key's bias shifts all scores of a query alike: its true gradient is 0, and only rounding is left of it.
        floor = 0.01 * largest if name.endswith(("k_proj.bias", "attn.qkv.bias")) else 1e-30
        assert (gradients[name] - gradient).norm() / max(gradient.norm(), floor) < tolerance, name


@pytest.fixture
def no_float32_islands(monkeypatch):
    """transformers computes norms and rotary embeddings in float32 even inside a float64 model, and thus rounds the
    gradients of each row; the float64 comparison keeps them in float64, on both sides."""
    to = torch.Tensor.to

    def keep_double(self, *args, **kwargs):
        if self.dtype == torch.float64:
            args = tuple(torch.float64 if a == torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v == torch.float32 else v for k, v in kwargs.items()}
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_double)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else to(self, torch.float32)
    )


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("no_float32_islands")
def test_equals_the_stock_forward_in_float64(name, tied):
    policy = make_policy(name, torch.float64, tied)
    groups = make_groups(policy)
    expected = run(policy, lambda: stock_logprobs(policy, groups))
    for sharing in ("shared", "repeated"):
        assert_equal(run(policy, lambda s=sharing: policy.logprobs(policy.pack(groups, s))), expected, 1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_stock_forward_in_float32(name):
    policy = make_policy(name)
    groups = make_groups(policy)
    expected = run(policy, lambda: stock_logprobs(policy, groups))
    assert_equal(run(policy, lambda: policy.logprobs(policy.pack(groups, "shared"))), expected, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_changes_nothing(name):
    policy = make_policy(name)
    packed = policy.pack(make_groups(policy), "shared")
    expected = run(policy, lambda: policy.logprobs(packed))
    calls = []
    handle = policy.text_model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    policy.enable_gradient_checkpointing()
    actual = run(policy, lambda: policy.logprobs(packed))
    handle.remove()
    assert len(calls) == 2, "the layer must have run again in the backward"
    assert not any(module.training for module in policy.model.modules())
    assert_equal(actual, expected, 1e-6)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])
def test_compiled_layers_change_nothing(name):
    policy = make_policy(name)
    batches = [policy.pack(make_groups(policy), "shared"), policy.pack(make_groups(policy)[:2], "shared")]
    expected = [run(policy, lambda p=packed: policy.logprobs(p)) for packed in batches]
    policy.compile_layers()
    for packed, plain in zip(batches, expected, strict=True):
        assert_equal(run(policy, lambda p=packed: policy.logprobs(p)), plain, 1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen3"])
def test_autocast_equals_its_repeated_twin(name):
    """bfloat16 products round differently in the two layouts: both stay within its error of the float32 result."""
    policy = make_policy(name)

    def compared(seed):
        policy.autocast_dtype = None
        groups = make_groups(policy, seed)
        exact = run(policy, lambda: policy.logprobs(policy.pack(groups, "shared")))
        policy.autocast_dtype = torch.bfloat16
        results = [run(policy, lambda s=s: policy.logprobs(policy.pack(groups, s))) for s in ("shared", "repeated")]
        errors = [(logprobs - exact[0]).norm() / exact[0].norm() for logprobs, _ in results]
        assert errors[0] > 1e-5, "nothing was computed in bfloat16"
        yield Compared("logprobs", *(each[0] for each in results), exact[0].double())
        names = [n for n in exact[1] if not n.endswith(("k_proj.bias", "qkv.bias"))]
        sides = [torch.cat([(g[n] / exact[1][n].norm()).flatten() for n in names]) for _, g in (*results, exact)]
        yield Compared("gradients", *sides[:2], sides[2].double(), "gradient")

    assert_as_accurate_over(compared, num_problems=2, most=32)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava"])
def test_a_frozen_tower_runs_once_per_batch(name):
    policy = make_policy(name, freeze_vision=True)
    groups = make_groups(policy)
    expected = run(policy, lambda: stock_logprobs(policy, groups))
    tower = policy.family.vision_modules(policy.model)[0]
    calls = []
    tower.register_forward_hook(lambda *_: calls.append(1))
    packed = policy.pack(groups, "shared")
    for _ in range(2):
        assert_equal(run(policy, lambda: policy.logprobs(packed)), expected, 1e-5)
    reference = make_policy(name)
    reference.share_frozen_tower(policy)
    own = make_policy(name).logprobs(packed).detach()
    torch.testing.assert_close(reference.logprobs(packed).detach(), own, rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    assert any("merger" in n or "projector" in n for n in expected[1])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "llama"])
def test_adapters_train_and_their_absence_is_the_reference(name):
    stock = make_policy(name)  # first: it makes torchvision importable, which peft wants
    peft = pytest.importorskip("peft", reason="LoRA is an extra: pip install 'balcaprl[lora]'")
    groups = make_groups(stock)
    before = stock.logprobs(stock.pack(groups, "shared")).detach()
    names = ["q_proj", "v_proj", "down_proj"]
    adapted = peft.get_peft_model(stock.model, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    policy = Policy.from_model(adapted, stock.processor)
    results = [run(policy, lambda s=s: policy.logprobs(policy.pack(groups, s))) for s in ("shared", "repeated")]
    assert results[0][1]
    assert all("lora_" in n for n in results[0][1])
    assert_equal(*results, 1e-5)
    assert (results[0][0] - before).abs().max() > 1e-4
    with policy.adapter_disabled():
        torch.testing.assert_close(policy.logprobs(policy.pack(groups, "shared")).detach(), before)
    with pytest.raises(ValueError, match="no adapter"), make_policy(name).adapter_disabled():
        pass


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "llama"])
def test_the_transformers_sampler_agrees(name):
    """It decodes from the same embeddings: what it says of its samples is what the packed batch says."""
    policy = make_policy(name)
    policy.processor = SimpleNamespace(
        pad_token_id=0, eos_token_id=1, batch_decode=lambda rows, **_: [" ".join(map(str, row)) for row in rows]
    )
    groups = [make_group(policy, [(4, 4)], [], 0), make_group(policy, [(6, 8)], [], 1)]
    prompts = [Prompt(None, g.prompt_ids, g.image_inputs, None, "") for g in groups]
    sampled = HFRollout(policy).generate(prompts, 3, SamplingConfig(max_completion_tokens=6), seed=0)
    rollouts = [[r.completion for r in group.rollouts] for group in sampled]
    ids = [[torch.tensor(c.token_ids) for c in each] for each in rollouts]
    packed = policy.pack([replace(g, completions=each) for g, each in zip(groups, ids, strict=True)], "shared")
    expected = torch.tensor([value for each in rollouts for c in each for value in c.sampling_logprobs])
    torch.testing.assert_close(policy.logprobs(packed, exclude_banned=True).detach(), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- the batch


def test_layout_of_the_shared_batch():
    policy = make_policy("llama")
    groups = [
        Group(torch.tensor([10, 11, 12]), [torch.tensor([20, 21]), torch.tensor([30])], {}),
        Group(torch.tensor([13]), [torch.zeros(0, dtype=torch.long)], {}),
        Group(torch.tensor([14, 15]), [torch.tensor([40, 41, 42])], {}),
    ]
    packed = policy.pack(groups, "shared")
    assert packed.tokens.tolist() == [[10, 11, 12, 20, 14, 15, 40, 41]]
    assert packed.positions.tolist() == [[[0, 1, 2, 3, 0, 1, 2, 3]]]
    assert packed.targets.tolist() == [20, 21, 30, 40, 41, 42]
    assert packed.predict_index.tolist() == [2, 3, 2, 5, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 3, 6]
    assert packed.group_index.tolist() == [0, 0, 1, 2]
    assert packed.prefix_layout.groups == [(0, 3, [1, 0]), (4, 2, [2])]
    assert packed.num_forward_tokens == 8
    assert packed.read.tokens.tolist() == [2, 3, 5, 6, 7]
    assert policy.pack(groups[:1], "shared").read.tokens == slice(2, 4)
    assert policy.pack(groups, "repeated").read is None


def test_order_and_split_of_groups_change_nothing():
    policy = make_policy("qwen2_5_vl", torch.float64)
    groups = make_groups(policy)
    whole = policy.logprobs(policy.pack(groups, "shared"))
    alone = torch.cat([policy.logprobs(policy.pack([group], "shared")) for group in groups])
    torch.testing.assert_close(alone, whole, rtol=1e-9, atol=1e-9)
    backwards = policy.pack([replace(g, completions=g.completions[::-1]) for g in groups[::-1]], "shared")
    parts = policy.logprobs(backwards).split([len(c) for g in groups[::-1] for c in g.completions[::-1]])
    torch.testing.assert_close(torch.cat(parts[::-1]), whole, rtol=1e-9, atol=1e-9)


def test_only_empty_completions_give_a_graph():
    policy = make_policy("qwen2_5_vl")
    logprobs = policy.logprobs(policy.pack([make_group(policy, [(4, 4)], [0, 0], 0)], "shared"))
    assert logprobs.shape == (0,)
    logprobs.sum().backward()


def test_auto_shares_where_it_saves_tokens():
    policy = make_policy("llama")
    many, one = make_group(policy, [], [3, 4], 0), make_group(policy, [], [3], 1)
    assert policy.pack([many]).prefix_layout is not None
    assert policy.pack([one]).prefix_layout is None
    assert policy.pack([one, make_group(policy, [], [90], 0)]).prefix_layout is not None, "padding is saved, too"
    assert policy.pack([one], "shared").prefix_layout is not None
    assert policy.pack([many], "repeated").prefix_layout is None


# ---------------------------------------------------------------------------------------------------- the last layer


def tokens_seen(policy, packed, part):
    """How many tokens a part of each decoder layer is given, in the forward and whatever is computed again."""
    seen = {index: [] for index in range(len(policy.text_model.layers))}
    handles = [
        layer.get_submodule(part).register_forward_hook(lambda _m, args, _o, i=i: seen[i].append(args[0].shape[1]))
        for i, layer in enumerate(policy.text_model.layers)
    ]
    run(policy, lambda: policy.logprobs(packed))
    for handle in handles:
        handle.remove()
    return list(seen.values())


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_groups", [1, 5])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava", "qwen3"])
def test_the_last_layer_computes_the_tokens_that_are_read(name, num_groups, checkpointed):
    policy = make_policy(name)
    packed = policy.pack(make_groups(policy)[:num_groups], "shared")
    read, whole = len(packed.predict_index.unique()), packed.num_forward_tokens
    assert read < whole
    if checkpointed:
        policy.enable_gradient_checkpointing()
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
        seen = tokens_seen(policy, packed, part)
        assert [set(each) for each in seen] == [{whole}, {whole}, {read}], part
    assert len(tokens_seen(policy, packed, "self_attn.q_proj")[2]) == (2 if checkpointed else 1)
    assert all(set(each) == {whole} for each in tokens_seen(policy, packed, "self_attn.k_proj"))
    repeated = policy.pack(make_groups(policy)[:num_groups], "repeated")
    assert all(set(each) == {repeated.tokens.shape[1]} for each in tokens_seen(policy, repeated, "mlp"))


def test_a_part_that_a_family_names_and_a_layer_lacks_is_an_error(monkeypatch):
    policy = make_policy("llama")
    monkeypatch.setattr(type(policy.family), "token_wise_parts", ("self_attn.q_proj", "feed_forward"))
    with pytest.raises(AttributeError, match="feed_forward"):
        policy.logprobs(policy.pack(make_groups(policy), "shared"))


def test_nothing_is_left_on_the_model_when_a_forward_fails():
    policy = make_policy("llama")
    packed = policy.pack(make_groups(policy), "shared")
    expected = policy.logprobs(packed)
    layout = packed.prefix_layout
    torn = replace(packed, prefix_layout=replace(layout, cu_seqlens=layout.cu_seqlens[None]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        policy.logprobs(torn)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in policy.text_model.layers.modules())
    assert torch.equal(policy.logprobs(packed), expected)


# ---------------------------------------------------------------------------------------------------- what it cannot


def test_errors_name_the_sample():
    policy = make_policy("qwen2_5_vl")
    good = make_group(policy, [(4, 4)], [2], 0)
    long = replace(good, completions=[torch.full((250,), 20)], name="a-long-one")
    with pytest.raises(ValueError, match=r"groups\[1\] \(a-long-one\).completions\[0\].*context of 256"):
        policy.pack([good, long])
    torn = {**good.image_inputs, "pixel_values": good.image_inputs["pixel_values"][:-4]}
    with pytest.raises(ValueError, match=r"\(sample-0\).image_inputs: image_grid_thw .* 16 patches.* has 12"):
        policy.pack([replace(good, image_inputs=torn)])
    shorter = torch.cat([good.prompt_ids[:3], good.prompt_ids[4:]])
    with pytest.raises(ValueError, match=r"\(sample-0\): the prompt holds 3 image placeholders .* make 4 features"):
        policy.pack([replace(good, prompt_ids=shorter)])
    half = {**good.image_inputs, "pixel_values": good.image_inputs["pixel_values"].bfloat16()}
    with pytest.raises(ValueError, match=r"\(other\).image_inputs\['pixel_values'\] is torch.bfloat16.*\(sample-0\)"):
        policy.pack([good, replace(good, image_inputs=half, name="other")])
    with pytest.raises(ValueError, match="takes no images"):
        make_policy("llama").pack([good])


def test_a_window_that_is_too_short_repeats_prompts_and_says_so_once(caplog):
    config = hf.Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    policy = Policy.from_model(hf.Qwen2ForCausalLM(config), SimpleNamespace(pad_token_id=0))
    groups = [make_group(policy, [], [6, 4], 0)]
    with caplog.at_level(logging.WARNING):
        first, _ = policy.pack(groups), policy.pack(groups)
    assert first.prefix_layout is None
    assert [r.getMessage() for r in caplog.records] == [
        "qwen2 repeats prompts: a sequence of 11 tokens exceeds its attention window of 8"
    ]
    expected = stock_logprobs(policy, groups)
    torch.testing.assert_close(policy.logprobs(first), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="sharing: model_type 'qwen2' cannot share prompts"):
        policy.pack(groups, "shared")
    short = policy.pack([make_group(policy, [], [2, 3], 0)], "shared")
    assert short.prefix_layout is not None


def test_an_unknown_family_runs_whole_and_is_named_once(caplog):
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 42, "patch_size": 14,
    }  # fmt: skip
    config = hf.VipLlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=vision, image_token_index=IMAGE, image_seq_length=9,
        vision_feature_layers=[-2, -3],
    )  # fmt: skip
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        policy = Policy.from_model(
            hf.VipLlavaForConditionalGeneration(config), SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0))
        )
    assert len([r for r in caplog.records if "'vipllava' is not one of qwen2_5_vl" in r.getMessage()]) == 1
    groups = []
    for seed, lengths in enumerate(([3, 0, 5], [2])):
        generator = torch.Generator().manual_seed(seed)
        completions = [torch.randint(10, VOCAB, (n,), generator=generator) for n in lengths]
        pixels = {"pixel_values": torch.randn(1, 3, 42, 42, generator=generator)}
        groups.append(Group(torch.tensor([7, *[IMAGE] * 9, 8, 9]), completions, pixels))
    assert policy.image_token_ids == (IMAGE,)
    expected = run(policy, lambda: stock_logprobs(policy, groups))
    assert_equal(run(policy, lambda: policy.logprobs(policy.pack(groups))), expected, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen_tower", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_half_precision_product_lies_beside_what_nobody_wrote(name, frozen_tower, autocast):
    """Forward, loss and backward in poisoned memory: AMX reads beside strided first operands (``kernels.products``)."""
    policy = make_policy(name, torch.float32 if autocast else torch.bfloat16)
    policy.autocast_dtype = torch.bfloat16 if autocast else None
    if frozen_tower and hasattr(policy.model.config, "vision_config"):
        for module in policy.family.vision_modules(policy.model):
            module.requires_grad_(False)
    packed = policy.pack(make_groups(policy))
    # LLaVA's tower is transformers' own code: rows of a head lie between those of others, and the last one ends the tensor.
    with poisoned(), ProductWatch(beyond=name != "llava") as watch:
        policy.logprobs(packed, exclude_banned=True).sum().backward()
    assert len(watch.seen) > 20
    assert not watch.faults
    assert all(p.grad is None or p.grad.isfinite().all() for p in policy.model.parameters())
