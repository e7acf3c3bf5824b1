"""The parts of OpenAI's API that captions need, over real HTTP on loopback, with faults to order and every answer counted.

    with OpenAIServer() as server:
        server.chat_faults += [Fault(status=500), Fault(cut=True)]   # for the next two chat requests, in this order
        ...
        assert server.paid.total() == 3

An answer is paid for when it is written, whether or not it arrives. Direct answers are counted under the digest of the
picture in the request, or under the text where there is no picture, answers of batches under their custom_id.
"""

import hashlib
import itertools
import json
import socket
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass
class Fault:
    """What goes wrong with one request."""

    status: int | None = None
    error: dict = field(default_factory=dict)
    """The error object that comes with the status."""
    headers: dict = field(default_factory=lambda: {"retry-after-ms": "10"})
    delay: float = 0.0
    """Seconds before the answer."""
    cut: bool = False
    """Send half of the answer, then close the connection."""
    raw: bytes | None = None
    """Send this in place of the answer."""
    change: dict = field(default_factory=dict)
    """Set these fields of the message, or `finish_reason`."""


class OpenAIServer:
    """A server on a free port of 127.0.0.1; use it as a context manager."""

    def __init__(self):
        self.chat_faults: deque[Fault | None] = deque()
        """For the next chat requests; None for a good answer."""
        self.faults_of: dict[str, list[Fault]] = {}
        """For the next chat requests about a text, by the text."""
        self.replies: dict[str, str] = {}
        """What is answered to a text, by the text."""
        self.takes_structure = True
        """Whether a `response_format` is taken, or rejected as by a server that knows none."""
        self.create_faults: deque[Fault] = deque()
        """For the next attempts at creating a batch; a `cut` one does create it."""
        self.outcomes: deque[str] = deque()
        """What becomes of the next batches: "completed", "expired" (the first half is answered), "failed", "cancelled" (the
        first half), "lines broken", "files gone"; "completed" when empty."""
        self.line_faults: dict[int, Fault] = {}
        """For the n-th line of every batch: a status puts it into the file of errors."""
        self.polls = 1
        """How often a batch is looked at before it is finished."""
        self.page = 2
        """Batches in one page of the list, whatever the client asks for."""
        self.hook = lambda event, server: None
        """Called at "chat" (an answer is written but not sent), "upload", "created" (not yet replied), "content"."""
        self.paid: Counter[str] = Counter()
        self.requests: list[tuple[str, float]] = []
        """Method and path of each request, with the time when it came."""
        self.bodies: list[dict] = []
        """Bodies of the chat requests, direct and in batches."""
        self.batches: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def __enter__(self):
        server = self

        class Handler(_Handler):
            api = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self):
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def count(self, request):
        """How many requests there were, such as "POST /v1/batches"."""
        return sum(made == request for made, _ in self.requests)

    # --- What it does -------------------------------------------------------------------------------------------------

    def complete(self, body, fault=None, name=None):
        """Answer a chat request; every answer is another one."""
        content = body["messages"][-1]["content"]
        is_text = isinstance(content, str)
        subject = (
            content if is_text else hashlib.sha256(content[1]["image_url"]["url"].encode()).hexdigest()[:8]
        )
        with self._lock:
            self.bodies.append(body)
            self.paid[name or subject] += 1
            number = next(self._numbers)
        reply = self.replies[subject] if is_text else f"A picture {subject}, seen for the {number}. time."
        if "response_format" in body:
            reply = json.dumps({"caption": reply})
        message = {"role": "assistant", "content": reply, "refusal": None}
        change = dict(fault.change) if fault else {}
        finish = change.pop("finish_reason", "stop")
        return {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [{"index": 0, "message": message | change, "finish_reason": finish}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }

    def create(self, wanted):
        """A new batch, which is accepted and so costs."""
        with self._lock:
            name = f"batch_{len(self.batches) + 1}"
            self.batches[name] = {
                "id": name,
                "object": "batch",
                "created_at": int(time.time()),
                "status": "validating",
                "output_file_id": None,
                "error_file_id": None,
                "errors": None,
                "polls": 0,
                **wanted,
            }
        return self.batches[name]

    def advance(self, batch):
        """What a look at a batch finds."""
        if batch["status"] in ("validating", "in_progress"):
            batch["polls"] += 1
            batch["status"] = "in_progress"
            if batch["polls"] > self.polls:
                self._finish(batch, self.outcomes.popleft() if self.outcomes else "completed")
        return batch

    def _finish(self, batch, outcome):
        lines = self.files[batch["input_file_id"]].splitlines()
        if outcome == "failed":
            problem = {
                "code": "token_limit_exceeded",
                "message": "Enqueued token limit reached for gpt-4o.",
                "line": None,
            }
            batch |= {"status": "failed", "errors": {"object": "list", "data": [problem]}}
            return
        half = outcome in ("expired", "cancelled")
        output, errors = [], []
        for number, line in enumerate(lines):
            request = json.loads(line)
            fault = self.line_faults.get(number)
            if half and number >= len(lines) // 2:
                if outcome == "expired":  # a cancelled batch says nothing of what it did not get to
                    gone = {"code": "batch_expired", "message": "The completion window expired."}
                    errors.append({"custom_id": request["custom_id"], "response": None, "error": gone})
            elif fault and fault.status:
                response = {"status_code": fault.status, "body": {"error": {"message": "no", **fault.error}}}
                errors.append({"custom_id": request["custom_id"], "response": response, "error": None})
            else:
                body = self.complete(request["body"], fault, request["custom_id"])
                response = {"status_code": 200, "body": body}
                output.append({"custom_id": request["custom_id"], "response": response, "error": None})
        batch["status"] = outcome if half else "completed"
        for kind, records in (("output", output), ("error", errors)):
            if records:
                name = batch[f"{kind}_file_id"] = f"file-{kind}-{batch['id']}"
                text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
                self.files[name] = (text[10:] if outcome == "lines broken" else text).encode()
                if outcome == "files gone":
                    del self.files[name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: OpenAIServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._serve()

    def do_POST(self):
        self._serve()

    def _serve(self):
        api, url = self.api, urlsplit(self.path)
        route = f"{self.command} {url.path}"
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        api.requests.append((route, time.monotonic()))
        given = self.headers.get("authorization", "").removeprefix("Bearer ")
        if given != KEY:
            return self._fail(Fault(401, {"message": f"Incorrect API key provided: {given}."}))
        path = url.path.removeprefix("/v1").strip("/").split("/")
        match (self.command, *path):
            case ("POST", "chat", "completions"):
                return self._chat(json.loads(data))
            case ("POST", "files"):
                return self._upload(data)
            case ("GET", "files", name, "content") if name in api.files:
                api.hook("content", api)
                return self._reply(api.files[name], "application/octet-stream")
            case ("POST", "batches"):
                return self._create(json.loads(data))
            case ("GET", "batches"):
                return self._list(parse_qs(url.query).get("after", [None])[0])
            case ("GET", "batches", name) if name in api.batches:
                return self._reply(api.advance(api.batches[name]))
            case ("POST", "batches", name, "cancel") if name in api.batches:
                api._finish(api.batches[name], "cancelled")
                return self._reply(api.batches[name])
        return self._fail(Fault(404, {"message": f"There is no {url.path}."}))

    def _chat(self, body):
        api = self.api
        with api._lock:
            fault = api.chat_faults.popleft() if api.chat_faults else None
            content = body["messages"][-1]["content"]
            if isinstance(content, str) and api.faults_of.get(content):
                fault = api.faults_of[content].pop(0)
            if "response_format" in body and not api.takes_structure:
                fault = Fault(400, {"message": "Unknown parameter: response_format"})
            api._at_once += 1
            api.most_at_once = max(api.most_at_once, api._at_once)
        try:
            if fault and fault.status:
                return self._fail(fault)
            time.sleep(fault.delay if fault else 0.005)
            answer = api.complete(body, fault)
            api.hook("chat", api)
        finally:
            with api._lock:
                api._at_once -= 1
        if fault and fault.raw is not None:
            answer = fault.raw
        return self._reply(answer, cut=bool(fault and fault.cut))

    def _upload(self, data):
        form = message_from_bytes(
            b"Content-Type: " + self.headers["content-type"].encode() + b"\r\n\r\n" + data
        )
        parts = {part.get_param("name", header="content-disposition"): part for part in form.get_payload()}
        assert parts["purpose"].get_payload() == "batch"
        self.api.hook("upload", self.api)
        with self.api._lock:
            name = f"file-{len(self.api.files) + 1}"
            self.api.files[name] = parts["file"].get_payload(decode=True)
        return self._reply(
            {"id": name, "object": "file", "bytes": len(self.api.files[name]), "purpose": "batch"}
        )

    def _create(self, wanted):
        fault = self.api.create_faults.popleft() if self.api.create_faults else None
        if fault and fault.status:
            return self._fail(fault)
        batch = self.api.create(wanted)
        self.api.hook("created", self.api)
        return self._reply(batch, cut=bool(fault and fault.cut))

    def _list(self, after):
        batches = list(self.api.batches.values())[::-1]
        start = 1 + next((i for i, batch in enumerate(batches) if batch["id"] == after), -1)
        page = batches[start : start + self.api.page]
        return self._reply({"object": "list", "data": page, "has_more": start + len(page) < len(batches)})

    def _fail(self, fault):
        error = {"message": "no", "type": "error", "code": None, **fault.error}
        return self._reply({"error": error}, status=fault.status, headers=fault.headers)

    def _reply(self, answer, kind="application/json", status=200, headers=None, cut=False):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        try:
            self.send_response(status)
            for name, value in {
                "content-type": kind,
                "content-length": str(len(data)),
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
        except OSError:  # the client has gone
            self.close_connection = True
