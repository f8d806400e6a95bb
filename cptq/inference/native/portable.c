/* The products in plain C11, for every machine; also the definition that avx2.c is tested against.
 *
 *   y_i = sum over parts p of s_g(p) a_c(p) (sum_j u_ij q_j - v_g(p) sum_j q_j)
 *
 * A part is a run of inputs within one group g of the weight and one chunk c of 32 activations; u
 * are the unsigned codes, v the zero point (or 2^(b-1)), s the scale, q the 8-bit activations and a
 * their scale. Of a weight with levels, u is the level plus 128 and v is 128. The inner sums are
 * integers and exact. Activations are rounded to the nearest of 127 steps of the chunk's largest |x|
 * (as Q8_0 of ggml does). Cost: O(out in) to unpack, once for all tokens, and O(out in tokens)
 * multiplications, in loops that compilers can vectorize. Limits: a row is unpacked to one byte a
 * weight, in the scratch memory. Little-endian machines only, as the format's words are read in
 * place.
 */
#include "internal.h"

typedef struct {
    float *scale, *zero;
    uint8_t *codes;
} row_parts;

static int portable_planes(const cptq_weight *w)
{
    (void)w;
    return 1;
}

static row_parts divide_scratch(const cptq_weight *w, void *scratch)
{
    size_t groups = pad64((size_t)count_groups(w) * 4 + 64);
    char *at = scratch;
    row_parts parts = {(float *)at, (float *)(at + groups), (uint8_t *)(at + 2 * groups)};
    return parts;
}

static void unpack_row(const uint32_t *words, int bits, int64_t count, uint8_t *out)
{
    uint64_t held = 0, mask = (1u << bits) - 1;
    int have = 0;
    for (int64_t i = 0; i < count; i++) {
        if (have < bits) {
            held |= (uint64_t)*words++ << have;
            have += 32;
        }
        out[i] = (uint8_t)(held & mask);
        held >>= bits;
        have -= bits;
    }
}

/* scales and zero points of a row, the latter as what is subtracted from unsigned codes */
static void read_scales(const cptq_weight *w, int64_t row, row_parts parts)
{
    int64_t groups = count_groups(w);
    const uint32_t *codes = (const uint32_t *)w->scale + row * w->scale_words;
    const uint32_t *zeros = w->zero ? w->zero + row * w->zero_words : NULL;
    float factor = w->factor ? read_number(w->factor, w->factor_type, row) : 0.0f;
    for (int64_t g = 0; g < groups; g++) {
        parts.scale[g] = w->scale_type == CPTQ_ROW_CODES
                             ? (float)((int)read_value(codes, ROW_BITS, g) - 32) * factor
                             : read_number(w->scale, w->scale_type, row * groups + g);
        parts.zero[g] = zeros ? (float)read_value(zeros, w->bits, g) : (float)find_middle(w);
    }
}

static row_parts read_row(const cptq_weight *w, int64_t row, void *scratch)
{
    row_parts parts = divide_scratch(w, scratch);
    unpack_row(w->codes + row * w->code_words, w->bits, w->in, parts.codes);
    for (int64_t j = 0; w->levels && j < w->in; j++)
        parts.codes[j] = (uint8_t)(w->levels[parts.codes[j]] + LEVEL_MIDDLE);
    read_scales(w, row, parts);
    return parts;
}

void cptq_sum_codes(const cptq_weight *w, const input_layout *in, const int8_t *natural, char *out)
{
    const float *lanes = (const float *)(out + in->lanes);
    float *totals = (float *)(out + in->totals), *sums = (float *)(out + in->sums);
    int64_t per_lane = 4 * in->planes;
    for (int64_t k = 0; k < in->steps; k++) {
        int32_t sum = 0;
        for (int64_t j = k * in->step; j < (k + 1) * in->step; j++)
            sum += natural[j];
        sums[k] = lanes[k * in->step / per_lane] * (float)sum;
    }
    for (int64_t g = 0; g < in->groups; g++)
        totals[g] = 0.0f;
    if (w->group == w->in || w->group % in->step == 0) {
        for (int64_t k = 0; k < in->steps; k++)
            if (k * in->step < w->in)
                totals[k * in->step / w->group] += sums[k];
        return;
    }
    for (int64_t j = 0; j < w->in; j++)
        totals[j / w->group] += lanes[j / CHUNK * CHUNK / per_lane] * (float)natural[j];
}

static void portable_quantize(const cptq_weight *w, const input_layout *in, const float *x,
                              void *out)
{
    int8_t *codes = out;
    float *lanes = (float *)((char *)out + in->lanes);
    memset(codes, 0, (size_t)in->blocks * 32);
    for (int64_t c = 0; c < in->blocks; c++) {
        int64_t first = c * CHUNK, last = first + CHUNK < w->in ? first + CHUNK : w->in;
        uint32_t largest = 0;
        for (int64_t j = first; j < last; j++) {
            uint32_t size = to_bits(x[j]) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        float inverse, scale = choose_scale(largest, &inverse);
        for (int lane = 0; lane < 8; lane++)
            lanes[8 * c + lane] = scale;
        if (inverse != 0.0f)
            for (int64_t j = first; j < last; j++)
                codes[j] = (int8_t)lrintf(x[j] * inverse);
    }
    cptq_sum_codes(w, in, codes, out);
}

static float multiply_row(const cptq_weight *w, row_parts row, const int8_t *q, const float *lanes)
{
    float sum = 0.0f;
    for (int64_t j = 0; j < w->in;) {
        int64_t g = j / w->group, c = j / CHUNK, last = (g + 1) * w->group;
        last = last < (c + 1) * CHUNK ? last : (c + 1) * CHUNK;
        int32_t dot = 0, total = 0;
        for (; j < last; j++) {
            dot += (int32_t)row.codes[j] * q[j];
            total += q[j];
        }
        dot -= (int32_t)row.zero[g] * total;
        sum += row.scale[g] * lanes[8 * c] * (float)dot;
    }
    return sum;
}

static size_t portable_scratch_bytes(const cptq_weight *w, int64_t tokens)
{
    (void)tokens;
    return row_scratch(w);
}

static void portable_multiply(const cptq_weight *w, const input_layout *in, const char *input,
                              int64_t tokens, const float *bias, float *y, int64_t stride,
                              int64_t first, int64_t last, void *scratch)
{
    for (int64_t i = first; i < last; i++) {
        row_parts row = read_row(w, i, scratch);
        for (int64_t t = 0; t < tokens; t++) {
            const char *token = input + (size_t)t * in->bytes;
            float sum = multiply_row(w, row, (const int8_t *)token,
                                     (const float *)(token + in->lanes));
            y[t * stride + i] = sum + (bias ? bias[i] : 0.0f);
        }
    }
}

static void portable_dequantize(const cptq_weight *w, int64_t row, float *out, void *scratch)
{
    row_parts parts = read_row(w, row, scratch);
    for (int64_t g = 0, j = 0; g < count_groups(w); g++)
        for (int64_t last = j + w->group; j < last; j++)
            out[j] = ((float)parts.codes[j] - parts.zero[g]) * parts.scale[g];
}

static void portable_dot(const float *row, int64_t in, const char *x, size_t x_stride,
                         int64_t tokens, float bias, float *y, int64_t stride)
{
    for (int64_t t = 0; t < tokens; t++) {
        const float *token = (const float *)(x + (size_t)t * x_stride);
        float sums[8] = {0}; /* eight sums round less than one, and fill vector registers */
        int64_t j = 0;
        for (; j + 8 <= in; j += 8)
            for (int k = 0; k < 8; k++)
                sums[k] += row[j + k] * token[j + k];
        for (int k = 0; j < in; j++, k++)
            sums[k] += row[j] * token[j];
        float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                    ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        y[t * stride] = sum + bias;
    }
}

static void portable_multiply_exact(const cptq_weight *w, const char *x, size_t x_stride,
                                    int64_t tokens, const float *bias, float *y, int64_t stride,
                                    int64_t first, int64_t last, void *scratch)
{
    float *row = (float *)((char *)scratch + row_scratch(w));
    for (int64_t i = first; i < last; i++) {
        portable_dequantize(w, i, row, scratch);
        portable_dot(row, w->in, x, x_stride, tokens, bias ? bias[i] : 0.0f, y + i, stride);
    }
}

const implementation cptq_portable = {
    "portable",        portable_planes,     portable_quantize, portable_scratch_bytes,
    portable_multiply, portable_dequantize, portable_multiply_exact,
};
