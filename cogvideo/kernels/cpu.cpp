// Decoding on a CPU: products of a few rows with a large matrix, whole steps of a transformer for a few rows, and the
// drawing of their tokens.
//
// Bound by reading memory: weights (fp32, bf16, fp16, or int8 with a scale a row) are read once for all rows and widened
// on the way; keys are read where the cache has them; a step goes by in one parallel region. Sums are in float32, each
// in an order of its own that depends neither on the number of rows nor on the number of threads: a row's result is the
// same in every batch. Compiled when first needed by few_rows.py, which says what every argument is.

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

// a * b + c, rounded once where the processor can. Written out, and compiled with -ffp-contract=off: left to choose, the
// compiler fuses some of the places that must agree and not others.
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

// Blocks of 2H lanes, halved: the first H lanes of each come from a, the others from b.
template <int H, size_t... I>
static inline Floats fold(Floats a, Floats b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (I % (2 * H) < H ? 0 : LANES) + I / (2 * H) * 2 * H + I % H...) +
           __builtin_shufflevector(a, b, (I % (2 * H) < H ? 0 : LANES) + I / (2 * H) * 2 * H + I % H + H...);
}

// Lane i of the result is sum(v[i]), added up in the same order, many at once.
template <int H = LANES / 2>
static inline Floats sum_each(Floats* v) {
    for (int i = 0; i < H; i++) v[i] = fold<H>(v[i], v[i + H], std::make_index_sequence<LANES>());
    if constexpr (H > 1) return sum_each<H / 2>(v);
    return v[0];
}

// ROWS rows of x with OUTS rows of the matrix: one accumulator a pair, so that its order of summing is always the same.
template <class W, int ROWS, int OUTS>
static inline void tile(const float* x, long x_stride, const typename W::Stored* weight, const float* scale,
                        const float* bias, float* y, long y_stride, long ins) {
    Floats sums[ROWS * OUTS] = {};
    long i = 0;
    for (; i + LANES <= ins; i += LANES) {
        Floats in[ROWS];
        for (int r = 0; r < ROWS; r++) in[r] = load<Floats>(x + r * x_stride + i);
        for (int o = 0; o < OUTS; o++) {
            // the next tile's, as the processor does not foresee it
            if (i % (64 / sizeof(typename W::Stored)) == 0) __builtin_prefetch(weight + (o + OUTS) * ins + i);
            const Floats w = W::widen(weight + o * ins + i);
            for (int r = 0; r < ROWS; r++) sums[r * OUTS + o] = fused(in[r], w, sums[r * OUTS + o]);
        }
    }
    if (i < ins) {  // the rest as one more vector, filled up with zeros
        for (int r = 0; r < ROWS; r++)
            for (int o = 0; o < OUTS; o++) {
                Floats in{}, w{};
                for (long j = i; j < ins; j++) {
                    in[j - i] = x[r * x_stride + j];
                    w[j - i] = W::widen_one(weight[o * ins + j]);
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
static void rows_by_outs(const float* x, const typename W::Stored* weight, const float* scale, const float* bias,
                         float* y, long outs, long ins, long first, long last) {
    constexpr int OUTS = LANES / ROWS;
    long o = first;
    auto at = [&](const float* p) { return p ? p + o : nullptr; };
    for (; o + OUTS <= last; o += OUTS)
        tile<W, ROWS, OUTS>(x, ins, weight + o * ins, at(scale), at(bias), y + o, outs, ins);
    if (o < last && last - first >= OUTS) {  // some of this block's once more: the same values, by the same tile
        o = last - OUTS;
        tile<W, ROWS, OUTS>(x, ins, weight + o * ins, at(scale), at(bias), y + o, outs, ins);
        o = last;
    }
    for (; o < last; o++) tile<W, ROWS, 1>(x, ins, weight + o * ins, at(scale), at(bias), y + o, outs, ins);
}

// Rows of `weight` are outputs; scale (null: none) and bias (null: none) are applied in this order.
struct Matrix {
    const void* weight;
    const float *scale, *bias;
    long outs, ins;
    int kind;
};

template <class W>
static void outs_of(const Matrix& m, const float* x, float* y, long rows, long first, long last) {
    long r = 0;
    auto run = [&](auto size) {
        rows_by_outs<W, decltype(size)::value>(x + r * m.ins, (const typename W::Stored*)m.weight, m.scale, m.bias,
                                               y + r * m.outs, m.outs, m.ins, first, last);
        r += decltype(size)::value;
    };
    while (rows - r >= 4) run(std::integral_constant<int, 4>());
    if (rows - r >= 2) run(std::integral_constant<int, 2>());
    if (rows - r == 1) run(std::integral_constant<int, 1>());
}

// A product is shared out by blocks of outputs, few enough that they stay in the nearest cache while all rows of x pass.
constexpr long BLOCK = 16;
static inline long blocks_of(const Matrix& m) { return (m.outs + BLOCK - 1) / BLOCK; }

// Outputs of one block: y (rows, outs) from x (rows, ins).
static void product(const Matrix& m, const float* x, float* y, long rows, long block) {
    const long first = block * BLOCK, last = std::min(first + BLOCK, m.outs);
    switch (m.kind) {
        case 0: return outs_of<Fp32>(m, x, y, rows, first, last);
        case 1: return outs_of<Bf16>(m, x, y, rows, first, last);
        case 2: return outs_of<Fp16>(m, x, y, rows, first, last);
        case 3: return outs_of<Int8>(m, x, y, rows, first, last);
    }
}

extern "C" void cogvideo_linear(const Matrix* matrix, const float* x, float* y, long rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < blocks_of(*matrix); b++) product(*matrix, x, y, rows, b);
}

static inline Floats exp_of(Floats x) {  // of x <= 0; Cephes' polynomial, 2 ulp; 0 below -87
    const Floats log2e = Floats{} + 1.44269504f;
    const Ints n = __builtin_convertvector(x * log2e - 0.5f, Ints);  // towards 0, so this rounds
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
static inline Floats products(const float* query, const typename K::Stored* key, long dim) {
    Floats total{};
    long d = 0;
    for (; d + LANES <= dim; d += LANES) total = fused(load<Floats>(query + d), K::widen(key + d), total);
    for (; d < dim; d++) total[0] += query[d] * K::widen_one(key[d]);
    return total;
}

// scores[i] = query . keys[at(i)] for `count` keys
template <class K, class At>
static inline void dot_keys(const float* query, const typename K::Stored* keys, At at, long count, long dim,
                            float* scores) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats each[LANES];
        for (int k = 0; k < LANES; k++) each[k] = products<K>(query, keys + at(i + k) * dim, dim);
        each[0] = sum_each(each);
        memcpy(scores + i, each, sizeof(Floats));
    }
    for (; i < count; i++) scores[i] = sum(products<K>(query, keys + at(i) * dim, dim));
}

template <class K, class At>
static inline void add_values(const float* weights, const typename K::Stored* values, At at, long count, long dim,
                              float* out) {
    constexpr int WIDE = 8;
    long d = 0;
    for (; d + WIDE * LANES <= dim; d += WIDE * LANES) {
        Floats sums[WIDE];
        for (int k = 0; k < WIDE; k++) sums[k] = load<Floats>(out + d + k * LANES);
        for (long i = 0; i < count; i++) {
            const auto* value = values + at(i) * dim + d;
            for (int k = 0; k < WIDE; k++) sums[k] = fused(Floats{} + weights[i], K::widen(value + k * LANES), sums[k]);
        }
        memcpy(out + d, sums, sizeof sums);
    }
    for (; d + LANES <= dim; d += LANES) {
        Floats total = load<Floats>(out + d);
        for (long i = 0; i < count; i++) total = fused(Floats{} + weights[i], K::widen(values + at(i) * dim + d), total);
        memcpy(out + d, &total, sizeof total);
    }
    for (; d < dim; d++)
        for (long i = 0; i < count; i++) out[d] += weights[i] * K::widen_one(values[at(i) * dim + d]);
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

// The frame keys that slot s sees: runs[starts[s]] up to runs[starts[s + 1]], each (first place, count).
struct Sight {
    const long *starts, *runs, *places;  // places[s]: where the slot's own key goes
    long longest, num_slots;             // keys of the slot that has most
};

struct Channel {
    Matrix query_key_value, dense;
};

struct Layer {
    Norm input, third, post_attention, fourth;
    Channel spatial, temporal;
    const float* mix;  // (hidden,) share of the spatial channel
    Matrix up, down;
};

struct Model {
    const Layer* layers;
    long num_layers, heads, dim;
    Matrix words;  // the table of tokens; its first `outs` rows, those of image tokens, score too
    long num_words;
    const float *first, *later;  // positions of the slots of frame 0, and of those behind
    long frame_len;
    Norm final;
};

// What the cache of some clips holds of one channel of one layer.
struct Kept {
    void *key, *value;  // (batch, heads, places, dim): text, then frames
    long num_places;
};

// Clips that share a cache and what they see: `rows` slots of each, behind those of the groups before.
struct Group {
    const Kept* kept;     // by layer: the spatial channel's, the temporal one's
    const Sight* sights;  // the spatial channel's, then `num_temporal` of the temporal channel's, which layers take in turn
    const int64_t *inputs, *slots;              // (batch, rows) tokens, (rows,)
    const float *spatial_bias, *temporal_bias;  // (batch, text_len)
    long batch, rows, text_len, num_temporal;   // 0: the temporal channel is off, as in all groups or in none
    int cache_kind;                             // as of matrices; 0 or 2
};

// What attention of one query needs room for.
struct Scratch {
    std::vector<float> scores, query;
    std::vector<long> where;
};

// One head of one clip: store the rows' keys and values at their places, then answer every row.
template <class K>
static void attend(const Group& group, const Kept& kept, const Sight& sight, const Model& n, const float* bias,
                   const float* projected, float* out, long pair, Scratch& scratch) {
    const long hidden = n.heads * n.dim, b = pair / n.heads, h = pair % n.heads, text_len = group.text_len;
    auto* word_keys = (typename K::Stored*)kept.key + pair * kept.num_places * n.dim;
    auto* word_values = (typename K::Stored*)kept.value + pair * kept.num_places * n.dim;
    auto *keys = word_keys + text_len * n.dim, *values = word_values + text_len * n.dim;
    scratch.scores.resize(text_len + sight.longest + LANES);
    scratch.where.resize(sight.longest);
    scratch.query.resize(n.dim);
    float *scores = scratch.scores.data(), *query = scratch.query.data();
    long* where = scratch.where.data();

    for (long r = 0; r < group.rows; r++) {
        const float* row = projected + (b * group.rows + r) * 3 * hidden + h * n.dim;
        const long place = sight.places[group.slots[r]];
        std::copy_n(row + hidden, n.dim, keys + place * n.dim);
        std::copy_n(row + 2 * hidden, n.dim, values + place * n.dim);
    }
    const float scale = 1.0f / std::sqrt(float(n.dim));
    for (long r = 0; r < group.rows; r++) {
        const float* row = projected + (b * group.rows + r) * 3 * hidden + h * n.dim;
        for (long d = 0; d < n.dim; d++) query[d] = row[d] * scale;
        long count = 0;
        const long slot = group.slots[r];
        for (long run = sight.starts[slot]; run < sight.starts[slot + 1]; run++)
            for (long k = 0; k < sight.runs[2 * run + 1]; k++) where[count++] = sight.runs[2 * run] + k;
        auto itself = [](long i) { return i; };
        auto listed = [&](long i) { return where[i]; };
        const long all = text_len + count;
        dot_keys<K>(query, word_keys, itself, text_len, n.dim, scores);
        for (long t = 0; t < text_len; t++) scores[t] += bias[b * text_len + t];
        dot_keys<K>(query, keys, listed, count, n.dim, scores + text_len);
        float largest = scores[0];
        for (long i = 1; i < all; i++) largest = scores[i] > largest ? scores[i] : largest;
        for (long i = all; i < all + LANES; i++) scores[i] = -INFINITY;
        Floats sums{};
        for (long i = 0; i < all; i += LANES) {
            const Floats e = exp_of(load<Floats>(scores + i) - largest);
            memcpy(scores + i, &e, sizeof e);
            sums += e;
        }
        float* answer = out + (b * group.rows + r) * hidden + h * n.dim;
        memset(answer, 0, n.dim * sizeof(float));
        add_values<K>(scores, word_values, itself, text_len, n.dim, answer);
        add_values<K>(scores + text_len, values, listed, count, n.dim, answer);
        const float whole = sum(sums);
        for (long d = 0; d < n.dim; d++) answer[d] /= whole;
    }
}

template <class W>
static void widen_row(const Matrix& m, long row, float* out) {
    const auto* stored = (const typename W::Stored*)m.weight + row * m.ins;
    for (long i = 0; i < m.ins; i++) out[i] = W::widen_one(stored[i]) * (m.scale ? m.scale[row] : 1.0f);
}

static void embed(const Model& n, int64_t token, long slot, float* out) {
    switch (n.words.kind) {
        case 0: widen_row<Fp32>(n.words, token, out); break;
        case 1: widen_row<Bf16>(n.words, token, out); break;
        case 2: widen_row<Fp16>(n.words, token, out); break;
        case 3: widen_row<Int8>(n.words, token, out); break;
    }
    const long hidden = n.words.ins;
    const float* position = slot < n.frame_len ? n.first + slot * hidden : n.later + (slot - n.frame_len) * hidden;
    for (long i = 0; i < hidden; i++) out[i] += position[i];
}

// Whether a slot is one, and finds its own place and all that it sees in a cache.
static bool within(const Sight& sight, const Kept& kept, long text_len, long slot) {
    if (slot < 0 || slot >= sight.num_slots) return false;
    const long places = kept.num_places - text_len, own = sight.places[slot];
    bool fits = own >= 0 && own < places;
    for (long run = sight.starts[slot]; run < sight.starts[slot + 1]; run++)
        fits &= sight.runs[2 * run] >= 0 && sight.runs[2 * run] + sight.runs[2 * run + 1] <= places;
    return fits;
}

// A step: from the inputs of a few slots of clips in groups to scores (rows of all groups, image tokens). Returns 0,
// and does nothing, if a token is not in the table or a slot's keys are not all in the cache.
extern "C" int cogvideo_step(const Model* model, const Group* groups, long num_groups, float* scores, int threads) {
    const Model& n = *model;
    const Layer* layers = n.layers;
    const long num_layers = n.num_layers, hidden = n.heads * n.dim, channels = groups[0].num_temporal ? 2 : 1;
    struct Pair { long group, pair, first_row; };
    std::vector<Pair> pairs;  // of a clip and a head
    struct Row { int64_t token; long slot; };
    std::vector<Row> fed;
    for (long g = 0; g < num_groups; g++) {
        const Group& group = groups[g];
        for (long p = 0; p < group.batch * n.heads; p++) pairs.push_back({g, p, long(fed.size())});
        for (long r = 0; r < group.rows; r++)
            for (long s = 0; s <= group.num_temporal; s++)
                if (!within(group.sights[s], group.kept[s ? 1 : 0], group.text_len, group.slots[r])) return 0;
        for (long r = 0; r < group.batch * group.rows; r++) {
            if (group.inputs[r] < 0 || group.inputs[r] >= n.num_words) return 0;
            fed.push_back({group.inputs[r], group.slots[r % group.rows]});
        }
    }
    const long num_pairs = pairs.size(), rows = fed.size();
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
            embed(n, fed[r].token, fed[r].slot, x + r * hidden);
            normalise(layers[0].input, x + r * hidden, normed + r * hidden, hidden);
        }

        for (long l = 0; l < num_layers; l++) {
            const Layer& layer = layers[l];
            const Channel* const both[2] = {&layer.spatial, &layer.temporal};
            const long in_blocks = blocks_of(layer.spatial.query_key_value);
#pragma omp for schedule(static)
            for (long b = 0; b < channels * in_blocks; b++)
                product(both[b / in_blocks]->query_key_value, normed, projected[b / in_blocks], rows, b % in_blocks);

#pragma omp for schedule(dynamic, 1)
            for (long p = channels * num_pairs - 1; p >= 0; p--) {  // the temporal channel, which sees more, first
                const long c = p / num_pairs;
                const Pair& own = pairs[p % num_pairs];
                const Group& group = groups[own.group];
                const auto answer = group.cache_kind == 2 ? attend<Fp16> : attend<Fp32>;
                answer(group, group.kept[2 * l + c], group.sights[c ? 1 + l % group.num_temporal : 0], n,
                       c ? group.temporal_bias : group.spatial_bias, projected[c] + own.first_row * 3 * hidden,
                       context + (c * rows + own.first_row) * hidden, own.pair, scratch);
            }

            const long out_blocks = blocks_of(layer.spatial.dense);
#pragma omp for schedule(static)
            for (long b = 0; b < channels * out_blocks; b++) {
                const long c = b / out_blocks;
                product(both[c]->dense, context + c * rows * hidden, attended + c * rows * hidden, rows, b % out_blocks);
            }

#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++) {
                float *row = x + r * hidden, *mixed = attended + r * hidden, *also = mixed + rows * hidden;
                if (channels == 2)
                    for (long i = 0; i < hidden; i++) mixed[i] = also[i] + layer.mix[i] * (mixed[i] - also[i]);
                normalise(layer.third, mixed, mixed, hidden);
                for (long i = 0; i < hidden; i++) row[i] += mixed[i];
                normalise(layer.post_attention, row, normed + r * hidden, hidden);
            }

#pragma omp for schedule(static)
            for (long b = 0; b < blocks_of(layer.up); b++) {
                product(layer.up, normed, wide, rows, b);
                const long first = b * BLOCK, size = std::min(BLOCK, layer.up.outs - first);
                for (long r = 0; r < rows; r++) gelu(wide + r * layer.up.outs + first, size);
            }

#pragma omp for schedule(static)
            for (long b = 0; b < blocks_of(layer.down); b++) product(layer.down, wide, attended, rows, b);

#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++) {
                float *row = x + r * hidden, *added = attended + r * hidden;
                normalise(layer.fourth, added, added, hidden);
                for (long i = 0; i < hidden; i++) row[i] += added[i];
                normalise(l + 1 < num_layers ? layers[l + 1].input : n.final, row, normed + r * hidden, hidden);
            }
        }
#pragma omp for schedule(static)
        for (long b = 0; b < blocks_of(n.words); b++) product(n.words, normed, scores, rows, b);
    }
    return 1;
}

// weights[i] = exp((logits[i] - the largest) / temperature); both have room for a vector more
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
        const Floats weight = exp_of(each < 0.0f ? each : Floats{});  // never of what is no number
        memcpy(weights + i, &weight, sizeof weight);
    }
}

// The first index whose running sum exceeds uniform * total; weights below `least` count as nothing.
template <class T>
static long pick(const T* weights, long size, T least, double uniform) {
    double total = 0, running = 0;
    for (long i = 0; i < size; i++) total += weights[i] < least ? 0 : weights[i];
    for (long i = 0; i < size; i++)
        if ((running += weights[i] < least ? 0 : weights[i]) > uniform * total) return i;
    return size - 1;  // without any weight
}

// Codes in clusters: of each code its own, and the codes of cluster c at codes[starts[c]] up to codes[starts[c + 1]].
struct Clusters {
    const int64_t *labels, *codes, *starts;
    long num_codes, num_clusters, top_k;
    float temperature, token_temperature;
};

// For each row of logits a cluster among the top_k, then a code of it: what draw.py does in PyTorch, to float rounding.
extern "C" void cogvideo_draw(const Clusters* clusters, const float* logits, const double* uniforms, int64_t* drawn,
                              long rows, int threads) {
    const Clusters& c = *clusters;
#pragma omp parallel num_threads(threads) if (rows > 1)
    {
        std::vector<float> row(c.num_codes + LANES), own(c.num_codes + LANES), weights(c.num_codes + LANES);
        std::vector<double> masses(c.num_clusters), sorted(c.num_clusters);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            std::copy_n(logits + r * c.num_codes, c.num_codes, row.data());
            weigh(row.data(), c.num_codes, c.temperature, weights.data());
            std::fill(masses.begin(), masses.end(), 0.0);
            for (long i = 0; i < c.num_codes; i++) masses[c.labels[i]] += weights[i];
            sorted = masses;
            std::nth_element(sorted.begin(), sorted.begin() + c.top_k - 1, sorted.end(), std::greater<double>());
            const long cluster = pick(masses.data(), c.num_clusters, sorted[c.top_k - 1], uniforms[2 * r]);

            const int64_t* codes = c.codes + c.starts[cluster];
            const long size = c.starts[cluster + 1] - c.starts[cluster];
            for (long i = 0; i < size; i++) own[i] = row[codes[i]];
            weigh(own.data(), size, c.token_temperature, weights.data());
            drawn[r] = codes[pick(weights.data(), size, 0.0f, uniforms[2 * r + 1])];
        }
    }
}
