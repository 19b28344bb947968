"""The server behind `llmtune ui`: bound to 127.0.0.1, and open only to whoever has the token.

Any page in the user's browser can send requests to a server on this machine, and any program can look for one. So a
request must name this server as its host (or a foreign name could be pointed here), come from its own page where it has
an origin, and carry the token. Nothing is served from the file system: answers are made from the runs that were listed.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from llmtune.errors import LlmtuneError, MachineError
from llmtune.watch.ui.answers import Chat
from llmtune.watch.ui.views import RunViews, page, page_policy

__all__ = ["UiServer"]

# Not 0.0.0.0: no other machine can reach the rows and the model of a run.
ADDRESS = "127.0.0.1"
MOST_BODY_BYTES = 200_000
HEADERS = {
    # Rows and answers stay out of the browser's cache on the disk.
    "Cache-Control": "no-store",
    # JSON holds texts of rows, which a browser must not take for a page or a script.
    "X-Content-Type-Options": "nosniff",
    # The page's address holds the token.
    "Referrer-Policy": "no-referrer",
    # Another page that embeds an answer could measure it.
    "Cross-Origin-Resource-Policy": "same-origin",
    # Another page that shows this one in a frame could steer the user's clicks.
    "X-Frame-Options": "DENY",
}


class Refused(Exception):
    """A request that is not answered: an HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


Query = dict[str, list[str]]


class Request(NamedTuple):
    """A request that was checked."""

    server: UiServer
    query: Query
    body: dict[str, object]
    """The JSON body; empty where it only reads."""

    def first(self, name: str) -> str:
        """The first value of a name in the query; empty without one."""
        return self.query.get(name, [""])[0]


class Route(NamedTuple):
    """One row of `ROUTES`."""

    method: str
    path: str
    answer: Callable[[Request], object]
    """Returns the JSON that is sent back."""


class UiServer(ThreadingHTTPServer):
    """Serves the runs of a folder until `shutdown`; port 0 takes a free one. Raises MachineError for a taken port."""

    # A browser keeps connections open, and the program ends without waiting for them.
    daemon_threads = True

    def __init__(self, folder: Path, *, port: int = 0, offline: bool = False, no_cuda: bool = False) -> None:
        # 192 random bits, new at every start: an address from an old log opens nothing.
        self.token = secrets.token_urlsafe(24)
        self.views = RunViews(folder)
        self.chat = Chat(offline=offline, no_cuda=no_cuda)
        self.lock = threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            fix = "name another one with --port, or leave it out to take a free one"
            raise MachineError(f"port {port} cannot be opened: {error.strerror}", ADDRESS, fix) from error

    def server_bind(self) -> None:
        """Bind without the look-up of a host name that the base class makes."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def url(self) -> str:
        """The address to open, token included."""
        return f"http://{ADDRESS}:{self.server_port}/?token={self.token}"

    @property
    def hosts(self) -> tuple[str, str]:
        """Names by which a request may call this server."""
        return f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: UiServer
    server_version = "llmtune"
    # Neither its own version nor Python's: whoever probes the port learns nothing to attack.
    sys_version = ""
    # A client that connects and says nothing holds its thread no longer.
    timeout = 30

    def do_GET(self) -> None:
        self._respond("GET")

    def do_POST(self) -> None:
        self._respond("POST")

    def log_message(self, *args: object) -> None:
        """Print nothing: a line for each request would fill the terminal, and hold the token."""

    def _respond(self, method: str) -> None:
        try:
            query = self._checked()
            parts = urlsplit(self.path)
            if method == "GET" and parts.path == "/":
                return self._send(200, page().encode("utf-8"), "text/html; charset=utf-8")
            route = next((row for row in ROUTES if (row.method, row.path) == (method, parts.path)), None)
            if route is None:
                raise Refused(404, "there is nothing here")
            body = self._body() if method == "POST" else {}
            answer = route.answer(Request(self.server, query, body))
            return self._send(200, json.dumps(answer).encode("utf-8"), "application/json")
        except Refused as refusal:
            return self._send(refusal.status, json.dumps({"error": refusal.reason}).encode(), "application/json")
        except LlmtuneError as error:
            return self._send(409, json.dumps({"error": str(error)}).encode(), "application/json")
        except (BrokenPipeError, ConnectionResetError):
            return None  # the page was closed

    def _checked(self) -> Query:
        """The query of a request that may be answered. Raises Refused."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        # A foreign name that is made to point at 127.0.0.1 (DNS rebinding) shows here.
        if host not in self.server.hosts:
            raise Refused(403, "this server answers to 127.0.0.1 and localhost only")
        # Browsers send it with every request of another page, and no page can leave it out or change it.
        if origin is not None and origin not in tuple(f"http://{name}" for name in self.server.hosts):
            raise Refused(403, "another page may not ask this server")
        # Also said where there is no origin, as for an image. Programs and old browsers do not say it.
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(403, "another page may not ask this server")
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        given = bearer or (query.get("token") or [""])[0]
        # A comparison that stops at the first wrong letter would tell how many are right.
        if not hmac.compare_digest(given.encode("utf-8", "replace"), self.server.token.encode()):
            raise Refused(403, "the token is missing or wrong: open the address that `llmtune ui` printed")
        return query

    def _body(self) -> dict[str, object]:
        length = self.headers.get("Content-Length", "")
        # Another page may post a form unasked, but for JSON its browser asks this server first, which does not answer.
        # Without a length reading would go on as long as the client likes.
        if self.headers.get_content_type() != "application/json" or not length.isdecimal():
            raise Refused(400, "a JSON body is needed")
        if int(length) > MOST_BODY_BYTES:
            raise Refused(413, f"more than {MOST_BODY_BYTES:,} bytes")
        try:
            value = json.loads(self.rfile.read(int(length)))
        # Thousands of open brackets end in a RecursionError.
        except (ValueError, RecursionError) as error:
            raise Refused(400, "the body is not JSON") from error
        if not isinstance(value, dict):
            raise Refused(400, "the body is no JSON object")
        return value

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}
        if kind.startswith("text/html"):
            headers["Content-Security-Policy"] = page_policy()
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


# The views read on in files where they stopped, so one request at a time; a chat, which takes long, holds no lock.
def _list(request: Request) -> object:
    with request.server.lock:
        return request.server.views.summaries()


def _view(request: Request) -> object:
    with request.server.lock:
        return request.server.views.view(request.query.get("run", []), since=request.first("since"))


def _ledger(request: Request) -> object:
    with request.server.lock:
        return request.server.views.ledger(request.first("run"), request.first("text"))


def _chat(request: Request) -> object:
    name, messages = request.body.get("run"), request.body.get("messages")
    if not isinstance(name, str) or not isinstance(messages, dict):
        raise Refused(400, "`run` and `messages` are needed")
    with request.server.lock:
        folder = request.server.views.folder_of(name)
    return request.server.chat.answer(folder, messages)


ROUTES: tuple[Route, ...] = (
    Route("GET", "/api/runs", _list),
    Route("GET", "/api/view", _view),
    Route("GET", "/api/ledger", _ledger),
    Route("POST", "/api/chat", _chat),
)
"""Everything that is answered beside the page itself. All but the chat only read."""
