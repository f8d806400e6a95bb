/* What the two implementations (portable.c, avx2.c) share: layouts of workspaces and small parts. */
#ifndef CPTQ_INTERNAL_H
#define CPTQ_INTERNAL_H

#include "packed.h"

#include <math.h>
#include <string.h>

/* inputs that share one scale of the 8-bit activations */
#define CHUNK 32
/* bits of the codes of row scales */
#define ROW_BITS 6
/* most bits of codes that stand for levels of a table */
#define MOST_LEVEL_BITS 6
/* what makes bytes of levels, as float32 products read them */
#define LEVEL_MIDDLE 128
/* rows that a large product computes together, see avx2.c */
#define TILE_ROWS 16
/* |x| below this many times 127 is 0 in 8 bits: the inverse of its scale would overflow */
#define LEAST 1e-36f

/* An activation vector of 8 bits. Its inputs stand in blocks of 32 * planes: an implementation that
 * takes several codes out of each byte reads plane by plane, so that input `planes * u + p` of a
 * block is byte u of plane p. (With one plane that is the natural order.) Zeros fill the last
 * block. Sizes are counted in floats or bytes of one token. */
typedef struct {
    int planes;
    int64_t blocks;  /* of 32 * planes inputs */
    int64_t groups;  /* of the weight */
    int step;        /* inputs per entry of `sums`: 32, or 16 where 32 is no part of a group */
    int64_t steps;   /* entries of `sums` */
    /* int8 [blocks][planes][32] at offset 0 */
    size_t lanes;    /* offset of float [blocks][8]: the scale, for each fourth of 32 bytes */
    size_t totals;   /* offset of float [groups]: scale times sum of codes, by group */
    size_t sums;     /* offset of float [steps]: the same, by `step` inputs */
    size_t bytes;
} input_layout;

typedef struct {
    const char *name;
    int (*planes)(const cptq_weight *w);
    /* 8-bit form of one token */
    void (*quantize)(const cptq_weight *w, const input_layout *in, const float *x, void *out);
    /* scratch of `multiply`, a multiple of 64 */
    size_t (*scratch_bytes)(const cptq_weight *w, int64_t tokens);
    /* rows [first, last) with 8-bit activations */
    void (*multiply)(const cptq_weight *w, const input_layout *in, const char *input,
                     int64_t tokens, const float *bias, float *y, int64_t stride, int64_t first,
                     int64_t last, void *scratch);
    /* one row as float32; scratch of `row_scratch` bytes */
    void (*dequantize)(const cptq_weight *w, int64_t row, float *out, void *scratch);
    /* rows [first, last) with float32 activations, x (tokens, in) with a stride in bytes; scratch
     * of `row_scratch` bytes and a row of float32 */
    void (*multiply_exact)(const cptq_weight *w, const char *x, size_t x_stride, int64_t tokens,
                           const float *bias, float *y, int64_t stride, int64_t first,
                           int64_t last, void *scratch);
} implementation;

extern const implementation cptq_portable;
/* NULL where the machine lacks it, or the compiler */
const implementation *cptq_find_avx2(void);
/* Convert 8-bit floats, on machines where `cptq_find_avx2` finds something; returns how many of the
 * first n: a multiple of 16. */
int64_t cptq_widen_float8_avx2(const uint8_t *x, float *y, int64_t n, int e4m3);

static inline size_t pad64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static inline int64_t count_groups(const cptq_weight *w) { return w->group ? w->in / w->group : 0; }

/* what is subtracted from the unsigned bytes of a weight without zero points */
static inline int find_middle(const cptq_weight *w)
{
    return w->levels ? LEVEL_MIDDLE : 1 << (w->bits - 1);
}

/* bytes of the scales, zero points and unpacked bytes of one row */
static inline size_t row_scratch(const cptq_weight *w)
{
    size_t groups = pad64((size_t)count_groups(w) * 4 + 64);
    return 2 * groups + pad64((size_t)count_groups(w) + 192) + pad64((size_t)w->in + 192);
}

static inline input_layout describe_input(const cptq_weight *w, int planes)
{
    input_layout in = {.planes = planes, .groups = count_groups(w)};
    in.blocks = (w->in + 32 * planes - 1) / (32 * planes);
    in.step = w->group == w->in || w->group % CHUNK == 0 ? CHUNK : CHUNK / 2;
    in.steps = in.blocks * 32 * planes / in.step;
    in.lanes = pad64((size_t)in.blocks * 32 * (size_t)planes);
    in.totals = in.lanes + pad64((size_t)in.blocks * 32);
    in.sums = in.totals + pad64((size_t)in.groups * 4 + 32);
    in.bytes = in.sums + pad64((size_t)in.steps * 4);
    return in;
}

/* ---- numbers ------------------------------------------------------------------------------ */

static inline float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float from_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, body = half & 0x7fff;
    if (body >= 0x7c00) /* infinite or not a number */
        return from_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
    if (body >= 0x400)
        return from_bits(sign | (body + ((127 - 15) << 10)) << 13);
    float value = (float)body * 0x1p-24f; /* subnormal */
    return sign ? -value : value;
}

static inline float read_number(const void *from, int32_t type, int64_t index)
{
    if (type == CPTQ_F32)
        return ((const float *)from)[index];
    uint16_t half = ((const uint16_t *)from)[index];
    return type == CPTQ_F16 ? from_half(half) : from_bits((uint32_t)half << 16);
}

/* value `index` of a bitstream */
static inline uint32_t read_value(const uint32_t *words, int bits, int64_t index)
{
    int64_t bit = index * bits;
    int shift = (int)(bit & 31);
    uint32_t value = words[bit >> 5] >> shift;
    if (shift + bits > 32)
        value |= words[(bit >> 5) + 1] << (32 - shift);
    return value & ((1u << bits) - 1);
}

/* The scale of 32 activations, and the factor that takes them to codes. A largest value that is
 * not finite gives a scale that is not a number, which every product then shows. `largest` is the
 * bit pattern of the largest |x|: such patterns are ordered as the numbers are, NaN last. */
static inline float choose_scale(uint32_t largest, float *inverse)
{
    float most = from_bits(largest);
    *inverse = 0.0f;
    if (largest >= 0x7f800000)
        return NAN;
    if (most < LEAST)
        return 0.0f;
    *inverse = 127.0f / most;
    return most / 127.0f;
}

/* The sums of an input by step and group, from codes in natural order. */
void cptq_sum_codes(const cptq_weight *w, const input_layout *in, const int8_t *natural,
                    char *out);

#endif
