"""Cuts a batch of groups into micro-batches, called parts, that go through the model one after the other.

The functions take lengths and return indices. The loss has a global denominator, so a cut never changes the result; it
only bounds memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupLengths:
    """The lengths of one group that a cut depends on."""

    prompt: int
    """Number of prompt tokens, at least 1."""
    completions: Mapping[int, int]
    """Length in tokens, at least 1, of each completion that takes part, by index; empty if the group takes no part."""
    name: str = ""
    """Names the sample in errors."""


@dataclass(frozen=True)
class Plan:
    """Parts of a batch, each with the completions of some groups."""

    parts: list[list[tuple[int, list[int]]]]
    """For each part, pairs of a group's index and its completions' indices, both ascending."""

    @property
    def num_split_groups(self) -> int:
        """Number of groups whose prompt goes through the model in more than one part."""
        homes = Counter(group for part in self.parts for group, _ in part)
        return sum(count > 1 for count in homes.values())


def shared_tokens(prompt: int, lengths: Sequence[int]) -> int:
    """Count the tokens of a group in the shared layout: the prompt once, and each completion without its last token."""
    return prompt + sum(lengths) - len(lengths)


def saved_tokens(prompts: Sequence[int], completions: Sequence[Sequence[int]]) -> float:
    """Ratio of the repeated layout's tokens, padding included, to the shared layout's; 1 if there are no tokens."""
    rows = [prompt + n for prompt, lengths in zip(prompts, completions, strict=True) for n in lengths]
    shared = sum(shared_tokens(p, lengths) for p, lengths in zip(prompts, completions, strict=True) if lengths)
    return len(rows) * max(rows) / shared if rows else 1.0


def plan_shared(groups: Sequence[GroupLengths], num_parts: int, token_budget: int | None) -> Plan:
    """Cut for the shared layout into parts of similar size: ``num_parts`` or more if there are that many groups.

    A group stays whole unless it exceeds ``token_budget`` by itself. In that case its completions are spread over
    pieces, and its prompt is repeated in each piece.

    Raises:
        ValueError: A prompt with a single completion exceeds the budget; the message names the group.
    """
    items: list[tuple[int, int, list[int]]] = []  # tokens, group, completions
    for index, group in enumerate(groups):
        pieces = _pieces(index, group, token_budget) if group.completions else []
        items += [
            (shared_tokens(group.prompt, [group.completions[j] for j in piece]), index, sorted(piece))
            for piece in pieces
        ]
    if not items:
        return Plan([])
    count = min(max(1, num_parts), len(items))
    while True:
        bins = _balanced(items, count)
        if token_budget is None or all(sum(t for t, _, _ in each) <= token_budget for each in bins):
            break
        count += 1
    # Pieces of one group that end up in the same part are joined again.
    return Plan([_merged(each) for each in bins])


def plan_repeated(groups: Sequence[GroupLengths], num_parts: int, token_budget: int | None) -> Plan:
    """Cut for the repeated layout into parts whose rows have similar lengths, so that parts contain little padding.

    Raises:
        ValueError: A single row exceeds ``token_budget``; the message names the group.
    """
    rows = sorted((g.prompt + n, i, j) for i, g in enumerate(groups) for j, n in g.completions.items())
    if not rows:
        return Plan([])
    if token_budget is not None and rows[-1][0] > token_budget:
        raise ValueError(_over_budget(rows[-1][1], groups[rows[-1][1]], rows[-1][2], rows[-1][0], token_budget))
    count = min(max(1, num_parts), len(rows))
    while True:
        parts = [[rows[k] for k in part] for part in np.array_split(np.arange(len(rows)), count)]
        if token_budget is None or all(len(part) * part[-1][0] <= token_budget for part in parts):
            break
        count += 1
    return Plan([_merged([(tokens, i, [j]) for tokens, i, j in part]) for part in parts])


def _pieces(index: int, group: GroupLengths, budget: int | None) -> list[list[int]]:
    """Spread a group's completions over as few pieces as fit the budget: longest first, into the emptiest piece."""
    lengths = group.completions
    if budget is None or shared_tokens(group.prompt, list(lengths.values())) <= budget:
        return [list(lengths)]
    longest = max(lengths, key=lambda j: lengths[j])
    if group.prompt + lengths[longest] - 1 > budget:
        raise ValueError(_over_budget(index, group, longest, group.prompt + lengths[longest] - 1, budget))
    items = [(n - 1, index, [j]) for j, n in lengths.items()]
    count = 2
    while True:
        bins = _balanced(items, count)
        if all(group.prompt + sum(t for t, _, _ in each) <= budget for each in bins):
            return [[j for _, _, piece in each for j in piece] for each in bins]
        count += 1


def _balanced(items: Sequence[tuple[int, int, list[int]]], count: int) -> list[list[tuple[int, int, list[int]]]]:
    """Spread items over ``count`` bins of similar token sums: the largest first, each into the emptiest bin."""
    bins: list[list[tuple[int, int, list[int]]]] = [[] for _ in range(count)]
    sums = [0] * count
    for item in sorted(items, key=lambda each: (-each[0], each[1], each[2])):
        place = min(range(count), key=lambda b: (sums[b], len(bins[b])))
        bins[place].append(item)
        sums[place] += item[0]
    return [each for each in bins if each]


def _merged(items: Sequence[tuple[int, int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Return the (group, completions) pairs of a part, each group once, in ascending order."""
    members: dict[int, list[int]] = {}
    for _, index, completions in items:
        members.setdefault(index, []).extend(completions)
    return [(index, sorted(members[index])) for index in sorted(members)]


def _over_budget(index: int, group: GroupLengths, completion: int, tokens: int, budget: int) -> str:
    where = f"groups[{index}]" + (f" ({group.name})" if group.name else "")
    return (
        f"token_budget: {where} needs {tokens} tokens for its prompt of {group.prompt} and completion {completion} alone, "
        f"the budget is {budget}: raise optim.token_budget, or lower data.max_pixels"
    )
