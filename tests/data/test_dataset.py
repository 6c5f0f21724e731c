"""From recipe to packs: every row is accounted for, and what cannot be trained on stops the run with its reason."""

from __future__ import annotations

import json
from itertools import chain, pairwise

import pytest

from megalign.batch import collate
from megalign.config.schema import Recipe
from megalign.data.dataset import build_datasets
from megalign.data.grammar import held_out
from megalign.data.rows import Conversation, DataError
from megalign.data.splits import read_splits


def recipe_for(train, **data):
    values = {
        "train": train if isinstance(train, list) else str(train),
        "validation_rows": 0,
        "sequence_length": 64,
        "tokenizer": {"vocab_size": 300},
    }
    return Recipe.model_validate({"data": values | data})


def chat(user, assistant):
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return json.dumps({"messages": turns})


def write(path, lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def sums_file(tmp_path):
    """20 rows that fit; line 3 is not JSON, line 7 too long for 64 tokens in its only exchange."""
    lines = [chat(f"{n} + 1?", f"It is {n + 1}.") for n in range(20)]
    lines.insert(2, "{")
    lines.insert(6, chat("What?", "long " * 80))
    return write(tmp_path / "sums.jsonl", lines)


def test_every_row_is_accounted_for(sums_file):
    train, validation = build_datasets(recipe_for(sums_file, max_bad_share=0.1, validation_rows=5))
    first, second = train.statistics, validation.statistics
    assert (first["rows_read"], second["rows_read"]) == (17, 5)
    for counts in (first, second, *first["sources"].values()):
        assert counts["rows_read"] == counts["rows_kept"] + counts["bad"] + counts["truncated_away"]
    assert (first["bad"], first["truncated_away"]) == (1, 1)
    rejected = [(row["line"], row["reason"].split(",")[0].split("(")[0].strip()) for row in first["rejected"]]
    assert rejected[0] == (3, "not JSON") and rejected[1][0] == 7 and rejected[1][1].endswith("tokens")
    assert [row.line for row in train.kept] == [n for n in range(1, 18) if n not in (3, 7)]
    assert [row.line for row in validation.kept] == [18, 19, 20, 21, 22]
    assert first["sources"][str(sums_file)]["format"] == "messages"
    examples = list(chain(*train.rows))
    assert len(examples) == first["rows_kept"] and len(train) == first["packs"] == len(train.rows)
    assert first["tokens"] == sum(map(len, examples))
    assert first["scored_tokens"] == sum(int(e.loss_mask.sum()) for e in examples)
    assert first["fill_share"] == first["tokens"] / (64 * first["packs"])
    json.dumps(first)  # goes to data.json


def test_scored_labels_of_a_batch_are_the_assistant_turns(sums_file):
    train, _ = build_datasets(recipe_for(sums_file, max_bad_share=0.1))
    tokenizer = train.tokenizer
    assert max(map(len, train.rows)) > 1  # something was packed
    batch = collate(train.rows, sequence_length=64, pad_id=tokenizer.eod, document_multiple=8)
    bounds = batch.cu_seqlens.tolist()
    replies = []
    for a, b in pairwise(bounds):
        scored = batch.loss_mask[a:b]
        if scored.any():
            replies.append(tokenizer.decode(batch.labels[a:b][scored].tolist()))
    assert sorted(replies) == sorted(f"It is {n + 1}.<|im_end|>" for n in range(20))


def test_packs_are_the_same_for_every_layout_that_can_resume_another(sums_file):
    def built(**parallel):
        recipe = recipe_for(sums_file, max_bad_share=0.1, sequence_length=128)
        recipe = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel)})
        return build_datasets(recipe)[0]

    one = built()
    assert one.statistics["fingerprint"] == built(context_parallel_size=4).statistics["fingerprint"]
    wide = built(context_parallel_size=8)  # 16 parts a document: other packs, and they fit
    assert wide.statistics["fingerprint"] != one.statistics["fingerprint"]
    for dataset, multiple in ((one, 8), (wide, 16)):
        collate(dataset.rows, sequence_length=128, pad_id=0, document_multiple=multiple)


def test_fingerprint_tells_data_apart(tmp_path, sums_file):
    def fingerprint(path, **data):
        return build_datasets(recipe_for(path, max_bad_share=0.1, **data))[0].statistics["fingerprint"]

    assert fingerprint(sums_file) == fingerprint(sums_file)
    assert fingerprint(sums_file) != fingerprint(sums_file, loss_on="all")
    assert fingerprint(sums_file) != fingerprint(sums_file, packing=False)
    other = write(tmp_path / "other.jsonl", [sums_file.read_text().replace("It is 5.", "It is 4.")])
    assert fingerprint(sums_file) != fingerprint(other)


def test_without_packing_each_row_is_alone(sums_file):
    train, _ = build_datasets(recipe_for(sums_file, max_bad_share=0.1, packing=False))
    assert [len(group) for group in train.rows] == [1] * 20


def test_bad_rows_stop_the_run_past_their_share_only(tmp_path):
    lines = [chat("Hi", "Hello")] * 96 + ["{", chat("", "a"), chat("a", ""), '{"messages": 1}']
    path = write(tmp_path / "a.jsonl", lines)
    with pytest.raises(DataError) as error:
        build_datasets(recipe_for(path, max_bad_share=0.039))
    message = str(error.value)
    assert message.startswith("4 of 100 rows are unusable: 4.00%, and data.max_bad_share allows 3.90%")
    assert f"{path}:97: not JSON" in message and f"{path}:99: message 2: 'content' is empty" in message
    # 4 % of the file, though all four lie beside the two rows set apart.
    _, validation = build_datasets(recipe_for(path, max_bad_share=0.04, validation_rows=2))
    assert (validation.statistics["bad"], validation.statistics["rows_kept"]) == (4, 2)


def test_rows_that_the_template_refuses_count_too(tmp_path):
    """A row that reads well and cannot be rendered. One that is only too long does not count."""
    refused = chat("Hi \ufdd0", "Hello")  # the character that parts spelt control tokens
    path = write(tmp_path / "a.jsonl", [chat("Hi", "Hello")] * 46 + [refused, "{", refused, chat("What?", "long " * 80)])
    with pytest.raises(DataError) as error:
        build_datasets(recipe_for(path, max_bad_share=0.059))
    message = str(error.value)
    assert message.startswith("3 of 50 rows are unusable: 6.00%, and data.max_bad_share allows 5.90%")
    assert f"{path}:47: holds one of the noncharacters" in message and f"{path}:48: not JSON" in message and ":50:" not in message
    train, _ = build_datasets(recipe_for(path, max_bad_share=0.06))
    assert (train.statistics["bad"], train.statistics["truncated_away"], train.statistics["rows_kept"]) == (3, 1, 46)
    with pytest.raises(DataError, match="3 of 50 rows are unusable"):
        build_datasets(recipe_for(path, max_bad_share=0.059, streaming=True))


def test_documents_are_cut_not_shortened(tmp_path):
    text = " ".join(f"The fox sees owl number {n}." for n in range(40))
    (tmp_path / "a.txt").write_text(f"{text}\n\nA short one.\n", encoding="utf-8")
    train, _ = build_datasets(recipe_for(tmp_path / "a.txt"))
    whole = [*train.tokenizer.encode(text), train.tokenizer.eod]
    short = [*train.tokenizer.encode("A short one."), train.tokenizer.eod]
    scored = sorted(e.input_ids[e.loss_mask].tolist() for e in chain(*train.rows))
    assert all(sum(map(len, group)) <= 64 for group in train.rows)
    flat = sorted(chain(*scored))
    assert flat == sorted(whole[1:] + short[1:])  # each token but the first of a document is a target once
    counts = train.statistics
    assert (counts["documents_split"], counts["truncated"], counts["rows_kept"]) == (1, 0, 2)


def test_several_files_formats_and_max_rows(tmp_path, sums_file):
    instructions = write(tmp_path / "b.jsonl", ['{"instruction": "Add 1 and 2.", "output": "3"}'] * 4)
    files = [str(sums_file), str(instructions)]
    train, _ = build_datasets(recipe_for(files, max_bad_share=0.1, max_rows=25))
    formats = {source: counts["format"] for source, counts in train.statistics["sources"].items()}
    assert formats == {files[0]: "messages", files[1]: "instruction"}
    assert [c["rows_read"] for c in train.statistics["sources"].values()] == [22, 3]
    train, validation = build_datasets(
        recipe_for(sums_file, max_bad_share=0.1, validation=files[1], max_rows=2)
    )
    assert (train.statistics["rows_read"], validation.statistics["rows_read"]) == (2, 4)


def test_grammar_validates_on_what_training_never_shows():
    recipe = recipe_for("grammar", max_rows=50, validation_rows=7, sequence_length=256)
    train, validation = build_datasets(recipe)
    assert train.statistics["rows_read"] == 50
    assert validation.kept == held_out(7, recipe.train.seed)
    assert all(isinstance(row, Conversation) for row in train.kept)


def test_tokenizer_of_a_folder(tmp_path, sums_file):
    first, _ = build_datasets(recipe_for(sums_file, max_bad_share=0.1))
    first.tokenizer.save(tmp_path / "tokenizer")
    path = str(tmp_path / "tokenizer")
    again, _ = build_datasets(recipe_for(sums_file, max_bad_share=0.1, tokenizer={"path": path}))
    assert again.tokenizer.hash == first.tokenizer.hash
    assert again.statistics["fingerprint"] == first.statistics["fingerprint"]
    by_model = recipe_for(sums_file, max_bad_share=0.1)
    by_model.model.init_from = path
    assert build_datasets(by_model)[0].tokenizer.hash == first.tokenizer.hash
    other = recipe_for(sums_file, max_bad_share=0.1, tokenizer={"vocab_size": 262})
    assert build_datasets(other)[0].tokenizer.hash != first.tokenizer.hash


def test_data_that_cannot_be_trained_on(tmp_path, sums_file):
    with pytest.raises(DataError, match=r"data file 'nowhere.jsonl' does not exist"):
        build_datasets(recipe_for("nowhere.jsonl"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="empty.txt: the file holds no rows"):
        build_datasets(recipe_for(tmp_path / "empty.txt"))
    with pytest.raises(
        DataError, match="validation_rows is 21, but data.train has 21 readable rows: none would be left"
    ):
        read_splits(recipe_for(sums_file, max_bad_share=0.1, validation_rows=21))
    with pytest.raises(
        DataError,
        match=r"(?s)data.train: no token is scored; of 22 rows 1 are unusable and 21 longer.*jsonl:1: ",
    ):
        build_datasets(recipe_for(sums_file, max_bad_share=0.1, sequence_length=8))


def test_real_rows(shared_data):
    recipe = recipe_for(
        shared_data / "roleplay/roleplay.json", sequence_length=512, validation_rows=100, max_rows=400
    )
    recipe.data.tokenizer.vocab_size = 1500
    train, validation = build_datasets(recipe)
    counts = train.statistics
    assert (counts["rows_read"], counts["bad"], validation.statistics["rows_read"]) == (300, 0, 100)
    assert len(train) < 0.8 * counts["rows_kept"]
    for group in train.rows:
        assert sum(map(len, group)) <= 512
