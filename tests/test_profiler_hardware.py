"""The catalog and the price book: facts with a source and a date, and nothing else."""

from datetime import date

import pytest

from paretune.profiler.collectives import collective_bound_s, latency_unknown
from paretune.profiler.hardware import BadHardware, accelerator, accelerators

NEEDED = (
    *("A100", "H100", "H200", "B200", "GB200", "L40S", "L4", "A10G", "RTX PRO 6000", "MI300X", "MI325X"),
    *("Gaudi 2", "Gaudi 3", "TPU v5e", "TPU v6e", "cpu"),
)
CATALOGED = [name for name in NEEDED if name != "cpu"]


def test_the_catalog_has_what_people_rent() -> None:
    assert set(NEEDED) <= set(accelerators())


def test_peaks_are_those_of_the_data_sheets() -> None:
    # NVIDIA H100 SXM5 data sheet: 989.4 TFLOP/s bf16 and 1978.9 fp8, dense; 3.35 TB/s; nvidia-smi: 81559 MiB
    h100 = accelerator("H100")
    assert h100.flops_per_s("bf16") == pytest.approx(989.4e12, rel=1e-3)
    assert h100.flops_per_s("fp8") == pytest.approx(1978.9e12, rel=1e-3)
    assert (h100.peak_bytes_per_s, h100.memory_bytes) == (3.35e12, 81559 * 2**20)


@pytest.mark.parametrize("name", CATALOGED)
def test_every_accelerator_has_a_source_a_date_and_rates_that_make_sense(name: str) -> None:
    found = accelerator(name)
    assert {"memory_bytes", "memory_gbps"} <= set(found.sources)
    for source, as_of in [*found.sources.values(), *((link.source, link.as_of) for link in found.levels)]:
        assert len(source) > 10
        assert date.fromisoformat(as_of) <= date.today()
    assert found.as_of == min(as_of for _, as_of in found.sources.values())
    assert 1e11 < found.peak_bytes_per_s < 1e13
    assert all(1e13 < rate <= 1e16 for rate in found.peak_flops_per_s.values())
    assert found.peak_flops_per_s.get("fp8", 1e16) >= found.peak_flops_per_s.get("bf16", 0)


def test_this_machine_has_no_invented_rates() -> None:
    cpu = accelerator("cpu")
    assert cpu.peak_flops_per_s == {}
    with pytest.raises(BadHardware) as raised:
        cpu.flops_per_s("bf16")
    assert "paretune profile" in raised.value.todo
    assert raised.value.exit_code == 2


def test_a_missing_rate_is_refused_not_replaced() -> None:
    with pytest.raises(BadHardware):
        accelerator("A100").flops_per_s("fp8")
    with pytest.raises(BadHardware):
        accelerator("A10G").flops_per_s("bf16")


@pytest.mark.parametrize("spelled", ["rtx-pro-6000", "RTX_PRO_6000", "rtxpro6000"])
def test_names_are_found_however_they_are_spelled(spelled: str) -> None:
    assert accelerator(spelled).name == "RTX PRO 6000"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(BadHardware) as raised:
        accelerator("H1000")
    assert "H100" in raised.value.allowed


@pytest.mark.parametrize("name", CATALOGED)
def test_half_the_bits_are_twice_the_rate(name: str) -> None:
    peaks = accelerator(name).peak_flops_per_s
    for wide, narrow in (("bf16", "fp8"), ("bf16", "int8"), ("fp8", "fp4")):
        if wide in peaks and narrow in peaks and (name, narrow) != ("Gaudi 3", "fp8"):
            # data sheets round: 2615 of MI300X is twice 1307.4
            assert peaks[narrow] == pytest.approx(2 * peaks[wide], rel=0.015)


def test_fp8_of_gaudi_3_is_as_fast_as_bf16_which_its_source_says() -> None:
    gaudi = accelerator("Gaudi 3")
    assert gaudi.flops_per_s("fp8") == gaudi.flops_per_s("bf16")
    assert "as fast as bf16" in gaudi.sources["fp8_tflops"][0]


def test_dense_layers_of_h100_cross_from_bandwidth_to_compute_at_295_tokens_in_bf16() -> None:
    # 2 FLOPs against 2 bytes a weight: as many tokens as FLOP/s per B/s
    h100 = accelerator("H100")
    assert h100.flops_per_s("bf16") / h100.peak_bytes_per_s == pytest.approx(295, abs=0.5)


def test_a_group_fills_its_domain_before_it_goes_over_the_network() -> None:
    def sizes(name: str, devices: int) -> list[int]:
        return [size for _, size in accelerator(name).spans(devices)]

    assert [sizes("H100", n) for n in (1, 8, 16, 64)] == [[], [8], [8, 2], [8, 8]]
    assert [sizes("GB200", n) for n in (64, 72, 144)] == [[64], [72], [72, 2]]
    assert sizes("TPU v5e", 256) == [256]


def test_a_group_that_no_known_link_joins_is_refused() -> None:
    with pytest.raises(BadHardware) as raised:
        accelerator("TPU v6e").spans(257)
    assert raised.value.allowed == "at most 256"
    with pytest.raises(BadHardware):
        accelerator("cpu").spans(2)


def test_an_all_reduce_takes_the_ring_formula_on_a100() -> None:
    # 2 * 7 / 8 * 1 GB over 300 GB/s, and the latency of one message
    found = collective_bound_s("all_reduce", accelerator("A100"), 8, 1e9)
    assert found == pytest.approx(2 * 7 / 8 * 1e9 / 300e9 + 3.8e-6)
    assert collective_bound_s("all_reduce", accelerator("A100"), 1, 1e9) == 0.0


def test_where_the_switch_adds_up_an_all_reduce_sends_once() -> None:
    # aiconfigurator measured 469 GB/s by the ring's formula on 8 of H100, more than its links carry
    found = collective_bound_s("all_reduce", accelerator("H100"), 8, 1e9)
    assert 2 * 7 / 8 * 1e9 / 469e9 > found > 1e9 / 450e9


def test_two_of_a_mesh_have_one_pair_of_wires() -> None:
    # 7 x 64 GB/s: two devices share one of the seven
    two, eight = (collective_bound_s("all_gather", accelerator("MI300X"), n, 1e9) for n in (2, 8))
    assert two == pytest.approx(0.5 * 1e9 / 64e9)
    assert eight == pytest.approx(7 / 8 * 1e9 / 448e9)


def test_the_network_bounds_a_group_of_two_domains_by_the_share_that_is_left_of_the_message() -> None:
    h100 = accelerator("H100")
    within = collective_bound_s("all_reduce", h100, 8, 1e9)
    across = collective_bound_s("all_reduce", h100, 16, 1e9)
    # 8 devices carry an eighth each over 50 GB/s, ring of two: as long as the message over 400 GB/s
    assert across == pytest.approx(1e9 / 8 / 50e9 + 2.4e-6 + 5e-6)
    assert across > within
    # of an all-to-all half goes over the network, undivided
    assert collective_bound_s("all_to_all", h100, 16, 1e9) == pytest.approx(0.5e9 / 50e9 + 2.4e-6 + 5e-6)


@pytest.mark.parametrize("name", CATALOGED)
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"])
def test_more_bytes_and_more_messages_never_take_less(name: str, collective: str) -> None:
    device = accelerator(name)
    for devices in (2, 4, 8):
        times = [collective_bound_s(collective, device, devices, size) for size in (1e3, 1e6, 1e9)]
        assert 0 < times[0] < times[1] < times[2]
        assert collective_bound_s(collective, device, devices, 1e6, 3) >= times[1]


def test_links_whose_latency_nobody_gives_are_named() -> None:
    assert latency_unknown(accelerator("MI300X"), 8) == ("Infinity Fabric",)
    assert latency_unknown(accelerator("H100"), 16) == ()
