"""The small model that ships with paretune has learned something, and its recipe still makes such a model."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from paretune.runtime.small_model import HELDOUT_TEXT, MODEL_DIR
from paretune.runtime.small_model.corpus import Document, documents, heldout_text, split
from paretune.runtime.small_model.folder import SPECIAL_TOKENS
from paretune.runtime.small_model.llama import Llama, Shape, mean_loss, rows
from paretune.runtime.small_model.train import Schedule, load, main, train

LENGTH = 512
TINY = Shape(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
TOKENIZER = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def heldout_rows() -> torch.Tensor:
    return rows(TOKENIZER.encode(HELDOUT_TEXT.read_text(encoding="utf-8")).ids, LENGTH)


@pytest.fixture(scope="module")
def model() -> Llama:
    return load(MODEL_DIR)


@pytest.fixture(scope="module")
def heldout_perplexity(model: Llama, heldout_rows: torch.Tensor) -> float:
    return math.exp(mean_loss(model, heldout_rows, batch=4))


@pytest.fixture
def fake_stdlib(tmp_path: Path) -> Path:
    """Two hundred small modules, enough for some to fall into every share."""
    folder = tmp_path / "stdlib"
    folder.mkdir()
    for index in range(200):
        source = (
            f'"""Module number {index} of the fake standard library, written for a test."""\n\n\n'
            f"# This longer comment of module {index} explains why the value below is {index * 7919 % 1000}.\n"
            f'def value_{index}(argument):\n    """Return {index * 7919 % 1000} more than the argument."""\n'
            f"    return argument + {index * 7919 % 1000}\n"
        )
        (folder / f"module_{index}.py").write_text(source)
    return folder


def test_the_model_folder_takes_at_most_16_mb_and_holds_no_pickle() -> None:
    files = [path for path in MODEL_DIR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 16_000_000
    assert {path.suffix for path in files} == {".py", ".md", ".json", ".txt", ".safetensors"}
    weights = {str(path.relative_to(MODEL_DIR)) for path in files if path.suffix == ".safetensors"}
    assert weights == {"model.safetensors", "ternary/model.safetensors"}


def test_the_config_is_the_shape_that_the_package_was_built_around() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    expected: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    assert {name: config[name] for name in expected} == expected
    assert TOKENIZER.get_vocab_size() == 4096
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == [
        config["pad_token_id"],
        config["bos_token_id"],
        config["eos_token_id"],
    ]


def test_transformers_loads_the_folder_and_finds_the_same_loss(model: Llama, heldout_rows: torch.Tensor) -> None:
    theirs = LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokens = heldout_rows[:2]
    with torch.no_grad():
        found = theirs(tokens, labels=tokens)
        assert model.loss(tokens).item() == pytest.approx(found.loss.item(), abs=1e-3)
        torch.testing.assert_close(model(tokens), found.logits, rtol=0, atol=1e-3)


def test_heldout_perplexity_is_below_that_of_the_best_unigram_model(
    heldout_perplexity: float, heldout_rows: torch.Tensor
) -> None:
    predicted = Counter(heldout_rows[:, 1:].flatten().tolist())
    total = predicted.total()
    # fitted to the held-out text itself, so no unigram model of other text can do better
    unigram = math.exp(-sum(count / total * math.log(count / total) for count in predicted.values()))
    assert heldout_perplexity < unigram / 3
    assert heldout_perplexity < 4096 / 40


def test_the_model_card_and_the_training_record_name_the_perplexity_that_is_found(heldout_perplexity: float) -> None:
    record = json.loads((MODEL_DIR / "training.json").read_text())
    assert record["heldout_perplexity"]["bf16_weights"] == pytest.approx(heldout_perplexity, rel=1e-3)
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    for value in record["heldout_perplexity"].values():
        assert f"{value:.2f}" in card
    assert f"{record['steps']:,} steps" in card


def test_perplexity_tells_precisions_apart(model: Llama, heldout_rows: torch.Tensor) -> None:
    tokens = heldout_rows[::7]
    loss = mean_loss(model, tokens, batch=4)
    assert mean_loss(load(MODEL_DIR).bfloat16(), tokens, batch=4) == pytest.approx(loss, abs=0.02)
    losses = []
    for levels in (127, 7, 3):
        rounded = load(MODEL_DIR)
        with torch.no_grad():
            for parameter in rounded.parameters():
                if parameter.dim() == 2:
                    scale = parameter.abs().amax(dim=1, keepdim=True) / levels
                    parameter.copy_((parameter / scale).round() * scale)
        losses.append(mean_loss(rounded, tokens, batch=4))
    assert losses[0] == pytest.approx(loss, abs=0.02)
    assert losses[0] + 0.02 < losses[1] < losses[2]


@given(st.text(max_size=200).filter(lambda text: not any(token in text for token in SPECIAL_TOKENS)))
def test_the_tokenizer_loses_no_text(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_the_chat_template_names_each_role_and_opens_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list? "}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>System: Be brief.\n\nUser: What is a list?\n\nAssistant:"


def test_the_heldout_text_is_small_and_comes_from_heldout_names_only() -> None:
    assert HELDOUT_TEXT.stat().st_size <= 60_000
    names = [part.strip().split("\n")[0] for part in HELDOUT_TEXT.read_text(encoding="utf-8").split("\n\n\n")]
    headings = [name for name in names if name.endswith(".py") or name.startswith("pydoc_data/topics.py#")]
    assert len(headings) >= 10
    assert {Document(name, "source", "").share for name in headings} == {"heldout"}


def test_no_training_text_keeps_a_paragraph_that_stands_in_other_shares(fake_stdlib: Path) -> None:
    shared = "This sentence is the license header that two hundred modules of a library have in common."
    for path in fake_stdlib.glob("*.py"):
        path.write_text(f'"""{shared}"""\n\n\n# {shared}\n\n' + path.read_text())
    found = documents(fake_stdlib)
    shares = split(found)
    assert all(shared in document.text for document in found)
    assert shares["heldout"]
    assert shares["validation"]
    assert len(shares["train"]) > 300
    assert not any(f"\n{shared}\n" in document.text for document in shares["train"])


def test_the_heldout_text_of_a_library_is_its_heldout_documents_each_name_once(fake_stdlib: Path) -> None:
    shares = split(documents(fake_stdlib))
    text = heldout_text(shares)
    for name in {document.name for document in shares["heldout"]}:
        assert text.count(f"{name}\n\n") == 1
    assert not any(f"{document.name}\n\n" in text for document in shares["train"])


def test_two_training_steps_write_a_folder_that_transformers_loads(fake_stdlib: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    schedule = Schedule(steps=2, minutes=1, batch=2, length=32)
    record = train(out, shape=TINY, schedule=schedule, seed=3, stdlib=fake_stdlib)
    assert (record.steps, record.tokens) == (2, 2 * 2 * 32)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "heldout.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    tokens = torch.arange(3, 67).view(2, 32)
    theirs = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert load(out).loss(tokens).item() == pytest.approx(theirs(tokens, labels=tokens).loss.item(), abs=1e-4)


def test_the_same_seed_trains_the_same_weights(fake_stdlib: Path, tmp_path: Path) -> None:
    schedule = Schedule(steps=2, minutes=1, batch=2, length=32)
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        train(tmp_path / name, shape=TINY, schedule=schedule, seed=seed, stdlib=fake_stdlib)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other"))
    assert one == same
    assert one != other


def test_training_lowers_the_validation_loss(fake_stdlib: Path, tmp_path: Path) -> None:
    schedule = Schedule(steps=30, minutes=1, batch=4, length=32, warmup_steps=5, evaluate_minutes=0)
    record = train(tmp_path / "model", shape=TINY, schedule=schedule, seed=3, stdlib=fake_stdlib)
    assert len(record.curve) == 30
    assert record.best_validation_loss < record.curve[0]["validation_loss"] - 0.5


def test_the_learning_rate_warms_up_and_ends_at_its_final_share() -> None:
    schedule = Schedule(steps=1000, minutes=1, peak_rate=1.0, final_share=0.1, warmup_steps=10)
    assert schedule.rate(0, 0.0) == pytest.approx(0.1)
    assert schedule.rate(9, 0.0) == pytest.approx(1.0)
    assert schedule.rate(500, 0.5) == pytest.approx(0.55)
    assert schedule.rate(999, 1.0) == schedule.rate(999, 1.5) == pytest.approx(0.1)


def test_text_too_short_for_one_validation_row_is_refused(fake_stdlib: Path, tmp_path: Path) -> None:
    schedule = Schedule(steps=2, minutes=1, length=100_000)
    with pytest.raises(ValueError, match="smaller length"):
        train(tmp_path / "model", shape=TINY, schedule=schedule, seed=0, stdlib=fake_stdlib)
    assert not (tmp_path / "model").exists()


def test_the_script_asks_where_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err
