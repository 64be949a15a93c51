"""`serve`: `glm3 generate --serve`.

Nothing here imports torch before the settings, the keys and the address were checked.
"""

import importlib.util
import logging
import os
import signal
import socket
from collections.abc import Callable
from ipaddress import ip_address

from glm3cli.config.inference import GenerateConfig
from glm3cli.errors import ConfigError
from glm3cli.infer.defaults import with_defaults
from glm3cli.infer.opening import check_model, open_here
from glm3cli.infer.serve.keys import read_keys
from glm3cli.parallel.interrupts import accept
from glm3cli.parallel.launch import is_speaker

_PACKAGES = ("prometheus_client", "starlette", "uvicorn")
_STOPS = (signal.SIGTERM, signal.SIGINT)
# The seconds after --shutdown-timeout in which ranks end by themselves; then they hang.
_GRACE = 30
_BACKLOG = 2048

_log = logging.getLogger(__name__)


def serve(config: GenerateConfig, on_ready: Callable[[str], None]) -> None:
    """Answers OpenAI's API until SIGTERM or SIGINT comes.

    Args:
        config: The settings.
        on_ready: Called on rank 0 with the URL when requests are taken.

    Raises:
        Glm3Error: Any of its subclasses; message and hint say what is wrong, and what to do.
    """
    _check_installed()
    check_model(config)
    if _name(config) in config.adapters:
        raise ConfigError(
            f"--lora {_name(config)}=...: the model itself has this name",
            "give the adapter, or the model (--served-model-name), another one",
        )
    keys = read_keys(config.api_key_file) if config.api_key_file else []
    if is_speaker():
        _listen(*config.address).close()  # the port is taken again when the model is there
        _warn_of_strangers(config)
    config = with_defaults(config)
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(config.shutdown_timeout) + _GRACE)
    )
    model = open_here(config, answers=_STOPS)
    if model is None:
        return
    from glm3cli.device import require_active
    from glm3cli.infer.serve.work import Worker, follow, lead_copy
    from glm3cli.parallel.links import link_copies
    from glm3cli.parallel.orders import Orders

    with model:
        require_active().tune_memory_for_serving()
        model.engine.limit(config.max_batch_size)
        links = link_copies(model.engine.grid)
        if not is_speaker():
            for number in _STOPS:  # rank 0 says when it is over
                signal.signal(number, signal.SIG_IGN)
            accept(_STOPS)
            worker, ranks = Worker(model), Orders(model.engine.grid, of_copy=True)
            if links:
                lead_copy(worker, ranks, *links)
            else:
                follow(worker, ranks)
            return
        from glm3cli.infer.serve.app import Policy
        from glm3cli.infer.serve.protocol.answer import Served
        from glm3cli.infer.serve.server import Server

        models = [Served(_name(config)), *(Served(name, name) for name in config.adapters)]
        policy = Policy(
            tuple(models), tuple(keys), config.request_timeout, tuple(config.allow_origin)
        )
        listener = _listen(*config.address)
        Server(config, model, listener, policy, links).run(lambda: on_ready(_url(listener)))


def _name(config: GenerateConfig) -> str:
    """Returns what clients call the model without its adapters."""
    return config.served_model_name or config.model.resolve().name


def _check_installed() -> None:
    """Checks that what the extra `serve` installs is there, without importing it.

    Raises:
        ConfigError: It isn't.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--serve needs {', '.join(missing)}, which isn't installed",
            "pip install 'glm3[serve]'",
        )


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Raises:
        ConfigError: The address isn't this machine's, or is another program's.
    """
    try:
        *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        family = socket.AF_INET6 if ":" in str(address[0]) else socket.AF_INET
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
        # Connections inherit it: no part of a response waits until the one before has arrived.
        # asyncio sets it where a socket's protocol has the number of TCP, which here is 0.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise ConfigError(
            f"--serve {host}:{port}: {error.strerror or error}", "give another address"
        ) from None


def _warn_of_strangers(config: GenerateConfig) -> None:
    """Warns if other machines can ask, and nobody needs a key."""
    host, _ = config.address
    try:
        is_ours = ip_address(host).is_loopback
    except ValueError:
        is_ours = host == "localhost"
    if not is_ours and config.api_key_file is None:
        _log.warning(
            "warning: whoever reaches %s can ask; --api-key-file lets in those who have a key", host
        )


def _url(listener: socket.socket) -> str:
    """Returns the URL of a server."""
    host, port, *_ = listener.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
