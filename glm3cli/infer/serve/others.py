"""`Others`: the way from rank 0 to the first ranks of the other copies of the model, and back."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from threading import Lock, Thread
from typing import Any

from torch.distributed import DistBackendError

from glm3cli.infer.serve.copies import Put
from glm3cli.infer.serve.orders import Update
from glm3cli.infer.serve.work import Inbox


class Others:
    """The copies beside that of rank 0, which hears of them through connections.

    Attributes:
        puts: Give orders to the copies.
    """

    def __init__(self, links: Sequence[Connection]) -> None:
        """Takes the connections to their first ranks."""
        self._links = links
        self._threads: list[Thread] = []
        self._lock = Lock()
        self.puts: list[Put] = [partial(self._send, link) for link in links]

    def listen(self, on_updates: Callable[[list[Update]], None], inbox: Inbox) -> None:
        """Begins to hear what there is new.

        Args:
            on_updates: Called with it, in a thread for each copy.
            inbox: Fails if a copy has ended by itself.
        """

        def hear(link: Connection) -> None:
            try:
                while (updates := link.recv()) is not None:
                    on_updates(updates)
            except (EOFError, OSError):
                inbox.fail(DistBackendError("another copy of the model has ended"))

        self._threads = [Thread(target=hear, args=(link,), daemon=True) for link in self._links]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends their work before their next steps, and waits for it."""
        for link in self._links:
            self._send(link, None)
        for thread in self._threads:
            thread.join()

    def _send(self, link: Connection, message: Any) -> None:
        """Sends a message, or drops it if the copy has ended by itself."""
        with self._lock, suppress(OSError):
            link.send(message)
