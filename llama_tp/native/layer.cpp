// A whole layer in one call: what Transformer.layer_by_layer does with the functions of kernels.cpp and product.cpp, without Python in
// between, which takes 12 us for each of them once the weights have swept it out of the caches (1.7 ms of a 40 ms token).
//
// Letters as in transformer.py: T tokens, D model dim, H query heads, K KV heads, E head dim, F ffn dim, S slots a block.

#include <algorithm>
#include <vector>

#include "native.h"

namespace {

// One thread's memory for what stands between two functions: as large as the largest step so far.
template <typename T> T* scratch(std::vector<T>& memory, int64_t n) {
    if (int64_t(memory.size()) < n) memory.resize(n);
    return memory.data();
}

// The functions of a dtype.
template <typename C> struct Call;
#define FOR_DTYPE(NAME, C) \
    template <> struct Call<C> { \
        static constexpr auto add_norm = add_norm_##NAME; \
        static constexpr auto product = product_##NAME; \
        static constexpr auto rotate = rotate_##NAME; \
        static constexpr auto write_kv = write_kv_##NAME; \
        static constexpr auto attend = attend_##NAME; \
        static constexpr auto silu_mul = silu_mul_##NAME; \
        static constexpr auto shared_sum = shared_sum_##NAME; \
    };
FOR_DTYPE(fp32, float)
FOR_DTYPE(bf16, bf16)
#undef FOR_DTYPE

// model.linear.RowParallelLinear: x (T, in) times w -> out (T, D), summed over the ranks. False if they do not come in time.
template <typename C> bool row_parallel(const LayerArgs<C>& layer, const C* x, const Lane<C>* w, int64_t T, int64_t in, C* out) {
    const int64_t D = layer.D, n = T * D;
    if (layer.tp == 1 || !layer.fp32_sums) {
        Call<C>::product(x, w, nullptr, out, T, in, D, layer.n_chunks);
        return layer.tp == 1 || Call<C>::shared_sum(layer.communicator, int(layer.tp), int(layer.rank), layer.timeout_s, out, n);
    }
    static thread_local std::vector<float> memory;
    float* sums = scratch(memory, n);
    Call<C>::product(x, w, sums, nullptr, T, in, D, layer.n_chunks);
    if (!shared_sum_fp32(layer.communicator, int(layer.tp), int(layer.rank), layer.timeout_s, sums, n)) return false;
    for (int64_t i = 0; i < n; i += 16) store_some(out + i, load_some(sums + i, n - i), n - i);
    return true;
}

// x (T, D) += delta if there is one, through the layer, -> delta. k, v: its cache.
template <typename C> bool run(const LayerArgs<C>& layer, const StepArgs& step, C* x, C* delta, bool has_delta, C* k, C* v) {
    const int64_t T = step.T, D = layer.D, H = layer.H, K = layer.K, E = layer.E, F = layer.F, heads = H + 2 * K;
    static thread_local std::vector<C> memory;
    C* normed = scratch(memory, T * (D + std::max(heads * E + H * E, 3 * F)));
    C *qkv = normed + T * D, *attended = qkv + T * heads * E, *gate_up = qkv, *inner = gate_up + T * 2 * F;

    Call<C>::add_norm(x, has_delta ? delta : nullptr, layer.attention_norm, float(layer.eps), normed, T, D);
    Call<C>::product(normed, layer.wqkv, nullptr, qkv, T, D, heads * E, 1);
    Call<C>::rotate(qkv, heads * E, step.cos, step.sin, T, H + K, E);
    C *key = qkv + H * E, *value = key + K * E;
    Call<C>::write_kv(key, heads * E, value, heads * E, step.blocks, step.offsets, k, v, T, K, step.S, E);
    if (!step.complete) std::fill(attended, attended + T * H * E, C{});
    Call<C>::attend(qkv, heads * E, attended, k, v, step.spans, step.n_spans, step.tables, H, K, step.S, E);
    if (!row_parallel(layer, attended, layer.wo, T, H * E, delta)) return false;

    Call<C>::add_norm(x, delta, layer.ffn_norm, float(layer.eps), normed, T, D);
    Call<C>::product(normed, layer.w13, nullptr, gate_up, T, D, 2 * F, 1);
    Call<C>::silu_mul(gate_up, inner, T, F);
    return row_parallel(layer, inner, layer.w2, T, F, delta);
}

}  // namespace

#define LAYER(NAME, C) \
    extern "C" bool layer_##NAME(const LayerArgs<C>* layer, const StepArgs* step, C* x, C* delta, bool has_delta, C* k, C* v) { \
        return run(*layer, *step, x, delta, has_delta, k, v); \
    }
LAYER(fp32, float)
LAYER(bf16, bf16)
