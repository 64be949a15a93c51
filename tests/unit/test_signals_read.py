"""Signals that another thread than the main one answers."""

import os
import select
import signal
import threading

from glm3cli.host.signals import signals_read


def test_signals_arrive_though_the_main_thread_does_not_see_them() -> None:
    found = b""
    before = signal.getsignal(signal.SIGUSR2)
    with signals_read([signal.SIGUSR2]) as reader:
        thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR2))
        thread.start()
        thread.join()
        assert select.select([reader], [], [], 10)[0]
        found = reader.recv(16)
    assert list(found) == [signal.SIGUSR2]
    assert signal.getsignal(signal.SIGUSR2) == before
    assert signal.set_wakeup_fd(-1) == -1
