"""grouped_advantages: hand-checked cases, every edge rule, native against the float64 reference, registration."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from balcaprl.kernels import grouped_advantages
from balcaprl.kernels.advantages.grouped_advantages import _MAX_TRITON_GROUP, METHODS, grouped_advantages_reference
from balcaprl.kernels.support import launch, native
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

NAN = math.nan
IMPLS = ("reference", "native", pytest.param("triton", marks=pytest.mark.interpreter))


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and not native.is_available():
        pytest.skip(f"no native library: {native.unavailable_reason()}")
    return request.param


def column(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)[:, None]


# Hand-checked.


def test_two_rollouts_one_differing_reward(impl: str) -> None:
    rewards = torch.tensor([[0.0, 0.5], [1.0, 0.5]])
    advantages = grouped_advantages(rewards, 2, eps=1e-12, impl=impl)
    torch.testing.assert_close(advantages, torch.tensor([-0.70710678, 0.70710678]))


def test_two_rollouts_two_differing_rewards(impl: str) -> None:
    advantages = grouped_advantages(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 2, eps=1e-12, impl=impl)
    torch.testing.assert_close(advantages, torch.tensor([-1.41421356, 1.41421356]))


def test_grpo_cannot_tell_the_two_cases_apart(impl: str) -> None:
    one = grouped_advantages(torch.tensor([[0.0, 0.5], [1.0, 0.5]]), 2, method="grpo", eps=0.0, impl=impl)
    two = grouped_advantages(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 2, method="grpo", eps=0.0, impl=impl)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(two, torch.tensor([-0.70710678, 0.70710678]))


def test_no_z_of_eight_exceeds_its_bound(impl: str) -> None:
    spike = column(*[0.0] * 7, 1.0)
    advantages = grouped_advantages(spike, 8, eps=0.0, impl=impl)
    assert advantages[-1].item() == pytest.approx(7 / math.sqrt(8), rel=1e-6)
    rewards = torch.rand(8000, 1, generator=torch.Generator().manual_seed(0))
    assert grouped_advantages(rewards, 8, impl=impl).abs().max() <= 7 / math.sqrt(8)


def test_eps_is_added_to_the_std(impl: str) -> None:
    advantages = grouped_advantages(column(0.0, 2.0), 2, eps=1.0, impl=impl)
    expected = 1.0 / (math.sqrt(2.0) + 1.0)
    torch.testing.assert_close(advantages, torch.tensor([-expected, expected]))


def test_gdpo_whitens_the_batch(impl: str) -> None:
    rewards = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    by_group = torch.tensor([-2.0, 2.0, -1.0, 1.0]) / math.sqrt(2.0)
    expected = by_group / (by_group.std() + 1e-3)
    advantages = grouped_advantages(rewards, 2, method="gdpo", eps=1e-3, impl=impl)
    torch.testing.assert_close(advantages, expected, rtol=3e-3, atol=0)
    exact = grouped_advantages(rewards, 2, method="gdpo", eps=0.0, impl=impl)
    torch.testing.assert_close(exact, by_group / by_group.std())


def test_weights(impl: str) -> None:
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    advantages = grouped_advantages(rewards, 2, weights=[3.0, 1.0], eps=0.0, impl=impl)
    torch.testing.assert_close(advantages, torch.tensor([-2.0, 2.0]) / math.sqrt(2.0))
    as_tensor = grouped_advantages(rewards, 2, weights=torch.tensor([3.0, 1.0]), eps=0.0, impl=impl)
    assert torch.equal(advantages, as_tensor)


# Edge rules.


def test_missing_score_contributes_nothing_and_stays_out_of_the_statistics(impl: str) -> None:
    rewards = torch.tensor([[0.0, 0.2], [NAN, 0.4], [1.0, 0.9]], dtype=torch.float64)
    advantages = grouped_advantages(rewards, 3, eps=0.0, impl=impl)
    first = grouped_advantages(column(0.0, 1.0), 2, eps=0.0, impl=impl)
    second = grouped_advantages(rewards[:, 1:], 3, eps=0.0, impl=impl)
    torch.testing.assert_close(advantages, second + torch.stack([first[0], torch.tensor(0.0), first[1]]))


@pytest.mark.parametrize("method", METHODS)
def test_rollout_without_any_score_gets_zero(impl: str, method: str) -> None:
    rewards = torch.tensor([[0.0, 0.2], [NAN, NAN], [1.0, 0.9]])
    advantages = grouped_advantages(rewards, 3, method=method, impl=impl)
    assert advantages[1].item() == 0.0
    # The unscored rollout is not part of any statistic, the batch's included.
    without = grouped_advantages(rewards[[0, 2]], 2, method=method, impl=impl)
    torch.testing.assert_close(advantages[[0, 2]], without)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_than_two_scores_contribute_nothing(impl: str, method: str) -> None:
    rewards = column(NAN, 0.7, NAN, NAN)
    assert torch.equal(grouped_advantages(rewards, 4, method=method, impl=impl), torch.zeros(4))
    assert torch.equal(grouped_advantages(column(0.1, 0.7), 1, method=method, impl=impl), torch.zeros(2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.9999, 1e30, -7e-30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_group_contributes_exactly_zero(impl: str, method: str, value: float, dtype: torch.dtype) -> None:
    flat = torch.full((7, 3), value, dtype=dtype)
    other = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    advantages = grouped_advantages(torch.cat([other, flat]), 7, method=method, eps=0.0, impl=impl)
    assert torch.equal(advantages[7:], torch.zeros(7))
    assert advantages[:7].abs().min() > 0


def test_flat_component_leaves_the_others_alone(impl: str) -> None:
    # Opposite components: the sums are flat, the components are not.
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    advantages = grouped_advantages(rewards, 2, weights=[2.0, 1.0], impl=impl)
    assert advantages[1] > 0.7
    assert torch.equal(grouped_advantages(rewards, 2, method="grpo", impl=impl), torch.zeros(2))


def test_grpo_sums_the_scores_that_are_there(impl: str) -> None:
    rewards = torch.tensor([[0.5, NAN], [0.25, 0.5], [NAN, NAN]])
    advantages = grouped_advantages(rewards, 3, method="grpo", eps=0.0, impl=impl)
    torch.testing.assert_close(advantages, torch.tensor([-0.70710678, 0.70710678, 0.0]))


def test_length_mask_acts_before_the_normalisation(impl: str) -> None:
    rewards = torch.tensor([[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]])
    arguments = {"lengths": torch.tensor([10, 30, 4]), "reference_lengths": torch.tensor([10, 10, 10])}
    masked = grouped_advantages(rewards, 3, masked_reward=1, **arguments, impl=impl)
    by_hand = torch.tensor([[0.1, 0.9], [0.2, 0.0], [0.3, 0.0]])
    assert torch.equal(masked, grouped_advantages(by_hand, 3, impl=impl))
    assert torch.equal(masked, grouped_advantages(rewards, 3, masked_reward=-1, **arguments, impl=impl))


def test_length_bounds_are_inclusive(impl: str) -> None:
    rewards = torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    lengths, reference = torch.tensor([5.0, 20.0, 4.999, 20.001]), torch.full((4,), 10.0)
    advantages = grouped_advantages(
        rewards, 4, lengths=lengths, reference_lengths=reference, masked_reward=0, length_bounds=(0.5, 2.0), impl=impl
    )
    assert (advantages > 0).tolist() == [True, True, False, False]


def test_mask_leaves_a_missing_score_missing(impl: str) -> None:
    rewards = column(NAN, 1.0, 0.5)
    lengths, reference = torch.tensor([99.0, 10.0, 10.0]), torch.full((3,), 10.0)
    masked = grouped_advantages(rewards, 3, lengths=lengths, reference_lengths=reference, masked_reward=0, impl=impl)
    assert torch.equal(masked, grouped_advantages(rewards, 3, impl=impl))


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_raise(impl: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"^rewards: infinite"):
        grouped_advantages(column(0.0, value), 2, impl=impl)


def test_tiny_spread_on_a_large_offset_does_not_collapse(impl: str) -> None:
    steps = torch.arange(4, dtype=torch.float64)
    expected = ((steps - steps.mean()) / steps.std()).float()
    rewards = (0.9999 + 1e-6 * steps)[:, None]
    torch.testing.assert_close(grouped_advantages(rewards, 4, eps=0.0, impl=impl), expected, rtol=1e-6, atol=0)
    # The same in float32, whose own rounding of the input is the only error.
    exact = grouped_advantages(rewards.float().double(), 4, eps=0.0, impl=impl)
    torch.testing.assert_close(grouped_advantages(rewards.float(), 4, eps=0.0, impl=impl), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e30, 1e149])
def test_scales_neither_overflow_nor_vanish(impl: str, scale: float) -> None:
    rewards = column(0.0, 1.0, 3.0, 7.0)
    expected = grouped_advantages(rewards, 4, eps=0.0, impl=impl)
    torch.testing.assert_close(grouped_advantages(rewards * scale, 4, eps=0.0, impl=impl), expected)


@pytest.mark.parametrize("method", METHODS)
def test_no_rollouts(impl: str, method: str) -> None:
    assert grouped_advantages(torch.zeros(0, 3), 4, method=method, impl=impl).shape == (0,)


# Properties.


def random_case(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, int, dict]:
    """A batch with ragged missing scores, flat groups, extreme scales, and a length mask in half of the cases."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_groups, group_size, num_rewards = integer(1, 4), integer(1, 9), integer(1, 4)
    shape = (num_groups * group_size, num_rewards)
    rewards = torch.rand(shape, generator=generator, dtype=torch.float64)
    if integer(0, 1):
        rewards = (rewards * 4).round() / 4  # ties, and flat groups
    scale, offset = 10.0 ** integer(-30, 30), (0.0, 1.0, -1e3)[integer(0, 2)]
    if integer(0, 2) == 0:
        rewards = (rewards + offset) * scale
    rewards[torch.rand(shape, generator=generator) < (0.0, 0.2, 0.7)[integer(0, 2)]] = NAN
    arguments: dict = {
        "method": METHODS[integer(0, 2)],
        "eps": (1e-4, 1e-8, 0.0)[integer(0, 2)],
        "weights": torch.randn(num_rewards, generator=generator, dtype=torch.float64) if integer(0, 1) else None,
    }
    if integer(0, 1):
        arguments["lengths"] = torch.randint(0, 40, shape[:1], generator=generator)
        arguments["reference_lengths"] = torch.randint(1, 20, shape[:1], generator=generator)
        arguments["masked_reward"] = integer(0, num_rewards - 1)
    return rewards.to(dtype), group_size, arguments


@pytest.mark.skipif(not native.is_available(), reason=f"no native library: {native.unavailable_reason()}")
@pytest.mark.parametrize("seed", range(10))
def test_native_agrees_with_the_float64_reference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index in range(1000):
        dtype = (torch.float32, torch.float64)[index % 2]
        rewards, group_size, arguments = random_case(generator, dtype)
        exact = grouped_advantages_reference(rewards.double(), group_size, **arguments)
        actual = grouped_advantages(rewards, group_size, impl="native", **arguments)
        # Weighted terms may cancel: their own size bounds the float64 rounding.
        weights = arguments["weights"]
        terms = 3.0 * (1.0 if weights is None else float(weights.abs().sum()) + 1.0)
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-12 * terms)


@pytest.mark.skipif(not native.is_available(), reason=f"no native library: {native.unavailable_reason()}")
@pytest.mark.usefixtures("restored_level")
@pytest.mark.parametrize("method", METHODS)
def test_instruction_sets_and_threads_give_the_same_bits(method: str) -> None:
    rewards = torch.rand(40_000 * 3, 3, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    rewards[rewards < 0.1] = NAN
    threads, results = torch.get_num_threads(), []
    try:
        for level, count in (("plain", 1), ("avx2", 2), ("avx512", 3), ("avx512", 1)):
            native.set_simd_level(level)
            torch.set_num_threads(count)
            results += [grouped_advantages(r, 5, method=method, impl="native") for r in (rewards, rewards.float())]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[i % 2]) for i, result in enumerate(results))


def test_rounding_noise_of_a_batch_is_flat(impl: str) -> None:
    # Opposite components: every advantage is 0 but for rounding, and eps = 0 would blow that up to +-1.
    rewards = torch.rand(64, 1, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    opposite = torch.cat([rewards, -0.3 * rewards], dim=1)
    assert torch.equal(grouped_advantages(opposite, 8, method="gdpo", eps=0.0, impl=impl), torch.zeros(64))


@pytest.mark.parametrize("outlier", [0, 7])
def test_an_outlier_does_not_take_the_digits_of_the_others(impl: str, outlier: int) -> None:
    rewards = 1.0 + 1e-9 * torch.arange(8, dtype=torch.float64)
    rewards[outlier] = 0.0
    exact = (rewards - rewards.mean()) / rewards.std()
    actual = grouped_advantages(rewards[:, None], 8, eps=0.0, impl=impl)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-7, atol=0)


@pytest.mark.interpreter
def test_triton_agrees_with_the_float64_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    for index in range(200):
        dtype = (torch.float32, torch.float64)[index % 2]
        rewards, group_size, arguments = random_case(generator, dtype)
        exact = grouped_advantages_reference(rewards.double(), group_size, **arguments)
        actual = grouped_advantages(rewards, group_size, impl="triton", **arguments)
        weights = arguments["weights"]
        terms = 3.0 * (1.0 if weights is None else float(weights.abs().sum()) + 1.0)
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-12 * terms)


def test_comparison_rule_holds_for_native(impl: str) -> None:
    def compared(seed: int) -> Iterator[Compared]:
        rewards = torch.rand(64, 3, generator=torch.Generator().manual_seed(3 + seed))
        exact = grouped_advantages_reference(rewards.double(), 8)
        working = grouped_advantages_reference(rewards, 8)
        yield Compared("advantages", grouped_advantages(rewards, 8, impl=impl), working, exact)

    assert_as_accurate_over(compared)


@pytest.mark.parametrize("method", METHODS)
def test_permutation_within_a_group(impl: str, method: str) -> None:
    generator = torch.Generator().manual_seed(5)
    rewards = torch.rand(6, 8, 3, generator=generator)
    rewards[rewards < 0.1] = NAN
    order = torch.stack([torch.randperm(8, generator=generator) for _ in range(6)])
    shuffled = rewards.gather(1, order[..., None].expand(-1, -1, 3))
    before = grouped_advantages(rewards.view(48, 3), 8, method=method, impl=impl).view(6, 8)
    after = grouped_advantages(shuffled.reshape(48, 3), 8, method=method, impl=impl).view(6, 8)
    torch.testing.assert_close(after, before.gather(1, order), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["c-gdpo", "grpo"])
def test_split_batch_gives_the_same_bits(impl: str, method: str) -> None:
    rewards = torch.rand(40, 3, generator=torch.Generator().manual_seed(6))
    whole = grouped_advantages(rewards, 8, method=method, impl=impl)
    parts = [grouped_advantages(part, 8, method=method, impl=impl) for part in rewards.split([8, 24, 8])]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("method", METHODS)
def test_same_input_gives_the_same_bits_at_any_thread_count(impl: str, method: str) -> None:
    rewards = torch.rand(4096, 3, generator=torch.Generator().manual_seed(7))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(grouped_advantages(rewards, 8, method=method, impl=impl))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_and_grad_requiring_rewards(impl: str) -> None:
    wide = torch.rand(8, 6, generator=torch.Generator().manual_seed(8), requires_grad=True)
    strided = wide[:, ::2]
    advantages = grouped_advantages(strided, 4, impl=impl)
    assert torch.equal(advantages, grouped_advantages(strided.detach().contiguous(), 4, impl=impl))
    assert not advantages.requires_grad


# Bad input.

R4 = torch.rand(4, 2)
MASK = {"lengths": torch.ones(4), "reference_lengths": torch.ones(4), "masked_reward": 0}


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("rewards", lambda: grouped_advantages([[0.0]], 1)),  # type: ignore[arg-type]
        ("rewards", lambda: grouped_advantages(torch.rand(4), 2)),
        ("rewards", lambda: grouped_advantages(torch.rand(4, 0), 2)),
        ("rewards", lambda: grouped_advantages(R4.half(), 2)),
        ("rewards", lambda: grouped_advantages(torch.ones(4, 2, dtype=torch.int64), 2)),
        ("group_size", lambda: grouped_advantages(R4, 3)),
        ("group_size", lambda: grouped_advantages(R4, 0)),
        ("group_size", lambda: grouped_advantages(R4, 2.0)),  # type: ignore[arg-type]
        ("weights", lambda: grouped_advantages(R4, 2, weights=[1.0])),
        ("weights", lambda: grouped_advantages(R4, 2, weights=torch.ones(3))),
        ("method", lambda: grouped_advantages(R4, 2, method="ppo")),
        ("eps", lambda: grouped_advantages(R4, 2, eps=-1.0)),
        ("eps", lambda: grouped_advantages(R4, 2, eps=NAN)),
        ("impl", lambda: grouped_advantages(R4, 2, impl="cuda")),
        ("lengths", lambda: grouped_advantages(R4, 2, masked_reward=0)),
        ("masked_reward", lambda: grouped_advantages(R4, 2, **{**MASK, "masked_reward": None})),
        ("masked_reward", lambda: grouped_advantages(R4, 2, **{**MASK, "masked_reward": 2})),
        ("lengths", lambda: grouped_advantages(R4, 2, **{**MASK, "lengths": torch.ones(3)})),
        ("reference_lengths", lambda: grouped_advantages(R4, 2, **{**MASK, "reference_lengths": torch.ones(4, 1)})),
        ("length_bounds", lambda: grouped_advantages(R4, 2, **MASK, length_bounds=(2.0, 0.5))),
        ("length_bounds", lambda: grouped_advantages(R4, 2, **MASK, length_bounds=(NAN, 2.0))),
        ("length_bounds", lambda: grouped_advantages(R4, 2, **MASK, length_bounds=(1.0,))),  # type: ignore[arg-type]
        ("lengths", lambda: grouped_advantages(R4, 2, **{**MASK, "lengths": torch.ones(4, device="meta")})),
    ],
)
def test_bad_argument_is_named(argument: str, call) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        call()


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("rewards", {"rewards": R4.double() * 1e151}),
        ("weights", {"weights": [1.0, NAN]}),
        ("weights", {"weights": [1e31, 1.0]}),
        ("lengths", {**MASK, "lengths": torch.tensor([1.0, -1.0, 1.0, 1.0])}),
        ("lengths", {**MASK, "lengths": torch.tensor([1.0, NAN, 1.0, 1.0])}),
        ("reference_lengths", {**MASK, "reference_lengths": torch.tensor([1, 1, 0, 1])}),
        ("reference_lengths", {**MASK, "reference_lengths": torch.tensor([1.0, 1.0, math.inf, 1.0])}),
    ],
)
def test_bad_value_is_named(impl: str, argument: str, changed: dict) -> None:
    arguments = {"rewards": R4, **changed}
    with pytest.raises(ValueError, match=f"^{argument}: "):
        grouped_advantages(arguments.pop("rewards"), 2, **arguments, impl=impl)


def test_unknown_impl_is_refused_with_the_list_of_impls() -> None:
    with pytest.raises(ValueError, match=r"impl: grouped_advantages has 'auto', 'reference', 'native', 'triton'; got"):
        grouped_advantages(R4, 2, impl="cuda")


def test_triton_refuses_cpu_tensors_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"^impl: "):
        grouped_advantages(R4, 2, impl="triton")


@pytest.mark.interpreter
def test_triton_refuses_a_group_that_does_not_fit_a_tile() -> None:
    table = launch.TABLES["_grouped_advantages_kernel"]
    assert {row.blocks["BLOCK_VALUES"] for row in table.values()} == {_MAX_TRITON_GROUP}
    with pytest.raises(ValueError, match=r"^group_size: .* at most 512"):
        grouped_advantages(torch.rand(1024, 1), 1024, impl="triton")
    rewards = torch.rand(500, 2, generator=torch.Generator().manual_seed(2))
    expected = grouped_advantages(rewards, 500, impl="reference")
    torch.testing.assert_close(grouped_advantages(rewards, 500, impl="triton"), expected)


# Registration.


@pytest.mark.parametrize("extra", [{}, {**MASK, "weights": torch.ones(2, dtype=torch.float64)}])
def test_opcheck(impl: str, extra: dict) -> None:
    arguments = (
        R4,
        2,
        extra.get("weights"),
        extra.get("lengths"),
        extra.get("reference_lengths"),
        extra.get("masked_reward"),
        0.5,
        2.0,
        "c-gdpo",
        1e-4,
        impl,
    )
    torch.library.opcheck(torch.ops.balcaprl.grouped_advantages.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_compile(backend: str) -> None:
    def step(rewards: Tensor, lengths: Tensor) -> Tensor:
        mask = {"lengths": lengths, "reference_lengths": torch.ones_like(lengths), "masked_reward": -1}
        return grouped_advantages(rewards * 2.0, 4, weights=(1.0, 0.5), **mask) + 1.0

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for num_rollouts in (8, 12, 20):  # the second size makes shapes dynamic
        rewards, lengths = torch.rand(num_rollouts, 2), torch.rand(num_rollouts)
        torch.testing.assert_close(compiled(rewards, lengths), step(rewards, lengths))


def test_works_without_the_library_and_says_so_once(tmp_path) -> None:
    script = """
import warnings, torch
from balcaprl.kernels import grouped_advantages
from balcaprl.kernels.support import native
from pathlib import Path
native.library_path = lambda: Path("nowhere.so")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        grouped_advantages(torch.rand(4, 2), 2)
assert len(caught) == 1 and "cmake" in str(caught[0].message), caught
assert not native.is_available()
try:
    grouped_advantages(torch.rand(4, 2), 2, impl="native")
except RuntimeError as error:
    assert "not installed" in str(error)
else:
    raise SystemExit("impl='native' ran without a library")
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=120)


def test_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.is_available():
        pytest.skip(f"no native library: {native.unavailable_reason()}")
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    try:
        assert not native.is_available()
        assert "interface version" in str(native.unavailable_reason())
    finally:
        native._load.cache_clear()
