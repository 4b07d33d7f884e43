// What torch lacks on CPU, or does in many small steps: paged attention, norms, rotation with the write to the KV
// cache, SiLU. Plain C functions on raw pointers, declared in native.h, called through ctypes. fp32 arithmetic throughout.
//
// Bits of a row depend on that row alone: not on the other rows of the step, on how a prompt was cut into chunks, on
// how many heads this rank holds or on the number of threads. For that, one loop body serves all rows and all elements
// (the last, partial vector of a row too), so that a product and its sum are fused for each of them or for none.
//
// Letters as in the rest of llama_tp: T tokens, H query heads, K KV heads, G = H / K, E head dim, S slots a block.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "native.h"

namespace {

constexpr int TILE = 256;       // slots whose scores are held at once; softmax is rescaled from tile to tile
constexpr int SOME = 4;         // groups of slots whose values are added while the sums stay in registers
constexpr int ROWS = 4;         // query rows computed together
constexpr int TASK_ROWS = 64;   // query rows (positions x G) of one task: what keys and values are read once for

// The cache holds slots in groups of GROUP, each (GROUP, E) numbers of one head as attention multiplies them: keys as
// (E / TOGETHER, GROUP, TOGETHER), so that one load gives a dimension, or a pair, of all its slots; values as
// (GROUP / TOGETHER, E, TOGETHER).
constexpr int GROUP = 16;

// Queries and weights are multiplied in fp32, or as pairs of bf16 where the machine has that: products of queries with keys are
// then exact; weights are rounded to bf16, as in flash attention.
template <typename C> using Number = std::conditional_t<TOGETHER<C> == 2, bf16, float>;

// Scores of R query rows with two groups of slots: sums run over E in order. q: (R, width). The groups' values, v0 and v1, are
// asked for meanwhile, a cache line at each step: what lies about in pieces of some KB the machine does not read ahead by itself.
template <typename C, int R>
inline void score(const Number<C>* q, int width, const Lane<C>* k0, const Lane<C>* k1, const Lane<C>* v0, const Lane<C>* v1, int E,
                  float scale, float* out) {
    f32x16 a[R] = {}, b[R] = {};
    for (int e = 0; e < E; e += TOGETHER<C>, k0 += GROUP, k1 += GROUP, v0 += GROUP, v1 += GROUP) {
        __builtin_prefetch(v0);
        __builtin_prefetch(v1);
        const auto keys0 = load(k0), keys1 = load(k1);
        for (int r = 0; r < R; r++) {
            const auto x = spread(q + r * width + e);
            a[r] = multiply_add(a[r], x, keys0);
            b[r] = multiply_add(b[r], x, keys1);
        }
    }
    for (int r = 0; r < R; r++) {
        store(out + r * TILE, a[r] * scale);
        store(out + r * TILE + GROUP, b[r] * scale);
    }
}

// acc (ROWS, N vectors of a row from e on) += weights (ROWS, slots) x values of some groups, in the order of the slots. `next`: the
// groups of keys to ask for meanwhile.
template <typename C, int N>
inline void add_some(const Number<C>* weights, const Lane<C>* const* values, const Lane<C>* const* next, int n_groups, int e, int E,
                     float* acc, int width) {
    f32x16 a[ROWS][N];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) a[r][i] = load(acc + r * width + e + 16 * i);
    for (int g = 0; g < n_groups; g++)
        for (int s = 0; s < GROUP; s += TOGETHER<C>) {
            const int64_t at = s / TOGETHER<C> * E + e;
            const Lane<C>* v = values[g] + at;
            for (int i = 0; i < N; i++) __builtin_prefetch(next[g] + at + 16 * i);
            for (int r = 0; r < ROWS; r++) {
                const auto w = spread(weights + r * TILE + g * GROUP + s);
                for (int i = 0; i < N; i++) a[r][i] = multiply_add(a[r][i], w, N > 1 ? load(v + 16 * i) : load_some(v, E - e));
            }
        }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < N; i++) store(acc + r * width + e + 16 * i, a[r][i]);
}

// One thread's scratch memory for a task of some rows.
template <typename C> struct Scratch {
    std::vector<Number<C>> q, weights;              // (rows, width), (rows, TILE)
    std::vector<float> scores, acc, max, total;     // (rows, TILE), (rows, width), (rows), (rows)
    void fit(int rows, int width) {
        q.resize(rows * width); weights.resize(rows * TILE); scores.resize(rows * TILE); acc.resize(rows * width);
        max.resize(rows); total.resize(rows);
    }
};

// Positions [first, first + n) of a sequence for `n_heads` KV heads from `head` on, G query heads each. A head has `rows` rows: row
// r is position r / G, query head r % G, and the last one repeats until their number is a multiple of ROWS. `width` is E rounded up
// to whole vectors.
template <typename C> struct Task {
    const C *k, *v;             // one layer, (N, K, S / GROUP groups)
    const int32_t* table;
    int64_t K, S, E, width, G, head, n_heads, first, n, rows;
    float scale;

    const Lane<C>* group(const C* cache, int64_t h, int64_t slot) const {       // the group that begins with this slot
        return reinterpret_cast<const Lane<C>*>(cache + ((table[slot / S] * K + head + h) * S + slot % S) * E);
    }

    // Softmax over all tiles up to the last position; leaves the weighted sums of values in w.acc. Heads take turns at each pair of
    // groups, since theirs lie side by side (a row at 8,000 slots, one thread: 14.8 -> 12.2 ms for 16 layers).
    void run(Scratch<C>& w) const {
        const int64_t end = first + n;                              // slots that any row sees
        std::fill(w.acc.begin(), w.acc.end(), 0.0f);
        std::fill(w.max.begin(), w.max.end(), -INFINITY);
        std::fill(w.total.begin(), w.total.end(), 0.0f);
        for (int64_t tile = 0; tile < end; tile += TILE) {
            const int seen = int(std::min<int64_t>(TILE, (end - tile + GROUP - 1) / GROUP * GROUP));
            for (int at = 0; at < seen; at += 2 * GROUP)
                for (int64_t h = 0; h < n_heads; h++) score_groups(w, h, tile, at, at + GROUP < seen);
            for (int64_t r = 0; r < n_heads * rows; r++) softmax_tile(w, int(r), seen, first + std::min(r % rows / G, n - 1) - tile);
            for (int at = 0; at < seen; at += SOME * GROUP)
                for (int64_t h = 0; h < n_heads; h++) add_values(w, h, tile, at, std::min<int>(SOME, (seen - at) / GROUP));
        }
    }

    void score_groups(Scratch<C>& w, int64_t h, int64_t tile, int at, bool both) const {
        const Lane<C>* k0 = group(k, h, tile + at);
        const Lane<C>* k1 = both ? group(k, h, tile + at + GROUP) : k0;         // or once more, for nobody
        const Number<C>* queries = &w.q[h * rows * width];
        float* scores = &w.scores[h * rows * TILE + at];
        const Lane<C>* v0 = group(v, h, tile + at);
        const Lane<C>* v1 = both ? group(v, h, tile + at + GROUP) : v0;
        int64_t r = 0;
        for (; r + 2 * ROWS <= rows; r += 2 * ROWS)
            score<C, 2 * ROWS>(queries + r * width, int(width), k0, k1, v0, v1, int(E), scale, scores + r * TILE);
        if (r < rows) score<C, ROWS>(queries + r * width, int(width), k0, k1, v0, v1, int(E), scale, scores + r * TILE);
    }

    void add_values(Scratch<C>& w, int64_t h, int64_t tile, int at, int n_groups) const {
        const Lane<C>* values[SOME];
        const Lane<C>* next[SOME];                                              // the next tile's keys, if there is one
        for (int g = 0; g < n_groups; g++) {
            const int64_t slot = tile + at + g * GROUP;
            values[g] = group(v, h, slot);
            next[g] = slot + TILE < first + n ? group(k, h, slot + TILE) : values[g];
        }
        for (int64_t r = h * rows; r < (h + 1) * rows; r += ROWS) {
            const Number<C>* weights = &w.weights[r * TILE + at];
            float* acc = &w.acc[r * width];
            int e = 0;
            for (; e + 64 <= E; e += 64) add_some<C, 4>(weights, values, next, n_groups, e, int(E), acc, int(width));
            for (; e < E; e += 16) add_some<C, 1>(weights, values, next, n_groups, e, int(E), acc, int(width));
        }
    }

    // Scores -> weights of one row in a tile whose slots up to `last` it sees; what was summed so far is rescaled.
    void softmax_tile(Scratch<C>& w, int r, int seen, int64_t last) const {
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

// A query row as it is multiplied, (E) -> (width).
inline void take_query(const bf16* from, int64_t E, bf16* to) { memcpy(to, from, E * sizeof(bf16)); }
template <typename C> inline void take_query(const C* from, int64_t E, float* to) {
    for (int64_t e = 0; e < E; e += 16) store(to + e, load_some(from + e, E - e));
}

template <typename C>
void attend(const C* q, int64_t q_stride, C* out, const C* k, const C* v, const Span* spans, int64_t n_spans,
            const int32_t* tables, int64_t H, int64_t K, int64_t S, int64_t E) {
    const int64_t G = H / K, width = (E + 15) / 16 * 16, step = std::max<int64_t>(1, TASK_ROWS / G);
    // A prompt's heads are tasks of their own; a row that decodes takes as many at once as leave every thread something to do.
    const int64_t at_once = std::min(K, std::max<int64_t>(1, n_spans * K / omp_get_max_threads()));
    struct Place { int64_t span, first, head, n_heads; };
    std::vector<Place> places;
    for (int64_t i = 0; i < n_spans; i++)
        for (int64_t at = 0; at < spans[i].n; at += step)
            for (int64_t head = 0, some = spans[i].n > 1 ? 1 : at_once; head < K; head += some)
                places.push_back({i, at, head, std::min(some, K - head)});
    const float scale = 1.0f / std::sqrt(float(E));
#pragma omp parallel if (places.size() > 1)
    {
        Scratch<C> w;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = int64_t(places.size()) - 1; i >= 0; i--) { // long contexts are at the end: begin with them
            const auto [number, at, head, n_heads] = places[i];
            const Span& span = spans[number];
            const int64_t n = std::min(step, span.n - at), rows = (n * G + ROWS - 1) / ROWS * ROWS;
            // Row r of head h, in q and in out; rows that fill up repeat the last one.
            auto position = [&](int64_t r) { return span.row + at + std::min(r, n * G - 1) / G; };
            auto query_head = [&](int64_t h, int64_t r) { return (head + h) * G + std::min(r, n * G - 1) % G; };
            w.fit(int(n_heads * rows), int(width));
            for (int64_t h = 0; h < n_heads; h++)
                for (int64_t r = 0; r < rows; r++)
                    take_query(q + position(r) * q_stride + query_head(h, r) * E, E, &w.q[(h * rows + r) * width]);
            Task<C>{k, v, tables + span.table, K, S, E, width, G, head, n_heads, span.start + at, n, rows, scale}.run(w);
            for (int64_t h = 0; h < n_heads; h++)
                for (int64_t r = 0; r < n * G; r++) {
                    C* to = out + (position(r) * H + query_head(h, r)) * E;
                    const float* sums = &w.acc[(h * rows + r) * width];
                    for (int64_t e = 0; e < E; e += 16) store_some(to + e, load(sums + e) / w.total[h * rows + r], E - e);
                }
        }
    }
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

// Rotates the pairs (2i, 2i + 1) of a head; cos and sin hold each angle's value twice, sin with its signs.
template <typename C> inline void rotate(C* x, const float* cos, const float* sin, int64_t E) {
    for (int64_t e = 0; e < E; e += 16) {
        f32x16 v = load_some(x + e, E - e);
        store_some(x + e, v * load(cos + e) + __builtin_shufflevector(v, v, SWAPPED) * load(sin + e), E - e);
    }
}

// A key and a value (E) -> their places in a group of the cache.
template <typename C> inline void write(const C* key, const C* value, C* keys, C* values, int64_t slot, int64_t E) {
    constexpr int64_t P = TOGETHER<C>;
    for (int64_t e = 0; e < E; e++) {
        keys[(e / P * GROUP + slot) * P + e % P] = key[e];
        values[(slot / P * E + e) * P + slot % P] = value[e];
    }
}

// A row's cos and sin (E / 2) -> each angle's value twice, sin with the signs that `rotate` needs. Both have room for E + 16.
inline void spread_angles(const float* cos, const float* sin, float* c, float* s, int64_t E) {
    const f32x16 sign = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    for (int64_t e = 0; e < E; e += 16) {
        const int64_t pairs = std::min<int64_t>(8, (E - e) / 2);
        f32x16 once_c = load_some(cos + e / 2, pairs), once_s = load_some(sin + e / 2, pairs);
        store(c + e, __builtin_shufflevector(once_c, once_c, EACH_TWICE));
        store(s + e, __builtin_shufflevector(once_s, once_s, EACH_TWICE) * sign);
    }
}

template <typename C>
void rotate_rows(C* x, int64_t stride, const float* cos, const float* sin, int64_t T, int64_t heads, int64_t E) {
#pragma omp parallel if (T > 1)
    {
        std::vector<float> c(E + 16), s(E + 16);
#pragma omp for
        for (int64_t t = 0; t < T; t++) {
            spread_angles(cos + t * E / 2, sin + t * E / 2, c.data(), s.data(), E);
            for (int64_t h = 0; h < heads; h++) rotate(x + t * stride + h * E, c.data(), s.data(), E);
        }
    }
}

template <typename C>
void write_rows(const C* k, int64_t k_stride, const C* v, int64_t v_stride, const int64_t* blocks, const int64_t* offsets, C* k_cache,
                C* v_cache, int64_t T, int64_t K, int64_t S, int64_t E) {
#pragma omp parallel for if (T > 1)
    for (int64_t t = 0; t < T; t++)
        for (int64_t h = 0; h < K; h++) {
            const int64_t slot = offsets[t] % GROUP, group = ((blocks[t] * K + h) * S + offsets[t] - slot) * E;
            write(k + t * k_stride + h * E, v + t * v_stride + h * E, k_cache + group, v_cache + group, slot, E);
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

// exp((x - best) / temperature) of 16 logits as integers, 2^44 for the best (sampling/numerators.py says what for).
static inline i64x16 numerators16(f32x16 x, float temperature, float best) {
    const f32x16 shifted = x / temperature - best / temperature;
    return __builtin_convertvector(exp16(shifted) * 17592186044416.0f, i64x16);
}

// Logits [from, from + n) of a row, 16 at a time, those beyond its end as minus infinity.
template <typename F> void each_numerator(const float* row, int64_t from, int64_t n, float temperature, float best, F use) {
    for (int64_t i = 0; i < n; i += 16) {
        float some[16];
        const int64_t m = std::min<int64_t>(16, n - i);
        if (m < 16) {
            std::fill(some, some + 16, -INFINITY);
            memcpy(some, row + from + i, 4 * m);
        }
        f32x16 x;
        memcpy(&x, m < 16 ? some : row + from + i, 64);
        use(i, m, numerators16(x, temperature, best));
    }
}

}  // namespace

extern "C" void softmax_numerators(const float* x, int64_t stride, const float* temperature, const float* best, int64_t* out, int64_t R,
                        int64_t n) {
    for (int64_t r = 0; r < R; r++)
        each_numerator(x + r * stride, 0, n, temperature[r], best[r], [&](int64_t i, int64_t m, i64x16 w) {
            memcpy(out + r * n + i, &w, 8 * m);
        });
}

extern "C" void chunk_sums(const float* x, int64_t stride, const float* temperature, const float* best, int64_t* out, int64_t R,
                      int64_t V, int64_t size) {
    const int64_t C = (V + size - 1) / size;
#pragma omp parallel for
    for (int64_t at = 0; at < R * C; at++) {
        const int64_t r = at / C, from = at % C * size;
        i64x16 sums = {};
        each_numerator(x + r * stride, from, std::min(size, V - from), temperature[r], best[r],
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
    extern "C" void attend_##NAME(const C* q, int64_t q_stride, C* out, const C* k, const C* v, const Span* spans, \
                                  int64_t n_spans, const int32_t* tables, int64_t H, int64_t K, int64_t S, int64_t E) { \
        attend(q, q_stride, out, k, v, spans, n_spans, tables, H, K, S, E); \
    } \
    extern "C" void add_norm_##NAME(C* x, const C* delta, const C* weight, float eps, C* out, int64_t T, int64_t D) { \
        add_norm(x, delta, weight, eps, out, T, D); \
    } \
    extern "C" void rotate_##NAME(C* x, int64_t stride, const float* cos, const float* sin, int64_t T, int64_t heads, int64_t E) { \
        rotate_rows(x, stride, cos, sin, T, heads, E); \
    } \
    extern "C" void write_kv_##NAME(const C* k, int64_t k_stride, const C* v, int64_t v_stride, const int64_t* blocks, \
                                    const int64_t* offsets, C* k_cache, C* v_cache, int64_t T, int64_t K, int64_t S, int64_t E) { \
        write_rows(k, k_stride, v, v_stride, blocks, offsets, k_cache, v_cache, T, K, S, E); \
    } \
    extern "C" void silu_mul_##NAME(const C* x, C* out, int64_t T, int64_t F) { silu_mul(x, out, T, F); }

FOR_DTYPE(fp32, float)
FOR_DTYPE(bf16, bf16)
