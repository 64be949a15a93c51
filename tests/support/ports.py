"""Ports for those who must be told one before anybody listens there.

A port that the system gives and that is let go again may be another's a moment later: every
outgoing connection and gloo's own listeners take theirs from the same range. The ports here lie
below the ranges of Linux (32768 and up) and gVisor (16000 and up).
"""

import itertools
import os
import socket

_FIRST, _LAST = 10_000, 16_000
# Two pytest workers with process numbers next to each other begin far apart.
_next = itertools.count(os.getpid() * 997)


def free_port() -> int:
    """A port of this machine that nobody listens on, another one at every call."""
    for number in itertools.islice(_next, _LAST - _FIRST):
        port = _FIRST + number % (_LAST - _FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"all ports from {_FIRST} to {_LAST} are taken")
