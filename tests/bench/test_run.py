"""The benchmark runs and goes on where it stopped, its rows are complete, and it refuses to time a wrong result."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import run
from ops import inputs, registry, timing
from ops.providers import Op, Provider
from support.provenance import SAME

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = registry.POLICY_LOSS.cases[0]


def plain_op(**providers: Provider) -> Op:
    """policy_loss with these providers alone."""
    return replace(registry.POLICY_LOSS, providers=providers)


@pytest.mark.parametrize("op", ["grouped_advantages", "policy_loss"])
def test_quick_run_prints_complete_rows_and_resumes(op: str, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--op", op, "--quick", "--output", str(output)]
    command += ["--device", "cpu", "--provider", "reference", "--provider", "eager", "--provider", "trl"]
    first = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert first.stdout == output.read_text()
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    passes = {"grouped_advantages": ["forward"], "policy_loss": ["forward", "backward", "both"]}[op]
    cases = [case for case in registry.OPS[op].cases if case.small]
    timed = [row for row in rows if "skipped" not in row]
    assert {(row["case"], row["direction"]) for row in timed} == {(c.name, p) for c in cases for p in passes}
    for row in timed:
        assert row["op"] == op
        assert row["quartile_low_ms"] <= row["median_ms"] <= row["quartile_high_ms"]
        assert row["rounds"] >= timing.MIN_ROUNDS
        assert row["threads"] >= 1
        assert row["torch"]
        assert row["ceiling"] == "copy"
        if row["direction"] != "backward":
            assert row["median_ms"] > 0
            assert row["percent_of_ceiling"] > 0
    # What a second run would leave out; all of it again after a change of the sources or the machine.
    assert run.measured_already(output, rows[0]) == {(op, case.name) for case in cases}
    for name in SAME:
        assert run.measured_already(output, {**rows[0], name: "another"}) == set()


def test_a_whole_name_means_that_case_alone() -> None:
    base = {"op": ["linear_policy_loss"], "provider": None, "device": CPU, "quick": False}

    def names(*parts: str) -> list[str]:
        return [case.name for _, case in run.selected(argparse.Namespace(**base, case=list(parts)))]

    whole = "512x896x32768x8 float32"
    assert names(whole) == [whole]
    assert names("512x896x32768x8 float3") == [
        whole,
        *(f"{whole} {more}" for more in ("peaked", "peaked eps0.000244", "zero0.5")),
    ]


def test_ours_being_wrong_stops_the_run() -> None:
    wrong = Provider(lambda made, case: made["logprobs"].sum(), ours=True)
    with pytest.raises(timing.WrongResult, match="policy_loss, 64x48 float32: output error"):
        timing.measure(plain_op(native=wrong), SMALL, CPU, seconds=0.0)


def test_a_wrong_gradient_is_a_wrong_result() -> None:
    exact = registry.POLICY_LOSS.exact

    def half_detached(made: inputs.Inputs, case: inputs.Case) -> torch.Tensor:
        loss = exact(made, case)
        return 0.5 * loss + 0.5 * loss.detach()

    with pytest.raises(timing.WrongResult, match="gradient error"):
        timing.measure(plain_op(native=Provider(half_detached, ours=True)), SMALL, CPU, seconds=0.0)


def test_a_peer_that_is_wrong_or_missing_is_left_out_with_the_reason() -> None:
    providers = {
        "wrong": Provider(lambda made, case: made["logprobs"].sum()),
        "missing": Provider(lambda made, case: made["logprobs"].sum(), needs="no_such_package"),
        "elsewhere": Provider(lambda made, case: made["logprobs"].sum(), devices=("cuda",)),
        "right": Provider(registry.POLICY_LOSS.exact),
    }
    measured = timing.measure(plain_op(**providers), SMALL, CPU, seconds=0.0)
    assert {t.provider for t in measured.timings} == {"right"}
    assert measured.skipped["wrong"].startswith("WrongResult")
    assert measured.skipped["missing"] == "no_such_package is not installed"
    assert measured.skipped["elsewhere"] == "runs on cuda only"
    backward = measured.samples["right", "backward"]
    both, forward = measured.samples["right", "both"], measured.samples["right", "forward"]
    assert backward == [b - f for b, f in zip(both, forward, strict=True)]


@pytest.mark.skipif(not timing._reset_high_water_mark(), reason="peak resident memory is read through Linux's /proc")
def test_peak_memory_is_what_a_call_takes_beyond_what_it_returns() -> None:
    def call() -> tuple[torch.Tensor, ...]:
        scratch = torch.ones(48 << 18)  # 48 MiB
        return (scratch[: 16 << 18] + 1.0,)

    call()
    peak = timing._peak_bytes(call, CPU)
    assert peak is not None
    assert 46 << 20 < peak < 52 << 20


def test_peaked_inputs_are_as_sharp_as_a_captioner() -> None:
    case = inputs.Case({"tokens": 256, "hidden": 128, "vocabulary": 4096, "rollouts": 8}, peaked=True)
    made = inputs.head_loss(case, torch.Generator().manual_seed(0))
    log_softmax = (made["hidden"] @ made["weight"].T).log_softmax(dim=-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=-1).mean()
    assert float(entropy) == pytest.approx(inputs.POLICY_ENTROPY, abs=0.01)
    chosen = log_softmax.gather(1, made["targets"][:, None]).mean()
    assert float(chosen) == pytest.approx(-inputs.POLICY_ENTROPY, abs=0.25)  # sampled from the distribution itself


def test_every_case_has_its_own_name_and_its_share_of_zero_advantages() -> None:
    for op in registry.OPS.values():
        names = [(case.name, device) for case in op.cases for device in case.devices]
        assert len(names) == len(set(names))
    case = inputs.Case({"rollouts": 8, "length": 4}, zero_fraction=0.5)
    made = inputs.logprobs(case, torch.Generator().manual_seed(0))
    assert int((made["advantages"] == 0).sum()) == 4
