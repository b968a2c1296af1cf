"""Caches on S3, against a real server on loopback behind a proxy that dies, lies and drops connections."""

from __future__ import annotations

import http.server
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

import cache_schema as cs
from cache_schema import locks, s3, stores
from helpers import cache_factory as factory
from helpers import preloaded, s3_server
from helpers.caches import SMALL, make_cache, small_recipe
from pipeline import cli

pytest.importorskip("obstore")
pytest.importorskip("moto")

ROOT = Path(__file__).parent.parent
RETRY_SECONDS, PATIENCE_SECONDS = 2.0, 0.7
SETTINGS = (*SMALL, "prompts.limit=12", "train.steps=2")  # three blocks
OPTIONS = [part for setting in SETTINGS for part in ("--set", setting)]

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[s3_server.Proxy]:
    with s3_server.serving() as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def proxy(server: s3_server.Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.Proxy]:
    """The proxy in good order, and a client that gives up soon."""
    monkeypatch.setattr(s3, "RETRY_SECONDS", RETRY_SECONDS)
    monkeypatch.setattr(s3, "PATIENCE_SECONDS", PATIENCE_SECONDS)
    server.requests.clear()
    yield server
    server.watch, server.latency_seconds, server.reset_fraction = lambda request: None, 0.0, 0.0
    if not server.alive:
        server.revive()


@pytest.fixture
def url() -> str:
    return f"s3://{s3_server.BUCKET}/tests/{next(_numbers)} \u00e9/c.zarr"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("local") / "c.zarr", small_recipe(*SETTINGS))


def assert_same_rounds(a: cs.Round, b: cs.Round) -> None:
    """The decoded arrays of `a`, all committed, are those of `b`, and so are the commits, times aside."""
    assert a.scorer_names() == b.scorer_names() and a.manifest == b.manifest
    for left, right in zip(groups(a), groups(b), strict=True):
        assert left.committed().all()
        names = [name for name in left.commits().dtype.names if name not in cs.TIME_FIELDS]
        assert (left.commits()[names] == right.commits()[names]).all()
        for block in range(left.n_blocks):
            x, y = left.read(block), right.read(block)
            for field in fields(x):
                np.testing.assert_array_equal(getattr(x, field.name), getattr(y, field.name), err_msg=field.name)


def groups(round_: cs.Round) -> list[cs.BlockGroup]:
    return [round_.rollouts, *(round_.scores(name) for name in round_.scorer_names())]


def run(*args: str) -> preloaded.Process:
    """The command in a process of its own, less patient than it is, but with a busy machine."""
    return preloaded.Process(s3_server.impatient, *args)


# ------------------------------------------------------------------------------------------------------- what is kept


def test_round_trip(url: str) -> None:
    factory.filled(url, n_prompts=6, topk=3)
    here = factory.filled(MemoryStore(), n_prompts=6, topk=3)
    there = cs.open(url)
    assert_same_rounds(there.round(), here.round())
    assert [there.round().prompts[i] for i in range(6)] == factory.prompts(6)
    assert list(cs.verify(there)) == []
    assert cs.open(url + "/").url == url + "/" and there.path is None


def test_damage_is_found_and_repaired(url: str) -> None:
    import obstore

    cache = factory.filled(url, n_prompts=5)
    teacher, store = cache.round().scores("teacher"), cache._store
    good = teacher.read(1)
    assert isinstance(store, s3.S3Store)
    shard = "rounds/00000/scores/teacher/logprobs/c/1/0"
    whole = bytes(obstore.get(store.store, shard).bytes())
    for left in (None, b"", whole[: len(whole) // 2]):
        obstore.delete(store.store, shard) if left is None else obstore.put(store.store, shard, left)
        findings = list(cs.verify(cache))
        assert [(f.group, f.block, f.array) for f in findings] == [("scores/teacher", 1, "logprobs")]
        assert cs.repair(cache, findings) == 1
        assert teacher.committed().tolist() == [True, False]
        teacher.write(1, good)
    assert list(cs.verify(cs.open(url))) == []


def test_a_whole_run_over_a_bad_line_equals_a_local_one(
    proxy: s3_server.Proxy,
    local: Path,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One request in twenty loses its connection, before or after the server did what it was asked."""
    secret = "not-to-be-found-anywhere"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    proxy.reset_fraction = 0.05
    make_cache(url, small_recipe(*SETTINGS))  # type: ignore[arg-type]
    for where in (url, str(local)):
        run_dir = tmp_path / where.partition(":")[0].strip("/")
        assert cli.main(["train", "toy", "--cache", where, "--run", str(run_dir), *OPTIONS]) == 0
    assert cli.main(["verify", url]) == 0
    proxy.reset_fraction = 0.0
    assert_same_rounds(cs.open(url).round(), cs.open(local).round())
    adapters = [path.read_bytes() for path in sorted(tmp_path.rglob("adapter_model.safetensors"))]
    assert len(adapters) >= 2 and len(set(adapters)) == 1

    capsys.readouterr()
    assert cli.main(["inspect", url, "--json"]) == 0
    there = capsys.readouterr().out
    assert cli.main(["inspect", str(local), "--json"]) == 0
    here = capsys.readouterr().out
    assert misplaced_tensors(there) == misplaced_tensors(here)

    store = cs.open(url)._store
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for key in stores._listed_keys(store.list_prefix("")):
        found = sync(store.get(key, default_buffer_prototype()))
        assert found is not None
        kept += found.to_bytes()
    assert secret.encode() not in kept and b"127.0.0.1" not in kept


def misplaced_tensors(inspected: str) -> str:
    """What does not depend on where and when."""
    return re.sub(r'"(cache|url|bytes|\w*seconds\w*|\w+_per_second)": [^\n]*', "", inspected)


# --------------------------------------------------------------------------------------------- servers that stop


def test_server_dies_in_mid_run(
    proxy: s3_server.Proxy,
    local: Path,
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is lost, one line while it waits and one at the end; the same commands then finish the work."""
    monkeypatch.setattr(s3, "RETRY_SECONDS", 4.0)
    monkeypatch.setattr(s3, "PATIENCE_SECONDS", 2.0)
    for stage, fatal in (("rollouts", "rollouts/commit/c/2/"), ("score", "scores/teacher/commit/c/1/")):
        dead = threading.Event()

        def watch(request: str, fatal: str = fatal, dead: threading.Event = dead) -> None:
            if request.startswith("PUT") and fatal in request and not dead.is_set():
                proxy.kill()
                dead.set()

        proxy.watch = watch
        command = [stage, "toy", "--cache", url, *OPTIONS]
        if stage == "rollouts":
            process = run(*command)
            out, err = process.communicate()
            status, recorded = process.returncode, [line for line in err.splitlines() if proxy.url in line]
        else:  # without the seconds that imports take; what is logged does not get as far as stderr here
            caplog.clear()
            status, (out, err) = cli.main(command), capsys.readouterr()
            recorded = [*caplog.messages, *(line for line in err.splitlines() if proxy.url in line)]
        assert dead.is_set() and status == 1 and "Traceback" not in out + err, out + err
        assert len(recorded) == 2, out + err
        waiting, failed = recorded
        assert waiting == f"cache {url}: no response from {proxy.url} for 2 s, still trying"
        assert err.splitlines()[-1] == failed
        assert re.search(r"^redpen: .*cannot write block \d.* cannot be reached \(Connection refused\); ", failed)
        assert failed.endswith("then run the same command again (committed blocks are untouched)")

        proxy.revive()
        group = cs.open(url).round().rollouts if stage == "rollouts" else cs.open(url).round().scores("teacher")
        before = group.commits().copy()
        assert 1 <= (before["rows"] > 0).sum() < group.n_blocks
        assert cli.main(command) == 0
        kept = before["rows"] > 0
        assert (group.commits()[kept] == before[kept]).all() and group.committed().all()
    assert_same_rounds(cs.open(url).round(), cs.open(local).round())
    assert list(cs.verify(cs.open(url))) == []


def test_no_failure_reads_as_missing(proxy: s3_server.Proxy, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing key is an array's fill value and an empty place; a server that is away is neither."""
    monkeypatch.setattr(s3, "RETRY_SECONDS", 0.1)
    round_ = factory.filled(url, n_prompts=8).round()
    teacher, fresh = round_.scores("teacher"), cs.open(url).round()
    asks: list[Callable[[], object]] = [
        lambda: cs.create(url),
        lambda: cs.open(url),
        lambda: cs.open(url).round(),
        round_.cache.round_indices,
        round_.scorer_names,
        round_.has_blocks,
        round_.rollouts.committed,
        lambda: teacher.is_committed(1),
        lambda: teacher.read(1),
        lambda: fresh.rollouts.read(1),
        lambda: fresh.prompts[0],
        lambda: list(cs.verify(round_.cache)),
        lambda: round_.start_scores("other", factory.scores_manifest("teacher")),
    ]
    proxy.kill()
    for ask in asks:
        with pytest.raises(cs.StorageError, match="cannot be reached") as caught:
            ask()
        assert "\n" not in str(caught.value)
    proxy.revive()
    for ask in asks:
        ask()
    assert teacher.committed().all() and fresh.rollouts.committed().all()


def test_a_silent_server_is_mentioned_once(
    proxy: s3_server.Proxy, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = factory.filled(url, n_prompts=8).round().scores("teacher")
    proxy.watch = lambda request: "/c/1/" not in request or time.sleep(1.5 * PATIENCE_SECONDS)
    with caplog.at_level(logging.WARNING):
        teacher.read(1)
    assert [re.sub(r"http://\S+", "SERVER", record.message) for record in caplog.records] == [
        f"cache {url}: no response from SERVER for 1 s, still trying",
        f"cache {url}: SERVER responds again",
    ] * (len(caplog.records) // 2)
    assert 2 <= len(caplog.records) <= 8  # for the commits and for the arrays, not for each of seven requests


def test_ctrl_c_does_not_wait_for_a_silent_server(proxy: s3_server.Proxy, url: str) -> None:
    factory.filled(url, n_prompts=8)
    silent = threading.Event()

    def watch(request: str) -> None:
        if "/c/1/" in request or silent.is_set():
            silent.set()
            time.sleep(30)

    proxy.watch = watch
    process = run("verify", url)
    assert silent.wait(60)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    _, err = process.communicate()
    assert process.returncode == 130 and time.monotonic() - asked < 10
    assert err.splitlines()[-1] == "redpen: stopped by SIGINT; the same command continues"


# ---------------------------------------------------------------------------------------- servers that refuse


class _Canned(http.server.BaseHTTPRequestHandler):
    """Answers everything alike."""

    protocol_version = "HTTP/1.1"
    status, body = 500, b""

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(self.body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def canned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """`canned(status, body)`: a server that has only this answer, at AWS_ENDPOINT_URL."""
    handler = type("Handler", (_Canned,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{httpd.server_port}")
        monkeypatch.setattr(s3, "RETRY_SECONDS", 0.1)

        def answer(status: int, body: str) -> None:
            handler.status, handler.body = status, body.encode()

        yield answer
        httpd.shutdown()


def error(code: str, message: str = "") -> str:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"


@pytest.mark.parametrize(
    ("status", "body", "problem"),
    [
        (404, error("NoSuchBucket", "x"), "has no bucket 'bucket'; create it or choose another --cache"),
        (
            403,
            error("InvalidAccessKeyId", "The key does not exist."),
            "InvalidAccessKeyId The key does not exist.; che",
        ),
        (
            403,
            error("AccessDenied"),
            "403 AccessDenied; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION",
        ),
        (401, "", "responded 401; check AWS_ACCESS_KEY_ID"),
        (400, error("ExpiredToken", "It expired."), "400 ExpiredToken It expired.; check .*the credentials"),
        (
            400,
            error("AuthorizationHeaderMalformed", "expecting 'eu-west-1'"),
            "expecting 'eu-west-1'; check .*AWS_REGION",
        ),
        (301, error("PermanentRedirect"), "redirects to another region; set AWS_REGION"),
        (404, "<html>\n<h1>nginx</h1></html>", "responded 404; check AWS_ENDPOINT_URL"),
        (200, "", "Got invalid list response"),
        (500, error("InternalError"), "responded 500 InternalError for 0 s; wait until the server works again"),
        (503, error("SlowDown", "Reduce your rate."), "503 SlowDown Reduce your rate. for 0 s; wait until"),
        (501, error("NotImplemented"), "501 NotImplemented; .*AWS_CONDITIONAL_PUT=disabled"),
    ],
)
def test_what_a_server_refuses_is_one_line(
    canned: Callable[[int, str], None], status: int, body: str, problem: str
) -> None:
    canned(status, body)
    for attempt in (cs.create, cs.open):
        with pytest.raises(cs.StorageError, match=problem) as caught:
            attempt("s3://bucket/c.zarr")
        assert str(caught.value).startswith("cache s3://bucket/c.zarr: ") and "\n" not in str(caught.value)
    store, _ = stores.open_store("s3://bucket/c.zarr", writable=True)
    buffer = default_buffer_prototype()
    with pytest.raises(OSError) as refused:
        sync(store.set("key", buffer.buffer.from_bytes(b"x")))
    assert not isinstance(refused.value, FileNotFoundError)
    if "NoSuchBucket" in body:
        with pytest.raises(OSError, match="has no bucket"):
            sync(store.get("key", buffer))
        with pytest.raises(OSError, match="has no bucket"):
            sync(store.get_partial_values(buffer, [("key", None)]))


def test_no_credentials(canned: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    canned(404, "")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for _ in range(2):
        with pytest.raises(cs.StorageError, match="no credentials for S3; set AWS_ACCESS_KEY_ID and AWS_SECRET"):
            cs.open("s3://bucket/c.zarr")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(s3, "RETRY_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(cs.StorageError, match=r"cannot be reached \(Timeout\); check the network"):
            cs.create("s3://bucket/c.zarr")


def test_a_certificate_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("making a certificate needs openssl")
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -out {certificate.name} "
        f"-keyout {key.name} -addext subjectAltName=DNS:localhost -addext basicConstraints=critical,CA:FALSE".split(),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setattr(s3, "RETRY_SECONDS", 0.1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Canned) as httpd:
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{httpd.server_port}")
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(cs.StorageError, match="has an untrusted certificate"):
            cs.open("s3://bucket/c.zarr")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with pytest.raises(cs.StorageError, match="responded 500"):
            cs.open("s3://bucket/c.zarr")
        httpd.shutdown()


@pytest.mark.parametrize("wrong", ["s3://bucket", "s3://bucket/", "s3:///c", "s3://bucket/../c"])
def test_wrong_locations(wrong: str) -> None:
    with pytest.raises(cs.StorageError, match=f"cache {re.escape(wrong)}: expected s3://BUCKET/NAME"):
        cs.create(wrong)


def test_a_key_in_the_location_is_refused_and_not_shown() -> None:
    with pytest.raises(cs.StorageError, match="AWS_SECRET_ACCESS_KEY") as caught:
        cs.create("s3://key:secret@bucket/c")
    assert "secret@" not in str(caught.value)


def test_wrong_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(cs.StorageError, match="gs:// is not supported; give a local path, s3://BUCKET/NAME"):
        cs.create("gs://bucket/c.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(cs.StorageError, match=r"AWS_ENDPOINT_URL: expected http\(s\)://HOST\[:PORT\], got '127"):
        cs.create("s3://bucket/c.zarr")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example")
    with pytest.raises(cs.StorageError, match="not encrypted; use https://, or set AWS_ALLOW_HTTP=true"):
        cs.create("s3://bucket/c.zarr")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(cs.StorageError, match=r"s3:// needs obstore; `pip install obstore`"):
        cs.create("s3://bucket/c.zarr")


# ------------------------------------------------------------------------------------------------------------- locks


def holding(url: str, *more: str) -> subprocess.Popen[str]:
    """A process that holds the lock of `url` and dies of SIGKILL with it. `more`: what it does first."""
    code = (
        f"import time, cache_schema as cs; from cache_schema import locks; {'; '.join(more)}\n"
        f"with cs.open({url!r}, writable=True).lock('redpen score toy'):\n"
        "    print('locked', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_lock_names_its_holder_and_ends_with_its_process(url: str) -> None:
    cache = cs.create(url)
    with holding(url) as other:
        with (
            pytest.raises(cs.CacheLockedError, match=rf"`redpen score toy` \(process {other.pid} .*; wait for it"),
            cache.lock("redpen rollouts"),
        ):
            pass
        other.kill()  # its parent has not looked yet
        with cache.lock("redpen rollouts"):
            pass
    with cache.lock("redpen rollouts"), pytest.raises(cs.CacheLockedError), cs.open(url, writable=True).lock("x"):
        pass
    server = cache._store.server  # type: ignore[attr-defined]
    with pytest.raises(FileNotFoundError):
        sync(server.get_lock())


def test_lock_of_another_machine_ends_when_it_is_not_renewed(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cs.create(url)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 4.0)
    with holding(url, "locks._machine = lambda: 'elsewhere'", "locks.LEASE_SECONDS = 4") as other:
        with pytest.raises(cs.CacheLockedError, match=f"process {other.pid}"), cache.lock("redpen rollouts"):
            pass
        other.kill()
    killed = time.time()
    with caplog.at_level(logging.WARNING), cache.lock("redpen rollouts"):
        assert time.time() - killed > 1
    assert f"(process {other.pid} on" in caplog.text and "to see if it still is" in caplog.text


def test_lock_is_renewed_and_who_lost_it_writes_no_more(
    proxy: s3_server.Proxy, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 3.0)
    round_ = factory.filled(url, n_prompts=8).round()
    server = round_.cache._store.server  # type: ignore[attr-defined]
    with round_.cache.lock("redpen rollouts"):
        proxy.requests.clear()
        until(lambda: sum(request.startswith("PUT") and "lock" in request for request in proxy.requests) >= 3)
        with pytest.raises(cs.CacheLockedError), cs.open(url, writable=True).lock("redpen score"):
            pass
        thief = b'{"command": "redpen score", "pid": 1, "host": "elsewhere", "since": "now", "token": "other"}'
        sync(server.put_lock(thief, "overwrite"))
        until(lambda: server.lost_to)
        with pytest.raises(cs.CacheLockedError, match=r"`redpen score` \(process 1 on elsewhere.* has taken over"):
            round_.rollouts.uncommit(0)
    assert sync(server.get_lock())[0] == thief
    assert round_.rollouts.committed().all()


def test_without_conditional_writes_there_is_no_lock(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    cache = factory.filled(url, n_prompts=1)
    with caplog.at_level(logging.WARNING), cache.lock("redpen score"), cache.lock("redpen score"):
        assert list(cs.verify(cache)) == []
    assert f"cache {url} is not locked: AWS_CONDITIONAL_PUT is disabled" in caplog.messages
