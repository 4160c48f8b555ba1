// The two passes of reference.py for CPUs. No header of PyTorch is needed: cpu.py calls this by
// ctypes. Each arithmetic operation is rounded by itself, as PyTorch's are (-ffp-contract=off), so
// that states equal the reference's bitwise.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>

// The four types below mirror cpu.py and the columns of its tables.

struct Tensors {  // addresses of one tensor's first elements
    int64_t param, grad, exp_avg_grad, exp_avg, exp_avg_sq;
};

struct Fragment {
    int64_t tensor;  // index into the Tensors
    int64_t offset;  // first element in the tensor
    int64_t length;
    int64_t start;  // first element in the layer
    int64_t layer;  // row of the sums
    int64_t whole;  // 1 where no other rank has a part of the layer
};

struct Scalars {
    double exploration;  // α (1−β1)
    double rate1, rate2, beta3, rate3;  // 1−β1, 1−β2, β3, 1−β3
    double scale2, scale3;  // 1 / (1−β2^k), 1 / (1−β3^k)
    double eps1, weight_decay;
    double lr, scaled, eps2, eps3, clip_low, clip_high;
    double largest;  // number that a weight may become; infinity to let anything happen
    int64_t rounding_key;
};

enum Types : int64_t { FLOAT, FLOAT_BF16_STATES, BF16, BF16_BF16_STATES, DOUBLE };

namespace {

// Elements that a thread takes at a time. Their places in the layer, and so the sums, do not depend
// on the number of threads.
constexpr int64_t BLOCK = 4096;

// The updates r that pass 1 leaves in memory for pass 2, of all threads together: as many as stay in
// the cache. Each thread keeps those of its last blocks, with which pass 2 begins; it computes the
// others again.
constexpr int64_t KEPT = 1 << 21;

// Small fragments are taken together up to this many elements, which all threads share.
constexpr int64_t BATCH = 1 << 17;

struct bf16 {
    uint16_t bits;
};

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// What is narrower than the arithmetic passes through buffers of this many elements, which stay in
// the first cache. Loops over one width each are vectorised well; mixed ones are not.
constexpr int64_t CHUNK = 128;

// A chunk of memory as T: the memory itself where that is its type, else a copy.
template <class T>
struct Window {
    alignas(64) T buffer[CHUNK];

    T* open(T* memory, int64_t) { return memory; }
    const T* open(const T* memory, int64_t) { return memory; }
    T* open(const bf16* memory, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) buffer[i] = float_of(uint32_t(memory[i].bits) << 16);
        return buffer;
    }

    // Writes back what was rounded before.
    void close(T*, int64_t) {}
    void close(bf16* memory, int64_t n) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) memory[i].bits = uint16_t(bits_of(buffer[i]) >> 16);
    }
};

// Rounds x to nearest, to what bf16 can hold.
inline void round_to_nearest(float* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bits_of(x[i]);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        x[i] = float_of(is_nan ? 0x7fc00000u : rounded);
    }
}

// Stochastic rounding of s and m to what bf16 can hold; see round_stochastically in reference.py.
template <bool CORRECT>
void round_stochastically(float* __restrict__ s, float* __restrict__ m, int64_t n, uint32_t start,
                     uint32_t key) {
#pragma omp simd
    for (int32_t i = 0; i < int32_t(n); ++i) {
        const uint32_t s_bits = CORRECT ? bits_of(s[i]) : 0, m_bits = bits_of(m[i]);
        uint32_t x = (start + uint32_t(i)) * 0x9e3779b9u + key;
        x = (x ^ s_bits ^ (m_bits << 15)) * 0x7feb352du;
        x ^= x >> 16;
        if (CORRECT) s[i] = float_of((s_bits + (x >> 16)) & 0xffff0000u);
        m[i] = float_of((m_bits + (x & 0xffffu)) & 0xffff0000u);
    }
}

// The scalars in the type of the arithmetic. Passed by value: of a reference the compiler must
// assume that storing a state changes it, and does not vectorise.
template <class T>
struct Constants {
    T exploration, rate1, rate2, beta3, rate3, scale2, scale3, eps1, weight_decay;
    uint32_t rounding_key;
    bool guard;  // write nothing that is not finite
    explicit Constants(const Scalars& s)
        : exploration(T(s.exploration)), rate1(T(s.rate1)), rate2(T(s.rate2)), beta3(T(s.beta3)),
          rate3(T(s.rate3)), scale2(T(s.scale2)), scale3(T(s.scale3)), eps1(T(s.eps1)),
          weight_decay(T(s.weight_decay)), rounding_key(uint32_t(s.rounding_key)), guard(std::isfinite(s.largest)) {}
};

// The states of a chunk as they were. Of narrow ones, which are copies, only v is kept.
template <class T>
struct Before {
    alignas(64) T exp_avg_grad[CHUNK], exp_avg[CHUNK], exp_avg_sq[CHUNK];
};

template <bool CORRECT, bool NARROW, class T>
void advance(const T* __restrict__ grad, T* __restrict__ exp_avg_grad, T* __restrict__ exp_avg,
             T* __restrict__ exp_avg_sq, Before<T>& __restrict__ before, int64_t n,
             const Constants<T> c) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        T g = grad[i];
        if constexpr (CORRECT) {
            const T s = exp_avg_grad[i];
            if constexpr (!NARROW) before.exp_avg_grad[i] = s;
            const T difference = g - s;
            exp_avg_grad[i] = s + difference * c.rate1;
            g = g + difference * c.exploration;
        }
        const T m = exp_avg[i], v = exp_avg_sq[i];
        if constexpr (!NARROW) before.exp_avg[i] = m;
        before.exp_avg_sq[i] = v;
        exp_avg[i] = m + (g - m) * c.rate2;
        exp_avg_sq[i] = v * c.beta3 + g * g * c.rate3;
    }
}

// r = m̂ / (√v̂ + ε1) + λθ
template <class T>
inline T update(T param, T exp_avg, T exp_avg_sq, const Constants<T>& c) {
    const T denominator = std::sqrt(exp_avg_sq * c.scale3) + c.eps1;
    return exp_avg * c.scale2 / denominator + param * c.weight_decay;
}

struct Sums {
    double weight = 0, update = 0;
};

// Σθ² and Σr² of a chunk; Σr² is NaN where a θ, r or v is not finite and `guard` is set. An s or m
// that is not shows in r, but where v is infinite r may be m / ∞ = 0. Leaves r in `updates`, too,
// where KEEP.
template <bool KEEP, class T>
Sums sums_of_squares(const T* __restrict__ param, const T* __restrict__ exp_avg,
                     const T* __restrict__ exp_avg_sq, T* __restrict__ updates, int64_t n,
                     const Constants<T> c) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    double weight = 0, change = 0;
    Bits top = 0;  // v >= 0 are in the order of their bits, infinity and NaN last
#pragma omp simd reduction(+ : weight, change) reduction(max : top)
    for (int64_t i = 0; i < n; ++i) {
        const T p = param[i], r = update(p, exp_avg[i], exp_avg_sq[i], c);
        if constexpr (KEEP) updates[i] = r;
        weight += double(p) * double(p);
        change += double(r) * double(r);
        Bits bits;
        std::memcpy(&bits, &exp_avg_sq[i], sizeof bits);
        top = bits > top ? bits : top;
    }
    const T infinity = std::numeric_limits<T>::infinity();
    Bits bits_of_infinity;
    std::memcpy(&bits_of_infinity, &infinity, sizeof infinity);
    const bool finite = top < bits_of_infinity && std::isfinite(weight + change);
    return {weight, finite || !c.guard ? change : std::numeric_limits<double>::quiet_NaN()};
}

template <class T>
void subtract_update(T* __restrict__ param, const T* __restrict__ exp_avg,
                     const T* __restrict__ exp_avg_sq, int64_t n, const Constants<T> c,
                     const T step_size) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        param[i] = param[i] - update(param[i], exp_avg[i], exp_avg_sq[i], c) * step_size;
}

template <class T>
void subtract_kept(T* __restrict__ param, const T* __restrict__ updates, int64_t n,
                   const T step_size) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) param[i] = param[i] - updates[i] * step_size;
}

// P is the type of parameter and gradient, S that of s and m, T that of v and of the arithmetic.
template <class P, class S, class T>
struct Block {
    P* param;
    const P* grad;
    S* exp_avg_grad;  // null where α is 0
    S* exp_avg;
    T* exp_avg_sq;
    int64_t length;
    uint32_t start;  // in the layer, modulo 2^32

    Block(const Tensors& t, const Fragment& f, int64_t begin)
        : length(std::min(BLOCK, f.length - begin)), start(uint32_t(f.start + begin)) {
        const int64_t at = f.offset + begin;
        param = reinterpret_cast<P*>(t.param) + at;
        grad = reinterpret_cast<const P*>(t.grad) + at;
        exp_avg_grad = t.exp_avg_grad ? reinterpret_cast<S*>(t.exp_avg_grad) + at : nullptr;
        exp_avg = reinterpret_cast<S*>(t.exp_avg) + at;
        exp_avg_sq = reinterpret_cast<T*>(t.exp_avg_sq) + at;
    }

    // Pass 1; leaves r in `updates` unless that is null.
    Sums update_states(const Constants<T>& c, T* updates) const {
        return exp_avg_grad ? update_states<true>(c, updates) : update_states<false>(c, updates);
    }

    template <bool CORRECT>
    Sums update_states(const Constants<T>& c, T* updates) const {
        constexpr bool NARROW = std::is_same_v<S, bf16>;
        Window<T> params, grads, averages_of_grad, averages;
        Before<T> before;
        Sums sums;
        for (int64_t i = 0; i < length; i += CHUNK) {
            const int64_t n = std::min(CHUNK, length - i);
            const T* const p = params.open(param + i, n);
            const T* const g = grads.open(grad + i, n);
            T* const s = CORRECT ? averages_of_grad.open(exp_avg_grad + i, n) : nullptr;
            T* const m = averages.open(exp_avg + i, n);
            T* const v = exp_avg_sq + i;
            advance<CORRECT, NARROW>(g, s, m, v, before, n, c);
            if constexpr (NARROW)
                round_stochastically<CORRECT>(s, m, n, start + uint32_t(i), c.rounding_key);
            const Sums chunk = updates ? sums_of_squares<true>(p, m, v, updates + i, n, c)
                                       : sums_of_squares<false>(p, m, v, updates, n, c);
            sums.weight += chunk.weight;
            sums.update += chunk.update;
            if (c.guard && std::isnan(chunk.update)) {
                std::copy_n(before.exp_avg_sq, n, v);
                if constexpr (NARROW) continue;
                if constexpr (CORRECT) std::copy_n(before.exp_avg_grad, n, s);
                std::copy_n(before.exp_avg, n, m);
            }
            if constexpr (CORRECT) averages_of_grad.close(exp_avg_grad + i, n);
            averages.close(exp_avg + i, n);
        }
        return sums;
    }

    // Pass 2; takes r from `updates` unless that is null.
    // A step size of 0 leaves weights alone, also where r is not finite.
    void apply_update(const Constants<T>& c, const T step_size, const T* updates) const {
        if (step_size == 0) return;
        Window<T> params, averages;
        for (int64_t i = 0; i < length; i += CHUNK) {
            const int64_t n = std::min(CHUNK, length - i);
            T* const p = params.open(param + i, n);
            if (updates)
                subtract_kept(p, updates + i, n, step_size);
            else
                subtract_update(p, averages.open(exp_avg + i, n), exp_avg_sq + i, n, c, step_size);
            if constexpr (std::is_same_v<P, bf16>) round_to_nearest(p, n);
            params.close(param + i, n);
        }
    }
};

// trust_ratio.py's trust_ratios() and mend().
double step_size(const Sums& sums, const Scalars& s) {
    const double weight_norm = std::sqrt(sums.weight), update_norm = std::sqrt(sums.update);
    double ratio = 1;
    if (s.scaled) {
        const double phi = weight_norm + s.eps3;
        const bool zero = sums.weight == 0 || sums.update == 0;
        ratio = zero ? 1 : phi / (update_norm + s.eps2 * phi);
        // In this order of arguments a NaN stays one.
        ratio = std::min(std::max(ratio, s.clip_low), s.clip_high);
    }
    const double size = s.lr * ratio;
    if (!std::isfinite(s.largest)) return size;
    // Written so that a NaN gives 0, too.
    return size <= s.largest && weight_norm + size * update_norm <= s.largest ? size : 0;
}

int64_t blocks_of(const Fragment& f) { return (f.length + BLOCK - 1) / BLOCK; }

// Calls `work(fragment, begin, block, to_come)` for this thread's share of all blocks of the
// fragments: `to_come` blocks of it come after this one. A thread gets the same share again,
// backwards, so that it finds in its cache what it left there.
template <class F>
void for_my_blocks(const Fragment* first, const Fragment* last, bool backwards, const F& work) {
    int64_t blocks = 0;
    for (const Fragment* f = first; f != last; ++f) blocks += blocks_of(*f);
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t low = blocks * thread / threads, high = blocks * (thread + 1) / threads;
    int64_t before = backwards ? blocks : 0;
    for (int64_t k = 0; k < last - first; ++k) {
        const Fragment& f = backwards ? *(last - 1 - k) : first[k];
        const int64_t n = blocks_of(f);
        if (backwards) before -= n;
        const int64_t begin = std::max(low - before, int64_t(0)), end = std::min(high - before, n);
        for (int64_t j = begin; j < end; ++j) {
            const int64_t b = backwards ? begin + end - 1 - j : j;
            work(f, b * BLOCK, before + b, high - 1 - before - b);
        }
        if (!backwards) before += n;
    }
}

// The end of the batch that begins with `first`.
const Fragment* batch_end(const Fragment* first, const Fragment* last) {
    int64_t length = 0;
    const Fragment* f = first;
    while (f != last && (f == first || length + f->length <= BATCH)) length += (f++)->length;
    return f;
}

template <class P, class S, class T>
void update_states(const Tensors* tensors, const Fragment* first, const Fragment* last,
                   const Scalars& scalars, double* sums, int threads) {
    const Constants<T> c(scalars);
    static thread_local std::vector<T> kept_memory(KEPT);
    static thread_local std::vector<Sums> partial_memory;
    static thread_local std::vector<double> step_size_memory;
    int64_t blocks = 0;
    for (const Fragment* f = first; f != last; ++f) blocks += blocks_of(*f);
    partial_memory.resize(blocks);  // enough for any batch
    step_size_memory.resize(last - first);
    T* const kept = kept_memory.data();  // the calling thread's, for all threads
    Sums* const partial = partial_memory.data();
    double* const step_sizes = step_size_memory.data();
#pragma omp parallel num_threads(threads)
    while (first != last) {
        const Fragment* const begin = first;
        const Fragment* const end = batch_end(first, last);
        const int64_t keeps = KEPT / BLOCK / omp_get_num_threads();  // blocks
        T* const mine = kept + omp_get_thread_num() * keeps * BLOCK;
        const auto updates_of = [&](const Fragment& f, int64_t to_come) {
            return f.whole && to_come < keeps ? mine + to_come * BLOCK : nullptr;
        };
        for_my_blocks(begin, end, false, [&](auto& f, int64_t at, int64_t block, int64_t to_come) {
            const Block<P, S, T> b(tensors[f.tensor], f, at);
            partial[block] = b.update_states(c, updates_of(f, to_come));
        });
#pragma omp barrier
#pragma omp single
        {
            const Sums* next = partial;
            for (const Fragment* f = begin; f != end; ++f) {
                Sums total;
                for (int64_t b = blocks_of(*f); b > 0; --b, ++next) {
                    total.weight += next->weight;
                    total.update += next->update;
                }
                sums[2 * f->layer] += total.weight;
                sums[2 * f->layer + 1] += total.update;
                step_sizes[f - begin] = step_size(total, scalars);
            }
        }
        for_my_blocks(begin, end, true, [&](auto& f, int64_t at, int64_t, int64_t to_come) {
            if (!f.whole) return;
            const Block<P, S, T> b(tensors[f.tensor], f, at);
            b.apply_update(c, T(step_sizes[&f - begin]), updates_of(f, to_come));
        });
#pragma omp barrier
#pragma omp single
        first = end;
    }
}

template <class P, class S, class T>
void apply_update(const Tensors* tensors, const Fragment* first, const Fragment* last,
                  const Scalars& scalars, const double* step_sizes, int threads) {
    const Constants<T> c(scalars);
#pragma omp parallel num_threads(threads)
    for_my_blocks(first, last, true, [&](auto& f, int64_t at, int64_t, int64_t) {
        if (f.whole) return;
        const Block<P, S, T> b(tensors[f.tensor], f, at);
        b.apply_update(c, T(step_sizes[f.layer]), nullptr);
    });
}

template <class F>
void with_types(int64_t types, const F& call) {
    switch (types) {
        case FLOAT: return call(float(), float(), float());
        case FLOAT_BF16_STATES: return call(float(), bf16(), float());
        case BF16: return call(bf16(), float(), float());
        case BF16_BF16_STATES: return call(bf16(), bf16(), float());
        case DOUBLE: return call(double(), double(), double());
    }
}

}  // namespace

// Pass 1, and pass 2 at once for fragments that are whole layers. Adds to `sums`, [layers, 2].
extern "C" void alto_update_states(int64_t types, const Tensors* tensors, const Fragment* fragments,
                                   int64_t count, const Scalars* scalars, double* sums,
                                   int64_t threads) {
    with_types(types, [&](auto p, auto s, auto t) {
        update_states<decltype(p), decltype(s), decltype(t)>(tensors, fragments, fragments + count,
                                                             *scalars, sums, int(threads));
    });
}

// Pass 2 for the other fragments, with `step_sizes`, [layers].
extern "C" void alto_apply_update(int64_t types, const Tensors* tensors, const Fragment* fragments,
                                  int64_t count, const Scalars* scalars, const double* step_sizes,
                                  int64_t threads) {
    with_types(types, [&](auto p, auto s, auto t) {
        apply_update<decltype(p), decltype(s), decltype(t)>(tensors, fragments, fragments + count,
                                                            *scalars, step_sizes, int(threads));
    });
}
