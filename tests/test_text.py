"""Text in and out of tokens: detokenization piece by piece, stop strings, chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as HfTokenizer

from paretune.runtime.small_model import MODEL_DIR
from paretune.runtime.text import BadMessages, BadTokenizer, ChatTemplate, Detokenizer, StopStrings, Tokenizer

SMALL = Tokenizer.load(MODEL_DIR)
assert SMALL is not None
HF_SMALL = HfTokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.token_bytes)
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


@given(texts)
def test_the_pieces_of_an_answer_joined_are_its_text(text: str) -> None:
    ids = SMALL.encode(text, add_special_tokens=False).tolist()
    assert "".join(pieces(SMALL, ids)) == text


@given(texts)
def test_no_piece_shows_a_character_before_its_last_byte_came(text: str) -> None:
    ids = SMALL.encode(text, add_special_tokens=False).tolist()
    shown = ""
    for piece in pieces(SMALL, ids):
        shown += piece
        assert text.startswith(shown)


@given(st.lists(st.integers(0, 4095), max_size=30))
def test_any_tokens_give_the_text_that_hugging_face_gives_them_all_at_once(ids: list[int]) -> None:
    assert "".join(pieces(SMALL, ids)) == HF_SMALL.decode(ids, skip_special_tokens=True)


def test_a_character_split_over_four_tokens_comes_with_the_last_of_them() -> None:
    ids = SMALL.encode("a🦆b", add_special_tokens=False).tolist()
    assert len(ids) == 6
    assert pieces(SMALL, ids) == ["a", "", "", "", "🦆", "b", ""]


def test_an_answer_that_stops_inside_a_character_ends_with_one_replacement_character() -> None:
    ids = SMALL.encode("a🦆", add_special_tokens=False).tolist()[:-1]
    assert pieces(SMALL, ids)[-1] == "\ufffd"


def sentence_piece(folder: Path) -> tuple[Tokenizer, HfTokenizer]:
    vocabulary = {"<unk>": 0, "<s>": 1, "▁Hello": 2, "▁world": 3, "s": 4, "▁": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    hf = HfTokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<unk>", special=True)])
    hf.add_tokens([AddedToken("<tool>", special=False)])
    hf.save(str(folder / "tokenizer.json"))
    ours = Tokenizer.load(folder)
    assert ours is not None
    return ours, hf


def test_sentence_piece_tokens_become_spaces_and_bytes(tmp_path: Path) -> None:
    ours, hf = sentence_piece(tmp_path)
    duck = [6 + byte for byte in "🦆".encode()]
    ids = [1, 2, 3, 4, *duck, 5, hf.token_to_id("<tool>")]
    # Hugging Face strips the space that opens a text; ours goes on from a prompt
    assert "".join(pieces(ours, ids)) == " " + hf.decode(ids) == " Hello worlds🦆 <tool>"


def test_a_model_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path) is None
    assert ChatTemplate.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{", "{}", "[1]", '{"version":"1.0"}', "\ufeff{}"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadTokenizer) as error:
        Tokenizer.load(tmp_path)
    assert error.value.where == "tokenizer.json"
    assert error.value.exit_code == 2


def test_a_decoder_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    hf = HfTokenizer(models.WordPiece(vocab={"[UNK]": 0}, unk_token="[UNK]"))
    hf.decoder = decoders.WordPiece()
    hf.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadTokenizer, match="WordPiece"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_truncates_for_training_does_not_cut_prompts(tmp_path: Path) -> None:
    hf = HfTokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    hf.enable_truncation(4)
    hf.enable_padding(length=64)
    hf.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    assert ours is not None
    text = "import os\nimport sys\nimport json\n"
    assert ours.encode(text, add_special_tokens=True).tolist() == SMALL.encode(text, add_special_tokens=True).tolist()


# stop strings


def first_stop(text: str, stops: list[str]) -> str | None:
    """The slow way: character by character, until one of the strings ends what was read."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)]
    return None


@settings(max_examples=300)
@given(st.lists(st.text("ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_stop_strings_end_the_text_wherever_it_is_cut_into_pieces(parts: list[str], stops: list[str]) -> None:
    watch = StopStrings(stops)
    expected = first_stop("".join(parts), stops)
    shown, stopped = "", False
    for part in parts:
        piece, stopped = watch.push(part)
        shown += piece
        if expected is not None:
            assert expected.startswith(shown), "part of a stop string was shown"
        if stopped:
            break
    if not stopped:
        shown += watch.flush()
    assert stopped == (expected is not None)
    assert shown == ("".join(parts) if expected is None else expected)


def test_text_that_cannot_begin_a_stop_string_is_not_held_back() -> None:
    watch = StopStrings(["\n\n"])
    assert watch.push("hello") == ("hello", False)
    assert watch.push(" you\n") == (" you", False)
    assert watch.push("x") == ("\nx", False)
    assert watch.push("\n\n!") == ("", True)


# chat templates


def test_the_chat_template_gives_what_transformers_gives() -> None:
    transformers = pytest.importorskip("transformers")
    messages = [
        {"role": "system", "content": "You know Python. "},
        {"role": "user", "content": "What is <b>os</b> & why? 🦆"},
        {"role": "assistant", "content": "A module."},
        {"role": "user", "content": "Thanks"},
    ]
    reference = transformers.AutoTokenizer.from_pretrained(str(MODEL_DIR))
    template = ChatTemplate.load(MODEL_DIR)
    assert template is not None
    assert template.render(messages) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def template_of(folder: Path, source: object, **more: object) -> ChatTemplate:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **more}))
    template = ChatTemplate.load(folder)
    assert template is not None
    return template


USER = [{"role": "user", "content": "hi"}]


def test_a_template_may_be_one_of_several_or_a_file_of_its_own(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    assert template_of(tmp_path, several, bos_token={"content": "<s>"}).render(USER) == "<s>yes"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template_of(tmp_path, several).render(USER) == "file"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ 1 / 0 }}",
        "{{ range(10**9) }}",
        "{{ messages[5].content.x }}",
    ],
)
def test_a_template_that_refuses_or_reaches_out_gives_one_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(BadMessages):
        template_of(tmp_path, source).render(USER)


def test_a_broken_template_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BadTokenizer, match="line 2"):
        template_of(tmp_path, "a\n{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(BadTokenizer, match=r"tokenizer_config\.json"):
        ChatTemplate.load(tmp_path)
