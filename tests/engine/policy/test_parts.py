"""Cutting a batch: everything once, in order, within the budget."""

import random

import pytest

from balcaprl.policy.parts import GroupLengths, Plan, plan_repeated, plan_shared, saved_tokens, shared_tokens


def lengths(*groups):
    return [GroupLengths(prompt, dict(enumerate(completions))) for prompt, completions in groups]


def members(plan):
    return sorted((group, j) for part in plan.parts for group, completions in part for j in completions)


def part_tokens(groups, part):
    return sum(shared_tokens(groups[g].prompt, [groups[g].completions[j] for j in each]) for g, each in part)


def padded_tokens(groups, part):
    rows = [groups[g].prompt + groups[g].completions[j] for g, each in part for j in each]
    return len(rows) * max(rows)


def test_groups_stay_whole_and_parts_are_alike():
    groups = lengths((10, [5, 5]), (10, [1]), (10, [9, 9]), (10, [3]))
    plan = plan_shared(groups, 2, None)
    assert plan == Plan([[(1, [0]), (2, [0, 1])], [(0, [0, 1]), (3, [0])]])
    assert [part_tokens(groups, part) for part in plan.parts] == [36, 30]


def test_saved_tokens_of_an_example():
    assert saved_tokens([10, 4], [[3, 1], [5]]) == 3 * 13 / (10 + 2 + 0 + 4 + 4)
    assert saved_tokens([10, 4], [[], [1]]) == 5 / 4
    assert saved_tokens([10], [[]]) == 1.0


def test_one_part_and_more_parts_than_groups():
    groups = lengths((4, [2, 2]), (4, [2]))
    assert plan_shared(groups, 1, None) == Plan([[(0, [0, 1]), (1, [0])]])
    assert len(plan_shared(groups, 9, None).parts) == 2
    assert len(plan_repeated(groups, 9, None).parts) == 3


def test_a_group_beyond_the_budget_is_split_by_completions():
    groups = lengths((10, [9, 9, 5, 5]), (3, [2]))
    plan = plan_shared(groups, 1, 24)
    assert plan.num_split_groups == 1
    assert members(plan) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert all(part_tokens(groups, part) <= 24 for part in plan.parts)
    assert len(plan.parts) == 3


def test_groups_that_take_no_part_are_left_out():
    groups = lengths((4, []), (4, [2]), (4, []))
    assert plan_shared(groups, 2, None) == plan_repeated(groups, 2, None) == Plan([[(1, [0])]])
    assert plan_shared(groups[:1], 2, None) == plan_repeated(groups[:1], 2, None) == Plan([])


def test_repeated_rows_of_similar_length_share_a_part():
    groups = lengths((4, [1, 20]), (4, [21, 2]))
    assert plan_repeated(groups, 2, None) == Plan([[(0, [0]), (1, [1])], [(0, [1]), (1, [0])]])


@pytest.mark.parametrize("plan", [plan_shared, plan_repeated])
def test_a_single_completion_beyond_the_budget_is_an_error(plan):
    groups = [GroupLengths(10, {0: 3}), GroupLengths(10, {0: 3, 4: 9}, "scene-7")]
    with pytest.raises(
        ValueError, match=r"token_budget: groups\[1\] \(scene-7\) needs 1\d tokens .* completion 4 alone"
    ):
        plan(groups, 1, 17)


@pytest.mark.parametrize("seed", range(50))
def test_every_cut_holds_everything_once_within_its_budget(seed):
    rng = random.Random(seed)
    groups = [
        GroupLengths(rng.randint(1, 60), {j: rng.randint(1, 40) for j in rng.sample(range(8), rng.randint(0, 8))})
        for _ in range(rng.randint(1, 7))
    ]
    everything = sorted((g, j) for g, group in enumerate(groups) for j in group.completions)
    longest = max((group.prompt + n for group in groups for n in group.completions.values()), default=1)
    for budget in (None, longest, 2 * longest):
        shared, repeated = (plan(groups, rng.randint(1, 5), budget) for plan in (plan_shared, plan_repeated))
        for plan, tokens in ((shared, part_tokens), (repeated, padded_tokens)):
            assert members(plan) == everything
            assert all(part == sorted(part) for part in plan.parts)
            if budget is not None:
                assert all(tokens(groups, part) <= budget for part in plan.parts)
        homes = [sum(g == group for part in shared.parts for g, _ in part) for group in range(len(groups))]
        assert sum(count > 1 for count in homes) == shared.num_split_groups
        if budget is None:
            assert shared.num_split_groups == 0
