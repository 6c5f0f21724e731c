"""report.html: one self-contained, escaped page of any run folder, whatever the run came to."""

import base64
import hashlib
import json
import os
import re
import time
from html.parser import HTMLParser

import pytest
from fake_run import HOSTILE, make_run

from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.report.build import build_report, render_report
from megalign.report.headline import run_status
from megalign.report.run_folder import read_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Text, attributes and nesting of a page; fails on tags that do not close."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.scripts = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.words = " ".join(" ".join(self.text).split())
        self.ids = {attributes["id"] for _, attributes in self.tags if "id" in attributes}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not (self.open and self.open[-1] == "style"):
            self.text.append(data)


def build(folder, **arguments):
    return Page(build_report(make_run(folder, **arguments)).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return build(tmp_path_factory.mktemp("runs") / "moe", hot=1.0)


def test_every_section_and_chart_of_a_moe_run_is_there(page):
    sections = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    assert sections == {
        "curves",
        "experts",
        "samples",
        "data",
        "next",
        "configuration",
        "environment",
        "events",
    }
    linked = {attributes["href"].removeprefix("#") for tag, attributes in page.tags if tag == "a"}
    assert linked == sections
    charts = json.loads(page.scripts[0])["charts"]
    drawn = [attributes for _, attributes in page.tags if "data-chart" in attributes]
    assert len(charts) == len(drawn) == 9  # loss, rate, norm, tokens/s, MFU, balancing, z, time, expert range


def test_the_headline_has_the_numbers_of_metrics_and_summary(tmp_path):
    page = build(tmp_path / "run")
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [loss for loss in losses if loss is not None]
    head = page.words.split("Curves", 1)[0]
    for part in (
        "grammar-moe finished",
        f"Training loss {sum(losses[-10:]) / 10:.3f} mean of the last 10 steps, from {losses[0]:.3f}",
        "Best eval loss 1.210 step 300",
        "Exact match 93.4 %",
    ):
        assert part in head
    for part in (
        "Tokens 1.23 M",
        "Wall time 12 min 34 s",
        "Parameters 12.3 M 4.32 M active",
        "8 experts, 2 a token",
    ):
        assert part in head


def test_nothing_is_loaded_from_anywhere(page):
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "srcset", "action"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")


def test_style_and_script_reach_for_no_address(tmp_path):
    html = build_report(make_run(tmp_path / "run", steps=5)).read_text()
    assert re.findall(r"https?://[^\s\"'<]+", html) == [
        "http://www.w3.org/2000/svg"
    ]  # a namespace, never fetched
    assert "@import" not in html and "url(" not in html


def test_the_policy_admits_exactly_our_script(page):
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert len(page.scripts) == 2 and "unsafe-inline" not in policy.split("script-src")[1]


def test_what_a_run_recorded_is_text_never_markup(page):
    assert page.words.count(HOSTILE) >= 2 + 1 + 12  # prompt, answer; warning; rejected rows
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_hostile_names_and_environment_are_text_too(tmp_path):
    folder = make_run(tmp_path / "run", steps=5)
    (folder / "recipe.yaml").write_text(
        f"name: '{HOSTILE}'\nmodel: {{num_layers: 2, hidden_size: '{HOSTILE}'}}\n"
    )
    (folder / "environment.json").write_text(json.dumps({"command": [HOSTILE], "layout": {HOSTILE: HOSTILE}}))
    hostile = Page(build_report(folder).read_text())
    assert len(hostile.scripts) == 2 and not any(tag == "img" for tag, _ in hostile.tags)


def test_samples_are_bubbles_with_their_verdict(page):
    assert (
        "You are brief." in page.words and "1 of the 3 recorded answers equal their reference." in page.words
    )
    assert page.words.count("✓ exact match") == 1 and page.words.count("✗ differs") == 2
    assert "Four cats sleep." in page.words and "Καλημέρα κόσμε. Τι κάνεις;" in page.words
    bubbles = [
        attributes["class"] for _, attributes in page.tags if attributes.get("class", "").startswith("turn ")
    ]
    # Four answers and prompts, one system turn; a reference only where the answer is not equal to it.
    assert {kind: bubbles.count(f"turn {kind}") for kind in ("user", "other", "model", "reference-text")} == {
        "user": 4, "other": 1, "model": 4, "reference-text": 2,
    }  # fmt: skip


def test_data_configuration_environment_and_events_are_told(page):
    for part in (
        "Rows read 5,000",
        "Rows kept 4,988",
        "Scored tokens 110 k 36.1 %",
        "Filled 95.3 %",
        "chats.jsonl:70",
        "data/chats.jsonl messages 5,000 4,988 12",
        "model.num_moe_experts 8 null",
    ):
        assert part in page.words
    assert "parallel.tensor_model_parallel_size 2 1" in page.words and "optimizer.lr 0.001" not in page.words
    assert "layout tp 2, dp 1" in page.words and "gpus 2 x H" in page.words and "/opt/" not in page.words
    assert "command megalign sft recipe.yaml 'data.train=my rows.jsonl'" in page.words
    assert "step 150 resume from iter_0000150" in page.words


def test_the_page_shows_the_counts_that_the_data_code_writes(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 5 + [{"messages": []}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(tmp_path / "rows.jsonl"), "validation_rows": 0, "max_bad_share": 1, "tokenizer": {"vocab_size": 300}}
    train, _ = build_datasets(Recipe.model_validate({"data": data}))
    folder = make_run(tmp_path / "run", steps=5)
    (folder / "data.json").write_text(json.dumps({"train": train.statistics}))
    words = Page(build_report(folder).read_text()).words
    assert "Rows read 6 Rows kept 5 Unreadable rows 1" in words
    assert "rows.jsonl messages 6 5 1" in words


def test_the_wall_time_says_when_it_counts_from_a_resumption(tmp_path):
    assert "Wall time 12 min 34 s since step 150, where it resumed" in build(tmp_path / "run").words


def test_a_killed_run_is_reported_with_what_there_is(tmp_path):
    folder = make_run(tmp_path / "run", experts=0, finished=False, samples=False)
    os.utime(folder / "metrics.jsonl", (1, 1))
    page = Page(build_report(folder).read_text())
    assert "interrupted" in page.words and "metrics.jsonl: 1 unreadable line left out" in page.words
    assert "Training loss" in page.words and "180 of 300" in page.words and "Parameters" not in page.words
    assert not {"experts", "samples"} & page.ids
    assert "Continue from the last complete checkpoint megalign sft recipe.yaml" in page.words


@pytest.mark.parametrize(
    "keep",
    [{"recipe.yaml"}, {"metrics.jsonl"}, {"metrics.jsonl", "recipe.yaml"}, {"summary.json"}, {"data.json"}],
)
def test_missing_files_leave_gaps_not_errors(tmp_path, keep):
    folder = make_run(tmp_path / "run", steps=3, evals=False)
    for file in folder.iterdir():
        if file.is_file() and file.name not in keep:
            file.unlink()
    assert {"curves", "next", "configuration", "environment", "events"} <= Page(
        build_report(folder).read_text()
    ).ids


@pytest.mark.parametrize(
    "name, text",
    [
        ("summary.json", "[1, 2"),
        ("data.json", '{"train": [1], "validation": null}'),
        ("environment.json", "\x00"),
        ("recipe.yaml", "a: [1\nb: }"),
        ("recipe.yaml", "model: 3\ntrain: null\n"),
        ("samples.jsonl", '{"prompt": "a plain string"}\n{"response": null}\n7\n'),
        (
            "metrics.jsonl",
            '{"kind": "train", "step": "x"}\n{"kind": "train", "step": 1, "expert_load": [[null, 1]]}\n',
        ),
        (
            "metrics.jsonl",
            '{"kind": "train", "step": 1, "loss": "NaN"}\n{"kind": "event"}\n{"kind": "event", "event": "stop"}',
        ),
        ("metrics.jsonl", ""),
    ],
)
def test_damaged_files_are_survived(tmp_path, name, text):
    folder = make_run(tmp_path / "run", steps=3)
    (folder / name).write_text(text)
    assert "curves" in Page(build_report(folder).read_text()).ids


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        build_report(tmp_path)


def test_the_status_follows_summary_events_and_the_clock(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=5, finished=False))
    assert run_status(run, now=run.updated + 1)[0] == "running"
    assert run_status(run, now=run.updated + 3600)[0] == "interrupted"
    run.events.append({"kind": "event", "step": 5, "event": "stop", "message": "the loss is nan"})
    assert run_status(run, now=run.updated + 1) == ("stopped", "the loss is nan")
    run.events.append({"kind": "event", "step": 5, "event": "resume", "message": "from iter_0000005"})
    assert run_status(run, now=run.updated + 1)[0] == "running"
    run.events.pop()
    run.summary = {"status": "finished"}
    assert run_status(run, now=0) == ("finished", "the loss is nan")
    assert "the loss is nan" in Page(render_report(run, now=0)).words


def test_the_summary_of_a_run_that_went_on_is_not_believed(tmp_path):
    folder = make_run(tmp_path / "run", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 21, "loss": 1.0}\n')
    run = read_run(folder)
    assert run.summary == {} and run_status(run, now=run.updated)[0] == "running"


def test_a_large_run_stays_a_small_file_and_quick(tmp_path):
    """48 MoE layers of 128 experts, 4,000 steps."""
    folder = make_run(tmp_path / "run", steps=4000, layers=48, experts=128, hot=0.2)
    started = time.process_time()
    path = build_report(folder)
    assert path.stat().st_size < 300_000 and time.process_time() - started < 5
    assert "heat" in Page(path.read_text()).ids
    assert list(folder.glob("report*")) == [path]
