"""The files of a model folder beside its weights, as the small model and the random ones share them."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = (PAD, BOS, EOS)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def byte_level(model: models.BPE) -> Tokenizer:
    """`model` over bytes (no text is unknown), putting <s> before a text as Llama's tokenizer does."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def token_ids() -> dict[str, int]:
    """The special token ids under the names of config.json and generation_config.json."""
    return {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}


def text_files(tokenizer: Tokenizer, max_position_embeddings: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json, by name."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": (tokenizer.to_str(pretty=False) + "\n").encode(),
        "tokenizer_config.json": json_bytes(tokenizer_config),
        "generation_config.json": json_bytes({**token_ids(), "do_sample": False}),
    }


def json_bytes(content: Any) -> bytes:
    """Indented JSON with a newline at its end."""
    return (json.dumps(content, indent=2) + "\n").encode()
