"""What all tests share: hypothesis profiles, no network beyond this machine, no compiled code."""

import ipaddress
import os
import socket
import sys

import pytest
from hypothesis import HealthCheck, settings

# HYPOTHESIS_PROFILE=long pytest ... searches a hundred times as many examples.
settings.register_profile(
    "short", max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", settings.get_profile("short"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

# Threads cost tiny models more than they bring; read when torch is first imported, here and in the
# programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# Nothing is looked up on the Hugging Face hub; read when transformers is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"


def _is_local(host):
    if host in ("", "localhost", None):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Refuse to connect to, or look up, anything but this machine; use no proxy for that."""
    monkeypatch.setenv("no_proxy", "*")
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        inet = self.family in (socket.AF_INET, socket.AF_INET6)
        if inet and not _is_local(address[0]):
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if not _is_local(name):
            raise socket.gaierror(f"a test tried to look up {host}")
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)


@pytest.fixture(autouse=True)
def no_compiled_code():
    """PyTorch gives up on code that it has compiled eight times, in whichever tests that was."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
