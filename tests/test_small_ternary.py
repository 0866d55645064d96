"""The ternary twin of the small model: what it holds, and that others read the same model from it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paretune.runtime.engine import Engine
from paretune.runtime.model_shape import ModelShape, resolve_model
from paretune.runtime.quality import heldout_tokens, perplexity
from paretune.runtime.sampler import SamplingParams
from paretune.runtime.small_model import MODEL_DIR, TERNARY_MODEL_DIR
from paretune.runtime.small_model.llama import Llama, Shape
from paretune.runtime.small_model.ternary_linear import RAMP_STEPS, TernaryLinear, make_ternary, pack_rows
from paretune.runtime.small_model.train import Schedule
from paretune.runtime.small_model.train_ternary import train_ternary
from paretune.runtime.spec import Deployment

# transformers reads such a folder by itself only where accelerate is installed: here its own layers are put in by hand.
# Without the compiler, which takes a minute and changes nothing.
TRANSFORMERS = """
import json, sys, torch
from safetensors.torch import load_file
from transformers import BitNetQuantConfig, LlamaConfig, LlamaForCausalLM
from transformers.integrations.bitnet import BitLinear, replace_with_bitnet_linear
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
config = LlamaConfig.from_pretrained(folder)
given = config.quantization_config
del config.quantization_config
model = LlamaForCausalLM(config)
kept = {k: v for k, v in given.items() if k != "quant_method"}
replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=BitNetQuantConfig(**kept))
tensors = {k: v if v.dtype == torch.uint8 else v.float() for k, v in load_file(folder + "/model.safetensors").items()}
missing = model.load_state_dict(tensors, strict=False, assign=True)
assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys, missing
model.tie_weights()
assert isinstance(model.model.layers[0].mlp.down_proj, BitLinear)
for module in model.modules():
    if isinstance(module, BitLinear):
        module.dtype = torch.float32
with torch.no_grad():
    print(float(model.eval()(ids, labels=ids).loss))
"""


@pytest.fixture(scope="module")
def token_ids() -> np.ndarray:
    return heldout_tokens(MODEL_DIR)[:512]


def test_transformers_finds_the_same_loss_in_the_folder(token_ids: np.ndarray) -> None:
    windows = json.dumps(token_ids.reshape(4, 128).tolist())
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS, str(TERNARY_MODEL_DIR), windows],
        env={**os.environ, "TORCHDYNAMO_DISABLE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    expected = math.exp(float(done.stdout.split()[-1]))
    found = perplexity(TERNARY_MODEL_DIR, "ternary", "fp32", token_ids=token_ids, context=128)
    assert found == pytest.approx(expected, rel=2e-3)


def test_the_layers_are_two_bits_a_weight_and_the_folder_is_small() -> None:
    tensors = load_file(TERNARY_MODEL_DIR / "model.safetensors")
    shape = ModelShape.load(TERNARY_MODEL_DIR)
    assert shape.ternary == "bitlinear"
    packed = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.uint8)
    assert 4 * packed == sum(out * into * count for name, out, into, count in shape.matrices() if name != "head")
    assert sum(path.stat().st_size for path in TERNARY_MODEL_DIR.iterdir()) < 4_000_000


def test_all_three_values_occur_in_every_matrix() -> None:
    for name, tensor in load_file(TERNARY_MODEL_DIR / "model.safetensors").items():
        if tensor.dtype == torch.uint8:
            shares = [float(((tensor >> shift & 3) == code).float().mean()) for shift in (0, 6) for code in range(4)]
            assert shares[3] == shares[7] == 0, name
            assert all(share > 0.2 for share in shares[:3]), name


def test_the_twin_is_nearly_as_good_as_the_model_it_comes_from(token_ids: np.ndarray) -> None:
    record = json.loads((TERNARY_MODEL_DIR / "training.json").read_text())
    card = (MODEL_DIR / "README.md").read_text()
    assert f"{record['heldout_perplexity']['ternary_weights']:.2f}" in card
    teacher = perplexity(MODEL_DIR, "bf16", token_ids=token_ids)
    assert teacher < perplexity(TERNARY_MODEL_DIR, "ternary", token_ids=token_ids) < 1.2 * teacher


def test_the_engine_serves_it_by_its_short_name() -> None:
    deployment = Deployment(model="paretune/small-ternary").with_pool(
        weight_dtype="ternary", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=64, num_kv_blocks=16
    )
    folder = resolve_model(deployment.model)
    assert folder == TERNARY_MODEL_DIR
    with Engine(deployment, folder) as engine:
        from paretune.runtime.engine import Request

        engine.add(Request(0, np.arange(3, 20, dtype=np.int32), SamplingParams(max_tokens=4, temperature=0)))
        tokens = 0
        while engine.has_work:
            tokens += len(engine.step())
    assert tokens == 4


def test_rows_are_packed_as_transformers_unpacks_them() -> None:
    """Its documentation's example: 0b10100001 over rows 0, 2, 4, 6 of a column is 0, -1, 1, 1."""
    values = torch.tensor([[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]], dtype=torch.float32)
    expected = torch.tensor([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], dtype=torch.uint8)
    assert torch.equal(pack_rows(values), expected)


def test_the_gradient_passes_the_rounding_by() -> None:
    """Straight-through: as if the layer were linear in its rounded weights and the rounded input."""
    layer, plain = TernaryLinear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    layer.seen = RAMP_STEPS
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    rounded = layer.eval()
    step = x.abs().amax(dim=1, keepdim=True) / 127
    torch.testing.assert_close(layer.weight.grad, ((x / step).round() * step).sum(dim=0).expand(4, 8))
    values = rounded(torch.eye(8)).t()
    assert len(values.abs().round(decimals=4).unique()) <= 2
    assert plain.weight.shape == values.shape


def test_the_rounding_comes_in_step_by_step() -> None:
    layer = TernaryLinear(8, 4, bias=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), x @ layer.weight.t())
    for _ in range(RAMP_STEPS):
        trained = layer(x)
    torch.testing.assert_close(trained, layer.eval()(x))


def test_only_the_matrices_of_the_layers_become_ternary() -> None:
    shape = Shape(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, head_dim=8)  # fmt: skip
    model = Llama(shape)
    names = set(model.state_dict())
    make_ternary(model)
    assert set(model.state_dict()) == names
    assert sum(isinstance(module, TernaryLinear) for module in model.modules()) == 2 * 7


def test_two_steps_of_training_write_a_folder_that_the_runtime_loads(tmp_path: Path) -> None:
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    for index in range(200):
        values = "".join(f"VALUE_{i} = {index * 100 + i}\n" for i in range(40))
        text = f'"""Module number {index}, written for a test of the recipe."""\n\n{values}'
        (stdlib / f"module_{index}.py").write_text(text)
    out = tmp_path / "twin"
    record = train_ternary(out, schedule=Schedule(steps=2, minutes=5, batch=1, length=256), seed=0, stdlib=stdlib)
    assert record.steps == 2
    ids = np.arange(3, 67, dtype=np.int32)
    assert perplexity(out, "ternary", "fp32", token_ids=ids, context=64) > 1
