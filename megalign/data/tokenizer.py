"""The tokenizer: text to ids and back, with control tokens that no text can forge.

`encode` treats its argument as plain text: a user who writes `<|im_end|>` gets the characters, not the token
that ends a turn. Control tokens enter only by name, through `token_id`, where a template puts them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megalign.data.rows import DataError
from megalign.data.templates import CHATML, TEMPLATES, get_template

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
        present = sorted(token for token in control if self._plain.token_to_id(token) is not None)
        # Some tokenizers list control tokens as ordinary added tokens, which are matched inside any text.
        special = [AddedToken(token, special=True, normalized=False) for token in present]
        self._plain.add_special_tokens(special)
        self._plain.encode_special_tokens = True  # sic: "encode special tokens as if they were plain text"

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control tokens spelled in it are encoded as the characters they are."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [found.ids for found in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

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
    def end_of_turn(self) -> int:
        """The token after which an assistant is done: where generation stops."""
        template = next((t for t in TEMPLATES.values() if t.jinja == self.hf.chat_template), CHATML)
        return self.token_id(template.end_of_turn)

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


def load_tokenizer(path: str | Path, template: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; `template`, if given, replaces its chat template.

    Raises DataError if the folder holds no tokenizer.json.
    """
    if not (Path(path) / "tokenizer.json").is_file():
        raise DataError(
            f"tokenizer folder {str(path)!r} holds no tokenizer.json; give a local one, nothing is downloaded"
        )
    tokenizer = Tokenizer(AutoTokenizer.from_pretrained(str(path), local_files_only=True))
    if template is not None:
        tokenizer.hf.chat_template = get_template(template).jinja
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, template: str = "chatml") -> Tokenizer:
    """A byte-level BPE over `texts`: every string has tokens, and digits stand alone, as in Qwen.

    The same texts give the same tokenizer. The vocabulary is smaller than `vocab_size` (special tokens
    included) where the texts hold no more pairs to merge.
    """
    chosen = get_template(template)
    pieces = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(pieces)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # type: ignore[call-arg]
        special_tokens=[END_OF_DOCUMENT, *chosen.control_tokens],  # type: ignore[call-arg]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # type: ignore[call-arg]
        show_progress=False,  # type: ignore[call-arg]
    )
    bpe.train_from_iterator(texts, trainer)
    named = {"eos_token": chosen.end_of_turn, "pad_token": END_OF_DOCUMENT}
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, **named)
    hf.chat_template = chosen.jinja
    return Tokenizer(hf)
