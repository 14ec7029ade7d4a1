"""The layout of groups that share a prompt in one packed tensor, as every implementation of the attention needs it.

The tokens of B groups follow each other without padding. Each group starts with its prompt::

    [prompt 0 | completion | completion | prompt 1 | completion | ...]

A *segment* is a prompt or a completion. There are S = B + R segments in packed order, where R is the total number of
completions. A token attends to the tokens of its own segment up to itself and, if it is in a completion, to all of its
group's prompt. A completion may be empty, a prompt may not; a group may have no completion.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from balcaprl.kernels.support.upload import upload

TRITON_MAX_HEAD_DIM = 128
"""The largest head size for which the Triton kernels' tiles have room."""


@dataclass(frozen=True, eq=False)
class SharedPrefixLayout:
    """The layout of packed groups; use ``from_lengths`` to make one.

    All fields are tensors, so that a custom op can take a layout as the list ``tensors()``. The ``host`` fields are
    always on the CPU, so that sizes of grids and loops are known without waiting for a device; the others are on the
    device of the tokens. Values derived from the host fields are computed once and cached, because every layer of a
    model asks for the same ones.
    """

    cu_seqlens: Tensor
    """IntTensor (S + 1,): segment s owns the packed tokens cu_seqlens[s] to cu_seqlens[s + 1]."""
    prompt_segment: Tensor
    """IntTensor (S,): the prompt segment of the group of segment s; for a prompt, s itself."""
    cu_groups: Tensor
    """IntTensor (B + 1,): group b owns the packed tokens cu_groups[b] to cu_groups[b + 1]."""
    cu_prompts: Tensor
    """IntTensor (B + 1,): cumulative sums of prompt lengths. Group b's prompt begins at packed token cu_groups[b]."""
    cu_completions: Tensor
    """IntTensor (B + 1,): cumulative sums of the number of completion tokens of each group. Those of group b are the
    packed tokens cu_groups[b + 1] - (cu_completions[b + 1] - cu_completions[b]) to cu_groups[b + 1]."""
    starts: Tensor
    """IntTensor (T,): the packed token at which each token's segment begins."""
    ends: Tensor
    """IntTensor (T,): the end of each token's segment, which is the packed token after the segment's last."""
    host_prompt_lengths: Tensor
    """LongTensor (B,): length of each group's prompt."""
    host_group_sizes: Tensor
    """LongTensor (B,): number of completions of each group."""
    host_completion_lengths: Tensor
    """LongTensor (R,): length of each completion, group after group."""

    @classmethod
    def from_lengths(
        cls,
        prompt_lengths: Sequence[int],
        completion_lengths: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
    ) -> SharedPrefixLayout:
        """The layout of groups with the given lengths. The host does not wait for the device.

        Args:
            prompt_lengths: length of each group's prompt, at least 1.
            completion_lengths: for each group, the lengths of its completions, each 0 or more.
            device: device of the tokens.

        Raises:
            ValueError: a length is out of range, or the two arguments have different numbers of groups.
        """
        _check_lengths(prompt_lengths, completion_lengths)
        segments: list[int] = []
        owners: list[int] = []
        for prompt, completions in zip(prompt_lengths, completion_lengths, strict=True):
            owners += [len(segments)] * (1 + len(completions))
            segments += [prompt, *completions]
        totals = [sum(each) for each in completion_lengths]
        groups = [prompt + total for prompt, total in zip(prompt_lengths, totals, strict=True)]
        cu_seqlens, lengths = _cumulated(segments), torch.tensor(segments)
        for_device = [
            cu_seqlens,
            torch.tensor(owners),
            _cumulated(groups),
            _cumulated(prompt_lengths),
            _cumulated(totals),
            cu_seqlens[:-1].repeat_interleave(lengths),
            cu_seqlens[1:].repeat_interleave(lengths),
        ]
        on_device = upload([each.to(torch.int32) for each in for_device], device)
        on_host = [
            torch.tensor(list(prompt_lengths), dtype=torch.long),
            torch.tensor([len(each) for each in completion_lengths], dtype=torch.long),
            torch.tensor([n for each in completion_lengths for n in each], dtype=torch.long),
        ]
        return cls(*on_device, *on_host)

    def tensors(self) -> list[Tensor]:
        """All fields in order; ``SharedPrefixLayout(*tensors)`` makes the layout again."""
        return [getattr(self, name) for name in LAYOUT_FIELDS]

    @property
    def num_groups(self) -> int:
        """B, the number of groups."""
        return self.host_prompt_lengths.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, the number of packed tokens."""
        return self.starts.shape[0]

    @functools.cached_property
    def groups(self) -> list[tuple[int, int, list[int]]]:
        """(first packed token, prompt length, completion lengths) of each group. Reads host tensors."""
        lengths = self.host_completion_lengths.split(self.host_group_sizes.tolist())
        result, start = [], 0
        for prompt, completions in zip(self.host_prompt_lengths.tolist(), lengths, strict=True):
            result.append((start, prompt, completions.tolist()))
            start += prompt + int(completions.sum())
        return result

    def most_tiles(self, block: int) -> int:
        """The largest number of tiles of ``block`` tokens in any group; no tile spans both prompt and completions."""
        if block not in self._tiles:
            both = ((prompt, sum(completions)) for _, prompt, completions in self.groups)
            self._tiles[block] = max(-(-prompt // block) - (-total // block) for prompt, total in both)
        return self._tiles[block]

    @functools.cached_property
    def _tiles(self) -> dict[int, int]:
        return {}


LAYOUT_FIELDS = tuple(field.name for field in fields(SharedPrefixLayout))
"""Names of the layout's tensors, in the order of ``SharedPrefixLayout.tensors``."""


def _check_lengths(prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]]) -> None:
    if len(prompt_lengths) != len(completion_lengths):
        raise ValueError(
            f"completion_lengths: expected one list for each of {len(prompt_lengths)} prompts, "
            f"got {len(completion_lengths)}"
        )
    if not prompt_lengths:
        raise ValueError("prompt_lengths: expected at least one group")
    for index, (prompt, completions) in enumerate(zip(prompt_lengths, completion_lengths, strict=True)):
        if prompt < 1:
            raise ValueError(f"prompt_lengths: group {index} has a prompt of {prompt} tokens; it needs at least 1")
        if min(completions, default=0) < 0:
            raise ValueError(f"completion_lengths: group {index} has a completion of {min(completions)} tokens")
    total = sum(prompt_lengths) + sum(sum(each) for each in completion_lengths)
    if total >= 2**31:
        raise ValueError(f"prompt_lengths: {total} packed tokens exceed int32; pack fewer groups")


def _cumulated(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.long).cumsum(0)
