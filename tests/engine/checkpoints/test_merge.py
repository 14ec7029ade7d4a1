"""An adapter's checkpoint and its base as one stock folder: the same logits, in stock transformers and in stock peft."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import balcaprl.checkpoints.checkpoint
from balcaprl.checkpoints.checkpoint import SaveError, list_checkpoints
from balcaprl.checkpoints.merge import merge_checkpoint
from balcaprl.cli.main import main
from balcaprl.config import TrainConfig
from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.files import manifest
from balcaprl.files.ownership import ForeignPathError, PathInUseError, claim_file
from balcaprl.policy import Policy
from balcaprl.torchvision_compat import ensure_importable
from balcaprl.training.trainer import Trainer

ensure_importable()
import transformers  # noqa: E402

peft = pytest.importorskip("peft", reason="LoRA is an extra: pip install 'balcaprl[lora]'")
CORPUS = ["There are two shapes on a white background. A large solid red circle is at the top left."] * 3
QWEN = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2,
    "vision_hidden_size": 32, "vision_intermediate_size": 48, "vision_depth": 1, "vision_num_heads": 2,
}  # fmt: skip
LLAVA = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2,
    "vision_hidden_size": 32, "vision_intermediate_size": 48, "vision_num_layers": 2, "vision_num_heads": 2,
}  # fmt: skip
BASES = {
    "qwen tied": lambda folder, **options: build_tiny_qwen(folder, CORPUS, tie_word_embeddings=True, **QWEN, **options),
    "qwen": lambda folder, **options: build_tiny_qwen(folder, CORPUS, tie_word_embeddings=False, **QWEN, **options),
    "llava tied": lambda folder, **options: build_tiny_llava(folder, CORPUS, tie_word_embeddings=True, **LLAVA, **options),
    "llava": lambda folder, **options: build_tiny_llava(folder, CORPUS, tie_word_embeddings=False, **LLAVA, **options),
}  # fmt: skip
ATTENTION = ["q_proj", "v_proj"]
ADAPTERS = {
    "attention": {"target_modules": ATTENTION},
    "rank and alpha by module": {"target_modules": ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "every linear layer": {"target_modules": "all-linear"},
    "tower and projector": {"target_modules": r".*(attn\.qkv|visual.*\.up_proj|merger\.mlp\.0|mlp\.fc1|projector\.linear_1)"},
    "patches": {"target_modules": r".*(patch_embed\.proj|patch_embedding)"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head and embedding": {"target_modules": ["lm_head", "embed_tokens"]},
    "whole head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
    "rsLoRA": {"target_modules": ATTENTION, "use_rslora": True},
    "DoRA": {"target_modules": ATTENTION, "use_dora": True},
    "the layers' biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": [5, 6, 7]},
    "biases": {"target_modules": ATTENTION, "lora_bias": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("bases"), {}

    def make(name, dtype=torch.float32):
        key = (name, dtype)
        if key not in made:
            made[key] = BASES[name](root / f"{name} {dtype}", dtype=dtype)
        return made[key]

    return make


def stock(folder, dtype=torch.float32):
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def adapted(base, *, dtype="float32", template=None, **options):
    """A policy whose adapter adds something in every part that it has."""
    policy = Policy.from_pretrained(base, device="cpu", dtype=dtype)
    torch.manual_seed(5)
    model = peft.get_peft_model(policy.model, peft.LoraConfig(r=4, **{"init_lora_weights": False, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("modules_to_save" in name or "magnitude" in name or name.endswith("bias")):
                parameter += 0.1 * torch.randn(parameter.shape)
    if template is not None:
        policy.processor.chat_template = template
    return Policy(model, policy.processor, policy.family)


def checkpoint_of(base, folder, **options):
    adapted(base, **options).save(folder)
    return folder


def run(base, out, *, options, dtype):
    """The checkpoint of a run of one step."""
    config = {
        "output_dir": str(out), "steps": 1, "threads": 1, "data": {"num_eval": 0}, "logging": {"tensorboard": False},
        "rollout": {"sampler": "hf", "prompts_per_step": 1, "group_size": 2, "sampling": {"max_completion_tokens": 4}},
    }  # fmt: skip
    trainer = Trainer(TrainConfig.model_validate(config), policy=adapted(base, dtype=dtype, **options))
    try:
        trainer.train()
    finally:
        trainer.close()
    return list_checkpoints(out)[-1]


@torch.no_grad()
def logits_of(model, folder):
    """Of a text and a picture, in stock code."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    pixels = (torch.arange(112 * 112 * 3).reshape(112, 112, 3) * 7 % 256).to(torch.uint8).numpy()
    inputs = processor(text=[text], images=[Image.fromarray(pixels)], return_tensors="pt")
    return model(**inputs).logits.float()


# ------------------------------------------------------------------------------------------------ what is written


CASES = {
    "qwen tied": ADAPTERS,
    "qwen": ("head", "embedding", "whole head"),
    "llava tied": ("head", "whole embedding"),
    "llava": ("every linear layer", "tower and projector", "patches", "head and embedding"),
}


@pytest.mark.parametrize(("base", "adapter"), [(base, adapter) for base in CASES for adapter in CASES[base]])
def test_the_merged_folder_is_base_and_adapter_in_stock_transformers_and_peft(bases, tmp_path, base, adapter):
    folder = bases(base)
    checkpoint = checkpoint_of(folder, tmp_path / "checkpoint", **ADAPTERS[adapter])
    merge_checkpoint(checkpoint, tmp_path / "merged", folder)
    expected = logits_of(peft.PeftModel.from_pretrained(stock(folder), checkpoint).eval(), folder)
    assert (logits_of(stock(folder), folder) - expected).abs().max() > 1e-3, "the adapter must be visible"
    assert (logits_of(stock(tmp_path / "merged"), tmp_path / "merged") - expected).abs().max() < 1e-5
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"} <= names
    assert not [name for name in names if name.startswith(("adapter_", ".", "trainer", "manifest"))]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "merged"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_is_summed_in_float32_and_rounded_once(bases, tmp_path, dtype):
    folder = bases("qwen tied", dtype)
    options = {"target_modules": [*ATTENTION, "lm_head"], "modules_to_save": ["norm"]}
    checkpoint = checkpoint_of(folder, tmp_path / "checkpoint", **options)
    merge_checkpoint(checkpoint, tmp_path / "merged", folder)
    whole = Policy.from_pretrained(checkpoint, device="cpu", base=folder).model.merge_and_unload().state_dict()
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    assert stock(tmp_path / "merged", "auto").dtype is dtype
    state = stock(tmp_path / "merged", dtype).state_dict()
    for name, tensor in whole.items():
        if not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert torch.equal(state[name], tensor.to(dtype)), name
    assert torch.equal(state["lm_head.weight"], whole["lm_head.weight"].to(dtype))
    base = stock(folder, dtype)
    assert torch.equal(state["model.language_model.embed_tokens.weight"], base.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [("attention", "float32"), ("attention", "bfloat16"), ("tokens", "float32"), ("head", "float32")],
)
def test_a_checkpoint_of_a_run_is_merged_and_evaluated_on_its_own_base_alone(bases, tmp_path, capsys, adapter, dtype):
    """The command, the files of a run; a base of the same shapes and other weights is told."""
    folder, other = bases("qwen tied"), build_tiny_qwen(tmp_path / "other", CORPUS, seed=9, **QWEN)
    checkpoint = run(folder, tmp_path / "run", options=ADAPTERS[adapter], dtype=dtype)
    assert main(["merge", str(checkpoint), str(tmp_path / "merged"), "--base", str(folder)]) == 0
    in_peft = peft.PeftModel.from_pretrained(stock(folder), checkpoint).eval()
    merged = stock(tmp_path / "merged")
    assert (logits_of(merged, folder) - logits_of(in_peft, folder)).abs().max() < 1e-5
    scores = ["--rollout.sampler=hf", "--data.num_eval=1", "--rollout.sampling.max_completion_tokens=4"]
    for whole in ([str(tmp_path / "merged")], [str(checkpoint), f"--model.path={folder}"]):
        assert main(["evaluate", *whole, *scores]) == 0
    capsys.readouterr()
    for command in (
        ["merge", str(checkpoint), str(tmp_path / "wrong"), "--base", str(other)],
        ["evaluate", str(checkpoint), f"--model.path={other}", *scores],
    ):
        assert main(command) == 1
        assert "was trained on another model than" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_the_processor_that_the_run_had_is_kept(bases, tmp_path):
    template = "{% for m in messages %}<|vision_start|><|image_pad|><|vision_end|>Say what is there.{% endfor %}"
    checkpoint = checkpoint_of(bases("qwen"), tmp_path / "checkpoint", template=template, target_modules=ATTENTION)
    merge_checkpoint(checkpoint, tmp_path / "merged", bases("qwen"))
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "merged").chat_template == template
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    merge_checkpoint(checkpoint, tmp_path / "again", bases("qwen"))
    own = transformers.AutoProcessor.from_pretrained(bases("qwen")).chat_template
    assert transformers.AutoProcessor.from_pretrained(tmp_path / "again").chat_template == own


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def checkpoint(bases, tmp_path):
    return checkpoint_of(bases("qwen"), tmp_path / "checkpoint", target_modules=ATTENTION)


def quantised(tmp_path, bases, section=None):
    folder = shutil.copytree(bases("qwen"), tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (config if section is None else config[section])["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_nan(checkpoint):
    file = checkpoint / "adapter_model.safetensors"
    save_file({name: tensor.fill_(torch.nan) for name, tensor in load_file(file).items()}, file)
    return checkpoint


def naming(checkpoint, name):
    file = checkpoint / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": name}))
    return checkpoint


def with_changed_state(checkpoint):
    state = {"format": 1, "step": 1, "policy_version": 1, "data": {}, "config": {}, "origin": {"base": "a" * 64}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    manifest.write_manifest(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"origin": {}}))
    return checkpoint


REFUSED = {
    "a whole model": (lambda c, bases, tmp: (bases("qwen"), bases("qwen")), "a stock transformers folder already"),
    "no base": (lambda c, bases, tmp: (naming(c, "org/evil\x1b[2J"), None), r"--base.*says 'org/evil\\x1b"),
    "an adapter as base": (lambda c, bases, tmp: (c, c), "holds an adapter too"),
    "a quantised base": (lambda c, bases, tmp: (c, quantised(tmp, bases)), r"is quantised \(bitsandbytes\)"),
    "a quantised part": (lambda c, bases, tmp: (c, quantised(tmp, bases, "text_config")), "is quantised"),
    "no such base": (lambda c, bases, tmp: (c, tmp / "no" / "where"), "--base: .*where does not exist"),
    "another family": (lambda c, bases, tmp: (c, bases("llava")), "checkpoint"),
    "a changed state": (lambda c, bases, tmp: (with_changed_state(c), bases("qwen")), r"damaged: trainer_state\.json has"),
    "no numbers": (lambda c, bases, tmp: (with_nan(c), bases("qwen")), "cannot be merged: NaNs"),
    "a bias without place": (
        lambda c, bases, tmp: (
            checkpoint_of(bases("llava"), tmp / "biased", target_modules=ATTENTION, lora_bias=True),
            bases("llava"),
        ),
        "cannot be merged: .*bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name_and_leaves_nothing(bases, checkpoint, tmp_path, case):
    make, message = REFUSED[case]
    folder, base = make(checkpoint, bases, tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(folder, tmp_path / "out", base)
    assert set(tmp_path.iterdir()) == before


def test_what_an_adapter_says_of_its_base_is_shown_and_never_followed(bases, checkpoint, tmp_path, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **_: asked.append(args))
    merge_checkpoint(naming(checkpoint, "org/evil"), tmp_path / "out", bases("qwen"))
    assert not asked
    assert "adapter_config.json says 'org/evil'" in caplog.text


QUIET = """
import sys
from pathlib import Path
from transformers.utils.logging import disable_progress_bar
from balcaprl.cli.main import main
from balcaprl.policy import Policy
from balcaprl.policy.stock import load_into

base, *adapters = map(Path, sys.argv[1:])
for adapter in adapters:
    assert main(["merge", str(adapter), str(adapter) + " merged", "--base", str(base)]) == 0
disable_progress_bar()
for adapter in adapters:
    policy = Policy.from_pretrained(adapter, base=base, device="cpu")
    load_into(policy, adapter)
    policy.save(str(adapter) + " saved")
"""


def test_loading_resuming_saving_and_merging_an_adapter_prints_nothing(bases, tmp_path):
    """But our own log: none of peft's warnings that ask nothing of the user, some of them with text of the adapter's file."""
    base = bases("qwen tied")
    kinds = ("head and embedding", "whole head", "biases")
    folders = [naming(checkpoint_of(base, tmp_path / kind, **ADAPTERS[kind]), "org/other") for kind in kinds]
    command = [sys.executable, "-c", QUIET, str(base), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if not line.startswith(("INFO balcaprl.", "WARNING balcaprl."))]
    assert told == []


def test_what_peft_says_of_an_adapter_that_cannot_be_merged_is_still_told(bases, tmp_path):
    folder = checkpoint_of(bases("llava"), tmp_path / "biased", **ADAPTERS["biases"])
    with pytest.warns(UserWarning, match="has no bias"):
        Policy.from_pretrained(folder, base=bases("llava"), device="cpu")


def test_a_folder_that_holds_something_or_is_being_written_is_left_alone(bases, checkpoint, tmp_path):
    out = tmp_path / "out"
    with claim_file(out, option="OUT"), pytest.raises(PathInUseError):
        merge_checkpoint(checkpoint, out, bases("qwen"))
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ForeignPathError, match=r"OUT: .*out is not empty \(it holds mine.txt\)"):
        merge_checkpoint(checkpoint, out, bases("qwen"))
    with pytest.raises(NotADirectoryError):
        merge_checkpoint(checkpoint, out / "mine.txt", bases("qwen"))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    left = tmp_path / ".out.balcaprl-partial"  # of a merge that was killed
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x")
    (tmp_path / "link").symlink_to(out)
    merge_checkpoint(checkpoint, tmp_path / "link", bases("qwen"))
    assert (out / "model.safetensors").is_file()
    assert not left.exists()


def test_a_full_disk_leaves_nothing(bases, checkpoint, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(balcaprl.checkpoints.checkpoint, "_fsync_tree", full)
    with pytest.raises(SaveError, match=r"out could not be saved: No space left .*make room"):
        merge_checkpoint(checkpoint, tmp_path / "out", bases("qwen"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint"}
