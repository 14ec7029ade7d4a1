"""Every field of every section keeps to the same rules: numbers are finite, bounded and no booleans, paths know ``~``."""

import math
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from balcaprl import config
from balcaprl.config import TrainConfig
from balcaprl.config.base import MAX_NUMBER, Section, scalar_types

REQUIRED = {
    config.CustomReward: {"name": "brevity", "source": "questions"},
    config.RewardCondition: {"reward": "recall", "on": "precision", "at_least": 0.5},
    config.ServerConfig: {"url": "http://127.0.0.1:8000/v1"},
}


def sections():
    return sorted(Section.__subclasses__(), key=lambda section: section.__name__)


def fields_of_kind(*kinds):
    return [
        pytest.param(section, name, id=f"{section.__name__}.{name}")
        for section in sections()
        for name, field in section.model_fields.items()
        if set(kinds) & {kind if isinstance(kind, type) else type(kind) for kind in scalar_types(field.annotation)}
    ]


def with_value(section, name, value):
    return section.model_validate({**REQUIRED.get(section, {}), name: value})


def test_the_walk_reaches_every_section_of_a_run():
    """A section that did not derive from the common base would be bound by no rule."""

    def reached(model):
        for field in model.model_fields.values():
            for kind in scalar_types(field.annotation):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    yield kind
                    yield from reached(kind)

    assert {TrainConfig, *reached(TrainConfig)} == set(sections())
    assert len(fields_of_kind(int, float)) > 60


NO_NUMBERS = [
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    10**400,
    -(10**400),
    "nan",
    "inf",
    "1e400",
    "-1e400",
    "9" * 5000,
    "many",
    "",
    "true",
    [1],
    {"value": 1},
    1e300,
    2**63,
    -(2**63),
    1j,
]


@pytest.mark.parametrize(("section", "name"), fields_of_kind(int, float))
def test_no_numeric_field_takes_what_is_no_sane_number(section, name):
    taken = []
    for value in NO_NUMBERS:
        try:
            taken.append((value, with_value(section, name, value)))
        except ValidationError:
            continue
    assert not taken


@pytest.mark.parametrize(("section", "name"), fields_of_kind(int, float))
def test_a_numeric_field_keeps_its_default_and_has_a_bound_that_is_no_request_for_a_machine(section, name):
    field = section.model_fields[name]
    if not field.is_required() and field.default is not None:
        assert getattr(with_value(section, name, field.default), name) == field.default
    bounds = [getattr(rule, "le", getattr(rule, "lt", None)) for rule in field.metadata]
    assert all(bound is None or bound <= 10**15 for bound in bounds)
    if not any(bound is not None for bound in bounds):
        with pytest.raises(ValidationError):
            with_value(section, name, MAX_NUMBER + 1)


@pytest.mark.parametrize(("section", "name"), fields_of_kind(Path))
def test_every_path_knows_the_home_folder(section, name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(with_value(section, name, "~/some/where"), name) == tmp_path / "some" / "where"
    assert getattr(with_value(section, name, "a~/b"), name) == Path("a~/b")
    for bad in ("~no_such_user_here/x", "a\0b", ""):
        with pytest.raises(ValidationError):
            with_value(section, name, bad)


@pytest.mark.parametrize(
    ("section", "name"), [(config.ModelConfig, "path"), (config.CustomReward, "source")], ids=["model", "reward"]
)
def test_texts_that_may_be_paths_know_it_too(section, name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert getattr(with_value(section, name, "~/mine.py:f"), name) == f"{tmp_path}/mine.py:f"
    assert getattr(with_value(section, name, "Qwen/Qwen2.5-VL"), name) == "Qwen/Qwen2.5-VL"


def test_a_literal_number_is_no_boolean_either():
    assert get_args(config.RolloutConfig.model_fields["max_staleness"].annotation) == (0, 1)
    with pytest.raises(ValidationError):
        config.RolloutConfig(max_staleness=True)
