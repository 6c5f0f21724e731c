"""SentencePiece models (BPE or unigram) as Hugging Face tokenizers.

    text -> the model's normalisation (NFKC or none) -> spaces as "▁", one before the text -> pieces

A piece that the model does not hold falls back to its bytes where the model has byte pieces, else to <unk>. A
SentencePiece model knows no chats; in one, only the beginning of the whole string gets the "▁" before it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megalign.data.rows import DataError

SPACE = "▁"
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NEVER = -1e4  # log-probability
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece.Type


def read_model(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a .model file, with the chat template of the folder if there is one.

    Raises DataError for a file that is no model, or a word or character model.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 (made when the module is imported)
    try:
        model.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise DataError(f"{file}: no SentencePiece model ({error})") from None
    if not model.pieces or model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise DataError(f"{file}: no SentencePiece model of type bpe or unigram")
    pieces, spec = model.pieces, model.trainer_spec
    backend = tokenizers.Tokenizer(_model(pieces, spec))
    _set_pipeline(backend, model.normalizer_spec)
    special = (UNKNOWN, CONTROL)
    added = [piece for piece in pieces if piece.type in (*special, USER_DEFINED)]
    backend.add_tokens([AddedToken(p.piece, special=p.type in special, normalized=False) for p in added])
    named = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "pad_token": spec.pad_id, "unk_token": spec.unk_id}
    texts = {name: pieces[token].piece for name, token in named.items() if 0 <= token < len(pieces)}
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **texts)
    hf.chat_template = _chat_template(file.parent)
    return hf


def _model(pieces: Any, spec: Any) -> Any:
    if spec.model_type == UNIGRAM:
        # The library never finds control pieces in text; here a score that loses against any other spelling.
        hidden = (UNKNOWN, CONTROL)
        scores = [(piece.piece, NEVER if piece.type in hidden else piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    ids = {piece.piece: number for number, piece in enumerate(pieces)}
    unknown = pieces[spec.unk_id].piece
    return models.BPE(vocab=ids, merges=_merges(pieces, ids), unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _merges(pieces: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: every way to cut a piece in two is a merge."""
    ranked = []
    for piece in pieces:
        text = piece.piece
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            continue
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        ranked += [(-piece.score, ids[a], ids[b], (a, b)) for a, b in known]
    return [merge for *_, merge in sorted(ranked)]


def _set_pipeline(backend: tokenizers.Tokenizer, spec: Any) -> None:
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        # Space at the beginning of a piece stays: there it may be the one between a control token and a word.
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    scheme = "first" if spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    back += [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(back)  # type: ignore[assignment]


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None
