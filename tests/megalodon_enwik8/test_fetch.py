"""Fetching enwik8 from a real server on this machine that breaks in the usual ways."""

import gzip
import hashlib
import os
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megalodon_enwik8 import data
from megalodon_enwik8.data import load_corpus
from megalodon_enwik8.safety import UserError

from .packing import zipped

TEXT = random.Random(0).randbytes(200_000)


class Server(ThreadingHTTPServer):
    """Meets the n-th request with the n-th behaviour of `plan`, then with `last`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive = zipped(TEXT)
        self.plan = []
        self.last = "good"
        self.asked = 0
        self.released = threading.Event()  # ends what stalls

    def facts(self):
        """What data.py is to take for enwik8."""
        return {
            "ENWIK8_URL": f"http://127.0.0.1:{self.server_port}/enwik8.zip",
            "ENWIK8_ZIP_SHA256": hashlib.sha256(self.archive).hexdigest(),
            "ENWIK8_SHA256": hashlib.sha256(TEXT).hexdigest(),
            "ENWIK8_DATA_BYTES": 190_000,
            "DOWNLOAD_WAITS_S": (0, 0.01, 0.01),
            "DOWNLOAD_STALL_S": 0.2,
        }

    def handle_error(self, request, client_address):
        """A client that hangs up is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        does = self.server.plan.pop(0) if self.server.plan else self.server.last
        self.server.asked += 1
        body = self.server.archive
        if does.isdecimal():
            self.send_error(int(does))
            return
        if does == "slow":
            time.sleep(1)
        if does == "silent":
            self.server.released.wait(20)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if does == "wrong":
            body = bytes(len(body))
        self.wfile.write(body if does in ("good", "slow", "wrong") else body[: len(body) // 2])
        if does == "stall":
            self.wfile.flush()
            self.server.released.wait(20)


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        for name, value in server.facts().items():
            monkeypatch.setattr(data, name, value)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "enwik8.gz"


def get(target):
    corpus = load_corpus(str(target))
    assert corpus.name == "enwik8"
    assert corpus.train.tobytes() + corpus.val.tobytes() == TEXT[:190_000]


def left_by(target):
    return set(os.listdir(target.parent)) - {"enwik8.lock"}


@pytest.mark.usefixtures("server")
def test_fetched_file_is_the_text_under_its_name_and_nothing_else_is_left(target):
    get(target)
    assert gzip.decompress(target.read_bytes()) == TEXT
    get(target.with_suffix(""))
    assert target.with_suffix("").read_bytes() == TEXT
    assert left_by(target) == {"enwik8.gz", "enwik8"}


def test_file_in_place_is_used_without_asking(server, target):
    get(target)
    before = target.read_bytes()
    get(target)
    assert server.asked == 1
    target.unlink()
    get(target)
    assert target.read_bytes() == before


@pytest.mark.parametrize("plan", [["503"], ["503", "cut"], ["stall"], ["wrong"], ["cut", "429"]])
def test_trouble_that_passes_ends_with_the_right_file(server, target, plan):
    server.plan = list(plan)
    get(target)
    assert server.asked == len(plan) + 1
    assert left_by(target) == {"enwik8.gz"}


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("404", "HTTP Error 404: Not Found"),
        ("503", "HTTP Error 503: Service Unavailable"),
        ("silent", "timed out"),
        ("stall", "timed out"),
        ("cut", "invalid hash value|IncompleteRead"),
        ("wrong", "invalid hash value"),
    ],
)
def test_trouble_that_stays_is_one_line_and_leaves_no_file(server, target, behaviour, reason):
    server.last = behaviour
    with pytest.raises(UserError, match=reason) as caught:
        get(target)
    place = target.with_name("enwik8.zip")
    assert str(caught.value).endswith(
        f" Get it by other means, put it at {place} and set data_path={place}, or run on the "
        "sample: data_path=sample"
    )
    assert "\n" not in str(caught.value)
    assert server.asked == 3
    assert left_by(target) == set()
    assert socket.getdefaulttimeout() is None
    # What the line advises.
    place.write_bytes(server.archive)
    get(place)


def test_no_network_is_one_line(server, target, monkeypatch):
    monkeypatch.setattr(data, "ENWIK8_URL", "http://elsewhere.invalid/enwik8.zip")
    with pytest.raises(UserError, match=r"look up elsewhere.*data_path=sample"):
        get(target)
    assert left_by(target) == set()


@pytest.mark.usefixtures("server")
def test_a_fetch_goes_on_where_another_was_killed_while_it_wrote(target):
    target.parent.mkdir()
    target.with_name(".enwik8.gz.1.writing").touch()
    get(target)
    assert left_by(target) == {"enwik8.gz"}


def fetch(facts, target):
    os.environ["no_proxy"] = "*"
    for name, value in facts.items():
        setattr(data, name, value)
    load_corpus(str(target))


def test_two_processes_at_once_download_once(server, target, processes):
    facts = {**server.facts(), "DOWNLOAD_STALL_S": 20}
    server.last = "slow"  # so that the other one comes meanwhile
    both = [processes.Process(target=fetch, args=(facts, target)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert server.asked == 1
    assert gzip.decompress(target.read_bytes()) == TEXT
    assert left_by(target) == {"enwik8.gz"}
