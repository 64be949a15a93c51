"""The table of vendors' error codes with their likely causes and what a user can do.

CANN's own texts have a code, the place in its sources, and little else. Sources of the rows: the
CANN 8 and 9 error code reference (hiascend.com, Troubleshooting: EIxxxx and EJxxxx of HCCL, EE1001,
EL0004), rt_error_codes.h of CANN (107xxx, 207xxx, 507xxx), its table of aclnn return codes
(561003), and torch's own messages when memory is full.
"""

import re
from dataclasses import dataclass

from glm3cli.errors import DeviceError


@dataclass(frozen=True)
class Trouble:
    """A row of the table: a kind of error text, and what it means.

    Attributes:
        code: Regular expression that is found in the error text; its group, or else all of it, is
            the code that the user sees.
        cause: The most likely cause, as a clause.
        remedy: What the user can do, as a clause.
    """

    code: str
    cause: str
    remedy: str


def _number(codes: str) -> str:
    """Returns the regular expression for return codes given as `507014|507015`.

    Such a number counts only after a word like `code` or `ret`, since errors are full of numbers.
    """
    return rf"(?:code|result|ret)\D{{1,12}}((?:{codes}))\b"


_MEMORY = (
    "take a smaller --micro-batch-size or --recompute full, or spread the model over more --tp and "
    "--pp; --dry-run tells what a rank needs, and the vendor's tool (npu-smi info, nvidia-smi) "
    "whether something else is on the card"
)
_OPERATOR = (
    "run it again with ASCEND_LAUNCH_BLOCKING=1, which makes the raw text name the operator, and "
    "see `glm3 doctor` for versions that don't fit together"
)
_FIRST = "find the rank whose error came first in the logs of all machines: that one is the cause"
_HARDWARE = "see `npu-smi info` for the card's health, and the driver's log; another card may do"

# The order counts: a text may have several codes, and the first row that is found is reported.
TABLE = (
    Trouble(r"(?:CUDA|NPU) out of memory|OutOfMemoryError", "the device's memory is full", _MEMORY),
    Trouble(_number("207001"), "the device's memory is full", _MEMORY),
    Trouble(r"\bEL0004\b", "the device's memory is full", _MEMORY),
    Trouble(r"\bEI00(?:07|11)\b", "HCCL finds no memory for its buffers", _MEMORY),
    Trouble(
        r"lib(?:hccl|ascendcl|ascend_hal|ge_runner)\.so[^\n]*cannot open shared object file",
        "CANN's libraries are not on the path",
        "source CANN's set_env.sh (/usr/local/Ascend/ascend-toolkit/set_env.sh) in this shell and "
        "in the scripts that start the ranks",
    ),
    Trouble(
        r"\bEI0001\b",
        "an environment variable of HCCL has a value that it can't have",
        "the raw text names the variable and its range: mend it, or unset it",
    ),
    Trouble(
        r"\bEI00(?:04|14|17)\b",
        "the rank table file doesn't fit the ranks",
        "mend the file in RANK_TABLE_FILE; ranks that torchrun starts need none",
    ),
    Trouble(
        r"\bEI0005\b",
        "the ranks don't do the same collective: their arguments differ",
        "start the same command, of the same version of glm3, on every machine",
    ),
    Trouble(
        r"\bEI0008\b",
        "the machines have different versions of HCCL",
        "install the same CANN on every machine; `glm3 doctor` shows it",
    ),
    Trouble(
        r"\bEJ0001\b",
        "an earlier process still holds the card's communication",
        "end what `npu-smi info` shows of earlier runs, wait 10 s, and start again",
    ),
    Trouble(
        r"\bEJ0003\b|\bEI00(?:19|20)\b",
        "a port that HCCL needs is taken",
        "end what is left of earlier runs, or set HCCL_IF_BASE_PORT to the first of 16 free ports",
    ),
    Trouble(
        r"\bEI0006\b",
        "a rank did not connect in time: it has failed, hangs, or can't be reached",
        f"{_FIRST}; check the network between the NPUs with hccn_tool; HCCL_CONNECT_TIMEOUT (120 "
        "to 7200 s) gives slow ranks longer",
    ),
    Trouble(
        r"\bEI0002\b",
        "a rank waited in a collective for another one that did not come: it has failed, hangs, "
        "or is far behind",
        f"{_FIRST}; HCCL_EXEC_TIMEOUT (seconds) gives slow ranks longer",
    ),
    Trouble(
        r"\bEI0013\b",
        "the network between the NPUs (RoCE) has failed",
        "check the links with hccn_tool on both machines, then start again: it goes on from the "
        "last checkpoint",
    ),
    Trouble(
        _number("107020|507048"),
        "work on the card was not done in time, most often a collective that misses a rank",
        f"{_FIRST}; HCCL_EXEC_TIMEOUT (seconds) gives slow ranks longer",
    ),
    Trouble(
        rf"\bEE1002\b|{_number('507046')}",
        "work on the card was not done in time",
        f"{_FIRST}; check the network between the NPUs",
    ),
    Trouble(
        _number("107001"),
        "there is no card of this number",
        "start as many ranks on a machine as ASCEND_RT_VISIBLE_DEVICES and `npu-smi info` show",
    ),
    Trouble(
        _number("207004"), "no card is visible", "see `npu-smi info`, and what the container passes"
    ),
    Trouble(_number("507014|507015|507016"), "an operator failed on an AI Core", _OPERATOR),
    Trouble(_number("507034|507035|507036"), "an operator failed on a vector core", _OPERATOR),
    Trouble(_number("507017|507018"), "an operator failed on the AI CPU", _OPERATOR),
    Trouble(_number("507010"), "the card's task scheduler is silent", _HARDWARE),
    Trouble(_number("507899|507901"), "the card's driver has failed", _HARDWARE),
    Trouble(
        _number("561003"),
        "an operator has no kernel for this card",
        "install the kernels package of CANN for this card; `glm3 doctor` shows versions",
    ),
    Trouble(
        r"\bEI9999\b",
        "HCCL has failed, most often because a rank is missing or late",
        f"{_FIRST}; its number of ranks and HCCL_* settings must be the same on all machines",
    ),
    Trouble(r"\bE[ZE3]9999\b", "an operator or the runtime of CANN has failed", _OPERATOR),
    Trouble(
        r"\bEE1001\b",
        "CANN's runtime was called with something that it can't take, most often after an earlier "
        "error",
        f"look for an earlier error in the raw text; {_OPERATOR}",
    ),
)


def explain(text: str) -> DeviceError | None:
    """Returns an error with the cause and remedy for an accelerator's error text.

    None means that the text has no code of the table.
    """
    for trouble in TABLE:
        found = re.search(trouble.code, text)
        if found:
            code = found[1] if found.re.groups and found[1] else found[0].split(":")[0]
            return DeviceError(f"{trouble.cause} ({code})", trouble.remedy)
    return None
