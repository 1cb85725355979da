"""A hub of models and data sets on this machine, which speaks as much of the hub's protocol as its libraries ask for."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """What a hub holds, and how it behaves.

    Attributes:
        repos: By kind (`models`, `datasets`) and id: files by their paths.
        failing: The status that every request gets; `None` while the hub is well.
        stalling: Requests whose path contains it wait for as long as it says so; empty for none.
        asked: Every request, in words.
    """

    repos: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    failing: int | None = None
    stalling: str = ""
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, kind: str, name: str) -> str:
        """The commit that every revision of a repository is."""
        files = self.repos[kind, name]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def add_folder(self, name: str, folder: Path) -> None:
        """A model repository with the files of a folder."""
        self.repos["models", name] = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def add_data(self, name: str, configs: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> None:
        """A data set repository: rows by configuration and split, as parquet, and the card that says which is where."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files, card = dict[str, bytes](), ["---", "configs:"]
        for config, splits in configs.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, rows in splits.items():
                sink = pa.BufferOutputStream()
                pq.write_table(pa.Table.from_pylist(rows), sink)
                files[f"{config}/{split}-00000-of-00001.parquet"] = sink.getvalue().to_pybytes()
                card.append(f"  - {{split: {split}, path: {config}/{split}-*}}")
        files["README.md"] = "\n".join([*card, "---", ""]).encode()
        self.repos["datasets", name] = files

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        """While it lasts the hub answers at `endpoint`, which stays its name afterwards."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, *, offline: bool = False) -> dict[str, str]:
        """For a process that knows this hub alone and keeps what it gets in `home`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HTTP", "http", "ALL_PROXY"))}
        return kept | {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            while hub.stalling and hub.stalling in path:
                time.sleep(0.05)
            if hub.failing:
                self._send(hub.failing, b"the hub is out of order")
            elif path == "/":
                self._send(200, b"a hub")
            elif api := _API.fullmatch(path):
                self._about(api[1], api[2], api[3] or "revision", api[5] or "")
            elif file := _FILE.fullmatch(path):
                self._file(file[1] or "models", file[2], file[4])
            else:
                self._missing("EntryNotFound")

        def _about(self, kind: str, name: str, what: str, below: str) -> None:
            files = hub.repos.get((kind, name))
            if files is None:
                self._missing("RepoNotFound")
                return
            entries = _entries(files)
            if what == "paths-info":
                asked = json.loads(self.posted)["paths"]
                self._json([entry for entry in entries if entry["path"] in asked])
            elif what == "tree":
                deep = "recursive=true" in self.path.lower()
                inside = [e for e in entries if Path(below) in Path(e["path"]).parents]
                self._json([e for e in inside if deep or Path(e["path"]).parent == Path(below)])
            else:
                siblings = [{"rfilename": path} for path in files]
                about = {"id": name, "sha": hub.commit(kind, name), "siblings": siblings, "private": False}
                self._json(
                    about | {"tags": [], "downloads": 0, "likes": 0, "disabled": False, "gated": False}
                )

        def _file(self, kind: str, name: str, path: str) -> None:
            files = hub.repos.get((kind, name))
            if files is None or path not in files:
                self._missing("RepoNotFound" if files is None else "EntryNotFound", (kind, name))
                return
            tag = hashlib.sha256(files[path]).hexdigest()
            self._send(200, files[path], {"ETag": f'"{tag}"', "X-Repo-Commit": hub.commit(kind, name)})

        def _missing(self, code: str, repo: tuple[str, str] | None = None) -> None:
            commit = {"X-Repo-Commit": hub.commit(*repo)} if repo in hub.repos and repo else {}
            self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code} | commit)

        def _json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def _entries(files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The files and folders of a repository."""
    folders = dict.fromkeys(str(above) for path in files for above in Path(path).parents if above != Path())
    return [
        *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders),
        *(
            {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
            for path, content in files.items()
        ),
    ]
