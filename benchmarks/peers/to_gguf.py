"""Write a Llama checkpoint of random weights as GGUF: to_gguf.py MODEL_DIR OUT.gguf BF16|Q8_0|Q4_0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file


def rotary_pairs(weight: Any, heads: int) -> Any:
    """Rows of q and k from Hugging Face's two halves per head to ggml's neighboring pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def main() -> None:
    source, out = Path(sys.argv[1]), sys.argv[2]
    kind = gguf.GGMLQuantizationType[sys.argv[3]]
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    heads, kv_heads, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(vocab)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.name}"])
    # random weights speak no language: any vocabulary that the loader accepts will do
    names = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    names += [f"t{number}".encode() for number in range(vocab - len(names))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * (vocab - len(kinds)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def add(name: str, key: str, heads_of: int = 0) -> None:
        array = weights[key].float().numpy()
        if array.ndim == 1:
            writer.add_tensor(name, array.astype(np.float32))
            return
        array = rotary_pairs(array, heads_of) if heads_of else array
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    add("output.weight", "lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        add(ours + "attn_norm.weight", theirs + "input_layernorm.weight")
        add(ours + "ffn_norm.weight", theirs + "post_attention_layernorm.weight")
        add(ours + "attn_q.weight", theirs + "self_attn.q_proj.weight", heads)
        add(ours + "attn_k.weight", theirs + "self_attn.k_proj.weight", kv_heads)
        add(ours + "attn_v.weight", theirs + "self_attn.v_proj.weight")
        add(ours + "attn_output.weight", theirs + "self_attn.o_proj.weight")
        add(ours + "ffn_gate.weight", theirs + "mlp.gate_proj.weight")
        add(ours + "ffn_up.weight", theirs + "mlp.up_proj.weight")
        add(ours + "ffn_down.weight", theirs + "mlp.down_proj.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
