"""Error texts of accelerators that users have reported, and the causes that are found in them."""

import re
import sys
from typing import Any

import pytest
import torch

from glm3cli.cli import app
from glm3cli.device.doctor.codes import TABLE, explain
from glm3cli.errors import DeviceError

# One text or more for each row, in the table's order: what is in it, and a word of the sentence.
TEXTS = {
    "OutOfMemoryError: NPU out of memory. Tried to allocate 72.00 MiB (NPU 0; 61.27 GiB total)": (
        0,
        "memory is full (OutOfMemoryError)",
    ),
    "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB": (0, "memory is full"),
    "NPU function error: aclrtMalloc, error code is 207001": (1, "memory is full (207001)"),
    "Memory_Allocation_Failure(EL0004): Failed to allocate memory requested by GE module.": (
        2,
        "memory is full (EL0004)",
    ),
    "EI0007: 2025-01-01-00:00:00 Failed to allocate resource[Memory]": (3, "(EI0007)"),
    "Resource_Error_Insufficient_Device_Memory(EI0011): no memory": (3, "(EI0011)"),
    "ImportError: libhccl.so: cannot open shared object file: No such file or directory": (
        4,
        "CANN's libraries are not on the path (libhccl.so)",
    ),
    "libascendcl.so: cannot open shared object file": (4, "(libascendcl.so)"),
    "EI0001: Environment variable [HCCL_CONNECT_TIMEOUT] is invalid. Reason: out of range": (
        5,
        "environment variable of HCCL",
    ),
    "EI0004: The ranktable or rank is invalid": (6, "rank table"),
    "EI0005: The arguments for collective communication are inconsistent between ranks": (
        7,
        "their arguments differ",
    ),
    "EI0008: The HCCL versions are inconsistent.": (8, "different versions of HCCL"),
    "EJ0001: 2024-05-21 Failed to initialize the HCCP process. Reason: Maybe the last training "
    "process is running.": (9, "earlier process"),
    "Communication_Error_Bind_IP_Port(EJ0003): Failed to bind the IP port.": (10, "port"),
    "EI0006: [PID: 176930] Getting socket times out. Reason: Remote Rank did not send the data in "
    "time.": (11, "did not connect in time"),
    "error code is 507048\n[Error]: The execution of the internal task times out.\nEI0002: [PID: "
    "13075] The wait execution of the Notify register times out.": (12, "(EI0002)"),
    "EI0013: An error CQE was reported": (13, "RoCE"),
    "AclrtSynchronizeDeviceWithTimeout, error code is 107020\nEH9999: Inner Error!": (
        14,
        "misses a rank (107020)",
    ),
    "wait for compute device to finish failed, runtime result = 507046.": (15, "(507046)"),
    "EE1002: Stream synchronize timeout.": (15, "(EE1002)"),
    "aclrtSetDevice(device), error code is 107001": (16, "no card of this number (107001)"),
    "aclInit failed, error code is 207004": (17, "no card is visible"),
    "Sync:torch_npu/csrc/framework/OpCommand.cpp:190 NPU error, error code is 507015\nEZ9999: "
    "Inner Error!": (18, "AI Core (507015)"),
    "AclrtSynchronizeStreamWithTimeout(copy_stream), error code is 507035\nThe vector core "
    "execution is abnormal.": (19, "vector core (507035)"),
    "rtStreamSynchronize failed, ret: 507018": (20, "AI CPU"),
    "NPU error, error code is 507010": (21, "task scheduler"),
    "NPU error, error code is 507899": (22, "driver"),
    "call aclnnFoo failed, error code is 561003": (23, "no kernel"),
    "EI9999: Inner Error!\nhccl fftsplus task timeout occurred": (24, "HCCL has failed"),
    "EZ9999: Inner Error!": (25, "(EZ9999)"),
    "E39999: Inner Error!": (25, "(E39999)"),
    "EE1001: The argument is invalid.Reason: rtGetDevMsg execute failed, reason=[context pointer "
    "null]": (26, "(EE1001)"),
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:24])
def test_every_code_becomes_a_cause_and_a_remedy(text: str) -> None:
    row, sentence = TEXTS[text]
    error = explain(f"first line\n{text}\n  TraceBack (most recent call last)")
    assert error is not None
    assert sentence in error.message
    assert (error.hint, error.exit_code) == (TABLE[row].remedy, 4)


def test_every_row_is_tested() -> None:
    assert {row for row, _ in TEXTS.values()} == set(range(len(TABLE)))


@pytest.mark.parametrize(
    "text",
    [
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "tried to allocate 207001 bytes at 0x507015",
        "shape '[507015, 2]' is invalid for input of size 107020",
        "PRE10001 is no code, and neither is XEI0006",
    ],
)
def test_other_errors_are_left_alone(text: str) -> None:
    assert explain(text) is None


def test_torchs_own_class_says_it_without_words() -> None:
    error = torch.OutOfMemoryError("72 MiB")
    assert app._explained(error) is not None


def end_with(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(app, "app", fail)
    monkeypatch.delenv("RANK", raising=False)
    app.main()


def test_the_program_ends_with_the_sentence_and_the_raw_text_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = "HCCL error in: ProcessGroupHCCL.cpp:64\nEI0006: Getting socket times out."
    with pytest.raises(SystemExit) as ended:
        end_with(RuntimeError(raw), monkeypatch)
    assert ended.value.code == DeviceError.exit_code == 4
    told = capsys.readouterr().err
    assert re.match(r"error: a rank did not connect in time.*\(EI0006\)\nhint: find the", told)
    assert raw in told.split("Traceback")[1]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="ours"):
        end_with(RuntimeError("a bug of ours"), monkeypatch)
    without: dict[str, Any] = {name: m for name, m in sys.modules.items() if name != "torch"}
    monkeypatch.setattr(sys, "modules", without)
    assert app._explained(RuntimeError("EI0006")) is None
