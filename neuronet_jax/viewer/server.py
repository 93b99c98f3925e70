"""The server behind `neuronet view`.

It listens on the loopback interface, so that no other machine reaches it. Its address holds a secret, so that other
users and other pages of this machine's browser do not. It checks the host that a browser asked for, against DNS
rebinding. It serves the files of a catalogue, and takes notes.
"""

import hmac
import http.server
import json
import mimetypes
import secrets
import shutil
from http import HTTPStatus
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from neuronet_jax.errors import NeuronetError
from neuronet_jax.viewer.catalogue import Catalogue
from neuronet_jax.viewer.notes import MOST_CHARACTERS, VERDICTS, Notes

HOST = "127.0.0.1"
_MOST_BYTES = 10 * MOST_CHARACTERS  # of a note
_STATIC = {  # address: file in this package, type, encoding
    "": ("viewer.html", "text/html; charset=utf-8", ""),
    "viewer.js": ("viewer.js", "text/javascript; charset=utf-8", ""),
    "niivue.umd.js": ("niivue.umd.js.gz", "text/javascript; charset=utf-8", "gzip"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the secret
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    # NiiVue keeps its fonts, and its workers, in data: and blob: addresses; nothing comes from elsewhere
    "Content-Security-Policy": "default-src 'none'; script-src 'self' blob:; worker-src blob: data:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' data: blob:; font-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Server(http.server.ThreadingHTTPServer):
    """Serves a catalogue on `port`, or on any free one for 0. Raises NeuronetError if it cannot listen there."""

    daemon_threads = True

    def __init__(self, catalogue: Catalogue, out: Path, port: int = 0):
        self.catalogue, self.notes, self.token = catalogue, Notes(out), secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise NeuronetError(f"cannot listen on port {port} ({error}): choose a different --port") from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]: always made by it
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; a client that stops in the middle does not keep its thread

    def do_GET(self) -> None:
        name = self._address()
        if name is None:
            return
        if name in _STATIC:
            file, kind, encoding = _STATIC[name]
            content = resources.files("neuronet_jax.viewer").joinpath("static", file).read_bytes()
            self._answer(HTTPStatus.OK, content, kind, encoding)
        elif name == "catalogue.json":
            found = self.server.catalogue
            notes = self.server.notes.all()
            self._json({"scans": found.scans, "tables": found.tables, "notes": notes, "verdicts": VERDICTS})
        elif path := self.server.catalogue.files.get(name):
            self._file(path)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such file in this folder of results")

    def do_POST(self) -> None:
        name = self._address()
        if name is None:
            return
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip()
        if name != "notes" or kind != "application/json":  # a form of a different page cannot send this type
            return self._refuse(HTTPStatus.NOT_FOUND, "notes are sent to `notes` as application/json")
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a note has at most {_MOST_BYTES} bytes")
        try:
            note = json.loads(self.rfile.read(int(length)))
            scan, verdict, remark = (note[key] for key in ("scan", "verdict", "remark"))
            if scan not in {known["name"] for known in self.server.catalogue.scans} or not isinstance(remark, str):
                raise NeuronetError(f"there is no scan {scan!r} in this folder")
            self.server.notes.put(scan, verdict, remark)
        except (ValueError, KeyError, TypeError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, f"a note has scan, verdict and remark ({error})")
        except NeuronetError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        self._json(self.server.notes.all())

    def _address(self) -> str | None:
        """Returns what is asked for, without the secret, or answers and returns None if it may not be asked for."""
        hosts = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts or origin not in (None, *(f"http://{host}" for host in hosts)):
            return self._refuse(HTTPStatus.FORBIDDEN, "this server answers pages of its own only")
        _, token, *rest = urlsplit(self.path).path.split("/", 2)
        if not rest or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self._refuse(HTTPStatus.FORBIDDEN, "use the address that `neuronet view` printed")
        return unquote(rest[0])

    def _file(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._head(HTTPStatus.OK, mimetypes.guess_type(path.name.removesuffix(".gz"))[0], path.stat().st_size)
                shutil.copyfileobj(file, self.wfile)
        except FileNotFoundError:
            self._refuse(HTTPStatus.NOT_FOUND, f"{path.name} is gone: start `neuronet view` again")

    def _json(self, content: Any) -> None:
        self._answer(HTTPStatus.OK, json.dumps(content).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self.close_connection = True  # what else was sent stays unread
        self._answer(status, f"{reason}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, content: bytes, kind: str, encoding: str = "") -> None:
        self._head(status, kind, len(content), encoding)
        self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str | None, length: int, encoding: str = "") -> None:
        self.send_response_only(status)
        headers = {**_HEADERS, "Content-Type": kind or "application/octet-stream", "Content-Length": str(length)}
        for name, value in {**headers, **({"Content-Encoding": encoding} if encoding else {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Stays silent: a log of requests would name participants."""
