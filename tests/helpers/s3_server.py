"""A real S3-compatible server on loopback behind a proxy that can be killed, revived and made unreliable."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator

BUCKET = "bucket"

_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")


def impatient(*command: str) -> None:
    """`redpen COMMAND`, which waits seconds for a server that is gone, not minutes."""
    from cache_schema import s3
    from pipeline.cli import main

    s3.RETRY_SECONDS, s3.PATIENCE_SECONDS = 4, 2
    sys.exit(main(list(command)))


class Proxy:
    """Passes TCP connections on to `target`.

    Attributes:
        requests: method and path of each, as `GET /bucket/key`.
        watch: called with each before it is passed on.
        latency_seconds: added to each.
        reset_fraction: share of requests at which the connection is cut, half of them after the server did its work.
    """

    def __init__(self, target: int):
        self.target, self.requests = target, list[str]()
        self.latency_seconds, self.reset_fraction = 0.0, 0.0
        self.watch: Callable[[str], object] = lambda request: None
        self._rng, self._open = random.Random(0), set[socket.socket]()
        self._port = 0
        self.revive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def revive(self) -> None:
        self.alive = True
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def kill(self) -> None:
        """Refuse new connections and cut those that are open, as a machine that goes away does."""
        self.alive = False
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            _cut(connection)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.target))
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                doomed = threading.Event()
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(
                        target=self._pass, args=(source, sink, source is client, doomed), daemon=True
                    ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, asks: bool, doomed: threading.Event) -> None:
        self._open.add(source)
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if asks and (request := _REQUEST.match(data)):
                    self.requests.append(b" ".join(request.groups()).decode())
                    self.watch(self.requests[-1])
                    if not self.alive:
                        break
                    time.sleep(self.latency_seconds)
                    if self._rng.random() < self.reset_fraction:
                        if self._rng.random() < 0.5:
                            break
                        doomed.set()
                elif not asks and doomed.is_set():
                    sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        for end in (source, sink):
            _cut(end)
        self._open.discard(source)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # a reset, not a goodbye
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextlib.contextmanager
def serving() -> Iterator[Proxy]:
    """A server with one empty bucket behind a proxy, and the AWS_* variables that lead there."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(urllib.request.Request(f"http://{host}:{port}/{BUCKET}", method="PUT")).close()
    proxy = Proxy(port)
    variables = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield proxy
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        with contextlib.suppress(OSError):
            proxy.kill()
        server.stop()
