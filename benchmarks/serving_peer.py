"""What a user would write without `tokenrec serve`: FastAPI, and a forward per request.

    python -m benchmarks.serving_peer --model DIR --port 0

The scorer, the artifact and the shapes are the same; there is no batch and no prefix
cache. FastAPI runs a plain function in one of its threads.
"""

from __future__ import annotations

import argparse
import socket
import threading
from pathlib import Path
from typing import Any

import fastapi
import uvicorn

from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.scorer import open_scorer
from tokenrec.serving.server.load_model import candidate_sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-candidates", type=int, default=100)
    args = parser.parse_args()
    scorer = open_scorer(args.model)
    scorer.warm((1,), candidate_sizes(args.max_candidates))
    one_at_a_time = threading.Lock()
    app = fastapi.FastAPI()

    @app.post("/v1/score")
    def score(body: dict[str, Any]) -> dict[str, Any]:
        encoded = scorer.encode(parse_request(body, Limits()))
        with one_at_a_time:
            (scores,) = scorer.score([encoded])
        columns = zip(scorer.outputs, scores.T.tolist(), strict=True)
        return {"scores": dict(columns)}

    listener = socket.create_server(("127.0.0.1", args.port))
    print(f"is ready at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="error", access_log=False)
    uvicorn.Server(config).run([listener])


if __name__ == "__main__":
    main()
