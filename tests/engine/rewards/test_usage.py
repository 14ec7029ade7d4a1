"""The account of what a run's judge cost: kept over restarts, and never taken for less than it says."""

import json

import pytest

from balcaprl.config import EndpointConfig
from balcaprl.rewards.usage import BudgetSpentError, Ledger

GOOD = {"num_replies": 3, "prompt_tokens": 100, "completion_tokens": 50, "cost": 1.5}


def test_an_account_is_kept_over_restarts(tmp_path):
    path = tmp_path / "run" / "judge_usage.json"
    ledger = Ledger(EndpointConfig(budget=1.6), path)
    ledger.totals = dict(GOOD)
    ledger.save()
    again = Ledger(EndpointConfig(budget=1.6), path)
    assert again.totals == GOOD
    with pytest.raises(BudgetSpentError):
        again.check()


@pytest.mark.parametrize(
    "content",
    [
        *(
            json.dumps({**GOOD, "cost": value})
            for value in (float("nan"), float("inf"), -1e9, "1", None, [], True, 10**400)
        ),
        json.dumps({**GOOD, "prompt_tokens": -(10**12)}),
        json.dumps({"cost": 1.0}),
        "[]",
        "",
        "{",
        "[" * 50_000,
        "\x00" * 100,
        " " * (1 << 20) + json.dumps(GOOD),
    ],
    ids=range(16),
)
def test_a_damaged_account_lifts_no_budget(tmp_path, content):
    path = tmp_path / "judge_usage.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="damaged account"):
        Ledger(EndpointConfig(budget=1.6), path)
    assert path.read_text() == content


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "judge_usage.json.tmp").symlink_to(precious)
    Ledger(EndpointConfig(), tmp_path / "judge_usage.json").save()
    assert precious.read_text() == "precious"
