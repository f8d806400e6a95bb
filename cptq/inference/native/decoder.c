/* A causal decoder: Llama's family (rotated queries and keys, gated MLP, RMS norm) and OPT's
 * (learned positions, plain MLP, layer norm), token after token or a prompt at once.
 *
 *     h = E[id] (+ P[position])
 *     for every block:  h += W_o attention(norm(h));  h += W_d (f(W_g norm(h)) * W_u norm(h))
 *     logits = W_head norm(h)
 *
 * Method: one parallel region per call. Its threads share the tokens of a stage (norms, rounding of
 * activations), the rows of a product or the heads of an attention, and meet at a barrier between
 * stages, 9 in a block. Products are those of packed.h; all else is float32, in the order of
 * operations of transformers' modules, so that logits agree to float32 rounding with exact products.
 * Softmax subtracts the largest score first. exp() is a polynomial (Cephes expf, below 2 units in
 * the last place), because the library's does not vectorise.
 *
 * Cost: the weights are read once per call; attention reads the cache. Memory: the workspace,
 * some dozens of vectors per token of the call. Limits: one sequence, no sliding window.
 */
#include "decoder.h"
#include "internal.h"

#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* A function compiled twice, for the machine's vectors and for any; chosen when the library loads. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12 /* with fused multiply-add; older ones do not know the name */
#define VECTORISED __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define VECTORISED __attribute__((target_clones("avx2", "default")))
#endif
#else
#define VECTORISED
#endif

/* part of such a function: must not be compiled apart from it */
#if defined(__GNUC__)
#define PART static inline __attribute__((always_inline))
#else
#define PART static inline
#endif

#define ALIGNED 64

typedef struct {
    float *hidden;    /* (tokens, width) */
    float *normed;    /* (tokens, widest input) */
    float *query, *key, *value;
    float *attended;  /* (tokens, heads * head) */
    float *gate, *up; /* (tokens, inner) */
    float *added;     /* (tokens, width): what a block adds */
    float *kept;      /* (tokens, widest input with a rule) */
    float *scores;    /* (threads, capacity) */
    char *input;      /* prepared tokens */
    char *scratch;    /* (threads, scratch_bytes) */
    size_t scratch_bytes, bytes;
} workspace;

static size_t pad(size_t bytes) { return (bytes + ALIGNED - 1) & ~(size_t)(ALIGNED - 1); }

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

/* ---- memory ------------------------------------------------------------------------------- */

static void widen(const cptq_projection *p, int64_t tokens, int exact, size_t *input,
                  size_t *scratch)
{
    if (p->dense) {
        *scratch = most(*scratch, (size_t)p->weight.in * sizeof(float));
    } else if (p->weight.out) {
        *input = most(*input, cptq_input_bytes(&p->weight, exact));
        *scratch = most(*scratch, cptq_scratch_bytes(&p->weight, tokens, exact));
    }
}

static float *take_floats(char *base, size_t *used, size_t count)
{
    float *here = (float *)(base + *used);
    *used += pad(count * sizeof(float));
    return here;
}

/* Lay the parts out from `base`; with NULL only the sizes mean anything. */
static workspace lay_out(const cptq_decoder *d, int64_t tokens, int threads, char *base)
{
    workspace s = {0};
    size_t input = 0, ruled = 0, n = (size_t)tokens;
    for (int64_t b = 0; b < d->blocks; b++) {
        const cptq_block *k = d->block + b;
        const cptq_projection *all[] = {&k->query, &k->key,  &k->value, &k->output,
                                        &k->gate,  &k->up,   &k->down};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            widen(all[i], tokens, d->exact, &input, &s.scratch_bytes);
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            if (all[i]->rule)
                ruled = most(ruled, (size_t)all[i]->weight.in);
    }
    widen(&d->to_logits, tokens, d->exact, &input, &s.scratch_bytes);
    widen(&d->embedding, 1, 1, &input, &s.scratch_bytes);
    s.scratch_bytes = pad(s.scratch_bytes);
    size_t heads = (size_t)(d->heads * d->head), key_heads = (size_t)(d->key_heads * d->head);
    s.hidden = take_floats(base, &s.bytes, n * (size_t)d->width);
    s.normed = take_floats(base, &s.bytes, n * (size_t)d->width);
    s.query = take_floats(base, &s.bytes, n * heads);
    s.key = take_floats(base, &s.bytes, n * key_heads);
    s.value = take_floats(base, &s.bytes, n * key_heads);
    s.attended = take_floats(base, &s.bytes, n * heads);
    s.gate = take_floats(base, &s.bytes, n * (size_t)d->inner);
    s.up = take_floats(base, &s.bytes, n * (size_t)d->inner);
    s.added = take_floats(base, &s.bytes, n * (size_t)d->width);
    s.kept = take_floats(base, &s.bytes, n * ruled);
    s.scores = take_floats(base, &s.bytes, (size_t)threads * (size_t)d->capacity); /* whole tiles */
    s.input = base + s.bytes;
    s.bytes += pad(n * input);
    s.scratch = base + s.bytes;
    s.bytes += (size_t)threads * s.scratch_bytes;
    return s;
}

size_t cptq_decoder_bytes(const cptq_decoder *d, int64_t tokens, int threads)
{
    return lay_out(d, tokens, threads, NULL).bytes + ALIGNED;
}

/* ---- small parts -------------------------------------------------------------------------- */

PART float fast_exp(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x; /* NaN stays NaN: both tests are false */
    float whole = floorf(x * 1.44269504f + 0.5f);
    x = x - whole * 0.693359375f - whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    float y = p * x * x + x + 1.0f;
    int32_t power = (int32_t)whole, bits;
    memcpy(&bits, &y, 4);
    bits += (int32_t)((uint32_t)power << 23);
    memcpy(&y, &bits, 4);
    return y;
}

/* sums side by side: enough to hide the latency of an addition */
#define LANES 32
/* keys that stand together in the cache, feature by feature: (tiles, head, TILE) */
#define TILE CPTQ_KEY_TILE

/* sum of a b for `count` vectors b, `stride` apart */
PART void dot_many(const float *restrict a, const float *restrict b, int64_t stride, int count,
                   int64_t n, float *sums)
{
    float lanes[2][LANES] = {{0.0f}};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int c = 0; c < count; c++)
            for (int k = 0; k < LANES; k++)
                lanes[c][k] += a[i + k] * b[c * stride + i + k];
    for (int c = 0; c < count; c++) {
        float sum = 0.0f;
        for (int k = 0; k < LANES; k++)
            sum += lanes[c][k];
        for (int64_t j = i; j < n; j++)
            sum += a[j] * b[c * stride + j];
        sums[c] = sum;
    }
}

PART float dot(const float *a, const float *b, int64_t n)
{
    float sum;
    dot_many(a, b, 0, 1, n, &sum);
    return sum;
}

PART float add_up(const float *a, int64_t n)
{
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += a[i];
    return sum;
}

/* Shift the bits of an 8- or 16-bit float to where float32 has them, and scale its exponent. */
#define DEFINE_WIDEN(NAME, STORED, SIGN, SHIFT, FACTOR)                                           \
    VECTORISED static void NAME(const STORED *restrict x, float *restrict y, int64_t n)           \
    {                                                                                             \
        for (int64_t i = 0; i < n; i++) {                                                         \
            uint32_t bits = (uint32_t)(x[i] & (SIGN - 1)) << SHIFT;                               \
            uint32_t sign = (uint32_t)(x[i] & SIGN) << (31 - (sizeof(STORED) * 8 - 1));           \
            float value;                                                                          \
            memcpy(&value, &bits, 4);                                                             \
            value *= FACTOR;                                                                      \
            memcpy(&bits, &value, 4);                                                             \
            bits |= sign;                                                                         \
            memcpy(y + i, &bits, 4);                                                              \
        }                                                                                         \
    }
DEFINE_WIDEN(widen_f16, uint16_t, 0x8000u, 13, 0x1p112f)
DEFINE_WIDEN(widen_bf16, uint16_t, 0x8000u, 16, 1.0f)
DEFINE_WIDEN(widen_e4m3, uint8_t, 0x80u, 20, 0x1p120f)
DEFINE_WIDEN(widen_e5m2, uint8_t, 0x80u, 21, 0x1p112f)

static void widen_float8(const uint8_t *x, float *y, int64_t n, int e4m3)
{
    static int fast = -1; /* threads may find it out at once, all alike */
    if (fast < 0)
        fast = strcmp(cptq_cpu_features(), "avx2") == 0;
    int64_t done = fast ? cptq_widen_float8_avx2(x, y, n, e4m3) : 0;
    (e4m3 ? widen_e4m3 : widen_e5m2)(x + done, y + done, n - done);
}

/* Row i of a dense weight as float32: `out`, or the weight's own memory. */
static const float *read_row(const cptq_projection *p, int64_t i, float *out)
{
    int64_t n = p->weight.in;
    const uint16_t *halves = (const uint16_t *)p->dense + (p->dense_type < 8 ? i * n : 0);
    const uint8_t *bytes = (const uint8_t *)p->dense + i * n;
    switch (p->dense_type) {
    case CPTQ_F32: return (const float *)p->dense + i * n;
    case CPTQ_F16: widen_f16(halves, out, n); break;
    case CPTQ_BF16: widen_bf16(halves, out, n); break;
    default: widen_float8(bytes, out, n, p->dense_type == CPTQ_E4M3);
    }
    return out;
}

VECTORISED static void multiply_row(const float *row, const float *x, int64_t n, int64_t tokens,
                                    float bias, float *y, int64_t stride)
{
    float sums[2];
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2) {
        dot_many(row, x + t * n, n, 2, n, sums);
        y[t * stride] = sums[0] + bias;
        y[(t + 1) * stride] = sums[1] + bias;
    }
    if (t < tokens)
        y[t * stride] = dot(row, x + t * n, n) + bias;
}

VECTORISED static void add_into(float *restrict y, const float *restrict x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] += x[i];
}

/* y may be x */
VECTORISED static void rms_norm(float *y, const float *x, const float *weight, float epsilon,
                                int64_t n)
{
    float mean = dot(x, x, n) / (float)n, a = 1.0f / sqrtf(mean + epsilon);
    for (int64_t i = 0; i < n; i++)
        y[i] = weight[i] * (x[i] * a);
}

VECTORISED static void layer_norm(float *restrict y, const float *restrict x,
                                  const float *restrict weight, const float *restrict bias,
                                  float epsilon, int64_t n)
{
    float mean = add_up(x, n) / (float)n, square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    float a = 1.0f / sqrtf(square / (float)n + epsilon);
    for (int64_t i = 0; i < n; i++)
        y[i] = (x[i] - mean) * a * weight[i] + (bias ? bias[i] : 0.0f);
}

static void normalise(const cptq_decoder *d, float *y, const float *x, const float *weight,
                      const float *bias)
{
    if (d->norm == CPTQ_RMS_NORM)
        rms_norm(y, x, weight, d->epsilon, d->width);
    else
        layer_norm(y, x, weight, bias, d->epsilon, d->width);
}

VECTORISED static void silu(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] / (1.0f + fast_exp(-x[i]));
}

VECTORISED static void gelu_tanh(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        float u = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
        x[i] = x[i] / (1.0f + fast_exp(-2.0f * u)); /* (1 + tanh u) / 2 = 1 / (1 + exp(-2u)) */
    }
}

static void gelu(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
}

VECTORISED static void relu(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] < 0.0f ? 0.0f : x[i]; /* NaN stays NaN */
}

static void activate(int32_t which, float *x, int64_t n)
{
    switch (which) {
    case CPTQ_SILU: silu(x, n); break;
    case CPTQ_GELU_TANH: gelu_tanh(x, n); break;
    case CPTQ_GELU: gelu(x, n); break;
    default: relu(x, n);
    }
}

VECTORISED static void multiply_into(float *restrict y, const float *restrict x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        y[i] *= x[i];
}

/* x (head,): pairs (i, i + head / 2) are turned */
VECTORISED static void rotate(float *x, const float *restrict cosine, const float *restrict sine,
                              int64_t head)
{
    float *restrict low = x, *restrict high = x + head / 2;
    for (int64_t i = 0; i < head / 2; i++) {
        float a = low[i], b = high[i];
        low[i] = a * cosine[i] - b * sine[i];
        high[i] = b * cosine[i] + a * sine[i];
    }
}

/* in place; returns the sum by which to divide */
VECTORISED static float exponentiate(float *x, int64_t n)
{
    float largest = x[0], sum = 0.0f;
    for (int64_t i = 1; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) {
        x[i] = fast_exp(x[i] - largest);
        sum += x[i];
    }
    return sum;
}

/* ---- stages; each is run by all threads of the region, thread `me` of `all` ------------------ */

typedef struct {
    const cptq_decoder *d;
    const workspace *s;
    int64_t tokens, start;
    int me, all;
} team;

static void share(int64_t count, int64_t grain, const team *t, int64_t *first, int64_t *last)
{
    int64_t parts = (count + grain - 1) / grain;
    *first = parts * t->me / t->all * grain;
    *last = parts * (t->me + 1) / t->all * grain;
    *last = *last < count ? *last : count;
}

static void meet(void)
{
#ifdef _OPENMP
#pragma omp barrier
#endif
}

/* Whether inputs of a projection are dropped. */
static int drops(const team *t, const cptq_projection *p)
{
    return t->d->rules && (p->rule == CPTQ_KEEP_LARGE || p->rule == CPTQ_KEEP_SPREAD);
}

/* y = x with 0 where |x| is at most the threshold: one, or one for each. NaN stays. */
VECTORISED static void keep_large(const float *restrict x, const float *restrict limit,
                                  int64_t limits, int64_t n, float *restrict y)
{
    if (limits == 1) {
        float only = *limit;
        for (int64_t i = 0; i < n; i++)
            y[i] = fabsf(x[i]) <= only ? 0.0f : x[i];
        return;
    }
    for (int64_t i = 0; i < n; i++)
        y[i] = fabsf(x[i]) <= limit[i] ? 0.0f : x[i];
}

/* mean of |x| and `deviations` times its deviation above that */
VECTORISED static float find_spread(const float *restrict x, float deviations, int64_t n)
{
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += fabsf(x[i]);
    float mean = sum / (float)n;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < n; i++)
        square += (fabsf(x[i]) - mean) * (fabsf(x[i]) - mean);
    return mean + deviations * sqrtf(square / (float)n);
}

/* Leave in `kept` what tokens [first, last) of x keep. */
static void drop(const team *t, const float *x, const cptq_projection *p, int64_t first,
                 int64_t last)
{
    int64_t n = p->weight.in;
    for (int64_t i = first; i < last; i++) {
        const float *limit = p->threshold;
        float spread;
        if (p->rule == CPTQ_KEEP_SPREAD) {
            spread = find_spread(x + i * n, *limit, n);
            limit = &spread;
        }
        keep_large(x + i * n, limit, p->thresholds, n, t->s->kept + i * n);
    }
}

static void prepare_some(const team *t, const float *x, const cptq_projection *p, int64_t first,
                         int64_t last)
{
    if (drops(t, p)) {
        drop(t, x, p, first, last);
        x = t->s->kept;
    }
    if (first < last && !p->dense)
        cptq_prepare(&p->weight, x, first, last, t->d->exact, t->s->input);
}

/* h += added (unless NULL), normed = norm(h), prepared for `p` */
static void enter(const team *t, const float *weight, const float *bias, const float *added,
                  const cptq_projection *p)
{
    const cptq_decoder *d = t->d;
    int64_t first, last;
    share(t->tokens, 1, t, &first, &last);
    for (int64_t i = first; i < last; i++) {
        float *hidden = t->s->hidden + i * d->width;
        if (added)
            add_into(hidden, added + i * d->width, d->width);
        normalise(d, t->s->normed + i * d->width, hidden, weight, bias);
    }
    prepare_some(t, t->s->normed, p, first, last);
    meet();
}

static void prepare(const team *t, const float *x, const cptq_projection *p)
{
    int64_t first, last;
    share(t->tokens, 1, t, &first, &last);
    prepare_some(t, x, p, first, last);
    meet();
}

/* y = x W^T + bias from token `skipped` on. x must be prepared; the caller meets afterwards. */
static void project(const team *t, const cptq_projection *p, const float *x, int64_t skipped,
                    float *y)
{
    int64_t first, last, out = p->weight.out, tokens = t->tokens - skipped;
    char *scratch = t->s->scratch + (size_t)t->me * t->s->scratch_bytes;
    share(out, 16, t, &first, &last);
    if (p->dense) {
        for (int64_t i = first; i < last; i++)
            multiply_row(read_row(p, i, (float *)scratch), x + skipped * p->weight.in, p->weight.in,
                         tokens, p->bias ? p->bias[i] : 0.0f, y + i, out);
    } else if (first < last) {
        const char *input = t->s->input + (size_t)skipped * cptq_input_bytes(&p->weight, t->d->exact);
        cptq_compute(&p->weight, input, tokens, p->bias, y, out, first, last, t->d->exact, scratch);
    }
}

/* Project what is prepared for `a`; prepare it again where `b` needs another form. */
static void project_again(const team *t, const cptq_projection *a, const cptq_projection *b,
                          const float *x, float *y)
{
    if (!b->dense && (a->dense || drops(t, a) || drops(t, b) ||
                      !cptq_same_input(&a->weight, &b->weight, t->d->exact))) {
        meet(); /* others may still read the input */
        prepare(t, x, b);
    }
    project(t, b, x, 0, y);
}

static float *find_cache(const cptq_decoder *d, float *cache, int64_t block, int64_t head)
{
    return cache + ((block * d->key_heads + head) * d->capacity) * d->head;
}

static void turn(const team *t, float *x, const float *norm, int64_t position)
{
    const cptq_decoder *d = t->d;
    if (norm)
        rms_norm(x, x, norm, d->epsilon, d->head);
    if (d->cosine)
        rotate(x, d->cosine + position * (d->head / 2), d->sine + position * (d->head / 2), d->head);
}

/* Turn the keys and store them with the values. */
static void store(const team *t, int64_t block)
{
    const cptq_decoder *d = t->d;
    const cptq_block *k = d->block + block;
    int64_t first, last;
    share(t->tokens * d->key_heads, 1, t, &first, &last);
    for (int64_t j = first; j < last; j++) {
        int64_t i = j / d->key_heads, head = j % d->key_heads, at = (t->start + i) * d->head;
        float *key = t->s->key + j * d->head;
        turn(t, key, k->key_norm, t->start + i);
        float *tile = find_cache(d, d->keys, block, head) + (t->start + i) / TILE * TILE * d->head;
        for (int64_t f = 0; f < d->head; f++)
            tile[f * TILE + (t->start + i) % TILE] = key[f];
        memcpy(find_cache(d, d->values, block, head) + at, t->s->value + j * d->head,
               sizeof(float) * (size_t)d->head);
    }
    meet();
}

/* scores[j] = query . key j * scale for one tile of keys */
PART void score_tile(const float *restrict query, const float *restrict tile, float scale,
                     int64_t head, float *restrict scores)
{
    float sums[TILE] = {0.0f};
    for (int64_t i = 0; i < head; i++)
        for (int k = 0; k < TILE; k++)
            sums[k] += query[i] * tile[i * TILE + k];
    for (int k = 0; k < TILE; k++)
        scores[k] = sums[k] * scale;
}

/* y[0..count) = sum of scores[j] values[j] / divisor; count is LANES but for odd sizes */
PART void mix_values(const float *restrict values, const float *restrict scores, float divisor,
                     int64_t seen, int64_t head, int count, float *restrict y)
{
    float sums[LANES] = {0.0f};
    for (int64_t j = 0; j < seen; j++)
        for (int k = 0; k < count; k++)
            sums[k] += scores[j] * values[j * head + k];
    for (int k = 0; k < count; k++)
        y[k] = sums[k] / divisor;
}

VECTORISED static void attend_one(const float *query, const float *keys, const float *values,
                                  float scale, int64_t seen, int64_t head, float *scores, float *y)
{
    for (int64_t j = 0; j < seen; j += TILE)
        score_tile(query, keys + j * head, scale, head, scores + j);
    float sum = exponentiate(scores, seen);
    int64_t i = 0;
    for (; i + LANES <= head; i += LANES)
        mix_values(values + i, scores, sum, seen, head, LANES, y + i);
    if (i < head)
        mix_values(values + i, scores, sum, seen, head, (int)(head - i), y + i);
}

static void attend(const team *t, int64_t block)
{
    const cptq_decoder *d = t->d;
    int64_t first, last, queries = d->heads / d->key_heads;
    share(t->tokens * d->heads, 1, t, &first, &last);
    for (int64_t j = first; j < last; j++) {
        int64_t i = j / d->heads, head = j % d->heads;
        float *query = t->s->query + j * d->head;
        turn(t, query, d->block[block].query_norm, t->start + i);
        attend_one(query, find_cache(d, d->keys, block, head / queries),
                   find_cache(d, d->values, block, head / queries), d->scale, t->start + i + 1,
                   d->head, t->s->scores + (int64_t)t->me * d->capacity,
                   t->s->attended + j * d->head);
    }
    meet();
}

/* Set outputs [first, last) of all tokens' activated gates to 0 where they are small. */
static void close_gates(float *x, const float *limit, int64_t inner, int64_t first, int64_t last)
{
    for (int64_t j = first; j < last; j++)
        if (fabsf(x[j]) <= limit[j % inner])
            x[j] = 0.0f;
}

static void activate_all(const team *t, const cptq_projection *gate)
{
    int gated = gate->weight.out != 0;
    const cptq_decoder *d = t->d;
    int64_t first, last;
    float *x = gated ? t->s->gate : t->s->up;
    share(t->tokens * d->inner, 16, t, &first, &last);
    if (first < last) {
        activate(d->activation, x + first, last - first);
        if (d->rules && gate->rule == CPTQ_KEEP_GATE)
            close_gates(x, gate->threshold, d->inner, first, last);
        if (gated)
            multiply_into(x + first, t->s->up + first, last - first);
    }
    meet();
}

/* Leaves in `added` what the MLP adds. */
static void run_block(const team *t, int64_t block, const float *added)
{
    const cptq_block *k = t->d->block + block;
    const workspace *s = t->s;
    enter(t, k->attention_norm, k->attention_norm_bias, added, &k->query);
    project(t, &k->query, s->normed, 0, s->query);
    project_again(t, &k->query, &k->key, s->normed, s->key);
    project_again(t, &k->key, &k->value, s->normed, s->value);
    meet();
    store(t, block);
    attend(t, block);
    prepare(t, s->attended, &k->output);
    project(t, &k->output, s->attended, 0, s->added);
    meet();
    int gated = k->gate.weight.out != 0;
    enter(t, k->mlp_norm, k->mlp_norm_bias, s->added, &k->up);
    project(t, &k->up, s->normed, 0, s->up);
    if (gated)
        project_again(t, &k->up, &k->gate, s->normed, s->gate);
    meet();
    activate_all(t, &k->gate);
    const float *inner = gated ? s->gate : s->up;
    prepare(t, inner, &k->down);
    project(t, &k->down, inner, 0, s->added);
    meet();
}

static void embed(const team *t, const int64_t *ids)
{
    const cptq_decoder *d = t->d;
    int64_t first, last;
    share(t->tokens, 1, t, &first, &last);
    for (int64_t i = first; i < last; i++) {
        float *hidden = t->s->hidden + i * d->width;
        if (d->embedding.dense) {
            const float *row = read_row(&d->embedding, ids[i], hidden);
            if (row != hidden)
                memcpy(hidden, row, sizeof(float) * (size_t)d->width);
        } else {
            cptq_dequantize(&d->embedding.weight, ids[i], hidden,
                            t->s->scratch + (size_t)t->me * t->s->scratch_bytes);
        }
        if (d->positions)
            add_into(hidden, d->positions + (t->start + i) * d->width, d->width);
    }
    meet();
}

static void run(const team *t, const int64_t *ids, int all, float *logits)
{
    const cptq_decoder *d = t->d;
    embed(t, ids);
    for (int64_t b = 0; b < d->blocks; b++)
        run_block(t, b, b ? t->s->added : NULL);
    enter(t, d->final_norm, d->final_norm_bias, d->blocks ? t->s->added : NULL,
          &d->to_logits);
    project(t, &d->to_logits, t->s->normed, all ? 0 : t->tokens - 1, logits);
}

int cptq_decode(const cptq_decoder *d, const int64_t *ids, int64_t tokens, int64_t start, int all,
                float *logits, void *memory, size_t bytes, int threads)
{
    if (start < 0 || tokens < 0 || start + tokens > d->capacity)
        return CPTQ_EINDEX;
    for (int64_t i = 0; i < tokens; i++)
        if (ids[i] < 0 || ids[i] >= d->embedding.weight.out)
            return CPTQ_EINDEX;
    if (tokens == 0)
        return 0;
    char *base = (char *)(((uintptr_t)memory + ALIGNED - 1) & ~(uintptr_t)(ALIGNED - 1));
    workspace s = lay_out(d, tokens, threads, base);
    if (bytes < s.bytes + ALIGNED)
        return CPTQ_EMEMORY;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        team t = {d, &s, tokens, start, omp_get_thread_num(), omp_get_num_threads()};
        run(&t, ids, all, logits);
    }
#else
    team t = {d, &s, tokens, start, 0, 1};
    run(&t, ids, all, logits);
#endif
    return 0;
}

int cptq_dense_rows(const cptq_projection *p, int64_t first, int64_t count, float *out)
{
    if (!p->dense || first < 0 || count < 0 || first + count > p->weight.out)
        return CPTQ_EINDEX;
    for (int64_t i = 0; i < count; i++) {
        const float *row = read_row(p, first + i, out + i * p->weight.in);
        if (row != out + i * p->weight.in)
            memcpy(out + i * p->weight.in, row, sizeof(float) * (size_t)p->weight.in);
    }
    return 0;
}
