"""A server of the arithmetic scorer, as a process of its own: a folder with a weight.

    python -m tests.serving.server.arithmetic_server FOLDER_OR_LINK

A file in the folder of the model slows it down: while `loading` exists its load does not
end, and while `busy` exists its device calls do not; each writes `entered` first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.serving.server.arithmetic_retriever import ArithmeticRetriever
from tests.serving.server.arithmetic_scorer import ArithmeticScorer, Encoded
from tests.serving.server.test_model_slot import read_artifact
from tokenrec.serving.request import Limits
from tokenrec.serving.server.model_slot import ServedModel, ready

ROOT = Path(__file__).parents[3]
HEAD_SECONDS = 0.5
BODY_SECONDS = 0.5
CONNECTIONS = 30


@dataclasses.dataclass
class BusyScorer(ArithmeticScorer):
    folder: Path = Path()

    def _enter(self, what: str, batch: Sequence[Encoded]) -> None:
        super()._enter(what, batch)
        wait_while(self.folder / "busy")


def wait_while(path: Path) -> None:
    while path.exists():
        (path.parent / "entered").touch()
        time.sleep(0.005)


def load(folder: Path) -> ServedModel:
    wait_while(folder / "loading")
    objective, weight = read_artifact(folder)
    if objective == "retrieval":
        return ready(ArithmeticRetriever(weight), folder)
    return ready(BusyScorer(weight, folder=folder), folder)


def main() -> None:
    from tokenrec.serving.server.limits import AppLimits
    from tokenrec.serving.server.run import ServerOptions, serve

    limits = AppLimits(
        Limits(candidates=200, history=50),
        body_bytes=200_000,
        body_seconds=BODY_SECONDS,
    )
    options = ServerOptions(
        Path(sys.argv[1]),
        port=0,
        limits=limits,
        watch_seconds=0.02,
        head_seconds=HEAD_SECONDS,
        connections=CONNECTIONS,
    )
    serve(options, load)


@dataclasses.dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    port: int

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        with contextlib.closing(self.connect()) as connection:
            if body is None:
                connection.request("GET", path)
            else:
                kind = {"content-type": "application/json"}
                connection.request("POST", path, json.dumps(body), kind)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] == b"{" else text

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def started(model: Path) -> Iterator[Running]:
    """Start a server of the arithmetic scorer."""
    module = "tests.serving.server.arithmetic_server"
    with running([sys.executable, "-m", module, str(model)]) as server:
        yield server


@contextlib.contextmanager
def running(command: Sequence[str]) -> Iterator[Running]:
    """Run a server until the block ends; it is ready when the block begins."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        match = re.search(r"is ready at http://127\.0\.0\.1:(\d+)", line)
        assert match, line
        yield Running(process, int(match[1]))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    main()
