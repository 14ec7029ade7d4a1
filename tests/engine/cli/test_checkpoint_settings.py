"""A checkpoint is data: what its configuration says is taken only where it can do nothing but change numbers."""

import http.server
import json
import shutil
import threading
from contextlib import contextmanager

import pytest

from balcaprl.assets import demo_model_path
from balcaprl.cli.checkpoint_settings import (
    _NEVER,
    _TAKEN,
    _UNUSED,
    _VALUE,
    _is_within,
    _leaves,
    harmless_settings,
    read_checkpoint_settings,
)
from balcaprl.cli.main import main
from balcaprl.config import TrainConfig
from balcaprl.files import manifest


@contextmanager
def recording_server():
    """A real server that refuses everything and keeps what it was sent."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.path, dict(self.headers)))
            self.send_error(500)

        do_GET = do_HEAD = do_PUT = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def checkpoint(tmp_path):
    """The demo's model as a checkpoint whose state says what a test wants it to say."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo_model_path(), folder)

    def write(**config):
        plain = TrainConfig.model_validate({"rollout": {"sampler": "hf"}, "data": {"num_eval": 2}}).model_dump(
            mode="json"
        )
        for section, values in config.items():
            plain[section] = {**plain.get(section, {}), **values} if isinstance(values, dict) else values
        (folder / "trainer_state.json").write_text(json.dumps({"step": 1, "config": plain}))
        return folder

    return write


def test_evaluate_obeys_no_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")
    monkeypatch.chdir(tmp_path)
    ran, cache = tmp_path / "ran", tmp_path / "cache" / "judge.db"
    with recording_server() as (url, received):
        server = {"url": f"{url}/v1", "api_key_env": "HF_TOKEN"}
        folder = checkpoint(
            output_dir=str(tmp_path / "elsewhere"),
            model={"path": f"{url}/model", "device": "cuda"},
            rollout={
                "sampler": "server",
                "server_url": url,
                "server_api_key_env": "HF_TOKEN",
                "server_weights_dir": str(tmp_path / "weights"),
                "sampling": {"temperature": 0.7, "max_completion_tokens": 10},
            },
            data={"num_eval": 3, "path": str(tmp_path / "data.jsonl"), "image_root": "/"},
            reward={
                "judge": "endpoint",
                "protocol": {"model": "m"},
                "custom": [{"name": "mine", "source": f"{tmp_path / 'reward.py'}:score"}],
                "length_rule": "linear",
            },
            endpoint={"servers": [server], "cache": str(cache), "units": str(tmp_path / "units.jsonl")},
            unheard_of={"url": url},
        )
        code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()\ndef score(**_): return 1.0\n"
        (tmp_path / "reward.py").write_text(code)
        (folder / "reward.py").write_text(code)
        before = sorted(tmp_path.rglob("*"))
        status = main(["evaluate", str(folder), "--rollout.sampler", "hf"])
    told = capsys.readouterr()
    assert status == 0, told.err
    assert received == []
    assert not ran.exists()
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads(told.out)["sampled"]["num_samples"] == 3
    for name in (
        "model.device", "rollout.sampler", "rollout.server_url", "rollout.server_api_key_env", "rollout.server_weights_dir",
        "data.path", "data.image_root", "reward.judge", "reward.protocol.model", "reward.custom", "endpoint.servers",
        "endpoint.cache", "endpoint.units", "1 unknown keys", "--config",
    ):  # fmt: skip
        assert name in told.err, name
    for secret in (url, "HF_TOKEN", str(cache)):
        assert secret not in told.err


def test_what_the_user_names_is_used(checkpoint, tmp_path, capsys):
    """The same servers, named by the user's recipe: there they go."""
    with recording_server() as (url, received):
        recipe = {
            "rollout": {"sampler": "hf", "sampling": {"max_completion_tokens": 4}},
            "data": {"num_eval": 1},
            "reward": {"judge": "endpoint", "protocol": {"model": "m"}},
            "endpoint": {"servers": [{"url": f"{url}/v1"}], "cache": None, "max_attempts": 1, "patience_s": 1},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        main(["evaluate", str(checkpoint()), "--config", str(tmp_path / "recipe.yaml")])
    capsys.readouterr()
    assert received


@pytest.mark.parametrize("kind", ["jsonl", "sharegpt4v", "hf", "\x1b[2J"])
def test_data_of_a_checkpoint_are_not_opened(checkpoint, tmp_path, kind, capsys):
    folder = checkpoint(data={"kind": kind, "path": str(tmp_path / "private.jsonl")})
    assert main(["evaluate", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "--data.kind" in error
    assert "private" not in error
    assert "\x1b" not in error


@pytest.mark.parametrize(
    "content",
    [b"", b"[", b"[]", b"{}", b'{"config": 3}', b"\xff\xfe", b"[" * 100_000, b'{"config": ' + b"9" * 5000 + b"}"],
)
def test_a_damaged_state_is_one_clear_line(tmp_path, content, capsys):
    (tmp_path / "trainer_state.json").write_bytes(content)
    assert main(["evaluate", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "trainer_state.json" in error
    assert "Traceback" not in error


def test_a_folder_without_state_says_nothing(tmp_path):
    assert read_checkpoint_settings(tmp_path) is None
    assert read_checkpoint_settings(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"num_eval": 10**9}),
        ("data", {"num_eval": True}),
        ("data", {"max_pixels": 10**12}),
        ("data", {"instruction": "x" * 100_000}),
        ("evaluation", {"batch_size": 10**6}),
        ("rollout", {"sampling": {"max_completion_tokens": 10**400}}),
        ("rollout", {"sampling": {"temperature": float("nan")}}),
        ("rollout", {"sampling": {"stop": ["x"] * 1000}}),
        ("rollout", {"sampling": {"stop": {"a": 1}}}),
        ("reward", {"tau_low": 9.0}),
        ("reward", {"tau_high": float("inf")}),
        ("reward", {"precision_weight": -1}),
        ("reward", {"precision_weight": float("inf")}),
        ("reward", {"length_unit": ["words"]}),
        ("reward", {"conditions": [{"reward": "mine", "on": "recall", "at_least": 0.5}]}),
        ("reward", {"conditions": [{"reward": "precision", "on": "recall"}]}),
        ("model", {"attention": "flash_attention_2"}),
        ("model", {"attention": "somebody/kernels"}),
        ("model", {"dtype": {"a": "b"}}),
        ("seed", -1),
        ("seed", "1; rm"),
    ],
)
def test_values_beyond_their_bounds_are_left_out(section, values):
    settings = harmless_settings({section: values})
    assert settings.taken in ({}, {"reward": {}}), settings.taken
    assert settings.left_out


def test_values_that_hold_only_together_are_taken_together():
    reward = {"tau_low": 3.0, "tau_high": 5.0, "conditions": [{"reward": "recall", "on": "precision", "at_least": 0.5}]}
    settings = harmless_settings({"reward": reward})
    assert settings.taken == {"reward": reward}
    assert settings.left_out == {}


def test_a_run_of_the_demo_is_evaluated_as_it_trained():
    plain = TrainConfig.model_validate(
        {"seed": 3, "output_dir": "x", "steps": 7, "rollout": {"sampler": "hf", "sampling": {"temperature": 0.5}}}
    ).model_dump(mode="json")
    settings = harmless_settings(plain)
    assert settings.taken == {"seed": 3, "rollout": {"sampler": "hf", "sampling": {"temperature": 0.5}}}
    assert settings.left_out == {}


def test_the_lists_name_fields_that_exist():
    fields = TrainConfig().model_dump(mode="json")
    for name in (*_TAKEN, *_UNUSED, *(name for names in _NEVER.values() for name in names)):
        value = fields
        for key in name.split("."):
            value = value[key]


def test_each_field_is_taken_or_unused_or_left_out_for_a_stated_reason():
    never = [name for names in _NEVER.values() for name in names]
    for name, _ in _leaves(TrainConfig, TrainConfig().model_dump(mode="json")):
        lists = [name in _TAKEN, _is_within(name, _UNUSED), _is_within(name, never)]
        assert sum(lists) == 1, f"{name}: {lists}"


def test_what_only_training_uses_is_not_reported():
    plain = {
        "steps": 7,
        "model": {"freeze_vision": True, "gradient_checkpointing": True, "autocast": True},
        "data": {"shuffle": False},
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_staleness": 1, "sampling_kl_limit": 0.5},
        "reward": {"required_share": 0.7, "max_flat_steps": 3},
        "evaluation": {"every": 5},
    }
    settings = harmless_settings(plain)
    assert settings.left_out == {}
    assert settings.taken == {}


def test_what_is_left_out_is_told_with_its_own_reason(checkpoint, capsys):
    folder = checkpoint(
        model={"device": "cuda"}, data={"num_eval": 10**9}, reward={"protocol": {"model": "m"}, "custom": [{}]}, more=1
    )
    main(["evaluate", str(folder), "--data.num_eval", "0"])
    told = capsys.readouterr().err.splitlines()[0]
    servers, machine, judge = _NEVER
    assert f"model.device ({machine})" in told
    assert f"data.num_eval ({_VALUE})" in told
    assert f"reward.protocol.model ({judge})" in told
    assert f"reward.custom ({servers})" in told
    assert "1 unknown keys (" in told


def changed(state):
    state.write_text(state.read_text().replace('"tau_low": 0.5', '"tau_low": 0.9'))


def behind_a_link(state):
    state.rename(state.with_name("elsewhere.txt"))
    state.symlink_to("elsewhere.txt")


DAMAGE = {
    "changed": (changed, "is not what was saved"),
    "longer": (lambda state: state.write_text(state.read_text() + " "), "bytes, and was saved with"),
    "cut off": (lambda state: state.write_bytes(b""), "bytes, and was saved with"),
    "missing": (lambda state: state.unlink(), "is missing"),
    "behind a link": (behind_a_link, "is no ordinary file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_state_that_is_not_the_saved_one_is_refused_by_name(checkpoint, name, capsys):
    folder = checkpoint(reward={"tau_low": 0.5})
    manifest.write_manifest(folder)
    assert read_checkpoint_settings(folder) is not None
    change, fault = DAMAGE[name]
    change(folder / "trainer_state.json")
    assert main(["evaluate", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "damaged: trainer_state.json " in error
    assert fault in error
    assert "remove manifest.json" in error


def test_a_state_beside_a_manifest_that_does_not_list_it_is_refused(checkpoint, tmp_path, capsys):
    folder = checkpoint()
    kept = (folder / "trainer_state.json").rename(tmp_path / "kept")
    manifest.write_manifest(folder)
    kept.rename(folder / "trainer_state.json")
    assert main(["evaluate", str(folder)]) == 1
    assert "trainer_state.json is no part of it" in capsys.readouterr().err


def test_a_state_without_a_manifest_is_read_as_it_is(checkpoint):
    folder = checkpoint(reward={"tau_low": 0.25})
    assert read_checkpoint_settings(folder).taken["reward"]["tau_low"] == 0.25
