"""Groups of completions become one batch for the forward pass.

This layout repeats the prompt: every completion is one right-padded row ``[prompt | completion]``. The image tower is
not repeated: each placeholder of each row points at the one row of features that it shares with its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and the completions that were sampled for it."""

    prompt_ids: Tensor
    """LongTensor (P,), image placeholders expanded."""
    completions: Sequence[Tensor]
    """LongTensors, one per rollout; may be empty."""
    image_inputs: dict[str, Tensor]
    """The processor's image tensors for this prompt; empty where it has no image."""


@dataclass(frozen=True)
class PackedBatch:
    """Groups made ready for ``Policy.hidden_states``. R completions of all groups in order, T tokens in them.

    An empty completion takes part in R and ``cu_seqlens``, but not in the forward: N rows, N <= R.
    """

    targets: Tensor
    """LongTensor (T,): all completion tokens, one completion after the other."""
    cu_seqlens: Tensor
    """IntTensor (R + 1,): completion j owns ``targets[cu_seqlens[j]:cu_seqlens[j + 1]]``."""
    group_index: Tensor
    """LongTensor (R,): the group of each completion."""
    tokens: Tensor
    """LongTensor (N, L): right-padded rows."""
    positions: Tensor
    """LongTensor (A, N, L): rotary positions, A axes."""
    attention_mask: Tensor
    """LongTensor (N, L): 1 at tokens, 0 at padding."""
    predict_index: Tensor
    """LongTensor (T,): where in the flattened rows (N * L) each target is predicted."""
    image_index: Tensor
    """LongTensor (I,): where in the flattened rows the image placeholders are."""
    feature_index: Tensor
    """LongTensor (I,): the row of the image features that each placeholder takes."""
    image_inputs: dict[str, Tensor]
    """Image tensors of all groups, each image once."""

    @property
    def num_completions(self) -> int:
        """R."""
        return self.group_index.shape[0]

    @property
    def num_targets(self) -> int:
        """T."""
        return self.targets.shape[0]


def check_group(index: int, group: Group, image_token_id: int, num_image_tokens: int) -> None:
    """Raise ValueError naming the group where its prompt, completions and images do not fit together."""
    tensors = {"prompt_ids": group.prompt_ids} | {f"completions[{j}]": c for j, c in enumerate(group.completions)}
    for name, ids in tensors.items():
        if ids.ndim != 1 or ids.dtype != torch.long:
            raise ValueError(
                f"groups[{index}].{name} must be a LongTensor of one axis, is {ids.dtype} {list(ids.shape)}"
            )
    if not group.prompt_ids.numel():
        raise ValueError(f"groups[{index}].prompt_ids is empty: a completion's first token has nothing to follow")
    placeholders = int((group.prompt_ids == image_token_id).sum())
    if placeholders != num_image_tokens:
        raise ValueError(
            f"groups[{index}]: the prompt holds {placeholders} image placeholders (id {image_token_id}), but its "
            f"images make {num_image_tokens} features; take prompt_ids and image_inputs from the same processor call"
        )


def pack_rows(
    groups: Sequence[Group],
    prompt_positions: Sequence[Tensor],
    image_token_id: int,
    pad_token_id: int,
    device: torch.device,
) -> PackedBatch:
    """Lay checked groups out as rows.

    Args:
        groups: At least one, checked by ``check_group``.
        prompt_positions: (A, P) of each group.
        image_token_id: Placeholder id; only those in prompts count.
        pad_token_id: Fills the rows.
        device: Of the result.
    """
    lengths = [len(c) for group in groups for c in group.completions]
    owners = [g for g, group in enumerate(groups) for _ in group.completions]
    completions = [c for group in groups for c in group.completions]
    rows = [j for j, length in enumerate(lengths) if length]
    width = max((len(groups[owners[j]].prompt_ids) + lengths[j] for j in rows), default=0)
    tokens = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    positions = torch.zeros((prompt_positions[0].shape[0], *tokens.shape), dtype=torch.long)
    predict, image, feature = [], [], []
    first_feature = _first_features(groups, image_token_id)
    for row, j in enumerate(rows):
        g = owners[j]
        prompt_ids, start = groups[g].prompt_ids, len(groups[g].prompt_ids)
        end = start + lengths[j]
        tokens[row, :start] = prompt_ids
        tokens[row, start:end] = completions[j]
        mask[row, :end] = 1
        positions[:, row, :start] = prompt_positions[g]
        positions[:, row, start:] = prompt_positions[g].max() + 1 + torch.arange(width - start)
        predict.append(row * width + torch.arange(start - 1, end - 1))
        placeholders = (prompt_ids == image_token_id).nonzero()[:, 0].cpu()
        image.append(row * width + placeholders)
        feature.append(first_feature[g] + torch.arange(len(placeholders)))
    return PackedBatch(
        targets=_cat(completions).to(device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device),
        group_index=torch.tensor(owners, dtype=torch.long, device=device),
        tokens=tokens.to(device),
        positions=positions.to(device),
        attention_mask=mask.to(device),
        predict_index=_cat(predict).to(device),
        image_index=_cat(image).to(device),
        feature_index=_cat(feature).to(device),
        image_inputs=merge_image_inputs([group.image_inputs for group in groups], device),
    )


def merge_image_inputs(inputs: Sequence[dict[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Image tensors of several prompts, one after the other along the first axis."""
    keys = {key for each in inputs for key in each}
    return {key: torch.cat([each[key].to(device) for each in inputs if key in each]) for key in sorted(keys)}


def _first_features(groups: Sequence[Group], image_token_id: int) -> list[int]:
    """Where each group's image features start, all images standing one after the other."""
    starts = [0]
    for group in groups:
        starts.append(starts[-1] + int((group.prompt_ids == image_token_id).sum()))
    return starts


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.cpu() for part in parts]) if parts else torch.zeros(0, dtype=torch.long)
