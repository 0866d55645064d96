"""Text in and out of tokens: tokenizer, chat template, incremental detokenization, stop strings. No torch.

Detokenization works on bytes: every token stands for a fixed byte string, so the text of a growing answer is its bytes
through an incremental UTF-8 decoder. A character split over tokens comes out once, whole, with the token that ends it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HfTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCE_SPACE = "▁"


class BadTokenizer(Exception):
    """Tokenizer files that cannot be used: where (file and field), what was found, what is allowed, what to do."""

    exit_code: ClassVar[int] = 2

    def __init__(self, where: str, found: object, allowed: str, todo: str = "correct the model folder") -> None:
        super().__init__(where, found, allowed, todo)
        self.where, self.found, self.allowed, self.todo = where, found, allowed, todo

    def __str__(self) -> str:
        return f"{self.where}: found {str(self.found)[:80]}; allowed: {self.allowed}; {self.todo}"


class BadMessages(ValueError):
    """Chat messages that the model's template refuses, or that it cannot render."""


class Tokenizer:
    """A Hugging Face `tokenizer.json`.

    token_bytes  (vocabulary,) what each token adds to the text; b"" for special tokens and ids without a token
    """

    def __init__(self, tokenizer: HfTokenizer, token_bytes: tuple[bytes, ...]) -> None:
        self._tokenizer = tokenizer
        self.token_bytes = token_bytes

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer | None:
        """The tokenizer of a model folder; None where it has none (such a model takes and gives token ids only).

        Raises: BadTokenizer: a file that is no tokenizer, or one whose decoder we do not know.
        """
        path = model_dir / "tokenizer.json"
        if not path.exists():
            return None
        try:
            text = path.read_text("utf-8")
            tokenizer = HfTokenizer.from_str(text)
        # tokenizers raises a plain Exception for every file that it cannot read
        except Exception as error:
            raise BadTokenizer(path.name, error, "a tokenizer.json of Hugging Face tokenizers") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, _token_bytes(tokenizer, json.loads(text), path.name))

    def encode(self, text: str, *, add_special_tokens: bool) -> NDArray[np.int32]:
        """Token ids of a text, (n,) int32. Raises: UnicodeEncodeError: half a surrogate pair in it."""
        text.encode()
        return np.array(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, dtype=np.int32)

    def bytes_of(self, token_id: int) -> bytes:
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    def name_of(self, token_id: int) -> str:
        """A token as people read it in log-probabilities: its text, or the name of a special token."""
        data = self.bytes_of(token_id)
        return data.decode(errors="replace") if data else self._tokenizer.id_to_token(token_id) or ""


def _token_bytes(tokenizer: HfTokenizer, data: Mapping[str, Any], name: str) -> tuple[bytes, ...]:
    """The bytes that every token id adds to a text, special tokens left out."""
    kind = _decoder_kind(data.get("decoder"), name)
    from_unicode = _byte_level_alphabet()
    out = [b""] * max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    out.append(b"")
    for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items():
        if kind == "ByteLevel":
            known = all(character in from_unicode for character in token)
            out[token_id] = bytes(from_unicode[character] for character in token) if known else token.encode()
        else:
            byte = _BYTE_TOKEN.fullmatch(token)
            out[token_id] = bytes([int(byte[1], 16)]) if byte else token.replace(_SENTENCE_SPACE, " ").encode()
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        out[token_id] = b"" if added.special else added.content.encode()
    return tuple(out)


def _decoder_kind(decoder: Any, name: str) -> str:
    """'ByteLevel' (GPT-2, Llama 3, Qwen) or 'SentencePiece' (Llama 2, Mistral: ▁ for a space, <0xNN> for a byte).

    A space that opens the answer is kept by both: the answer goes on from a prompt.
    """
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    kinds = {part.get("type") for part in parts}
    if kinds == {"ByteLevel"}:
        return "ByteLevel"
    if kinds & {"ByteFallback", "Metaspace"} and kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return "SentencePiece"
    raise BadTokenizer(
        f"{name}: decoder", sorted(map(str, kinds)) or decoder, "ByteLevel, or ByteFallback or Metaspace"
    )


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte, turned round (Radford et al. 2019, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


class Detokenizer:
    """The text of one answer as its tokens come.

    The pieces joined are the UTF-8 text of the tokens' bytes, U+FFFD only where bytes are no UTF-8 for good.
    """

    __slots__ = ("_decode", "_token_bytes")

    def __init__(self, token_bytes: tuple[bytes, ...]) -> None:
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        table = self._token_bytes
        size = len(table)
        return self._decode(b"".join([table[token_id] for token_id in token_ids if token_id < size]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the answer stopped inside a character, else nothing."""
        return self._decode(b"", True)


class StopStrings:
    """Watches a text that comes in pieces for the first of several strings, and lets no part of it through."""

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string came). After True nothing more may be pushed."""
        text = self._held + text
        ends = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            # the stop string that is whole first ends the answer, as it would token by token
            start, _ = min(ends, key=lambda end: (end[0] + len(end[1]), end[0]))
            return text[:start], True
        hold = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stops)


class ChatTemplate:
    """A model's chat template, rendered in a sandbox that neither reaches Python's internals nor changes its arguments.

    The names it may use are those of Hugging Face transformers (`apply_chat_template`).
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], name: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadTokenizer(f"{name}: line {error.lineno}", error.message, "a Jinja template") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, model_dir: Path) -> ChatTemplate | None:
        """From `chat_template.jinja`, else `tokenizer_config.json`; None where the model has none.

        Raises: BadTokenizer.
        """
        path = model_dir / "tokenizer_config.json"
        config = _json_object(path) if path.exists() else {}
        special = {
            key: _content(config[key])
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
            if config.get(key)
        }
        own_file = model_dir / "chat_template.jinja"
        if own_file.exists():
            return cls(own_file.read_text("utf-8"), special, own_file.name)
        source = config.get("chat_template")
        if isinstance(source, list):
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        return None if source is None else cls(source, special, f"{path.name}: chat_template")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt of a conversation, up to where the assistant speaks.

        Raises: BadMessages: the template refuses them.
        """
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError) as error:
            raise BadMessages(f"the model's chat template refuses the messages: {error}") from None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadTokenizer(path.name, error, "a JSON object") from None
    if not isinstance(value, dict):
        raise BadTokenizer(path.name, type(value).__name__, "a JSON object")
    return value


def _content(token: Any) -> str:
    """A special token is written as its text, or as an object with its text in `content`."""
    return str(token["content"] if isinstance(token, dict) else token)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
