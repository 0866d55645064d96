"""Which configurations of a machine are served live, and which live server of a profile another one replaces."""

import pytest

from paretune.profiler import machine
from paretune.profiler.calibration import with_serving
from paretune.profiler.machine import live_configurations
from paretune.profiler.measure import possible_configurations
from paretune.profiler.profile import BadProfile, Key

from .profiler_examples import serving, several_precisions

DTYPES = ("fp32", "bf16", "int8")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)


def test_every_weight_dtype_is_served_on_each_number_of_cores() -> None:
    found = live_configurations(possible_configurations(2, weight_dtypes=DTYPES))
    alone = [key.served_as for key in found if key.ranks == 1]
    assert sorted(alone) == sorted((cores, 1, dtype) for cores in (1, 2) for dtype in DTYPES)


def test_where_ranks_share_a_replica_one_weight_dtype_is_served_and_bf16_if_it_can_be() -> None:
    def sharded(*weight_dtypes: str) -> list[Key]:
        return [
            key for key in live_configurations(possible_configurations(2, weight_dtypes=weight_dtypes)) if key.ranks > 1
        ]

    assert sharded(*DTYPES) == [Key(2, 1, 1, "bf16", "bf16")]
    assert sharded("int8", "fp32") == [Key(2, 1, 1, "int8", "bf16")]


def test_one_replica_on_all_of_those_cores_is_served_whatever_the_weights() -> None:
    found = live_configurations(possible_configurations(2, weight_dtypes=DTYPES))
    assert {key[:3] for key in found} == {(1, 1, 1), (1, 2, 1), (2, 1, 1)}


def test_weights_that_were_not_profiled_are_not_served() -> None:
    found = live_configurations(possible_configurations(2, weight_dtypes=("int4",)))
    assert {key.weight_dtype for key in found} == {"int4"}


def test_more_cores_than_this_machine_has_are_not_served() -> None:
    assert live_configurations([Key(1, 4, 1, "bf16", "bf16"), Key(1, 2, 1, "int8", "bf16")]) == (
        Key(1, 2, 1, "int8", "bf16"),
    )


def live(weight_dtype: str, decode: float = 1.5):
    return serving(decode, measured_on=f"TP 1 x 1 threads {weight_dtype}/bf16")


def test_a_live_server_replaces_that_of_its_own_weights_alone() -> None:
    whole = several_precisions("bf16", "int8")
    for each in (live("int8"), live("bf16"), live("int8", 1.2)):
        whole = with_serving(whole, each)
    assert whole.serving == (live("bf16"), live("int8", 1.2))


def test_a_live_server_of_weights_that_were_not_profiled_is_refused() -> None:
    with pytest.raises(BadProfile, match="measured_on"):
        with_serving(several_precisions("bf16"), live("int8"))
