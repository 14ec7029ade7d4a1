"""The audit ranks judges rightly, says how sure it is, and measures what it says it does."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scripted_judge import ScriptedServer
from truthful_judge import truthful_answer

from balcaprl.cli.main import main
from balcaprl.config import TrainConfig
from balcaprl.rewards import LexicalJudge
from balcaprl.rewards.audit import audit_captions, audit_config, audit_judge, cohen_kappa, correlation, weighted_kappa
from balcaprl.rewards.scenes.judge import SceneJudge
from balcaprl.types import Assertion, ReferenceUnit, RewardBreakdown


class BadJudge:
    """Says yes or no by the toss of a coin."""

    name = "bad"

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def score(self, sample, captions):
        answers = []
        for exact in SceneJudge().score(sample, captions):
            toss = self.rng.random(len(exact.assertions)) < 0.5
            assertions = tuple(
                replace(a, verified=bool(t), pointable=True) for a, t in zip(exact.assertions, toss, strict=True)
            )
            answers.append(RewardBreakdown(*self.rng.random(3), *self.rng.integers(1, 6, 3), assertions=assertions))
        return answers


class YesJudge:
    """Finds everything perfect."""

    name = "yes"

    def score(self, sample, captions):
        return [
            RewardBreakdown(1, 1, 1, 5, 5, 5, assertions=(Assertion("all", ((0, len(caption)),), True, True),))
            for caption in captions
        ]


class OtherUnits:
    """The exact judge, but for its reference units, which ``change`` makes of the exact ones."""

    name = "other units"

    def __init__(self, change):
        self.change = change

    def score(self, sample, captions):
        return [
            replace(exact, reference_units=tuple(self.change(exact.reference_units)))
            for exact in SceneJudge().score(sample, captions)
        ]


@pytest.fixture(scope="module")
def reports():
    samples, captions = audit_captions(30, 4, 0)
    judges = (SceneJudge(), LexicalJudge(), BadJudge(), YesJudge())
    return {j.name: audit_judge(j, samples, captions, num_bootstraps=200) for j in judges}


def test_the_exact_judge_is_perfect(reports):
    report = reports["scene"]
    whole = report.assertions["all"]
    assert whole.kappa == whole.precision == whole.recall == (1, 1, 1)
    assert whole.num_unjudged == 0
    assert report.units.kappa == (1, 1, 1)
    assert report.agreement[0] == pytest.approx(1)
    assert all(value[0] == 0 for value in report.difference.values())
    assert set(report.retest.values()) == {1.0}
    assert {"shape", "colour", "size", "fill", "place", "count", "relation", "background"} <= report.assertions.keys()


def test_judges_are_ranked_rightly_and_apart(reports):
    exact, lexical, bad = (reports[name] for name in ("scene", "lexical", "bad"))
    for better, worse in ((exact, lexical), (lexical, bad)):
        assert better.agreement[1] > worse.agreement[2]  # the intervals do not touch
        assert better.assertions["all"].kappa[1] > worse.assertions["all"].kappa[2]
    for interval in (bad.agreement, bad.assertions["all"].kappa):
        assert interval[1] <= 0.05
        assert interval[0] == pytest.approx(0, abs=0.1)
    assert bad.retest["precision"] < 0.1


def test_a_judge_that_always_says_yes_gains_nothing(reports):
    report = reports["yes"]
    assert report.assertions["all"].recall[0] == 1
    assert report.assertions["all"].kappa[0] == pytest.approx(0, abs=1e-12)
    assert report.agreement[0] == 0
    assert report.units is None


@pytest.mark.parametrize(
    "change",
    [
        lambda units: [replace(unit, text=f"part {i} of the reference") for i, unit in enumerate(units)],
        lambda units: [*units[:-1], replace(units[-1], text="something else")],
        lambda units: reversed(units),
        lambda units: units[1:],
        lambda units: [*units, ReferenceUnit("one more", True)],
    ],
    ids=["all other", "one other", "another order", "fewer", "more"],
)
def test_units_are_compared_only_with_the_same_units(change):
    """As many units are not yet the same: a judge may take the reference apart in its own way."""
    report = audit_judge(OtherUnits(change), *audit_captions(4, 2, 0), retest=False, num_bootstraps=20)
    assert report.units is None
    assert report.assertions["all"].kappa[0] == 1


def test_a_number_after_a_unit_does_not_make_it_another():
    judge = OtherUnits(lambda units: [replace(unit, text=f"{unit.text} ({i})") for i, unit in enumerate(units)])
    report = audit_judge(judge, *audit_captions(4, 2, 0), retest=False, num_bootstraps=20)
    assert report.units.kappa[0] == 1


def test_intervals_hold_the_value_and_narrow_with_more_scenes():
    widths = []
    for num in (10, 60):
        report = audit_judge(LexicalJudge(), *audit_captions(num, 2, 0), retest=False, num_bootstraps=200)
        value, low, high = report.assertions["all"].kappa
        assert low <= value <= high
        widths.append(high - low)
    assert widths[1] < 0.7 * widths[0]


def test_kappa_by_hand():
    pairs = np.array([[1, 1]] * 20 + [[1, 0]] * 5 + [[0, 1]] * 10 + [[0, 0]] * 15, bool)
    assert cohen_kappa(pairs) == pytest.approx(0.4)  # Cohen's own kind of example: 0.7 observed, 0.5 by chance
    assert math.isnan(cohen_kappa(np.ones((5, 2), bool)))
    assert math.isnan(cohen_kappa(np.empty((0, 2), bool)))


def test_weighted_kappa_and_correlation_equal_the_libraries():
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(1)
    truth = rng.integers(1, 6, 200)
    told = np.clip(truth + rng.integers(-1, 2, 200), 1, 5)
    pairs = np.stack([truth, told], axis=1).astype(float)
    assert weighted_kappa(pairs) == pytest.approx(cohen_kappa_score(truth, told, weights="quadratic"))
    assert correlation(pairs) == pytest.approx(np.corrcoef(truth, told)[0, 1])
    assert cohen_kappa(pairs > 2) == pytest.approx(cohen_kappa_score(truth > 2, told > 2))


def settings(server, **protocol):
    return TrainConfig.model_validate(
        {
            "data": {"kind": "scenes"},
            "reward": {
                "judge": "endpoint",
                "protocol": {"model": "m", "integer_scores": False, "image_format": "png", **protocol},
            },
            "endpoint": {"servers": [{"url": server.url, "input_price": 1.0}], "cache": None},
        }
    )


@pytest.mark.parametrize("calls", ["separate", "combined"])
def test_a_truthful_endpoint_is_as_good_as_the_exact_judge(calls):
    samples, captions = audit_captions(8, 2, 0)
    with ScriptedServer(truthful_answer(samples, captions)) as server:
        server.answer = with_given_units(server.answer, samples)
        report = audit_config(settings(server, calls=calls), num_scenes=8, captions_per_scene=2)
        assert not server.problems
        assert report.metrics["judge/cost"] > 0
    assert report.assertions["all"].kappa[0] == 1
    assert report.units.kappa[0] == 1
    assert report.agreement[0] == pytest.approx(1)
    assert report.retest["precision"] == 1
    assert report.num_unscored == 0


def with_given_units(answer, samples):
    """The audit gives the exact units as plain texts: number them as the truthful judge does."""

    def answering(asked):
        if "units" in asked.data:
            numbered = {n: f"{i}: {text}" for i, (n, text) in enumerate(asked.data["units"].items())}
            asked.data = {**asked.data, "units": numbered}
        return answer(asked)

    return answering


def test_the_command_prints_tables_and_writes_the_report(tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert (
        main(["judge-audit", "--reward.judge", "lexical", "--scenes", "6", "--captions", "2", "--out", str(out)]) == 0
    )
    told = capsys.readouterr().out
    for part in ("judge lexical", "assertions: colour", "kappa", "agreement", "ms"):
        assert part in told
    assert json.loads(out.read_text())["assertions"]["all"]["num"] > 50
