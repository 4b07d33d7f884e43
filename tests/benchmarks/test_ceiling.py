"""The machine's ceiling: what is measured with, how it is timed on a device, and that nothing else
comes into the timing."""

from types import SimpleNamespace

import pytest
import torch

from llama_tp.benchmarks import ceiling, latency, session
from llama_tp.benchmarks.ceiling import (
    Ceiling,
    CudaProbe,
    HostProbe,
    matrix_rate,
    probe_of,
    read_rate,
)
from llama_tp.engine.worker import Worker
from llama_tp.parallel.groups import single_rank
from tests.engines import Counting, engine
from tests.shapes import SHRUNK

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
GIB = 1 << 30


class FakeDevice:
    """A device with a clock of its own: it works for 3 ms a call, while the host is done with
    launching after 2 us, and idle between two launches if it is waited for."""

    def __init__(self, monkeypatch, free: int = 80 * GIB):
        self.now_ms, self.n_waits, self.n_calls = 0.0, 0, 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self):
                self.at_ms = device.now_ms

            def elapsed_time(self, end):
                assert device.n_waits, "read before the device was done"
                return end.at_ms - self.at_ms

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda where: (free, 80 * GIB))

    def synchronize(self, where):
        self.n_waits += 1
        self.now_ms += 50  # all that a host takes to notice, which no event saw

    def work(self):
        self.n_calls += 1
        self.now_ms += 100 if self.n_calls == 1 else 3  # the first call sets things up


def test_a_device_is_timed_by_its_own_events_and_waited_for_once(monkeypatch):
    device = FakeDevice(monkeypatch)
    assert CudaProbe(CUDA).times(device.work) == pytest.approx([3e-3] * ceiling.REPEATS)
    assert device.n_waits == 1 and device.n_calls == ceiling.REPEATS + 1


@pytest.mark.parametrize(
    "free, n_bytes",
    [(80 * GIB, 4 * GIB), (8 * GIB, 4 * GIB), (3 * GIB, 3 * GIB // 2), (GIB // 2, GIB // 4)],
)
def test_what_a_gpu_reads_is_far_beyond_its_cache_and_within_what_is_free(
    monkeypatch, free, n_bytes
):
    FakeDevice(monkeypatch, free)
    probe = probe_of(CUDA)
    assert type(probe) is CudaProbe and probe.n_bytes == n_bytes
    assert (probe.n_rows, probe.width, probe.n_matrices) == (8192, 8192, 1)


class Known:
    """A probe of small sizes whose clock is known, and which keeps what was computed."""

    n_bytes, n_rows, width, n_matrices = 1 << 16, 32, 64, 2

    def times(self, work):
        self.result = work()
        return [1.0, 2.0, 60.0]


def test_rates_are_medians_over_random_data(monkeypatch):
    monkeypatch.setattr(ceiling, "load", lambda: None)
    monkeypatch.setattr(ceiling, "PART_BYTES", 1 << 14)
    probe = Known()
    # four parts, each its own maximum
    assert read_rate(CPU, probe) == (1 << 16) / 2 and len(set(map(int, probe.result))) == 4
    assert matrix_rate(CPU, torch.float32, probe) == 2 * 2 * 32 * 64**2 / 2
    assert all(len(product.unique()) > 1000 for product in probe.result)


def test_this_machine_is_measured_the_same_way():
    probe = probe_of(CPU)
    assert type(probe) is HostProbe and len(probe.times(int)) == ceiling.REPEATS


def test_no_batch_size_is_captured_inside_a_timing():
    one = engine(
        single_rank(), SHRUNK["8b"], worker=Worker, graphs=True, record=Counting, max_rows=3
    )
    record = one.worker.graphs.record
    captured = record.n_captured
    limits = Ceiling(1e9, 1e12, 10**9, 10**6, 10**9, 5 * 10**8, 1)
    latency.latency(one, limits, [1, 3], 8, 3, 1)
    assert record.n_captured == captured and record.n_replayed == 2 * (1 + 1) * 2


def test_the_probe_is_no_part_of_a_gpus_peak(monkeypatch):
    """The peak reported is the model's: before the probe, or after it."""
    peaks = iter((7, 900, 5))
    monkeypatch.setattr(session, "peak_bytes", lambda engine: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(session, "ceiling", lambda *args, **named: "limits")
    model = SimpleNamespace(config=None, shard=None, dtype=None)
    on_gpu = SimpleNamespace(
        ranks=SimpleNamespace(device=CUDA), worker=SimpleNamespace(model=model)
    )
    limits, before = session.limits_and_peak(on_gpu, alone=False)
    assert limits == "limits" and max(before, session.peak_bytes(on_gpu)) == 7
