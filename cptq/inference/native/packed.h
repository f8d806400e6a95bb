/* Products with packed weights on the CPU: the public interface.
 *
 * A weight is described by a `cptq_weight`, whose pointers lead straight to the tensors of
 * docs/format-packed.md (mapped files may stay mapped). Nothing is repacked and nothing is kept
 * between calls. Sparse weights (a bitmask or 2:4) are not supported.
 *
 * Two levels:
 *
 *   cptq_linear, cptq_rows           whole operations; they allocate, and divide rows over threads.
 *   cptq_prepare, cptq_compute,      parts, for a caller that has a parallel region and a workspace
 *   cptq_dequantize                  of its own: no allocation, no threads, no locks.
 *
 * Functions that return int return 0, or a negative `CPTQ_E...`. They are safe to call from several
 * threads, as long as these write to different memory.
 */
#ifndef CPTQ_PACKED_H
#define CPTQ_PACKED_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* grows when a struct or a meaning below changes */
#define CPTQ_ABI_VERSION 4

enum cptq_type { CPTQ_F32 = 0, CPTQ_F16 = 1, CPTQ_BF16 = 2, CPTQ_ROW_CODES = 3 };
enum cptq_error { CPTQ_EWEIGHT = -1, CPTQ_EMEMORY = -2, CPTQ_EINDEX = -3 };

/* A weight (out, in). The weight of input j in row i is (u - v) s: u is value j of the bitstream of
 * row i, v the group's value in `zero` (without one 2^(bits - 1)), s the group's scale. With `levels`
 * it is levels[u] s. */
typedef struct {
    int32_t bits;  /* 2..8 */
    int32_t group; /* inputs of a group, a divisor of `in`; `in` itself per channel */
    int32_t out, in;
    const uint32_t *codes; /* out rows of code_words words */
    int64_t code_words;
    const void *scale;   /* out rows of `in / group` numbers, or of scale_words words of codes */
    int32_t scale_type;  /* enum cptq_type; CPTQ_ROW_CODES: 6-bit codes times `factor` */
    int32_t factor_type; /* type of `factor`, not CPTQ_ROW_CODES */
    const void *factor;  /* out numbers, or NULL */
    const uint32_t *zero; /* out rows of zero_words words, or NULL */
    int64_t scale_words, zero_words;
    const int8_t *levels; /* 2^bits of them in -127..127, at most 6 bits and no `zero`; or NULL */
} cptq_weight;

int cptq_abi_version(void);

/* The instructions in use: "avx2" or "portable". The environment variable CPTQ_CPU=portable,
 * read at the first call of any function, asks for the latter. */
const char *cptq_cpu_features(void);

/* CPTQ_EWEIGHT where the fields contradict one another or the format. The parts below trust them. */
int cptq_check(const cptq_weight *w);

/* y (tokens, out) = x (tokens, in) W^T + bias, row-major and without gaps; bias may be NULL.
 * exact 0: x is rounded to 8 bits with one scale per 32 inputs; 1: float32 throughout.
 * threads: the most to use; small products use one. */
int cptq_linear(const cptq_weight *w, const float *x, int64_t tokens, const float *bias, float *y,
                int exact, int threads);

/* out (n, in) = the rows `ids` of W, float32; ids NULL: rows 0..n-1. CPTQ_EINDEX: no such row. */
int cptq_rows(const cptq_weight *w, const int64_t *ids, int64_t n, float *out, int threads);

/* ---- parts ------------------------------------------------------------------------------- */

/* Bytes of an input prepared for one token, and of the scratch memory of one thread. Both are
 * multiples of 64, and the memory must be aligned to 64. */
size_t cptq_input_bytes(const cptq_weight *w, int exact);
size_t cptq_scratch_bytes(const cptq_weight *w, int64_t tokens, int exact);

/* Whether an input prepared for `a` may be used for `b` (query, key and value; gate and up). */
int cptq_same_input(const cptq_weight *a, const cptq_weight *b, int exact);

/* Prepare tokens [first, last) of x for `cptq_compute`: token t goes to input + t *
 * cptq_input_bytes. Threads may share the tokens among them; a barrier must follow. */
void cptq_prepare(const cptq_weight *w, const float *x, int64_t first, int64_t last, int exact,
                  void *input);

/* The first row of thread k of n (k = n: `rows`); shares are whole multiples of 16 rows, but for the
 * last one. */
int64_t cptq_find_share(int64_t rows, int k, int n);

/* Rows [first, last) of the product, for all tokens: y[t * stride + i] = (x W^T)[t][i] + bias[i].
 * `scratch` belongs to the thread alone. */
void cptq_compute(const cptq_weight *w, const void *input, int64_t tokens, const float *bias,
                  float *y, int64_t stride, int64_t first, int64_t last, int exact, void *scratch);

/* Row i as float32; `out` holds `in` numbers, `scratch` as for one token. */
void cptq_dequantize(const cptq_weight *w, int64_t row, float *out, void *scratch);

#ifdef __cplusplus
}
#endif
#endif
