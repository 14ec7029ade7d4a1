"""The providers that ``update_step.py`` compares: different ways from the same rollouts to the same gradients.

==================  ==================================================================================================
ours                computes the prompt once per group, and the last layer and the head only at predicting positions;
                    fused small layers, ``linear_policy_loss``
repeated            stock transformers with its own layers: a padded row per completion, each with its own image
                    through the vision tower; our loss
repeated-one-tower  our layout for models that cannot share prompts: padded rows, each image through the vision tower
                    once; our fused layers
trl                 TRL 1.16's ``_compute_loss`` and ``_get_per_token_logps_and_entropies``, taken from its source and
                    run unchanged but for the decorator that logs call times, on a model with TRL's own fused head. On
                    devices without Triton, that head scores every position of every row, prompts included, as it does
                    for TRL's users
prefix-grouper      the formulation of verl's prefix grouping (``prefix_grouper_utils.pg_forward`` of verl, class
                    ``PrefixGrouper`` of johncaged/PrefixGrouper, arXiv 2506.05433), rewritten here: one padded row
                    per group. In each layer the prompt attends causally, and each completion attends, with a mask, to
                    a *copy* of the prompt's keys and values followed by its own keys and values. Logits are computed
                    at all positions. verl's grouping supports only text models. Here our code puts the image features
                    into the embeddings before the text model runs, as verl would have to if it supported images
==================  ==================================================================================================

The timed part starts from zeroed gradients and goes from rollouts to the gradients of all parameters. It includes
packing if the provider packs. TRL's padded inputs are made beforehand, because TRL makes them while it samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from ops import peers
from torch import Tensor

from balcaprl.kernels import linear_policy_loss, policy_loss
from balcaprl.policy import Group, Policy
from balcaprl.policy.forward import text_inputs
from balcaprl.policy.layers.attention import using_attention
from balcaprl.policy.layers.fused import stock_layers

PREFIX_GROUPER = "bench_prefix_grouper"
TEXT_TOKENS = 25
"""Number of text tokens of each prompt, in addition to its image tokens."""
_VISION_START, _VISION_END, _IMAGE, _FIRST_WORD = 3, 4, 5, 10

SIZES: dict[str, dict[str, Any]] = {
    "3m": {"hidden": 192, "inner": 512, "layers": 4, "heads": 3, "kv": 1, "vocabulary": 4096, "tower": 96, "blocks": 3},
    "8m": {"hidden": 256, "inner": 704, "layers": 6, "heads": 4, "kv": 2, "vocabulary": 4096, "tower": 128, "blocks": 4},
    "33m": {"hidden": 512, "inner": 1408, "layers": 8, "heads": 8, "kv": 2, "vocabulary": 8192, "tower": 256, "blocks": 6},
    "120m": {"hidden": 768, "inner": 2048, "layers": 14, "heads": 12, "kv": 4, "vocabulary": 16384, "tower": 384, "blocks": 8},
    "3b": {"hidden": 2048, "inner": 11008, "layers": 36, "heads": 16, "kv": 2, "vocabulary": 151_936, "tower": 1280,
           "blocks": 32},
}  # fmt: skip
"""Shapes of Qwen2.5-VL models by approximate number of parameters, with tied embeddings, full attention in two blocks
of the vision tower and windowed attention in the others. 3b is the shape of Qwen2.5-VL-3B with heads of 128; the other
sizes have heads of 64."""


@dataclass(frozen=True)
class Shape:
    """The shape of one batch of rollouts, and the size of the model."""

    size: str
    group_size: int
    image_tokens: int
    completion: int
    """Mean number of tokens per completion."""
    ragged: bool = True
    """Whether lengths vary from half of the mean to one and a half times the mean; otherwise all are equal."""
    groups: int = 1

    @property
    def prompt(self) -> int:
        """Number of prompt tokens, image tokens included."""
        return self.image_tokens + TEXT_TOKENS

    @property
    def name(self) -> str:
        """The shape's name in result rows and tables."""
        kind = "~" if self.ragged else ""
        return (
            f"{self.size} B{self.groups} G{self.group_size} image{self.image_tokens} completion{kind}{self.completion}"
        )

    def lengths(self) -> list[list[int]]:
        """The completion lengths of each group."""
        if not self.ragged:
            return [[self.completion] * self.group_size] * self.groups
        generator = torch.Generator().manual_seed(0)
        spread = torch.linspace(0.5, 1.5, self.group_size) * self.completion
        return [
            spread[torch.randperm(self.group_size, generator=generator)].round().clamp(min=1).int().tolist()
            for _ in range(self.groups)
        ]


def build_policy(size: str, device: torch.device, dtype: torch.dtype) -> Policy:
    """A random model of one of ``SIZES``."""
    from balcaprl.torchvision_compat import ensure_importable

    ensure_importable()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    s = SIZES[size]
    head_dim = s["hidden"] // s["heads"]
    sections = [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]
    text = {
        "vocab_size": s["vocabulary"], "hidden_size": s["hidden"], "intermediate_size": s["inner"],
        "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"], "num_key_value_heads": s["kv"],
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1,
        "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": s["blocks"], "hidden_size": s["tower"], "intermediate_size": s["tower"] * 11 // 4,
        "num_heads": max(4, s["tower"] // 80),
        "out_hidden_size": s["hidden"], "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
        "fullatt_block_indexes": [s["blocks"] // 2 - 1, s["blocks"] - 1],
    }  # fmt: skip
    ids = {
        "image_token_id": _IMAGE,
        "video_token_id": 6,
        "vision_start_token_id": _VISION_START,
        "vision_end_token_id": _VISION_END,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    torch.manual_seed(0)
    with device:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.to(device)
    return Policy.from_model(model, SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)))


@dataclass(frozen=True)
class Rollouts:
    """The rollouts that every provider gets."""

    groups: list[Group]
    advantages: Tensor
    """(R,) float32 advantages, one per completion."""

    @property
    def rows(self) -> list[tuple[Group, Tensor]]:
        """One (group, completion) per rollout, in order."""
        return [(group, completion) for group in self.groups for completion in group.completions]


def make_rollouts(shape: Shape, policy: Policy) -> Rollouts:
    """Rollouts with random images and words, and with evenly spaced advantages from -1 to 1."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = policy.lm_head_weight.shape[0]
    edge = round(shape.image_tokens**0.5)
    if edge * edge != shape.image_tokens:
        raise ValueError(f"image_tokens: {shape.image_tokens} is not a square number")
    grid = torch.tensor([[1, 2 * edge, 2 * edge]])

    def words(count: int) -> Tensor:
        return torch.randint(_FIRST_WORD, vocabulary, (count,), generator=generator)

    groups = []
    for lengths in shape.lengths():
        pixels = torch.randn(4 * shape.image_tokens, 3 * 2 * 14 * 14, generator=generator)
        before, after = words(3), words(TEXT_TOKENS - 5)
        image = torch.tensor([_VISION_START, *[_IMAGE] * shape.image_tokens, _VISION_END])
        inputs = {
            "pixel_values": pixels.to(policy.device, policy.dtype),
            "image_grid_thw": grid,  # on the CPU, because that is where the transformers processor creates it
        }
        groups.append(Group(torch.cat([before, image, after]), [words(n) for n in lengths], inputs))
    advantages = torch.linspace(-1, 1, shape.groups * shape.group_size)
    return Rollouts(groups, advantages.to(policy.device))


# Providers. Each is called once with policy and rollouts, and returns a forward function that computes the loss.

Forward = Callable[[], Tensor]


def ours(policy: Policy, rollouts: Rollouts) -> Forward:
    """The provider ``ours`` of the module's table."""
    return lambda: _packed_loss(policy, rollouts, "shared")


def repeated_one_tower(policy: Policy, rollouts: Rollouts) -> Forward:
    """The provider ``repeated-one-tower`` of the module's table."""
    return lambda: _packed_loss(policy, rollouts, "repeated")


def _packed_loss(policy: Policy, rollouts: Rollouts, sharing: Any) -> Tensor:
    packed = policy.pack(rollouts.groups, sharing)
    hidden = policy.hidden_states(packed)
    return _head_loss(policy, rollouts, hidden, packed.targets, packed.cu_seqlens)


def _head_loss(policy: Policy, rollouts: Rollouts, hidden: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    weight = policy.lm_head_weight
    return linear_policy_loss(hidden, weight, targets, None, rollouts.advantages, cu_seqlens).loss


def repeated(policy: Policy, rollouts: Rollouts) -> Forward:
    """The provider ``repeated`` of the module's table."""

    def forward() -> Tensor:
        batch = _padded_rows(policy, rollouts)
        hidden = policy.stock_model.model(**batch, use_cache=False).last_hidden_state
        width = hidden.shape[1]
        index, lengths = [], []
        for row, (group, completion) in enumerate(rollouts.rows):
            first = row * width + len(group.prompt_ids) - 1
            index.append(torch.arange(first, first + len(completion)))
            lengths.append(len(completion))
        targets = torch.cat([completion for _, completion in rollouts.rows]).to(policy.device)
        at_predicting = hidden.flatten(0, 1).index_select(0, torch.cat(index).to(policy.device))
        return _head_loss(policy, rollouts, at_predicting, targets, _cumulated(lengths, policy.device))

    return forward


def _padded_rows(policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    """The model's inputs as right-padded rows, each with its own copy of the image."""
    rows = [torch.cat([group.prompt_ids, completion]) for group, completion in rollouts.rows]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    return {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1], device=policy.device) < lengths[:, None]).long(),
        "mm_token_type_ids": (tokens == _IMAGE).int(),
        **_repeated_images(rollouts),
    }


def _repeated_images(rollouts: Rollouts) -> dict[str, Tensor]:
    names, device = ("pixel_values", "image_grid_thw"), rollouts.advantages.device
    return {name: torch.cat([group.image_inputs[name] for group, _ in rollouts.rows]).to(device) for name in names}


def trl(policy: Policy, rollouts: Rollouts) -> Forward:
    """The provider ``trl`` of the module's table.

    Raises:
        ImportError: TRL is not installed.
    """
    from contextlib import nullcontext

    from trl.trainer.utils import add_fused_lm_head

    model = policy.stock_model
    if not hasattr(model, "bench_fused_head"):
        add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
        model.bench_fused_head = True
    inputs = _trl_inputs(policy, rollouts)
    trainer = peers._trl_trainer(peers.LossSettings("dapo"))
    trainer.accelerator.autocast = nullcontext
    definition = copy.copy(peers._trl_definition("grpo_trainer", "_get_per_token_logps_and_entropies"))
    definition.decorator_list = []  # drops the decorator, which logs how long a call takes
    score = peers._compiled([definition], definition.name)
    trainer._get_per_token_logps_and_entropies = lambda *arguments, **more: score(trainer, *arguments, **more)
    compute = peers._trl_method("_compute_loss")
    return lambda: compute(trainer, model, inputs)


def _trl_inputs(policy: Policy, rollouts: Rollouts) -> dict[str, Any]:
    """TRL's inputs as ``_generate_and_score_completions`` returns them: prompts padded on the left, completions on the
    right, and an image per row."""
    device = policy.device
    prompts, completions = [group.prompt_ids for group, _ in rollouts.rows], [c for _, c in rollouts.rows]
    prompt_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
    completion_ids = torch.nn.utils.rnn.pad_sequence(completions, batch_first=True).to(device)
    sides = {"prompt": (prompt_ids, prompts), "completion": (completion_ids, completions)}
    masks = {}
    for name, (ids, parts) in sides.items():
        lengths = torch.tensor([len(part) for part in parts], device=device)[:, None]
        place = torch.arange(ids.shape[1], device=device)
        masks[name] = (place >= ids.shape[1] - lengths if name == "prompt" else place < lengths).long()
    types = torch.cat([(prompt_ids == _IMAGE).long(), torch.zeros_like(completion_ids)], dim=1)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": masks["prompt"],
        "completion_ids": completion_ids,
        "completion_mask": masks["completion"],
        "advantages": rollouts.advantages,
        "num_items_in_batch": masks["completion"].sum(),
        "num_images": [1] * len(prompts),
        "mm_token_type_ids": types,
        **_repeated_images(rollouts),
    }


def prefix_grouper(policy: Policy, rollouts: Rollouts) -> Forward:
    """The provider ``prefix-grouper`` of the module's table."""
    from transformers import AttentionInterface

    AttentionInterface.register(PREFIX_GROUPER, _grouped_attention)
    return lambda: _grouped_loss(policy, rollouts)


@dataclass(frozen=True)
class _Grouping:
    """Where each prompt and completion lies in the batch of one padded row per group: index tensors, themselves padded,
    with masks."""

    prompt_index: Tensor
    """(B, P) indices of each prompt's tokens in the flattened rows."""
    prompt_mask: Tensor
    """(B, P) bool, False at padding of ``prompt_index``."""
    completion_index: Tensor
    """(R, L) indices of each completion's tokens in the flattened rows."""
    completion_mask: Tensor
    """(R, L) bool, False at padding of ``completion_index``."""
    group_of: Tensor
    """(R,) index of each completion's group."""
    keys_seen: Tensor
    """(R, 1, L, P + L) bool: which keys of [its prompt | its completion] each token of a completion sees."""


def _grouping(rollouts: Rollouts, width: int, device: torch.device) -> _Grouping:
    prompts, completions, owners = [], [], []
    for row, group in enumerate(rollouts.groups):
        place = row * width
        prompts.append(torch.arange(place, place + len(group.prompt_ids)))
        place += len(group.prompt_ids)
        for completion in group.completions:
            completions.append(torch.arange(place, place + len(completion)))
            owners.append(row)
            place += len(completion)
    prompt_index, completion_index = (
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-1).to(device)
        for parts in (prompts, completions)
    )
    group_of = torch.tensor(owners, device=device)
    prompt_mask, completion_mask = prompt_index >= 0, completion_index >= 0
    longest = completion_index.shape[1]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    to_prompt = prompt_mask[group_of][:, None].expand(-1, longest, -1)
    seen = torch.cat([to_prompt, causal.expand(len(owners), -1, -1)], dim=2)[:, None]
    indices = (prompt_index.clamp(min=0), prompt_mask, completion_index.clamp(min=0), completion_mask)
    return _Grouping(*indices, group_of, seen)


def _grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, grouping: _Grouping, **options: Any
) -> tuple[Tensor, None]:
    """Attention over rows of groups: takes (B, H, W, head_dim), returns (B, W, H, head_dim)."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = options.get("scaling")
    (qp, kp, vp), (qc, kc, vc) = (
        [x[index].transpose(1, 2) for x in (q, k, v)] for index in (grouping.prompt_index, grouping.completion_index)
    )
    attend = F.scaled_dot_product_attention
    prompts = attend(qp, kp, vp, is_causal=True, scale=scale, enable_gqa=True)
    keys, values = (torch.cat([p[grouping.group_of], c], dim=2) for p, c in ((kp, kc), (vp, vc)))
    completions = attend(qc, keys, values, attn_mask=grouping.keys_seen, scale=scale, enable_gqa=True)
    out = torch.zeros_like(q)
    parts = (
        (prompts, grouping.prompt_index, grouping.prompt_mask),
        (completions, grouping.completion_index, grouping.completion_mask),
    )
    for part, index, mask in parts:
        out = out.index_put((index[mask],), part.transpose(1, 2)[mask])
    return out.view(query.shape[0], query.shape[2], *q.shape[1:]), None


def _grouped_loss(policy: Policy, rollouts: Rollouts) -> Tensor:
    device, groups = policy.device, rollouts.groups
    rows = [torch.cat([group.prompt_ids, *group.completions]) for group in groups]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    grouping = _grouping(rollouts, tokens.shape[1], device)
    image_index = (tokens == _IMAGE).flatten().nonzero()[:, 0]
    images = {name: torch.cat([g.image_inputs[name] for g in groups]) for name in groups[0].image_inputs}
    inputs = text_inputs(policy, tokens, image_index, torch.arange(len(image_index), device=device), images)
    with using_attention(policy.text_model.config, PREFIX_GROUPER):
        hidden = policy.text_model(
            **inputs,
            position_ids=_grouped_positions(policy, groups, tokens.shape[1]).to(device),
            attention_mask=None,
            use_cache=False,
            grouping=grouping,
        ).last_hidden_state
    logits = policy.model.get_output_embeddings()(hidden)
    # The prompt's last token predicts the first token of each of its completions.
    last = torch.stack(
        [index[mask][-1] for index, mask in zip(grouping.prompt_index, grouping.prompt_mask, strict=True)]
    )
    predict = torch.cat([last[grouping.group_of][:, None], grouping.completion_index[:, :-1]], dim=1)
    mask = grouping.completion_mask
    targets = tokens.flatten()[grouping.completion_index][mask]
    scores = logits.flatten(0, 1)[predict].float()[mask]
    logprobs = scores.gather(1, targets[:, None])[:, 0] - scores.logsumexp(dim=1)
    cu_seqlens = _cumulated(mask.sum(1).tolist(), device)
    return policy_loss(logprobs, None, rollouts.advantages, cu_seqlens).loss


def _grouped_positions(policy: Policy, groups: Sequence[Group], width: int) -> Tensor:
    """Position ids (3, B, W), in which each completion continues from its prompt."""
    positions = torch.zeros(3, len(groups), width, dtype=torch.long)
    for row, group in enumerate(groups):
        of_prompt = policy.prompt_positions(group.prompt_ids, group.image_inputs)
        following = torch.cat([torch.arange(len(c)) for c in group.completions]) + int(of_prompt.max()) + 1
        both = torch.cat([of_prompt, following.expand(3, -1)], dim=1)
        positions[:, row, : both.shape[1]] = both
    return positions


def _cumulated(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


Provider = Callable[[Policy, Rollouts], Forward]


def _on_stock_layers(provider: Provider) -> Provider:
    """Wraps a provider so that it runs without our fused layers, which users of the original code do not have."""

    def prepare(policy: Policy, rollouts: Rollouts) -> Forward:
        with stock_layers(policy.model):
            forward = provider(policy, rollouts)

        def on_stock_layers() -> Tensor:
            with stock_layers(policy.model):
                return forward()

        return on_stock_layers

    return prepare


PROVIDERS: dict[str, Provider] = {
    "ours": ours,
    "repeated": _on_stock_layers(repeated),
    "repeated-one-tower": repeated_one_tower,
    "trl": _on_stock_layers(trl),
    "prefix-grouper": _on_stock_layers(prefix_grouper),
}
