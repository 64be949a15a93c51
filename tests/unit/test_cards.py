"""The checks of NPUs, of who may use them, and of their network, on made-up machines."""

import os
from dataclasses import replace

import pytest

from glm3cli.device.doctor.cards import (
    cards,
    check_cards,
    num_local_ranks,
    num_visible,
    require_cards,
)
from glm3cli.device.doctor.machine import Finding
from glm3cli.errors import ConfigError, DeviceError
from tests.support.machines import FakeMachine, laptop, server, set_pci, with_environment


def find(machine: FakeMachine, subject: str) -> Finding:
    return {finding.subject: finding for finding in check_cards(machine)}[subject]


def test_all_is_well_on_a_server(tmp_path):
    machine = server(tmp_path)
    assert cards(machine) == list(range(8))
    assert {finding.verdict for finding in check_cards(machine)} == {"ok"}
    assert find(machine, "npu").found == "8 card(s)"
    assert find(machine, "npu-smi").found == str(tmp_path / "bin/npu-smi")
    require_cards(machine)


def test_without_a_card_nothing_starts(tmp_path):
    machine = laptop(tmp_path)
    found = find(machine, "npu")
    assert (found.found, found.verdict) == ("no card", "wrong")
    assert "npu-smi info" in found.advice
    with pytest.raises(DeviceError, match=r"no NPU \(/dev/davinci\*\)"):
        require_cards(machine)


def test_a_container_needs_the_devices_beside_the_cards(tmp_path):
    machine = server(tmp_path)
    machine.file("/dev/hisi_hdc").unlink()
    machine.file("/dev/devmm_svm").unlink()
    with pytest.raises(DeviceError, match="NPUs are here, but not /dev/devmm_svm /dev/hisi_hdc"):
        require_cards(machine)
    assert "--device /dev/devmm_svm --device /dev/hisi_hdc" in find(machine, "npu").advice


@pytest.mark.parametrize(
    ("told", "visible"),
    [
        (None, 8),
        ("0", 1),
        ("1,2,3", 3),
        ("4,5,6,7", 4),
        ("1, 2,3", 1),  # CANN's own example: a space ends the list
        ("1,3,8", 2),  # and this one: a number that isn't there
        ("1,2,-1,3", 2),
        ("3,2,1", 1),
        ("0,0", 1),
        ("0-3", 0),
        ("", 0),
    ],
)
def test_visible_cards_are_counted_as_cann_does(told, visible, tmp_path):
    machine = server(tmp_path)
    if told is not None:
        machine = with_environment(machine, ASCEND_RT_VISIBLE_DEVICES=told)
    assert num_visible(machine) == visible
    whole = told is None or visible == len(told.split(","))
    assert find(machine, "visible").verdict == ("ok" if whole else "wrong")
    assert whole or f"read up to its first {visible} number" in find(machine, "visible").why


def test_cards_of_a_container_are_counted_from_0(tmp_path):
    machine = server(tmp_path)
    for number in range(4):
        machine.file(f"/dev/davinci{number}").unlink()
    assert cards(machine) == [4, 5, 6, 7]
    assert num_visible(with_environment(machine, ASCEND_RT_VISIBLE_DEVICES="0,1,2,3")) == 4
    assert num_visible(with_environment(machine, ASCEND_RT_VISIBLE_DEVICES="4,5,6,7")) == 0


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, 8),
        ({"LOCAL_RANK": "3"}, 4),  # of a launcher that tells no more
        ({"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": " "}, 1),
    ],
)
def test_ranks_are_those_of_this_machine(environment, ranks):
    assert num_local_ranks(environment) == ranks


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="LOCAL_RANK=first in the environment is no whole number"):
        num_local_ranks({"LOCAL_RANK": "first"})


def test_more_ranks_than_visible_cards_are_refused(tmp_path):
    machine = with_environment(
        server(tmp_path),
        LOCAL_WORLD_SIZE="8",
        LOCAL_RANK="0",
        WORLD_SIZE="16",
        ASCEND_RT_VISIBLE_DEVICES="0,1,2,3",
    )
    found = find(machine, "local ranks")
    assert (found.found, found.verdict) == ("8 on 4 NPU(s)", "wrong")
    with pytest.raises(DeviceError) as caught:
        require_cards(machine)
    assert caught.value.message == (
        "--device npu: 8 rank(s) on this machine, but 4 visible NPU(s) "
        "(ASCEND_RT_VISIBLE_DEVICES=0,1,2,3)"
    )
    assert "--nproc_per_node" in caught.value.hint
    require_cards(with_environment(machine, LOCAL_WORLD_SIZE="4"))
    require_cards(machine, num_ranks=4)
    with pytest.raises(DeviceError, match=r"5 rank\(s\) on this machine, but 4 visible"):
        require_cards(machine, num_ranks=5)


@pytest.mark.parametrize(
    ("told", "cards_here", "verdict"),
    [
        ("0-7", 8, "ok"),
        ("0-7", 4, "wrong"),
        ("0,1,5-6", 4, "ok"),
        ("0,1,5-6", 3, "wrong"),
        ("Ascend910-0,Ascend910-1", 1, "wrong"),
        ("Ascend910-0,Ascend910-1", 2, "ok"),
        ("void", 1, "ok"),
    ],
)
def test_a_container_has_the_cards_it_was_told(told, cards_here, verdict, tmp_path):
    machine = with_environment(server(tmp_path, cards_here), ASCEND_VISIBLE_DEVICES=told)
    found = find(machine, "container")
    assert (found.found, found.verdict) == (f"ASCEND_VISIBLE_DEVICES={told}", verdict)
    assert ("--runtime ascend" in found.advice) == (verdict == "wrong")


def test_a_user_outside_the_group_is_told_to_join_it(tmp_path):
    machine = server(tmp_path, num_cards=2)
    for number in range(2):
        machine.file(f"/dev/davinci{number}").chmod(0o660)
    about = machine.file("/dev/davinci0").stat()
    group = frozenset({about.st_gid})
    outsider = replace(machine, uid=os.getuid() + 1, groups=frozenset({-1}))
    with pytest.raises(DeviceError, match="may not open /dev/davinci0, /dev/davinci1") as caught:
        require_cards(outsider)
    assert "usermod -aG HwHiAiUser" in caught.value.hint
    assert find(outsider, "permission").found == "2 device(s) closed"
    require_cards(replace(outsider, groups=group))
    require_cards(replace(outsider, uid=about.st_uid))
    require_cards(replace(outsider, uid=0))
    machine.file("/dev/davinci1").chmod(0o640)
    with pytest.raises(DeviceError, match=r"may not open /dev/davinci1$"):
        require_cards(replace(outsider, groups=group))


def test_the_devices_beside_the_cards_must_open_too(tmp_path):
    machine = replace(server(tmp_path), uid=os.getuid() + 1, groups=frozenset({-1}))
    machine.file("/dev/davinci_manager").chmod(0o660)
    with pytest.raises(DeviceError, match=r"may not open /dev/davinci_manager$"):
        require_cards(machine)


def test_npu_smi_may_be_missing(tmp_path):
    machine = server(tmp_path)
    (tmp_path / "bin/npu-smi").unlink()
    assert find(machine, "npu-smi").verdict == "absent"


def test_hccls_settings_are_shown(tmp_path):
    machine = with_environment(
        server(tmp_path), HCCL_IF_BASE_PORT="50000", HCCL_EXEC_TIMEOUT="3600"
    )
    assert find(machine, "HCCL_IF_BASE_PORT") == Finding("HCCL_IF_BASE_PORT", "50000")
    assert find(machine, "HCCL_EXEC_TIMEOUT").found == "3600"


@pytest.mark.parametrize(
    ("value", "verdict"),
    [("120", "ok"), ("7200", "ok"), ("119", "wrong"), ("7201", "wrong"), ("20m", "wrong")],
)
def test_hccls_timeout_has_limits(value, verdict, tmp_path):
    machine = with_environment(server(tmp_path), HCCL_CONNECT_TIMEOUT=value)
    assert find(machine, "HCCL_CONNECT_TIMEOUT").verdict == verdict


@pytest.mark.parametrize(
    ("value", "verdict"),
    [
        ("eth0", "ok"),
        ("eth", "ok"),
        ("=eth0", "ok"),
        ("=eth", "wrong"),
        ("bond,enp", "ok"),
        ("bond0", "wrong"),
        ("^lo", "ok"),
        ("^lo,eth,enp", "wrong"),
        ("^=lo,eth0,enp67s0f5", "wrong"),
    ],
)
def test_hccls_network_card_is_here(value, verdict, tmp_path):
    found = find(with_environment(server(tmp_path), HCCL_SOCKET_IFNAME=value), "HCCL_SOCKET_IFNAME")
    assert (found.found, found.verdict) == (value, verdict)
    assert verdict == "ok" or "enp67s0f5, eth0, lo" in found.why


@pytest.mark.parametrize(
    ("device", "verdict", "found"),
    [
        ("0xd801", "wrong", "Ascend 910A"),
        ("0xd802", "ok", "Ascend 910B"),
        ("0xd803", "ok", "Ascend 910C"),
        ("0xd500", "absent", "unknown"),
    ],
)
def test_an_npu_without_the_operators_is_refused(device, verdict, found, tmp_path):
    machine = server(tmp_path, num_cards=1)
    set_pci(machine, 0, device)
    chip = {finding.subject: finding for finding in check_cards(machine)}["chip"]
    assert (chip.verdict, chip.found) == (verdict, found)
    if verdict != "wrong":
        require_cards(machine)
        return
    with pytest.raises(DeviceError, match="has no bf16 and no fused attention"):
        require_cards(machine)
