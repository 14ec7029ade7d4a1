"""The command line: recipes, overrides, help, and errors that a user can act on."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from balcaprl.cli.main import build_parser, main
from balcaprl.config import TrainConfig
from balcaprl.reporting.metrics import read_jsonl


def run_cli(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "balcaprl", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def leaf_fields(model, prefix=""):
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if hasattr(annotation, "model_fields"):
            yield from leaf_fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description


def test_every_field_is_explained():
    assert all(description for _, description in leaf_fields(TrainConfig))


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, description in leaf_fields(TrainConfig):
        assert f"--{name}" in text
        first_words = " ".join(description.split()[:4]).replace("``", "")
        assert first_words in text.replace("``", ""), name


def test_print_config_gives_a_recipe_that_can_be_used(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "demo", "--steps", "7", "--print_config"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert TrainConfig.model_validate(yaml.safe_load(text)).steps == 7
    options = build_parser().parse_args(["train", "--config", str(path)])
    assert options.train.rollout.group_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--rollout.group_sizes", "4"], "group_sizes"),
        (["train", "--rollout.group_size", "0"], "group_size"),
        (["train", "--advantage.method", "ppo"], "method"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_arguments_name_the_culprit(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_key_in_a_recipe_is_refused(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("optim:\n  learning_rate: 0.1\n")
    with pytest.raises(SystemExit):
        main(["train", str(path)])
    assert "learning_rate" in capsys.readouterr().err


def test_a_missing_data_set_is_one_clear_line(tmp_path, capsys):
    status = main(["train", "--data.kind", "jsonl", "--data.path", str(tmp_path / "no.jsonl")])
    assert status == 1
    error = capsys.readouterr().err
    assert "no.jsonl" in error
    assert "Traceback" not in error


def test_bounds_that_cross_are_refused(capsys):
    try:
        status = main(["train", "--reward.tau_low", "3"])
    except SystemExit as error:
        status = error.code
    assert status != 0
    assert "tau_low" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["balcaprl", "balcaprl.cli.main"])
def test_no_arguments_print_the_help(module):
    result = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert "usage: balcaprl" in result.stderr
    for command in ("train", "demo", "evaluate", "doctor"):
        assert f"\n    {command} " in result.stderr


def test_help_is_quick_to_import():
    """The command line itself imports nothing heavy."""
    code = "import sys, balcaprl.cli.main; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            raise RuntimeError(f"{name} is imported")

sys.meta_path.insert(0, Blocked())
from balcaprl.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

MISPLACED = {
    "no data": (
        ["--data.kind=jsonl", "--data.path=HERE/nowhere.jsonl"],
        "data.path: HERE/nowhere.jsonl does not exist",
    ),
    "data not named": (["--data.kind=jsonl"], "data.path: needed for data.kind jsonl"),
    "data of another kind": (["--data.kind=hf", "--data.path=HERE/file"], "data.path: HERE/file: data.kind hf expects"),
    "no images": (
        ["--data.kind=jsonl", "--data.path=HERE/file", "--data.image_root=HERE/file"],
        "data.image_root: HERE/file is not a folder",
    ),
    "no model": (["--model.path=HERE/nowhere"], "model.path: HERE/nowhere does not exist"),
    "no model here": (["--model.path=./nowhere"], "model.path: ./nowhere does not exist"),
    "no model deep": (["--model.path=no/model/here"], "model.path: no/model/here does not exist"),
    "a file as model": (["--model.path=HERE/file"], "model.path: HERE/file is a file"),
    "a file as output": (["--output_dir=HERE/file"], "output_dir: HERE/file is no folder"),
    "output below a file": (["--output_dir=HERE/file/run"], "output_dir: HERE/file is no folder"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_what_paths_show_is_told_before_anything_heavy_is_imported(name, tmp_path):
    (tmp_path / "file").write_text("{}\n")
    options, told = MISPLACED[name]
    options, told = [text.replace("HERE", str(tmp_path)) for text in options], told.replace("HERE", str(tmp_path))
    arguments = ["train", "demo", f"--output_dir={tmp_path / 'run'}", *options]
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"balcaprl train: {told}")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["HERE/nowhere", "HERE/out"], "CHECKPOINT: HERE/nowhere does not exist"),
        (["HERE/file", "HERE/out"], "CHECKPOINT: HERE/file is a file"),
        (["HERE", "HERE/file"], "OUT: HERE/file is no folder"),
        (["HERE", "HERE"], "OUT: HERE is not empty (it holds file)"),
        (["HERE", "HERE/out", "--base=HERE/nowhere"], "--base: HERE/nowhere does not exist"),
    ],
)
def test_what_paths_of_a_merge_show_is_told_before_anything_heavy_is_imported(arguments, told, tmp_path):
    (tmp_path / "file").write_text("{}\n")
    arguments, told = [a.replace("HERE", str(tmp_path)) for a in arguments], told.replace("HERE", str(tmp_path))
    command = [sys.executable, "-c", WITHOUT_TORCH, "merge", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1
    assert result.stderr.startswith(f"balcaprl merge: {told}")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_paths_do_not_show_goes_on_to_the_trainer(tmp_path):
    """A hub id may exist, and a run to resume takes its model from its checkpoint."""
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    for options in (
        "--model.path=org/name",
        f"--output_dir={tmp_path / 'run'} --model.path=./gone",
        "--model.path=demo",
    ):
        command = [
            sys.executable,
            "-c",
            WITHOUT_TORCH,
            "train",
            "demo",
            f"--output_dir={tmp_path / 'x'}",
            *options.split(),
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
        assert "is imported" in result.stderr


OURS = re.compile(r"(INFO balcaprl\.\S+:|step \d+|report:|balcaprl evaluate: left out).*")
"""What a run says of itself on standard error."""


def assert_says_only_what_is_ours(stderr):
    assert [line for line in stderr.splitlines() if not OURS.match(line)] == []


def test_demo_writes_the_promised_summary_and_nothing_foreign_is_told(tmp_path):
    result = run_cli("demo", "--out", tmp_path, "--seed", 3, "--steps", 1, "--sampler", "hf")
    assert result.returncode == 0, result.stderr
    assert_says_only_what_is_ours(result.stderr)
    summary = json.loads((tmp_path / "summary.json").read_text())
    scores = {"precision", "recall", "linguistic", "b_capscore", "length_ratio"}
    assert scores <= summary["before"].keys()
    assert scores <= summary["after"].keys()
    assert (summary["steps"], summary["sampler"], summary["seed"]) == (1, "hf", 3)
    assert summary["train_seconds"] > 0
    assert (tmp_path / "report.html").exists()
    checkpoint = next((tmp_path / "checkpoints").iterdir())
    # by vLLM, where there is one
    result = run_cli("evaluate", checkpoint, "--data.num_eval", 4, "--out", tmp_path / "e")
    assert result.returncode == 0, result.stderr
    assert_says_only_what_is_ours(result.stderr)
    assert json.loads(result.stdout)["sampled"]["num_samples"] == 4


def test_a_chinese_data_set_is_refused_by_the_lexical_judge_before_the_model_is_loaded(
    photograph_set, tmp_path, capsys
):
    images = photograph_set[1] / "images"
    records = [{"image": image.name, "reference": "草地上有一个红色的球。"} for image in images.iterdir()]
    path = tmp_path / "captions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "no").mkdir()  # a folder of no model: that is told when it is loaded, later
    data = ["--data.kind", "jsonl", "--data.path", str(path), "--data.image_root", str(images), "--data.num_eval", "1"]
    assert main(["train", *data, "--model.path", str(tmp_path / "no"), "--output_dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "cjk letters" in error
    assert "reward.judge: endpoint" in error


def test_real_photographs_train_with_the_lexical_judge(photograph_set, tmp_path):
    """A ShareGPT4V set of real pictures, five steps, on the demo's model."""
    path, root = photograph_set
    result = run_cli(
        "train", "--output_dir", tmp_path, "--steps", 5, "--data.kind", "sharegpt4v", "--data.path", path,
        "--data.image_root", root, "--data.max_pixels", 12544, "--data.num_eval", 2, "--rollout.sampler", "hf",
        "--rollout.prompts_per_step", 4, "--rollout.group_size", 4, "--rollout.sampling.max_completion_tokens", 40,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert len(lines) == 5
    assert all(line["num_unscorable"] == 0 for line in lines)
    assert any(line["grad_norm"] and line["grad_norm"] > 0 for line in lines)
    assert len({c["sample_id"] for c in read_jsonl(tmp_path / "completions.jsonl")}) == 8


@pytest.mark.parametrize("begins", ["in the foreground", "in the background"])
def test_a_hanging_reward_cannot_keep_a_run_from_ending(begins, tmp_path):
    """The first signal is heard while the reward hangs, the second ends the run. A background job ignores SIGINT at first."""
    import signal
    import time

    ignored = signal.SIG_IGN if begins == "in the background" else signal.SIG_DFL

    asked = tmp_path / "asked"
    source = tmp_path / "mine.py"
    source.write_text(
        f"import pathlib, time\ndef f(sample, caption):\n    pathlib.Path({str(asked)!r}).touch()\n"
        "    while True:\n        time.sleep(60)\n"
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "run"),
                "data": {"num_eval": 0},
                "rollout": {
                    "sampler": "hf",
                    "prompts_per_step": 1,
                    "group_size": 2,
                    "sampling": {"max_completion_tokens": 8},
                },
                "reward": {"custom": [{"name": "mine", "source": f"{source}:f"}]},
            }
        )
    )
    command = [sys.executable, "-m", "balcaprl", "train", str(recipe)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, ignored),
    ) as process:
        try:
            for _ in range(2400):
                if asked.exists() or process.poll() is not None:
                    break
                time.sleep(0.1)
            assert asked.exists(), process.stdout.read()
            process.send_signal(signal.SIGINT)
            output = ""
            while "stopping after this step" not in output:  # a second signal before the first is heard is none
                line = process.stdout.readline()
                assert line, output
                output += line
            time.sleep(1)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            output += process.stdout.read()
            process.wait(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "stopped at once" in output
