"""Parquet, Arrow, CSV and saved data sets give the rows that JSON lines give; broken ones say what is wrong."""

from __future__ import annotations

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalign.data import files
from megalign.data.files import values
from megalign.data.formats import FORMATS, announcement, detect, for_training, read_records, read_rows
from megalign.data.kinds import is_data
from megalign.data.rows import BadRow, Conversation, DataError, Message, PreferencePair

HI = [{"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Grüße 🙂"}]} for n in range(2500)]
WANTED = [(Message("user", f"Hi {n}"), Message("assistant", "Grüße 🙂")) for n in range(2500)]


def table(rows=HI):
    return pyarrow.Table.from_pylist(rows)


def stream(path, rows=HI):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table(rows).schema) as writer:
        writer.write_table(table(rows), max_chunksize=700)
    return path


def saved(folder, rows=HI):
    """As `datasets` saves: two files, and a state that names them in order."""
    stream(folder / "data-00000-of-00002.arrow", rows[:1000])
    stream(folder / "data-00001-of-00002.arrow", rows[1000:])
    names = [{"filename": f"data-0000{n}-of-00002.arrow"} for n in (0, 1)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))
    return folder


def messages(path):
    rows = list(read_rows(path))
    assert [row.line for row in rows] == list(range(1, len(rows) + 1))
    assert all(isinstance(row, Conversation) for row in rows)
    return [row.messages for row in rows if isinstance(row, Conversation)]


def test_columnar_files(tmp_path):
    pyarrow.parquet.write_table(table(), tmp_path / "a.parquet", row_group_size=300)
    with pyarrow.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=700)
    for path in (tmp_path / "a.parquet", tmp_path / "file.arrow", stream(tmp_path / "stream.arrow")):
        assert detect(path) == "messages" and messages(path) == WANTED


def test_saved_data_sets(tmp_path):
    assert messages(saved(tmp_path / "plain")) == WANTED
    saved(tmp_path / "split/train")
    saved(tmp_path / "split/test", HI[:1500])
    (tmp_path / "split/dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert messages(tmp_path / "split") == WANTED
    assert messages(tmp_path / "split/test") == WANTED[:1500]
    (tmp_path / "split/dataset_dict.json").write_text('{"splits": ["test", "dev"]}')
    with pytest.raises(DataError, match="holds the splits test, dev; name one, e.g. .*split/test"):
        list(values(tmp_path / "split"))


def test_a_struct_of_lists_is_a_list_of_structs(tmp_path):
    columns = {"messages": {"role": ["user", "assistant"], "content": ["Hi 0", "Grüße 🙂"]}}
    pyarrow.parquet.write_table(table([columns]), tmp_path / "a.parquet")
    assert messages(tmp_path / "a.parquet") == WANTED[:1]


def test_a_cell_that_is_not_utf8_spoils_its_row_alone(tmp_path):
    raw = pyarrow.array([b"one", b"\xff\xfe", b"three"]).cast(pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.utf8(), 3, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    one, two, three = read_rows(tmp_path / "a.parquet")
    assert not isinstance(one, BadRow) and not isinstance(three, BadRow)
    assert isinstance(two, BadRow) and two.line == 2 and "cannot be decoded" in two.reason


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["a,\nb", 'say "x"'], ["short"], ["c", "d"]])
    one, two, three = read_rows(path)
    assert isinstance(one, Conversation) and [m.content for m in one.messages] == ["a,\nb", 'say "x"']
    assert two == BadRow(str(path), 2, "has 1 cells, but there are 2 columns")
    assert isinstance(three, Conversation) and three.line == 3
    path.write_text('prompt,completion\n"a"b,c\n')
    with pytest.raises(DataError, match=r"a.csv:2: the CSV file is broken here"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_broken_columnar_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing like it")
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        list(read_rows(tmp_path / name, "text"))
    whole = tmp_path / ("whole" + name[1:])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table(), whole)
    else:
        stream(whole)
    (tmp_path / name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        list(read_rows(tmp_path / name, "messages"))


def hub(folder, **files):
    """A data set as the hub stores it; `train_00` is data/train-00000.parquet."""
    for name, rows in files.items():
        path = folder / "data" / f"{name.replace('_', '-')}000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table(rows), path)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "train.jsonl").write_text("{}")
    return folder


def test_data_sets_of_the_hub(tmp_path):
    folder = hub(tmp_path / "a", test_00=HI[:5], train_01=HI[1000:], train_00=HI[:1000])
    assert is_data(folder) and detect(folder) == "messages" and messages(folder) == WANTED
    folder = hub(tmp_path / "b", validation_00=HI[:7])
    assert messages(folder) == WANTED[:7]  # the only one
    hub(tmp_path / "c", validation_00=HI[:7], test_00=HI[:5])
    with pytest.raises(DataError, match=r"holds the splits test, validation; name the files of one, e.g. .*test-00000.parquet"):
        list(values(tmp_path / "c"))
    (tmp_path / "d" / "en").mkdir(parents=True)
    (tmp_path / "d" / "contrain.jsonl").write_text(json.dumps(HI[0]))  # a word that only contains a split's name
    (tmp_path / "d" / "en" / "dev.jsonl").write_text(json.dumps(HI[1]))
    assert messages(tmp_path / "d") == WANTED[:1]
    (tmp_path / "d" / "en" / "train.jsonl").write_text(json.dumps(HI[2]))
    with pytest.raises(DataError, match=r"holds several data sets, in ., en; name one"):
        list(values(tmp_path / "d"))
    (tmp_path / "d" / "en" / "training.csv").write_text("text\na")
    with pytest.raises(DataError, match=r"holds files of several kinds \(.csv, .jsonl\)"):
        list(values(tmp_path / "d" / "en"))
    assert not is_data(tmp_path / "a" / ".cache" / "nothing")


def test_a_folder_that_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match="it has no state.json or dataset_dict.json"):
        list(read_rows(tmp_path))
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(DataError, match="the folder's JSON is broken"):
        list(read_rows(tmp_path))


def test_a_format_that_is_named_overrides_what_the_file_tells(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "plain", "prompt": "Hi", "chosen": "a", "rejected": "b"}))
    (row,) = read_records(path)
    assert isinstance(row, PreferencePair)
    (row,) = read_records(path, "text")
    assert not isinstance(row, (PreferencePair, BadRow))
    with pytest.raises(DataError, match="data.format is 'nonsense'; known: auto, messages"):
        list(read_records(path, "nonsense"))


KEYS = st.sampled_from(
    "messages conversations role from content value tool_calls tools name arguments function weight instruction input output response history "
    "system prompt completion completions chosen rejected context rank label output_1 output_2 preference helpfulness preference_strength "
    "response_1 response_2 overall_score annotations question answer query answers turns test entry_point canonical_solution text "
    "system_prompt prompt_template score_chosen parameters properties type".split()
)  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "human", "gpt", "system", "tool", "function_call", "\n\nHuman: a\n\nAssistant: b", "a #### 3", "[]", "{", "<tool_call>{}</tool_call>",
     "<tools>[{}]</tools>", "\ud800", "", "#### "]
) | st.text(max_size=6)  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=True) | WORDS
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12)


@given(rows=st.lists(st.dictionaries(KEYS, ANYTHING, max_size=6) | ANYTHING, max_size=4))
def test_fuzzed_rows_in_every_format_are_kept_or_reported(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for format in FORMATS:
        read = list(read_records(path, format))
        assert [row.line for row in read] == list(range(1, len(rows) + 1))  # in = kept + bad, each with its line
        for row in map(for_training, read):
            if isinstance(row, BadRow):
                assert row.reason and row.source == str(path)
            elif isinstance(row, Conversation):
                assert any(m.role == "assistant" for m in row.messages)
                json.dumps([m.content for m in row.messages], ensure_ascii=False).encode()  # all of it valid Unicode


def test_names_of_the_formats_are_the_same_everywhere():
    from typing import get_args

    from megalign.config.schema import Format

    assert set(get_args(Format)) == {"auto", *FORMATS}
    assert all(announcement("a", name).startswith(f"a: format {name}") for name in FORMATS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(rows=st.lists(json_values, max_size=6), chunk=st.integers(1, 40), ascii=st.booleans(), indent=st.sampled_from([None, 0, 2]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_array_is_read_in_pieces_as_it_is_read_whole(tmp_path, monkeypatch, rows, chunk, ascii, indent):
    """Cut anywhere: in a number, a word, an escape, a character of several bytes. The oracle is json.loads."""
    monkeypatch.setattr(files, "CHUNK", chunk)
    text = json.dumps(rows, ensure_ascii=ascii, indent=indent)
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = list(values(path))
    assert repr([value for _, value in found]) == repr(json.loads(path.read_bytes().decode("utf-8", "surrogateescape")))
    lines = [line for line, _ in found]
    assert lines == sorted(lines) and all(1 <= line <= 1 + text.count("\n") for line in lines)


def test_lines_of_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 3)
    (tmp_path / "a.json").write_text('\ufeff\n[\n{"text":\n"a"}, 7\n,\n\n{"text": "b"}\n]\n', encoding="utf-8")
    assert list(values(tmp_path / "a.json")) == [(3, {"text": "a"}), (4, 7), (7, {"text": "b"})]


def test_memory_holds_a_chunk_of_an_array(tmp_path):
    """24 MB of rows, gzipped too, at a peak of a few chunks of 1 MB."""
    import gzip
    import tracemalloc

    row = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]})
    text = "[" + ",\n".join([row] * 8000) + "]"
    assert len(text) > 24e6
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(text.encode(), 1))
    del text
    for name in ("a.json", "b.json.gz"):
        tracemalloc.start()
        assert sum(1 for _ in values(tmp_path / name)) == 8000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * files.CHUNK, (name, peak)


def test_an_endless_string_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    monkeypatch.setattr(files, "LONGEST_ROW", 1000)
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{"text": "' + "x" * 100_000)
    with pytest.raises(DataError, match=r"a.json:2: the JSON array is broken here \(no end of this element within 1,000 characters\)"):
        list(values(tmp_path / "a.json"))
