"""Tiny checkpoints are stock folders: plain transformers loads and runs them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen

CORPUS = ["A large red circle is above a small blue square.", "Describe the image.", "A small red square."] * 3
BUILDERS = {"qwen": build_tiny_qwen, "llava": build_tiny_llava}


@pytest.fixture(scope="module", params=list(BUILDERS))
def family_and_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, BUILDERS[request.param](folder, CORPUS)


def _load(folder):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def test_stock_classes_load_and_run(family_and_folder):
    family, folder = family_and_folder
    model, processor = _load(folder)
    image = Image.fromarray(np.zeros((112, 112, 3), np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    num_image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert num_image_tokens == {"qwen": 16, "llava": 64}[family]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
    assert torch.isfinite(logits).all()
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6


def test_common_words_are_single_tokens(family_and_folder):
    _, folder = family_and_folder
    tokenizer = _load(folder)[1].tokenizer
    assert tokenizer.tokenize(" large red circle.") == ["Ġlarge", "Ġred", "Ġcircle", "."]
    sentence = "Größe 7 — never seen"
    assert tokenizer.decode(tokenizer(sentence, add_special_tokens=False)["input_ids"]) == sentence


def test_seed_decides_the_weights_and_leaves_the_global_state(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    folders = [build_tiny_qwen(tmp_path / str(i), CORPUS, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(before, torch.random.get_rng_state())
    blobs = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert blobs[0] == blobs[1]
    assert blobs[0] != blobs[2]


def test_untied_heads_are_stored(tmp_path):
    from safetensors import safe_open

    folder = build_tiny_qwen(tmp_path, CORPUS, tie_word_embeddings=False)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 (safe_open is no mapping)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"hidden_size \(190\)"):
        build_tiny_qwen(tmp_path, CORPUS, hidden_size=190)
    with pytest.raises(ValueError, match="corpus must be several texts"):
        build_tiny_qwen(tmp_path, "one string")
