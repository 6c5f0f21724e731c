"""The tokenizer: text to ids and back, with control tokens that no text can forge.

`encode` treats its argument as plain text: a user who writes `<|im_end|>` gets the characters, not the token
that ends a turn. Control tokens enter only by name, through `token_id`, where a template puts them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalign.data.rendering import render
from megalign.data.rows import Conversation, DataError, Message, Unusable
from megalign.data.sentencepiece import read_model
from megalign.data.templates import CHATML, TEMPLATES, Template, chat_template_of, get_template

END_OF_DOCUMENT = "<|endoftext|>"


class Tokenizer:
    """A Hugging Face fast tokenizer (`hf`) behind the few calls that training needs."""

    def __init__(self, hf: PreTrainedTokenizerFast):
        self.hf = hf
        backend = hf.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        self.hash = hashlib.sha256(
            backend.to_str(pretty=True).encode()
        ).hexdigest()  # of tokenizer.json as saved
        # A copy of our own: transformers flips `encode_special_tokens` on the original at every call.
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        control = {token for template in TEMPLATES.values() for token in template.control_tokens}
        control |= {END_OF_DOCUMENT, *hf.all_special_tokens}
        control |= {token.content for token in self._plain.get_added_tokens_decoder().values() if token.special}
        self.control_tokens = tuple(sorted(t for t in control if self._plain.token_to_id(t) is not None))
        # Some tokenizers list control tokens as ordinary added tokens, which are matched inside any text.
        special = [AddedToken(token, special=True, normalized=False) for token in self.control_tokens]
        self._plain.add_special_tokens(special)
        self._control_ids = {self._plain.token_to_id(token) for token in self.control_tokens} - {cast("int | None", hf.unk_token_id)}
        self._spelled = re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=lambda t: -len(t)))) or r"(?!)")
        inside, self.prefix_after_control = without_prefix_space(json.loads(self._plain.to_str()))
        self._inside = tokenizers.Tokenizer.from_str(json.dumps(inside))
        for each in (self._plain, self._inside):
            each.encode_special_tokens = True  # sic: "encode special tokens as if they were plain text"

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Ids of plain text; control tokens spelled in it are encoded as the characters they are.

        continued: the text goes on where another ended: SentencePiece's space before a string is left out.
        """
        return self.encode_batch([text], continued)[0]

    def encode_batch(self, texts: Sequence[str], continued: bool = False) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        backend = self._inside if continued else self._plain
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        return [
            ids if self._control_ids.isdisjoint(ids) else self._without_forgery(text, ids, continued)
            for text, ids in zip(texts, found)
        ]

    def _without_forgery(self, text: str, ids: list[int], continued: bool) -> list[int]:
        """A unigram model may find a control token where it knows no letter of it: tokenise its first letter apart."""
        cuts = [0, *(found.start() + 1 for found in self._spelled.finditer(text)), len(text)]
        if len(cuts) == 2 or len(text) == 1:
            return ids
        parts = [text[start:end] for start, end in zip(cuts, cuts[1:])]
        return [i for n, part in enumerate(parts) for i in self.encode(part, continued or n > 0)]

    def decode(self, ids: Iterable[int], skip_control: bool = False) -> str:
        """Text of the ids; control tokens are spelled out unless `skip_control`."""
        return self._plain.decode([int(i) for i in ids], skip_special_tokens=skip_control)

    def token_id(self, token: str) -> int:
        """Id of a control token; DataError if the vocabulary has none."""
        found = self._plain.token_to_id(token)
        if found is None:
            raise DataError(
                f"data.tokenizer: the vocabulary has no token {token!r}, which data.template needs; "
                "use a tokenizer that has it, or leave data.tokenizer.path empty to train one"
            )
        return found

    def token_text(self, token: int) -> str:
        """How a token is spelled in the vocabulary."""
        return str(self._plain.id_to_token(token))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included (a vocabulary may have holes)."""
        return max(self.hf.get_vocab().values()) + 1

    @cached_property
    def eod(self) -> int:
        """End of document: `<|endoftext|>` where there is one, else the tokenizer's own end token."""
        if self._plain.token_to_id(END_OF_DOCUMENT) is None and self.hf.eos_token is not None:
            return self.token_id(str(self.hf.eos_token))
        return self.token_id(END_OF_DOCUMENT)

    @property
    def template(self) -> Template:
        """The chat template that it carries; ChatML where it has none."""
        return get_template("tokenizer" if chat_template_of(self.hf) is not None else CHATML.name, self.hf)

    @cached_property
    def end_of_turn(self) -> int:
        """The token after which an assistant is done: where generation stops. `eod` where the template has none."""
        for messages in ((Message("user", "Hi"), Message("assistant", "Hi")), (Message("user", "Hi"), Message("assistant", "Hi")) * 2):
            try:
                segments = render(Conversation(messages), self.template, loss_on="completion", control_tokens=self.control_tokens)
            except Unusable:
                continue
            scored = [segment for segment in segments if segment.scored]
            if scored and scored[-1].control:
                return self.token_id(scored[-1].text)
        return self.eod

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, its configuration and the chat template, for `transformers.AutoTokenizer`."""
        self.hf.backend_tokenizer.no_padding()  # transformers leaves the options of its last call there
        self.hf.backend_tokenizer.no_truncation()
        self.hf.save_pretrained(str(folder))
        config = Path(folder) / "tokenizer_config.json"
        values = json.loads(config.read_text(encoding="utf-8"))
        if values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
            config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(path: str | Path, template: str | None = None, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, or of a SentencePiece model (a .model file, or a folder with one).

    template, if given, replaces its chat template; special_tokens are added where the vocabulary lacks them.
    Raises DataError if there is none.
    """
    path = Path(path)
    if (path / "tokenizer.json").is_file():
        hf = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    elif model := next((file for file in (path, *sorted(path.glob("*.model"))) if file.is_file()), None):
        hf = read_model(model)
    else:
        raise DataError(
            f"tokenizer folder {str(path)!r} holds no tokenizer.json and no SentencePiece .model; give a local one, "
            "nothing is downloaded"
        )
    add_tags(hf, special_tokens)
    if template is not None:
        hf.chat_template = get_template(template, hf).jinja
    return Tokenizer(hf)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, template: str = "chatml", special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """A byte-level BPE over `texts`: every string has tokens, and digits stand alone, as in Qwen.

    The same texts give the same tokenizer. The vocabulary is smaller than `vocab_size` (special tokens
    included) where the texts hold no more pairs to merge. special_tokens: see `add_tags`.
    """
    chosen = get_template(template)
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if _ends_in_blank_line(chosen):
        # Else the last newline before a reply would belong to the reply's word, if that is tokenised with it.
        pieces.insert(0, pre_tokenizers.Split(tokenizers.Regex("[\r\n]+"), "isolated"))
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(pieces)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),  # type: ignore[call-arg]
        special_tokens=[END_OF_DOCUMENT, *chosen.control_tokens],  # type: ignore[call-arg]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    tag = re.compile("|".join(map(re.escape, sorted(special_tokens, key=len, reverse=True))) or r"(?!)")
    bpe.train_from_iterator((part for text in texts for part in tag.split(text)), trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=END_OF_DOCUMENT)
    named = {name: token for name, token in chosen.special.items() if token in chosen.control_tokens}
    for name, token in named.items():
        setattr(hf, name, token)
    add_tags(hf, special_tokens)
    hf.chat_template = chosen.jinja
    if hf.eos_token is None:
        hf.eos_token = Tokenizer(hf).token_text(Tokenizer(hf).end_of_turn)
    return Tokenizer(hf)


def _ends_in_blank_line(template: Template) -> bool:
    """Whether the prompt of the template, as Llama 3's, ends in more than one newline."""
    try:
        return render(Conversation((Message("user", "Hi"),)), template, add_generation_prompt=True)[-1].text.endswith("\n\n")
    except Unusable:
        return False


def add_tags(hf: PreTrainedTokenizerFast, tags: Sequence[str]) -> None:
    """Make each tag (`<think>`, `<tool_call>`) a single id, as Qwen does: found in any text, and never hidden.

    They are part of what a model writes, unlike control tokens, which only a template writes.
    """
    new: Any = [AddedToken(tag, special=False, normalized=False) for tag in tags if hf.convert_tokens_to_ids(tag) in (None, hf.unk_token_id)]
    hf.add_tokens(new)


def without_prefix_space(backend: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """A tokenizer.json that puts no space before a text, and whether the given one does so after a control token too."""
    after_control = False

    def strip(part: Any) -> Any:
        nonlocal after_control
        if isinstance(part, list):
            return [strip(each) for each in part if not (isinstance(each, dict) and each.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never":
            after_control |= part.get("prepend_scheme") == "always"
            return {**part, "prepend_scheme": "never"}
        if part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
            after_control = True
            return {**part, "add_prefix_space": False}
        return {key: strip(value) for key, value in part.items()}

    after_control = '"Prepend"' in json.dumps(backend["normalizer"])
    normalizer = backend["normalizer"]
    alone = isinstance(normalizer, dict) and normalizer.get("type") == "Prepend"
    changed = {"normalizer": None if alone else strip(normalizer), "pre_tokenizer": strip(backend["pre_tokenizer"])}
    return {**backend, **changed}, after_control
