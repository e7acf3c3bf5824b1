"""A web server on loopback whose files, manners and failures a test chooses, and which remembers what was asked of it."""

from __future__ import annotations

import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves `files`, by path, and keeps (path, first byte asked for) of every request in `asked`.

    moved: paths that are elsewhere now, and where. ranges: whether it knows Range requests. cuts: after how many bytes
    to drop the connection, one per request, as long as there are any. pause: seconds between blocks of 64 KiB. announce:
    whether to say the length.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.asked: list[tuple[str, int]] = []
        self.ranges, self.announce = True, True
        self.cuts: list[int] = []
        self.pause = 0.0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/{name}"

    def __enter__(self) -> FileServer:
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.ranges else 0
        self.asked.append((name, int(asked[1]) if asked else 0))
        if name in self.moved:
            request.send_response(302)
            request.send_header("Location", self.url(self.moved[name]))
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if name not in self.files:
            request.send_error(404)
            return
        content = self.files[name]
        if start and start >= len(content):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.announce:
            request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        end = start + self.cuts.pop(0) if self.cuts else len(content)
        try:
            for at in range(start, min(end, len(content)), 1 << 16):
                request.wfile.write(content[at : min(at + (1 << 16), end)])
                time.sleep(self.pause)
        except ConnectionError:  # the client was killed
            pass
