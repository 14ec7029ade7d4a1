"""The common base of all sections of a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

MAX_NUMBER = 10**9
"""Largest absolute value of a number in a configuration, unless its field sets an upper bound of its own. A mistyped
number is thus refused at once; otherwise, it might only fail an hour later, for lack of memory."""


class Section(BaseModel):
    """Base of all sections: numbers are finite, bounded and not booleans; ``~`` in a path is the user's home folder."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, hide_input_in_errors=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python treats True as 1, and so would pydantic; but `steps: yes` in YAML is a mistake.
        if isinstance(value, bool) and _is_numeric(cls._field(info)):
            raise ValueError("expected a number, not true or false")
        if isinstance(value, str) and not value and Path in scalar_types(cls._field(info).annotation):
            raise ValueError("expected a path, not an empty text; null where there is none")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _numbers_are_finite_and_bounded(cls, value: Any, info: ValidationInfo) -> Any:
        own_bound = any(hasattr(rule, "le") or hasattr(rule, "lt") for rule in cls._field(info).metadata)
        for number in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError("expected a finite number")
            if not own_bound and abs(number) > MAX_NUMBER:
                raise ValueError(f"expected a number of at most {MAX_NUMBER:.0e}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _home_folder_is_expanded(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, Path):
            return expand_home(value)
        if isinstance(value, str) and value.startswith("~/"):  # a text that may be a path, such as `model.path`
            return str(expand_home(value))
        return value

    @classmethod
    def _field(cls, info: ValidationInfo) -> FieldInfo:
        assert info.field_name is not None
        return cls.model_fields[info.field_name]


def expand_home(path: str | Path) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced.

    Raises:
        ValueError: ``path`` cannot be a path, or the home folder of the user is not known.
    """
    if "\0" in str(path):
        raise ValueError("expected a path; it holds a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from error


def scalar_types(annotation: Any) -> Iterator[Any]:
    """The types and literal values that an annotation is made of."""
    parts = get_args(annotation)
    for part in parts:
        yield from scalar_types(part)
    if not parts:
        yield annotation


def _is_numeric(field: FieldInfo) -> bool:
    kinds = [kind if isinstance(kind, type) else type(kind) for kind in scalar_types(field.annotation)]
    return bool not in kinds and any(kind in (int, float) for kind in kinds)


def _numbers(value: Any) -> Iterator[int | float]:
    """All numbers in a field's value; sections inside the value check their own numbers."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers([*value.values()])
