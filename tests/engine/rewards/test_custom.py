"""Custom rewards, conditions, and K columns all the way to the advantages."""

import asyncio
import math
import time

import numpy as np
import pytest
import torch
from PIL import Image
from scripted_judge import ScriptedServer

from balcaprl.config import CustomReward, EndpointConfig, RewardConfig
from balcaprl.kernels import grouped_advantages
from balcaprl.rewards import LexicalJudge, advantage_inputs, make_judge, score_groups
from balcaprl.rewards.correlations import within_group_correlations
from balcaprl.rewards.custom import CustomRewards, load_reward
from balcaprl.rewards.judge import NoJudge
from balcaprl.types import Completion, Prompt, RewardBreakdown, Rollout, RolloutGroup, Sample

REFERENCE = "A red cup stands on a table."


def group(*texts, facts=None, sample_id="s"):
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    sample = Sample(sample_id, lambda: image, REFERENCE, "?", facts)
    prompt = Prompt(sample, torch.zeros(1, dtype=torch.long), {}, None, "")
    return RolloutGroup(prompt, [Rollout(Completion([1], text, [0.0], True)) for text in texts])


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        """
import asyncio, math
def length(sample, caption):
    return len(caption)
def lengths(sample, captions):
    return [len(c) for c in captions]
async def slowly(sample, caption):
    await asyncio.sleep(0.2)
    return len(caption)
inside = 0
async def meets(sample, caption):  # comes back once 50 are here at once
    global inside
    inside += 1
    while inside < 50:
        await asyncio.sleep(0.001)
    return 1
async def slowly_all(sample, captions):
    return [len(c) for c in captions]
def sometimes(sample, caption):
    if "bad" in caption:
        raise RuntimeError("no idea of " + caption)
    return math.nan if "nan" in caption else 1
def infinite(sample, caption):
    return math.inf
def words(sample, caption):
    return "many"
def too_few(sample, captions):
    return [1]
def reference(sample, caption):
    return float(caption == sample.reference)
def wrong(caption):
    return 1
number = 5
"""
    )
    return lambda name: f"{path}:{name}"


def configured(*custom, **more):
    return RewardConfig.model_validate({"custom": [dict(c) for c in custom], **more})


@pytest.mark.parametrize("name", ["length", "lengths", "slowly", "slowly_all"])
def test_all_kinds_of_functions(source, name):
    config = configured({"name": "mine", "source": source(name)})
    groups = [group("a", "bbb"), group("cc", "")]
    score_groups(LexicalJudge(), groups, config)
    told = [[r.breakdown.extra["mine"] for r in g.rollouts] for g in groups]
    assert told == [[1, 3], [2, 0]]
    assert advantage_inputs(groups, config)["rewards"].shape == (4, 4)
    assert advantage_inputs(groups, config)["rewards"][:, 3].tolist() == [1, 3, 2, 0]


def test_asynchronous_captions_run_together(source):
    rewards = CustomRewards([CustomReward(name="mine", source=source("meets"))])
    assert rewards.score(group().prompt.sample, [str(i) for i in range(50)]) == [{"mine": 1.0}] * 50


def test_a_failing_function_loses_its_own_scores_only(source, caplog):
    config = configured({"name": "mine", "source": source("sometimes")}, {"name": "other", "source": source("length")})
    groups = [group("good", "a bad caption", "nan")]
    stats = score_groups(LexicalJudge(), groups, config)
    assert stats.metrics()["custom/missing_mine"] == 2
    assert stats.metrics()["custom/missing_other"] == 0
    told = [r.breakdown.extra["mine"] for r in groups[0].rollouts]
    assert told[0] == 1
    assert math.isnan(told[1])
    assert math.isnan(told[2])
    assert [r.breakdown.extra["other"] for r in groups[0].rollouts] == [4, 13, 3]
    assert "no idea" in caplog.text
    assert "a bad caption" not in caplog.text
    advantages = grouped_advantages(**advantage_inputs(groups, config), group_size=3, weights=config.weights)
    assert torch.isfinite(advantages).all()


@pytest.mark.parametrize("name", ["infinite", "words", "too_few"])
def test_scores_that_are_none_are_missing(source, name):
    groups = [group("a", "b")]
    stats = score_groups(LexicalJudge(), groups, configured({"name": "mine", "source": source(name)}))
    assert stats.metrics()["custom/missing_mine"] == 2
    assert all(math.isnan(r.breakdown.extra["mine"]) for r in groups[0].rollouts)


def test_a_file_is_run_once(source):
    assert load_reward(source("length")) is load_reward(source("length"))


def test_a_file_runs_once_for_all_of_its_functions(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(
        "from pathlib import Path\nlog = Path(__file__).with_suffix('.log')\n"
        "log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n"
        "def f(sample, caption):\n    return 0.0\ndef g(sample, caption):\n    return 1.0\n"
    )
    assert [load_reward(f"{path}:{name}")(None, "x") for name in ("f", "g", "f")] == [0.0, 1.0, 0.0]
    assert path.with_suffix(".log").read_text() == "x"


def test_modules_and_entry_points(monkeypatch, tmp_path):
    import importlib.metadata

    (tmp_path / "my_rewards.py").write_text("def f(sample, caption):\n    return 0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("my_rewards:f")(None, "x") == 0.5
    entry = importlib.metadata.EntryPoint("half", "my_rewards:f", "balcaprl.rewards")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group, name=None: [entry] if name in (None, "half") else []
    )
    assert load_reward("half")(None, "x") == 0.5
    with pytest.raises(
        ValueError, match=r"'third' is neither .* nor an entry point of balcaprl\.rewards \(there are half\)"
    ):
        load_reward("third")


@pytest.mark.parametrize("name", ["nowhere", "number", "wrong"])
def test_what_cannot_be_a_reward_is_refused(source, name):
    with pytest.raises(ValueError, match=r"reward\.custom"):
        CustomRewards([CustomReward(name="mine", source=source(name))])
    with pytest.raises(ValueError, match=r"reward\.custom: 'no_such_module:f' cannot be loaded"):
        load_reward("no_such_module:f")


def test_names_must_differ_and_conditions_name_rewards():
    with pytest.raises(ValueError, match="names must differ"):
        configured({"name": "recall", "source": "a:b"})
    with pytest.raises(ValueError, match="no reward is called 'style'"):
        configured(conditions=[{"reward": "style", "on": "recall", "at_least": 0.5}])


def test_learning_from_custom_rewards_alone(source):
    config = configured({"name": "mine", "source": source("length")}, judge="none", linguistic_weight=0)
    groups = [group("a", "bbb", "cc")]
    judge = make_judge(config, "jsonl")
    assert isinstance(judge, NoJudge)
    stats = score_groups(judge, groups, config)
    assert stats.num_unscorable == 0
    assert not stats.errors
    advantages = grouped_advantages(**advantage_inputs(groups, config), group_size=3, weights=config.weights)
    assert advantages[1] > advantages[2] > advantages[0]


# ------------------------------------------------------------------------------------------------------ conditions and masks


def scored(*rows, lengths=None, extra=()):
    made = group(*("x" for _ in rows))
    for i, (rollout, row) in enumerate(zip(made.rollouts, rows, strict=True)):
        rollout.breakdown = RewardBreakdown(*row[:3], extra=dict(zip(extra, row[3:], strict=True)))
        rollout.length, rollout.reference_length = (lengths[i] if lengths else 10.0), 10.0
    return [made]


def test_conditions_by_hand():
    config = RewardConfig.model_validate(
        {"conditions": [{"reward": "linguistic", "on": "precision", "at_least": 0.5}], "length_rule": "none"}
    )
    nan = math.nan
    groups = scored((0.4, 1, 0.9), (0.5, 1, 0.9), (nan, 1, 0.9), (0.9, 1, nan))
    told = advantage_inputs(groups, config)["rewards"][:, 2].tolist()
    assert told[:2] == [0.0, pytest.approx(0.9)]
    assert math.isnan(told[2])
    assert math.isnan(told[3])


def test_conditions_look_at_rewards_as_judged_whatever_their_order():
    pair = [
        {"reward": "recall", "on": "precision", "at_least": 0.5},
        {"reward": "linguistic", "on": "recall", "at_least": 0.5},
    ]
    for conditions in (pair, pair[::-1]):
        config = RewardConfig.model_validate({"conditions": conditions, "length_rule": "none"})
        assert advantage_inputs(scored((0.2, 0.8, 0.7)), config)["rewards"][0].tolist() == pytest.approx(
            [0.2, 0.0, 0.7]
        )


def test_the_length_rules_gate_custom_columns_that_ask_for_it():
    custom = [{"name": "a", "source": "x:y", "mask": True}, {"name": "b", "source": "x:y"}]
    rows = ((0.5, 0.5, 0.5, 0.6, 0.7),) * 3
    groups = scored(*rows, lengths=[4.0, 5.0, 15.0], extra=("a", "b"))
    masked = advantage_inputs(groups, RewardConfig.model_validate({"custom": custom}))["rewards"]
    assert masked[:, 3].tolist() == pytest.approx([0, 0.6, 0.6])
    assert masked[:, 4].tolist() == pytest.approx([0.7] * 3)
    linear = advantage_inputs(groups, RewardConfig.model_validate({"custom": custom, "length_rule": "linear"}))[
        "rewards"
    ]
    assert linear[:, 3].tolist() == pytest.approx([0.6 * 0.4, 0.6 * 0.5, 0.6 * 0.5])
    assert linear[:, 4].tolist() == pytest.approx([0.7] * 3)


def test_five_columns_reach_the_advantages_with_their_weights():
    custom = [{"name": "a", "source": "x:y", "weight": 2.0}, {"name": "b", "source": "x:y", "weight": 0.0}]
    config = RewardConfig.model_validate({"custom": custom, "length_rule": "none"})
    assert config.weights == (1.0, 1.0, 1.0, 2.0, 0.0)
    groups = scored((0.5, 0.5, 0.5, 0, 1), (0.5, 0.5, 0.5, 1, 0), extra=("a", "b"))
    advantages = grouped_advantages(**advantage_inputs(groups, config), group_size=2, weights=config.weights, eps=0.0)
    assert advantages.tolist() == pytest.approx([-math.sqrt(2), math.sqrt(2)])
    assert set(within_group_correlations(groups, config.names)) >= {"precision_a", "a_b", "linguistic_b"}
    assert within_group_correlations(groups, config.names)["a_b"] == pytest.approx(-1)


# ------------------------------------------------------------------------------------------------------ CapRL and RubiCap

FACTS = {
    "questions": [
        {"question": "What stands there?", "options": ["a cup", "a dog"], "answer": 0},
        {"question": "What colour?", "options": ["blue", "red", "green"], "answer": 1},
    ],
    "rubric": ["cup is named", {"criterion": "red is named", "weight": 3}],
}


def endpoint_config(server, *sources):
    custom = [{"name": f"my_{s}", "source": s} for s in sources]
    zero = {f"{name}_weight": 0 for name in ("precision", "recall", "linguistic")}
    return (
        RewardConfig.model_validate({"judge": "endpoint", "custom": custom, "protocol": {"model": "m"}, **zero}),
        EndpointConfig.model_validate({"servers": [{"url": server.url}], "cache": None, "retry_wait_s": 0.01}),
    )


def test_questions_are_answered_from_the_caption_alone_and_the_rubric_with_the_image():
    with ScriptedServer(keep_bodies=True) as server:
        config, endpoint = endpoint_config(server, "questions", "rubric")
        judge = make_judge(config, "jsonl", endpoint=endpoint)
        groups = [group("A red cup.", "A cup.", "", facts=FACTS)]
        stats = score_groups(judge, groups, config)
        judge.close()
        assert not server.problems
        assert {asked.task: asked.image is not None for asked in server.asked} == {"questions": False, "rubric": True}
    told = [r.breakdown.extra for r in groups[0].rollouts]
    assert told == [
        {"my_questions": 0.5, "my_rubric": 1.0},
        {"my_questions": 0.5, "my_rubric": 0.25},
        {"my_questions": 0.0, "my_rubric": 0.0},
    ]
    assert stats.num_unscorable == 0
    sent = next(a for a in server.asked if a.task == "questions")
    assert "answer" not in sent.data["questions"]["1"]
    assert sent.data["questions"]["2"]["options"] == {"A": "blue", "B": "red", "C": "green"}


@pytest.mark.parametrize(
    "facts",
    [
        None,
        {},
        {"questions": []},
        {"questions": "many"},
        {"questions": [{"question": "?", "options": ["a"], "answer": 0}]},
        {"questions": [{"question": "?", "options": ["a", "b"], "answer": 2}]},
        {"questions": [{"question": "?", "options": ["a", "b"], "answer": True}]},
    ],
)
def test_samples_without_questions_are_counted_and_nobody_waits_for_them(facts):
    with ScriptedServer() as server:
        config, endpoint = endpoint_config(server, "questions")
        judge = make_judge(config, "jsonl", endpoint=endpoint)
        groups = [group("A red cup.", facts=FACTS), group("A red cup.", facts=facts, sample_id="poor")]
        stats = score_groups(judge, groups, config)
        judge.close()
    assert groups[0].rollouts[0].breakdown.extra == {"my_questions": 0.5}
    assert "facts.questions" in groups[1].rollouts[0].breakdown.error
    assert stats.num_unscorable == 1


def test_custom_rewards_can_be_used_from_a_running_loop(source):
    """In a notebook there is one already; scoring uses a thread of its own."""
    config = configured({"name": "mine", "source": source("slowly")})

    async def main():
        groups = [group("a")]
        score_groups(LexicalJudge(), groups, config)
        return groups[0].rollouts[0].breakdown.extra["mine"]

    assert asyncio.run(main()) == 1


# ------------------------------------------------------------------------------------------------------ foreign code


FOREIGN = """
import asyncio, math, sys, threading, time
from decimal import Decimal
from fractions import Fraction
import numpy as np
import torch

class Explosive:
    def __float__(self): raise SystemExit(3)
class Dull:
    def __float__(self): raise RuntimeError("no float")
class LongList(list):
    def __len__(self): raise KeyboardInterrupt
class Mute(Exception):
    def __str__(self): raise RuntimeError("no words")

def exits(sample, caption): sys.exit(7)
def interrupts(sample, caption): raise KeyboardInterrupt
def bare(sample, caption): raise BaseException("bare")
def generator_exit(sample, caption): raise GeneratorExit
def mute(sample, caption): raise Mute()
def explosive(sample, caption): return Explosive()
def dull(sample, caption): return Dull()
def none(sample, caption): pass
def dictionary(sample, caption): return {"score": 1.0}
def text(sample, caption): return "0.5"
def list_of_one(sample, caption): return [0.5]
def complex_number(sample, caption): return 1 + 2j
def numpy_complex(sample, caption): return np.complex64(1 + 2j)
def torch_complex(sample, caption): return torch.tensor(1 + 2j)
def huge(sample, caption): return 10**400
def minus_infinite(sample, caption): return -math.inf
def vector(sample, caption): return np.ones(3)
async def exits_later(sample, caption): sys.exit(7)
async def cancelled(sample, caption): raise asyncio.CancelledError
def exits_all(sample, captions): sys.exit(7)
async def exits_all_later(sample, captions): sys.exit(7)
def dictionary_of_all(sample, captions): return dict.fromkeys(range(len(captions)), 1.0)
def text_of_all(sample, captions): return "5" * len(captions)
def set_of_all(sample, captions): return set(range(len(captions)))
def too_many(sample, captions): return [1.0] * (len(captions) + 1)
def one_number(sample, captions): return 1.0
def explosive_all(sample, captions): return [Explosive() for _ in captions]
def long_list(sample, captions): return LongList([1.0] * len(captions))

def boolean(sample, caption): return True
def integer(sample, caption): return 1
def numpy_scalar(sample, caption): return np.float16(1)
def numpy_array(sample, caption): return np.ones(1)
def tensor(sample, caption): return torch.ones((), dtype=torch.bfloat16, requires_grad=True)
def decimal(sample, caption): return Decimal(1)
def fraction(sample, caption): return Fraction(1)
def promised(sample, caption): return later(sample, caption)
async def later(sample, caption): return 1.0
def array_of_all(sample, captions): return np.ones(len(captions), np.float32)
def tensor_of_all(sample, captions): return torch.ones(len(captions), 1)
def tuple_of_all(sample, captions): return (1,) * len(captions)

stop = threading.Event()
calls = []
def hangs(sample, caption):
    calls.append(caption)
    if "slow" in caption:
        stop.wait()
    return 1.0
def hangs_all(sample, captions):
    calls.append(captions)
    stop.wait()
def spins(sample, caption):
    while not stop.is_set():
        pass
async def hangs_later(sample, caption):
    while not stop.is_set():
        await asyncio.sleep(0.01)
async def blocks_the_loop(sample, caption):
    stop.wait()
class Slow:
    def __float__(self):
        stop.wait()
        return 1.0
def slow_number(sample, caption): return Slow()
"""
BAD = [
    "exits", "interrupts", "bare", "generator_exit", "mute", "explosive", "dull", "none", "dictionary", "text", "list_of_one",
    "complex_number", "numpy_complex", "torch_complex", "huge", "minus_infinite", "vector", "exits_later", "cancelled",
    "exits_all", "exits_all_later", "dictionary_of_all", "text_of_all", "set_of_all", "too_many", "one_number",
    "explosive_all", "long_list",
]  # fmt: skip
GOOD = [
    "boolean", "integer", "numpy_scalar", "numpy_array", "tensor", "decimal", "fraction", "promised", "later",
    "array_of_all", "tensor_of_all", "tuple_of_all",
]  # fmt: skip


@pytest.fixture
def foreign(tmp_path):
    path = tmp_path / "foreign.py"
    path.write_text(FOREIGN)
    yield lambda name: f"{path}:{name}"
    load_reward(f"{path}:hangs").__globals__["stop"].set()


@pytest.mark.parametrize("name", BAD)
def test_whatever_foreign_code_does_its_scores_are_missing_and_the_others_stay(foreign, name):
    config = configured({"name": "mine", "source": foreign(name)}, {"name": "other", "source": foreign("integer")})
    groups = [group("a", "b"), group("c", "d")]
    stats = score_groups(LexicalJudge(), groups, config)
    assert stats.metrics()["custom/missing_mine"] == 4
    assert stats.metrics()["custom/missing_other"] == 0
    told = [r.breakdown.extra for g in groups for r in g.rollouts]
    assert all(math.isnan(extra["mine"]) and extra["other"] == 1.0 for extra in told)


@pytest.mark.parametrize("name", GOOD)
def test_numbers_of_any_library_are_taken(foreign, name):
    groups = [group("a", "b")]
    stats = score_groups(LexicalJudge(), groups, configured({"name": "mine", "source": foreign(name)}))
    assert stats.metrics()["custom/missing_mine"] == 0
    assert [type(r.breakdown.extra["mine"]) for r in groups[0].rollouts] == [float, float]


@pytest.mark.parametrize("name", ["hangs_all", "spins", "hangs_later", "blocks_the_loop", "slow_number"])
def test_a_reward_that_never_returns_is_left_behind(foreign, name, caplog):
    """The step goes on without its scores; it is not asked again while it is out, and does not keep the process from ending."""
    import threading

    from balcaprl.rewards import custom

    custom._log_once.cache_clear()
    config = configured(
        {"name": "mine", "source": foreign(name), "timeout_s": 0.3}, {"name": "other", "source": foreign("integer")}
    )
    for _ in range(2):
        groups = [group("slow", "b"), group("c", "d")]
        stats = score_groups(LexicalJudge(), groups, config)
        assert stats.metrics()["custom/missing_mine"] == 4
        assert stats.metrics()["custom/missing_other"] == 0
    assert "no answer within 0.3 s" in caplog.text
    assert all(t.daemon for t in threading.enumerate() if t.name.startswith("custom-reward"))


def test_a_reward_that_comes_back_late_is_asked_again(foreign):
    rewards = CustomRewards([CustomReward(name="mine", source=foreign("hangs"), timeout_s=0.5)])
    scope = load_reward(foreign("hangs")).__globals__
    sample = group().prompt.sample
    first = rewards.score(sample, ["good", "slow", "good"])
    assert first[0] == {"mine": 1.0}
    assert all(math.isnan(each["mine"]) for each in first[1:])
    assert scope["calls"] == ["good", "slow"]
    scope["stop"].set()
    for _ in range(200):
        again = rewards.score(sample, ["good"])
        if again == [{"mine": 1.0}]:
            break
        time.sleep(0.05)
    assert again == [{"mine": 1.0}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(sample, caption:\n    return 1", "SyntaxError"),
        ("def g(sample, caption):\n    return 1", "has no attribute 'f'"),
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("undefined_name", "NameError"),
        ("\x00", "null bytes|source code"),
        ("f = 5", "int, expected a function"),
        ("f = len", r"takes \("),
    ],
)
def test_a_source_that_cannot_be_loaded_is_told_before_anything_heavy(tmp_path, text, told):
    path = tmp_path / "broken.py"
    path.write_text(text)
    from balcaprl.config import TrainConfig
    from balcaprl.evaluation.standalone import evaluate_checkpoint
    from balcaprl.training.trainer import Trainer

    config = TrainConfig.model_validate(
        {
            "output_dir": tmp_path / "run",
            "model": {"path": str(tmp_path / "no_model")},
            "data": {"kind": "jsonl", "path": str(tmp_path / "no_data.jsonl")},
            "reward": {"custom": [{"name": "mine", "source": f"{path}:f"}]},
        }
    )
    for start in (lambda: Trainer(config), lambda: evaluate_checkpoint(tmp_path / "no_model", config, None)):
        with pytest.raises(ValueError, match=rf"(?s)reward\.custom.*({told})"):
            start()
