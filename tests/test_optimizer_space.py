import itertools

import pytest

from paretune.kernels.tiles import Tile, TileTable
from paretune.optimizer.space import BadSpace, SearchSpace, TileKey, default_space, load_space
from paretune.runtime.spec import BadSpec, Pool
from paretune.traces.columns import PrefixHashes
from paretune.traces.trace import Trace

from .optimizer_examples import NGRAM, deployment, poisson_trace, small_space


def test_every_point_is_a_candidate_or_counted_by_reason():
    space = small_space(enable_chunked_prefill=(True, False), max_num_batched_tokens=(16, 512, 1024))
    found = space.candidates()
    assert len(found.deployments) + sum(found.left_out.values()) == space.size == 2 * 2 * 2 * 3 * 3 * 2
    assert len({each.digest() for each in found.deployments}) == len(found.deployments)
    assert set(found.left_out) == {
        "holds more than 2 devices",
        "max_num_batched_tokens must be at least max_num_seqs: each running request computes one token a step",
        "enable_chunked_prefill is false, so max_num_batched_tokens must be at least max_model_len: a prompt must fit "
        "into one step",
    }


def test_candidates_are_those_of_a_plain_product():
    space = small_space()
    names = [name for name, _ in space.fields]
    expected = []
    for values in itertools.product(*(values for _, values in space.fields)):
        chosen = dict(zip(names, values))
        if chosen["num_threads"] * chosen["replicas"] <= 2:
            expected.append(deployment(**chosen).digest())
    found = space.candidates()
    assert [each.digest() for each in found.deployments] == expected
    for point, each in zip(found.points, found.deployments):
        assert all(values[i] == getattr(each.pool, name) for (name, values), i in zip(space.fields, point))


def test_a_space_survives_yaml_data_and_its_digest_names_it():
    table = TileTable(((("linear", "bf16", 8), Tile("linear", "cpp", (("row_tile", 4),))),))
    space = small_space().with_tiles({TileKey.of(deployment().pool): table})
    again = SearchSpace.from_dict(space.to_dict())
    assert again == space
    assert again.digest() == space.digest() != small_space().digest()


def test_tiles_go_to_the_candidates_they_were_found_for():
    table = TileTable(((("linear", "int8", 8), Tile("linear", "cpp", (("row_tile", 4),))),))
    space = small_space().with_tiles({TileKey("cpu", 1, 2, "int8"): table})
    for each in space.candidates().deployments:
        tuned = each.pool.num_threads == 2 and each.pool.weight_dtype == "int8"
        assert each.pool.tiles == (table if tuned else TileTable())


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({}, "space: fields"),
        ({"fields": {"max_num_sequences": [1]}}, "space: max_num_sequences"),
        ({"fields": {"max_num_seqs": []}}, "space: max_num_seqs"),
        ({"fields": {"max_num_seqs": 8}}, "space: fields.max_num_seqs"),
        ({"fields": {"max_num_seqs": [8, 8]}}, "space: max_num_seqs"),
        ({"fields": {"max_num_seqs": [0]}}, "space: max_num_seqs"),
        ({"fields": {"max_num_seqs": ["8"]}}, "space: max_num_seqs"),
        ({"fields": {"enable_prefix_caching": [1]}}, "space: enable_prefix_caching"),
        ({"fields": {"weight_dtype": ["int3"]}}, "space: weight_dtype"),
        ({"fields": {"block_size": [24]}}, "space: block_size"),
        ({"fields": {"max_num_seqs": [8]}, "max_devices": 0}, "space: max_devices"),
        ({"fields": {"max_num_seqs": [8]}, "shards": 2}, "space: shards"),
        ({"fields": {"max_num_seqs": list(range(1, 999)), "max_num_batched_tokens": list(range(1, 999))}}, "space"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_by_the_fields_name(data, where):
    with pytest.raises(BadSpace) as caught:
        SearchSpace.from_dict(data)
    assert caught.value.where == where
    assert caught.value.exit_code == 2


def test_a_broken_default_is_refused_as_a_spec():
    with pytest.raises(BadSpec, match=r"space: default: pools\.0\.replicas"):
        SearchSpace.from_dict({"fields": {}, "default": {"pools": [{"replicas": 0}]}})


def test_a_space_is_read_from_yaml(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("fields:\n  max_num_seqs: [8, 16]\n  enable_chunked_prefill: [true]\nmax_devices: 2\n")
    assert load_space(path).size == 2


def test_the_default_space_tries_prefix_caching_only_where_prefixes_are():
    trace = poisson_trace(20)
    plain = dict(default_space(trace, deployment(), cores=2).fields)
    assert plain["enable_prefix_caching"] == (True,)
    hashes = PrefixHashes.of([[1]] * 20, 16)
    shared = Trace(trace.arrival_s, trace.input_tokens + 16, trace.output_tokens, prefix=hashes)
    assert dict(default_space(shared, deployment(), cores=2).fields)["enable_prefix_caching"] == (True, False)
    asked = default_space(trace, deployment(), cores=2, prefix_caching=(False, True))
    assert dict(asked.fields)["enable_prefix_caching"] == (False, True)


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_the_default_space_shards_by_powers_of_two_as_far_as_the_cores_go(cores):
    found = default_space(poisson_trace(20), deployment(), cores=cores).candidates()
    held = {each.pool.devices_per_replica * each.pool.replicas for each in found.deployments}
    # powers of two alone: those are what a profile measures
    assert max(held) == 1 << (cores.bit_length() - 1)
    assert all(isinstance(each.pool, Pool) for each in found.deployments)


def test_stages_and_parts_hold_devices_like_ranks_and_threads():
    space = small_space(pipeline_parallel_size=(1, 2), context_parallel_size=(1, 2), router=("prefix_affinity",))
    found = space.candidates()
    held = {each.pool.replicas * each.pool.devices_per_replica for each in found.deployments}
    assert held == {1, 2}
    assert {each.pool.pipeline_parallel_size * each.pool.context_parallel_size for each in found.deployments} == {1, 2}


def test_a_batch_that_cannot_verify_all_proposals_is_counted_by_a_reason_that_reads_well():
    space = SearchSpace((("max_num_batched_tokens", (63, 64)),), deployment(**NGRAM))
    found = space.candidates()
    assert [each.pool.max_num_batched_tokens for each in found.deployments] == [64]
    assert list(found.left_out) == [
        "max_num_batched_tokens must be at least max_num_seqs times one more than num_speculative_tokens: each running "
        "request verifies so many in a step"
    ]
