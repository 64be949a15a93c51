"""`Server`: rank 0's two threads, and what signals do to them."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import uvicorn

from glm3cli.config.inference import GenerateConfig
from glm3cli.errors import StoppedError
from glm3cli.host.signals import signals_read
from glm3cli.infer.model import Model
from glm3cli.infer.serve.app import Policy, Service
from glm3cli.infer.serve.copies import Copies
from glm3cli.infer.serve.orders import Update
from glm3cli.infer.serve.others import Others
from glm3cli.infer.serve.protocol.asked import Reader
from glm3cli.infer.serve.queries import Queries
from glm3cli.infer.serve.work import Inbox, Worker, lead
from glm3cli.parallel.interrupts import accept
from glm3cli.parallel.orders import Orders

STOPS = (signal.SIGTERM, signal.SIGINT)
# The seconds that the last responses have to reach their clients.
_LAST_WORDS = 3.0

_log = logging.getLogger(__name__)


class Server:
    """Serves a model from rank 0, which shares requests out among the copies of the model.

    The main thread works on the model, since devices are chosen by thread, and since signals reach
    it; the other one speaks HTTP.
    """

    def __init__(
        self,
        config: GenerateConfig,
        model: Model,
        listener: socket.socket,
        policy: Policy,
        links: Sequence[Connection],
    ) -> None:
        """Prepares a server.

        Args:
            config: The settings.
            model: The model on this rank.
            listener: The socket that is listened on.
            policy: What clients may do.
            links: The connections to the other copies of the model.
        """
        self._config = config
        self._model = model
        self._listener = listener
        self._policy = policy
        self._inbox = Inbox()
        self._others = Others(links)
        puts = [self._inbox.put, *self._others.puts]
        self._copies = Copies(puts, model.engine.capacity)
        self._http = threading.Thread(target=self._run_http, name="http")
        self._is_ready = threading.Event()

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serves until a signal comes; a second one doesn't wait for the answers that run.

        Args:
            on_ready: Called when requests are taken.

        Raises:
            StoppedError: A second signal has come.
        """
        ranks = Orders(self._model.engine.grid, of_copy=True)
        with signals_read(STOPS) as self._signals:
            self._http.start()
            self._is_ready.wait()
            accept(STOPS)
            try:
                self._others.listen(self._tell, self._inbox)
                on_ready()
                lead(Worker(self._model), ranks, self._inbox, self._tell)
            finally:
                self._others.close()
                self._loop.call_soon_threadsafe(self._has_worked.set)
                self._http.join()

    def _tell(self, updates: list[Update]) -> None:
        """Gives updates to the thread that speaks HTTP."""
        self._loop.call_soon_threadsafe(self._deliver, updates)

    def _deliver(self, updates: list[Update]) -> None:
        """Gives updates to those that wait for them."""
        self._copies.note(updates)
        self._service.queries.deliver(updates)

    def _hear_signals(self) -> None:
        """Begins to stop, or stops at once if that has begun."""
        for number in self._signals.recv(16):
            if number not in STOPS:
                continue
            if self._must_stop.is_set():
                message = "the server was stopped before its answers had ended"
                self._inbox.fail(StoppedError(message))
            self._must_stop.set()

    def _run_http(self) -> None:
        """Runs the thread that speaks HTTP."""
        try:
            asyncio.run(self._serve_http())
        finally:
            self._is_ready.set()
            self._inbox.close()

    async def _serve_http(self) -> None:
        """Answers requests until it is to stop, or the work has ended."""
        self._loop = asyncio.get_running_loop()
        self._must_stop, self._has_worked = asyncio.Event(), asyncio.Event()
        self._loop.add_reader(self._signals, self._hear_signals)
        config, engine = self._config, self._model.engine
        most = min(config.max_request_tokens or engine.model.seq_length, engine.model.seq_length)
        reader = Reader(self._model.tokenizer, config, engine.model.padded_vocab_size, most)
        room = engine.capacity * len(self._copies.loads)
        queries = Queries(self._copies.put, room, config.max_queue)
        self._service = Service(reader, queries, self._policy)
        self._service.metrics.watch(self._copies.loads)
        server = uvicorn.Server(
            uvicorn.Config(
                self._service.app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(_LAST_WORDS),
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        self._is_ready.set()
        await self._wait_for_end(queries)
        server.should_exit = True
        await serving
        self._inbox.close()
        await self._has_worked.wait()

    async def _wait_for_end(self, queries: Queries) -> None:
        """Waits until the server is to stop, and all answers have ended or were given up."""
        stop = asyncio.create_task(self._must_stop.wait())
        end = asyncio.create_task(self._has_worked.wait())
        await asyncio.wait({stop, end}, return_when=asyncio.FIRST_COMPLETED)
        queries.is_stopping = True
        if not end.done():
            if not queries.idle.is_set():
                _log.warning("finishing %d answers", queries.num_running + queries.num_waiting)
            idle = asyncio.create_task(queries.idle.wait())
            await asyncio.wait(
                {idle, end},
                timeout=self._config.shutdown_timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            idle.cancel()
        queries.give_up("the server stops")
        stop.cancel()
        end.cancel()
