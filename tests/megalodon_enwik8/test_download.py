"""Fetching from a real server on this machine that breaks in every way it can."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_enwik8.download import Patience, Source, fetch
from megalodon_enwik8.errors import UserError

TEXT = random.Random(0).randbytes(200_000)
HASTY = Patience(stall_s=0.2, attempts=4, wait_s=0.01)


def zipped(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", text)
    return buffer.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


ARCHIVE = zipped(TEXT)


class Server(ThreadingHTTPServer):
    """Serves `body`; meets the n-th request with the n-th behaviour of `plan`, then with `last`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, body: bytes = ARCHIVE) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.plan: list[str] = []
        self.last = "good"
        self.asked: list[str | None] = []  # the Range of each request
        self.released = threading.Event()  # ends what stalls
        self.source = Source(
            name="tiny",
            url=f"http://127.0.0.1:{self.server_port}/tiny.zip",
            archive_size=len(body),
            archive_sha256=sha256(body),
            size=len(TEXT),
            sha256=sha256(TEXT),
        )

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, whole = self.server, self.server.body
        does = server.plan.pop(0) if server.plan else server.last
        asked = self.headers.get("Range")
        server.asked.append(asked)
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        tag = '"2"' if does == "changed" else '"1"'
        if self.headers.get("If-Range", tag) != tag or does == "no_range":
            first = 0
        if does == "silent":
            server.released.wait(10)
            return
        if does.isdecimal():
            self.send_error(int(does))
            return
        if does == "page":  # what a hotel's network says to everything
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in")
            return
        if does == "endless":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(whole)
            return
        self.send_response(206 if first else 200)
        if does == "shifted" and first:
            first -= 1
        body = whole[first:]
        if does == "wrong":
            body = bytes(len(body))
        claims = len(body) + {"long": 10, "short": -10}.get(does, 0)
        self.send_header("Content-Length", str(claims))
        self.send_header("ETag", tag)
        if first:
            total = len(whole) + claims - len(body)
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{total}")
        self.end_headers()
        if does in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            if does == "stall":
                self.wfile.flush()
                server.released.wait(10)
            return
        self.wfile.write(body)


@contextlib.contextmanager
def serving(body: bytes = ARCHIVE) -> Iterator[Server]:
    with Server(body) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "data" / "tiny.gz"


def get(server: Server, target: Path, patience: Patience = HASTY) -> None:
    fetch(server.source, target, progress=False, patience=patience)


def left_by(target: Path) -> set[str]:
    return set(os.listdir(target.parent)) - {"tiny.gz.lock"}


def test_fetched_file_is_the_gzipped_text_and_nothing_else_is_left(
    server: Server, target: Path
) -> None:
    get(server, target)
    assert gzip.decompress(target.read_bytes()) == TEXT
    assert left_by(target) == {"tiny.gz"}


def test_target_without_gz_is_the_text_itself(server: Server, target: Path) -> None:
    get(server, target.with_suffix(""))
    assert target.with_suffix("").read_bytes() == TEXT


def test_equal_fetches_make_equal_files(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path / "a.gz")
    get(server, tmp_path / "b.gz")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_file_in_place_is_left_alone_without_asking(server: Server, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"mine")
    get(server, target)
    assert target.read_bytes() == b"mine"
    assert server.asked == []


def test_interrupted_download_goes_on_where_it_was_cut(server: Server, target: Path) -> None:
    server.plan = ["cut", "cut"]
    get(server, target)
    half = len(ARCHIVE) // 2
    rest = half + (len(ARCHIVE) - half) // 2
    assert server.asked == [None, f"bytes={half}-", f"bytes={rest}-"]


def test_download_that_brings_something_each_time_is_not_given_up(
    server: Server, target: Path
) -> None:
    server.plan = ["cut"] * (HASTY.attempts + 3)
    get(server, target)
    assert gzip.decompress(target.read_bytes()) == TEXT


PASSING = ["cut", "stall", "silent", "no_range", "shifted", "changed", "page", "416", "429", "503"]


@given(plan=st.lists(st.sampled_from(PASSING), max_size=HASTY.attempts - 1))
def test_trouble_that_passes_ends_with_the_right_file(plan: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        server.plan = list(plan)
        get(server, Path(folder) / "tiny.gz", replace(HASTY, stall_s=0.05, wait_s=0.001))
        assert gzip.decompress((Path(folder) / "tiny.gz").read_bytes()) == TEXT


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("404", "the server answers 404 Not Found"),
        ("503", "the server answers 503 Service Unavailable"),
        ("stall", "timed out"),
        ("silent", "timed out"),
        ("page", "closed early"),
        ("long", rf"it has {len(ARCHIVE) + 10:,} bytes, not {len(ARCHIVE):,}"),
        ("short", rf"it has {len(ARCHIVE) - 10:,} bytes, not {len(ARCHIVE):,}"),
        ("endless", rf"it has more than {len(ARCHIVE):,} bytes"),
        ("wrong", rf"SHA-256 is {sha256(bytes(len(ARCHIVE)))}, expected {sha256(ARCHIVE)}"),
    ],
)
def test_trouble_that_stays_is_one_line_and_leaves_no_file(
    server: Server, target: Path, behaviour: str, reason: str
) -> None:
    server.last = behaviour
    if behaviour == "stall":  # on and on, it would bring half of the rest each time
        server.plan, server.last = ["stall"], "silent"
    with pytest.raises(UserError, match=reason) as caught:
        get(server, target, replace(HASTY, stall_s=0.05, wait_s=0.001))
    assert "\n" not in str(caught.value)
    assert "data_path=sample" in str(caught.value)
    assert str(target.with_name("tiny.zip")) in str(caught.value)
    assert not target.exists()
    # What may be gone on with stays; what is wrong goes.
    assert left_by(target) == ({"tiny.gz.part"} if behaviour == "stall" else set())


def test_permanent_answer_is_not_asked_for_again(server: Server, target: Path) -> None:
    server.last = "404"
    with pytest.raises(UserError):
        get(server, target)
    assert len(server.asked) == 1


def test_no_network_is_said_at_once(server: Server, target: Path) -> None:
    with serving() as gone:
        source = gone.source
    began = time.monotonic()
    with pytest.raises(UserError, match="Connection refused"):
        fetch(source, target, progress=False, patience=Patience())
    assert time.monotonic() - began < Patience().wait_s


@pytest.mark.parametrize(
    "junk",
    [b"x", bytes(1000), bytes(len(ARCHIVE) - 1), bytes(len(ARCHIVE)), bytes(len(ARCHIVE) + 1)],
)
def test_foreign_partial_file_is_found_out_and_replaced(
    server: Server, target: Path, junk: bytes
) -> None:
    target.parent.mkdir()
    target.with_name("tiny.gz.part").write_bytes(junk)
    get(server, target)
    assert gzip.decompress(target.read_bytes()) == TEXT


def start(server: Server, target: Path) -> subprocess.Popen[str]:
    """Another process that fetches."""
    code = (
        "from pathlib import Path; from megalodon_enwik8.download import *; "
        f"fetch(Source(**{asdict(server.source)!r}), Path({str(target)!r}), progress=False)"
    )
    environment = {**os.environ, "no_proxy": "*"}
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment
    )


def test_killed_download_is_gone_on_with_by_the_next_process(server: Server, target: Path) -> None:
    server.plan = ["stall"]
    process, part = start(server, target), target.with_name("tiny.gz.part")
    half = len(ARCHIVE) // 2
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size == half) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not target.exists()
    get(server, target)
    assert server.asked == [None, f"bytes={half}-"]
    assert gzip.decompress(target.read_bytes()) == TEXT


def test_what_a_killed_process_left_half_unpacked_is_removed(server: Server, target: Path) -> None:
    target.parent.mkdir()
    writer = (
        f"import os; from megalodon_enwik8.files import atomic_write\n"
        f"with atomic_write({str(target)!r}): os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", writer], check=False)
    assert len(left_by(target)) == 1
    get(server, target)
    assert left_by(target) == {"tiny.gz"}


def test_two_processes_at_once_download_once_and_end_with_one_good_file(
    server: Server, target: Path
) -> None:
    processes = [start(server, target) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    assert errors == ["", ""]
    assert len(server.asked) == 1
    assert gzip.decompress(target.read_bytes()) == TEXT
    assert left_by(target) == {"tiny.gz"}


def test_full_disk_is_one_line_and_the_download_can_go_on(server: Server, target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(ARCHIVE) // 2, hard))
    try:
        with pytest.raises(UserError, match=r"tiny\.gz\.part: the file is larger than"):
            get(server, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    get(server, target)
    assert server.asked == [None, f"bytes={len(ARCHIVE) // 2}-"]
    assert gzip.decompress(target.read_bytes()) == TEXT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT[:-1], f"unpacks to fewer than {len(TEXT):,} bytes"),
        (TEXT + b"x", f"unpacks to more than {len(TEXT):,} bytes"),
        (bytes(10**8), f"unpacks to more than {len(TEXT):,} bytes"),
        (bytes(len(TEXT)), f"SHA-256 {sha256(bytes(len(TEXT)))}, expected {sha256(TEXT)}"),
    ],
)
def test_archive_of_another_text_is_one_line_and_leaves_no_file(
    target: Path, text: bytes, message: str
) -> None:
    with serving(zipped(text)) as server, pytest.raises(UserError, match=message):
        get(server, target)
    assert not target.exists()


def test_bomb_is_not_unpacked_past_the_declared_size(target: Path) -> None:
    limit = 2 << 20  # one chunk of reading beyond TEXT, gzipped, and no more
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with serving(zipped(bytes(10**8))) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="unpacks to more than"):
                get(server, target.with_suffix(""))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
