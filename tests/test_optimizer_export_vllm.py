import itertools
import json

import pytest
import yaml

from paretune.kernels.tiles import Tile, TileTable
from paretune.optimizer.export.vllm import TESTED_VERSIONS, CannotExport, export
from paretune.optimizer.export.vllm_flags import FLAGS
from paretune.runtime.spec import Adapter, Deployment, Pool

from .optimizer_examples import deployment

NGRAM = {"speculation": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
H100 = {"accelerator": "H100 SXM", "num_threads": 1}


def test_every_flag_that_is_emitted_is_in_the_list_of_its_version():
    axes = [
        ("weight_dtype", ("fp32", "bf16", "fp16", "fp8")),
        ("kv_cache_dtype", ("bf16", "fp8")),
        ("replicas", (1, 4)),
        ("tensor_parallel_size", (1, 8)),
        ("enable_chunked_prefill", (True, False)),
        ("enable_prefix_caching", (True, False)),
    ]
    for values in itertools.product(*(values for _, values in axes)):
        found = export(deployment(**H100, **dict(zip((name for name, _ in axes), values))))
        for argument in found.argv[3:]:
            if argument.startswith("--"):
                assert argument.replace("--no-", "--") in FLAGS[found.engine_version]


def test_the_command_says_what_the_spec_says():
    found = export(deployment(**H100, tensor_parallel_size=2, replicas=3, enable_chunked_prefill=False))
    assert found.argv[:2] == ("vllm", "serve")
    arguments = " ".join(found.argv)
    for part in (
        "--dtype bfloat16",
        "--kv-cache-dtype bfloat16",
        "--tensor-parallel-size 2",
        "--data-parallel-size 3",
        "--max-model-len 512",
        "--max-num-seqs 16",
        "--max-num-batched-tokens 512",
        "--block-size 16",
        "--num-gpu-blocks-override 1024",
        "--no-enable-chunked-prefill",
        "--enable-prefix-caching",
    ):
        assert part in arguments
    config = yaml.safe_load(found.config)
    assert config["max-num-seqs"] == 16
    assert config["enable-chunked-prefill"] is False


def test_nothing_of_a_pool_is_dropped_in_silence():
    """Every field either changes the command or its environment, or is refused, or is named."""
    changes = {
        "replicas": 2,
        "router": "prefix_affinity",
        "accelerator": "H100 SXM",
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "context_parallel_size": 2,
        "num_threads": 2,
        "weight_dtype": "fp16",
        "kv_cache_dtype": "fp8",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 1024,
        "block_size": 32,
        "num_kv_blocks": 999,
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
        "max_queued_requests": 5,
        "scheduling": "priority",
        "admission": "first_chunk",
        "long_prefill_token_threshold": 64,
        "tiles": TileTable(((("linear", "bf16", 8), Tile("linear", "cpp", (("row_tile", 4),))),)),
    }
    of_speculation = {
        "speculation": {**NGRAM},
        "num_speculative_tokens": {**NGRAM, "num_speculative_tokens": 5},
        "prompt_lookup_max": {**NGRAM, "prompt_lookup_max": 5},
        "prompt_lookup_min": {**NGRAM, "prompt_lookup_min": 2},
        "draft_model": {"speculation": "draft_model", "num_speculative_tokens": 3, "draft_model": "/x/small"},
    }
    of_adapters = {"max_loras": 2, "max_cpu_loras": 3, "max_lora_rank": 64}
    plain, with_adapters = deployment(), deployment(max_loras=1)
    of_graphs = {"enforce_eager": True, "cuda_graph_sizes": (1, 8)}
    refused = {"role", "preemption", "host_kv_blocks"}
    others = {"watermark", "enable_expert_parallel"}
    named = {*changes, *refused, *of_adapters, *of_graphs, *of_speculation, *others}
    assert named == set(type(plain.pool).model_fields)
    ranks = plain.with_pool(tensor_parallel_size=2)
    assert "--enable-expert-parallel" in export(ranks.with_pool(enable_expert_parallel=True)).argv
    assert "--watermark 0.1" in " ".join(export(plain.with_pool(admission="watermark", watermark=0.1)).argv)
    for name, value in changes.items():
        assert export(plain.with_pool(**{name: value})) != export(plain), name
    told = {name: export(plain.with_pool(**fields)).argv for name, fields in of_speculation.items()}
    assert len({export(plain).argv, *told.values()}) == 1 + len(told)
    on_gpu = deployment(accelerator="H100")
    for name, value in of_graphs.items():
        assert export(on_gpu.with_pool(**{name: value})) != export(on_gpu), name
    assert "--cudagraph-capture-sizes 1 8 " in " ".join(export(on_gpu.with_pool(cuda_graph_sizes=(1, 8))).argv)
    for name, value in of_adapters.items():
        assert export(with_adapters.with_pool(**{name: value})) != export(with_adapters), name


def test_speculation_is_told_to_vllm_in_its_own_words():
    found = export(deployment(**NGRAM))
    config = json.loads(found.argv[found.argv.index("--speculative-config") + 1])
    assert config == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    assert json.loads(yaml.safe_load(found.config)["speculative-config"]) == config
    assert any("n-grams" in note for note in found.not_translated)
    drafted = export(deployment(speculation="draft_model", num_speculative_tokens=3, draft_model="/x/small"))
    config = json.loads(drafted.argv[drafted.argv.index("--speculative-config") + 1])
    assert config == {"method": "draft_model", "num_speculative_tokens": 3, "model": "/x/small"}
    assert "--speculative-config" not in export(deployment()).argv


def test_adapters_are_told_to_vllm():
    spec = deployment(max_loras=4, max_lora_rank=20).model_copy(
        update={"adapters": (Adapter(name="a", path="/x/a"), Adapter(name="b", path="/x/b"))}
    )
    found = export(spec)
    arguments = " ".join(found.argv)
    flags = "--enable-lora --max-loras 4 --max-cpu-loras 4 --max-lora-rank 32 --lora-modules a=/x/a b=/x/b"
    assert flags in arguments
    assert any("max_lora_rank 20" in note for note in found.not_translated)
    assert yaml.safe_load(found.config)["lora-modules"] == ["a=/x/a", "b=/x/b"]
    assert "--enable-lora" not in export(deployment()).argv
    for name in ("a=b", "-a", "{}"):
        with pytest.raises(CannotExport, match=r"adapters\.0\.name"):
            export(spec.model_copy(update={"adapters": (Adapter(name=name, path="x"),)}))


def test_threads_are_bound_rank_by_rank():
    found = export(deployment(num_threads=2, tensor_parallel_size=2))
    assert found.env == {"VLLM_CPU_OMP_THREADS_BIND": "0-1|2-3"}
    assert export(deployment(**H100)).env == {}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"weight_dtype": "int8"}, "pools.0.weight_dtype"),
        ({"weight_dtype": "fp8"}, "pools.0.weight_dtype"),
        ({"kv_cache_dtype": "fp32"}, "pools.0.kv_cache_dtype"),
        ({"kv_cache_dtype": "int8"}, "pools.0.kv_cache_dtype"),
        ({"block_size": 4}, "pools.0.block_size"),
        ({"preemption": "swap", "host_kv_blocks": 8}, "pools.0.preemption"),
        ({"host_kv_blocks": 8}, "pools.0.host_kv_blocks"),
        ({"admission": "estimated_peak"}, "pools.0.admission"),
    ],
)
def test_what_vllm_cannot_do_is_refused_by_the_fields_name(changes, where):
    with pytest.raises(CannotExport) as caught:
        export(deployment(**changes))
    assert (caught.value.where, caught.value.exit_code) == (where, 2)


def test_another_engines_spec_and_several_pools_are_refused():
    one = deployment()
    for spec, where in [
        (one.model_copy(update={"engine": "sglang"}), "engine"),
        (Deployment(pools=(*one.pools, *one.pools)), "pools"),
        (Deployment(pools=(Pool(role="prefill"), Pool(role="decode"))), "pools"),
    ]:
        with pytest.raises(CannotExport) as caught:
            export(spec)
        assert caught.value.where == where


def test_a_float32_cache_goes_with_float32_weights():
    assert "--kv-cache-dtype auto --" in " ".join(export(deployment(weight_dtype="fp32", kv_cache_dtype="fp32")).argv)


def test_an_untested_version_is_refused_unless_allowed_and_then_named():
    assert export(deployment(), engine_version=f"{TESTED_VERSIONS[0]}.7").engine_version == TESTED_VERSIONS[0]
    with pytest.raises(CannotExport, match="engine version"):
        export(deployment(), engine_version="9.9")
    found = export(deployment(), engine_version="9.9", allow_untested=True)
    assert any("9.9 was not tested" in note for note in found.not_translated)
