"""A profile is taken whole or refused: round trip, every flipped byte, other versions, machines and models."""

import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.profiler.profile import BadProfile, Key, Peaks, Profile, this_machine
from paretune.runtime.spec import Pool

from .profiler_examples import FAST, SMALL, four_cores, operator_points, profile


def test_a_profile_comes_back_as_it_was(tmp_path) -> None:
    path = tmp_path / "profile.json"
    saved = profile(noise=0.1, operators=tuple(operator_points({"default": 1e-12})))
    saved.save(path)
    loaded = Profile.load(path)
    assert loaded == saved
    assert loaded.digest() == saved.digest()


def test_every_flipped_bit_is_noticed(tmp_path) -> None:
    path = tmp_path / "profile.json"
    profile(configurations=profile().configurations[:1]).save(path)
    raw = path.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(len(raw)), 300):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :])
        with pytest.raises(BadProfile) as raised:
            Profile.load(path)
        assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": 1}']
)
def test_what_is_no_profile_is_refused(tmp_path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(BadProfile) as raised:
        Profile.load(path)
    assert raised.value.where.startswith("profile.json")


def test_a_truncated_file_is_refused(tmp_path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadProfile):
        Profile.load(path)


def test_another_version_is_named(tmp_path) -> None:
    path = tmp_path / "profile.json"
    profile().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(BadProfile) as raised:
        Profile.load(path)
    assert (raised.value.where, raised.value.found) == ("profile.json: schema_version", 99)


def test_a_profile_of_another_processor_is_refused_unless_asked_for(tmp_path) -> None:
    path = tmp_path / "profile.json"
    elsewhere = this_machine("none").model_copy(update={"cpu": "Another CPU (family 1, model 2)"})
    profile(machine=elsewhere).save(path)
    with pytest.raises(BadProfile) as raised:
        Profile.load(path)
    assert "Another CPU" in str(raised.value.found)
    assert Profile.load(path, any_machine=True).machine.cpu == "Another CPU (family 1, model 2)"


def test_fewer_cores_or_instructions_are_another_machine_and_a_new_microcode_flag_is_not() -> None:
    here = this_machine("none")
    assert not here.fits(here.model_copy(update={"cores": here.cores + 2}))
    assert not here.fits(here.model_copy(update={"flags": tuple(f for f in here.flags if f not in ("avx2", "asimd"))}))
    assert here.fits(here.model_copy(update={"flags": (*here.flags, "a_mitigation")}))


def test_a_profile_of_another_shape_names_the_field() -> None:
    other = dataclasses.replace(SMALL, num_layers=SMALL.num_layers + 1)
    with pytest.raises(BadProfile) as raised:
        profile().check_shape(other)
    assert raised.value.where.endswith("num_layers")
    profile().check_shape(dataclasses.replace(SMALL, eos_token_ids=(7,)))


def test_a_profile_of_experts_is_none_of_a_dense_model_of_equal_sizes() -> None:
    found = profile()
    with_experts = found.model_copy(update={"shape": {**found.shape, "experts": {"num_experts": 8}}})
    with pytest.raises(BadProfile) as raised:
        with_experts.check_shape(SMALL)
    assert raised.value.where.endswith("experts")


def test_a_configuration_that_was_not_measured_names_those_that_were() -> None:
    with pytest.raises(BadProfile) as raised:
        profile().configuration(Pool(weight_dtype="int8"))
    assert "TP 1 x 1 threads bf16/bf16" in raised.value.allowed


def test_stages_and_parts_of_a_replica_are_measured_like_ranks() -> None:
    plain = profile().configurations[0]
    staged = plain.model_copy(update={"pipeline_parallel_size": 2})
    machine = this_machine("none").model_copy(update={"cores": 2})
    two = profile(machine=machine, configurations=(plain, staged))
    assert two.configuration(Pool(pipeline_parallel_size=2, replicas=3)) == staged
    assert staged.key.cores == 2
    with pytest.raises(BadProfile) as raised:
        two.configuration(Pool(context_parallel_size=2))
    assert raised.value.found == "no CP 2 x TP 1 x 1 threads bf16/bf16"


def test_replicas_beyond_the_cores_stand_on_further_machines() -> None:
    two_cores = profile(machine=this_machine("none").model_copy(update={"cores": 2}))
    with pytest.raises(BadProfile) as raised:
        two_cores.configuration(Pool(replicas=6))
    assert str(Key(1, 1, 2, "bf16", "bf16")) in str(raised.value.found)
    one_core = profile(machine=this_machine("none").model_copy(update={"cores": 1}))
    assert one_core.configuration(Pool(replicas=6)).replicas == 1


def test_a_number_of_replicas_that_was_not_measured_is_taken_as_the_next_larger_one() -> None:
    measured = four_cores(1, 2, 4)
    taken = [measured.configuration(Pool(replicas=n)).replicas for n in (1, 2, 3, 4, 5)]
    assert taken == [1, 2, 4, 4, 4]
    # never a smaller one, which would promise too much
    with pytest.raises(BadProfile):
        four_cores(1, 2).configuration(Pool(replicas=3))


@given(st.floats(1, 1e12))
def test_more_data_never_come_faster(size: float) -> None:
    peaks = Peaks(num_threads=1, flops_per_s={}, read_bytes=((1 << 18, 2e11), (1 << 22, 1e11), (1 << 26, 3e10)))
    assert peaks.bytes_per_s(size) >= peaks.bytes_per_s(2 * size)
    assert peaks.bytes_per_s(1) == 2e11
    assert peaks.bytes_per_s(1 << 22) == 1e11
    assert peaks.bytes_per_s(1 << 40) == 3e10


def test_a_dip_in_the_middle_does_not_bound_what_came_faster_from_further_away() -> None:
    peaks = Peaks(num_threads=1, flops_per_s={}, read_bytes=((1 << 18, 1e10), (1 << 22, 1e11)))
    assert peaks.bytes_per_s(1 << 18) == 1e11


def test_peaks_of_other_threads_are_refused() -> None:
    with pytest.raises(BadProfile):
        profile(peaks=(FAST,), configurations=()).peaks_of(7)
