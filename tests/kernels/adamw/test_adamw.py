"""AdamW over all parameters: against torch's AdamW and its clipping in float64, what is left alone, what is launched."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

import pytest
import torch
from tile_sizes import overridden
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from balcaprl.kernels import adamw_update
from balcaprl.kernels.adamw import adamw
from balcaprl.kernels.adamw.adamw import check_agreement, resolve_impl
from balcaprl.kernels.adamw.records import AdamWNorms, AdamWSettings, AdamWTensors
from balcaprl.kernels.support import launch
from balcaprl.kernels.support.testing import Compared, assert_as_accurate_over

# Tables hold addresses, which a launch that is sent to a GPU cannot translate: there the tensors lie on the GPU.
DEVICE = torch.device("cuda" if os.environ.get("BALCAPRL_TEST_GPU") == "1" else "cpu")
SETTINGS = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (5, 7), (0, 4), (64,), (2, 3, 11), (1025,), (40, 50)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.interpreter)]


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def small_chunks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiles and chunks so small that small tensors need several of each."""
    if "triton" not in request.node.name or DEVICE.type == "cuda":
        yield
        return
    from balcaprl.kernels.adamw import triton as fused

    names = ("_adamw_squares_kernel", "_adamw_direction_kernel", "_adamw_apply_kernel")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(fused, "_CHUNK", 768)
        for name in names:
            stack.enter_context(overridden(name, BLOCK=256))
        stack.enter_context(overridden("_adamw_norms_kernel", BLOCK_C=4))
        yield


def make(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0, step: int = 0, scale: float = 1.0
) -> list[AdamWTensors]:
    """Parameters with random state; before step 0 the moments are 0. Masters are float32, or wider."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        weights, gradient, mean, square = (torch.randn(shape, generator=generator) for _ in range(4))
        parameter = weights.to(DEVICE, dtype)
        master = parameter if dtype.itemsize >= 4 else parameter.float()
        moments = (mean.to(master), square.square().to(master)) if step else (torch.zeros_like(master),) * 2
        moments = tuple(moment.clone() for moment in moments)
        made.append(AdamWTensors(parameter, master, (scale * gradient).to(DEVICE, dtype), *moments, step=step))
    return made


def widened(tensors: list[AdamWTensors]) -> list[AdamWTensors]:
    """The same in float64, with masters that are the parameters."""
    result = []
    for each in tensors:
        parameter, gradient, mean, square = (
            None if t is None else t.detach().double().clone()
            for t in (each.master, each.gradient, each.exp_avg, each.exp_avg_sq)
        )
        assert parameter is not None
        result.append(AdamWTensors(parameter, parameter, gradient, mean, square, each.step))
    return result


def copies(tensors: list[AdamWTensors]) -> list[Tensor]:
    return [
        t.clone()
        for each in tensors
        for t in (each.parameter, each.master, each.exp_avg, each.exp_avg_sq)
        if t is not None
    ]


def update(tensors: list[AdamWTensors], settings: AdamWSettings, impl: str) -> AdamWNorms:
    made = adamw_update(tensors, settings, impl=impl)
    made.apply()
    return made.norms


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["small", "clipped"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_steps_are_those_of_torch(impl: str, dtype: torch.dtype, scale: float) -> None:
    """Five steps in which every third parameter has a gradient only now and then, against float64."""
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    tensors = make(SHAPES, dtype)
    weights = [each.master.detach().double().clone().requires_grad_() for each in tensors]
    peer = torch.optim.AdamW(weights, lr=SETTINGS.lr, betas=(0.9, 0.99), eps=SETTINGS.eps, weight_decay=0.1)
    for number in range(5):
        drawn = make(SHAPES, dtype, seed=number + 1, scale=scale)
        for index, (each, weight) in enumerate(zip(drawn, weights, strict=True)):
            gradient = None if index % 3 == 2 and number % 2 else each.gradient
            tensors[index] = tensors[index]._replace(gradient=gradient)
            weight.grad = None if gradient is None else gradient.double()
        before = torch.cat([w.detach().flatten() for w in weights])
        norms = update(tensors, SETTINGS, impl)
        wanted = torch.nn.utils.clip_grad_norm_(weights, SETTINGS.max_grad_norm)
        assert norms.gradient == pytest.approx(float(wanted), rel=1e-5)
        peer.step()
        change = float((torch.cat([w.detach().flatten() for w in weights]) - before).norm())
        bound = SETTINGS.lr * SETTINGS.weight_decay * norms.weights
        assert norms.weights == pytest.approx(float(before.norm()), rel=1e-5)
        assert norms.update - 2 * bound <= change * 1.00001
        assert change <= norms.update * 1.00001
        tensors = [t if t.gradient is None else t._replace(step=t.step + 1) for t in tensors]
    assert (scale < 1) == (float(wanted) < 1)
    for each, weight in zip(tensors, weights, strict=True):
        state = peer.state[weight]
        torch.testing.assert_close(each.master.double(), weight.detach(), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(each.exp_avg.double(), state["exp_avg"], rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]
        torch.testing.assert_close(each.exp_avg_sq.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)  # type: ignore[union-attr]
        assert torch.equal(each.parameter, each.master.to(dtype))
        assert each.step == int(state["step"])


@pytest.mark.interpreter
@pytest.mark.parametrize("step", [0, 1, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_is_as_accurate_as_the_reference(dtype: torch.dtype, step: int) -> None:
    shapes = [(400,), (33,)]

    def compared(seed: int) -> Iterator[Compared]:
        results = []
        for impl, kind in (("triton", "as it is"), ("reference", "as it is"), ("reference", "wide")):
            tensors = make(shapes, dtype, seed, step)
            tensors = widened(tensors) if kind == "wide" else tensors
            norms = update(tensors, SETTINGS, impl)
            values = [torch.cat([t.flatten() for t in each]) for each in list(zip(*tensors, strict=True))[1:5]]
            results.append([*(values[i] for i in (0, 2, 3)), torch.tensor(norms, dtype=torch.float64)])
        for name, actual, working, exact in zip(("weights", "exp_avg", "exp_avg_sq", "norms"), *results, strict=True):
            yield Compared(name, actual, working, exact.double())

    assert_as_accurate_over(compared, num_problems=4)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.3, 0.99), (0.99, 0.0)])
def test_any_betas(impl: str, betas: tuple[float, float]) -> None:
    settings = SETTINGS._replace(beta1=betas[0], beta2=betas[1], max_grad_norm=3.0, weight_decay=0.0)
    tensors = make([(50,)], torch.float32, step=2)
    exact = widened(tensors)
    update(tensors, settings, impl)
    update(exact, settings, "reference")
    torch.testing.assert_close(tensors[0].master.double(), exact[0].master, rtol=1e-5, atol=1e-6)


def test_views_of_larger_tensors_are_written_in_place_and_nothing_beside_them(impl: str) -> None:
    whole = torch.arange(300, dtype=torch.float32, device=DEVICE).to(torch.bfloat16)
    before = whole.clone()
    parts = []
    for begin, end in ((0, 3), (3, 60), (64, 200), (201, 299)):  # aligned and not
        view = whole[begin:end]
        zeros = [torch.zeros(end - begin, device=DEVICE) for _ in range(2)]
        parts.append(AdamWTensors(view, view.float(), torch.ones_like(view), *zeros, step=0))
    update(parts, SETTINGS._replace(lr=1.0), impl)
    changed = (whole != before).tolist()
    assert not any(changed[i] for i in (*range(60, 64), 200, 299))
    for each in parts:
        assert torch.equal(each.parameter, each.master.to(torch.bfloat16))
        assert float((each.master - each.parameter.float()).abs().max()) <= 1
    assert sum(changed) > 150  # large numbers in bfloat16 do not move


def test_gradients_may_be_strided(impl: str) -> None:
    tensors, plain = make([(12, 20)], torch.float32), make([(12, 20)], torch.float32)
    assert plain[0].gradient is not None
    strided = plain[0].gradient.t().contiguous().t()
    assert not strided.is_contiguous()
    norms, wanted = update([tensors[0]._replace(gradient=strided)], SETTINGS, impl), update(plain, SETTINGS, impl)
    assert norms == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(copies(tensors), copies(plain), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("where", ["gradient", "exp_avg", "exp_avg_sq", "master"])
def test_damage_is_seen_in_its_norm_and_nothing_changes_until_it_is_asked_for(
    impl: str, where: str, wrong: float
) -> None:
    tensors = make(SHAPES, torch.bfloat16, step=3)
    damaged = getattr(tensors[8], where)
    damaged.view(-1)[700] = wrong
    before = copies(tensors)
    norms = adamw_update(tensors, SETTINGS, impl=impl).norms
    finite = [math.isfinite(norm) for norm in norms]
    # 1e30 is finite, and its square is not: as a second moment it does no harm.
    expected = {
        "gradient": [False, False, True],
        "exp_avg": [True, False, True],
        "exp_avg_sq": [True, wrong > 0 and not math.isnan(wrong), True],
        "master": [True, False, False],
    }[where]
    if where == "gradient" and wrong == 1e30:
        # The factor is 0, and with it the clipped gradient.
        expected[1] = True
    assert finite == expected
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(before, copies(tensors), strict=True))


def test_without_gradients_only_the_weights_are_measured(impl: str) -> None:
    tensors = [t._replace(gradient=None, exp_avg=None, exp_avg_sq=None) for t in make(SHAPES, torch.bfloat16)]
    before = copies(tensors)
    norms = update(tensors, SETTINGS, impl)
    exact = math.sqrt(sum(float(t.master.double().square().sum()) for t in tensors))
    assert norms.gradient == 0
    assert norms.weights == pytest.approx(exact, rel=1e-6)
    assert norms.update == pytest.approx(SETTINGS.lr * SETTINGS.weight_decay * exact, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, copies(tensors), strict=True))
    assert adamw_update([], SETTINGS, impl=impl).norms == (0, 0, 0)


def test_same_input_same_bits(impl: str) -> None:
    results = []
    for _ in range(2):
        tensors = make(SHAPES, torch.bfloat16, step=3)
        results.append((update(tensors, SETTINGS, impl), copies(tensors)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.interpreter
def test_autograd_notices_that_weights_were_changed_by_triton() -> None:
    weight = torch.ones(4, device=DEVICE, requires_grad=True)
    loss = (weight * weight).sum()
    moments = torch.zeros(2, 4, device=DEVICE)
    update([AdamWTensors(weight, weight, torch.ones(4, device=DEVICE), *moments, step=0)], SETTINGS, "triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.interpreter
def test_triton_agrees_where_it_is_asked_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    check_agreement(DEVICE, DTYPES, SETTINGS, "triton")
    monkeypatch.setattr("balcaprl.kernels.adamw.triton.bias_corrections", lambda step, settings: (1.0, 1.01))
    with pytest.raises(RuntimeError, match=r"triton differs from the reference by up to \d"):
        check_agreement(DEVICE, DTYPES, SETTINGS, "triton")


class Operations(TorchDispatchMode):
    """Counts dispatched operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view:
            self.names.append(str(function))
        return function(*arguments, **(options or {}))


class Stub:
    """Stands for a kernel: counts launches, does nothing."""

    def __init__(self, launches: list[str], name: str) -> None:
        self.launches, self.name = launches, name

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: self.launches.append(self.name)


@pytest.mark.interpreter
@pytest.mark.parametrize("count", [1, 50])
def test_launches_and_memory_of_triton_do_not_grow_with_the_number_of_parameters(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from balcaprl.kernels.adamw import triton as fused

    launches: list[str] = []
    for name in [n for n in vars(fused) if n.startswith("_adamw_") and n.endswith("_kernel")]:
        monkeypatch.setattr(fused, name, Stub(launches, name))
    tensors = make([(2000,), (40, 50)] * count, torch.bfloat16)
    adamw_update(tensors, SETTINGS, impl="triton")  # makes the table of chunks
    launches.clear()
    with Operations() as operations:
        adamw_update(tensors, SETTINGS, impl="triton").apply()
    assert len(launches) == 5
    assert len(operations.names) <= 20, operations.names
    assert len(launches) + len(operations.names) <= 30


def test_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(SHAPES, torch.bfloat16)
    if DEVICE.type == "cpu":
        assert resolve_impl("auto", tensors) == "reference"
    assert resolve_impl("triton", tensors) == "triton"
    assert resolve_impl("auto", []) == "reference"
    assert adamw._unsuitable(tensors[4], DEVICE) is None
    wide = make([(3,)], torch.float64)[0]
    assert "float64" in str(adamw._unsuitable(wide, DEVICE))
    assert "not on meta" in str(adamw._unsuitable(tensors[4], torch.device("meta")))
    strided = tensors[4]._replace(master=tensors[4].master.t().contiguous().t())
    assert "not contiguous" in str(adamw._unsuitable(strided, DEVICE))
    half = tensors[4]._replace(exp_avg=tensors[4].master.half())
    assert "not float32" in str(adamw._unsuitable(half, DEVICE))
    monkeypatch.setattr(launch, "check_triton", lambda _: None)
    with pytest.raises(ValueError, match=r"^tensors: number 1 has the dtypes torch.float64 and torch.float64, which"):
        adamw_update([tensors[4], wide], SETTINGS, impl="triton")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", -1.0),
        ("lr", math.inf),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
    ],
)
def test_bad_settings(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        adamw_update(make([(3,)], torch.float32), SETTINGS._replace(**{field: value}))


def test_bad_tensors() -> None:
    good = make([(3,)], torch.bfloat16)[0]
    for name in ("master", "gradient", "exp_avg", "exp_avg_sq"):
        with pytest.raises(ValueError, match=rf"^tensors: number 1 .* its {name} has shape \(4,\)"):
            adamw_update([good, good._replace(**{name: torch.zeros(4, device=DEVICE)})], SETTINGS)
    with pytest.raises(ValueError, match=r"^tensors: number 0 has a gradient and no moments"):
        adamw_update([good._replace(exp_avg=None)], SETTINGS)
    with pytest.raises(ValueError, match=r"^impl: adamw_update has"):
        adamw_update([good], SETTINGS, impl="native")
