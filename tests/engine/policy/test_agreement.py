"""What is compared at load: the packed forward with the model's own generation, and the prompt with the image it must show."""

import json
import shutil

import pytest
import torch

from balcaprl.demo.tiny_models import build_tiny_llava, build_tiny_qwen
from balcaprl.policy import Policy, PolicyMismatchError, agreement
from balcaprl.policy.families import Llava, QwenVL

CORPUS = ["A large red circle is above a small blue square.", "Describe the image."] * 3
SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_layers": 2, "num_heads": 4, "vision_hidden_size": 32}
BUILDERS = {
    "qwen": (build_tiny_qwen, {"vision_depth": 2, **SMALL}, "<|vision_start|><|image_pad|><|vision_end|>"),
    "llava": (build_tiny_llava, {"image_size": 56, "num_kv_heads": 2, **SMALL}, "<image>"),
}


@pytest.fixture(scope="module", params=list(BUILDERS))
def checkpoint(request, tmp_path_factory):
    """A folder, and the placeholder that its template writes."""
    builder, sizes, placeholder = BUILDERS[request.param]
    return builder(tmp_path_factory.mktemp(request.param), CORPUS, **sizes), placeholder


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_checkpoint_agrees_in_every_dtype_and_no_random_state_is_touched(checkpoint, dtype):
    before = torch.get_rng_state()
    Policy.from_pretrained(checkpoint[0], device="cpu", dtype=dtype)
    assert torch.equal(before, torch.get_rng_state())


def test_few_tokens_are_compared(checkpoint, monkeypatch):
    """Of a text and of a picture, in both layouts."""
    packed = []
    original = Policy.pack
    monkeypatch.setattr(Policy, "pack", lambda *args: packed.append(original(*args)) or packed[-1])
    Policy.from_pretrained(checkpoint[0], device="cpu")
    assert [bool(each.image_inputs) for each in packed] == [False, False, True, True]
    assert [each.prefix_layout is not None for each in packed] == [True, False, True, False]
    assert all(each.num_targets <= 6 for each in packed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["positions", "features", "head"])
def test_another_distribution_is_refused_with_its_distance(checkpoint, monkeypatch, fault, dtype):
    if fault == "positions":
        for family in (QwenVL, Llava):
            monkeypatch.setattr(family, "prompt_positions", doubled(family.prompt_positions))
    elif fault == "features":
        for family in (QwenVL, Llava):
            monkeypatch.setattr(family, "image_features", other_features(family.image_features))
    else:
        monkeypatch.setattr(agreement, "_find_logit_rule", lambda policy: agreement.LogitRule(scale=30.0))
    with pytest.raises(
        PolicyMismatchError, match=r"model_type '.*': with an? .* differ by up to [\d.e+-]+ nats"
    ) as error:
        Policy.from_pretrained(enlarged(checkpoint[0]), device="cpu", dtype=dtype)
    assert ("an image" in str(error.value)) == (fault == "features")


def enlarged(folder):
    """A copy whose weights are no longer near 0, as a trained model's are not: positions and images show in its logits."""
    copy = folder.parent / f"{folder.name}-large"
    if not copy.exists():
        policy = Policy.from_pretrained(folder, device="cpu")
        with torch.no_grad():
            for parameter in policy.model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(6)
        policy.save(copy)
    return copy


def doubled(positions):
    return lambda self, *args: 5 * positions(self, *args)


def other_features(features):
    def of(self, *args):
        found = features(self, *args)
        return found._replace(embeds=found.embeds.flip(0) * 3)

    return of


# ------------------------------------------------------------------------------------------------- the template


def with_template(checkpoint, tmp_path, template):
    """A copy of a checkpoint with another template, or none."""
    shutil.copytree(checkpoint[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    for path in tmp_path.glob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.pop("chat_template", None):
            path.write_text(json.dumps(content))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template.replace("PLACEHOLDER", checkpoint[1]))
    return tmp_path


PARTS = "{% for m in messages %}{% for c in m['content'] %}BODY{% endfor %}{% endfor %}"
TOO_FEW = "(0 image placeholders|cannot prepare one image and an instruction: .*tokens in the prompts)"
"""Newer versions of transformers refuse them by themselves."""
TEMPLATES = {
    "none": (None, "no chat template.*chat_template.jinja"),
    "strings alone": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
        TOO_FEW,
    ),
    "strings put together": (
        "{% for m in messages %}{{ 'USER: ' + m['content'] + '\n' }}{% endfor %}",
        "cannot prepare one image and an instruction: TypeError",
    ),
    "strings demanded": (
        "{% for m in messages %}{% if m['content'] is not string %}{{ raise_exception('text only') }}{% endif %}{% endfor %}",
        "cannot prepare one image and an instruction: TemplateError: text only",
    ),
    "texts alone": (PARTS.replace("BODY", "{{ c['text'] }}"), TOO_FEW),
    "another kind of part": (
        PARTS.replace("BODY", "{% if c['type'] == 'image_url' %}PLACEHOLDER{% else %}{{ c['text'] }}{% endif %}"),
        TOO_FEW,
    ),
    "images alone": (
        PARTS.replace("BODY", "{% if c['type'] == 'image' %}PLACEHOLDER{% endif %}") + "hello",
        "drops the instruction",
    ),
    "twice": (
        PARTS.replace(
            "BODY", "{% if c['type'] == 'image' %}PLACEHOLDERPLACEHOLDER{% else %}{{ c['text'] }}{% endif %}"
        ),
        r"image placeholders|cannot prepare one image",
    ),
    "no template at all": ("{{ 1 + ", "cannot prepare one image and an instruction"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_that_does_not_show_the_image_is_refused_once_at_load(checkpoint, tmp_path, kind):
    template, told = TEMPLATES[kind]
    with pytest.raises(PolicyMismatchError, match=rf"(?s)model_type '.*{told}") as error:
        Policy.from_pretrained(with_template(checkpoint, tmp_path, template), device="cpu")
    assert "chat_template.jinja" in str(error.value)


def test_a_template_of_ones_own_is_taken(checkpoint, tmp_path):
    own = PARTS.replace("BODY", "{% if c['type'] == 'image' %}PLACEHOLDER{% else %} Q: {{ c['text'] }} A:{% endif %}")
    Policy.from_pretrained(with_template(checkpoint, tmp_path, own), device="cpu")
