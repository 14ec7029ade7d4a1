"""Server mode: against a stub that misbehaves, and against a real vLLM server process on loopback."""

import http.server
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from balcaprl.config import SamplingConfig, TrainConfig
from balcaprl.data import load_dataset
from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.evaluation.standalone import evaluate_checkpoint
from balcaprl.files.ownership import claim_folder
from balcaprl.policy import Group, Policy
from balcaprl.rollout import Sampler, make_sampler, server
from balcaprl.rollout.prompts import PromptMaker, held_out_prompts
from balcaprl.rollout.server import ServerError, ServerRollout
from balcaprl.rollout.weights import StaleWeightsError
from balcaprl.torchvision_compat import subprocess_env
from balcaprl.types import Sample

CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
SAMPLING = SamplingConfig(temperature=0.8, max_completion_tokens=10)


def make_sample(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (112, 112 + 28 * seed, 3), dtype=np.uint8)
    return Sample(f"s{seed}", lambda: Image.fromarray(pixels), "A red circle.", "Describe the image.")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = build_tiny_qwen(tmp_path_factory.mktemp("model"), CORPUS, num_layers=2, vision_depth=2)
    return Policy.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.prepare(make_sample(i)) for i in range(2)]


# ---------------------------------------------------------------------------------------------------- a stub


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does, with the log-probabilities of a policy; ``server.fault`` makes it misbehave."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server
        state.log.append((self.path, body))
        if state.fault == "no dev mode" and self.path == "/collective_rpc":
            return self.answer(404, {"detail": "Not Found"})
        if state.fault == "sees no such folder" and self.path == "/collective_rpc":
            return self.answer(500, {"error": "no such file"})
        if state.fault == "drops once":
            state.fault = None
            self.close_connection = True
            return None
        if self.path == "/collective_rpc":
            state.weights = load_file(os.path.join(body["kwargs"]["weights_path"], "model.safetensors"))
            return self.answer(200, {"results": [None]})
        if self.path.startswith("/reset"):
            return self.answer(200, {"success": state.fault != "prefix cache in use"})
        if self.path == "/update_weight_version":
            if state.fault != "old version":
                state.version = body["new_version"]
            return self.answer(200, {})
        return self.answer(200, state.sample(body))

    def answer(self, status, body):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub(policy, prompts):
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    served.log, served.fault, served.version, served.weights = [], None, "0", None
    served.prompts = list(prompts)

    def sample(body):
        url = body["content_parts"][0]["url"]
        prompt = next(p for p in served.prompts if server._data_url(p.image) == url)
        n, length = body["sampling_params"]["n"], body["sampling_params"]["max_tokens"]
        ids = [9] * length if served.fault != "banned" else [policy.image_token_ids[0]] * length
        group = Group(prompt.prompt_ids, [torch.tensor(ids)], prompt.image_inputs)
        logprobs = server_logprobs(policy, group) + (1.0 if served.fault == "stale" else 0.0)
        content = [{"token_id": i, "logprob": lp} for i, lp in zip(ids, logprobs.tolist(), strict=True)]
        spans = [{"version": served.version, "start": 0, "end": length}]
        expanded = prompt.prompt_ids.tolist()[: -1 if served.fault == "other prompt" else None]
        choices = [
            {"index": i, "token_ids": ids, "logprobs": {"content": content}, "weight_versions": spans} for i in range(n)
        ]
        return {"prompt_token_ids": expanded, "choices": choices[::-1]}

    served.sample = sample
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def server_logprobs(policy, group):
    from balcaprl.rollout.probe import sampler_logprobs

    return sampler_logprobs(policy, group)


@pytest.fixture
def sampler(policy, stub, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "_FIRST_PAUSE_S", 0.01)
    url = f"http://127.0.0.1:{stub.server_address[1]}"
    made = ServerRollout(policy, url=url, weights_dir=tmp_path / "weights", timeout_s=10)
    yield made
    made.close()


def test_weights_are_pushed_before_the_first_request_and_at_every_sync(policy, sampler, stub, prompts, tmp_path):
    groups = sampler.generate(prompts, 3, SAMPLING, seed=1)
    assert isinstance(sampler, Sampler)
    assert [len(g.rollouts) for g in groups] == [3, 3]
    paths = [path for path, _ in stub.log]
    assert paths[:5] == [
        "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/update_weight_version",
    ]  # fmt: skip
    assert not list((tmp_path / "weights").iterdir()), "pushed weights are removed"
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(stub.weights[policy.family.published_name(policy.model.config, name)], parameter)
    report = sampler.sync(4)
    assert (report.strategy, report.policy_version, sampler.policy_version) == ("server", 4, 4)
    assert report.bytes_copied == pushed_bytes(policy)
    body = stub.log[-1][1]
    assert body["cache_salt"] == "policy-4"
    assert set(body["sampling_params"]["logit_bias"]) == {str(i) for i in policy.banned_token_ids}
    assert sampler.generate(prompts, 1, SAMPLING, seed=1)[0].policy_version == 4


def test_an_adapter_is_pushed_merged_under_the_stock_names(tmp_path):
    folder = build_tiny_qwen(tmp_path / "model", CORPUS, num_layers=2, vision_depth=2)
    adapted = Policy.from_pretrained(folder, device="cpu")  # first: it makes torchvision importable, which peft wants
    peft = pytest.importorskip("peft", reason="peft is an optional package")
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "qkv"], init_lora_weights=False)
    model = peft.get_peft_model(adapted.model, config)
    made = ServerRollout(Policy.from_model(model, adapted.processor), url="http://127.0.0.1:1", weights_dir=tmp_path)
    made._write_weights(tmp_path)
    made.close()
    pushed = load_file(tmp_path / "model.safetensors")
    merged = model.merge_and_unload().state_dict()
    assert {name: tensor.shape for name, tensor in pushed.items()} == {n: t.shape for n, t in merged.items()}
    assert all(torch.allclose(pushed[name], tensor, atol=1e-6) for name, tensor in merged.items())
    changed = {name for name, tensor in before.items() if not torch.equal(pushed[name], tensor)}
    assert len(changed) == 2 * 2 + 2 * 2, "text layers, and tower blocks with an MLP of their own"


@pytest.mark.parametrize(
    ("fault", "error", "match"),
    [
        ("no dev mode", ServerError, "answered 404: start it with VLLM_SERVER_DEV_MODE=1"),
        (
            "sees no such folder",
            ServerError,
            r"answered 500.*weights \(?.*name one that it does with .*server_weights_dir",
        ),
        ("prefix cache in use", StaleWeightsError, "could not drop its prefix cache"),
        ("old version", StaleWeightsError, r"sampled from versions \{'0'\}, not 7"),
        ("stale", StaleWeightsError, "still serves other weights"),
        ("banned", ServerError, "sampled a banned id"),
        ("other prompt", RuntimeError, "this version of vLLM changes prompts"),
    ],
)
def test_a_server_that_misbehaves_is_caught(sampler, stub, prompts, fault, error, match):
    sampler.generate(prompts, 1, SAMPLING, seed=0)
    stub.fault = fault
    with pytest.raises(error, match=match):
        sampler.sync(7)


def test_a_broken_connection_is_tried_again_and_a_dead_server_named(sampler, stub, prompts, policy, tmp_path):
    sampler.generate(prompts, 1, SAMPLING, seed=0)
    stub.fault = "drops once"
    assert len(sampler.generate(prompts, 1, SAMPLING, seed=0)) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dead = ServerRollout(policy, url=f"http://127.0.0.1:{port}", weights_dir=tmp_path, timeout_s=5)
    with pytest.raises(ServerError, match=rf"http://127\.0\.0\.1:{port}/collective_rpc cannot be reached"):
        dead.generate(prompts, 1, SAMPLING, seed=0)
    dead.close()
    with pytest.raises(RuntimeError, match="closed"):
        dead.generate(prompts, 1, SAMPLING, seed=0)


def test_configuration(policy, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="url: expected http"):
        make_sampler(TrainConfig.model_validate({"rollout": {"sampler": "server"}}), policy)
    with pytest.raises(ValueError, match="the environment variable NO_SUCH_KEY is empty"):
        ServerRollout(policy, url="http://127.0.0.1:1", weights_dir=tmp_path, api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("SAMPLER_KEY", "secret")
    plain = {"sampler": "server", "server_url": "http://127.0.0.1:1", "server_api_key_env": "SAMPLER_KEY"}
    made = make_sampler(TrainConfig.model_validate({"rollout": plain, "output_dir": str(tmp_path)}), policy)
    assert made._headers["Authorization"] == "Bearer secret"
    assert made._weights_dir is None, "in no folder that nobody gave it"
    made.close()


# ---------------------------------------------------------------------------------------------------- what it leaves behind


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("out", ["written", None])
@pytest.mark.parametrize("fault", [None, "sees no such folder", "interrupted"])
def test_an_evaluation_writes_to_its_own_folder_alone(policy, stub, tmp_path, monkeypatch, out, fault):
    policy.save(tmp_path / "model")
    temporary, here = tmp_path / "temporary", tmp_path / "here"
    temporary.mkdir(), here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    url = f"http://127.0.0.1:{stub.server_address[1]}"
    rollout = {"sampler": "server", "server_url": url, "sampling": {"max_completion_tokens": 8}}
    config = TrainConfig.model_validate({"rollout": rollout, "data": {"num_eval": 2}})
    dataset = load_dataset(config.data, seed=config.seed)
    stub.prompts += held_out_prompts(dataset, PromptMaker.of(policy, config)).prompts
    stub.fault, pushed = fault, []

    def push(self, folder):
        pushed.append(folder)
        load(self, folder)
        if fault == "interrupted":
            raise KeyboardInterrupt

    load = ServerRollout._load
    monkeypatch.setattr(ServerRollout, "_load", push)
    if fault is None:
        evaluate_checkpoint(tmp_path / "model", config, out and here / out)
    else:
        with pytest.raises((ServerError, KeyboardInterrupt)):
            evaluate_checkpoint(tmp_path / "model", config, out and here / out)
    assert [folder.parent for folder in pushed] == [here / out / "server-weights" if out else temporary]
    assert not everything_below(temporary)
    assert {name.split("/")[0] for name in everything_below(here)} <= {out}
    assert not [name for name in everything_below(here) if "weights" in name or "version" in name]


def test_weights_of_a_killed_push_are_cleared_and_those_of_a_living_one_stay(sampler, stub, prompts, tmp_path):
    folder = tmp_path / "weights"
    for name in ("version-3-killed", "version-4-living", "version-theirs"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()
    (folder / "version-3-killed" / ".balcaprl-weights").touch()
    (folder / "version-4-living" / "model.safetensors").unlink()
    with claim_folder(folder / "version-4-living", "weights", option="x"):
        (folder / "version-4-living" / "model.safetensors").touch()
        sampler.generate(prompts, 1, SAMPLING, seed=0)
        sampler.close()
        assert sorted(path.name for path in folder.iterdir()) == ["version-4-living", "version-theirs"]
        assert (folder / "version-4-living" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def real_server(policy, tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is an optional extra")
    folder = tmp_path_factory.mktemp("served")
    policy.save(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--enable-scale-out",
        "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--max-num-seqs", "32",
        "--limit-mm-per-prompt", '{"image": {"count": 1, "width": 140, "height": 112}, "video": 0}',
    ]  # fmt: skip
    env = subprocess_env(
        {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
         "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    )  # fmt: skip
    log = (folder / "server.log").open("w+")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
        log.close()


def wait_until_healthy(process, port, log, patience_s=900):
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.5)
    log.seek(0)
    pytest.fail(f"the server did not start:\n{log.read()[-3000:]}")


def test_parity_with_a_real_server_before_and_after_pushes(policy, prompts, real_server, tmp_path):
    saved = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    made = ServerRollout(policy, url=real_server, weights_dir=tmp_path)
    try:
        generator = torch.Generator().manual_seed(0)
        for version, part in enumerate(["none", "", "visual", "embed_tokens"]):
            with torch.no_grad():
                for name, parameter in policy.model.named_parameters():
                    if part in name:
                        parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
            if version:
                report = made.sync(version)
                assert report.bytes_copied == pushed_bytes(policy)
            groups = made.generate(prompts, 4, SAMPLING, seed=version)
            assert largest_difference(policy, groups) < 1e-5, part
            again = made.generate(prompts, 4, SAMPLING, seed=version)
            assert token_ids(groups) == token_ids(again)
            assert len({tuple(ids) for ids in token_ids(groups)[0]}) > 1
            assert groups[0].policy_version == version
        greedy = made.generate(prompts, 2, SAMPLING, seed=0, greedy=True)
        assert token_ids(greedy)[0][0] == token_ids(greedy)[0][1]
    finally:
        made.close()
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.copy_(saved[name])


def pushed_bytes(policy):
    """Tied heads travel twice."""
    return 4 * sum(tensor.numel() for tensor in policy.model.state_dict().values())


def token_ids(groups):
    return [[rollout.completion.token_ids for rollout in group.rollouts] for group in groups]


def largest_difference(policy, groups):
    rollouts = [
        Group(g.prompt.prompt_ids, [torch.tensor(r.completion.token_ids) for r in g.rollouts], g.prompt.image_inputs)
        for g in groups
    ]
    with torch.no_grad():
        expected = policy.logprobs(policy.pack(rollouts), 0.8, exclude_banned=True)
    sampled = torch.tensor([lp for g in groups for r in g.rollouts for lp in r.completion.sampling_logprobs])
    return (sampled - expected).abs().max().item()
