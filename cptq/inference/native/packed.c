/* The interface of packed.h: choice of an implementation, checks, workspaces and threads.
 *
 * Rows are divided among OpenMP threads in runs of 16, where a product is large enough that waking
 * threads (some microseconds) does not show. Without OpenMP everything runs on one thread. Built
 * into a process that has loaded torch, `omp` is torch's own pool, if both use libgomp.
 */
#include "internal.h"

#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* fewest weights times tokens for which a second thread is woken */
#define WORTH_THREADS (1 << 19)

static const implementation *choose(void)
{
    /* a race writes the same pointer twice */
    static const implementation *chosen;
    if (!chosen) {
        const char *asked = getenv("CPTQ_CPU");
        const implementation *fast = cptq_find_avx2();
        chosen = fast && !(asked && strcmp(asked, "portable") == 0) ? fast : &cptq_portable;
    }
    return chosen;
}

int cptq_abi_version(void) { return CPTQ_ABI_VERSION; }

const char *cptq_cpu_features(void) { return choose()->name; }

static int64_t count_words(int64_t values, int bits) { return (values * bits + 31) / 32; }

int cptq_check(const cptq_weight *w)
{
    if (w->bits < 2 || w->bits > 8 || w->in < 1 || w->out < 0 || w->group < 1 || w->in % w->group)
        return CPTQ_EWEIGHT;
    if (w->scale_type < CPTQ_F32 || w->scale_type > CPTQ_ROW_CODES)
        return CPTQ_EWEIGHT;
    if (!w->codes || !w->scale || w->code_words != count_words(w->in, w->bits))
        return CPTQ_EWEIGHT;
    if (w->levels && (w->bits > MOST_LEVEL_BITS || w->zero))
        return CPTQ_EWEIGHT;
    if (w->zero && w->zero_words != count_words(count_groups(w), w->bits))
        return CPTQ_EWEIGHT;
    if (w->scale_type != CPTQ_ROW_CODES)
        return 0;
    if (!w->factor || w->factor_type < CPTQ_F32 || w->factor_type > CPTQ_BF16 ||
        w->scale_words != count_words(count_groups(w), ROW_BITS))
        return CPTQ_EWEIGHT;
    return 0;
}

static input_layout describe(const cptq_weight *w)
{
    return describe_input(w, choose()->planes(w));
}

size_t cptq_input_bytes(const cptq_weight *w, int exact)
{
    return exact ? pad64((size_t)w->in * 4) : describe(w).bytes;
}

size_t cptq_scratch_bytes(const cptq_weight *w, int64_t tokens, int exact)
{
    if (exact)
        return row_scratch(w) + pad64((size_t)w->in * 4 + 64);
    return choose()->scratch_bytes(w, tokens);
}

int cptq_same_input(const cptq_weight *a, const cptq_weight *b, int exact)
{
    if (exact)
        return a->in == b->in;
    return a->in == b->in && a->group == b->group &&
           choose()->planes(a) == choose()->planes(b);
}

void cptq_prepare(const cptq_weight *w, const float *x, int64_t first, int64_t last, int exact,
                  void *input)
{
    input_layout in = describe(w);
    size_t bytes = cptq_input_bytes(w, exact);
    for (int64_t t = first; t < last; t++) {
        char *to = (char *)input + (size_t)t * bytes;
        if (exact)
            memcpy(to, x + t * w->in, (size_t)w->in * 4);
        else
            choose()->quantize(w, &in, x + t * w->in, to);
    }
}

void cptq_compute(const cptq_weight *w, const void *input, int64_t tokens, const float *bias,
                  float *y, int64_t stride, int64_t first, int64_t last, int exact, void *scratch)
{
    if (exact) {
        choose()->multiply_exact(w, input, cptq_input_bytes(w, 1), tokens, bias, y, stride, first,
                                 last, scratch);
        return;
    }
    input_layout in = describe(w);
    choose()->multiply(w, &in, input, tokens, bias, y, stride, first, last, scratch);
}

void cptq_dequantize(const cptq_weight *w, int64_t row, float *out, void *scratch)
{
    choose()->dequantize(w, row, out, scratch);
}

int64_t cptq_find_share(int64_t rows, int k, int n)
{
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    int64_t start = tiles * k / n * TILE_ROWS;
    return start < rows ? start : rows;
}

/* ---- whole operations ---------------------------------------------------------------------- */

static int count_threads(const cptq_weight *w, int64_t rows, int64_t tokens, int asked)
{
#ifdef _OPENMP
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    if (asked <= 1 || rows * w->in * tokens < WORTH_THREADS || omp_in_parallel())
        return 1;
    return (int)(asked < tiles ? asked : tiles);
#else
    (void)w, (void)rows, (void)tokens, (void)asked;
    return 1;
#endif
}

/* one product, as its threads see it */
typedef struct {
    const cptq_weight *w;
    const float *x, *bias;
    float *y;
    int64_t tokens;
    int exact;
    char *input, *scratch;
    size_t scratch_bytes; /* of one thread */
} job;

static void prepare_share(const job *j, int k, int team)
{
    if (!j->exact) /* exact products read x in place */
        cptq_prepare(j->w, j->x, j->tokens * k / team, j->tokens * (k + 1) / team, 0, j->input);
}

static void compute_share(const job *j, int k, int team)
{
    const cptq_weight *w = j->w;
    int64_t first = cptq_find_share(w->out, k, team);
    int64_t last = cptq_find_share(w->out, k + 1, team);
    char *scratch = j->scratch + (size_t)k * j->scratch_bytes;
    if (j->exact)
        choose()->multiply_exact(w, (const char *)j->x, (size_t)w->in * 4, j->tokens, j->bias, j->y,
                                 w->out, first, last, scratch);
    else
        cptq_compute(w, j->input, j->tokens, j->bias, j->y, w->out, first, last, 0, scratch);
}

static void run_job(const job *j, int threads)
{
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            int k = omp_get_thread_num(), team = omp_get_num_threads(); /* or fewer */
            prepare_share(j, k, team);
#pragma omp barrier
            compute_share(j, k, team);
        }
        return;
    }
#else
    (void)threads;
#endif
    prepare_share(j, 0, 1);
    compute_share(j, 0, 1);
}

int cptq_linear(const cptq_weight *w, const float *x, int64_t tokens, const float *bias, float *y,
                int exact, int threads)
{
    int error = cptq_check(w);
    if (error || tokens <= 0 || w->out == 0)
        return error;
    int n = count_threads(w, w->out, tokens, threads);
    size_t input_bytes = exact ? 0 : (size_t)tokens * cptq_input_bytes(w, exact);
    size_t scratch_bytes = cptq_scratch_bytes(w, tokens, exact);
    char *memory = aligned_alloc(64, pad64(input_bytes + (size_t)n * scratch_bytes));
    if (!memory)
        return CPTQ_EMEMORY;
    job j = {w, x, bias, y, tokens, exact, memory, memory + input_bytes, scratch_bytes};
    run_job(&j, n);
    free(memory);
    return 0;
}

int cptq_rows(const cptq_weight *w, const int64_t *ids, int64_t n, float *out, int threads)
{
    int error = cptq_check(w);
    if (error || n <= 0)
        return error;
    for (int64_t k = 0; k < n; k++) {
        int64_t id = ids ? ids[k] : k;
        if (id < 0 || id >= w->out)
            return CPTQ_EINDEX;
    }
    int team = count_threads(w, n, 1, threads);
    size_t bytes = row_scratch(w);
    char *memory = aligned_alloc(64, pad64((size_t)team * bytes));
    if (!memory)
        return CPTQ_EMEMORY;
#ifdef _OPENMP
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
#endif
    for (int64_t k = 0; k < n; k++) {
        int own = 0;
#ifdef _OPENMP
        own = team > 1 ? omp_get_thread_num() : 0;
#endif
        choose()->dequantize(w, ids ? ids[k] : k, out + k * w->in, memory + (size_t)own * bytes);
    }
    free(memory);
    return 0;
}
