"""The servers that Surefoot is held against: `python -m loadtests.yardsticks empty|fastapi SOCKET [MODEL]`.

Duty: `empty` answers `{}` to everything: the least that uvicorn can cost. `fastapi` is what one writes first for the
same network: FastAPI, pydantic in and out, one ONNX call, and *nothing else*: no rules, no exploration, no propensity,
no record, no metrics.
Strategy: both run under the very uvicorn that a Surefoot worker runs under (uvloop, httptools, no access log). Where an
idiom leaves a choice, the faster one is taken: the session has one thread, as there is one core; the handler is
`async`, which saves a thread hop; the answer is built by pydantic's compiled core.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, Field

ANSWER = b"{}"
HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")],
}
BODY = {"type": "http.response.body", "body": ANSWER}


async def empty(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer `{}`."""
    await send(HEAD)
    await send(BODY)


class Question(BaseModel):
    policy: str | None = None
    state: list[float] | list[list[list[float]]]
    key: str | None = None
    context: dict[str, Any] = Field(default_factory=dict)


class Answer(BaseModel):
    action: int
    values: list[float]


def inference_only(path: str) -> FastAPI:
    """The network behind FastAPI, as its tutorial does it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    app = FastAPI()

    @app.get("/health/ready")
    async def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/act")
    async def act(question: Question) -> Answer:
        state = np.asarray([question.state], dtype=np.float32)
        values = session.run(None, {"observation": state})[0][0]
        return Answer(action=int(values.argmax()), values=values.tolist())

    return app


def main(arguments: list[str]) -> None:
    kind, descriptor, *rest = arguments
    app: Any = empty if kind == "empty" else inference_only(*rest)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(uvicorn.Server(config).serve([socket.socket(fileno=int(descriptor))]))


if __name__ == "__main__":
    main(sys.argv[1:])
