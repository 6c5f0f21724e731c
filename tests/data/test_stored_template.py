"""Train = serve (D14, V4): a checkpoint's tokenizer folder must be that it was trained with, template included."""

from __future__ import annotations

import pytest

from megalign import serving
from megalign.data.templates import TEMPLATES
from megalign.data.tokenizer import train_tokenizer
from megalign.parallel.checkpoint import CheckpointError


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_checkpoint_is_served_with_its_own_template_or_not_at_all(tmp_path, monkeypatch, name):
    tokenizer = train_tokenizer(["the fox"], 300, name)
    identity = {"tokenizer": tokenizer.hash, "template_hash": TEMPLATES[name].hash}
    monkeypatch.setattr(serving, "read_meta", lambda checkpoint: {"identity": identity})
    tokenizer.save(tmp_path / "tokenizer")
    stored = serving.stored_tokenizer(tmp_path)
    assert (stored.hash, stored.template.hash, stored.end_of_turn) == (tokenizer.hash, TEMPLATES[name].hash, tokenizer.end_of_turn)

    other = train_tokenizer(["the fox"], 300, name)
    other.hf.chat_template = TEMPLATES[name].jinja + " "
    other.save(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="holds another chat template than the checkpoint was trained with"):
        serving.stored_tokenizer(tmp_path)
    train_tokenizer(["the owl and the owl"], 300, name).save(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="holds another tokenizer than the checkpoint was trained with"):
        serving.stored_tokenizer(tmp_path)
