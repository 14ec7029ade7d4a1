"""Recipes: what is no recipe is told in a line that names the place; a wrong key names the right one."""

import json
import os
from pathlib import Path

import pytest

from balcaprl.cli.main import RECIPES, main
from balcaprl.config import TrainConfig
from balcaprl.config.recipe import (
    MAX_BYTES,
    RecipeError,
    all_fields,
    check_recipe,
    did_you_mean,
    parse_recipe,
    read_recipe,
    take_options,
)

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_FILES = {
    "empty": (b"", "is empty"),
    "comment": (b"# nothing\n", "is empty"),
    "null": (b"null", "is empty"),
    "list": (b"- steps: 3\n", "found a list"),
    "scalar": (b"steps", "found a single value"),
    "number": (b"200", "found a single value"),
    "latin-1": ("data: {path: Bär}".encode("latin-1"), "is not UTF-8 text (at byte 14)"),
    "utf-16": ("steps: 3".encode("utf-16"), "is not UTF-8 text (at byte 0)"),
    "binary": (b"\x00\x01\x02", "unacceptable character"),
    "tab": (b"optim:\n\tlr: 1\n", "line 2, column 1"),
    "tab after blanks": (b"optim:\n  lr: 1\n \tbeta1: 2\n", "YAML is indented with blanks"),
    "bracket": (b"optim: {lr: 1\n", "line 2"),
    "twice": (b"optim:\n  lr: 1\n  beta1: 0\n  lr: 2\n", "line 4, column 3: 'lr' stands twice"),
    "section twice": (b"optim: {lr: 1}\nsteps: 3\noptim: {lr: 2}\n", "line 3, column 1: 'optim' stands twice"),
    "twice in a list": (b"reward: {custom: [{name: a, name: b}]}", "'name' stands twice"),
    "twice, quoted": (b"steps: 1\n'steps': 2\n", "'steps' stands twice"),
    "key of a list": (b"[a]: 3\n", "expected a plain key"),
    "two documents": (b"steps: 3\n---\nsteps: 4\n", "line 2"),
    "code": (b"steps: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
    "alias bomb": (BOMB.encode(), "more than 100,000 values"),
    "alias of itself": (b"a: &a [*a]\n", "stands within what it repeats"),
    "unknown alias": (b"a: *b\n", "undefined alias"),
    "deep": (b"[" * 5000, "nested too deeply"),
    "deep mapping": (b"{a: " * 5000, "nested too deeply"),
    "no date": (b"steps: 2024-13-45\n", "month must be in 1..12"),
    "long number": (b"steps: " + b"9" * 6000, "4300 digits"),
    "large": (b"#" * (MAX_BYTES + 1), "is larger than 1 MiB"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_recipe_is_told_in_one_line_that_names_the_file(name, tmp_path):
    data, message = BAD_FILES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert len(text) < 300
    assert "\n" not in text


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="is a folder"):
        read_recipe(tmp_path)
    with pytest.raises(RecipeError, match="no such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="null character"):
        read_recipe(Path("a\0b"))


def test_a_recipe_may_have_anchors_a_mark_of_its_encoding_and_keys_that_yaml_takes_for_truths(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "\ufeffreward:\n"
        "  custom:\n"
        "    - &first {name: one, source: questions, weight: 2}\n"
        "    - {<<: *first, name: two}\n"
        "  conditions: [{reward: recall, on: precision, at_least: 1e-1}]\n",
        encoding="utf-8",
    )
    reward = check_recipe(read_recipe(path)).reward
    assert [(c.name, c.weight) for c in reward.custom] == [("one", 2.0), ("two", 2.0)]
    assert (reward.conditions[0].on, reward.conditions[0].at_least) == ("precision", 0.1)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("optim.LR", "optim.lr"),
        ("rollout.group_sizes", "rollout.group_size"),
        ("group_size", "rollout.group_size"),
        ("sampling.temperature", "rollout.sampling.temperature"),
        ("rollout.sampling.max_tokens", "rollout.sampling.max_completion_tokens"),
        ("optimm", "optim"),
        ("endpoint.servers.3.max_concurency", "endpoint.servers.max_concurrency"),
        ("reward.custom.0.wieght", "reward.custom.weight"),
        ("checkpoint.keep_last", "checkpoint.keep"),
    ],
)
def test_a_wrong_key_names_the_right_one(key, meant):
    assert f"`{meant}`" in did_you_mean(key)


def test_a_key_like_none_is_no_riddle():
    assert did_you_mean("zzzzzz") == ""
    assert all(did_you_mean(name).startswith(f"did you mean `{name}`") for name, _ in all_fields())


USAGE_ERRORS = {
    "unknown section": ["train", "--optimm.lr", "3"],
    "unknown key": ["train", "--optim.learning_rate", "3"],
    "no section": ["train", "--lr", "3"],
    "not a number": ["train", "--optim.lr", "fast"],
    "boolean": ["train", "--steps", "true"],
    "not finite": ["train", "--optim.lr", "nan"],
    "section": ["train", "--optim", "{lr: -1}"],
    "list": ["train", "--endpoint.servers", "[{url: 'ftp://x'}]"],
    "no value": ["train", "--steps"],
    "choice": ["train", "--advantage.method", "ppo"],
    "command": ["trian"],
    "missing file": ["train", "nowhere.yaml"],
    "missing option": ["recaption"],
    "missing argument": ["evaluate"],
    "no recipe": ["train", "--config", os.devnull],
    "crossing": ["train", "--reward.tau_low", "3"],
    "many": ["train", "--a", "1", "--b", "2", "--optim.c", "3", "--rollout.d", "4"],
    "scenes": ["judge-audit", "--scenes", "-1"],
    "days": ["judge-cache", "--unused_days", "nan"],
    "demo": ["demo", "--stepz", "3"],
}


@pytest.mark.parametrize("name", USAGE_ERRORS)
def test_a_usage_error_is_three_lines_at_most(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(USAGE_ERRORS[name])
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 3
    assert lines[0].startswith("balcaprl")
    assert lines[-1].endswith("--help` explains every option")
    assert max(map(len, lines)) < 400


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("demo --stepz 3", "did you mean --steps?"),
        ("demo --outt x", "did you mean --out?"),
        ("demo --lr 3", ""),
        ("demo --optim.lr 3", ""),
        ("report run --learning_rate 3", ""),
        ("judge-cache --max_mb 3", "did you mean --max_mib?"),
        ("train --learning_rate 3", "did you mean `--optim.lr`?"),
    ],
)
def test_an_option_is_suggested_that_the_command_has(arguments, hint, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    first, *rest = capsys.readouterr().err.splitlines()
    command = f"balcaprl {arguments.split()[0]}"
    assert first.startswith(f"{command}: there is no option --")
    assert rest == [*([hint] if hint else []), f"`{command} --help` explains every option"]


def test_a_value_that_may_be_secret_is_not_repeated(capsys):
    secret = "https://user:sesame@host/v1"
    with pytest.raises(SystemExit):
        main(["train", "--endpoint.servers", json.dumps([{"url": secret, "api_key_env": "sk-sesame"}])])
    assert "sesame" not in capsys.readouterr().err


def test_options_lie_over_recipes_in_their_order(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("optim: {lr: 1.0, beta1: 0.5}\nsteps: 3\n")
    second.write_text("optim: {lr: 2.0}\n")
    plain, rest = take_options(
        ["--config", str(first), "--steps=7", f"--config={second}", "--out", "x", "--optim.beta2", "1e-1", "folder"]
    )
    assert rest == ["--out", "x", "folder"]
    config = check_recipe(plain)
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2, config.steps) == (2.0, 0.5, 0.1, 7)


OPTIONS = [
    (["--endpoint.cache", "null"], lambda c: c.endpoint.cache is None),
    (["--endpoint.budget", "null"], lambda c: c.endpoint.budget is None),
    (["--endpoint.budget", "2.5"], lambda c: c.endpoint.budget == 2.5),
    (["--rollout.max_staleness", "1", "--loss.sampling_ratio_cap", "2"], lambda c: c.rollout.max_staleness == 1),
    (["--checkpoint.resume=false"], lambda c: c.checkpoint.resume is False),
    (["--rollout.sampling.stop", '[".", "\\n"]'], lambda c: c.rollout.sampling.stop == (".", "\n")),
    (["--data.instruction", "[Describe: everything]"], lambda c: c.data.instruction == "[Describe: everything]"),
    (["--model.path", "1e4"], lambda c: c.model.path == "1e4"),
    (["--reward.length_rule", "none"], lambda c: c.reward.length_rule == "none"),
    (["--optim", "{lr: 1e-5}"], lambda c: c.optim.lr == 1e-5),
    (["--seed", "1_000"], lambda c: c.seed == 1000),
]


@pytest.mark.parametrize(("arguments", "read"), OPTIONS, ids=[arguments[0] for arguments, _ in OPTIONS])
def test_an_option_reads_as_its_field_needs(arguments, read):
    assert read(check_recipe(take_options(arguments)[0]))


def test_a_printed_configuration_reads_the_same(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", *[argument for arguments, _ in OPTIONS[1:] for argument in arguments], "--print_config"])
    assert exit_info.value.code == 0
    printed = check_recipe(parse_recipe(capsys.readouterr().out, "printed"))
    assert all(read(printed) for _, read in OPTIONS[2:])


def test_every_recipe_that_ships_is_one():
    for path in RECIPES.glob("*.yaml"):
        assert isinstance(check_recipe(read_recipe(path)), TrainConfig)
