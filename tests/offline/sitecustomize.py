"""Loaded by every Python that the tests start (through PYTHONPATH): no socket leaves this machine."""

import socket

LOCAL = ("127.", "::1", "localhost")


def _blocked(address) -> bool:
    return isinstance(address, tuple) and not str(address[0]).startswith(LOCAL)


class _LocalSocket(socket.socket):
    def connect(self, address):
        if _blocked(address):
            raise OSError(f"the tests run offline: no connection to {address[0]}")
        return super().connect(address)

    def connect_ex(self, address):
        if _blocked(address):
            raise OSError(f"the tests run offline: no connection to {address[0]}")
        return super().connect_ex(address)


_resolve = socket.getaddrinfo


def _resolve_local(host, *args, **kwargs):
    if host is not None and not str(host).startswith(LOCAL):
        raise socket.gaierror(f"the tests run offline: no look-up of {host}")
    return _resolve(host, *args, **kwargs)


socket.socket = _LocalSocket
socket.getaddrinfo = _resolve_local
