"""Runs the Python program on stdin in this process, with limits and without a network.

It is started by its path with `python -I`, and imports the standard library alone.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

SECONDS = 10
_MEMORY = 2**30
_FILE_SIZE = 2**24
_PROCESSES = 256
# The architecture as seccomp has it, and the numbers of the system calls that reach a network:
# socket and io_uring_setup.
_REFUSED = {"x86_64": (0xC000003E, (41, 425)), "aarch64": (0xC00000B7, (198, 425))}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _EACCES = 0x7FFF0000, 0x0005000D
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of the filter's machine
_OTHER_NUMBERS = 0x40000000  # from here on x86_64 has second numbers for the same calls


class _Program(ctypes.Structure):
    """struct sock_fprog: the length of a filter, and its instructions."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def limit() -> None:
    """Limits the time, memory, files and processes of this process and of those that it starts."""
    for kind, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_FSIZE, _FILE_SIZE),
        (resource.RLIMIT_NPROC, _PROCESSES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def leave_network() -> None:
    """Has the kernel refuse sockets to this process and to those that it starts.

    Raises:
        OSError: It can't; this machine has no seccomp.
    """
    architecture, numbers = _REFUSED.get(platform.machine(), (0, ()))
    if not numbers:
        raise OSError(f"no system calls are known of {platform.machine()}")
    # An instruction is its code, how many to skip if it is true or not, and a number.
    steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 0, 2 + len(numbers), architecture), (_LOAD, 0, 0, 0)]
    steps.append((_IF_AT_LEAST, len(numbers), 0, _OTHER_NUMBERS))
    for left, number in zip(range(len(numbers) - 1, -1, -1), numbers, strict=True):
        steps.append((_IF_EQUAL, left, 0 if left else 1, number))
    steps += [(_RETURN, 0, 0, _EACCES), (_RETURN, 0, 0, _ALLOW)]
    filters = b"".join(struct.pack("HBBI", *one) for one in steps)
    program = _Program(len(steps), filters)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    text = sys.stdin.read()
    leave_network()
    limit()
    exec(compile(text, "program", "exec"), {"__name__": "__main__"})
