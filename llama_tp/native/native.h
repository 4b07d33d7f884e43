// What the library exports: every function that Python or another .cpp file calls, and every struct that crosses, declared once.
//
// All of it is plain C, called through ctypes. Python declares the same in structs.py and library.py, and holds that against what
// `interface()` reports when it loads the library; calls.py checks tensors before a pointer leaves Python.
//
// A function of a dtype is given as a type `Name<C>`, C being float or bf16, and exported as name_fp32 and name_bf16.
//
// Memory: the caller owns all of it, before, during and after a call. No pointer is kept; scratch is the function's own. Tensors are
// contiguous, unless a stride stands beside them, and 64-byte alignment is not needed. const is read, the rest is written. A null
// pointer is allowed only where the comment says so. Sizes are not checked here, and nothing is thrown.
//
// Letters, sizes on this rank: T tokens (rows) in the step, D model dim, H query heads, K KV heads (in product.cpp: inputs), E head
// dim, F ffn dim, V vocabulary rows, N KV blocks (in product.cpp: outputs), S slots a block, a multiple of 16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "vector.h"

// One sequence in a step: rows [row, row + n) are positions [start, start + n); its block table begins at tables[table].
struct Span {
    int64_t row, start, n, table;
};
static_assert(sizeof(Span) == 4 * 8 && offsetof(Span, table) == 24, "structs.SPAN");

// What a layer keeps from step to step. Weights are packed as `Pack` leaves them.
template <typename C> struct LayerArgs {
    const C* attention_norm;        // (D)
    const Lane<C>* wqkv;            // ((H + 2K) E, D)
    const Lane<C>* wo;              // (D, H E)
    const C* ffn_norm;              // (D)
    const Lane<C>* w13;             // (2F, D): gates, then ups
    const Lane<C>* w2;              // (D, F)
    int64_t D, H, K, E, F;
    int64_t n_chunks;               // K-chunks of wo and w2
    double eps;
    void* communicator;             // shared memory of the ranks (see SharedSum); null with one rank
    int64_t tp, rank;
    int64_t fp32_sums;              // whether sums over the ranks are of fp32 partial sums, or of C
    double timeout_s;               // how long to wait for the other ranks
};
static_assert(sizeof(LayerArgs<float>) == 18 * 8 && sizeof(LayerArgs<bf16>) == sizeof(LayerArgs<float>), "structs.LayerArgs");
static_assert(offsetof(LayerArgs<float>, D) == 48 && offsetof(LayerArgs<float>, eps) == 96, "structs.LayerArgs");
static_assert(offsetof(LayerArgs<float>, communicator) == 104 && offsetof(LayerArgs<float>, timeout_s) == 136, "structs.LayerArgs");

// What a step keeps from layer to layer.
struct StepArgs {
    int64_t T, S;
    const float *cos, *sin;         // (T, E / 2)
    const int64_t *blocks, *offsets;    // (T): where a row's key and value go, block and slot in it
    const Span* spans;              // (n_spans)
    int64_t n_spans;
    const int32_t* tables;          // block tables, one after the other
    int64_t complete;               // whether the spans cover all T rows
};
static_assert(sizeof(StepArgs) == 10 * 8 && offsetof(StepArgs, cos) == 16, "structs.StepArgs");
static_assert(offsetof(StepArgs, n_spans) == 56 && offsetof(StepArgs, complete) == 72, "structs.StepArgs");

// --- kernels.cpp ---------------------------------------------------------------------------------------------------------------

// Softmax attention of every row of the spans over its sequence's cached context; rows of no span are left as they are.
// q: (T, H, E), rows q_stride elements apart; out: (T, H, E); k, v: one layer's cache, (N, K, S, E) in kernels.cpp's own order.
template <typename C>
using Attend = void(const C* q, int64_t q_stride, C* out, const C* k, const C* v, const Span* spans, int64_t n_spans,
                    const int32_t* tables, int64_t H, int64_t K, int64_t S, int64_t E);

// x (T, D) += delta (T, D), which may be null; then out (T, D) = x / rms(x) * weight (D).
template <typename C> using AddNorm = void(C* x, const C* delta, const C* weight, float eps, C* out, int64_t T, int64_t D);

// Rotates each pair (2i, 2i + 1) of x (T, heads, E), rows `stride` elements apart, in place. cos, sin: (T, E / 2).
template <typename C>
using Rotate = void(C* x, int64_t stride, const float* cos, const float* sin, int64_t T, int64_t heads, int64_t E);

// Writes keys and values, (T, K, E) with rows k_stride and v_stride elements apart, to slot offsets[t] of block blocks[t] of one
// layer's cache. blocks, offsets: (T); k_cache, v_cache: (N, K, S, E) in kernels.cpp's own order.
template <typename C>
using WriteKV = void(const C* k, int64_t k_stride, const C* v, int64_t v_stride, const int64_t* blocks, const int64_t* offsets,
                     C* k_cache, C* v_cache, int64_t T, int64_t K, int64_t S, int64_t E);

// x (T, 2F), gates, then ups -> out (T, F) = silu(gate) * up.
template <typename C> using SiluMul = void(const C* x, C* out, int64_t T, int64_t F);

// exp((x - best) / temperature) of each logit as an integer, 2^44 for the best.
// x: (R, n), rows `stride` elements apart; temperature, best: (R); out: (R, n).
using SoftmaxNumerators = void(const float* x, int64_t stride, const float* temperature, const float* best, int64_t* out, int64_t R,
                               int64_t n);

// Sums of every `size` of a row's softmax numerators. x: (R, V), rows `stride` elements apart; out: (R, ceil(V / size)).
using ChunkSums = void(const float* x, int64_t stride, const float* temperature, const float* best, int64_t* out, int64_t R, int64_t V,
                       int64_t size);

// Reads n numbers, a multiple of 512, as fast as the threads can; -> their sum.
using ReadAll = uint64_t(const uint64_t* p, int64_t n);

// --- product.cpp ---------------------------------------------------------------------------------------------------------------

constexpr int WIDTH = 64;           // outputs of a packed block: four vectors

// Inputs that one step of a sum multiplies. A weight must have a multiple of them, and a K-chunk too. 0: leave products to oneDNN.
using InputsTogether = int();

// w (N, K) row by row -> packed, in place: (N / WIDTH, K / TOGETHER, WIDTH, TOGETHER). N is a multiple of WIDTH.
template <typename C> using Pack = void(Lane<C>* w, int64_t N, int64_t K);

// Rows of a packed w (N, K), padded to whole blocks: ids (T) -> out (T, K). False, with nothing written, if an id is not in [0, N).
template <typename C> using TakeRows = bool(const Lane<C>* w, const int64_t* ids, Lane<C>* out, int64_t T, int64_t N, int64_t K);

// x (M, K) times packed w (N, K), padded to whole blocks -> (M, N): the sums of n_chunks equal parts of K, added as one binary tree.
// They go unrounded into `partial_sums`, or, if that is null, rounded into `out`.
template <typename C>
using Product = void(const C* x, const Lane<C>* w, float* partial_sums, C* out, int64_t M, int64_t K, int64_t N, int64_t n_chunks);

// --- layer.cpp -----------------------------------------------------------------------------------------------------------------

// x (T, D) += delta (T, D), if has_delta, through one layer -> delta: what the next layer adds to x. k, v: the layer's cache.
// False if the other ranks do not come to a sum in time.
template <typename C>
using LayerCall = bool(const LayerArgs<C>* layer, const StepArgs* step, C* x, C* delta, bool has_delta, C* k, C* v);

// --- shared.cpp ----------------------------------------------------------------------------------------------------------------

// All take one channel's shared memory: `base`, shared_bytes(tp) bytes, zero at first, aligned to 128. All ranks make the same calls
// in the same order. False if the others do not come within timeout_s.
using SharedBytes = int64_t(int tp);

// x (n) = the sum over the ranks, in fp32, as one binary tree: the same bits on every rank.
template <typename C> using SharedSum = bool(void* base, int tp, int rank, double timeout_s, C* x, int64_t n);

// Every rank's `bytes` at x -> out (tp * bytes), in rank order.
using SharedGather = bool(void* base, int tp, int rank, double timeout_s, const char* x, char* out, int64_t bytes);

// Rank 0's `bytes` at x -> x on every other rank. Rank 0 does not wait for them.
using SharedBroadcast = bool(void* base, int tp, int rank, double timeout_s, char* x, int64_t bytes);

// --- interface.cpp -------------------------------------------------------------------------------------------------------------

// All of the above as text, a line each: "struct NAME SIZE", "field STRUCT.NAME OFFSET TYPE", "function NAME RESULT ARGUMENT...",
// "constant NAME VALUE". The library keeps it.
using Interface = const char*();

// Each exported function, as EXPORT(name, its type); library.py's table has the same names.
#define FOR_DTYPE_EXPORTS(EXPORT, NAME, C) \
    EXPORT(attend_##NAME, Attend<C>) \
    EXPORT(add_norm_##NAME, AddNorm<C>) \
    EXPORT(rotate_##NAME, Rotate<C>) \
    EXPORT(write_kv_##NAME, WriteKV<C>) \
    EXPORT(silu_mul_##NAME, SiluMul<C>) \
    EXPORT(inputs_together_##NAME, InputsTogether) \
    EXPORT(pack_##NAME, Pack<C>) \
    EXPORT(take_rows_##NAME, TakeRows<C>) \
    EXPORT(product_##NAME, Product<C>) \
    EXPORT(layer_##NAME, LayerCall<C>) \
    EXPORT(shared_sum_##NAME, SharedSum<C>)
#define FOR_EXPORTS(EXPORT) \
    FOR_DTYPE_EXPORTS(EXPORT, fp32, float) \
    FOR_DTYPE_EXPORTS(EXPORT, bf16, bf16) \
    EXPORT(softmax_numerators, SoftmaxNumerators) \
    EXPORT(chunk_sums, ChunkSums) \
    EXPORT(read_all, ReadAll) \
    EXPORT(shared_bytes, SharedBytes) \
    EXPORT(shared_gather, SharedGather) \
    EXPORT(shared_broadcast, SharedBroadcast) \
    EXPORT(interface, Interface)

extern "C" {
#define DECLARE(NAME, TYPE) TYPE NAME;
FOR_EXPORTS(DECLARE)
#undef DECLARE
}
