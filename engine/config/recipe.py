"""Reads a recipe; an error says in a line or two what is wrong with it.

A recipe is a small UTF-8 file of YAML whose top level is a mapping. Keys are read as text, because YAML 1.1 would read
``on`` as true. A key may occur only once in a section, and aliases may not make a recipe too large.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from balcaprl.config import TrainConfig
from balcaprl.config.base import expand_home, scalar_types

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
"""Most values in a recipe; a value counts again for each alias that repeats it."""


class RecipeError(ValueError):
    """A recipe or an override cannot be used; ``hint`` says what to do instead, if that is known."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="expected a plain key", problem_mark=key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            key.tag = "tag:yaml.org,2002:str"
            if key.value in seen:
                problem = f"{key.value!r} stands twice in one section"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the mapping in a recipe file.

    Raises:
        RecipeError: the file is missing, or is not text, not YAML or not a mapping. The message names the file and, for
            faults in the YAML, line and column.
    """
    try:
        path = expand_home(path)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a folder; a recipe is a file of YAML") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES >> 20} MiB; a recipe is a small file of YAML")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (at byte {error.start})") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str) -> dict[str, Any]:
    """Parse the mapping in a recipe's text; ``name`` is the recipe's name in messages. Raises RecipeError."""
    value = parse_yaml(text, name)
    if value is None:
        raise RecipeError(f"{name} is empty: expected keys and values, such as `steps: 200`")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise RecipeError(f"{name}: expected keys and values at its top level, such as `steps: 200`, and found {kind}")
    return value


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML value under the rules of this module. Raises RecipeError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_bombs(node, name)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_place(error, name, text)) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise RecipeError(f"{name}: {str(error).splitlines()[0]}") from error
    except RecursionError:
        raise RecipeError(f"{name}: its values are nested too deeply") from None
    except RecipeError:
        raise
    except ValueError as error:  # an invalid date, or a number of thousands of digits
        raise RecipeError(f"{name}: {error}") from error


def _place(error: yaml.MarkedYAMLError, name: str, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    problem = error.problem or error.context or "no YAML"
    if mark is None:
        return f"{name}: {problem}"
    lines = text.splitlines()
    if mark.line < len(lines) and "\t" in lines[mark.line]:
        problem += "; there is a tab in that line: YAML is indented with blanks"
    return f"{name}, line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _refuse_bombs(root: yaml.Node, name: str) -> None:
    """Raise RecipeError if a recipe has too many values; a value counts again for each alias that repeats it.

    The aliases are not expanded for this count.
    """
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, above: frozenset[int]) -> int:
        if id(node) in above:
            raise RecipeError(f"{name}: an alias stands within what it repeats")
        if id(node) not in sizes:
            children: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                children = node.value
            inside = above | {id(node)}
            sizes[id(node)] = 1 + sum(size(child, inside) for child in children)
        return sizes[id(node)]

    if size(root, frozenset()) > MAX_NODES:
        raise RecipeError(f"{name} holds more than {MAX_NODES:,} values, aliases counted as often as they stand")


# ---------------------------------------------------------------------------------------------------- problems


def check_recipe(plain: dict[str, Any]) -> TrainConfig:
    """Validate ``plain``, and return the configuration that it describes.

    Raises:
        RecipeError: a field is wrong. The message says what is wrong with the first such field, and how many more there
            are.
    """
    try:
        return TrainConfig.model_validate(plain)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    # Report an unknown key first, because it explains most of the other problems.
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key = ".".join(map(str, first["loc"]))
    others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        raise RecipeError(f"there is no option {_short(key)}{others}", did_you_mean(key))
    message = "expected a section of options" if first["type"] == "model_type" else first["msg"]
    message = message.removeprefix("Value error, ")
    given = first["input"]
    # The message repeats only numbers: a text may be a key or hold a password.
    shown = f", got {_short(given)}" if isinstance(given, int | float) and not isinstance(given, bool) else ""
    raise RecipeError(f"{key}: {message}{shown}{others}" if key else message + others, _meaning(key))


def all_fields(model: type[BaseModel] = TrainConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and description of every section and field, including the fields of list items."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field.description or ""
        for kind in scalar_types(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from all_fields(kind, f"{prefix}{name}.")


def did_you_mean(key: str) -> str:
    """Question that names the options most similar to ``key`` by name or description; empty if none is similar."""
    fields = dict(all_fields())
    key = re.sub(r"\.\d+", "", key)  # drop indices into lists
    last = key.rpartition(".")[2]
    words = set(re.findall(r"[a-z]+", last.lower()))

    def likeness(option: str) -> float:
        name = option.rpartition(".")[2]
        by_name = max(
            difflib.SequenceMatcher(None, key, option).ratio(), difflib.SequenceMatcher(None, last, name).ratio()
        )
        explained = set(re.findall(r"[a-z]+", fields[option].lower().partition(".")[0]))
        by_words = 0.7 + 0.25 * len(words) / len(explained) if len(words) > 1 and words <= explained else 0.0
        near = 0.05 * (option.rpartition(".")[0] == key.rpartition(".")[0])
        return near + max(by_name, by_words)

    best = sorted(fields, key=likeness, reverse=True)[:3]
    close = [f"`{option}`" for option in best if likeness(option) > max(0.7, likeness(best[0]) - 0.05)]
    return f"did you mean {' or '.join(close)}?" if close else ""


def _meaning(key: str) -> str:
    description = dict(all_fields()).get(re.sub(r"\.\d+", "", key), "")
    return f"{key}: {' '.join(description.split())}" if description else ""


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of very many digits"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------- overrides


def take_options(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what the recipes and dotted options of a command line say, as one mapping, and the other arguments.

    Later recipes and options override earlier ones.

    Raises:
        RecipeError: a recipe cannot be read, or an option lacks its value.
    """
    plain: dict[str, Any] = {}
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or key.partition(".")[0] not in (*TrainConfig.model_fields, "config"):
            rest.append(argument)
            continue
        if not equals:
            if not queue:
                raise RecipeError(f"--{key}: expected a value after it", _meaning(key))
            value = queue.pop(0)
        merge(plain, _override(key, value))
    return plain, rest


def _override(key: str, value: str) -> dict[str, Any]:
    field = _field_of(key)
    if key == "config" or (isinstance(field, type) and issubclass(field, BaseModel)):
        read = parse_recipe(value, f"--{key}") if value.lstrip().startswith("{") else read_recipe(Path(value))
        return read if key == "config" else _nested(key, read)
    kinds = set(scalar_types(field))
    if type(None) in kinds and value in ("null", "None"):
        return _nested(key, None)
    # A text is taken as it stands; a list or a number is read as in a recipe.
    is_text = get_origin(field) not in (list, tuple) and any(k in (str, Path) or isinstance(k, str) for k in kinds)
    return _nested(key, value if is_text else parse_yaml(value, f"--{key}"))


def _field_of(key: str) -> Any:
    annotation: Any = TrainConfig
    for part in key.split("."):
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        if part not in annotation.model_fields:
            return None
        annotation = annotation.model_fields[part].annotation
    return annotation


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return cast("dict[str, Any]", value)


def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge ``new`` into ``into``, section by section; values of ``new`` win."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
