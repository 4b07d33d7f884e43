"""The routes over HTTP, in front of fake ranks: shapes, errors, keys, limits, cancelling, the
queue."""

import json
import signal
import socket
import threading
import time

import openai
import pytest

from tests.ranks import PATIENCE_S
from tests.servers import pretending

KEYS = {"Authorization": "Bearer k2"}
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/fake"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/load"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/openapi.json"),
]


@pytest.fixture(scope="module")
def server():
    with pretending(
        "live", max_body_bytes=100_000, max_queue=24, limits={"max_prompts": 16}
    ) as one:
        yield one
        assert "Traceback" not in one.stderr and one.end() == 0, one.stderr


@pytest.fixture(scope="module")
def locked():
    with pretending(
        "live",
        keys=["k1", "k2", "schlüssel"],
        aliases=["other/one"],
        strict_name=True,
        metrics_prefix="vllm",
        allow_origins=["https://app.example", "http://localhost:3000"],
        defaults={
            "file": {"temperature": 0.6, "top_p": 0.9, "max_tokens": 5},
            "flags": {"top_p": 0.8},
        },
    ) as one:
        yield one


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def is_openai_error(status: int, body: dict, code: int) -> dict:
    """The error, once its shape and status have been checked."""
    assert status == code, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and isinstance(
        body["error"]["code"], str | None
    )
    assert "Traceback" not in str(body) and "/llama_tp" not in str(body)
    return body["error"]


def raw(server, data: bytes) -> bytes:
    """What comes back for bytes on the wire."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        sock.sendall(data)
        got = b""
        while piece := sock.recv(65536):
            got += piece
            if b"content-length" not in got.lower() or len(got.partition(b"\r\n\r\n")[2]) >= int(
                got.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
            ):
                break
        return got


def test_text_comes_back(client):
    reply = client.completions.create(model="fake", prompt=[[9, 5, 6]], seed=3, max_tokens=4)
    assert reply.choices[0].text == "".join(chr(97 + (3 * 31 + p * p) % 26) for p in range(3, 7))
    assert reply.choices[0].finish_reason == "length" and reply.usage.total_tokens == 7
    assert (
        reply.id.startswith("cmpl-")
        and abs(reply.created - time.time()) < 60
        and "tp2" in reply.system_fingerprint
    )


def test_a_stream_is_framed_and_ends_once(server):
    status, headers, body = server.request(
        "/v1/chat/completions",
        json.dumps(
            {
                "messages": [{"role": "user", "content": "hi"}],
                "stream": True,
                "max_tokens": 3,
                "n": 2,
                "stream_options": {"include_usage": True},
            }
        ).encode(),
        {"Content-Type": "application/json"},
    )
    assert (
        status == 200
        and headers["content-type"].startswith("text/event-stream")
        and headers["cache-control"] == "no-cache"
    )
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(
        event.startswith("data: ") for event in events[:-1]
    )
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert [c["delta"] for chunk in chunks[:2] for c in chunk["choices"]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert sorted(
        c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]
    ) == [0, 1]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 6


def test_prompts_of_a_list_keep_their_order(client):
    reply = client.completions.create(
        model="fake",
        prompt=[[1, 5], [9, 5, 6], [0, 5, 6, 7]],
        n=2,
        seed=3,
        max_tokens=6,
        logprobs=0,
        echo=True,
    )
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert [choice.finish_reason for choice in reply.choices] == ["length"] * 4 + ["stop"] * 2
    assert [len(choice.logprobs.tokens) for choice in reply.choices] == [8, 8, 9, 9, 8, 8]
    assert all(choice.logprobs.token_logprobs[0] is None for choice in reply.choices)


def test_requests_without_a_seed_differ_and_seeds_repeat(client):
    def text(**wish):
        return (
            client.completions.create(model="fake", prompt=[9, 5, 6], max_tokens=8, **wish)
            .choices[0]
            .text
        )

    assert text(seed=1) == text(seed=1)
    assert len({text() for _ in range(4)}) > 1


@pytest.mark.parametrize(
    "body, code, param",
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[" * 99_000, 400, None),
        ({}, 400, "prompt"),
        ({"prompt": "x", "n": 10**6}, 400, "n"),
        ({"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "x", "temperature": True}, 400, "temperature"),
        (b'{"prompt": "x", "temperature": NaN}', 400, None),
        ({"prompt": "x", "model": 5}, 400, "model"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [2048]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": ["x"] * 17}, 400, "prompt"),
        ({"prompt": "x", "logit_bias": {"2048": 1}}, 400, "logit_bias"),
        ({"prompt": [1] * 600}, 400, "prompt"),
        ({"prompt": "x", "chat_template": "{{ 7 }}"}, 400, "chat_template"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": "x", "n": 100}, 400, None),
        ({"prompt": "x" * 100_001}, 413, None),
    ],
)
def test_bad_bodies_are_openai_errors_and_name_the_field(body, code, param, server):
    error = is_openai_error(*server.post("/v1/completions", body), code)
    assert error["param"] == param and len(error["message"]) < 1100


def test_after_all_that_the_next_request_is_fine(client):
    assert (
        client.completions.create(model="fake", prompt=[9], max_tokens=1).choices[0].finish_reason
        == "length"
    )


def test_other_wrong_requests(server):
    for method, path, code in [
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("PUT", "/tokenize", 405),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/load/", 404),
    ]:
        reply = raw(
            server, f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
        )
        assert is_openai_error(
            int(reply.split()[1]), json.loads(reply.partition(b"\r\n\r\n")[2]), code
        )
    status, _, body = server.request(
        "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "text/plain"}
    )
    assert is_openai_error(status, json.loads(body), 415)["message"].startswith(
        "the content type must be application/json"
    )


def test_a_body_without_a_length_is_cut_off_too(server):
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    reply = raw(server, head + (b"2710\r\n" + b"x" * 10_000 + b"\r\n") * 11)
    assert is_openai_error(int(reply.split()[1]), json.loads(reply.partition(b"\r\n\r\n")[2]), 413)


def test_headers_without_end_are_cut_off(server):
    for data in (b"GET /health HTTP/1.1\r\nX: " + b"x" * 200_000, b"\x16\x03\x01\r\n\r\n"):
        reply = raw(server, data)
        is_openai_error(int(reply.split()[1]), json.loads(reply.partition(b"\r\n\r\n")[2]), 400)
    assert server.get("/health")[0] == 200


def test_request_ids_are_echoed_clean(server):
    assert server.get("/health", **{"X-Request-Id": "abc-1.2"})[1]["x-request-id"] == "abc-1.2"
    assert (
        server.get("/nothing", **{"X-Request-Id": "a b<c>" + "d" * 500})[1]["x-request-id"]
        == "abc" + "d" * 125
    )
    assert len(server.get("/health")[1]["x-request-id"]) == 32


def test_models_tokens_and_version(server):
    card = json.loads(server.get("/v1/models")[2])["data"][0]
    assert (
        card["id"] == "fake"
        and card["max_model_len"] == 512
        and json.loads(server.get("/v1/models/fake")[2]) == card
    )
    made = server.post("/tokenize", {"prompt": "hello", "return_token_strs": True})[1]
    assert (
        made["count"] == len(made["tokens"]) == len(made["token_strs"])
        and made["token_strs"][0] == "<|begin_of_text|>"
    )
    bare = server.post("/tokenize", {"prompt": "hello", "add_special_tokens": False})[1]["tokens"]
    assert made["tokens"][1:] == bare
    for name, more in (
        ("<|begin_of_text|>", {}),
        ("<|begin_of_text|>", {"add_special_tokens": True}),
        ("<|begin_of_text|>x", {}),
    ):
        ids = server.post("/tokenize", {"prompt": name, "add_special_tokens": False, **more})[1][
            "tokens"
        ]
        # by itself it is the token, else text
        assert (ids == made["tokens"][:1]) == (name == "<|begin_of_text|>" and not more)
    assert server.post("/detokenize", {"tokens": made["tokens"]})[1] == {"prompt": "hello"}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "hello"}]})[1][
        "tokens"
    ]
    assert chat[0] == made["tokens"][0] and len(chat) > len(bare) + 4
    long = server.post("/tokenize", {"prompt": "hello " * 10_000})[1]
    assert long["count"] == len(long["tokens"]) > 10_000
    info = json.loads(server.get("/tokenizer_info")[2])
    assert info["eos_token"].startswith("<|") and info["bos_token"] == "<|begin_of_text|>"
    assert set(json.loads(server.get("/version")[2])) == {"version"}
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 1}),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}),
        ("/tokenize", {"messages": [1]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "x"}),
        ("/detokenize", {"tokenz": []}),
    ]:
        is_openai_error(*server.post(path, body), 400)


@pytest.mark.parametrize("name", [None, "", "dummy", "tgi", "gpt-4o", "../../etc/passwd"])
def test_any_name_will_do_for_the_one_model(name, server):
    named = {} if name is None else {"model": name}
    status, reply = server.post("/v1/completions", {"prompt": [9, 5], "max_tokens": 1, **named})
    assert status == 200 and reply["model"] == "fake"  # which model it was, not which was asked for
    assert (
        server.post("/tokenize", {"prompt": "x", **named})[0]
        == server.post("/detokenize", {"tokens": [9], **named})[0]
        == 200
    )
    if name:  # who asks whether there is such a model wants to know
        is_openai_error(*server.get_json(f"/v1/models/{name}"), 404)


def test_strict_names_and_aliases(locked):
    def status(name: str | None) -> int:
        named = {} if name is None else {"model": name}
        asked = {
            "/v1/completions": {"prompt": [9], "max_tokens": 1},
            "/tokenize": {"prompt": "x"},
            "/detokenize": {"tokens": [9]},
        }
        codes = {locked.post(path, {**body, **named}, **KEYS)[0] for path, body in asked.items()}
        return codes.pop() if len(codes) == 1 else codes

    assert [status(name) for name in ("fake", "other/one", None, "dummy", "")] == [
        200,
        200,
        200,
        404,
        404,
    ]
    error = is_openai_error(
        *locked.post("/v1/completions", {"prompt": "x", "model": "dummy"}, **KEYS), 404
    )
    assert error["code"] == "model_not_found" and "'fake' and 'other/one'" in error["message"]
    cards = json.loads(locked.get("/v1/models", **KEYS)[2])["data"]
    assert [(card["id"], card["root"]) for card in cards] == [
        ("fake", "fake"),
        ("other/one", "fake"),
    ]
    assert json.loads(locked.get("/v1/models/other/one", **KEYS)[2]) == cards[1]
    reply = locked.post(
        "/v1/completions", {"prompt": [9, 5], "max_tokens": 1, "model": "other/one"}, **KEYS
    )[1]
    assert reply["model"] == "fake"


def test_what_requests_do_not_say(locked, server):
    """The fake ranks hear of the length alone; what the rest does, tests/protocol/test_defaults.py
    knows."""
    card = json.loads(locked.get("/v1/models/fake", **KEYS)[2])["default_sampling_params"]
    assert card == {
        "temperature": 0.6,
        "top_p": 0.8,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 5,
    }
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for fields, n in (({}, 5), ({"max_tokens": 2}, 2), ({"max_completion_tokens": 7}, 7)):
        assert (
            locked.post("/v1/chat/completions", chat | fields, **KEYS)[1]["usage"][
                "completion_tokens"
            ]
            == n
        )
    assert (
        locked.post("/v1/completions", {"prompt": [9]}, **KEYS)[1]["usage"]["completion_tokens"]
        == 16
    )
    card = json.loads(server.get("/v1/models")[2])["data"][0]["default_sampling_params"]
    assert (card["temperature"], card["top_p"], card["max_tokens"]) == (1.0, 1.0, None)


def test_openapi_describes_the_bodies(server):
    paths = json.loads(server.get("/openapi.json")[2])["paths"]
    for path, field in (("/tokenize", "prompt"), ("/detokenize", "tokens")):
        assert (
            field
            in paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"][
                "properties"
            ]
        )
    for path in ("/v1/completions", "/v1/chat/completions"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert "temperature" in schema["properties"] and "$ref" not in json.dumps(schema)


@pytest.mark.parametrize("method, path", ROUTES)
def test_every_route_but_the_open_ones_needs_a_key(method, path, locked):
    head = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
    for line in [
        "",
        "Authorization: Bearer wrong\r\n",
        "Authorization: k1\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Basic k1\r\n",
        "Authorization: Bearer schl\xc3ssel\r\n",
    ]:
        reply = raw(locked, f"{method} {path} HTTP/1.1\r\n{line}{head}\r\n{{}}".encode("latin-1"))
        assert (
            is_openai_error(
                int(reply.split()[1]), json.loads(reply.partition(b"\r\n\r\n")[2]), 401
            )["code"]
            == "invalid_api_key"
        )
    reply = raw(
        locked, f"{method} {path} HTTP/1.1\r\nauthorization: bearer k2\r\n{head}\r\n{{}}".encode()
    )
    assert int(reply.split()[1]) in (200, 400)


def test_the_list_of_routes_is_whole(locked):
    known = {
        path.replace("{name}", "fake")
        for path in json.loads(locked.get("/openapi.json", **KEYS)[2])["paths"]
    }
    assert known | {"/openapi.json"} == {path for _, path in ROUTES} | {"/health", "/livez"}


def test_probes_need_no_key_and_take_what_their_senders_send(locked):
    for path, methods in [
        ("/health", "GET HEAD"),
        ("/readyz", "GET HEAD"),
        ("/livez", "GET HEAD"),
        ("/ping", "GET HEAD POST"),
    ]:
        for method in methods.split():
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
                "Connection: close\r\n\r\n"
            )
            reply = raw(locked, head.encode())
            assert reply.startswith(b"HTTP/1.1 200"), (method, path, reply)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../health",
        "/health/",
        "/HEALTH",
        "/%2fhealth",
        "//health",
        "/health?x=1",
        "/?/v1/models",
    ],
)
def test_no_spelling_of_a_path_gets_past_the_key(path, locked):
    for host in ("x", "x/health?", "localhost"):
        status = int(
            raw(locked, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).split()[1]
        )
        assert status == (200 if path in ("/health?x=1", "/?/v1/models") else 401), host


def test_the_ready_line_says_what_everybody_wants_to_know(server):
    server.wait_for(
        "ready: 2 rank(s), up to 8 samples at once and 24 waiting, context of 512 tokens\n"
    )


def test_a_client_that_goes_is_forgotten(server, client):
    before = server.n_aborted()
    # prompts that begin with 1 take 20 ms a step
    wish = dict(model="fake", prompt=[1, 5], n=8, max_tokens=400)
    stream = client.completions.create(**wish, stream=True)
    next(iter(stream))
    assert json.loads(server.get("/load")[2])["server_load"] == 8
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(**wish)
    server.wait_idle()
    assert server.n_aborted() == before + 16  # none ran to its end


def test_what_does_not_fit_in_the_queue_is_429(server, client):
    """8 rows and a queue of 24: a request of 32 samples fills it."""
    stream = client.completions.create(
        model="fake", prompt=[1, 5], n=32, max_tokens=400, stream=True
    )
    next(iter(stream))
    status, headers, body = server.request(
        "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "application/json"}
    )
    error = is_openai_error(status, json.loads(body), 429)
    assert error["type"] == "rate_limit_error" and headers["retry-after"] == "1"
    stream.close()
    server.wait_idle()
    assert client.completions.create(model="fake", prompt=[9], max_tokens=1).choices
    page = server.get("/metrics")[2].decode()
    assert 'llama_tp:admission_rejections_total{model_name="fake",reason="queue_full"} 1.0' in page


def test_metrics_count(server, client):
    def value(name: str) -> float:
        return sum(
            float(line.split()[-1])
            for line in server.get("/metrics")[2].decode().splitlines()
            if line.startswith(name)
        )

    names = [
        "llama_tp:generation_tokens_total",
        "llama_tp:prompt_tokens_total",
        "llama_tp:time_to_first_token_seconds_count",
        "llama_tp:e2e_request_latency_seconds_count",
        "llama_tp:inter_token_latency_seconds_count",
        'llama_tp:request_success_total{finished_reason="length"',
        "llama_tp:request_params_n_sum",
        "llama_tp:request_queue_time_seconds_count",
        "llama_tp:request_prefill_time_seconds_count",
        "llama_tp:request_decode_time_seconds_count",
        "llama_tp:iteration_tokens_total_sum",
    ]
    before = [value(name) for name in names]
    client.completions.create(model="fake", prompt=[[9, 5, 6], [9, 5]], n=2, max_tokens=5)
    assert [value(name) - was for name, was in zip(names, before)] == [
        20,
        5,
        2,
        2,
        16,
        4,
        4,
        2,
        2,
        2,
        25,
    ]
    page = server.get("/metrics")[2].decode()
    assert (
        "request_max_num_generation_tokens_sum" in page
        and "request_inference_time_seconds_count" in page
    )
    accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
    status, headers, body = server.request("/metrics", None, {"Accept": accept})
    assert status == 200 and headers["content-type"].startswith(
        "application/openmetrics-text; version=1.0.0"
    )
    assert body.endswith(b"# EOF\n") and b"\nllama_tp:generation_tokens_total{" in body
    n_series = len(server.get("/metrics")[2].splitlines())
    for i in range(50):
        server.get(f"/path{i}")
        server.post("/v1/completions", {"prompt": "x", "model": f"model{i}"})
    assert len(server.get("/metrics")[2].splitlines()) < n_series + 40


def test_pages_of_other_origins_are_asked_in_where_they_are_allowed(locked, server):
    """What a browser sends before, and with, a request of a page from elsewhere; it shows the page
    the answer only if it may."""

    def asked(
        one,
        path: str,
        origin: str,
        method: str = "POST",
        headers: str = "authorization,content-type,x-stainless-os",
    ):
        lines = [
            f"OPTIONS {path} HTTP/1.1",
            "Host: x",
            f"Origin: {origin}",
            f"Access-Control-Request-Method: {method}",
            f"Access-Control-Request-Headers: {headers}",
            "Content-Length: 0",
            "",
            "",
        ]
        head, _, _ = raw(one, "\r\n".join(lines).encode()).decode().lower().partition("\r\n\r\n")
        return int(head.split()[1]), dict(line.split(": ", 1) for line in head.split("\r\n")[1:])

    for origin in ("https://app.example", "http://localhost:3000"):
        # without the key, which comes later
        status, headers = asked(locked, "/v1/chat/completions", origin)
        assert status == 200 and headers["access-control-allow-origin"] == origin
        assert (
            "post" in headers["access-control-allow-methods"]
            and "authorization" in headers["access-control-allow-headers"]
        )
        assert "access-control-allow-credentials" not in headers
    assert asked(locked, "/v1/chat/completions", "https://app.example", "DELETE")[0] == 400
    for origin in (
        "https://evil.example",
        "https://app.example.evil.example",
        "http://app.example",
        "null",
    ):
        status, headers = asked(locked, "/v1/chat/completions", origin)
        assert status == 400 and "access-control-allow-origin" not in headers
    body = {"prompt": [9], "max_tokens": 1}
    for keys, code in ((KEYS, 200), ({}, 401)):  # a refusal is shown to the page, too
        status, headers, _ = locked.request(
            "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Origin": "https://app.example", **keys},
        )
        assert status == code and headers["access-control-allow-origin"] == "https://app.example"
        assert (
            "x-request-id" in headers["access-control-expose-headers"] and "x-request-id" in headers
        )
    assert (
        "access-control-allow-origin" not in locked.get("/health", Origin="https://evil.example")[1]
    )
    assert asked(server, "/v1/completions", "https://app.example")[0] == 405  # off unless asked for
    assert (
        "access-control-allow-origin" not in server.get("/health", Origin="https://app.example")[1]
    )


def test_streams_go_on_over_a_death_and_later_ones_are_told_to_wait():
    with pretending("live") as server:
        calm = server.post("/v1/completions", {"prompt": [9, 5, 6], "max_tokens": 300, "seed": 4})[
            1
        ]["choices"]
    with pretending("die:40", "die:50", "live") as server:
        assert (
            server.post("/v1/completions", {"prompt": [9, 5, 6], "max_tokens": 300, "seed": 4})[1][
                "choices"
            ]
            == calm
        )
        assert 'rank_restarts_total{model_name="fake"} 2.0' in server.get("/metrics")[2].decode()


def test_before_and_after_the_ranks(tmp_path):
    with pretending("deaf", ready=False) as server:
        server.wait_listening()
        status, headers, body = server.get("/health")
        assert (
            is_openai_error(status, json.loads(body), 503)["code"] == "loading"
            and headers["retry-after"] == "5"
        )
        assert [server.get(path)[0] for path in ("/readyz", "/ping", "/livez")] == [503, 503, 200]
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            assert is_openai_error(*server.post(path, {}), 503)["message"].startswith(
                "the model is loading"
            )
        assert server.get("/v1/models")[0] == 503 and server.get("/metrics")[0] == 200
        assert server.end(signal.SIGINT) == 0
    with pretending("never", ready=False) as server:
        assert server.process.wait(PATIENCE_S) == 1
        assert [line for line in server.stderr.splitlines() if line.startswith("error: ")] == [
            "error: the weights are damaged - found none - download them again"
        ]


def test_the_end_of_the_ranks_is_told_in_the_stream():
    with pretending("die:9", "never", max_restarts=1) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        texts = []
        with pytest.raises(openai.APIError, match="the ranks have ended"):
            for chunk in client.completions.create(
                model="fake", prompt=[9, 5], max_tokens=400, stream=True
            ):
                texts.append(chunk.choices[0].text)
        assert len(texts) >= 7
        assert server.process.wait(PATIENCE_S) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_streams_finish_and_takes_no_more(number):
    with pretending("slow") as server:
        client = openai.OpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60
        )
        stream = client.completions.create(model="fake", prompt="O", max_tokens=60, stream=True)
        chunks = [next(iter(stream))]
        server.process.send_signal(number)
        server.wait_for("ending: 1 requests")
        assert server.get("/health")[0] == 503 and server.get("/livez")[0] == 200
        status, body = server.post("/v1/completions", {"prompt": "x"})
        assert status == 503 and body["error"]["code"] == "engine_unavailable"
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.process.wait(PATIENCE_S) == 0, server.stderr


def test_a_server_under_nohup_outlives_its_terminal():
    # as nohup does; a process that is started inherits it
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pretending("live") as server:
            server.process.send_signal(signal.SIGHUP)
            assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 5})[0] == 200
            assert server.end() == 0 and server.stderr.count("ending: ") == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_killed_server_leaves_goes_at_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pretending("live") as server:
        server.process.kill()
        server.process.wait()
        [left] = tmp_path.glob("llama_tp-*")
    with pretending("live") as server:
        assert not left.exists() and len(list(tmp_path.glob("llama_tp-*"))) == 1
        assert server.end() == 0 and not list(tmp_path.glob("llama_tp-*"))


def test_a_second_signal_ends_at_once_with_an_error_in_the_stream():
    with pretending("slow", drain_s=600) as server:
        client = openai.OpenAI(
            base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60
        )
        stream = client.completions.create(
            model="fake", prompt=["O"] * 4, max_tokens=500, n=32, stream=True
        )
        next(iter(stream))
        server.process.send_signal(signal.SIGINT)
        server.wait_for("ending: 4 requests")
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="shut down"):
            for _ in stream:
                pass
        assert server.process.wait(PATIENCE_S) == 0, server.stderr


def test_a_drain_that_takes_too_long_is_cut():
    with pretending("live", drain_s=0.5) as server:
        results = []
        wish = {"prompt": [1, 5], "max_tokens": 500}
        thread = threading.Thread(
            target=lambda: results.append(server.post("/v1/completions", wish))
        )
        thread.start()
        while not json.loads(server.get("/load")[2])["running"]:
            time.sleep(0.02)
        assert server.end() == 0
        thread.join()
        assert is_openai_error(*results[0], 503)["message"].startswith(
            "the server has been shut down"
        )
