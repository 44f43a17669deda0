"""Other servers of models, each doing inference on the same network and nothing else.

    python peers.py KIND PORT MODEL

Duty: one class for each, as its own documentation writes them. This file is copied and runs in an environment of the
peer's own, for their dependencies exclude each other, so it imports numpy, ONNX Runtime and, late, the peer.
Strategy: one process that infers, one thread, no batching that waits; where an idiom leaves a choice, the faster one.
"""

# No `from __future__ import annotations`: BentoML reads annotations at run time.
import json
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

MODEL = "BENCH_MODEL"
HERE = Path(__file__).parent.absolute()


class Network:
    """The network, and its answer to one state."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ[MODEL], options, providers=["CPUExecutionProvider"])

    def values(self, state: Any) -> Any:
        return self._session.run(None, {"observation": np.asarray([state], dtype=np.float32)})[0][0]

    def answer(self, state: Any) -> dict[str, Any]:
        values = self.values(state)
        return {"action": int(values.argmax()), "values": values.tolist()}


def litserve(port: int) -> None:
    api = this_module().LitAct(api_path="/v1/act")
    server = import_module("litserve").LitServer(api, accelerator="cpu", healthcheck_path="/health/ready")
    server.run("127.0.0.1", port, num_api_servers=1, log_level="warning", generate_client_file=False, access_log=False)


def bentoml(port: int) -> None:
    options = {"--host": "127.0.0.1", "--port": str(port), "--working-dir": str(HERE), "--api-workers": "1"}
    become(
        [sys.executable, "-m", "bentoml", "serve", "peers:Bento", *(word for each in options.items() for word in each)]
    )


def mlserver(port: int) -> None:
    """A folder with settings; inference in the server's own process, for another costs a hop."""
    ports = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    (HERE / "settings.json").write_text(json.dumps({**ports, "parallel_workers": 0, "debug": False}))
    (HERE / "model-settings.json").write_text(json.dumps({"name": "bench", "implementation": "peers.Runtime"}))
    os.environ["PYTHONPATH"] = str(HERE)
    become([str(Path(sys.executable).parent / "mlserver"), "start", str(HERE)])


def ray(port: int) -> None:
    serve = import_module("ray.serve")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(this_module().RayAct.bind(), route_prefix="/v1/act", blocking=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def become(command: list[str]) -> None:
    """Go on as another program, under the same pid."""
    os.execv(command[0], command)  # noqa: S606  our own command


def this_module() -> Any:
    """This module by its name, so that processes which a peer starts find its classes."""
    return import_module("peers")


def lit_act() -> Any:
    class LitAct(import_module("litserve").LitAPI):  # type: ignore[misc]
        def setup(self, device: str) -> None:
            self.network = Network()

        def decode_request(self, request: dict[str, Any]) -> Any:
            return request["state"]

        def predict(self, state: Any) -> dict[str, Any]:
            return self.network.answer(state)

        def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
            return output

    return LitAct


def bento() -> Any:
    library = import_module("bentoml")

    async def act(
        self: Any, state: list[float], policy: str = "", key: str = "", context: dict[str, int] | None = None
    ) -> dict[str, Any]:
        answer: dict[str, Any] = self.network.answer(state)
        return answer

    def start(self: Any) -> None:
        self.network = Network()

    served = type("Bento", (), {"__init__": start, "act": library.api(route="/v1/act")(act), "__module__": "peers"})
    quiet = {"metrics": {"enabled": False}, "logging": {"access": {"enabled": False}}}
    return library.service(workers=1, **quiet)(served)


def runtime() -> Any:
    types, codec = import_module("mlserver.types"), import_module("mlserver.codecs").NumpyCodec

    class Runtime(import_module("mlserver").MLModel):  # type: ignore[misc]
        async def load(self) -> bool:
            self.network = Network()
            return True

        async def predict(self, payload: Any) -> Any:
            values = self.network.values(codec.decode_input(payload.inputs[0])[0])
            return types.InferenceResponse(
                model_name=self.name, outputs=[codec.encode_output("values", values[np.newaxis])]
            )

    return Runtime


def ray_act() -> Any:
    class RayAct:
        def __init__(self) -> None:
            self.network = Network()

        async def __call__(self, request: Any) -> dict[str, Any]:
            return self.network.answer((await request.json())["state"])

    options = {"num_replicas": 1, "max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0}}
    return import_module("ray.serve").deployment(**options)(RayAct)


MAKERS: dict[str, Callable[[], Any]] = {"LitAct": lit_act, "Bento": bento, "Runtime": runtime, "RayAct": ray_act}
KINDS: dict[str, Callable[[int], None]] = {"litserve": litserve, "bentoml": bentoml, "mlserver": mlserver, "ray": ray}


def __getattr__(name: str) -> Any:
    """Make what a peer imports by name; each exists only where its library does."""
    if name not in MAKERS:
        raise AttributeError(name)
    made = globals()[name] = MAKERS[name]()
    if isinstance(made, type):
        made.__module__, made.__qualname__ = "peers", name  # so that other processes find it
    return made


if __name__ == "__main__":
    kind, port, model = sys.argv[1:]
    os.environ[MODEL] = model
    KINDS[kind](int(port))
