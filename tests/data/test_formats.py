"""Files to rows: kinds of file, formats, lines, and rows that cannot be used (D1's rule: never fatal, never silent)."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalign.data.formats import detect, read_rows
from megalign.data.rows import BadRow, Conversation, DataError, Message, TextRow

HI = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
HI_ROW = (Message("user", "Hi"), Message("assistant", "Hello"))


def write(path, content):
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def chat(*turns):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL", "lines.json"])
def test_json_lines(tmp_path, name):
    lines = ["", json.dumps(HI), "   ", json.dumps(HI), ""]
    path = write(tmp_path / name, "\ufeff" + "\r\n".join(lines))
    assert detect(path) == "messages"
    assert list(read_rows(path)) == [Conversation(HI_ROW, str(path), 2), Conversation(HI_ROW, str(path), 4)]


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize(("indent", "lines"), [(None, [1, 1, 1]), (1, [2, 14, 26])])
def test_json_array_keeps_lines(tmp_path, name, indent, lines):
    path = write(tmp_path / name, json.dumps([HI, HI, HI], indent=indent))
    assert list(read_rows(path)) == [Conversation(HI_ROW, str(path), line) for line in lines]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_file_is_cut_at_blank_lines(tmp_path, name):
    path = write(tmp_path / name, "\n\n one\ntwo\n \n\nthree")
    assert detect(path) == "text"
    assert list(read_rows(path)) == [TextRow(" one\ntwo", str(path), 3), TextRow("three", str(path), 7)]


def test_text_in_json_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one\\n\\ntwo", "url": "x"}')
    assert list(read_rows(path)) == [TextRow("one\n\ntwo", str(path), 1)]


@pytest.mark.parametrize("answer", ["response", "output"])
@pytest.mark.parametrize(
    ("extra", "user"),
    [({}, "Add."), ({"input": ""}, "Add."), ({"input": None}, "Add."), ({"input": "1 2"}, "Add.\n\n1 2")],
)
def test_instruction(tmp_path, answer, extra, user):
    path = write(
        tmp_path / "a.jsonl", json.dumps({"instruction": "Add.", answer: "3", "text": "all of it", **extra})
    )
    assert detect(path) == "instruction"
    (row,) = read_rows(path)
    assert isinstance(row, Conversation)
    assert row.messages == (Message("user", user), Message("assistant", "3"))


BAD = {
    "{": "not JSON",
    "[" * 100_000: "not JSON",
    "1" * 5000: "not JSON",
    "[1]": "not a JSON object but list",
    '{"text": "x"}': "key 'messages' is missing",
    '{"messages": null}': "key 'messages' is missing",
    '{"messages": {}}': "'messages' is not a list",
    '{"messages": []}': "no assistant turn",
    '{"messages": ["Hi"]}': "message 1: not an object but str",
    '{"messages": [{"content": "Hi"}]}': "message 1: unknown role None",
    chat(("critic", "Hi")): "message 1: unknown role 'critic'; known: system, user, assistant, tool",
    chat(("tool", "Hi")): "message 1: role is 'tool' where 'user' is due",
    chat(("user", "Hi"), ("tool", "Hi")): "message 2: role is 'tool' where 'assistant' is due",
    chat(([], "Hi")): "message 1: unknown role []",
    '{"messages": [{"role": "user"}]}': "message 1: key 'content' is missing",
    chat(("user", None)): "message 1: 'content' is null",
    chat(("user", ["Hi"])): "message 1: 'content' is not a string but list",
    chat(("user", [{"type": "image_url"}])): "message 1: 'content' is not a string but list",
    chat(("user", " \n")): "message 1: 'content' is empty",
    chat(("user", "Hi"), ("assistant", "half an emoji \ud83d")): "message 2: 'content' is not valid UTF-8",
    chat(("user", "Hi")): "no assistant turn",
    chat(("system", "Be kind.")): "no assistant turn",
    chat(("assistant", "Hi"), ("user", "Hi")): "message 1: role is 'assistant' where 'user' is due",
    chat(
        ("user", "Hi"), ("assistant", "A"), ("assistant", "B")
    ): "message 3: role is 'assistant' where 'user' is due",
    chat(("user", "Hi"), ("user", "Hi")): "message 2: role is 'user' where 'assistant' is due",
    chat(
        ("user", "Hi"), ("assistant", "A"), ("system", "B")
    ): "message 3: role is 'system' where 'user' is due",
    json.dumps(HI | {"tools": [{}]}): "a tool has no 'name'",
    json.dumps(HI | {"tools": "["}): "'tools' is not JSON",
    '{"messages": [{"role": "user", "content": "a", "weight": 2}]}': "message 1: 'weight' is 2",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=range(len(BAD)))
def test_bad_rows_say_why(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", "\n".join([json.dumps(HI), line, json.dumps(HI)]))
    good, bad, also_good = read_rows(path)
    assert isinstance(good, Conversation) and isinstance(also_good, Conversation)
    assert isinstance(bad, BadRow)
    assert (bad.source, bad.line) == (str(path), 2)
    assert reason in bad.reason and len(bad.reason) < 120


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Add."}, "needs one of the keys 'response' and 'output', has 0"),
        ({"instruction": "Add.", "response": "3", "output": "4"}, "needs one of the keys"),
        ({"response": "3"}, "key 'instruction' is missing"),
        ({"instruction": "Add.", "input": 3, "output": "4"}, "'input' is not a string but int"),
        ({"instruction": "Add.", "output": ""}, "'output' is empty"),
        ({"instruction": "Add.", "output": "3", "history": [["a"]]}, "'history' is not a list of"),
        ({"instruction": "Add.", "output": "3", "history": [["a", ""]]}, "exchange 1 of 'history': 'text' is empty"),
        ({"instruction": "Add.", "output": "3", "system": 3}, "'system' is not a string but int"),
    ],
)
def test_bad_instructions(tmp_path, row, reason):
    (bad,) = read_rows(write(tmp_path / "a.jsonl", json.dumps(row)), "instruction")
    assert isinstance(bad, BadRow) and reason in bad.reason


def test_harmless_keys_are_harmless(tmp_path):
    turns = [
        {"role": "user", "content": "Hi", "name": "Bo", "tool_calls": []},
        {**HI["messages"][1], "weight": 1},
    ]
    (row,) = read_rows(write(tmp_path / "a.jsonl", json.dumps({"messages": turns, "tools": [], "id": 3})))
    assert isinstance(row, Conversation) and row.messages == HI_ROW


@pytest.mark.parametrize("array", [False, True])
def test_bytes_that_are_not_utf8_spoil_one_row(tmp_path, array):
    good, bad = json.dumps(HI).encode(), json.dumps(HI).encode().replace(b"Hello", b"Hel\xfflo")
    raw = b"[" + good + b",\n" + bad + b",\n" + good + b"]" if array else b"\n".join([good, bad, good])
    path = write(tmp_path / ("a.json" if array else "a.jsonl"), raw)
    kept, spoilt, kept_too = read_rows(path)
    assert isinstance(kept, Conversation) and isinstance(kept_too, Conversation)
    assert spoilt == BadRow(str(path), 2, "message 2: 'content' is not valid UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "a,b", "unknown kind of file; known: .jsonl, .json, .txt, .csv, .parquet, .arrow"),
        ("a.parquet.gz", "", "unknown kind of file"),
        ("a.gz", "{}", "unknown kind of file"),
        (
            "a.jsonl",
            '{"q": "a", "a": "b"}',
            r"keys of the first object: \['q', 'a'\]; formats: messages, ",
        ),
        ("a.jsonl", "", "the file holds no rows"),
        ("a.json", "[]", "the file holds no rows"),
        ("a.jsonl", "\nnot json {", "a.jsonl:2: not JSON .*; no row of the file is a JSON object"),
        ("a.json", "[1, 2]", "a.json:1: not a JSON object but int; no row"),
        ("a.json", '[\n{"text": "a"},\n{"text": }]', r"a.json:3: the JSON array is broken here"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', "a.json:1: the JSON array is broken after this row"),
        ("a.json", '[{"text": "a"}', "a.json:1: the JSON array is broken after this row"),
        ("a.json", '[{"text": "a"}][{"text": "b"}]', r"""ends, but '\[\{"text": "b"\}\]' follows"""),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_cut_gzip_is_an_error(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", (json.dumps(HI) + "\n") * 10_000).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / "a.jsonl.gz"))


def test_missing_file_and_wrong_override(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="holds text, but data.format is 'messages'"):
        list(read_rows(write(tmp_path / "a.txt", "a"), "messages"))


TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.none() | st.text(max_size=3),
    }
)
ROW = st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)}).map(json.dumps).map(str.encode)
LINE = st.one_of(ROW, st.binary(max_size=40), st.just(json.dumps(HI).encode()))


@given(st.lists(LINE, max_size=8).map(b"\n".join))
def test_fuzzed_lines_are_kept_or_reported(tmp_path_factory, raw):
    path = write(tmp_path_factory.mktemp("fuzz") / "a.jsonl", raw)
    numbers = [
        n for n, line in enumerate(raw.split(b"\n"), 1) if line.decode("utf-8", "surrogateescape").strip()
    ]
    rows = list(read_rows(path, "messages"))
    bom = {1} if raw.startswith("\ufeff".encode()) else set()
    assert {row.line for row in rows} | bom == set(
        numbers
    ) | bom  # in = kept + reported, each with its own line
    for row in rows:
        if isinstance(row, Conversation):
            json.dumps(
                [m.content for m in row.messages], ensure_ascii=False
            ).encode()  # all of it valid Unicode
            assert any(m.role == "assistant" for m in row.messages)


def test_real_files(shared_data):
    for name, answer, count in (
        ("roleplay/roleplay", "response", 1600),
        ("demo_formats/alpaca_en_demo", "output", 999),
    ):
        raw = json.loads((shared_data / f"{name}.json").read_text(encoding="utf-8"))
        rows = list(read_rows(shared_data / f"{name}.json"))
        assert len(rows) == len(raw) == count
        for row, value in zip(rows, raw):
            assert isinstance(row, Conversation)
            user = value["instruction"] + ("\n\n" + value["input"] if value["input"] else "")
            assert row.messages == (Message("user", user), Message("assistant", value[answer]))
