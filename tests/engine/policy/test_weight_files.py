"""What is loaded as a model: safetensors of one folder; all else is refused by name, before any library opens it."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from balcaprl.demo.tiny_models import build_tiny_qwen
from balcaprl.files import manifest
from balcaprl.policy import Policy
from balcaprl.policy.weight_files import ModelFilesError, check_folder

CORPUS = ["A large solid red circle is at the top left. Describe the image."] * 3
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2,
    "vision_hidden_size": 32, "vision_intermediate_size": 48, "vision_depth": 1, "vision_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_qwen(tmp_path_factory.mktemp("model"), CORPUS, **SIZES)


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(autouse=True)
def nothing_is_unpickled(monkeypatch):
    def refuse(*_args, **_kwargs):
        pytest.fail("torch.load was reached")

    monkeypatch.setattr(torch, "load", refuse)


class RunsCode:
    """What a hostile pickle does."""

    def __reduce__(self):
        return os.system, ("touch /tmp/balcaprl-was-here",)


def pickle_in(folder, name):
    torch.save({"w": RunsCode()}, folder / name)


def only_pickle(name):
    def make(folder):
        (folder / "model.safetensors").unlink()
        pickle_in(folder, name)

    return make


def pickled_shards(folder):
    only_pickle("pytorch_model-00001-of-00001.bin")(folder)
    index = {"metadata": {}, "weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def index_naming(name):
    def make(folder):
        target = (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        name_ = str(target) if name == "absolute" else name
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": name_}}))

    return make


def link_out(name, target=None):
    def make(folder):
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(target or outside)

    return make


def set_key(file, key, value, inside=None):
    def make(folder):
        plain = json.loads((folder / file).read_text())
        (plain if inside is None else plain.setdefault(inside, {}))[key] = value
        (folder / file).write_text(json.dumps(plain))

    return make


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def adapter(*, weights, beside=True):
    def make(folder):
        if not beside:
            (folder / "config.json").unlink()
            (folder / "model.safetensors").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x/y"}))
        pickle_in(folder, weights) if weights.endswith(".bin") else save_file({"w": torch.ones(1)}, folder / weights)

    return make


def removed_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors)[1:4]:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CODE = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
REFUSED = {
    **{f"only {name}": (only_pickle(name), name) for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt")},
    "pickled shards": (pickled_shards, "pytorch_model-00001-of-00001.bin"),
    **{
        f"index to {name}": (index_naming(name), "index.json names .*expected the name of a safetensors file")
        for name in ("../outside.safetensors", "absolute", "sub/x.safetensors", "w.bin", "", None, 3)
    },
    "index to nothing": (index_naming("gone.safetensors"), "gone.safetensors is missing"),
    "weights link out": (link_out("model.safetensors"), "model.safetensors is a link that leads out"),
    "config links out": (link_out("config.json"), "config.json is a link that leads out"),
    "tokenizer links out": (link_out("tokenizer.json", "/etc/passwd"), "tokenizer.json is a link that leads out"),
    **{
        f"code in {file}": (set_key(file, "auto_map", CODE), rf"{file} names code that comes with the model \(auto_map\)")
        for file in ("config.json", "tokenizer_config.json", "processor_config.json")
    },
    "code inside": (set_key("processor_config.json", "auto_map", CODE, "image_processor"), "processor_config.json names code"),
    "weights named outside": (set_key("config.json", "transformers_weights", "../x.safetensors"), "transformers_weights"),
    "weights named a pickle": (set_key("config.json", "transformers_weights", "adapter_model.bin"), "transformers_weights"),
    "cut": (cut, "model.safetensors is damaged or cut off"),
    "tensors removed": (removed_tensors, "3 tensors are missing from the weights"),
    "an adapter's pickle": (adapter(weights="adapter_model.bin", beside=False), "adapter_model.bin"),
    "model and adapter": (adapter(weights="adapter_model.safetensors"), "a whole model and an adapter"),
    "an adapter alone": (adapter(weights="adapter_model.safetensors", beside=False), "name the model that it belongs to"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is no valid JSON"),
    "deep JSON": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is no valid JSON"),
    "another shape": (set_key("config.json", "vocab_size", 77, "text_config"), "cannot be loaded as a model"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_not_be_loaded_is_refused_by_name(folder, case):
    make, message = REFUSED[case]
    make(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Policy.from_pretrained(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1500
    assert not os.path.exists("/tmp/balcaprl-was-here")


def test_a_published_folder_with_both_kinds_of_weights_loads_the_safe_ones(folder):
    for name in ("pytorch_model.bin", "training_args.bin", "consolidated.pth"):
        pickle_in(folder, name)
    assert Policy.from_pretrained(folder, device="cpu").num_parameters > 0


def test_shards_and_links_within_the_folder_load(folder, model):
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    names = list(load_file(folder / "part-1.safetensors"))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "part-2.safetensors")}
    (folder / "part-2.safetensors").symlink_to("part-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    policy = Policy.from_pretrained(folder, device="cpu")
    expected = Policy.from_pretrained(model, device="cpu")
    assert torch.equal(policy.lm_head_weight, expected.lm_head_weight)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(folder, tmp_path):
    repository = tmp_path / "models--x--y"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(repository / "blobs" / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    assert Policy.from_pretrained(snapshot, device="cpu").num_parameters > 0
    (snapshot / "extra.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelFilesError, match="leads out"):
        check_folder(snapshot)


def test_a_checkpoint_given_as_a_model_is_compared_with_its_manifest(folder):
    manifest.write_manifest(folder)
    (folder / "README.md").write_text("mine")
    assert Policy.from_pretrained(folder, device="cpu").num_parameters > 0
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(
        ModelFilesError, match=r"damaged: model\.safetensors is not what was saved.*remove manifest.json"
    ):
        Policy.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(
    "path", ["no/such/folder", "/no/such/folder", "elsewhere", "https://example.org/x", "a/b/c", ""]
)
def test_a_path_that_is_not_there_is_told(path):
    with pytest.raises(ValueError, match=r"does not exist|config\.json is missing"):
        Policy.from_pretrained(path)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_one_message(tmp_path, monkeypatch, offline):
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelFilesError, match=r"org/model is no folder here, and cannot be had from .*HF_HUB_OFFLINE=1"
    ) as caught:
        Policy.from_pretrained("org/model")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
