"""A small OpenAI-compatible server with answers that a test chooses, for what talks to servers.
Standard library, threads."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer:
    """`with FakeServer() as server:` listens at `server.url`.

    Args:
        pieces: the text of every answer, as it is streamed; cut to the request's max_tokens,
            counted as a token each.
        first_s, gap_s: seconds before the first piece and before each other one.
        ending: "whole"; or, after half of the pieces, "error" sends an error event, "cut" closes
            the connection, "hang" sends only comments.
        refusal: (status, message).
        n_good: so many requests are answered well before `ending` and `refusal` count.
        tokenize: has /tokenize and /detokenize, of a character a token.

    `requests` are (path, headers, body), `most` the most streams at once, `n_broken` those whose
    client went away.
    """

    def __init__(
        self,
        pieces=("one ", "two ", "three ", "four"),
        first_s=0.0,
        gap_s=0.0,
        ending="whole",
        refusal=None,
        n_good=0,
        tokenize=False,
    ):
        self.pieces, self.first_s, self.gap_s, self.ending = pieces, first_s, gap_s, ending
        self.refusal, self.n_good, self.tokenize = refusal, n_good, tokenize
        self.requests, self.running, self.most, self.n_broken = [], 0, 0, 0
        self.lock, self.stopping = threading.Lock(), threading.Event()

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                found = {"/v1/models": {"object": "list", "data": [{"id": "fake-1"}]}}.get(
                    self.path
                )
                self.reply(200 if found else 404, found or {"error": {"message": "no such route"}})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if fake.tokenize and self.path == "/tokenize":
                    return self.reply(200, {"tokens": list(map(ord, body["prompt"]))})
                if fake.tokenize and self.path == "/detokenize":
                    return self.reply(200, {"prompt": "".join(map(chr, body["tokens"]))})
                if self.path not in ("/v1/completions", "/v1/chat/completions"):
                    return self.reply(404, {"error": {"message": "no such route"}})
                with fake.lock:
                    fake.requests.append((self.path, self.headers, body))
                    if fake.refusal and len(fake.requests) > fake.n_good:
                        return self.reply(fake.refusal[0], {"error": {"message": fake.refusal[1]}})
                    fake.running += 1
                    fake.most = max(fake.most, fake.running)
                try:
                    self.stream(body)
                except OSError:
                    fake.n_broken += 1
                finally:
                    with fake.lock:
                        fake.running -= 1

            def stream(self, body):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                chat, pieces = (
                    self.path == "/v1/chat/completions",
                    fake.pieces[: body.get("max_tokens")],
                )
                self.wfile.write(b": ping\n\n")
                if chat:
                    self.event(
                        {
                            "choices": [
                                {
                                    "index": 0,
                                    "delta": {"role": "assistant", "content": ""},
                                    "finish_reason": None,
                                }
                            ]
                        }
                    )
                for i, piece in enumerate(pieces):
                    if (
                        fake.ending != "whole"
                        and i >= len(pieces) / 2
                        and len(fake.requests) > fake.n_good
                    ):
                        if fake.ending == "error":
                            self.event(
                                {"error": {"message": "a rank died", "type": "server_error"}}
                            )
                        while fake.ending == "hang" and not fake.stopping.wait(0.05):
                            self.wfile.write(b": ping\n\n")
                        return
                    time.sleep(fake.gap_s if i else fake.first_s)
                    choice = {"delta": {"content": piece}} if chat else {"text": piece}
                    self.event({"choices": [{"index": 0, **choice, "finish_reason": None}]})
                self.event(
                    {
                        "choices": [
                            {
                                "index": 0,
                                **({"delta": {}} if chat else {"text": ""}),
                                "finish_reason": "stop",
                            }
                        ]
                    }
                )
                self.event(
                    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces)}}
                )
                self.wfile.write(b"data: [DONE]\n\n")

            def event(self, value):
                # raw, as most send it
                self.wfile.write(
                    b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
                )
                self.wfile.flush()

            def reply(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 200
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that went away

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
