"""What /metrics says, read by prometheus_client's own parsers, and held against what vLLM's
dashboards ask for."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from llama_tp.server.metrics import Metrics, content_type

OPENMETRICS = (
    "application/openmetrics-text;version=1.0.0,"
    "application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"
)
# Every series in the queries of vLLM's dashboards (examples/observability, November 2026):
# prometheus_grafana/grafana.json, dashboards/grafana/query_statistics.json and
# performance_statistics.json; of its own (engine, reason) what their variables need.
HISTOGRAMS = (
    "e2e_request_latency_seconds",
    "inter_token_latency_seconds",
    "time_to_first_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_max_num_generation_tokens",
    "iteration_tokens_total",
)
VLLMS = {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")} | {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
}


class Idle:
    """A request manager at which nobody has been."""

    stats, n_samples, heard_at, state = {}, 3, 0.0, "ready"


def series(metrics: Metrics, accept: str) -> dict[str, list[dict]]:
    """Name -> the labels of each of its series."""
    read = (
        read_openmetrics
        if content_type(accept).startswith("application/openmetrics-text")
        else read_text
    )
    found = {}
    for family in read(metrics.text(Idle, accept).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.mark.parametrize("accept", ["", OPENMETRICS])
def test_every_query_of_vllms_dashboards_finds_its_metric_from_the_start(accept):
    found = series(Metrics("llama", "vllm"), accept)
    assert not {name for name in VLLMS if f"vllm:{name}" not in found}
    for name in VLLMS:
        assert all(
            labels["model_name"] == "llama" and labels["engine"] == "0"
            for labels in found[f"vllm:{name}"]
        )
    assert {labels["finished_reason"] for labels in found["vllm:request_success_total"]} == {
        "stop",
        "length",
        "abort",
        "error",
    }
    assert not [name for name in found if name.startswith("llama_tp")]


def test_both_formats_say_the_same():
    metrics = Metrics("x")
    metrics.replied("/health", "GET", 200, 0.1)
    assert series(metrics, "") == series(metrics, OPENMETRICS)
    assert "engine" not in series(metrics, "")["llama_tp:num_requests_running"][0]


@pytest.mark.parametrize("prefix, status", [("llama_tp", "503"), ("vllm", "5xx")])
def test_statuses_of_http_as_the_dashboards_know_them(prefix, status):
    metrics = Metrics("x", prefix)
    metrics.replied("/health", "GET", 503, 0.1)
    assert series(metrics, "")["http_requests_total"] == [
        {"handler": "/health", "method": "GET", "status": status}
    ]


@pytest.mark.parametrize(
    "accept, is_openmetrics",
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        (OPENMETRICS, True),
        ("Application/OpenMetrics-Text", True),
        ('application/openmetrics-text; version=abc; escaping="', True),
        ("application/openmetrics-textual", False),
        ("," * 1000, False),
    ],
)
def test_what_an_accept_header_asks_for(accept, is_openmetrics):
    assert (
        content_type(accept).startswith("application/openmetrics-text; version=1.0.0")
        == is_openmetrics
    )
