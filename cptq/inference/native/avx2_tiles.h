/* Part of avx2.c: products with many tokens, by tiles of 16 rows and 512 inputs. */

/* products that fit into one sum of 16 bits */
static inline int count_sums(int kind)
{
    int bits = BITS(kind);
    if (kind & NARROW)
        return bits == 2 ? 4 : 2;
    return kind & WIDE ? 1 : bits <= 4 ? 8 : bits == 5 ? 4 : bits == 6 ? 2 : 1;
}

typedef struct {
    uint8_t *codes;     /* [inputs / 4][16 rows][4 inputs], in the order of the activations */
    float *scale;       /* [steps][16 rows] */
    float *zero;        /* the same, times what is subtracted from a code */
    int64_t step, steps; /* first one and number */
    int64_t block;      /* first one */
} tile;

/* 8 rows of 8 lanes become 8 lanes of 8 rows */
INLINE void transpose(__m256i *r)
{
    __m256i a[8], b[8];
    for (int k = 0; k < 8; k += 2) {
        a[k] = _mm256_unpacklo_epi32(r[k], r[k + 1]);
        a[k + 1] = _mm256_unpackhi_epi32(r[k], r[k + 1]);
    }
    for (int k = 0; k < 8; k += 4) {
        b[k] = _mm256_unpacklo_epi64(a[k], a[k + 2]);
        b[k + 1] = _mm256_unpackhi_epi64(a[k], a[k + 2]);
        b[k + 2] = _mm256_unpacklo_epi64(a[k + 1], a[k + 3]);
        b[k + 3] = _mm256_unpackhi_epi64(a[k + 1], a[k + 3]);
    }
    for (int k = 0; k < 4; k++) {
        r[k] = _mm256_permute2x128_si256(b[k], b[k + 4], 0x20);
        r[k + 4] = _mm256_permute2x128_si256(b[k], b[k + 4], 0x31);
    }
}

INLINE void unpack_tile(int kind, const int8_t *levels, const uint8_t *codes, int64_t row_bytes,
                        int64_t block, int64_t blocks, uint8_t *out)
{
    int size = unit_bytes(kind), planes = count_planes(kind);
    uint8_t copy[32];
    level_table table;
    if (kind >= NARROW)
        table = read_levels(kind, levels);
    for (int64_t b = 0; b < blocks; b++)
        for (int half = 0; half < 2; half++) {
            __m256i plane[8][4], lane[8];
            for (int r = 0; r < 8; r++) {
                const uint8_t *row = codes + (8 * half + r) * row_bytes;
                const uint8_t *at = find_block(row, row_bytes, block + b, size, copy);
                part_values(kind, load_units(BITS(kind), at), &table, plane[r]);
            }
            for (int p = 0; p < planes; p++) {
                for (int r = 0; r < 8; r++)
                    lane[r] = plane[r][p];
                transpose(lane);
                for (int k = 0; k < 8; k++)
                    _mm256_store_si256(
                        (__m256i *)(out + ((b * planes + p) * 8 + k) * 64 + 32 * half), lane[k]);
            }
        }
}

/* one step (16 or 32 inputs, `units` of four) of 16 rows for some tokens */
INLINE void multiply_step(int kind, int tokens, int units, const uint8_t *codes, const char *input,
                          size_t bytes, __m256i (*dot)[2])
{
    const int planes = count_planes(kind), most = count_sums(kind);
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i pairs[4][2], zero = _mm256_setzero_si256();
    int per = units / planes; /* lanes of a plane that belong to the step */
    for (int k = 0; k < 2 * tokens; k++)
        pairs[k / 2][k % 2] = dot[k / 2][k % 2] = zero;
    UNROLL for (int u = 0; u < units; u++) {
        int at = u / per * 8 + u % per; /* the unit, from the step's first one */
        __m256i row[2];
        for (int h = 0; h < 2; h++)
            row[h] = _mm256_load_si256((const __m256i *)(codes + 64 * at + 32 * h));
        UNROLL for (int t = 0; t < tokens; t++) {
            int32_t four;
            memcpy(&four, input + (size_t)t * bytes + 4 * at, 4);
            __m256i x = _mm256_set1_epi32(four);
            UNROLL for (int h = 0; h < 2; h++) {
                __m256i product = multiply_pairs(kind, row[h], x);
                pairs[t][h] = u % most ? _mm256_add_epi16(pairs[t][h], product) : product;
                KEEP(pairs[t][h]);
                if (u % most == most - 1 || u == units - 1) {
                    dot[t][h] =
                        _mm256_add_epi32(dot[t][h], _mm256_madd_epi16(pairs[t][h], ones));
                    KEEP(dot[t][h]);
                }
            }
        }
    }
}

/* a tile times some tokens, added to sum[token][16 rows] */
INLINE void run_tile(int kind, int tokens, int units, const tile *from, const input_layout *in,
                     const char *input, float *sum)
{
    const int planes = count_planes(kind), per_block = 8 * planes / units;
    const int lanes = 8 / per_block; /* lanes of a block that a step takes */
    for (int64_t k = 0; k < from->steps; k++) {
        int64_t b = k / per_block, block = from->block + b;
        int first = (int)(k % per_block) * lanes;
        __m256i dot[4][2];
        multiply_step(kind, tokens, units, from->codes + b * planes * 512 + 64 * first,
                      input + block * 32 * planes + 4 * first, in->bytes, dot);
        UNROLL for (int t = 0; t < tokens; t++) {
            const char *token = input + (size_t)t * in->bytes;
            __m256 by = _mm256_broadcast_ss((const float *)(token + in->lanes) + 8 * block + first);
            __m256 total = _mm256_broadcast_ss((const float *)(token + in->sums) + from->step + k);
            UNROLL for (int h = 0; h < 2; h++) {
                float *at = sum + 16 * t + 8 * h;
                __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(dot[t][h]), by);
                __m256 all = _mm256_fmadd_ps(value, _mm256_load_ps(from->scale + 16 * k + 8 * h),
                                             _mm256_load_ps(at));
                _mm256_store_ps(at, _mm256_fnmadd_ps(
                                        total, _mm256_load_ps(from->zero + 16 * k + 8 * h), all));
            }
        }
    }
}

#define TILE(name, kind)                                                                            \
    static AVX2 __attribute__((noinline)) void tile_##name(                                         \
        const int8_t *levels, const uint8_t *codes, int64_t row_bytes, int64_t blocks,              \
        const tile *to, const input_layout *in, const char *input, int64_t tokens, float *sum)      \
    {                                                                                               \
        int64_t t = 0;                                                                              \
        unpack_tile(kind, levels, codes, row_bytes, to->block, blocks, to->codes);                  \
        for (; in->step == CHUNK && t + 4 <= tokens; t += 4)                                        \
            run_tile(kind, 4, 8, to, in, input + (size_t)t * in->bytes, sum + 16 * t);              \
        for (; in->step == CHUNK && t < tokens; t++)                                                \
            run_tile(kind, 1, 8, to, in, input + (size_t)t * in->bytes, sum + 16 * t);              \
        for (; t + 4 <= tokens; t += 4)                                                             \
            run_tile(kind, 4, 4, to, in, input + (size_t)t * in->bytes, sum + 16 * t);              \
        for (; t < tokens; t++)                                                                     \
            run_tile(kind, 1, 4, to, in, input + (size_t)t * in->bytes, sum + 16 * t);              \
    }

KINDS(TILE)

typedef void (*tile_product)(const int8_t *, const uint8_t *, int64_t, int64_t, const tile *,
                             const input_layout *, const char *, int64_t, float *);
#define TILE_OF(name, kind) [kind] = tile_##name,
static const tile_product tiles[WIDE + 8] = {KINDS(TILE_OF)};

/* the scales of a tile's steps, and those times what is subtracted, rows side by side */
static void spread_scales(const cptq_weight *w, const input_layout *in, int kind, row_parts parts,
                          tile *to)
{
    float middle = IS_SIGNED(kind) ? 0.0f : (float)(1 << (w->bits - 1));
    for (int64_t k = 0; k < to->steps; k++) {
        int64_t g = (to->step + k) * in->step / w->group;
        for (int r = 0; r < TILE_ROWS; r++) {
            /* steps behind the last input belong to no group; their codes are 0 */
            int64_t at = r * in->groups + (g < in->groups ? g : in->groups - 1);
            float scale = parts.scale[at];
            to->scale[16 * k + r] = scale;
            to->zero[16 * k + r] = scale * (w->zero ? parts.zero[at] : middle);
        }
    }
}

/* rows [row, row + 16) for all tokens */
static void multiply_tile(const cptq_weight *w, const input_layout *in, int kind,
                          const char *input,
                          int64_t tokens, const float *bias, float *y, int64_t stride, int64_t row,
                          void *scratch)
{
    _Alignas(64) uint8_t codes[TILE_ROWS * TILE_INPUTS];
    _Alignas(64) float scale[TILE_ROWS * TILE_INPUTS / 16], zero[TILE_ROWS * TILE_INPUTS / 16];
    row_parts parts = divide_scratch(w, TILE_ROWS, scratch);
    float *sum = (float *)((char *)scratch + TILE_ROWS * row_scratch(w));
    int64_t size = 32 * in->planes, blocks = TILE_INPUTS / size;
    const uint8_t *from = (const uint8_t *)(w->codes + row * w->code_words);
    read_scales(w, row, TILE_ROWS, parts);
    read_zeros(w, row, TILE_ROWS, w->bits == 8 ? 128.0f : 0.0f, parts);
    memset(sum, 0, (size_t)tokens * TILE_ROWS * 4);
    for (int64_t b = 0; b < in->blocks; b += blocks) {
        int64_t count = in->blocks - b < blocks ? in->blocks - b : blocks;
        tile to = {codes, scale, zero, b * size / in->step, count * size / in->step, b};
        spread_scales(w, in, kind, parts, &to);
        tiles[kind](w->levels, from, w->code_words * 4, count, &to, in, input, tokens, sum);
    }
    for (int64_t t = 0; t < tokens; t++)
        for (int r = 0; r < TILE_ROWS; r++)
            y[t * stride + row + r] = sum[16 * t + r] + (bias ? bias[row + r] : 0.0f);
}
