import html
import io
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from balcaprl.config import TrainConfig
from balcaprl.files.ownership import ForeignPathError
from balcaprl.reporting.charts import Series, line_chart, moving_mean, stacked_chart, thin
from balcaprl.reporting.eval_images import eval_image_path, save_eval_image
from balcaprl.reporting.report import MAX_IMAGES, format_change, load_run, segments, summary_table, write_report

EVIL = '<script>alert("x")</script>'
FLAWED = "There is a large red circle at the top. A small green square is at the left. It feels calm and modern."
GOOD = "There is a large red circle at the top. A small blue square is at the left of it."
REFERENCE = "A large red circle is at the top, and a small blue square is at the left."


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_record(step, num_steps, noise):
    gain = step / num_steps

    def value(low, high, spread):
        return min(1.0, max(0.0, low + (high - low) * (1 - math.exp(-3 * gain)) + noise.gauss(0, spread)))

    scores = {
        "precision": value(0.42, 0.92, 0.05),
        "recall": value(0.34, 0.92, 0.05),
        "linguistic": value(0.96, 1, 0.01),
    }
    sample, score, update = noise.gauss(0.62, 0.05), 0.04, noise.gauss(0.76, 0.04)
    return {
        "step": step,
        **{f"reward/{name}": score for name, score in scores.items()},
        "reward/b_capscore": 3 / sum(1 / max(s, 1e-3) for s in scores.values()),
        "length_ratio": 1.45 - 0.4 * gain + noise.gauss(0, 0.08),
        "masked_fraction": value(0.12, 0.0, 0.02),
        "sampling_kl": abs(noise.gauss(2e-5, 1e-5)) if step % 7 else None,
        "loss": noise.gauss(0, 0.01),
        "grad_norm": abs(noise.gauss(1.2, 0.3)),
        "clip_fraction": 0.0,
        "lr": 1e-4,
        "time/sample": sample,
        "time/score": score,
        "time/update": update,
        "time/sync": 0.002,
        "time/step": sample + score + update + 0.05,
        "tokens_per_second": noise.gauss(1250, 60),
    }


def assertion(caption, phrase, verified=True, pointable=True):
    start = caption.find(phrase)
    spans = [[start, start + len(phrase)]] if start >= 0 else []
    return {"text": phrase, "spans": spans, "verified": verified, "pointable": pointable}


def caption_record(step, mode, sample_id, caption):
    good = caption == GOOD
    claims = [
        assertion(caption, "a large red circle"),
        assertion(caption, "large red circle at the top"),
        assertion(caption, "small blue square" if good else "small green square", verified=good),
        assertion(caption, "at the left"),
    ]
    claims += [] if good else [assertion(caption, "feels calm and modern", True, False)]
    units = [{"text": t, "covered": good or "circle" in t} for t in ("red circle", "circle: at the top", "blue square")]
    scores = (1.0, 1.0, 1.0, 1.0) if good else (0.6, 0.667, 0.833, 0.688)
    return {
        "step": step,
        "mode": mode,
        "sample_id": sample_id,
        "rollout": 0,
        "reference": REFERENCE,
        "caption": caption,
        "length_ratio": 1.06 if good else 1.31,
        **dict(zip(("precision", "recall", "linguistic", "b_capscore"), scores, strict=True)),
        "assertions": claims,
        "reference_units": units,
        "error": None,
    }


def evaluation(step, mode, gain):
    return {
        "step": step,
        "mode": mode,
        "precision": 0.42 + 0.5 * gain,
        "recall": 0.34 + 0.58 * gain,
        "linguistic": 0.96 + 0.04 * gain,
        "b_capscore": 0.448 + 0.493 * gain,
        "length_ratio": 1.4 - 0.3 * gain,
        "num_samples": 128,
        "num_unscorable": 1,
    }


def draw_scene():
    image = Image.new("RGB", (112, 112), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((36, 6, 76, 46), fill="red")
    draw.rectangle((10, 60, 28, 78), fill="blue")
    return image


def make_run(folder, num_steps=60, num_images=2, caption=FLAWED, sample_id="scene-{}"):
    folder.mkdir(exist_ok=True)
    noise = random.Random(0)
    config = TrainConfig(output_dir=folder, steps=num_steps).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "summary.json").write_text(json.dumps({"steps": num_steps, "note": EVIL}))
    write_lines(folder / "metrics.jsonl", [step_record(s, num_steps, noise) for s in range(1, num_steps + 1)])
    points = [(0, "sampled", 0.0), (0, "greedy", 0.9), (num_steps, "sampled", 1.0), (num_steps, "greedy", 1.03)]
    write_lines(folder / "evaluations.jsonl", [evaluation(*point) for point in points])
    captions = []
    for index in range(num_images):
        name = sample_id.format(index)
        save_eval_image(folder, name, draw_scene())
        for step, mode, text in [(0, "sampled", caption), (0, "greedy", GOOD), (num_steps, "sampled", GOOD)]:
            captions.append(caption_record(step, mode, name, text))
    write_lines(folder / "eval_captions.jsonl", captions)
    return folder


class Page(HTMLParser):
    """Collects a page's tags, and fails where one is closed that was not opened."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.tags, self.marks, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "mark":
            self.marks.append([dict(attrs).get("class"), ""])
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "mark":
            self.marks[-1][1] += data


@pytest.fixture(scope="module")
def page_text(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "demo")).read_text()


def test_page_is_whole_and_self_contained(page_text):
    page = Page(page_text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object"}
    assert [tag for tag, _ in page.tags].count("svg") == 11
    links = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "xlink:href", "data")]
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"url\((?!#)|@import", page_text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert "undefined" not in page_text
    assert not any(re.fullmatch(r"(figure|axes)_\d+", i) for i in ids)


def test_page_shows_before_after_and_change(page_text):
    for text in ("0.448", "0.941", "+0.493", "60 of 60", "c-gdpo", "1 of 3 reference units not covered"):
        assert text in page_text
    assert page_text.count('<img src="data:image/png;base64,') == 2


def test_page_colours_each_assertion(page_text):
    marks = Page(page_text).marks
    assert ["false", "small green square"] in marks
    assert ["unpointable", "feels calm and modern"] in marks
    assert ["counted", "at the left"] in marks


def test_same_run_gives_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", num_steps=5)
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob("*.tmp"))


def test_untrusted_text_is_escaped(tmp_path):
    run = make_run(tmp_path / "run", num_steps=3, caption=f"A {EVIL} dog", sample_id='"><img src=x onerror=y>{}')
    record = caption_record(0, "sampled", EVIL, EVIL)
    record.update(reference=EVIL, error=EVIL)
    record["assertions"] = [{"text": f'" onclick="z {EVIL}', "spans": [[0, 5]], "verified": True, "pointable": True}]
    record["reference_units"] = [{"text": EVIL, "covered": False}]
    save_eval_image(run, EVIL, draw_scene())
    with open(run / "eval_captions.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    (run / "config.yaml").write_text(f"seed: 1\nmodel: {{path: '</pre>{EVIL}'}}\n")
    text = write_report(run).read_text()
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
    assert html.escape(EVIL, quote=False) in text.replace("&#34;", '"')


def test_lone_surrogates_do_not_break_the_page(tmp_path):
    assert "A ? dog" in write_report(make_run(tmp_path / "run", num_steps=2, caption="A \ud800 dog")).read_text()


def test_overlapping_spans_show_the_worst_verdict():
    true = {"text": "t", "spans": [[0, 10]], "verified": True, "pointable": True}
    vague = {"text": "v", "spans": [[5, 15]], "verified": True, "pointable": False}
    false = {"text": "f", "spans": [[8, 12], [20, 21]], "verified": False, "pointable": True}
    pieces = segments("0123456789abcdefghijklmno", [false, true, vague])
    assert [(p.text, p.verdict) for p in pieces] == [
        ("01234", "counted"),
        ("567", "unpointable"),
        ("89", "false"),
        ("ab", "false"),
        ("cde", "unpointable"),
        ("fghij", None),
        ("k", "false"),
        ("lmno", None),
    ]
    assert set(pieces[2].title.split("\n")) == {"t (counted)", "v (unpointable)", "f (false)"}


@pytest.mark.parametrize(
    "spans", [[[-5, 99]], [[3, 3]], [[4, 2]], [[1]], ["ab"], [[0.5, 2]], None, [[50, 60]], [[0, 2], [0, 2], [1, 3]]]
)
def test_pieces_always_join_to_the_caption(spans):
    pieces = segments("hello", [{"text": "x", "spans": spans, "verified": True, "pointable": True}])
    assert "".join(p.text for p in pieces) == "hello"


def test_empty_caption_has_no_pieces():
    assert segments("", [{"text": "x", "spans": [[0, 4]], "verified": True, "pointable": True}]) == []


def test_empty_folder_gives_a_page_that_says_so(tmp_path):
    text = write_report(tmp_path).read_text()
    Page(text)
    for words in (
        "No training step is logged",
        "No evaluation is logged",
        "No held-out captions",
        "config.yaml is missing",
    ):
        assert words in text


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(tmp_path / "none")


def test_run_without_steps_shows_its_one_evaluation(tmp_path):
    run = make_run(tmp_path / "run", num_steps=0)
    write_lines(run / "evaluations.jsonl", [evaluation(0, "sampled", 0.0)])
    text = write_report(run).read_text()
    assert "one evaluation only" in text
    assert "0.448" in text
    assert "0 of 0" in text


def test_run_of_one_step_has_charts(tmp_path):
    assert write_report(make_run(tmp_path / "run", num_steps=1)).read_text().count("<svg") == 11


def test_broken_files_are_told_not_fatal(tmp_path):
    run = make_run(tmp_path / "run", num_steps=3)
    (run / "config.yaml").write_text("a: [")
    (run / "summary.json").write_text("{")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    eval_image_path(run, "scene-0").write_bytes(b"no picture")
    text = write_report(run).read_text()
    assert "config.yaml cannot be read" in text
    assert "summary.json cannot be read" in text
    assert "No picture saved" in text


def test_the_latency_of_a_request_is_no_phase(tmp_path):
    """Many are under way at once: in the chart of phases they would count again what ``score`` counts."""
    run = make_run(tmp_path / "run", num_steps=3)
    records = load_run(run).metrics
    write_lines(run / "metrics.jsonl", [record | {"time/judge_p50": 0.5, "time/judge_p95": 9.0} for record in records])
    text = write_report(run).read_text()
    assert "Seconds a step, by phase" in text
    assert "judge_p" not in text


def test_odd_values_do_not_break_the_page(tmp_path):
    run = make_run(tmp_path / "run", num_steps=3)
    write_lines(run / "metrics.jsonl", [{"step": 1}, {"step": 2, "reward/recall": "high", "time/sample": None}])
    write_lines(run / "evaluations.jsonl", [{"step": 0, "mode": "sampled"}, {"step": 1, "mode": "other", "recall": 1}])
    write_lines(run / "eval_captions.jsonl", [{"step": 0, "sample_id": "a", "mode": "greedy", "assertions": [3]}])
    Page(write_report(run).read_text())


def test_last_record_of_an_evaluation_counts(tmp_path):
    write_lines(tmp_path / "evaluations.jsonl", [evaluation(0, "greedy", 0), evaluation(0, "greedy", 1)])
    assert [e["recall"] for e in load_run(tmp_path).evaluations] == [pytest.approx(0.92)]


def test_large_pictures_are_shrunk_and_few(tmp_path):
    run = make_run(tmp_path / "run", num_steps=1, num_images=MAX_IMAGES + 3)
    save_eval_image(run, "scene-0", Image.effect_noise((2000, 1000), 50))
    text = write_report(run).read_text()
    assert text.count('<img src="data:') == MAX_IMAGES
    assert text.count("data:image/jpeg") == 1
    assert len(text) < 1_500_000


def test_summary_pairs_first_and_last_of_each_mode():
    table = summary_table([evaluation(0, "sampled", 0), evaluation(5, "sampled", 0.5), evaluation(9, "sampled", 1)])
    assert list(table) == ["sampled"]
    assert (table["sampled"]["before"]["step"], table["sampled"]["after"]["step"]) == (0, 9)


CHANGES = [(0.5, 0.25, "\N{MINUS SIGN}0.250"), (0.5, 0.50001, "0.000"), (None, 0.5, ""), (0.1, 0.4, "+0.300")]


@pytest.mark.parametrize(("before", "after", "shown"), CHANGES)
def test_change_is_signed(before, after, shown):
    assert format_change(before, after) == shown


def test_moving_mean_skips_gaps():
    values = np.array([math.nan, 1.0, 3.0, math.nan, 5.0, math.nan, math.nan])
    np.testing.assert_allclose(moving_mean(values, 2), [math.nan, 1, 2, 3, 5, 5, math.nan])


def test_long_runs_are_thinned_to_means():
    steps, values = thin(np.arange(5000.0), np.where(np.arange(5000) % 2, 1.0, math.nan))
    assert len(steps) == 1000
    assert np.all(values == 1.0)
    chart = line_chart("long", [Series("x", np.arange(5e4), np.random.default_rng(0).random(50_000), "c0")])
    assert len(chart.svg) < 60_000


def test_charts_take_their_colours_from_the_page():
    band = line_chart("a & b", [Series("x", np.arange(3.0), np.ones(3), "precision", "hollow")], band=(0.5, 2.0))
    stack = stacked_chart("s", np.arange(3.0), {f"p{i}": np.ones(3) for i in range(8)})
    for chart in (band, stack):
        ElementTree.fromstring(chart.svg)
        assert not re.search(r"#[0-9a-f]{6}", chart.svg)
    assert "var(--precision)" in band.svg
    assert band.legend[-1][0] == "allowed: 0.5 to 2"


# ---------------------------------------------------------------------------------------------------- hostile folders


def bomb(levels=9):
    """YAML whose aliases stand for ten to the ninth values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"model: {{path: *a{levels - 1}}}"])


def merge_bomb(levels=9):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, levels)]
    return "\n".join(lines)


CONFIGS = {
    "alias bomb": bomb(),
    "merge bomb": merge_bomb(),
    "deep": "[" * 100_000,
    "deep mapping": "{a: " * 50_000,
    "huge number": "seed: " + "9" * 50_000,
    "large number": "seed: 1"
    + "0" * 400
    + "\nsteps: 1"
    + "0" * 400
    + "\nreward: {length_rule: mask, tau_low: -.inf, tau_high: 1e300}",
    "python": "seed: !!python/object/apply:os.system ['touch ran']",
    "binary": "\x00\x01\ufffe" * 1000,
    "no mapping": "- 1\n- 2\n",
    "date": "seed: 2026-99-99",
    "unhashable": "? [1, 2]\n: 3\n",
    "large": "# " + "x" * (1 << 22),
    "everything nested": yaml.safe_dump(
        {"model": {"path": {"a": ["b"] * 1000}}, "seed": [1] * 1000, "steps": {"a": 1}}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_no_configuration_breaks_a_report(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run", num_steps=3)
    (run / "config.yaml").write_text(CONFIGS[name])
    text = write_report(run).read_text()
    Page(text)
    assert "Before and after" in text
    assert len(text) < 1_500_000
    if name not in ("large number", "no mapping", "everything nested"):
        assert "config.yaml cannot be read" in text or "config.yaml is larger" in text
    assert not (tmp_path / "ran").exists()


BIG = 10**400
MEASURES = ("reward/recall", "time/step", "time/sample", "tokens_per_second", "recall", "b_capscore", "length_ratio")
RECORDS = {
    "10**400": dict.fromkeys((*MEASURES, "num_samples"), BIG),
    "-10**400": dict.fromkeys(MEASURES, -BIG),
    "1e308": dict.fromkeys(MEASURES, 1.7e308),
    "infinite": dict.fromkeys(MEASURES, math.inf),
    "texts": dict.fromkeys((*MEASURES, "num_samples"), "x" * 100_000),
    "nested": {key: [[{"a": [1]}]] for key in (*MEASURES, "num_samples")},
    "many phases": {f"time/{i}": 1.0 for i in range(20_000)},
    "markup in keys": {f"time/{EVIL}": 1.0},
}


@pytest.mark.parametrize("name", RECORDS)
def test_no_value_breaks_a_report(tmp_path, name):
    run = make_run(tmp_path / "run", num_steps=12)
    values = RECORDS[name]
    write_lines(run / "metrics.jsonl", [{"step": s} | values for s in range(1, 12)])
    write_lines(
        run / "evaluations.jsonl", [{"step": s, "mode": m} | values for s in (0, 11) for m in ("sampled", "greedy")]
    )
    write_lines(run / "eval_captions.jsonl", [caption_record(s, "sampled", "scene-0", GOOD) | values for s in (0, 11)])
    text = write_report(run).read_text()
    page = Page(text)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert len(text) < 1_500_000


@pytest.mark.parametrize("step", [-1, BIG, True, 1.0, "1", None, 1 << 60])
def test_a_record_of_no_step_is_broken(tmp_path, step):
    run = make_run(tmp_path / "run", num_steps=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "reward/recall": 0.5}) + "\n")
    assert [record["step"] for record in load_run(run).metrics] == [1, 2, 3]
    assert "metrics.jsonl: 1 broken lines" in write_report(run).read_text()


LOGS = ("metrics.jsonl", "evaluations.jsonl", "eval_captions.jsonl", "summary.json")
JUNK = {
    "deep": b'{"step": 1, "a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
    "binary": bytes(range(256)) * 1000,
    "zeros": b"\0" * (4 << 20),
    "digits": b'{"step": ' + b"9" * 100_000 + b"}\n",
    "no objects": b"[]\n3\nnull\n\n",
    "empty": b"",
}


@pytest.mark.parametrize("junk", [*JUNK, "missing", "pipe", "folder", "sparse", "link out", "link to a device", "loop"])
@pytest.mark.parametrize("name", LOGS)
def test_no_file_breaks_a_report(tmp_path, name, junk):
    run = make_run(tmp_path / "run", num_steps=3)
    path, secret = run / name, tmp_path / "secret"
    secret.write_text('{"step": 1, "mode": "sampled", "sample_id": "PRIVATE", "caption": "PRIVATE"}\n')
    path.unlink()
    if junk in JUNK:
        path.write_bytes(JUNK[junk])
    elif junk == "pipe":
        os.mkfifo(path)
    elif junk == "folder":
        path.mkdir()
    elif junk == "sparse":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    elif junk != "missing":
        path.symlink_to({"link out": secret, "link to a device": "/dev/zero", "loop": path}[junk])
    text = write_report(run).read_text()
    Page(text)
    assert "PRIVATE" not in text
    assert name in text or junk in ("missing", "empty")


def test_assertions_without_end_make_no_page_without_end(tmp_path):
    run = make_run(tmp_path / "run", num_steps=1)
    spans = [[i, 20_000 - i] for i in range(2000)]
    claims = [{"text": f"{i} " * 5000, "spans": spans, "verified": True, "pointable": True} for i in range(100)]
    record = caption_record(0, "sampled", "scene-0", "x" * 1_000_000) | {
        "assertions": claims,
        "reference": "y" * 1_000_000,
    }
    write_lines(run / "eval_captions.jsonl", [record, record | {"step": 1}])
    assert len(write_report(run).read_text()) < 4_000_000


@pytest.mark.parametrize("kind", ["bomb", "eps", "pipe", "link out", "huge header"])
def test_no_picture_breaks_a_report(tmp_path, kind):
    run = make_run(tmp_path / "run", num_steps=1, num_images=1)
    path = eval_image_path(run, "scene-0")
    path.unlink()
    if kind == "bomb":
        Image.new("1", (12_000, 12_000)).save(path)
    elif kind == "eps":
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link out":
        draw_scene().save(tmp_path / "private.png")
        path.symlink_to(tmp_path / "private.png")
    else:
        buffer = io.BytesIO()
        draw_scene().save(buffer, format="PNG")
        data = bytearray(buffer.getvalue())
        data[16:24] = b"\x7f\xff\xff\xff" * 2
        path.write_bytes(data)
    assert "No picture saved" in write_report(run).read_text()


def test_a_large_log_is_read_at_both_ends(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", num_steps=60)
    monkeypatch.setattr("balcaprl.reporting.run_reading._MAX_LOG_BYTES", 20_000)
    steps = [record["step"] for record in load_run(run).metrics]
    assert steps[0] == 1
    assert steps[-1] == 60
    assert 10 < len(steps) < 60
    assert "bytes in its middle" in write_report(run).read_text()


def test_a_foreign_report_or_folder_is_left_alone(tmp_path):
    run = make_run(tmp_path / "run", num_steps=1)
    (run / "report.html").write_text("<title>my thesis</title>")
    with pytest.raises(ForeignPathError, match=r"report\.html"):
        write_report(run)
    assert (run / "report.html").read_text() == "<title>my thesis</title>"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(ForeignPathError, match="no run folder"):
        write_report(tmp_path / "home")
    assert len(list((tmp_path / "home").iterdir())) == 1


def test_links_in_the_reports_place_are_not_followed(tmp_path):
    run = make_run(tmp_path / "run", num_steps=1)
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (run / "report.html.tmp").symlink_to(precious)
    (run / "report.html").symlink_to(tmp_path / "nowhere")
    write_report(run)
    assert precious.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
