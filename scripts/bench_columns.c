/* A product that leaves out the columns of zero inputs, for scripts/bench_columns: one token, codes
 * of 8 bits that stand input by input, (in, out), and scales by group, (in / group, out). Sums are
 * float32, four columns at a time, for `TILE` outputs that stay in the first cache. */
#include <stdint.h>
#include <string.h>

#define TILE 1024

__attribute__((target_clones("arch=x86-64-v3", "default"))) static void add_four(
    float *restrict sums, const int8_t *restrict a, const int8_t *restrict b,
    const int8_t *restrict c, const int8_t *restrict d, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        sums[i] += x[0] * (float)a[i] + x[1] * (float)b[i] + (x[2] * (float)c[i] + x[3] * (float)d[i]);
}

__attribute__((target_clones("arch=x86-64-v3", "default"))) static void add_scaled(
    float *restrict y, const float *restrict sums, const float *restrict scale, int n)
{
    for (int i = 0; i < n; i++)
        y[i] += sums[i] * scale[i];
}

void multiply_columns(const int8_t *codes, const float *scale, int group, const float *x, int in,
                      int out, float *y)
{
    memset(y, 0, sizeof(float) * (size_t)out);
    for (int first = 0; first < out; first += TILE) {
        int n = out - first < TILE ? out - first : TILE;
        for (int g = 0; g < in / group; g++) {
            float sums[TILE] = {0.0f}, taken[4] = {0.0f};
            const int8_t *column[4] = {codes + first, codes + first, codes + first, codes + first};
            int count = 0, any = 0;
            for (int j = g * group; j < (g + 1) * group; j++) {
                if (x[j] == 0.0f)
                    continue;
                column[count] = codes + (int64_t)j * out + first;
                taken[count++] = x[j];
                any = 1;
                if (count == 4) {
                    add_four(sums, column[0], column[1], column[2], column[3], taken, n);
                    count = 0;
                    memset(taken, 0, sizeof taken);
                }
            }
            if (count)
                add_four(sums, column[0], column[1], column[2], column[3], taken, n);
            if (any)
                add_scaled(y + first, sums, scale + (int64_t)g * out + first, n);
        }
    }
}
