"""Limits of this machine that end a program in the middle of its work, unless they are met before.

Processes talk through sockets, whose paths may have 107 bytes, and every socket is an open file.
"""

import os
import resource
import tempfile
from multiprocessing import util
from pathlib import Path

from glm3cli.errors import DeviceError

# A path of a socket (sun_path of sockaddr_un(7), with its closing zero) has so many bytes less one.
_SOCKET_PATH = 108
# What multiprocessing adds to the folder for temporary files: /pymp-12345678/listener-12345678.
_ADDED = len("/pymp-12345678/listener-12345678")
_SHORT_FOLDERS = ("/tmp", "/dev/shm", "/var/tmp")


def socket_folder() -> str:
    """Returns the folder in which this process makes its sockets, whose path is short enough.

    It is multiprocessing's own, in the folder for temporary files, or in another one where TMPDIR
    has a long path. This must be called before multiprocessing makes its first socket.

    Raises:
        DeviceError: No folder with a short path can be written to.
    """
    if _fits(tempfile.gettempdir()):
        return str(util.get_temp_dir())
    short = next((folder for folder in _SHORT_FOLDERS if _can_write(folder)), None)
    if short is None:
        raise DeviceError(
            f"TMPDIR {tempfile.gettempdir()} has too long a path for the sockets between processes",
            f"export TMPDIR with a path of at most {_SOCKET_PATH - 1 - _ADDED} bytes",
        )
    before = tempfile.tempdir
    tempfile.tempdir = short
    try:
        return str(util.get_temp_dir())
    finally:
        tempfile.tempdir = before


def _fits(folder: str) -> bool:
    """Returns whether multiprocessing's sockets can be in a folder."""
    return len(os.fsencode(folder)) + _ADDED < _SOCKET_PATH


def _can_write(folder: str) -> bool:
    """Returns whether this process can make files in a folder."""
    return Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)


def allow_open_files(number: int) -> None:
    """Lets this process and those that it starts open so many files at once.

    Raises:
        DeviceError: They may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= number:
        return
    if hard != unlimited and hard < number:
        raise DeviceError(
            f"this process may open {hard} files at once, and needs {number}, most of them sockets "
            "between processes",
            "raise the limit with `ulimit -n 4096`, or ask the machine's owner to",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
