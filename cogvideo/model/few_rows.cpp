// Decoding's two inner loops on a CPU: products of a few rows with a large matrix, and attention of a few queries.
//
// Both are bound by reading memory: weights (fp32, bf16, fp16, or int8 with a scale a row) are read once for all rows
// and widened on the way; keys are read where the cache has them. Sums are in float32, each in an order of its own that
// depends neither on the number of rows nor on the number of threads: a row's result is the same in every batch.
// Compiled when first needed by few_rows.py, which says what every argument is.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
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

// ROWS rows of x with OUTS rows of the matrix: one accumulator a pair, so that its order of summing is always the same.
template <class W, int ROWS, int OUTS>
static inline void tile(const float* x, long x_stride, const typename W::Stored* weight, const float* scale,
                        const float* bias, float* y, long y_stride, long ins) {
    Floats sums[ROWS][OUTS] = {};
    long i = 0;
    for (; i + LANES <= ins; i += LANES) {
        Floats in[ROWS];
        for (int r = 0; r < ROWS; r++) in[r] = load<Floats>(x + r * x_stride + i);
        for (int o = 0; o < OUTS; o++) {
            const Floats w = W::widen(weight + o * ins + i);
            for (int r = 0; r < ROWS; r++) sums[r][o] += in[r] * w;
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
                sums[r][o] += in * w;
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTS; o++) {
            float total = sum(sums[r][o]);
            if (scale) total *= scale[o];
            y[r * y_stride + o] = bias ? total + bias[o] : total;
        }
}

template <class W, int ROWS>
static void rows_by_outs(const float* x, const typename W::Stored* weight, const float* scale, const float* bias,
                         float* y, long outs, long ins, long first, long last) {
    constexpr int OUTS = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
    long o = first;
    auto at = [&](const float* p) { return p ? p + o : nullptr; };
    for (; o + OUTS <= last; o += OUTS)
        tile<W, ROWS, OUTS>(x, ins, weight + o * ins, at(scale), at(bias), y + o, outs, ins);
    if (o < last && last >= OUTS) {  // some once more: the same values, by the same tile
        o = last - OUTS;
        tile<W, ROWS, OUTS>(x, ins, weight + o * ins, at(scale), at(bias), y + o, outs, ins);
        o = last;
    }
    for (; o < last; o++) tile<W, ROWS, 1>(x, ins, weight + o * ins, at(scale), at(bias), y + o, outs, ins);
}

template <class W>
static void linear(const float* x, const void* stored, const float* scale, const float* bias, float* y, long rows,
                   long outs, long ins, int threads) {
    const auto* weight = (const typename W::Stored*)stored;
    // few enough rows of the matrix that they stay in the nearest cache while all rows of x pass
    const long block = rows <= 4 ? 32 : 16;
    const long blocks = (outs + block - 1) / block;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < blocks; b++) {
        const long first = b * block, last = first + block < outs ? first + block : outs;
        long r = 0;
        auto run = [&](auto size) {
            rows_by_outs<W, decltype(size)::value>(x + r * ins, weight, scale, bias, y + r * outs, outs, ins, first, last);
            r += decltype(size)::value;
        };
        while (rows - r >= 4) run(std::integral_constant<int, 4>());
        if (rows - r >= 2) run(std::integral_constant<int, 2>());
        if (rows - r == 1) run(std::integral_constant<int, 1>());
    }
}

extern "C" void cogvideo_linear(int kind, const float* x, const void* weight, const float* scale, const float* bias,
                                float* y, long rows, long outs, long ins, int threads) {
    switch (kind) {
        case 0: return linear<Fp32>(x, weight, scale, bias, y, rows, outs, ins, threads);
        case 1: return linear<Bf16>(x, weight, scale, bias, y, rows, outs, ins, threads);
        case 2: return linear<Fp16>(x, weight, scale, bias, y, rows, outs, ins, threads);
        case 3: return linear<Int8>(x, weight, scale, bias, y, rows, outs, ins, threads);
    }
}

static inline Floats exp_of(Floats x) {  // of x <= 0; Cephes' polynomial, 2 ulp; 0 below -87
    const Floats log2e = Floats{} + 1.44269504f;
    const Ints n = __builtin_convertvector(x * log2e - 0.5f, Ints);  // towards 0, so this rounds
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Floats scaled = p * (Floats)((n + 127) << 23);
    return (Floats)((Ints)scaled & (x > -87.0f));
}

// scores[i] = query . keys[at(i)] for `count` keys
template <class At>
static inline void dot_keys(const float* query, const float* keys, At at, long count, long dim, float* scores) {
    for (long i = 0; i < count; i++) {
        const float* key = keys + at(i) * dim;
        Floats a{}, b{};
        long d = 0;
        for (; d + 2 * LANES <= dim; d += 2 * LANES) {
            a += load<Floats>(query + d) * load<Floats>(key + d);
            b += load<Floats>(query + d + LANES) * load<Floats>(key + d + LANES);
        }
        for (; d + LANES <= dim; d += LANES) a += load<Floats>(query + d) * load<Floats>(key + d);
        float total = sum(a + b);
        for (; d < dim; d++) total += query[d] * key[d];
        scores[i] = total;
    }
}

template <class At>
static inline void add_values(const float* weights, const float* values, At at, long count, long dim, float* out) {
    constexpr int WIDE = 4;
    long d = 0;
    for (; d + WIDE * LANES <= dim; d += WIDE * LANES) {
        Floats sums[WIDE];
        for (int k = 0; k < WIDE; k++) sums[k] = load<Floats>(out + d + k * LANES);
        for (long i = 0; i < count; i++) {
            const float* value = values + at(i) * dim + d;
            for (int k = 0; k < WIDE; k++) sums[k] += weights[i] * load<Floats>(value + k * LANES);
        }
        memcpy(out + d, sums, sizeof sums);
    }
    for (; d < dim; d++)
        for (long i = 0; i < count; i++) out[d] += weights[i] * values[at(i) * dim + d];
}

extern "C" void cogvideo_attend(const float* projected, const float* text_key, const float* text_value,
                                const float* text_bias, float* frame_key, float* frame_value, const long* slots,
                                const long* starts, const long* runs, float* out, long batch, long rows, long heads,
                                long dim, long text_len, long num_slots, long longest, int threads) {
    const long hidden = heads * dim;
    const float scale = 1.0f / std::sqrt(float(dim));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(text_len + longest + LANES), query(dim);
        std::vector<long> where(longest);
#pragma omp for schedule(static)
        for (long pair = 0; pair < batch * heads; pair++) {
            const long b = pair / heads, h = pair % heads;
            float* keys = frame_key + pair * num_slots * dim;
            float* values = frame_value + pair * num_slots * dim;
            const float *words = text_key + pair * text_len * dim, *word_values = text_value + pair * text_len * dim;
            for (long r = 0; r < rows; r++) {
                const float* row = projected + (b * rows + r) * 3 * hidden + h * dim;
                memcpy(keys + slots[r] * dim, row + hidden, dim * sizeof(float));
                memcpy(values + slots[r] * dim, row + 2 * hidden, dim * sizeof(float));
            }
            for (long r = 0; r < rows; r++) {
                const float* row = projected + (b * rows + r) * 3 * hidden + h * dim;
                for (long d = 0; d < dim; d++) query[d] = row[d] * scale;
                long count = 0;
                for (long run = starts[r]; run < starts[r + 1]; run++)
                    for (long k = 0; k < runs[2 * run + 1]; k++) where[count++] = runs[2 * run] + k;
                auto itself = [](long i) { return i; };
                auto listed = [&](long i) { return where[i]; };
                const long all = text_len + count;
                dot_keys(query.data(), words, itself, text_len, dim, scores.data());
                for (long t = 0; t < text_len; t++) scores[t] += text_bias[b * text_len + t];
                dot_keys(query.data(), keys, listed, count, dim, scores.data() + text_len);
                float largest = scores[0];
                for (long i = 1; i < all; i++) largest = scores[i] > largest ? scores[i] : largest;
                for (long i = all; i < all + LANES; i++) scores[i] = -INFINITY;
                Floats sums{};
                for (long i = 0; i < all; i += LANES) {
                    const Floats e = exp_of(load<Floats>(&scores[i]) - largest);
                    memcpy(&scores[i], &e, sizeof e);
                    sums += e;
                }
                float* answer = out + (b * rows + r) * hidden + h * dim;
                memset(answer, 0, dim * sizeof(float));
                add_values(scores.data(), word_values, itself, text_len, dim, answer);
                add_values(scores.data() + text_len, values, listed, count, dim, answer);
                const float whole = sum(sums);
                for (long d = 0; d < dim; d++) answer[d] /= whole;
            }
        }
    }
}
