// What torch lacks on CPU, or does in many small steps: paged attention, norms, rotation with the write to the KV
// cache, SiLU. Plain C functions on raw pointers, called through ctypes (library.py). fp32 arithmetic throughout.
//
// Bits of a row depend on that row alone: not on the other rows of the step, on how a prompt was cut into chunks, on
// how many heads this rank holds or on the number of threads. For that, one loop body serves all rows and all elements
// (the last, partial vector of a row too), so that a product and its sum are fused for each of them or for none.
//
// Letters as in the rest of llama_tp: T tokens, H query heads, K KV heads, G = H / K, E head dim, S slots a block.

#include <algorithm>
#include <cmath>
#include <vector>

#include "vector.h"

namespace {

constexpr int TILE = 256;       // slots whose scores are held at once; softmax is rescaled from tile to tile
constexpr int PAIR = 32;        // slots whose keys are turned at once: two vectors of scores
constexpr int ROWS = 4;         // query rows computed together
constexpr int TASK_ROWS = 64;   // query rows (positions x G) of one task: what the turned keys are shared by

// One sequence in a step: rows [row, row + n) are positions [start, start + n); its block table begins at `table`.
struct Span { int64_t row, start, n, table; };

// Keys of 16 slots, (16, E) -> column `at` of (E, PAIR) fp32: one load then gives 16 slots' values of one dimension.
inline void turn_keys(const float* k, int E, float* out) {
    for (int e = 0; e < E; e += 16) {
        f32x16 r[16];
        for (int s = 0; s < 16; s++) r[s] = load(k + s * E + e);
        turn(r);
        for (int i = 0; i < 16; i++) store(out + (e + i) * PAIR, r[i]);
    }
}

template <typename A> constexpr int AT_ONCE = 4 / sizeof(A);        // numbers that one lane takes in a step

// Scores of R query rows with PAIR slots: sums run over E in order. q: (R, E); keys: (E / AT_ONCE, PAIR).
template <int R, typename A, typename B> inline void score(const A* q, const B* keys, int E, float scale, float* out) {
    f32x16 a[R] = {}, b[R] = {};
    for (int e = 0; e < E / AT_ONCE<A>; e++) {
        const auto k0 = load(keys + e * PAIR), k1 = load(keys + e * PAIR + 16);
        for (int r = 0; r < R; r++) {
            const auto x = spread(q + r * E + e * AT_ONCE<A>);
            a[r] = multiply_add(a[r], x, k0);
            b[r] = multiply_add(b[r], x, k1);
        }
    }
    for (int r = 0; r < R; r++) {
        store(out + r * TILE, a[r] * scale);
        store(out + r * TILE + 16, b[r] * scale);
    }
}

// acc (ROWS, E) += weights (ROWS, 16 slots) x values (16 / AT_ONCE, E), in the order of the slots, for N vectors of E.
template <int N, typename A, typename B> inline void add_some(const A* weights, const B* v, int E, float* acc) {
    f32x16 a[ROWS][N];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) a[r][i] = load(acc + r * E + 16 * i);
    for (int s = 0; s < 16 / AT_ONCE<A>; s++)
        for (int r = 0; r < ROWS; r++) {
            const auto w = spread(weights + r * TILE + s * AT_ONCE<A>);
            for (int i = 0; i < N; i++) a[r][i] = multiply_add(a[r][i], w, load(v + s * E + 16 * i));
        }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) store(acc + r * E + 16 * i, a[r][i]);
}
template <typename A, typename B> inline void add_values(const A* weights, const B* v, int E, float* acc) {
    int e = 0;
    for (; e + 64 <= E; e += 64) add_some<4>(weights, v + e, E, acc + e);
    for (; e < E; e += 16) add_some<1>(weights, v + e, E, acc + e);
}

// How a cache of type C lies in scratch memory: in fp32, whatever E is (rows are filled up to whole vectors).
template <typename C> struct InFp32 {
    typedef float Number;       // of queries and weights
    typedef float Lane;         // of keys, (E, PAIR), and of the values of 16 slots, (16, E)

    static void take_query(const C* from, int64_t E, float* to) {
        for (int64_t e = 0; e < E; e += 16) store(to + e, load_some(from + e, E - e));
    }
    static void take_keys(const C* from, int64_t E, int64_t width, float* spare, float* to) {
        take_values(from, E, width, spare);
        turn_keys(spare, width, to);
    }
    static void take_values(const C* from, int64_t E, int64_t width, float* to) {
        for (int64_t s = 0; s < 16; s++) take_query(from + s * E, E, to + s * width);
    }
};

#ifdef __AVX512BF16__
// The same for the machine's bf16 dot products, two dimensions (or two slots) in a lane: E must be a multiple of 32.
// Products of queries with keys are exact; weights are rounded to bf16, as in flash attention.
struct InPairs {
    typedef bf16 Number;
    typedef uint32_t Lane;      // keys: (E / 2, PAIR); values: (8, E)

    static void take_query(const bf16* from, int64_t E, bf16* to) { memcpy(to, from, E * sizeof(bf16)); }
    static void take_keys(const bf16* from, int64_t E, int64_t, uint32_t*, uint32_t* to) {
        for (int e = 0; e < E; e += 32) {
            f32x16 r[16];
            for (int s = 0; s < 16; s++) memcpy(&r[s], from + s * E + e, 64);
            turn(r);
            for (int i = 0; i < 16; i++) memcpy(to + (e / 2 + i) * PAIR, &r[i], 64);
        }
    }
    static void take_values(const bf16* from, int64_t E, int64_t, uint32_t* to) {
        for (int s = 0; s < 8; s++)
            for (int64_t e = 0; e < E; e += 16) {
                u32x16 even = (u32x16)load(from + 2 * s * E + e), odd = (u32x16)load(from + (2 * s + 1) * E + e);
                u32x16 both = (even >> 16) | odd;                   // load has shifted them into the upper half
                memcpy(to + s * E + e, &both, 64);
            }
    }
};
#endif

// One thread's scratch memory for a task of some rows.
template <typename Way> struct Scratch {
    std::vector<typename Way::Number> q, weights;   // (rows, width), (rows, TILE)
    std::vector<typename Way::Lane> keys, values;
    std::vector<float> scores, acc, max, total;     // (rows, TILE), (rows, width), (rows), (rows)
    void fit(int rows, int width) {
        const int lanes = width / AT_ONCE<typename Way::Number>;
        q.resize(rows * width); weights.resize(rows * TILE); keys.resize(lanes * PAIR); values.resize(lanes * 16);
        scores.resize(rows * TILE); acc.resize(rows * width); max.resize(rows); total.resize(rows);
    }
};

// Rows of one KV head: positions [first, first + n) of a sequence, G query heads each; row r = position r / G, head r % G.
// `width` is E rounded up to whole vectors.
template <typename C, typename Way> struct Task {
    const C *k, *v;             // one layer, (N, K, S, E)
    const int32_t* table;
    int64_t K, S, E, width, G, head, first, n;
    float scale;

    const C* slots(const C* cache, int64_t slot) const {            // where 16 slots from `slot` on lie, (16, E)
        return cache + ((table[slot / S] * K + head) * S + slot % S) * E;
    }

    // Softmax over all tiles up to the last position; leaves the weighted sums of values in w.acc.
    void run(Scratch<Way>& w, int rows) const {
        const int64_t end = first + n;                              // slots that any row sees
        std::fill(w.acc.begin(), w.acc.end(), 0.0f);
        std::fill(w.max.begin(), w.max.end(), -INFINITY);
        std::fill(w.total.begin(), w.total.end(), 0.0f);
        for (int64_t tile = 0; tile < end; tile += TILE) {
            const int seen = int(std::min<int64_t>(TILE, (end - tile + 15) / 16 * 16));
            for (int at = 0; at < seen; at += PAIR) {
                Way::take_keys(slots(k, tile + at), E, width, w.values.data(), w.keys.data());
                if (at + 16 < seen) Way::take_keys(slots(k, tile + at + 16), E, width, w.values.data(), w.keys.data() + 16);
                prefetch(slots(v, tile + at));
                if (at + 16 < seen) prefetch(slots(v, tile + at + 16));
                int r = 0;
                for (; r + 2 * ROWS <= rows; r += 2 * ROWS) scores<2 * ROWS>(w, r, at);
                if (r < rows) scores<ROWS>(w, r, at);
            }
            for (int r = 0; r < rows; r++) weigh(w, r, seen, first + std::min<int64_t>(r / G, n - 1) - tile);
            for (int at = 0; at < seen; at += 16) {
                Way::take_values(slots(v, tile + at), E, width, w.values.data());
                for (int r = 0; r < rows; r += ROWS)
                    add_values(&w.weights[r * TILE + at], w.values.data(), width, &w.acc[r * width]);
            }
        }
    }

    template <int R> void scores(Scratch<Way>& w, int r, int at) const {
        score<R>(&w.q[r * width], w.keys.data(), width, scale, &w.scores[r * TILE + at]);
    }

    void prefetch(const C* values) const {
        for (int64_t i = 0; i < 16 * E; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(values + i);
    }

    // Scores -> weights of one row in a tile whose slots up to `last` it sees; what was summed so far is rescaled.
    void weigh(Scratch<Way>& w, int r, int seen, int64_t last) const {
        float* s = &w.scores[r * TILE];
        for (int64_t i = std::max<int64_t>(0, last + 1); i < seen; i++) s[i] = -INFINITY;
        f32x16 most = splat(-INFINITY);
        for (int i = 0; i < seen; i += 16) most = larger(load(s + i), most);
        const float before = w.max[r], now = std::max(before, largest(most));
        f32x16 total = {};
        for (int i = 0; i < seen; i += 16) {
            f32x16 p = exp16(load(s + i) - now);
            store(&w.weights[r * TILE + i], p);
            total += p;
        }
        const float rescale = exp16(splat(before - now))[0];
        w.max[r] = now;
        w.total[r] = w.total[r] * rescale + sum(total);
        if (rescale != 1.0f)
            for (int e = 0; e < width; e += 16) store(&w.acc[r * width + e], load(&w.acc[r * width + e]) * rescale);
    }
};

template <typename C, typename Way>
void attend_in(const C* q, int64_t q_stride, C* out, const C* k, const C* v, const Span* spans, int64_t n_spans,
               const int32_t* tables, int64_t H, int64_t K, int64_t S, int64_t E) {
    const int64_t G = H / K, width = (E + 15) / 16 * 16, step = std::max<int64_t>(1, TASK_ROWS / G);
    struct Place { int64_t span, first, head; };
    std::vector<Place> places;
    for (int64_t i = 0; i < n_spans; i++)
        for (int64_t at = 0; at < spans[i].n; at += step)
            for (int64_t head = 0; head < K; head++) places.push_back({i, at, head});
    const float scale = 1.0f / std::sqrt(float(E));
#pragma omp parallel if (places.size() > 1)
    {
        Scratch<Way> w;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = int64_t(places.size()) - 1; i >= 0; i--) { // long contexts are at the end: begin with them
            const auto [number, at, head] = places[i];
            const Span& span = spans[number];
            const int64_t n = std::min(step, span.n - at), rows = (n * G + ROWS - 1) / ROWS * ROWS;
            w.fit(int(rows), int(width));
            for (int64_t r = 0; r < rows; r++) {                    // the rows that fill up a group repeat the last one
                const int64_t real = std::min(r, n * G - 1);
                const C* from = q + (span.row + at + real / G) * q_stride + (head * G + real % G) * E;
                Way::take_query(from, E, &w.q[r * width]);
            }
            Task<C, Way>{k, v, tables + span.table, K, S, E, width, G, head, span.start + at, n, scale}.run(w, int(rows));
            for (int64_t r = 0; r < n * G; r++) {
                C* to = out + ((span.row + at + r / G) * H + head * G + r % G) * E;
                for (int64_t e = 0; e < E; e += 16) store_some(to + e, load(&w.acc[r * width + e]) / w.total[r], E - e);
            }
        }
    }
}

template <typename C, typename... Rest> void attend(int64_t E, const C* q, Rest... rest) {
#ifdef __AVX512BF16__
    if constexpr (sizeof(C) == 2)
        if (E % 32 == 0) return attend_in<C, InPairs>(q, rest..., E);
#endif
    attend_in<C, InFp32<C>>(q, rest..., E);
}

// x += delta (if there is one), then out = x / rms(x) * weight, rounded to C where Meta's code does.
template <typename C>
void add_norm(C* x, const C* delta, const C* weight, float eps, C* out, int64_t T, int64_t D) {
#pragma omp parallel for if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        C* row = x + t * D;
        f32x16 squares = {};
        for (int64_t d = 0; d < D; d += 16) {
            f32x16 v = load_some(row + d, D - d);
            if (delta) {
                v = through(v + load_some(delta + t * D + d, D - d), row);
                store_some(row + d, v, D - d);
            }
            squares += v * v;
        }
        const float scale = 1.0f / std::sqrt(sum(squares) / float(D) + eps);
        for (int64_t d = 0; d < D; d += 16) {
            f32x16 normed = through(load_some(row + d, D - d) * scale, row);
            store_some(out + t * D + d, normed * load_some(weight + d, D - d), D - d);
        }
    }
}

#define EACH_TWICE 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7
#define SWAPPED 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14

// Turns the pairs (2i, 2i + 1) of a head; cos and sin hold each angle's value twice, sin with its signs.
template <typename C> inline void rotate(C* x, const float* cos, const float* sin, int64_t E) {
    for (int64_t e = 0; e < E; e += 16) {
        f32x16 v = load_some(x + e, E - e);
        store_some(x + e, v * load(cos + e) + __builtin_shufflevector(v, v, SWAPPED) * load(sin + e), E - e);
    }
}

// qkv: (T, H + 2K, E), whose queries and keys are turned in place; keys and values go to their slots in the cache.
// cos, sin: (T, E / 2).
template <typename C>
void rotate_write(C* qkv, const float* cos, const float* sin, const int64_t* blocks, const int64_t* offsets, C* k, C* v,
                  int64_t T, int64_t H, int64_t K, int64_t S, int64_t E) {
    const f32x16 sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
#pragma omp parallel if (T > 1)
    {
        std::vector<float> c(E + 16), s(E + 16);
#pragma omp for
        for (int64_t t = 0; t < T; t++) {
            for (int64_t e = 0; e < E; e += 16) {
                const int64_t at = t * E / 2 + e / 2, pairs = std::min<int64_t>(8, (E - e) / 2);
                f32x16 once_c = load_some(cos + at, pairs), once_s = load_some(sin + at, pairs);
                store(&c[e], __builtin_shufflevector(once_c, once_c, EACH_TWICE));
                store(&s[e], __builtin_shufflevector(once_s, once_s, EACH_TWICE) * sign);
            }
            C* row = qkv + t * (H + 2 * K) * E;
            for (int64_t h = 0; h < H + K; h++) rotate(row + h * E, c.data(), s.data(), E);
            for (int64_t h = 0; h < K; h++) {
                const int64_t at = ((blocks[t] * K + h) * S + offsets[t]) * E;
                memcpy(k + at, row + (H + h) * E, E * sizeof(C));
                memcpy(v + at, row + (H + K + h) * E, E * sizeof(C));
            }
        }
    }
}

// (T, 2F), gates then ups -> (T, F): silu(gate) * up, the silu rounded to C as a tensor of its own would be.
template <typename C> void silu_mul(const C* x, C* out, int64_t T, int64_t F) {
#pragma omp parallel for if (T > 1)
    for (int64_t t = 0; t < T; t++)
        for (int64_t f = 0; f < F; f += 16) {
            f32x16 gate = load_some(x + t * 2 * F + f, F - f), up = load_some(x + t * 2 * F + F + f, F - f);
            store_some(out + t * F + f, through(gate / (1.0f + exp16(-gate)), out) * up, F - f);
        }
}

typedef int64_t i64x16 __attribute__((vector_size(128)));

// exp((x - best) / temperature) of 16 logits as integers, 2^44 for the best (kernels.py says what for).
static inline i64x16 weights16(f32x16 x, float temperature, float best) {
    const f32x16 shifted = x / temperature - best / temperature;
    return __builtin_convertvector(exp16(shifted) * 17592186044416.0f, i64x16);
}

// Logits [from, from + n) of a row, 16 at a time, those beyond its end as minus infinity.
template <typename F> void each_weight(const float* row, int64_t from, int64_t n, float temperature, float best, F use) {
    for (int64_t i = 0; i < n; i += 16) {
        float some[16];
        const int64_t m = std::min<int64_t>(16, n - i);
        if (m < 16) {
            std::fill(some, some + 16, -INFINITY);
            memcpy(some, row + from + i, 4 * m);
        }
        f32x16 x;
        memcpy(&x, m < 16 ? some : row + from + i, 64);
        use(i, m, weights16(x, temperature, best));
    }
}

}  // namespace

extern "C" void weights(const float* x, int64_t stride, const float* temperature, const float* best, int64_t* out, int64_t R,
                        int64_t n) {
    for (int64_t r = 0; r < R; r++)
        each_weight(x + r * stride, 0, n, temperature[r], best[r], [&](int64_t i, int64_t m, i64x16 w) {
            memcpy(out + r * n + i, &w, 8 * m);
        });
}

// Sums of every `size` weights of each row.
extern "C" void weigh(const float* x, int64_t stride, const float* temperature, const float* best, int64_t* out, int64_t R,
                      int64_t V, int64_t size) {
    const int64_t C = (V + size - 1) / size;
#pragma omp parallel for
    for (int64_t at = 0; at < R * C; at++) {
        const int64_t r = at / C, from = at % C * size;
        i64x16 sums = {};
        each_weight(x + r * stride, from, std::min(size, V - from), temperature[r], best[r],
                    [&](int64_t, int64_t, i64x16 w) { sums += w; });
        int64_t total = 0;
        for (int i = 0; i < 16; i++) total += sums[i];
        out[at] = total;
    }
}

// Reads memory as fast as the threads can; the sum keeps the compiler from leaving the reading out.
extern "C" uint64_t read_all(const uint64_t* p, int64_t n) {
    typedef uint64_t u64x8 __attribute__((vector_size(64)));
    uint64_t total = 0;
#pragma omp parallel for reduction(+ : total)
    for (int64_t block = 0; block < n / 512; block++) {             // 4 KiB at a time
        u64x8 sums = {};
        for (int i = 0; i < 512; i += 8) {
            u64x8 v;
            memcpy(&v, p + block * 512 + i, 64);
            sums += v;
        }
        for (int i = 0; i < 8; i++) total += sums[i];
    }
    return total;
}

#define FOR_DTYPE(NAME, C) \
    extern "C" void attend_##NAME(const C* q, int64_t q_stride, C* out, const C* k, const C* v, const void* spans, \
                                  int64_t n_spans, const int32_t* tables, int64_t H, int64_t K, int64_t S, int64_t E) { \
        attend(E, q, q_stride, out, k, v, static_cast<const Span*>(spans), n_spans, tables, H, K, S); \
    } \
    extern "C" void add_norm_##NAME(C* x, const C* delta, const C* weight, float eps, C* out, int64_t T, int64_t D) { \
        add_norm(x, delta, weight, eps, out, T, D); \
    } \
    extern "C" void rotate_write_##NAME(C* qkv, const float* cos, const float* sin, const int64_t* blocks, \
                                        const int64_t* offsets, C* k, C* v, int64_t T, int64_t H, int64_t K, int64_t S, int64_t E) { \
        rotate_write(qkv, cos, sin, blocks, offsets, k, v, T, H, K, S, E); \
    } \
    extern "C" void silu_mul_##NAME(const C* x, C* out, int64_t T, int64_t F) { silu_mul(x, out, T, F); }

FOR_DTYPE(fp32, float)
FOR_DTYPE(bf16, bf16)
