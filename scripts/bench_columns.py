#!/usr/bin/env python3
"""Whether leaving out columns pays for one token: the packed kernel against columns of 8 bits.

    scripts/bench_columns [--shape 2048x8192]

The packed kernel reads codes row by row, 32 inputs at a time, and cannot leave out single inputs. A
copy of the codes that stands input by input can: it reads those of the other inputs alone. Printed
are processor microseconds of one product of each, by the share of inputs that are 0 at random, with
weights colder than the cache; then the share of runs of 32 inputs that are 0 altogether, which is
what the packed kernel could leave out. The C below is compiled by `cc`.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cptq.inference import operations
from cptq.inference.operations import PackedWeight
from cptq.numerics.packing import pack_rows, unpack_rows
from cptq.types import Candidate

SHARES = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 0.95)
#: bytes of weights that a turn goes through, more than a cache holds
COLD = 96 << 20
TURNS, GROUP, RUN = 5, 64, 32
#: codes of 8 bits that stand input by input, (in, out), and scales by group, (in / group, out);
#: sums are float32, four columns at a time, for TILE outputs that stay in the first cache
SOURCE = r"""
#include <stdint.h>
#include <string.h>

#define TILE 1024

__attribute__((target_clones("arch=x86-64-v3", "default"))) static void add_four(
    float *restrict sums, const int8_t *restrict a, const int8_t *restrict b,
    const int8_t *restrict c, const int8_t *restrict d, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        sums[i] += x[0] * (float)a[i] + x[1] * (float)b[i] +
                   (x[2] * (float)c[i] + x[3] * (float)d[i]);
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
"""


def compile_library(folder: str) -> ctypes.CDLL:
    """Compile the source and declare its function."""
    source, path = Path(folder) / "columns.c", Path(folder) / "columns.so"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run(["cc", "-O3", "-shared", "-fPIC", "-o", path, source], check=True)
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.multiply_columns.argtypes = (
        *(pointer, pointer, number, pointer),
        number,
        number,
        pointer,
    )
    return library


def time_each(run: Callable[[int], object], copies: int) -> float:
    """Return processor microseconds of one call, the least of some turns through all copies."""
    taken = []
    for _ in range(TURNS):
        began = time.process_time()
        for k in range(copies):
            run(k)
        taken.append(time.process_time() - began)
    return min(taken) / copies * 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="2048x8192", help="outputs x inputs")
    out, inputs = map(int, parser.parse_args().shape.split("x"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    copies = -(-COLD // (out * inputs // 2))
    weights = []
    for _ in range(copies):
        codes_OI = torch.randint(-8, 8, (out, inputs), dtype=torch.int8)
        scale_OG = (torch.rand(out, inputs // GROUP) + 0.5).half()
        scheme = Candidate(bits=4, group_size=GROUP)
        shape, codes = (out, inputs), pack_rows(codes_OI, 4)
        weights.append(PackedWeight(scheme=scheme, shape=shape, codes=codes, scale=scale_OG))
    columns = [unpack_rows(w.codes, 4, inputs).T.contiguous() for w in weights]
    scales = [w.scale.float().T.contiguous() for w in weights]
    y_O = torch.empty(out)
    print(f"{out} x {inputs}, one token, one thread, {copies} weights in turns")
    print(
        "| inputs that are 0 | packed, 4 bits, us | columns, 8 bits, us | runs of 32 that are 0 |"
    )
    print("|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(folder)
        for share in SHARES:
            x_I = torch.randn(inputs).masked_fill(torch.rand(inputs) < share, 0.0)

            def multiply(k: int, x_I: torch.Tensor = x_I) -> torch.Tensor:
                library.multiply_columns(
                    columns[k].data_ptr(),
                    scales[k].data_ptr(),
                    GROUP,
                    x_I.data_ptr(),
                    inputs,
                    out,
                    y_O.data_ptr(),
                )
                return y_O

            with operations.exact_products():
                expected_O = operations.linear(x_I, weights[0], None)
            torch.testing.assert_close(multiply(0), expected_O, rtol=1e-3, atol=1e-2)
            rows = time_each(lambda k, x_I=x_I: operations.linear(x_I, weights[k], None), copies)
            runs = float((x_I.view(-1, RUN) == 0).all(1).float().mean())
            took = time_each(multiply, copies)
            print(f"| {share:.0%} | {rows:.0f} | {took:.0f} | {runs:.1%} |", flush=True)


if __name__ == "__main__":
    main()
