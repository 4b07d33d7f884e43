// Collectives between the ranks of one host through a piece of shared memory, declared in native.h, called through ctypes.
//
// Layout: a RankCounters for each rank, then two sets of tp buffers of CHUNK bytes. Operations are numbered; number n uses set
// n % 2. A rank posts n when its data lie in its buffer, and says done when it has read what it needs from the others.
// Before it writes for n it waits until all are done with n - 2, which is nearly always so already: an operation
// costs one wait. Waiting spins, then yields, then sleeps on a futex, for ranks that outnumber the cores or idle.
//
// Sums are made by every rank for itself, in fp32, as one fixed binary tree over the ranks: the same bits everywhere.

#include <atomic>
#include <algorithm>
#include <ctime>
#include <sched.h>

#include "native.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t CHUNK = 1 << 18;
constexpr int SPINS = 4000;             // 20-40 us; then the core is offered to others at each try
constexpr double YIELD_S = 0.02;        // longer than a driver's pause between two steps; then the rank sleeps
constexpr int MAX_RANKS = MAX_PARTS;

struct Counter {
    alignas(128) std::atomic<uint32_t> n;
    std::atomic<uint32_t> sleepers;
};
struct RankCounters { Counter posted, done; };
static_assert(sizeof(RankCounters) == 256 && sizeof(std::atomic<uint32_t>) == 4, "futexes are 32 bits, each counter on lines of its own");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "a lock would be of one process only");

double now_s() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_on(Counter& c, uint32_t seen) {          // until it changes, but no longer than 0.1 s
    timespec t = {0, 100000000};
#ifdef __linux__
    syscall(SYS_futex, &c.n, FUTEX_WAIT, seen, &t, nullptr, 0);
#else
    t.tv_nsec = 1000000;
    nanosleep(&t, nullptr);
#endif
}

void advance(Counter& c, uint32_t n) {
    c.n.store(n);
#ifdef __linux__
    if (c.sleepers.load()) syscall(SYS_futex, &c.n, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
#endif
}

// Waits until the counter has reached n (numbers wrap around); false when timeout_s runs out first.
bool await(Counter& c, uint32_t n, double timeout_s) {
    auto reached = [&] { return int32_t(c.n.load(std::memory_order_acquire) - n) >= 0; };
    for (int i = 0; i < SPINS; i++) {
        if (reached()) return true;
        pause_briefly();
    }
    const double start = now_s();
    while (now_s() - start < YIELD_S) {
        if (reached()) return true;
        sched_yield();
    }
    c.sleepers.fetch_add(1);
    bool ok;
    for (;;) {
        const uint32_t seen = c.n.load();
        ok = int32_t(seen - n) >= 0;
        if (ok || now_s() - start > timeout_s) break;
        sleep_on(c, seen);
    }
    c.sleepers.fetch_sub(1);
    return ok;
}

struct Communicator {
    RankCounters* counters;
    char* buffers;
    int tp, rank;
    double timeout_s;

    Communicator(void* base, int tp, int rank, double timeout_s)
        : counters(static_cast<RankCounters*>(base)), buffers(static_cast<char*>(base) + tp * sizeof(RankCounters)), tp(tp), rank(rank),
          timeout_s(timeout_s) {}

    uint32_t next() const { return counters[rank].posted.n.load() + 1; }
    char* buffer(uint32_t n, int of) const { return buffers + ((n % 2) * tp + of) * CHUNK; }

    bool may_write(uint32_t n) const {
        for (int r = 0; r < tp; r++)
            if (r != rank && !await(counters[r].done, n - 2, timeout_s)) return false;
        return true;
    }
    bool all_posted(uint32_t n) const {
        for (int r = 0; r < tp; r++)
            if (r != rank && !await(counters[r].posted, n, timeout_s)) return false;
        return true;
    }
    // Puts `bytes` (at most CHUNK) on the table and waits for everybody's.
    bool exchange(uint32_t n, const void* data, int64_t bytes) const {
        if (!may_write(n)) return false;
        memcpy(buffer(n, rank), data, bytes);
        advance(counters[rank].posted, n);
        return all_posted(n);
    }
};

template <typename C> bool reduce(const Communicator& communicator, C* x, int64_t n) {
    constexpr int64_t step = CHUNK / sizeof(C);
    for (int64_t at = 0; at < n; at += step) {
        const int64_t some = std::min(step, n - at);
        const uint32_t number = communicator.next();
        if (!communicator.exchange(number, x + at, some * sizeof(C))) return false;
        for (int64_t i = 0; i < some; i += 16) {            // buffers are whole vectors: the last may hold leftovers
            f32x16 parts[MAX_RANKS];
            for (int r = 0; r < communicator.tp; r++) parts[r] = load(reinterpret_cast<C*>(communicator.buffer(number, r)) + i);
            C out[16];
            store(out, tree_add(parts, communicator.tp));
            memcpy(x + at + i, out, std::min<int64_t>(16, some - i) * sizeof(C));
        }
        advance(communicator.counters[communicator.rank].done, number);
    }
    return true;
}

}  // namespace

// All return false when the others have not come within timeout_s.
extern "C" {

int64_t shared_bytes(int tp) { return tp * int64_t(sizeof(RankCounters)) + 2 * tp * CHUNK; }

bool shared_sum_fp32(void* base, int tp, int rank, double timeout_s, float* x, int64_t n) {
    return reduce(Communicator(base, tp, rank, timeout_s), x, n);
}
bool shared_sum_bf16(void* base, int tp, int rank, double timeout_s, bf16* x, int64_t n) {
    return reduce(Communicator(base, tp, rank, timeout_s), x, n);
}

// Every rank's `bytes` at x -> out, one after the other in rank order.
bool shared_gather(void* base, int tp, int rank, double timeout_s, const char* x, char* out, int64_t bytes) {
    Communicator communicator(base, tp, rank, timeout_s);
    for (int64_t at = 0; at < bytes; at += CHUNK) {
        const int64_t some = std::min(CHUNK, bytes - at);
        const uint32_t n = communicator.next();
        if (!communicator.exchange(n, x + at, some)) return false;
        for (int r = 0; r < tp; r++) memcpy(out + r * bytes + at, communicator.buffer(n, r), some);
        advance(communicator.counters[rank].done, n);
    }
    return true;
}

// The driver's `bytes` at x, to the same place on every worker. The driver does not wait for them.
bool shared_broadcast(void* base, int tp, int rank, double timeout_s, char* x, int64_t bytes) {
    Communicator communicator(base, tp, rank, timeout_s);
    for (int64_t at = 0; at < bytes; at += CHUNK) {
        const int64_t some = std::min(CHUNK, bytes - at);
        const uint32_t n = communicator.next();
        if (rank == 0) {
            if (!communicator.may_write(n)) return false;
            memcpy(communicator.buffer(n, 0), x + at, some);
        } else {
            if (!await(communicator.counters[0].posted, n, timeout_s)) return false;
            memcpy(x + at, communicator.buffer(n, 0), some);
        }
        advance(communicator.counters[rank].posted, n);
        advance(communicator.counters[rank].done, n);
    }
    return true;
}

}
