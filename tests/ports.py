"""A port for processes that meet on this machine."""

import socket


def free_port() -> int:
    """One that nothing listens on at the moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
