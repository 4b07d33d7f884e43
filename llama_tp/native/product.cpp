// Matrix products with packed weights, for decode (few rows: the weights are read once, at the memory's speed) and prefill
// (many rows: at the machine's rate of multiplying) alike.
//
// A row's bits depend on that row alone: each of its sums runs over K in order, in one chain of fp32 fused steps (or one
// chain for each K-chunk, added as one fixed tree), however many rows, outputs and threads there are.
//
// Letters: M rows of x, K inputs, N outputs, a multiple of WIDTH. Packed, a weight is (N / WIDTH, K / TOGETHER, WIDTH, TOGETHER):
// WIDTH outputs lie in one piece, read from its beginning to its end, and are as many bytes as they were row by row.

#include <algorithm>
#include <vector>

#include "native.h"

namespace {

constexpr int64_t DEPTH = 1024;     // inputs gone through at once: 128 KB of bf16 weights, which stay in the L2 cache for all rows
constexpr int64_t PANEL = 512;      // rows gone through at once
constexpr int AHEAD = 2048;         // bytes between what is read and what is asked for, when few rows stream the weights
#ifdef __AVX512F__
constexpr int TILE = 6;             // rows whose sums are held in registers: 24 of 32
#else
constexpr int TILE = 1;
#endif

template <int D, bool LOW> constexpr int lane(int i) { return LOW ? (i & D ? 16 + i - D : i) : (i & D ? 16 + i : i + D); }
template <int D, bool LOW> inline f32x16 mix(f32x16 a, f32x16 b) {
#define L(i) lane<D, LOW>(i)
    return __builtin_shufflevector(a, b, L(0), L(1), L(2), L(3), L(4), L(5), L(6), L(7), L(8), L(9), L(10), L(11), L(12),
                                   L(13), L(14), L(15));
#undef L
}
template <int D> inline void transpose_step(f32x16* r) {
    for (int i = 0; i < 16; i++)
        if (!(i & D)) {
            f32x16 a = r[i], b = r[i + D];
            r[i] = mix<D, true>(a, b);
            r[i + D] = mix<D, false>(a, b);
        }
}
// 16 x 16 transposition of 32-bit lanes.
inline void transpose(f32x16* r) { transpose_step<8>(r); transpose_step<4>(r); transpose_step<2>(r); transpose_step<1>(r); }

// (N, K) row by row -> packed, in place, through a copy of one block's rows.
template <typename C> void pack(Lane<C>* w, int64_t N, int64_t K) {
    const int64_t steps = K / TOGETHER<C>;
#pragma omp parallel
    {
        std::vector<Lane<C>> copy(WIDTH * steps);
#pragma omp for
        for (int64_t n = 0; n < N; n += WIDTH) {
            Lane<C>* to = w + n * steps;
            memcpy(copy.data(), to, copy.size() * sizeof(Lane<C>));
            for (int64_t k = 0; k < steps; k += 16)
                for (int i = 0; i < WIDTH; i += 16) {
                    const Lane<C>* from = &copy[i * steps + k];
                    if (sizeof(Lane<C>) == 4 && k + 16 <= steps) {
                        f32x16 r[16];
                        for (int j = 0; j < 16; j++) memcpy(&r[j], from + j * steps, 64);
                        transpose(r);
                        for (int j = 0; j < 16; j++) memcpy(to + (k + j) * WIDTH + i, &r[j], 64);
                    } else {
                        for (int64_t j = 0; j < std::min<int64_t>(16, steps - k); j++)
                            for (int l = 0; l < 16; l++) to[(k + j) * WIDTH + i + l] = from[l * steps + j];
                    }
                }
        }
    }
}

// Rows of the weight itself, as an embedding gives them: ids (T) -> out (T, K). False if an id is not below N.
template <typename C> bool take_rows(const Lane<C>* w, const int64_t* ids, Lane<C>* out, int64_t T, int64_t N, int64_t K) {
    const int64_t steps = K / TOGETHER<C>;
    for (int64_t t = 0; t < T; t++)
        if (ids[t] < 0 || ids[t] >= N) return false;
#pragma omp parallel for if (T > 1)
    for (int64_t t = 0; t < T; t++) {
        const Lane<C>* from = w + ids[t] / WIDTH * WIDTH * steps + ids[t] % WIDTH;
        for (int64_t k = 0; k < steps; k++) out[t * steps + k] = from[k * WIDTH];
    }
    return true;
}

// Weights to be asked for while others are used: LINES cache lines from `at` on at each step, then `step` bytes further.
struct Ahead { const char* at; int64_t step; };

// sums (M, WIDTH) += x (M, K) times one block's weights; sums begin at zero where `first`. `stride`: from row to row of x.
template <int M, int LINES, typename C>
void tile(const C* x, int64_t stride, const Lane<C>* w, int64_t K, bool first, float* sums, Ahead ahead) {
    f32x16 acc[M][4];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 4; i++) acc[m][i] = first ? splat(0.0f) : load(sums + m * WIDTH + 16 * i);
    for (int64_t k = 0; k < K; k += TOGETHER<C>, w += WIDTH, ahead.at += ahead.step) {
        for (int i = 0; i < LINES; i++) __builtin_prefetch(ahead.at + 64 * i);
        const auto w0 = load(w), w1 = load(w + 16), w2 = load(w + 32), w3 = load(w + 48);
        for (int m = 0; m < M; m++) {
            const auto number = spread(x + m * stride + k);
            acc[m][0] = multiply_add(acc[m][0], number, w0);
            acc[m][1] = multiply_add(acc[m][1], number, w1);
            acc[m][2] = multiply_add(acc[m][2], number, w2);
            acc[m][3] = multiply_add(acc[m][3], number, w3);
        }
    }
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 4; i++) store(sums + m * WIDTH + 16 * i, acc[m][i]);
}

// The same for tile number `i` of `n`, whose rows all go through the same weights. The first to come waits for the memory; so
// each asks for its share of the weights that come next (32 rows: 1.3 times as fast as without), or, alone, for those just ahead.
template <int M, typename C>
void tile_of(int64_t i, int64_t n, const C* x, int64_t stride, const Lane<C>* w, int64_t K, bool first, float* sums) {
    const int64_t step = WIDTH * sizeof(Lane<C>), size = K / TOGETHER<C> * step;
    const char* begin = reinterpret_cast<const char*>(w);
    const Ahead next{begin + size + size / n * i, step / n};
    if (n == 1) tile<M, 4>(x, stride, w, K, first, sums, Ahead{begin + AHEAD, step});
    else if (n < 4) tile<M, 2>(x, stride, w, K, first, sums, next);
    else if (n < 40) tile<M, 1>(x, stride, w, K, first, sums, next);
    else tile<M, 0>(x, stride, w, K, first, sums, next);           // so many rows hide the memory by themselves
}

template <typename C>
void some_rows(int64_t M, const C* x, int64_t stride, const Lane<C>* w, int64_t K, bool first, float* sums) {
    const int64_t n = (M + TILE - 1) / TILE;
    for (int64_t i = 0; i < n; i++) {                               // as even as can be: 8 rows are 4 and 4
        const int64_t m = M * i / n;
        const C* from = x + m * stride;
        float* to = sums + m * WIDTH;
        switch (M * (i + 1) / n - m) {
            case 1: tile_of<1>(i, n, from, stride, w, K, first, to); break;
#ifdef __AVX512F__
            case 2: tile_of<2>(i, n, from, stride, w, K, first, to); break;
            case 3: tile_of<3>(i, n, from, stride, w, K, first, to); break;
            case 4: tile_of<4>(i, n, from, stride, w, K, first, to); break;
            case 5: tile_of<5>(i, n, from, stride, w, K, first, to); break;
            default: tile_of<6>(i, n, from, stride, w, K, first, to);
#endif
        }
    }
}

// x (M, K) times packed w -> (M, n_out): the sums of n_chunks equal parts of K, added as arch.summation.tree_add does; into `partial_sums`
// as they are, or rounded into `out`. n_out is N without what fills up the last block.
template <typename C>
void product(const C* x, const Lane<C>* w, float* partial_sums, C* out, int64_t M, int64_t K, int64_t n_out, int64_t n_chunks) {
    const int64_t blocks = (n_out + WIDTH - 1) / WIDTH, panels = (M + PANEL - 1) / PANEL, chunk = K / n_chunks;
#pragma omp parallel if (blocks * panels > 1)
    {
        static thread_local std::vector<float> sums;                // (n_chunks, rows, WIDTH)
        sums.resize(std::max<size_t>(sums.size(), n_chunks * std::min(M, PANEL) * WIDTH));
#pragma omp for collapse(2) schedule(static)
        for (int64_t panel = 0; panel < panels; panel++)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t top = panel * PANEL, rows = std::min(PANEL, M - top);
                for (int64_t c = 0; c < n_chunks; c++)
                    for (int64_t k = 0; k < chunk; k += DEPTH) {
                        const int64_t at = c * chunk + k;
                        some_rows(rows, x + top * K + at, K, w + (block * K + at) / TOGETHER<C> * WIDTH,
                                  std::min(DEPTH, chunk - k), !k, &sums[c * rows * WIDTH]);
                    }
                for (int64_t m = 0; m < rows; m++)
                    for (int64_t n = 0; n < std::min<int64_t>(WIDTH, n_out - block * WIDTH); n += 16) {
                        const int64_t left = n_out - block * WIDTH - n, to = (top + m) * n_out + block * WIDTH + n;
                        f32x16 parts[MAX_PARTS];
                        for (int64_t c = 0; c < n_chunks; c++) parts[c] = load(&sums[(c * rows + m) * WIDTH + n]);
                        const f32x16 total = tree_add(parts, int(n_chunks));
                        if (partial_sums) store_some(partial_sums + to, total, left);
                        else store_some(out + to, total, left);
                    }
            }
    }
}

}  // namespace

// How many inputs a weight must have a multiple of, a chunk too; 0 where oneDNN does better: on CPUs that multiply whole tiles.
extern "C" int inputs_together_fp32() { return TOGETHER<float>; }
extern "C" int inputs_together_bf16() {
#ifdef __AMX_BF16__
    return 0;
#else
    return TOGETHER<bf16>;
#endif
}

#define FOR_DTYPE(NAME, C) \
    extern "C" void pack_##NAME(Lane<C>* w, int64_t N, int64_t K) { pack<C>(w, N, K); } \
    extern "C" bool take_rows_##NAME(const Lane<C>* w, const int64_t* ids, Lane<C>* out, int64_t T, int64_t N, int64_t K) { \
        return take_rows<C>(w, ids, out, T, N, K); \
    } \
    extern "C" void product_##NAME(const C* x, const Lane<C>* w, float* partial_sums, C* out, int64_t M, int64_t K, \
                                   int64_t N, int64_t n_chunks) { \
        product<C>(x, w, partial_sums, out, M, K, N, n_chunks); \
    }

FOR_DTYPE(fp32, float)
FOR_DTYPE(bf16, bf16)
