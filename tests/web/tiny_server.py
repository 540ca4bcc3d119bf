"""A server with a tiny random model on a port of 127.0.0.1: `python -m tests.web.tiny_server PORT [KEY]`."""

import sys
from time import sleep

from tests.server.conftest import byte_orthrus

from orthrus.api import Orthrus
from orthrus.server.run import serve
from orthrus.server.settings import ServeConfig

SECONDS_PER_PASS = 0.004
"""Answers of a tiny model would end before anybody could stop them."""


def load() -> Orthrus:
    made = byte_orthrus()
    step = made.engine.step

    def wait_and_step() -> None:
        sleep(SECONDS_PER_PASS)
        step()

    made.engine.step = wait_and_step  # type: ignore[method-assign]
    return made


if __name__ == "__main__":
    serve(load, ServeConfig(api_keys=tuple(sys.argv[2:])), "127.0.0.1", int(sys.argv[1]))
