/* The products with AVX2, FMA and F16C.
 *
 * Codes are read where they lie. 32 units of 5, 6, 7 or 8 bits are spread to the 32 bytes of a
 * register; a unit is one code of 5 to 8 bits, two codes of 3 or 4 bits or four of 2 bits, which
 * masks and shifts then part into planes. Units that are no bytes are spread in three steps, which
 * put the four units of a 32-bit lane into its bytes: a byte shuffle fetches the lane's bits, a
 * shift moves its upper two units to the upper half, a second shift the odd units to odd bytes.
 *
 * Decoding (few tokens): a unit's byte meets activations in the same order (`input_layout`), so
 * vpmaddubsw and vpmaddwd give 32-bit sums of 4 * planes neighbouring inputs per lane, exactly: no
 * sum of 16 bits can overflow, as (2^b - 1) 127 * 2 * planes < 2^15 for b < 8. Codes of 8 bits are
 * made signed and multiplied as |w| and sign(w) x. One fused multiply-add per register takes a sum
 * to float32 with the product of both scales. Codes that stand for levels are looked up by a byte
 * shuffle per 16 levels and multiplied as |w| and sign(w) x, too. What unsigned codes add is taken
 * off once per row: sum_g s_g v_g (sum over group g of a q). The method is ggml's (Q4_0 x Q8_0), the
 * layout is not.
 *
 * Prompts (many tokens): 16 rows by 512 inputs are unpacked into bytes, four inputs of each of 16
 * rows side by side, and multiplied with four tokens at a time. A lane then is a row, so up to eight
 * products are added in 16 bits before they are widened, and scales are applied once per 32 inputs
 * for eight rows: about 5 instructions for 32 multiplications of 4-bit codes.
 *
 * Limits: a group must be whole lanes (4 * planes inputs), or portable.c is used. For prompts it
 * must be a multiple of 16, and with float32 activations, where bytes are widened group by group, as
 * well. Loads never leave a row: a part of a block is copied first.
 */
#include "internal.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))

#include <cpuid.h>
#include <immintrin.h>
#include <stdlib.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

/* loops over registers, whose bounds are constants where they are inlined */
#define UNROLL _Pragma("GCC unroll 8")
/* keeps compilers from reordering sums, for which they run out of registers */
#define KEEP(v) __asm__("" : "+x"(v))

/* tokens from which tiles are unpacked once and kept */
#define TILE_TOKENS 8
/* inputs of a tile: with 16 rows 8 KB, a quarter of a first-level cache */
#define TILE_INPUTS 512
/* rows that share the loads of one token's activations */
#define ROWS 4
/* bytes to fetch ahead, at least and at most; rows side by side confuse the hardware's prediction */
#define AHEAD 4096
#define FAR_AHEAD 16384

/* ---- units and planes ----------------------------------------------------------------------- */

/* How codes are read: their bits, and whether they stand for levels: NARROW ones, of at most 4 bits,
 * have sizes up to 64 (2 bits: 32), so that 16 bits hold sums; WIDE ones have sizes up to 127. */
#define NARROW 16
#define WIDE 32
#define BITS(kind) ((kind) & 15)
/* bytes of a plane are signed, so they are multiplied by their sizes and their signs */
#define IS_SIGNED(kind) ((kind) >= 8)

static inline int count_planes(int kind) { return BITS(kind) == 2 ? 4 : BITS(kind) < 5 ? 2 : 1; }

/* bytes that hold 32 units */
static inline int unit_bytes(int kind) { return 4 * BITS(kind) * count_planes(kind); }

static int find_kind(const cptq_weight *w)
{
    if (!w->levels)
        return w->bits;
    int narrow = w->bits <= 4, most = w->bits == 2 ? 32 : 64;
    for (int k = 0; k < 1 << w->bits; k++)
        narrow = narrow && abs(w->levels[k]) <= most;
    return w->bits | (narrow ? NARROW : WIDE);
}

/* bytes first.. of each quad of units in a half of the register; the fourth may be absent */
INLINE __m256i make_shuffle(int a, int b, int c, int d, int shift, int width)
{
    int last = width == 4 ? 3 : -128;
    int e = a + shift, f = b + shift, g = c + shift, h = d + shift;
    return _mm256_setr_epi8(
        (char)a, (char)(a + 1), (char)(a + 2), (char)(width == 4 ? a + last : last), (char)b,
        (char)(b + 1), (char)(b + 2), (char)(width == 4 ? b + last : last), (char)c, (char)(c + 1),
        (char)(c + 2), (char)(width == 4 ? c + last : last), (char)d, (char)(d + 1), (char)(d + 2),
        (char)(width == 4 ? d + last : last), (char)e, (char)(e + 1), (char)(e + 2),
        (char)(width == 4 ? e + last : last), (char)f, (char)(f + 1), (char)(f + 2),
        (char)(width == 4 ? f + last : last), (char)g, (char)(g + 1), (char)(g + 2),
        (char)(width == 4 ? g + last : last), (char)h, (char)(h + 1), (char)(h + 2),
        (char)(width == 4 ? h + last : last));
}

/* the 16 bytes at p, and those at p + apart in the upper half */
INLINE __m256i load_halves(const uint8_t *p, int apart)
{
    __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i *)(p + apart)), 1);
}

/* units 0 and 1 of each lane to bytes 0 and 1, units 2 and 3 to bytes 2 and 3; other bits stay */
INLINE __m256i spread_lanes(__m256i lanes, int unit)
{
    const __m256i odd = _mm256_set1_epi16((short)0xff00);
    __m256i halves = _mm256_blend_epi16(lanes, _mm256_slli_epi32(lanes, 16 - 2 * unit), 0xaa);
    return _mm256_blendv_epi8(halves, _mm256_slli_epi16(halves, 8 - unit), odd);
}

/* 32 units, one per byte; bits above a unit's are undefined */
INLINE __m256i load_units(int bits, const uint8_t *p)
{
    const __m256i odd_quads = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
    switch (bits) {
    case 3: /* units of 6 bits: a lane's are 3 bytes */
    case 6:
        return spread_lanes(
            _mm256_shuffle_epi8(load_halves(p, 8), make_shuffle(0, 3, 6, 9, 4, 3)), 6);
    case 5: /* a lane's are 20 bits: every second starts within a byte */
        return spread_lanes(
            _mm256_srlv_epi32(
                _mm256_shuffle_epi8(load_halves(p, 4), make_shuffle(0, 2, 5, 7, 6, 3)), odd_quads),
            5);
    case 7: /* 28 bits */
        return spread_lanes(
            _mm256_srlv_epi32(
                _mm256_shuffle_epi8(load_halves(p, 12), make_shuffle(0, 3, 7, 10, 2, 4)),
                odd_quads),
            7);
    default: return _mm256_loadu_si256((const __m256i *)p);
    }
}

/* codes by plane: unsigned, of 8 bits signed */
INLINE void part_planes(int bits, __m256i units, __m256i *plane)
{
    const __m256i mask = _mm256_set1_epi8((char)((1 << bits) - 1));
    if (bits == 8) {
        plane[0] = _mm256_xor_si256(units, _mm256_set1_epi8((char)0x80));
        return;
    }
    plane[0] = _mm256_and_si256(units, mask);
    for (int p = 1; p < count_planes(bits); p++)
        plane[p] = _mm256_and_si256(_mm256_srli_epi16(units, p * bits), mask);
}

/* sixteen levels in each half of a register, and so on: what a byte shuffle looks up */
typedef struct {
    __m256i part[4];
} level_table;

INLINE level_table read_levels(int kind, const int8_t *levels)
{
    level_table table;
    int8_t some[64] = {0};
    memcpy(some, levels, (size_t)1 << BITS(kind));
    for (int k = 0; k < 4; k++)
        table.part[k] =
            _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(some + 16 * k)));
    return table;
}

/* the levels of codes; a shuffle uses four bits, the others choose among its results */
INLINE __m256i look_up(int bits, __m256i code, const level_table *table)
{
    __m256i found = _mm256_shuffle_epi8(table->part[0], code);
    if (bits < 5)
        return found;
    __m256i fifth = _mm256_slli_epi16(code, 3);
    found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(table->part[1], code), fifth);
    if (bits == 5)
        return found;
    __m256i upper = _mm256_blendv_epi8(_mm256_shuffle_epi8(table->part[2], code),
                                       _mm256_shuffle_epi8(table->part[3], code), fifth);
    return _mm256_blendv_epi8(found, upper, _mm256_slli_epi16(code, 2));
}

/* what is multiplied, by plane: codes or levels */
INLINE void part_values(int kind, __m256i units, const level_table *table, __m256i *plane)
{
    part_planes(BITS(kind), units, plane);
    for (int p = 0; kind >= NARROW && p < count_planes(kind); p++)
        plane[p] = look_up(BITS(kind), plane[p], table);
}

/* block `b` of a row, whose last block may be a part of one: then a copy with zeros behind it */
INLINE const uint8_t *find_block(const uint8_t *row, int64_t row_bytes, int64_t b, int size,
                                 uint8_t *copy)
{
    int64_t left = row_bytes - b * size;
    if (left >= size)
        return row + b * size;
    /* whole words, of which a masked load reads no others */
    __m256i word = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), word);
    _mm256_storeu_si256((__m256i *)copy,
                        _mm256_maskload_epi32((const int *)(row + b * size), mask));
    return copy;
}

/* ---- values in natural order ------------------------------------------------------------------ */

/* two planes of 32 bytes as 64 bytes in natural order */
INLINE void store_pair(__m256i even, __m256i odd, uint8_t *out)
{
    __m256i low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((__m256i *)(out + 32), _mm256_permute2x128_si256(low, high, 0x31));
}

INLINE void store_four(const __m256i *plane, uint8_t *out)
{
    __m256i even[2] = {_mm256_unpacklo_epi8(plane[0], plane[1]),
                       _mm256_unpackhi_epi8(plane[0], plane[1])};
    __m256i odd[2] = {_mm256_unpacklo_epi8(plane[2], plane[3]),
                      _mm256_unpackhi_epi8(plane[2], plane[3])};
    __m256i part[4];
    for (int k = 0; k < 2; k++) {
        part[2 * k] = _mm256_unpacklo_epi16(even[k], odd[k]);
        part[2 * k + 1] = _mm256_unpackhi_epi16(even[k], odd[k]);
    }
    for (int k = 0; k < 4; k++) {
        _mm_storeu_si128((__m128i *)(out + 16 * k), _mm256_castsi256_si128(part[k]));
        _mm_storeu_si128((__m128i *)(out + 64 + 16 * k), _mm256_extracti128_si256(part[k], 1));
    }
}

INLINE void unpack_bits(int bits, const uint8_t *row, int64_t row_bytes, int64_t count,
                        uint8_t *out)
{
    int size = unit_bytes(bits), planes = count_planes(bits);
    uint8_t copy[32];
    for (int64_t b = 0; b * 32 * planes < count; b++) {
        __m256i units = load_units(bits, find_block(row, row_bytes, b, size, copy)), plane[4];
        if (bits == 8)
            plane[0] = units; /* unsigned here */
        else
            part_planes(bits, units, plane);
        if (planes == 1)
            _mm256_storeu_si256((__m256i *)(out + 32 * b), plane[0]);
        else if (planes == 2)
            store_pair(plane[0], plane[1], out + 64 * b);
        else
            store_four(plane, out + 128 * b);
    }
}

/* `count` unsigned values in natural order; up to 127 bytes behind them are written */
AVX2 static void unpack_natural(int bits, const uint32_t *words, int64_t count, uint8_t *out)
{
    const uint8_t *row = (const uint8_t *)words;
    int64_t bytes = (count * bits + 31) / 32 * 4;
    switch (bits) {
    case 2: unpack_bits(2, row, bytes, count, out); break;
    case 3: unpack_bits(3, row, bytes, count, out); break;
    case 4: unpack_bits(4, row, bytes, count, out); break;
    case 5: unpack_bits(5, row, bytes, count, out); break;
    case 6: unpack_bits(6, row, bytes, count, out); break;
    case 7: unpack_bits(7, row, bytes, count, out); break;
    default: unpack_bits(8, row, bytes, count, out);
    }
}

/* ---- scales ----------------------------------------------------------------------------------- */

INLINE __m256 load_numbers(const void *from, int type, int64_t index)
{
    if (type == CPTQ_F32)
        return _mm256_loadu_ps((const float *)from + index);
    __m128i halves = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + index));
    if (type == CPTQ_F16)
        return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE __m256 widen(const uint8_t *bytes)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes)));
}

/* memory of `rows` rows: scales, zero points (as what is subtracted), lanes and bytes */
typedef struct {
    float *scale, *zero, *lane;
    uint8_t *bytes;
} row_parts;

static row_parts divide_scratch(const cptq_weight *w, int rows, void *scratch)
{
    size_t groups = (size_t)rows * pad64((size_t)count_groups(w) * 4 + 64);
    char *at = scratch;
    row_parts parts = {(float *)at, (float *)(at + groups), (float *)(at + 2 * groups),
                       (uint8_t *)(at + 2 * groups)};
    return parts;
}

/* 6-bit codes times the row's factor; up to 7 floats behind the last one are written */
INLINE void read_row_codes(const cptq_weight *w, int64_t row, float *scale)
{
    int64_t groups = count_groups(w), bytes = 4 * w->scale_words;
    const uint8_t *codes = (const uint8_t *)w->scale + row * bytes;
    __m256 factor = _mm256_set1_ps(read_number(w->factor, w->factor_type, row));
    uint8_t copy[32];
    for (int64_t first = 0, b = 0; first < groups; first += 32, b++) {
        __m256i plane, units =
            load_units(ROW_BITS, find_block(codes, bytes, b, unit_bytes(ROW_BITS), copy));
        int8_t code[32];
        part_planes(ROW_BITS, units, &plane);
        _mm256_storeu_si256((__m256i *)code, _mm256_sub_epi8(plane, _mm256_set1_epi8(32)));
        for (int k = 0; k < 32 && first + k < groups; k += 8) {
            __m256i eight = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(code + k)));
            _mm256_storeu_ps(scale + first + k, _mm256_mul_ps(_mm256_cvtepi32_ps(eight), factor));
        }
    }
}

/* scale[r * groups + g] of `rows` rows; up to 8 floats behind them are written, which a part of a
 * block multiplies by 0 */
AVX2 static void read_scales(const cptq_weight *w, int64_t row, int rows, row_parts parts)
{
    int64_t groups = count_groups(w), from = row * groups, count = rows * groups, g = 0;
    if (w->scale_type == CPTQ_ROW_CODES) {
        for (int r = 0; r < rows; r++)
            read_row_codes(w, row + r, parts.scale + r * groups);
        return;
    }
    for (int64_t k = 0; k < count; k += 32) /* the scales of the next but one call */
        _mm_prefetch((const char *)w->scale + 2 * (from + 2 * count + k), _MM_HINT_T0);
    for (; g + 8 <= count; g += 8)
        _mm256_storeu_ps(parts.scale + g, load_numbers(w->scale, w->scale_type, from + g));
    for (; g < count; g++)
        parts.scale[g] = read_number(w->scale, w->scale_type, from + g);
    _mm256_storeu_ps(parts.scale + count, _mm256_setzero_ps());
}

/* zero[r * groups + g], less 128 where codes are made signed */
AVX2 static void read_zeros(const cptq_weight *w, int64_t row, int rows, float less,
                            row_parts parts)
{
    int64_t groups = count_groups(w);
    for (int r = 0; w->zero && r < rows; r++) {
        float *zero = parts.zero + r * groups;
        unpack_natural(w->bits, w->zero + (row + r) * w->zero_words, groups, parts.bytes);
        for (int64_t g = 0; g < groups; g += 8)
            _mm256_storeu_ps(zero + g, _mm256_sub_ps(widen(parts.bytes + g), _mm256_set1_ps(less)));
    }
}

INLINE float add_lanes(__m256 v)
{
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* the mask of the last register of `count` floats, and the registers before it */
INLINE __m256 mask_last(int64_t count, int64_t *whole)
{
    *whole = (count - 1) / 8 * 8;
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i left = _mm256_set1_epi32((int)(count - *whole));
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(left, lane));
}

/* sum_g scale[g] zero[g] totals[g], by lane; zero NULL: 1 */
INLINE __m256 correct(const float *scale, const float *zero, const float *totals, int64_t groups)
{
    int64_t whole, g = 0;
    __m256 mask = mask_last(groups, &whole), sum = _mm256_setzero_ps(), s;
    for (; g < whole; g += 8) {
        s = _mm256_loadu_ps(scale + g);
        if (zero)
            s = _mm256_mul_ps(s, _mm256_loadu_ps(zero + g));
        sum = _mm256_fmadd_ps(s, _mm256_loadu_ps(totals + g), sum);
    }
    /* behind a row's last scale is another's, or nothing yet written */
    s = _mm256_and_ps(mask, _mm256_loadu_ps(scale + g));
    if (zero)
        s = _mm256_mul_ps(s, _mm256_and_ps(mask, _mm256_loadu_ps(zero + g)));
    return _mm256_fmadd_ps(s, _mm256_and_ps(mask, _mm256_loadu_ps(totals + g)), sum);
}

/* ---- activations ------------------------------------------------------------------------------ */

/* 32 numbers to codes in natural order; the scale */
INLINE float quantize_chunk(const float *x, int8_t *out)
{
    __m256i sign = _mm256_set1_epi32(0x7fffffff), most = _mm256_setzero_si256();
    for (int k = 0; k < 4; k++)
        most = _mm256_max_epi32(
            most, _mm256_and_si256(sign, _mm256_loadu_si256((const __m256i *)(x + 8 * k))));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    float inverse, scale = choose_scale((uint32_t)_mm_cvtsi128_si32(four), &inverse);
    if (inverse == 0.0f) {
        _mm256_storeu_si256((__m256i *)out, _mm256_setzero_si256());
        return scale;
    }
    __m256 by = _mm256_set1_ps(inverse);
    __m256i part[4];
    for (int k = 0; k < 4; k++)
        part[k] = _mm256_cvtps_epi32(_mm256_mul_ps(by, _mm256_loadu_ps(x + 8 * k)));
    __m256i codes = _mm256_packs_epi16(_mm256_packs_epi32(part[0], part[1]),
                                       _mm256_packs_epi32(part[2], part[3]));
    codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)out, codes);
    return scale;
}

/* 64 bytes to their even and their odd ones */
INLINE void part_pair(__m256i a, __m256i b, __m256i *even, __m256i *odd)
{
    const __m256i low = _mm256_set1_epi16(0x00ff);
    *even = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low)), 0xd8);
    *odd = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8)), 0xd8);
}

/* a block from natural order to planes */
INLINE void order_planes(int planes, const int8_t *natural, int8_t *out)
{
    __m256i part[4], odd[2], even[2];
    for (int k = 0; k < planes; k++)
        part[k] = _mm256_loadu_si256((const __m256i *)(natural + 32 * k));
    if (planes >= 2)
        part_pair(part[0], part[1], &even[0], &odd[0]);
    if (planes == 4) {
        part_pair(part[2], part[3], &even[1], &odd[1]);
        part_pair(even[0], even[1], &part[0], &part[2]);
        part_pair(odd[0], odd[1], &part[1], &part[3]);
    } else if (planes == 2) {
        part[0] = even[0], part[1] = odd[0];
    }
    for (int k = 0; k < planes; k++)
        _mm256_store_si256((__m256i *)(out + 32 * k), part[k]);
}

/* the sums of 16 inputs each, of 32 */
INLINE void sum_halves(const int8_t *natural, int32_t *half)
{
    __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1),
                                         _mm256_loadu_si256((const __m256i *)natural));
    __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0x4e));
    fours = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xb1));
    half[0] = _mm_cvtsi128_si32(_mm256_castsi256_si128(fours));
    half[1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(fours, 1));
}

INLINE void quantize_block(int planes, int step, const float *x, int64_t block, int8_t *out,
                           float *lanes, float *sums)
{
    int per = 8 / planes;
    int8_t natural[128];
    for (int c = 0; c < planes; c++) {
        int32_t half[2];
        int64_t chunk = block * planes + c;
        float scale = quantize_chunk(x + 32 * c, natural + 32 * c);
        for (int k = 0; k < per; k++)
            lanes[8 * block + per * c + k] = scale;
        sum_halves(natural + 32 * c, half);
        if (step == CHUNK) {
            sums[chunk] = scale * (float)(half[0] + half[1]);
        } else {
            sums[2 * chunk] = scale * (float)half[0];
            sums[2 * chunk + 1] = scale * (float)half[1];
        }
    }
    order_planes(planes, natural, out + 32 * planes * block);
}

/* the sums of groups of other sizes than multiples of 16, one input at a time */
static void sum_small_groups(const cptq_weight *w, const input_layout *in, const int8_t *codes,
                             const float *lanes, float *totals)
{
    int64_t size = 32 * in->planes;
    for (int64_t j = 0; j < w->in; j++) {
        int64_t block = j / size, unit = j % size / in->planes, plane = j % in->planes;
        totals[j / w->group] +=
            lanes[8 * block + unit / 4] * (float)codes[size * block + 32 * plane + unit];
    }
}

AVX2 static void quantize(const cptq_weight *w, const input_layout *in, const float *x, void *out)
{
    float *lanes = (float *)((char *)out + in->lanes), *sums = (float *)((char *)out + in->sums);
    float *totals = (float *)((char *)out + in->totals), rest[128];
    int64_t size = 32 * in->planes, whole = w->in / size;
    for (int64_t b = 0; b < in->blocks; b++) {
        const float *from = x + size * b;
        if (b == whole) {
            memset(rest, 0, sizeof rest);
            memcpy(rest, from, (size_t)(w->in - size * b) * 4);
            from = rest;
        }
        switch (in->planes) {
        case 4: quantize_block(4, in->step, from, b, out, lanes, sums); break;
        case 2: quantize_block(2, in->step, from, b, out, lanes, sums); break;
        default: quantize_block(1, in->step, from, b, out, lanes, sums);
        }
    }
    memset(totals, 0, (size_t)in->groups * 4);
    if (w->group != w->in && w->group % in->step) {
        sum_small_groups(w, in, out, lanes, totals);
        return;
    }
    int64_t per_group = w->group == w->in ? in->steps : w->group / in->step;
    for (int64_t g = 0, k = 0; g < in->groups; g++)
        for (int64_t last = k + per_group; k < last; k++)
            totals[g] += sums[k];
}

/* ---- few tokens ------------------------------------------------------------------------------- */

/* How the eight scales of a block are found: one for all of `inner` blocks (spread 0), a few spread
 * over the lanes (their number), or read from an array of lanes (-1). */
typedef struct {
    int spread;
    int64_t inner, outer;
} schedule;

static schedule plan_scales(const cptq_weight *w, const input_layout *in)
{
    int64_t size = 32 * in->planes;
    schedule plan = {-1, 1, in->blocks};
    if (w->group == w->in || w->group % size == 0) {
        plan.spread = 0;
        plan.inner = w->group == w->in ? in->blocks : w->group / size;
        plan.outer = in->groups;
    } else if (size % w->group == 0) {
        plan.spread = (int)(size / w->group);
    }
    return plan;
}

static void fill_lanes(const cptq_weight *w, const input_layout *in, int rows, row_parts parts)
{
    int64_t per = 4 * in->planes, lanes = 8 * in->blocks;
    for (int r = 0; r < rows; r++)
        for (int64_t k = 0; k < lanes; k++)
            parts.lane[r * lanes + k] =
                k * per < w->in ? parts.scale[r * in->groups + k * per / w->group] : 0.0f;
}

/* How far ahead of a byte to fetch: whole strips of four rows where these are short. An address
 * behind the weight is harmless. */
static int64_t choose_distance(int64_t row_bytes)
{
    int64_t rows = ROWS * row_bytes;
    if (rows < AHEAD)
        return (AHEAD + rows - 1) / rows * rows;
    return rows < FAR_AHEAD ? rows : FAR_AHEAD;
}

/* 16-bit sums of products of two neighbours */
INLINE __m256i multiply_pairs(int kind, __m256i plane, __m256i x)
{
    if (IS_SIGNED(kind))
        return _mm256_maddubs_epi16(_mm256_abs_epi8(plane), _mm256_sign_epi8(x, plane));
    return _mm256_maddubs_epi16(plane, x);
}

/* 32-bit sums of a block's products */
INLINE __m256i multiply_block(int kind, const __m256i *plane, const int8_t *q)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256(), wide = sum;
    for (int p = 0; p < count_planes(kind); p++) {
        __m256i x = _mm256_load_si256((const __m256i *)(q + 32 * p));
        __m256i pairs = multiply_pairs(kind, plane[p], x);
        if (kind & WIDE) /* two do not fit into 16 bits */
            wide = _mm256_add_epi32(wide, _mm256_madd_epi16(pairs, ones));
        else
            sum = p ? _mm256_add_epi16(sum, pairs) : pairs;
    }
    return kind & WIDE ? wide : _mm256_madd_epi16(sum, ones);
}

/* `rows` rows by `tokens` tokens: sums by lane, without the correction */
INLINE void run_strip(int kind, int rows, int tokens, const cptq_weight *w, const input_layout *in,
                      schedule plan, const uint8_t *codes, const row_parts *parts,
                      const char *input, __m256 *sum)
{
    int size = unit_bytes(kind), planes = count_planes(kind);
    int64_t row_bytes = w->code_words * 4, whole = row_bytes / size;
    level_table table;
    if (kind >= NARROW)
        table = read_levels(kind, w->levels);
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    /* the scale of a lane, among 4 or 8 that are loaded: lane * spread / 8 */
    const __m256i index = _mm256_srli_epi32(
        _mm256_mullo_epi32(lane, _mm256_set1_epi32(plan.spread)), 3);
    int64_t ahead = choose_distance(row_bytes);
    uint8_t copy[ROWS][32];
    __m256 scale[ROWS];
    for (int r = 0; whole < in->blocks && r < rows; r++)
        find_block(codes + r * row_bytes, row_bytes, whole, size, copy[r]);
    for (int k = 0; k < rows * tokens; k++)
        sum[k] = _mm256_setzero_ps();
    for (int64_t o = 0, b = 0; o < plan.outer; o++) {
        for (int r = 0; r < rows; r++) {
            const float *row = parts->scale + r * in->groups;
            if (plan.spread == 0)
                scale[r] = _mm256_broadcast_ss(row + o);
            else if (plan.spread == 8)
                scale[r] = _mm256_loadu_ps(row + o * 8);
            else if (plan.spread > 0)
                scale[r] = _mm256_permutevar_ps(
                    _mm256_broadcast_ps((const __m128 *)(row + o * plan.spread)), index);
            else
                scale[r] = _mm256_loadu_ps(parts->lane + (r * in->blocks + o) * 8);
        }
        for (int64_t last = b + plan.inner; b < last; b++) {
            for (int r = 0; r < rows; r++) {
                const uint8_t *at = b < whole ? codes + r * row_bytes + b * size : copy[r];
                __m256i plane[4];
                _mm_prefetch((const char *)at + ahead, _MM_HINT_T0);
                part_values(kind, load_units(BITS(kind), at), &table, plane);
                for (int t = 0; t < tokens; t++) {
                    const char *token = input + (size_t)t * in->bytes;
                    __m256i dot =
                        multiply_block(kind, plane, (const int8_t *)token + 32 * planes * b);
                    __m256 by = _mm256_load_ps((const float *)(token + in->lanes) + 8 * b);
                    sum[r * tokens + t] = _mm256_fmadd_ps(
                        _mm256_cvtepi32_ps(dot), _mm256_mul_ps(scale[r], by), sum[r * tokens + t]);
                }
            }
        }
    }
}

INLINE void finish_strip(int kind, int rows, int tokens, const cptq_weight *w,
                         const input_layout *in, const row_parts *parts, const char *input,
                         const __m256 *sum, const float *bias, float *y, int64_t stride)
{
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) {
            const float *totals = (const float *)(input + (size_t)t * in->bytes + in->totals);
            const float *scale = parts->scale + r * in->groups;
            const float *zero = w->zero ? parts->zero + r * in->groups : NULL;
            __m256 all = sum[r * tokens + t];
            if (zero || !IS_SIGNED(kind))
                all = _mm256_fnmadd_ps(_mm256_set1_ps(zero ? 1.0f : (float)(1 << (kind - 1))),
                                       correct(scale, zero, totals, in->groups), all);
            y[t * stride + r] = add_lanes(all) + (bias ? bias[r] : 0.0f);
        }
}

#define STRIP(name, kind, rows, tokens)                                                             \
    static AVX2 __attribute__((noinline)) void strip_##name##_##rows##_##tokens(                    \
        const cptq_weight *w, const input_layout *in, schedule plan, const uint8_t *codes,          \
        const row_parts *parts, const char *input, const float *bias, float *y, int64_t stride)     \
    {                                                                                               \
        __m256 sum[(rows) * (tokens)];                                                              \
        run_strip(kind, rows, tokens, w, in, plan, codes, parts, input, sum);                       \
        finish_strip(kind, rows, tokens, w, in, parts, input, sum, bias, y, stride);                \
    }
#define STRIPS(name, kind)                                                                          \
    STRIP(name, kind, 4, 1) STRIP(name, kind, 1, 1) STRIP(name, kind, 1, 2) STRIP(name, kind, 1, 4)

/* all kinds: X(name, kind) */
#define KINDS(X)                                                                                    \
    X(2, 2) X(3, 3) X(4, 4) X(5, 5) X(6, 6) X(7, 7) X(8, 8)                                         \
    X(2n, 2 | NARROW) X(3n, 3 | NARROW) X(4n, 4 | NARROW)                                           \
    X(2w, 2 | WIDE) X(3w, 3 | WIDE) X(4w, 4 | WIDE) X(5w, 5 | WIDE) X(6w, 6 | WIDE)

KINDS(STRIPS)

typedef void (*strip)(const cptq_weight *, const input_layout *, schedule, const uint8_t *,
                      const row_parts *, const char *, const float *, float *, int64_t);
#define LIST(name, kind)                                                                            \
    [kind] = {strip_##name##_4_1, strip_##name##_1_1, strip_##name##_1_2, strip_##name##_1_4},
static const strip strips[WIDE + 8][4] = {KINDS(LIST)};
enum { FOUR_ROWS, ONE_TOKEN, TWO_TOKENS, FOUR_TOKENS };

/* rows [row, row + rows) for all tokens, `rows` at most ROWS */
static void multiply_rows(const cptq_weight *w, const input_layout *in, int kind, schedule plan,
                          const char *input, int64_t tokens, const float *bias, float *y,
                          int64_t stride, int64_t row, int rows, void *scratch)
{
    row_parts parts = divide_scratch(w, ROWS, scratch);
    read_scales(w, row, rows, parts);
    read_zeros(w, row, rows, w->bits == 8 ? 128.0f : 0.0f, parts);
    if (plan.spread < 0)
        fill_lanes(w, in, rows, parts);
    const strip *run = strips[kind];
    const uint8_t *codes = (const uint8_t *)(w->codes + row * w->code_words);
    bias = bias ? bias + row : NULL;
    y += row;
    if (tokens == 1 && rows == ROWS) {
        run[FOUR_ROWS](w, in, plan, codes, &parts, input, bias, y, stride);
        return;
    }
    for (int r = 0; r < rows; r++) {
        for (int64_t t = 0; t < tokens;) {
            int64_t left = tokens - t, n = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            run[n == 4 ? FOUR_TOKENS : n == 2 ? TWO_TOKENS : ONE_TOKEN](
                w, in, plan, codes, &parts, input + (size_t)t * in->bytes, bias, y + t * stride,
                stride);
            t += n;
        }
        codes += w->code_words * 4;
        parts.scale += in->groups, parts.zero += in->groups, parts.lane += 8 * in->blocks;
        bias = bias ? bias + 1 : NULL;
        y++;
    }
}

#include "avx2_tiles.h"

static int planes(const cptq_weight *w)
{
    int count = count_planes(w->bits);
    return w->group == w->in || w->group % (4 * count) == 0 ? count : 1;
}

static size_t scratch_bytes(const cptq_weight *w, int64_t tokens)
{
    if (tokens < TILE_TOKENS)
        return ROWS * row_scratch(w);
    return TILE_ROWS * (row_scratch(w) + pad64((size_t)tokens * 4));
}

static void multiply(const cptq_weight *w, const input_layout *in, const char *input,
                     int64_t tokens, const float *bias, float *y, int64_t stride, int64_t first,
                     int64_t last, void *scratch)
{
    if (w->group != w->in && w->group % (4 * count_planes(w->bits))) {
        cptq_portable.multiply(w, in, input, tokens, bias, y, stride, first, last, scratch);
        return;
    }
    schedule plan = plan_scales(w, in);
    int kind = find_kind(w);
    int tiled = tokens >= TILE_TOKENS && (w->group == w->in || w->group % 16 == 0);
    for (int64_t i = first; i < last;) {
        if (tiled && last - i >= TILE_ROWS) {
            multiply_tile(w, in, kind, input, tokens, bias, y, stride, i, scratch);
            i += TILE_ROWS;
            continue;
        }
        int rows = last - i < ROWS ? (int)(last - i) : ROWS;
        multiply_rows(w, in, kind, plan, input, tokens, bias, y, stride, i, rows, scratch);
        i += rows;
    }
}

/* ---- float32 ---------------------------------------------------------------------------------- */

/* The bytes of a row in natural order, from which the middle or a zero point is to be subtracted;
 * up to 127 bytes behind them are written. */
AVX2 static void unpack_bytes(const cptq_weight *w, int64_t row, uint8_t *out)
{
    unpack_natural(w->bits, w->codes + row * w->code_words, w->in, out);
    if (!w->levels)
        return;
    level_table table = read_levels(w->bits, w->levels);
    for (int64_t j = 0; j < w->in; j += 32) {
        __m256i code = _mm256_loadu_si256((const __m256i *)(out + j));
        __m256i level = look_up(MOST_LEVEL_BITS, code, &table);
        _mm256_storeu_si256((__m256i *)(out + j),
                            _mm256_xor_si256(level, _mm256_set1_epi8((char)LEVEL_MIDDLE)));
    }
}

AVX2 static void dequantize(const cptq_weight *w, int64_t row, float *out, void *scratch)
{
    row_parts parts = divide_scratch(w, 1, scratch);
    read_scales(w, row, 1, parts);
    read_zeros(w, row, 1, 0.0f, parts);
    const uint8_t *bytes = parts.bytes;
    unpack_bytes(w, row, parts.bytes);
    float middle = (float)find_middle(w);
    for (int64_t g = 0, j = 0; g < count_groups(w); g++) {
        float zero = w->zero ? parts.zero[g] : middle, scale = parts.scale[g];
        int64_t last = j + w->group;
        for (; j + 8 <= last; j += 8)
            _mm256_storeu_ps(out + j, _mm256_mul_ps(_mm256_sub_ps(widen(bytes + j),
                                                                  _mm256_set1_ps(zero)),
                                                    _mm256_set1_ps(scale)));
        for (; j < last; j++)
            out[j] = ((float)bytes[j] - zero) * scale;
    }
}

/* one row times some tokens; `width` inputs at once, which divide a group */
INLINE void multiply_floats(int tokens, int width, const cptq_weight *w, const row_parts *row,
                            const char *x, size_t x_stride, float bias, float *y, int64_t stride)
{
    /* sums that run side by side, so that additions need not wait for one another */
    const int parts = tokens == 1 ? width / 8 : 1;
    const uint8_t *bytes = row->bytes;
    __m256 all[4], part[4];
    for (int t = 0; t < tokens; t++)
        all[t] = _mm256_setzero_ps();
    for (int64_t g = 0, j = 0; g < count_groups(w); g++) {
        __m256 scale = _mm256_broadcast_ss(row->scale + g);
        __m256 zero =
            _mm256_set1_ps(w->zero ? row->zero[g] : (float)find_middle(w));
        for (int k = 0; k < tokens * parts; k++)
            part[k] = _mm256_setzero_ps();
        for (int64_t last = j + w->group; j < last; j += width)
            UNROLL for (int k = 0; k < width / 8; k++) {
                __m256 step = _mm256_sub_ps(widen(bytes + j + 8 * k), zero);
                UNROLL for (int t = 0; t < tokens; t++) {
                    const float *token = (const float *)(x + (size_t)t * x_stride);
                    int at = tokens == 1 ? k : t;
                    part[at] = _mm256_fmadd_ps(step, _mm256_loadu_ps(token + j + 8 * k), part[at]);
                }
            }
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < parts; k++)
                all[t] = _mm256_fmadd_ps(part[t + k], scale, all[t]);
    }
    for (int t = 0; t < tokens; t++)
        y[t * stride] = add_lanes(all[t]) + bias;
}

AVX2 static void multiply_exact(const cptq_weight *w, const char *x, size_t x_stride,
                                int64_t tokens, const float *bias, float *y, int64_t stride,
                                int64_t first, int64_t last, void *scratch)
{
    if (w->group % 16) {
        cptq_portable.multiply_exact(w, x, x_stride, tokens, bias, y, stride, first, last, scratch);
        return;
    }
    row_parts row = divide_scratch(w, 1, scratch);
    int wide = w->group % 32 == 0;
    for (int64_t i = first; i < last; i++) {
        float add = bias ? bias[i] : 0.0f, *to = y + i;
        int64_t t = 0;
        read_scales(w, i, 1, row);
        read_zeros(w, i, 1, 0.0f, row);
        unpack_bytes(w, i, row.bytes);
        for (; t + 4 <= tokens; t += 4)
            multiply_floats(4, 16, w, &row, x + (size_t)t * x_stride, x_stride, add,
                            to + t * stride, stride);
        for (; t < tokens; t++) {
            const char *token = x + (size_t)t * x_stride;
            if (wide)
                multiply_floats(1, 32, w, &row, token, x_stride, add, to + t * stride, stride);
            else
                multiply_floats(1, 16, w, &row, token, x_stride, add, to + t * stride, stride);
        }
    }
}

static const implementation avx2 = {"avx2", planes, quantize, scratch_bytes, multiply, dequantize, multiply_exact};

/* By way of float16, which has the 5 exponent bits of e5m2, and one more than e4m3 has: its numbers
 * come out 2^8 times too small. Subnormal ones are converted like all others. */
AVX2 int64_t cptq_widen_float8_avx2(const uint8_t *x, float *y, int64_t n, int e4m3)
{
    const __m256i sign = _mm256_set1_epi16((short)0x8000), rest = _mm256_set1_epi16(0x3f80);
    const __m256 factor = _mm256_set1_ps(256.0f);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(x + i)));
        __m256i halves = _mm256_slli_epi16(bits, 8);
        if (e4m3)
            halves = _mm256_or_si256(_mm256_and_si256(halves, sign),
                                     _mm256_and_si256(_mm256_slli_epi16(bits, 7), rest));
        __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
        _mm256_storeu_ps(y + i, e4m3 ? _mm256_mul_ps(low, factor) : low);
        _mm256_storeu_ps(y + i + 8, e4m3 ? _mm256_mul_ps(high, factor) : high);
    }
    return i;
}

const implementation *cptq_find_avx2(void)
{
    unsigned a, b, c = 0, d;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
        return NULL;
    /* older compilers do not know f16c by name: bit 29 of leaf 1 */
    return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1 ? &avx2 : NULL;
}

#else

const implementation *cptq_find_avx2(void) { return NULL; }
int64_t cptq_widen_float8_avx2(const uint8_t *x, float *y, int64_t n, int e4m3)
{
    (void)x, (void)y, (void)n, (void)e4m3;
    return 0;
}

#endif
