/* A whole causal decoder on packed weights: the public interface.
 *
 * One call of `cptq_decode` takes tokens to logits: embedding, all blocks, final norm, head. Nothing
 * returns to the caller in between, which on a small model is most of what a token costs.
 *
 * Shapes are row-major. `cptq_weight` is that of packed.h; a projection with `out` 0 is absent.
 */
#ifndef CPTQ_DECODER_H
#define CPTQ_DECODER_H

#include "packed.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CPTQ_KEY_TILE 32

enum cptq_norm { CPTQ_RMS_NORM = 0, CPTQ_LAYER_NORM = 1 };
enum cptq_activation { CPTQ_SILU = 0, CPTQ_GELU_TANH = 1, CPTQ_GELU = 2, CPTQ_RELU = 3 };

/* Types of dense weights beside those of enum cptq_type: 8-bit floats, finite values only. */
enum cptq_float8 { CPTQ_E4M3 = 8, CPTQ_E5M2 = 9 };

/* Which inputs x of a packed weight, or outputs of a gate, are taken as 0 (docs/format-packed.md):
 * those of |x| at most the threshold; or at most mean + threshold * deviation of the token's |x|; or
 * outputs y of `gate` with |f(y)| at most the threshold. */
enum cptq_rule { CPTQ_KEEP_ALL = 0, CPTQ_KEEP_LARGE = 1, CPTQ_KEEP_SPREAD = 2, CPTQ_KEEP_GATE = 3 };

/* A packed weight, or where `dense` is not NULL a dense one (out, in), row-major, of which `weight`
 * holds only `out` and `in`. */
typedef struct {
    cptq_weight weight;
    const void *dense;
    int32_t dense_type; /* enum cptq_type or cptq_float8, not CPTQ_ROW_CODES */
    const float *bias;  /* (out,) or NULL */
    const float *threshold; /* one, or one for each input (of CPTQ_KEEP_GATE: output), or NULL */
    int64_t thresholds;     /* how many */
    int32_t rule;           /* enum cptq_rule; of a packed weight alone */
} cptq_projection;

/* One block, before-norm: h += attention(norm(h)); h += mlp(norm(h)). */
typedef struct {
    cptq_projection query, key, value, output;
    cptq_projection gate, up, down; /* without gate: down(f(up(x))), else down(f(gate(x)) * up(x)) */
    const float *attention_norm, *attention_norm_bias; /* (width,); biases may be NULL */
    const float *mlp_norm, *mlp_norm_bias;
    const float *query_norm, *key_norm; /* RMS norms of each head (head,), or NULL */
} cptq_block;

typedef struct {
    int64_t blocks, width, heads, key_heads, head; /* `head`: features of one head */
    int64_t inner;      /* features inside the MLP */
    int64_t vocabulary; /* logits */
    int64_t capacity;   /* tokens that the cache and the rotation hold; in whole CPTQ_KEY_TILEs */
    int32_t norm;       /* enum cptq_norm */
    int32_t activation; /* enum cptq_activation */
    int32_t exact;      /* as in cptq_linear */
    int32_t rules;      /* whether rules of projections are applied */
    float epsilon, scale; /* of the norms; of query times key */
    const cptq_block *block;
    cptq_projection embedding;
    const float *positions;   /* (capacity, width), added to the embedding, or NULL */
    const float *cosine, *sine; /* (capacity, head / 2) of the rotation of halves, or NULL */
    const float *final_norm, *final_norm_bias; /* (width,) */
    cptq_projection to_logits;
    /* the cache: (blocks, key_heads, capacity / CPTQ_KEY_TILE, head, CPTQ_KEY_TILE), finite where
     * there is no token yet, and (blocks, key_heads, capacity, head) */
    float *keys, *values;
} cptq_decoder;

/* Bytes of the workspace of a call with so many tokens and threads. */
size_t cptq_decoder_bytes(const cptq_decoder *d, int64_t tokens, int threads);

/* Run tokens `ids` at the positions start, start + 1, ...; the cache holds what came before and
 * takes what is new. logits (vocabulary,) are those of the last token, or, with `all`,
 * (tokens, vocabulary) of every one. CPTQ_EINDEX: an id outside the embedding, or no room in the
 * cache. CPTQ_EMEMORY: `bytes` are fewer than `cptq_decoder_bytes`. */
int cptq_decode(const cptq_decoder *d, const int64_t *ids, int64_t tokens, int64_t start, int all,
                float *logits, void *workspace, size_t bytes, int threads);

/* Convert `count` rows of a dense weight, from row `first` on, to float32 (count, in). */
int cptq_dense_rows(const cptq_projection *p, int64_t first, int64_t count, float *out);

#ifdef __cplusplus
}
#endif
#endif
