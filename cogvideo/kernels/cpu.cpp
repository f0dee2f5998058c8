// Decoding on a CPU: products of a few rows and a large matrix, whole decoding steps of a transformer for a few rows,
// and sampling of their tokens.
//
// This is bound by memory bandwidth, so weights (fp32, bf16, fp16, or int8 with a scale per row) are read once for all
// rows and converted on the fly, keys are read in place from the cache, and a step is one parallel region. Sums are in
// float32, each in a fixed order that depends neither on the number of rows nor on the number of threads: a row's
// result is the same in every batch. cpu.py compiles this file when it is first needed, declares the same
// structures and checks their sizes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

template <class T> static inline T load(const void* p) { T v; memcpy(&v, p, sizeof v); return v; }

// a * b + c, rounded once where the processor can. Explicit, and compiled with -ffp-contract=off: left to itself, the
// compiler would fuse some of the expressions that must agree and not others.
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

struct Fp32 {
    typedef float Stored;
    static inline Floats widen(const float* p) { return load<Floats>(p); }
    static inline float widen_one(float v) { return v; }
};
struct Bf16 {
    typedef uint16_t Stored;
    static inline Floats widen(const uint16_t* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
        return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
        return (Floats)(__builtin_convertvector(load<Halves>(p), Ints) << 16);
#endif
    }
    static inline float widen_one(uint16_t v) { uint32_t bits = uint32_t(v) << 16; return load<float>(&bits); }
};
struct Fp16 {
    typedef _Float16 Stored;
    static inline Floats widen(const _Float16* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        Floats v;
        for (int i = 0; i < LANES; i++) v[i] = float(p[i]);
        return v;
#endif
    }
    static inline float widen_one(_Float16 v) { return float(v); }
};
struct Int8 {
    typedef int8_t Stored;
    static inline Floats widen(const int8_t* p) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
        return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
        return __builtin_convertvector(__builtin_convertvector(load<Bytes>(p), Ints), Floats);
#endif
    }
    static inline float widen_one(int8_t v) { return float(v); }
};

static inline float sum(Floats v) {
    float lanes[LANES];
    memcpy(lanes, &v, sizeof v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

// Halves blocks of 2H lanes: the first H lanes of each block come from a, the others from b.
template <int H, size_t... I>
static inline Floats fold(Floats a, Floats b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (I % (2 * H) < H ? 0 : LANES) + I / (2 * H) * 2 * H + I % H...) +
           __builtin_shufflevector(a, b, (I % (2 * H) < H ? 0 : LANES) + I / (2 * H) * 2 * H + I % H + H...);
}

// Lane i of the result is sum(v[i]), added in the same order as by sum.
template <int H = LANES / 2>
static inline Floats sum_each(Floats* v) {
    for (int i = 0; i < H; i++) v[i] = fold<H>(v[i], v[i + H], std::make_index_sequence<LANES>());
    if constexpr (H > 1) return sum_each<H / 2>(v);
    return v[0];
}

// ROWS rows of x times OUTS rows of the matrix: one accumulator per pair, so that the order of summation never changes.
template <class W, int ROWS, int OUTS>
static inline void tile(const float* x, long x_stride, const typename W::Stored* weight, const float* scale,
                        const float* bias, float* y, long y_stride, long in_features) {
    Floats sums[ROWS * OUTS] = {};
    long i = 0;
    for (; i + LANES <= in_features; i += LANES) {
        Floats in[ROWS];
        for (int r = 0; r < ROWS; r++) in[r] = load<Floats>(x + r * x_stride + i);
        for (int o = 0; o < OUTS; o++) {
            // the hardware prefetcher does not fetch the next tile's weights
            if (i % (64 / sizeof(typename W::Stored)) == 0) __builtin_prefetch(weight + (o + OUTS) * in_features + i);
            const Floats w = W::widen(weight + o * in_features + i);
            for (int r = 0; r < ROWS; r++) sums[r * OUTS + o] = fused(in[r], w, sums[r * OUTS + o]);
        }
    }
    if (i < in_features) {  // the remainder as one more vector, padded with zeros
        for (int r = 0; r < ROWS; r++)
            for (int o = 0; o < OUTS; o++) {
                Floats in{}, w{};
                for (long j = i; j < in_features; j++) {
                    in[j - i] = x[r * x_stride + j];
                    w[j - i] = W::widen_one(weight[o * in_features + j]);
                }
                sums[r * OUTS + o] = fused(in, w, sums[r * OUTS + o]);
            }
    }
    float totals[ROWS * OUTS];
    if constexpr (ROWS * OUTS == LANES) {
        const Floats each = sum_each(sums);
        memcpy(totals, &each, sizeof totals);
    } else {
        for (int k = 0; k < ROWS * OUTS; k++) totals[k] = sum(sums[k]);
    }
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTS; o++) {
            float total = totals[r * OUTS + o];
            if (scale) total *= scale[o];
            y[r * y_stride + o] = bias ? total + bias[o] : total;
        }
}

template <class W, int ROWS>
static void rows_by_outputs(const float* x, const typename W::Stored* weight, const float* scale, const float* bias,
                            float* y, long out_features, long in_features, long first, long last) {
    constexpr int OUTS = LANES / ROWS;
    long o = first;
    auto outputs = [&](auto num_outputs) {
        tile<W, ROWS, decltype(num_outputs)::value>(x, in_features, weight + o * in_features,
                                                    scale ? scale + o : nullptr, bias ? bias + o : nullptr, y + o,
                                                    out_features, in_features);
    };
    const auto full = std::integral_constant<int, OUTS>();
    for (; o + OUTS <= last; o += OUTS) outputs(full);
    if (o < last && last - first >= OUTS) {  // the last full tile overlaps the one before and writes equal values
        o = last - OUTS;
        outputs(full);
        o = last;
    }
    for (; o < last; o++) outputs(std::integral_constant<int, 1>());
}

// A weight whose rows are outputs. Products are multiplied by scale (null: none), then bias (null: none) is added.
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    long out_features, in_features;
    int dtype;
};

template <class W>
static void outputs_of(const Matrix& m, const float* x, float* y, long rows, long first, long last) {
    long r = 0;
    auto run = [&](auto size) {
        rows_by_outputs<W, decltype(size)::value>(x + r * m.in_features, (const typename W::Stored*)m.weight, m.scale,
                                                  m.bias, y + r * m.out_features, m.out_features, m.in_features, first,
                                                  last);
        r += decltype(size)::value;
    };
    while (rows - r >= 4) run(std::integral_constant<int, 4>());
    if (rows - r >= 2) run(std::integral_constant<int, 2>());
    if (rows - r == 1) run(std::integral_constant<int, 1>());
}

// A product is divided among threads in blocks of outputs, whose weights are few enough to stay in the nearest cache
// while all rows of x are multiplied.
constexpr long BLOCK = 16;
static inline long blocks_of(const Matrix& m) { return (m.out_features + BLOCK - 1) / BLOCK; }

// Outputs of one block: y (rows, out_features) from x (rows, in_features).
static void product(const Matrix& m, const float* x, float* y, long rows, long block) {
    const long first = block * BLOCK, last = std::min(first + BLOCK, m.out_features);
    switch (m.dtype) {
        case 0: return outputs_of<Fp32>(m, x, y, rows, first, last);
        case 1: return outputs_of<Bf16>(m, x, y, rows, first, last);
        case 2: return outputs_of<Fp16>(m, x, y, rows, first, last);
        case 3: return outputs_of<Int8>(m, x, y, rows, first, last);
    }
}

extern "C" void cogvideo_linear(const Matrix* matrix, const float* x, float* y, long rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < blocks_of(*matrix); b++) product(*matrix, x, y, rows, b);
}

static inline Floats exp_of(Floats x) {  // of x <= 0; Cephes' polynomial, 2 ulp; 0 below -87
    const Floats log2e = Floats{} + 1.44269504f;
    const Ints n = __builtin_convertvector(x * log2e - 0.5f, Ints);  // truncates, so this rounds
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = fused(whole, Floats{} + 2.12194440e-4f, x - whole * 0.693359375f);
    Floats p = Floats{} + 1.9875691500e-4f;
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fused(p, r, Floats{} + next);
    p = fused(p * r, r, r + 1.0f);
    const Floats scaled = p * (Floats)((n + 127) << 23);
    return (Floats)((Ints)scaled & (x > -87.0f));
}

template <class K>
static inline Floats products(const float* query, const typename K::Stored* key, long head_dim) {
    Floats total{};
    long d = 0;
    for (; d + LANES <= head_dim; d += LANES) total = fused(load<Floats>(query + d), K::widen(key + d), total);
    for (; d < head_dim; d++) total[0] += query[d] * K::widen_one(key[d]);
    return total;
}

// scores[i] = query . keys[at(i)] for `count` keys
template <class K, class At>
static inline void dot_keys(const float* query, const typename K::Stored* keys, At at, long count, long head_dim,
                            float* scores) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats each[LANES];
        for (int k = 0; k < LANES; k++) each[k] = products<K>(query, keys + at(i + k) * head_dim, head_dim);
        each[0] = sum_each(each);
        memcpy(scores + i, each, sizeof(Floats));
    }
    for (; i < count; i++) scores[i] = sum(products<K>(query, keys + at(i) * head_dim, head_dim));
}

template <class K, class At>
static inline void add_values(const float* weights, const typename K::Stored* values, At at, long count, long head_dim,
                              float* out) {
    constexpr int WIDE = 8;
    long d = 0;
    for (; d + WIDE * LANES <= head_dim; d += WIDE * LANES) {
        Floats sums[WIDE];
        for (int k = 0; k < WIDE; k++) sums[k] = load<Floats>(out + d + k * LANES);
        for (long i = 0; i < count; i++) {
            const auto* value = values + at(i) * head_dim + d;
            for (int k = 0; k < WIDE; k++) sums[k] = fused(Floats{} + weights[i], K::widen(value + k * LANES), sums[k]);
        }
        memcpy(out + d, sums, sizeof sums);
    }
    for (; d + LANES <= head_dim; d += LANES) {
        Floats total = load<Floats>(out + d);
        for (long i = 0; i < count; i++)
            total = fused(Floats{} + weights[i], K::widen(values + at(i) * head_dim + d), total);
        memcpy(out + d, &total, sizeof total);
    }
    for (; d < head_dim; d++)
        for (long i = 0; i < count; i++) out[d] += weights[i] * K::widen_one(values[at(i) * head_dim + d]);
}

struct Norm {
    const float *weight, *bias;
};

static void normalise(const Norm& norm, const float* x, float* y, long size) {
    float total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
    for (long i = 0; i < size; i++) total += x[i];
    const float mean = total / size;
#pragma omp simd reduction(+ : squares)
    for (long i = 0; i < size; i++) squares += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(squares / size + 1e-5f);
    for (long i = 0; i < size; i++) y[i] = (x[i] - mean) * inverse * norm.weight[i] + norm.bias[i];
}

static void gelu(float* x, long size) {  // the tanh form: x * sigmoid(2 u)
    for (long i = 0; i < size; i += LANES) {
        const long part = std::min<long>(LANES, size - i) * sizeof(float);
        Floats v{};
        memcpy(&v, x + i, part);
        const Floats twice = 1.5957691216f * (v + 0.044715f * v * v * v);
        const Floats e = exp_of(twice < 0 ? twice : -twice);
        v = v * (twice < 0 ? e : Floats{} + 1.0f) / (1.0f + e);
        memcpy(x + i, &v, part);
    }
}

// The frame keys that slot s sees: runs[starts[s]] up to runs[starts[s + 1]], each (first position, count).
struct KeyTable {
    const long *starts, *runs, *positions;  // positions[s]: where the slot's own key is stored
    long max_keys, num_slots;               // max_keys: of the slot that sees the most keys
};

struct Channel {
    Matrix query_key_value, dense;
};

struct Layer {
    Norm input_norm, third_norm, post_attention_norm, fourth_norm;
    Channel spatial, temporal;
    const float* mix;  // (hidden,) weight of the spatial channel
    Matrix up, down;
};

struct Model {
    const Layer* layers;
    long num_layers, num_heads, head_dim;
    Matrix token_table;  // embeddings; its first `out_features` rows, those of image tokens, are the output layer too
    long num_tokens;
    const float *first_positions, *extra_positions;  // embeddings of the slots of frame 0, and of later slots
    long frame_len;
    Norm final_norm;
};

// The cache of some clips for one channel of one layer.
struct KVBuffer {
    void *key, *value;  // (batch, num_heads, positions, head_dim): text, then frames
    long num_positions;
};

// Clips that share a cache and its tables: `rows` slots of each clip, after the rows of preceding groups.
struct StepGroup {
    const KVBuffer* buffers;  // by layer: spatial, temporal
    const KeyTable* tables;   // one of the spatial channel, then `num_temporal` of the temporal one, for layers in turn
    const int64_t *tokens, *slots;              // (batch, rows) and (rows,)
    const float *spatial_bias, *temporal_bias;  // (batch, text_len)
    long batch, rows, text_len, num_temporal;   // num_temporal: 0 in all groups or in none; 0 if the channel is off
    int cache_dtype;                            // as in Matrix; 0 or 2
};

// Memory for the attention of one query.
struct Scratch {
    std::vector<float> scores, query;
    std::vector<long> key_index;
};

// One head of one clip: store the rows' keys and values at their positions, then attend from every row.
template <class K>
static void attend(const StepGroup& group, const KVBuffer& buffer, const KeyTable& table, const Model& n,
                   const float* bias, const float* projected, float* out, long pair, Scratch& scratch) {
    const long hidden = n.num_heads * n.head_dim, text_len = group.text_len;
    const long b = pair / n.num_heads, h = pair % n.num_heads;
    auto* text_keys = (typename K::Stored*)buffer.key + pair * buffer.num_positions * n.head_dim;
    auto* text_values = (typename K::Stored*)buffer.value + pair * buffer.num_positions * n.head_dim;
    auto *keys = text_keys + text_len * n.head_dim, *values = text_values + text_len * n.head_dim;
    scratch.scores.resize(text_len + table.max_keys + LANES);
    scratch.key_index.resize(table.max_keys);
    scratch.query.resize(n.head_dim);
    float *scores = scratch.scores.data(), *query = scratch.query.data();
    long* key_index = scratch.key_index.data();

    for (long r = 0; r < group.rows; r++) {
        const float* row = projected + (b * group.rows + r) * 3 * hidden + h * n.head_dim;
        const long position = table.positions[group.slots[r]];
        std::copy_n(row + hidden, n.head_dim, keys + position * n.head_dim);
        std::copy_n(row + 2 * hidden, n.head_dim, values + position * n.head_dim);
    }
    const float scale = 1.0f / std::sqrt(float(n.head_dim));
    for (long r = 0; r < group.rows; r++) {
        const float* row = projected + (b * group.rows + r) * 3 * hidden + h * n.head_dim;
        for (long d = 0; d < n.head_dim; d++) query[d] = row[d] * scale;
        long count = 0;
        const long slot = group.slots[r];
        for (long run = table.starts[slot]; run < table.starts[slot + 1]; run++)
            for (long k = 0; k < table.runs[2 * run + 1]; k++) key_index[count++] = table.runs[2 * run] + k;
        auto itself = [](long i) { return i; };
        auto listed = [&](long i) { return key_index[i]; };
        const long all = text_len + count;
        dot_keys<K>(query, text_keys, itself, text_len, n.head_dim, scores);
        for (long t = 0; t < text_len; t++) scores[t] += bias[b * text_len + t];
        dot_keys<K>(query, keys, listed, count, n.head_dim, scores + text_len);
        float largest = scores[0];
        for (long i = 1; i < all; i++) largest = scores[i] > largest ? scores[i] : largest;
        for (long i = all; i < all + LANES; i++) scores[i] = -INFINITY;
        Floats sums{};
        for (long i = 0; i < all; i += LANES) {
            const Floats e = exp_of(load<Floats>(scores + i) - largest);
            memcpy(scores + i, &e, sizeof e);
            sums += e;
        }
        float* context = out + (b * group.rows + r) * hidden + h * n.head_dim;
        memset(context, 0, n.head_dim * sizeof(float));
        add_values<K>(scores, text_values, itself, text_len, n.head_dim, context);
        add_values<K>(scores + text_len, values, listed, count, n.head_dim, context);
        const float total = sum(sums);
        for (long d = 0; d < n.head_dim; d++) context[d] /= total;
    }
}

template <class W>
static void widen_row(const Matrix& m, long row, float* out) {
    const auto* stored = (const typename W::Stored*)m.weight + row * m.in_features;
    for (long i = 0; i < m.in_features; i++) out[i] = W::widen_one(stored[i]) * (m.scale ? m.scale[row] : 1.0f);
}

static void embed(const Model& n, int64_t token, long slot, float* out) {
    switch (n.token_table.dtype) {
        case 0: widen_row<Fp32>(n.token_table, token, out); break;
        case 1: widen_row<Bf16>(n.token_table, token, out); break;
        case 2: widen_row<Fp16>(n.token_table, token, out); break;
        case 3: widen_row<Int8>(n.token_table, token, out); break;
    }
    const long hidden = n.token_table.in_features;
    const float* position = slot < n.frame_len ? n.first_positions + slot * hidden
                                               : n.extra_positions + (slot - n.frame_len) * hidden;
    for (long i = 0; i < hidden; i++) out[i] += position[i];
}

// Whether a slot exists and the cache has room for its own key and all the keys that it sees.
static bool within(const KeyTable& table, const KVBuffer& buffer, long text_len, long slot) {
    if (slot < 0 || slot >= table.num_slots) return false;
    const long positions = buffer.num_positions - text_len, own = table.positions[slot];
    bool fits = own >= 0 && own < positions;
    for (long run = table.starts[slot]; run < table.starts[slot + 1]; run++)
        fits &= table.runs[2 * run] >= 0 && table.runs[2 * run] + table.runs[2 * run + 1] <= positions;
    return fits;
}

// A decoding step: from the input tokens of all groups' rows to logits (rows of all groups, image tokens). Returns 0,
// with nothing done, if a token is not in the table or the cache has no room for a slot's keys.
extern "C" int cogvideo_decode_step(const Model* model, const StepGroup* groups, long num_groups, float* logits,
                                    int threads) {
    const Model& n = *model;
    const Layer* layers = n.layers;
    const long num_layers = n.num_layers, hidden = n.num_heads * n.head_dim, channels = groups[0].num_temporal ? 2 : 1;
    struct Pair { long group, pair, first_row; };
    std::vector<Pair> pairs;  // one per clip and head
    struct Row { int64_t token; long slot; };
    std::vector<Row> inputs;
    for (long g = 0; g < num_groups; g++) {
        const StepGroup& group = groups[g];
        for (long p = 0; p < group.batch * n.num_heads; p++) pairs.push_back({g, p, long(inputs.size())});
        for (long r = 0; r < group.rows; r++)
            for (long s = 0; s <= group.num_temporal; s++)
                if (!within(group.tables[s], group.buffers[s ? 1 : 0], group.text_len, group.slots[r])) return 0;
        for (long r = 0; r < group.batch * group.rows; r++) {
            if (group.tokens[r] < 0 || group.tokens[r] >= n.num_tokens) return 0;
            inputs.push_back({group.tokens[r], group.slots[r % group.rows]});
        }
    }
    const long num_pairs = pairs.size(), rows = inputs.size();
    std::vector<float> memory(rows * hidden * (2 + 5 * channels + 4));
    float* x = memory.data();
    float* normed = x + rows * hidden;
    float* projected[2] = {normed + rows * hidden, normed + rows * hidden * 4};
    float* context = normed + rows * hidden * (1 + 3 * channels);
    float* attended = context + rows * hidden * channels;
    float* wide = attended + rows * hidden * channels;

#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            embed(n, inputs[r].token, inputs[r].slot, x + r * hidden);
            normalise(layers[0].input_norm, x + r * hidden, normed + r * hidden, hidden);
        }

        for (long l = 0; l < num_layers; l++) {
            const Layer& layer = layers[l];
            const Channel* const both[2] = {&layer.spatial, &layer.temporal};
            const long in_blocks = blocks_of(layer.spatial.query_key_value);
#pragma omp for schedule(static)
            for (long b = 0; b < channels * in_blocks; b++)
                product(both[b / in_blocks]->query_key_value, normed, projected[b / in_blocks], rows, b % in_blocks);

#pragma omp for schedule(dynamic, 1)
            for (long p = channels * num_pairs - 1; p >= 0; p--) {  // the temporal channel, which sees more keys, first
                const long c = p / num_pairs;
                const Pair& own = pairs[p % num_pairs];
                const StepGroup& group = groups[own.group];
                const auto attend_pair = group.cache_dtype == 2 ? attend<Fp16> : attend<Fp32>;
                attend_pair(group, group.buffers[2 * l + c], group.tables[c ? 1 + l % group.num_temporal : 0], n,
                            c ? group.temporal_bias : group.spatial_bias, projected[c] + own.first_row * 3 * hidden,
                            context + (c * rows + own.first_row) * hidden, own.pair, scratch);
            }

            const long out_blocks = blocks_of(layer.spatial.dense);
#pragma omp for schedule(static)
            for (long b = 0; b < channels * out_blocks; b++) {
                const long c = b / out_blocks;
                product(both[c]->dense, context + c * rows * hidden, attended + c * rows * hidden, rows,
                        b % out_blocks);
            }

#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++) {
                float *row = x + r * hidden, *mixed = attended + r * hidden, *temporal = mixed + rows * hidden;
                if (channels == 2)
                    for (long i = 0; i < hidden; i++) mixed[i] = temporal[i] + layer.mix[i] * (mixed[i] - temporal[i]);
                normalise(layer.third_norm, mixed, mixed, hidden);
                for (long i = 0; i < hidden; i++) row[i] += mixed[i];
                normalise(layer.post_attention_norm, row, normed + r * hidden, hidden);
            }

#pragma omp for schedule(static)
            for (long b = 0; b < blocks_of(layer.up); b++) {
                product(layer.up, normed, wide, rows, b);
                const long first = b * BLOCK, size = std::min(BLOCK, layer.up.out_features - first);
                for (long r = 0; r < rows; r++) gelu(wide + r * layer.up.out_features + first, size);
            }

#pragma omp for schedule(static)
            for (long b = 0; b < blocks_of(layer.down); b++) product(layer.down, wide, attended, rows, b);

#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++) {
                float *row = x + r * hidden, *added = attended + r * hidden;
                normalise(layer.fourth_norm, added, added, hidden);
                for (long i = 0; i < hidden; i++) row[i] += added[i];
                const Norm& next_norm = l + 1 < num_layers ? layers[l + 1].input_norm : n.final_norm;
                normalise(next_norm, row, normed + r * hidden, hidden);
            }
        }
#pragma omp for schedule(static)
        for (long b = 0; b < blocks_of(n.token_table); b++) product(n.token_table, normed, logits, rows, b);
    }
    return 1;
}

// weights[i] = exp((logits[i] - the largest) / temperature); both arrays have room for one more vector
static void weigh(float* logits, long size, float temperature, float* weights) {
    for (long i = size; i < size + LANES; i++) logits[i] = -INFINITY;
    Floats most = load<Floats>(logits);
    for (long i = LANES; i < size; i += LANES) {
        const Floats v = load<Floats>(logits + i);
        most = v > most ? v : most;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; i++) largest = std::max(largest, most[i]);
    for (long i = 0; i < size; i += LANES) {
        const Floats each = (load<Floats>(logits + i) - largest) / temperature;
        const Floats weight = exp_of(each < 0.0f ? each : Floats{});  // also for NaN
        memcpy(weights + i, &weight, sizeof weight);
    }
}

// The first index whose running sum exceeds uniform * total; weights below `least` count as zero.
template <class T>
static long pick(const T* weights, long size, T least, double uniform) {
    double total = 0, running = 0;
    for (long i = 0; i < size; i++) total += weights[i] < least ? 0 : weights[i];
    for (long i = 0; i < size; i++)
        if ((running += weights[i] < least ? 0 : weights[i]) > uniform * total) return i;
    return size - 1;  // if all weights are zero
}

// Image tokens by cluster: labels[t] is the cluster of token t; tokens[starts[c]] up to tokens[starts[c + 1]] are those
// of cluster c.
struct Clusters {
    const int64_t *labels, *tokens, *starts;
    long num_tokens, num_clusters, top_k;
    float temperature, token_temperature;
};

// For each row of logits one of the top_k clusters, then one of its tokens: what inference/sampler.py does in PyTorch,
// up to float rounding.
extern "C" void cogvideo_sample_clusters(const Clusters* clusters, const float* logits, const double* uniforms,
                                         int64_t* sampled, long rows, int threads) {
    const Clusters& c = *clusters;
#pragma omp parallel num_threads(threads) if (rows > 1)
    {
        std::vector<float> row(c.num_tokens + LANES), own(c.num_tokens + LANES), weights(c.num_tokens + LANES);
        std::vector<double> masses(c.num_clusters), sorted(c.num_clusters);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            std::copy_n(logits + r * c.num_tokens, c.num_tokens, row.data());
            weigh(row.data(), c.num_tokens, c.temperature, weights.data());
            std::fill(masses.begin(), masses.end(), 0.0);
            for (long i = 0; i < c.num_tokens; i++) masses[c.labels[i]] += weights[i];
            sorted = masses;
            std::nth_element(sorted.begin(), sorted.begin() + c.top_k - 1, sorted.end(), std::greater<double>());
            const long cluster = pick(masses.data(), c.num_clusters, sorted[c.top_k - 1], uniforms[2 * r]);

            const int64_t* tokens = c.tokens + c.starts[cluster];
            const long size = c.starts[cluster + 1] - c.starts[cluster];
            for (long i = 0; i < size; i++) own[i] = row[tokens[i]];
            weigh(own.data(), size, c.token_temperature, weights.data());
            sampled[r] = tokens[pick(weights.data(), size, 0.0f, uniforms[2 * r + 1])];
        }
    }
}

// Sizes of all structures that cpu.py declares, in its order; the rest of `sizes` is zero.
extern "C" void cogvideo_structure_sizes(long* sizes, long count) {
    const long own[] = {sizeof(Matrix),   sizeof(Norm),     sizeof(Channel),   sizeof(Layer),   sizeof(Model),
                        sizeof(KeyTable), sizeof(KVBuffer), sizeof(StepGroup), sizeof(Clusters)};
    const long num_own = sizeof(own) / sizeof(own[0]);
    for (long i = 0; i < count; i++) sizes[i] = i < num_own ? own[i] : 0;
}
