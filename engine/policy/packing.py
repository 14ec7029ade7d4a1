"""Groups of completions become one batch for the forward pass, in one of two layouts.

``shared``: padding-free, the prompt of a group once: ``[prompt | completion 1 | ... | completion G]`` for each group, all
in one row. Each completion goes on from the prompt's positions, and attends to the prompt and to itself. The last
token of a completion predicts nothing and is left out.

``repeated``: every completion is one right-padded row ``[prompt | completion]``. It is what a model without shared prompts
runs on, and the twin that the shared layout is tested against.

In both the image tower runs once per image: each placeholder points at the row of features that it takes. Order and
split of groups never change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from balcaprl.kernels import SharedPrefixLayout
from balcaprl.policy.last_layer import ReadTokens


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that were sampled for it."""

    prompt_ids: Tensor
    """LongTensor (P,), image placeholders expanded."""
    completions: Sequence[Tensor]
    """LongTensors, one per rollout; may be empty."""
    image_inputs: dict[str, Tensor]
    """The processor's image tensors for this prompt; empty where it has no image. What a model that is not known takes for each
    token beside its id (``token_type_ids``, (1, P)) is among them."""
    name: str = ""
    """Names the sample in errors."""


class RowBlock(NamedTuple):
    """Rows of one group, for a model that runs whole: groups whose images have other shapes never meet in one call."""

    num_rows: int
    inputs: dict[str, Tensor]
    """Beside tokens and mask: the images, once per row, and what belongs to each token, (num_rows, L)."""


@dataclass(frozen=True)
class PackedBatch:
    """Groups made ready for ``Policy.hidden_states``. R completions of all groups in order, T tokens in them.

    An empty completion takes part in R and ``cu_seqlens``, but not in the forward, nor does a group that has only such.
    N rows of L tokens go through the model: one row in the shared layout, one per completion in the repeated one.
    """

    targets: Tensor
    """LongTensor (T,): all completion tokens, one completion after the other."""
    cu_seqlens: Tensor
    """IntTensor (R + 1,): completion j owns ``targets[cu_seqlens[j]:cu_seqlens[j + 1]]``."""
    group_index: Tensor
    """LongTensor (R,): the group of each completion."""
    tokens: Tensor
    """LongTensor (N, L): what goes through the model."""
    positions: Tensor
    """LongTensor (A, N, L): rotary positions, A axes."""
    predict_index: Tensor
    """LongTensor (T,): where in the flattened rows (N * L) each target is predicted."""
    image_index: Tensor
    """LongTensor (I,): where in the flattened rows the image placeholders are, ascending."""
    feature_index: Tensor
    """LongTensor (I,): the row of the image features that each placeholder takes."""
    image_inputs: dict[str, Tensor]
    """Image tensors of all groups, each image once."""
    attention_mask: Tensor | None = None
    """LongTensor (N, L), repeated layout only: 1 at tokens, 0 at padding."""
    prefix_layout: SharedPrefixLayout | None = None
    """Shared layout only: where prompts and completions begin."""
    read: ReadTokens | None = None
    """Shared layout only: the tokens of ``predict_index``, each once."""
    blocks: tuple[RowBlock, ...] = ()
    """Of a model that runs whole: its calls, whose rows are those of ``tokens`` in order; ``image_inputs`` is empty then."""
    tower_cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What a frozen image tower made of ``image_inputs``, for the next use of this batch."""

    @property
    def num_completions(self) -> int:
        """R."""
        return self.group_index.shape[0]

    @property
    def num_targets(self) -> int:
        """T."""
        return self.targets.shape[0]

    @property
    def num_forward_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.tokens.numel()


def label(index: int, group: Group) -> str:
    """How errors call a group."""
    return f"groups[{index}]" + (f" ({group.name})" if group.name else "")


def check_group(
    index: int, group: Group, image_token_id: int, num_image_tokens: int | None, max_positions: int | None
) -> None:
    """Raise ValueError naming the group where its prompt, completions and images do not fit together or the model.

    Args:
        index: Of the group.
        group: To check.
        image_token_id: Placeholder id.
        num_image_tokens: Placeholders that its images need, where that is known.
        max_positions: Longest sequence of the model, where it has one.
    """
    where = label(index, group)
    tensors = {"prompt_ids": group.prompt_ids} | {f"completions[{j}]": c for j, c in enumerate(group.completions)}
    for name, ids in tensors.items():
        if ids.ndim != 1 or ids.dtype != torch.long:
            raise ValueError(f"{where}.{name} must be a LongTensor of one axis, is {ids.dtype} {list(ids.shape)}")
    if not group.prompt_ids.numel():
        raise ValueError(f"{where}.prompt_ids is empty: a completion's first token has nothing to follow")
    for j, completion in enumerate(group.completions):
        length = len(group.prompt_ids) + len(completion)
        if max_positions is not None and length > max_positions:
            raise ValueError(
                f"{where}.completions[{j}]: a prompt of {len(group.prompt_ids)} tokens and a completion of "
                f"{len(completion)} exceed the model's context of {max_positions}: lower data.max_pixels or "
                "rollout.sampling.max_completion_tokens"
            )
    placeholders = int((group.prompt_ids == image_token_id).sum())
    if num_image_tokens is not None and placeholders != num_image_tokens:
        raise ValueError(
            f"{where}: the prompt holds {placeholders} image placeholders (id {image_token_id}), but its "
            f"images make {num_image_tokens} features; take prompt_ids and image_inputs from the same processor call"
        )


def check_same_dtypes(groups: Sequence[Group]) -> None:
    """Raise ValueError naming the group whose image tensors have another dtype than those before."""
    seen: dict[str, tuple[torch.dtype, int]] = {}
    for index, group in enumerate(groups):
        for key, value in group.image_inputs.items():
            dtype, first = seen.setdefault(key, (value.dtype, index))
            if value.dtype != dtype:
                raise ValueError(
                    f"{label(index, group)}.image_inputs[{key!r}] is {value.dtype}, that of "
                    f"{label(first, groups[first])} is {dtype}: use one dtype for all"
                )


def pack_shared(
    groups: Sequence[Group], prompt_positions: Sequence[Tensor], image_token_id: int, device: torch.device
) -> PackedBatch:
    """Lay checked groups out with each prompt once.

    Args:
        groups: At least one, checked by ``check_group``.
        prompt_positions: (A, P) of each group.
        image_token_id: Placeholder id; only those in prompts count.
        device: Of the result.
    """
    tokens, positions, predict, read, image, inputs = [], [], [], [], [], []
    prompts: list[int] = []
    lengths: list[list[int]] = []
    start = 0
    for group, prompt_position in zip(groups, prompt_positions, strict=True):
        live = [c.cpu() for c in group.completions if len(c)]
        if not live:
            continue
        prompt, first = group.prompt_ids.cpu(), int(prompt_position.max()) + 1
        tokens += [prompt, *(c[:-1] for c in live)]
        positions.append(prompt_position)
        image.append(start + (prompt == image_token_id).nonzero()[:, 0])
        inputs.append(group.image_inputs)
        last_of_prompt = torch.tensor([start + len(prompt) - 1])
        start += len(prompt)
        for completion in live:
            place = torch.arange(len(completion) - 1)
            positions.append((first + place).expand(prompt_position.shape[0], -1))
            predict += [last_of_prompt, start + place]
            start += len(place)
        read.append(torch.arange(int(last_of_prompt), start))
        prompts.append(len(prompt))
        lengths.append([len(c) - 1 for c in live])
    index = _cat(image)
    return PackedBatch(
        **_completion_fields(groups, device),
        tokens=_cat(tokens)[None].to(device),
        positions=torch.cat(positions or [prompt_positions[0][:, :0]], 1)[:, None].to(device),
        predict_index=_cat(predict).to(device),
        image_index=index.to(device),
        feature_index=torch.arange(len(index), device=device),
        image_inputs=merge_image_inputs(inputs, device),
        prefix_layout=SharedPrefixLayout.from_lengths(prompts, lengths, device) if prompts else None,
        read=ReadTokens(slice(prompts[0] - 1, start) if len(read) == 1 else _cat(read).to(device), start),
    )


def pack_rows(
    groups: Sequence[Group],
    prompt_positions: Sequence[Tensor],
    image_token_id: int,
    pad_token_id: int,
    device: torch.device,
    *,
    extend: Callable[[Group, int], dict[str, Tensor]] | None = None,
) -> PackedBatch:
    """Lay checked groups out as rows, the prompt repeated for each completion.

    Args:
        groups: At least one, checked by ``check_group``.
        prompt_positions: (A, P) of each group.
        image_token_id: Placeholder id; only those in prompts count.
        pad_token_id: Fills the rows.
        device: Of the result.
        extend: For models that run whole: all inputs of a group for a row of so many tokens, beside its ids and mask.
    """
    rows = [(g, c.cpu()) for g, group in enumerate(groups) for c in group.completions if len(c)]
    width = max((len(groups[g].prompt_ids) + len(c) for g, c in rows), default=0)
    tokens = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    positions = torch.zeros((prompt_positions[0].shape[0], *tokens.shape), dtype=torch.long)
    predict, image, feature = [], [], []
    live = sorted({g for g, _ in rows})
    first_feature = dict(zip(live, _first_features([groups[g] for g in live], image_token_id), strict=True))
    for row, (g, completion) in enumerate(rows):
        prompt_ids, start = groups[g].prompt_ids, len(groups[g].prompt_ids)
        end = start + len(completion)
        tokens[row, :start] = prompt_ids
        tokens[row, start:end] = completion
        mask[row, :end] = 1
        positions[:, row, :start] = prompt_positions[g]
        positions[:, row, start:] = prompt_positions[g].max() + 1 + torch.arange(width - start)
        predict.append(row * width + torch.arange(start - 1, end - 1))
        placeholders = (prompt_ids == image_token_id).nonzero()[:, 0].cpu()
        image.append(row * width + placeholders)
        feature.append(first_feature[g] + torch.arange(len(placeholders)))
    blocks = []
    for g in live if extend is not None else ():
        count = sum(owner == g for owner, _ in rows)
        inputs = {key: value.to(device) for key, value in extend(groups[g], width).items()}  # type: ignore[misc]
        blocks.append(RowBlock(count, {key: torch.cat([value] * count) for key, value in inputs.items()}))
    return PackedBatch(
        **_completion_fields(groups, device),
        tokens=tokens.to(device),
        positions=positions.to(device),
        attention_mask=mask.to(device),
        predict_index=_cat(predict).to(device),
        image_index=_cat(image).to(device),
        feature_index=_cat(feature).to(device),
        image_inputs={} if blocks else merge_image_inputs([groups[g].image_inputs for g in live], device),
        blocks=tuple(blocks),
    )


def merge_image_inputs(inputs: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Image tensors of several prompts, one after the other along the first axis.

    Images that differ along others, as in their number of tiles, are filled up with zeros: the model reads what
    ``image_sizes`` tell.
    """
    keys = {key for each in inputs for key in each}
    return {key: _cat_padded([each[key].to(device) for each in inputs if key in each]) for key in sorted(keys)}


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tensor.shape[1:] for tensor in tensors]
    if len(set(shapes)) == 1:
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    room = [[(0, size - have) for size, have in zip(largest, shape, strict=True)] for shape in shapes]
    padded = [F.pad(x, [n for pair in reversed(each) for n in pair]) for x, each in zip(tensors, room, strict=True)]
    return torch.cat(padded)


def is_per_token(name: str, value: Tensor, prompt_length: int) -> bool:
    """Whether a processor's tensor says something of each token of a prompt, and not of its images."""
    fits = value.shape == (1, prompt_length) and not value.is_floating_point()
    return name.endswith("token_type_ids") or (fits and not name.startswith(("image_", "pixel_", "num_", "target_")))


def _completion_fields(groups: Sequence[Group], device: torch.device) -> dict[str, Any]:
    """What both layouts say of the completions."""
    completions = [c for group in groups for c in group.completions]
    owners = [g for g, group in enumerate(groups) for _ in group.completions]
    return {
        "targets": _cat(completions).to(device),
        "cu_seqlens": torch.tensor([0, *map(len, completions)]).cumsum(0).to(torch.int32).to(device),
        "group_index": torch.tensor(owners, dtype=torch.long, device=device),
    }


def _first_features(groups: Sequence[Group], image_token_id: int) -> list[int]:
    """Where each group's image features start, all images standing one after the other."""
    counts = [int((group.prompt_ids == image_token_id).sum()) for group in groups]
    return [sum(counts[:g]) for g in range(len(groups))]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
