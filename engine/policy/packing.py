"""Packs groups of completions into one batch for the forward pass, in one of two layouts.

``shared``: there is no padding, and each group's prompt appears once. A group is ``[prompt | completion 1 | ... |
completion G]``, and all groups lie in one row. Each completion continues the prompt's positions, and attends to the
prompt and to itself. The last token of a completion predicts nothing and is left out.

``repeated``: every completion is one right-padded row ``[prompt | completion]``. Models that cannot share prompts run
on this layout, and the shared layout is tested against it.

In both layouts the image tower runs once per image: each placeholder points at the row of features that it takes. Only
a model that runs whole gets a copy of the images for each row. The order and the split of groups never change a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from balcaprl.kernels import SharedPrefixLayout
from balcaprl.kernels.support.upload import upload
from balcaprl.policy.layers.last_layer import ReadTokens


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that were sampled for it."""

    prompt_ids: Tensor
    """LongTensor (P,), image placeholders expanded."""
    completions: Sequence[Tensor]
    """LongTensors, one per rollout; each may be empty."""
    image_inputs: dict[str, Tensor]
    """The processor's image tensors for this prompt; empty where it has no image. For a family that is not known, they
    include per-token inputs such as ``token_type_ids`` (1, P)."""
    name: str = ""
    """Names the sample in errors."""


class RowBlock(NamedTuple):
    """Rows of one group, for a model that runs whole: groups never share a call, because image shapes may differ."""

    num_rows: int
    inputs: dict[str, Tensor]
    """Model inputs other than tokens and mask: the images, once per row, and per-token inputs (num_rows, L)."""


@dataclass(frozen=True)
class PackedBatch:
    """Groups made ready for ``Policy.hidden_states``: R completions of all groups in order, with T tokens in total.

    An empty completion counts in R and ``cu_seqlens`` but does not go through the model; neither does a group with only
    empty completions. N rows of L tokens go through the model: one row in the shared layout, one row per completion in
    the repeated layout.
    """

    targets: Tensor
    """LongTensor (T,): all completion tokens, one completion after the other."""
    cu_seqlens: Tensor
    """IntTensor (R + 1,): completion j owns ``targets[cu_seqlens[j]:cu_seqlens[j + 1]]``."""
    group_index: Tensor
    """LongTensor (R,): the group of each completion."""
    tokens: Tensor
    """LongTensor (N, L): the tokens that go through the model."""
    positions: Tensor
    """LongTensor (A, N, L): rotary positions on A axes."""
    predict_index: Tensor
    """LongTensor (T,): the place in the flattened rows (N * L) where each target is predicted."""
    image_index: Tensor
    """LongTensor (I,): the places of the image placeholders in the flattened rows, ascending."""
    feature_index: Tensor
    """LongTensor (I,): the row of image features that each placeholder takes."""
    image_inputs: dict[str, Any]
    """Inputs of the image tower for all groups, each image once: pixels on the device of the tokens, sizes of images on
    the CPU, and what the family derives from them (``Family.prepared_images``)."""
    attention_mask: Tensor | None = None
    """LongTensor (N, L), repeated layout only: 1 at tokens, 0 at padding."""
    prefix_layout: SharedPrefixLayout | None = None
    """Shared layout only: where prompts and completions begin."""
    read: ReadTokens | None = None
    """Shared layout only: the places in ``predict_index``, each once."""
    blocks: tuple[RowBlock, ...] = ()
    """Calls of a model that runs whole: they split the rows of ``tokens`` in order, and ``image_inputs`` is empty."""
    tower_cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """The output of a frozen image tower for ``image_inputs``, kept for the next use of this batch."""

    @property
    def num_completions(self) -> int:
        """Number of completions, R."""
        return self.group_index.shape[0]

    @property
    def num_targets(self) -> int:
        """Number of completion tokens, T."""
        return self.targets.shape[0]

    @property
    def num_forward_tokens(self) -> int:
        """Number of tokens that go through the model, padding included."""
        return self.tokens.numel()


def label(index: int, group: Group) -> str:
    """Name a group for error messages."""
    return f"groups[{index}]" + (f" ({group.name})" if group.name else "")


def check_group(
    index: int, group: Group, image_token_id: int, num_image_tokens: int | None, max_positions: int | None
) -> None:
    """Raise ValueError where a group's prompt, completions and images do not fit together or do not fit the model.

    Args:
        index: Index of the group, for the message.
        group: Group to check.
        image_token_id: Id of the image placeholder.
        num_image_tokens: Number of placeholders that the group's images need; None where it is not known.
        max_positions: Longest sequence that the model takes, in tokens; None where there is no limit.
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
    """Raise ValueError for the first group whose image tensors differ in dtype from those of an earlier group."""
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
    """Pack checked groups in the shared layout, with each prompt once.

    Args:
        groups: At least one group, each checked by ``check_group``.
        prompt_positions: LongTensor (A, P) for each group: the positions of its prompt.
        image_token_id: Id of the image placeholder; only placeholders in prompts count.
        device: Device of the result.
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
    fields = {
        **_completion_fields(groups),
        "tokens": _cat(tokens)[None],
        "positions": torch.cat(positions or [prompt_positions[0][:, :0]], 1)[:, None],
        "predict_index": _cat(predict),
        "image_index": index,
        "feature_index": torch.arange(len(index)),
        "read": _cat(read),
    }
    moved = _on(device, fields)
    read_tokens = moved.pop("read")
    return PackedBatch(
        **moved,
        image_inputs=merge_image_inputs(inputs, device),
        prefix_layout=SharedPrefixLayout.from_lengths(prompts, lengths, device) if prompts else None,
        read=ReadTokens(slice(prompts[0] - 1, start) if len(read) == 1 else read_tokens, start),
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
    """Pack checked groups in the repeated layout, with one row of prompt and completion for each completion.

    Args:
        groups: At least one group, each checked by ``check_group``.
        prompt_positions: LongTensor (A, P) for each group: the positions of its prompt.
        image_token_id: Id of the image placeholder; only placeholders in prompts count.
        pad_token_id: Id that fills rows up to their common length.
        device: Device of the result.
        extend: Only for models that run whole: takes a group and a row's length in tokens, and returns all inputs of
            such a row other than its ids and mask.
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
        inputs = _on(device, extend(groups[g], width))  # type: ignore[misc]
        blocks.append(RowBlock(count, {key: torch.cat([value] * count) for key, value in inputs.items()}))
    fields = {
        **_completion_fields(groups),
        "tokens": tokens,
        "positions": positions,
        "attention_mask": mask,
        "predict_index": _cat(predict),
        "image_index": _cat(image),
        "feature_index": _cat(feature),
    }
    return PackedBatch(
        **_on(device, fields),
        image_inputs={} if blocks else merge_image_inputs([groups[g].image_inputs for g in live], device),
        blocks=tuple(blocks),
    )


def merge_image_inputs(inputs: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Concatenate the image tensors of several prompts along the first axis.

    Pixels go to the device. Integer tensors are sizes of images, which the host reads, so they are returned on the CPU.
    Images that differ along other axes, for example in their number of tiles, are padded with zeros. The model reads
    only the part that ``image_sizes`` describes.
    """
    keys = sorted({key for each in inputs for key in each})
    joined = {key: _cat_padded([each[key] for each in inputs if key in each]) for key in keys}
    sizes = {key: value.cpu() for key, value in joined.items() if not value.is_floating_point()}
    return sizes | _on(device, {key: value for key, value in joined.items() if key not in sizes})


def _on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return the tensors on a device, under the same names, without waiting for a GPU."""
    return dict(zip(tensors, upload(list(tensors.values()), device), strict=True))


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    shapes = [tensor.shape[1:] for tensor in tensors]
    if len(set(shapes)) == 1:
        return torch.cat(list(tensors))
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    room = [[(0, size - have) for size, have in zip(largest, shape, strict=True)] for shape in shapes]
    padded = [F.pad(x, [n for pair in reversed(each) for n in pair]) for x, each in zip(tensors, room, strict=True)]
    return torch.cat(padded)


def is_per_token(name: str, value: Tensor, prompt_length: int) -> bool:
    """Whether a processor's tensor holds one value per token of a prompt, rather than describing its images."""
    fits = value.shape == (1, prompt_length) and not value.is_floating_point()
    return name.endswith("token_type_ids") or (fits and not name.startswith(("image_", "pixel_", "num_", "target_")))


def _completion_fields(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Make the fields that describe the completions, which are the same in both layouts, on the CPU."""
    completions = [c for group in groups for c in group.completions]
    owners = [g for g, group in enumerate(groups) for _ in group.completions]
    return {
        "targets": _cat(completions),
        "cu_seqlens": torch.tensor([0, *map(len, completions)]).cumsum(0).to(torch.int32),
        "group_index": torch.tensor(owners, dtype=torch.long),
    }


def _first_features(groups: Sequence[Group], image_token_id: int) -> list[int]:
    """Return the row at which each group's image features start, if those of all groups follow one another."""
    counts = [int((group.prompt_ids == image_token_id).sum()) for group in groups]
    return [sum(counts[:g]) for g in range(len(groups))]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
