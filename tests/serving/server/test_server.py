"""The server as a process: ready, drained on SIGTERM, and hard to hold up or to break."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="needs the extra serving")
pytest.importorskip("httptools", reason="needs the extra serving")
pytest.importorskip("orjson", reason="needs the extra serving")

from benchmarks.serving_faults import attack
from tests.serving.server.arithmetic_scorer import ArithmeticScorer
from tests.serving.server.arithmetic_server import CONNECTIONS, Running, load, started
from tests.serving.server.request_bodies import body_of, request_of
from tests.serving.server.test_model_slot import point, write_artifact
from tokenrec.errors import InputError
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.server.run import ServerOptions, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = write_artifact(tmp_path_factory.mktemp("server") / "model", 1.0)
    with started(folder) as one:
        yield one
        # Whatever the tests did to it, it lived to the end.
        check(one, 7)
        assert one.stop() == 0


def check(server: Running, seed: int, weight: float = 1.0) -> None:
    """The server answers a request with the right scores."""
    status, answer = server.ask("/v1/score", body_of(seed))
    assert status == 200, answer
    check_scores(answer, seed, weight)


def check_scores(answer: Any, seed: int, weight: float) -> None:
    expected = ArithmeticScorer(weight).expected(request_of(seed))
    found = np.stack([answer["scores"]["click"], answer["scores"]["buy"]], 1)
    np.testing.assert_array_equal(found.astype(np.float32), expected)


def test_scores_metrics_and_probes_come_over_the_socket(server: Running) -> None:
    for seed in range(5):
        check(server, seed)
    assert server.ask("/healthz") == (200, {"status": "ok"})
    assert server.ask("/readyz") == (200, {"status": "ready"})
    status, page = server.ask("/metrics")
    assert status == 200
    assert b"tokenrec_compiles_since_ready 0\n" in page


def test_a_connection_is_kept_for_many_requests(server: Running) -> None:
    with contextlib.closing(server.connect()) as connection:
        for seed in range(5):
            connection.request(
                "POST",
                "/v1/score",
                json.dumps(body_of(seed)),
                {"content-type": "application/json"},
            )
            check_scores(json.loads(connection.getresponse().read()), seed, 1.0)


def read_to_end(client: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            received += part
    return received


def trickle(client: socket.socket, text: bytes) -> None:
    """Send a byte at a time until all are sent or the server closes the connection."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for place in range(len(text)):
            client.sendall(text[place : place + 1])
            time.sleep(0.02)


HEAD = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize("text", [b"", b"POST /v1/sc", HEAD + b"x-slow: "])
def test_a_client_that_never_ends_its_headers_is_closed(
    server: Running, text: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(text)
        check(server, 1)
        assert read_to_end(client) == b""


def test_a_client_that_trickles_its_headers_is_closed(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        trickle(client, b"x-slow: 1\r\n" * 1_000)
        read_to_end(client)
    check(server, 2)


def test_a_client_that_trickles_between_requests_is_closed(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" in client.recv(65536)
        # Empty lines are allowed before a request, and begin none.
        trickle(client, b"\r\n" * 5_000)
        read_to_end(client)
    check(server, 2)


def test_a_body_that_trickles_is_408_and_closed(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(HEAD + b"content-length: 1000\r\n\r\n")
        sender = threading.Thread(target=trickle, args=(client, b"{" * 1_000))
        sender.start()
        check(server, 3)
        answer = read_to_end(client)
        sender.join()
    # The reset that late bytes cause may overtake the answer.
    assert answer == b"" or b" 408 " in answer.splitlines()[0]


def test_headers_without_end_are_431(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 60) as client:
        client.sendall(HEAD)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                client.sendall(b"x-more: " + b"y" * 1_000 + b"\r\n")
        answer = read_to_end(client)
    assert answer == b"" or b" 431 " in answer.splitlines()[0]
    check(server, 4)


def test_more_connections_than_the_limit_are_closed_and_others_served(
    server: Running,
) -> None:
    with contextlib.ExitStack() as stack, contextlib.closing(server.connect()) as kept:
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        clients = [
            stack.enter_context(
                socket.create_connection(("127.0.0.1", server.port), 60)
            )
            for _ in range(CONNECTIONS + 10)
        ]
        # At least those beyond the limit are closed, at once.
        assert read_to_end(clients[-1]) == b""
        kept.request("GET", "/healthz")
        assert kept.getresponse().status == 200
        for client in clients:
            assert read_to_end(client) == b""
    check(server, 5)


def test_hostile_requests_never_end_the_server_or_get_a_wrong_score(
    server: Running,
) -> None:
    def expected(value: Any) -> np.ndarray:
        return ArithmeticScorer().expected(parse_request(value, Limits()))

    requests = [body_of(seed) for seed in range(5)]
    rows, failures = attack(server.port, requests, 150, expected)
    assert not failures
    assert all(row["refused"] and row["scored"] for row in rows)
    assert [sum(row.values()) for row in _counts(rows)] == [150, 150]


def _counts(rows: list[dict[str, Any]]) -> list[dict[str, int]]:
    names = ("refused", "closed", "scored", "failed")
    return [{name: row[name] for name in names} for row in rows]


def accepts(server: Running) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port), 60).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True


def wait_for(path: Path, server: Running) -> None:
    while not path.exists():
        assert server.process.poll() is None
        time.sleep(0.005)


def test_sigterm_finishes_what_is_in_flight_and_exits_0(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "model", 1.0)
    with started(folder) as server:
        (folder / "busy").touch()
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.ask("/v1/score", body_of(1)))
        )
        asking.start()
        wait_for(folder / "entered", server)
        server.process.terminate()
        # It no longer accepts while the request is in flight.
        while accepts(server):
            time.sleep(0.005)
        assert server.process.poll() is None
        (folder / "busy").unlink()
        asking.join()
        assert server.process.wait(60) == 0
    ((status, answer),) = answers
    assert status == 200
    check_scores(answer, 1, 1.0)


def test_swaps_under_load_and_kill_9_during_one_give_no_wrong_score(
    tmp_path: Path,
) -> None:
    link = tmp_path / "current"
    folders = [write_artifact(tmp_path / f"m{n}", float(n + 1)) for n in range(3)]
    by_digest = {ArithmeticScorer(n + 1.0).digest: n + 1.0 for n in range(3)}
    point(link, folders[0])
    with started(link) as server:
        done, wrong, seen = threading.Event(), [], set()

        def ask_on() -> None:
            seed = 0
            while not done.is_set():
                seed = (seed + 1) % 10
                status, answer = server.ask("/v1/score", body_of(seed))
                if status != 200:
                    wrong.append(answer)
                    return
                weight = by_digest[answer["model"]]
                seen.add(weight)
                try:
                    check_scores(answer, seed, weight)
                except AssertionError as error:
                    wrong.append(error)
                    return

        asking = threading.Thread(target=ask_on)
        asking.start()
        for turn in range(1, 10):
            point(link, folders[turn % 2])
            expected = ArithmeticScorer(turn % 2 + 1.0).digest
            while server.ask("/v1/models")[1]["models"][0]["digest"] != expected:
                assert not wrong
                time.sleep(0.005)
        done.set()
        asking.join()
        assert not wrong
        assert seen == {1.0, 2.0}
        # The third model is being loaded: the second one still serves.
        (folders[2] / "loading").touch()
        point(link, folders[2])
        wait_for(folders[2] / "entered", server)
        check(server, 1, 2.0)
        server.process.kill()
        assert server.process.wait(60) == -9
    (folders[2] / "loading").unlink()
    with started(link) as server:
        check(server, 1, 3.0)
        assert server.stop() == 0


def test_sigterm_during_a_swap_exits_0(tmp_path: Path) -> None:
    link, slow = tmp_path / "current", write_artifact(tmp_path / "slow", 2.0)
    point(link, write_artifact(tmp_path / "first", 1.0))
    with started(link) as server:
        (slow / "loading").touch()
        point(link, slow)
        wait_for(slow / "entered", server)
        assert server.stop() == 0


def test_a_port_in_use_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = ServerOptions(tmp_path / "missing", port=port)
        with pytest.raises(InputError, match=f"--port {port}: Address already in use"):
            serve(options, load)
    with pytest.raises(InputError, match="--port 70000"):
        serve(ServerOptions(tmp_path / "missing", port=70_000), load)
