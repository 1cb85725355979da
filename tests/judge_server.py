"""A judge behind a real HTTP server on this machine: an embedded model writes, a script rates and fails."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from qbench.models.load import ModelRef


@dataclass(frozen=True)
class Fault:
    """A response that is no judgement."""

    status: int
    body: str = "{}"
    headers: dict[str, str] = field(default_factory=dict)


@cache
def _nano() -> tuple[Any, Any]:
    reference = ModelRef("zoo/nano-llama")
    return reference.load(), reference.tokenizer()


def embedded_reply(prompt: str) -> str:
    """A few tokens of the smallest embedded model."""
    model, tokenizer = _nano()
    ids = torch.tensor([tokenizer(prompt)["input_ids"][-64:]])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


class JudgeServer:
    """Serves `/v1/chat/completions` while it is entered.

    Attributes:
        rating: What is written behind the model's words, of the user's prompt.
        faults: Responses that come first, one a request.
        requests: Every request: `{"path", "headers", "body"}`.
    """

    def __init__(self, rating: Callable[[str], str] = lambda prompt: "[[7]]", faults: tuple[Fault, ...] = ()):
        self.rating, self.faults, self.requests = rating, list(faults), list[dict[str, Any]]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Fault:
        self.requests.append({"path": path, "headers": headers, "body": body})
        if self.faults:
            return self.faults.pop(0)
        if path != "/v1/chat/completions":
            return Fault(404, "no such path")
        prompt = body["messages"][-1]["content"]
        content = f"{embedded_reply(prompt)}\n{self.rating(prompt)}"
        choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        return Fault(
            200, json.dumps({"object": "chat.completion", "model": body["model"], "choices": [choice]})
        )

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                response = server.respond(self.path, dict(self.headers), body)
                content = response.body.encode()
                self.send_response(response.status)
                for name, value in (response.headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Stay silent."""

        return Handler
