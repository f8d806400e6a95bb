"""Constraint sets: what each runtime loads, so that plans contain nothing else.

The table is measured on the unmodified tools (transformers 5.23 with compressed-tensors 0.20,
llama.cpp) and from vLLM's source (0.33; not run here):

| runtime      | bits    | groups                   | dimensions           | scales  | vocabulary |
|--------------|---------|--------------------------|----------------------|---------|------------|
| transformers | 2 to 8  | any that divide, channel | any                  | any     | fp8        |
| vllm         | 4, 8    | 32, 64, 128, channel     | both multiples of 32 | any     | none       |
| llamacpp     | 4, 5, 8 | 32                       | inputs of 32         | float16 | 4, 5, 8    |
|              | 3, 6    | 16                       | inputs of 256        | `k`     | 3, 6       |
| cptq         | 2 to 8  | any that divide, channel | any                  | any     | 3 to 8     |

All runtimes take any layer at 16 bits. The vocabulary is the token embedding and the output head,
which most models share; fp8 are 8-bit floats without scales. Only `cptq`, which is cptq's own
(`cptq.inference`), and `llamacpp` take it packed, and asymmetric grids (llama.cpp at 4 and 5 bits:
its Q4_1 and Q5_1) and the Conv1D of GPT-2. llama.cpp's 3 and 6 bits are its Q3_K and Q6_K
(`layouts.gguf`). These two take uneven levels as well: `cptq` at 2 to 6 bits, llama.cpp at 4, its
IQ4_NL. With 16-bit scales they would lie in Q4_0 and Q8_0, in whose bytes 4 and 8 bits
are better, so they are not offered. The GGUF file for llama.cpp is exported from an
artifact: `packed` if it has one of these, else `compressed-tensors`.
Query, key and value, and gate and up, are one decision in every plan, as vLLM requires for the
matrices that it fuses. vLLM also takes 2, 3, 5 and 6 bits by a fallback kernel, which is not
verified here; `--runtime transformers` plans for it.

`transformers` takes a mixture of experts, all of them in one scheme (`allocation.experts`), if cptq
can split its stacked experts (`checkpoint.experts`): a stack would stay dense, and dense experts
beside quantized attention do not load. The other runtimes refuse it: vLLM's experts are not
verified, and cptq's own modules and llama.cpp's files hold single linear layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cptq.errors import ModelError, UnknownNameError, UsageError
from cptq.layouts.gguf import SUPER_GROUP, SUPER_TYPES
from cptq.layouts.levels import GGML_NONLINEAR, NONLINEAR
from cptq.registry import Facts, find_closest
from cptq.types import SUPER_SCALES, Candidate, LayerSpec, is_expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What one program takes.

    `format` is the file format that is written for it, `wide_format` the one where that cannot hold
    an asymmetric grid or a Conv1D. `bits` and `groups` are what a packed layer may have (16 bits is
    always allowed; group 0: per channel; no `groups`: any), `asymmetric` those of the bits that it
    may have on an asymmetric grid; `group_size` is the default. `out_multiple` and `in_multiple`
    must divide a packed layer's dimensions, `float16_scales` asks for scales that float16 holds
    exactly, `experts` whether a mixture of experts in one scheme is taken. `conv1d` says that it
    takes the Conv1D of GPT-2, `vocabulary` which widths it takes token embeddings and output heads
    in, `float8` that it takes them, and scales, as 8-bit floats, `row_scales` that it takes scales
    as codes times a factor per row, `levels` which tables of uneven levels it takes, `super_bits`
    which of the bits it takes with `k` scales and no others, `sparse` that it takes sparse weights,
    `activation_sparsity` that it drops inputs by stored rules.
    `next_step` is what to type with the artifact, if more is needed. `gguf`: what the program loads
    is a GGUF file that is exported from the artifact, so targets count that file. `facts`: what
    `cptq methods` says.
    """

    name: str
    format: str
    bits: tuple[int, ...]
    default_bits: tuple[int, ...]
    group_size: int
    groups: tuple[int, ...] = ()
    out_multiple: int = 1
    in_multiple: int = 1
    float16_scales: bool = False
    experts: bool = False
    wide_format: str | None = None
    asymmetric: tuple[int, ...] = ()
    conv1d: bool = False
    vocabulary: tuple[int, ...] = ()
    float8: bool = False
    row_scales: bool = False
    super_bits: tuple[int, ...] = ()
    levels: tuple[str, ...] = ()
    sparse: bool = False
    activation_sparsity: bool = False
    next_step: str | None = None
    gguf: bool = False
    facts: Facts | None = None

    def check_wider(self, *options: str) -> None:
        """Refuse given options that only other runtimes take.

        Raises:
            UsageError: names the option and the runtimes that take it.
        """
        for option in options:
            if not self._takes(option):
                others = [name for name, known in RUNTIMES.items() if known._takes(option)]
                raise UsageError(
                    f"--runtime {self.name} does not take {option}",
                    allowed=f"--runtime {' or '.join(others)}",
                )

    def _takes(self, option: str) -> bool:
        taken = {
            "--asymmetric": bool(self.asymmetric),
            "--embedding-bits": bool(self.list_vocabulary_bits()),
            "--sparsity": self.sparse,
            "--activation-sparsity": self.activation_sparsity,
        }
        return taken[option]

    def list_vocabulary_bits(self) -> tuple[int, ...]:
        """Return the widths below 16 bits in which the runtime takes embeddings and heads."""
        return self.vocabulary or ((8,) if self.float8 else ())

    def list_scale_kinds(self) -> tuple[str, ...]:
        """Return the ways to store scales in fewer than 16 bits that the runtime takes."""
        return (("e4m3", "e5m2") if self.float8 else ()) + (("row",) if self.row_scales else ())

    def list_16bit_widths(self) -> tuple[int, ...]:
        """Return the widths that the runtime takes with 16-bit scales, and 16 itself."""
        return (*(width for width in self.bits if width not in self.super_bits), 16)

    def choose_grid(self, candidate: Candidate) -> Candidate:
        """Return the candidate with the scales and groups that its width has in this runtime."""
        plain = candidate.symmetric and not (
            candidate.sparsity or candidate.float8 or candidate.levels
        )
        if candidate.bits not in self.super_bits or candidate.scales or not plain:
            return candidate
        return replace(candidate, group_size=SUPER_GROUP, scales=SUPER_SCALES)

    def format_for(
        self,
        layers: Iterable[LayerSpec],
        *,
        asymmetric: bool,
        vocabulary: bool = False,
        uneven: bool = False,
    ) -> str:
        """Return the file format that holds these layers, with asymmetric grids, a packed
        vocabulary or uneven levels if so."""
        conv1d = any(layer.compressible and layer.kind == "conv1d" for layer in layers)
        wide = asymmetric or conv1d or vocabulary or uneven
        return self.wide_format if self.wide_format and wide else self.format

    def check(self, bits: Sequence[int], group_size: int) -> None:
        """Refuse bit widths and a group size that the runtime does not take.

        Raises:
            UsageError: names what it takes.
        """
        wrong = [width for width in bits if width not in (*self.bits, 16)]
        if wrong:
            raise UsageError(
                f"--bits holds {', '.join(map(str, wrong))}, which --runtime {self.name} does not "
                "take",
                allowed=", ".join(map(str, (*self.bits, 16))),
            )
        if self.groups and group_size not in self.groups:
            raise UsageError(
                f"--group-size is {group_size}, which --runtime {self.name} does not take",
                allowed=self._spell_groups(),
            )

    def explain_refusal(self, layer: LayerSpec, candidate: Candidate, group: int) -> str | None:
        """Return why the runtime does not take a layer packed like this; None if it does.

        Args:
            layer: the layer.
            candidate: how it is stored; a dense one is always taken.
            group: the group size that the layer really has; `in_features` is per channel.
        """
        if candidate.dense:
            return None
        out, inputs = layer.shape
        if candidate.float8:
            return None if self.float8 else f"{self.name} takes no 8-bit floats"
        if layer.kind in ("embedding", "head") and candidate.bits not in self.vocabulary:
            taken = ", ".join(map(str, self.vocabulary)) or "no"
            return f"{self.name} takes embeddings and heads of {taken} bits, not {candidate.bits}"
        if candidate.bits not in self.bits:
            return f"{self.name} takes {', '.join(map(str, self.bits))} bits, not {candidate.bits}"
        supers = candidate.scales == SUPER_SCALES
        if (candidate.bits in self.super_bits) != supers:
            kind = "no k scales" if supers else f"k scales, in groups of {SUPER_GROUP},"
            return f"{self.name} takes {kind} at {candidate.bits} bits"
        if candidate.scales and not supers and candidate.scales not in self.list_scale_kinds():
            return f"{self.name} takes no {candidate.scales} scales"
        if candidate.levels and candidate.levels not in self.levels:
            return f"{self.name} takes no {candidate.levels} levels"
        if candidate.sparsity and not self.sparse:
            return f"{self.name} takes no sparse weights"
        if not candidate.symmetric and candidate.bits not in self.asymmetric:
            taken = ", ".join(map(str, self.asymmetric)) or "none"
            return f"{self.name} takes asymmetric grids of {taken} bits, not {candidate.bits}"
        if out % self.out_multiple or inputs % self.in_multiple:
            least = f"inputs that {self.in_multiple} divides"
            both = f"outputs and {least}" if self.out_multiple > 1 else least
            return f"{self.name} takes {both}, and this is {out} x {inputs}"
        real = 0 if group == inputs and group not in self.groups else group
        if self.groups and real not in self.groups and not supers:
            what = f"groups of {group}" if real else "one scale per channel"
            return f"{self.name} takes {self._spell_groups()}, not {what}"
        return None

    def check_tensors(self, names: Iterable[str]) -> None:
        """Refuse a mixture of experts that the runtime or cptq cannot take.

        Raises:
            ModelError: a tensor belongs to an expert.
        """
        experts = [name for name in names if is_expert(name)]
        if experts and not self.experts:
            raise ModelError(
                f"the model is a mixture of experts ({experts[0]}), which --runtime {self.name} "
                "does not take",
                allowed="--runtime transformers, or models without experts",
            )

    def _spell_groups(self) -> str:
        sizes = [str(size) for size in self.groups if size]
        per_channel = ["0 (per channel)"] if 0 in self.groups else []
        return "groups of " + ", ".join(sizes + per_channel)


RUNTIMES: Mapping[str, Runtime] = {
    "transformers": Runtime(
        name="transformers",
        format="compressed-tensors",
        experts=True,
        bits=(2, 3, 4, 5, 6, 7, 8),
        default_bits=(2, 3, 4, 5, 6, 8, 16),
        group_size=64,
        float8=True,
        facts=Facts(
            does="compressed-tensors: 2 to 8 bits, 8-bit floats for the vocabulary",
            source="transformers",
            good="default: perplexity 27.11 at 113.2 MB, dense 26.94 at 269.1 MB (SmolLM2)",
        ),
    ),
    "vllm": Runtime(
        name="vllm",
        format="compressed-tensors",
        bits=(4, 8),
        default_bits=(4, 8, 16),
        group_size=64,
        groups=(32, 64, 128, 0),
        out_multiple=32,
        in_multiple=32,
        facts=Facts(
            does="vLLM's kernels: 4 and 8 bits, vocabulary at 16",
            source="vLLM",
            good="serving; taken from vLLM's source, not run here",
        ),
    ),
    "llamacpp": Runtime(
        name="llamacpp",
        format="compressed-tensors",
        bits=(3, 4, 5, 6, 8),
        default_bits=(3, 4, 5, 6, 8, 16),
        group_size=32,
        groups=(32,),
        in_multiple=32,
        float16_scales=True,
        super_bits=tuple(SUPER_TYPES),
        levels=(GGML_NONLINEAR,),
        wide_format="packed",
        asymmetric=(4, 5),
        conv1d=True,
        vocabulary=(3, 4, 5, 6, 8),
        next_step="cptq export {out} --format gguf",
        gguf=True,
        facts=Facts(
            does="llama.cpp by cptq export --format gguf: 3, 4, 5, 6, 8 bits",
            source="llama.cpp",
            good="perplexity 27.17 at 105.5 MB as GGUF, Q4_K_M 28.86 (SmolLM2-135M)",
        ),
    ),
    "cptq": Runtime(
        name="cptq",
        format="packed",
        bits=(2, 3, 4, 5, 6, 7, 8),
        default_bits=(2, 3, 4, 5, 6, 8, 16),
        group_size=64,
        asymmetric=(2, 3, 4, 5, 6, 7, 8),
        conv1d=True,
        vocabulary=(3, 4, 5, 6, 7, 8),
        row_scales=True,
        levels=(NONLINEAR,),
        sparse=True,
        activation_sparsity=True,
        facts=Facts(
            does="cptq's own modules: 2 to 8 bits, packed vocabulary, zero points, sparsity",
            source="docs/format-packed.md",
            good="the smallest: perplexity 29.54 at 67.3 MB, 5.7x the decoding of dense",
        ),
    ),
}
DEFAULT_RUNTIME = "transformers"


def find_runtime(name: str) -> Runtime:
    """Return the constraint set called `name`.

    Raises:
        UnknownNameError: it does not exist; the message lists those that do.
    """
    if name not in RUNTIMES:
        near = find_closest(name, list(RUNTIMES))
        raise UnknownNameError(
            f"unknown runtime {name!r}",
            allowed=", ".join(RUNTIMES),
            hint=f"did you mean {near!r}?" if near else None,
        )
    return RUNTIMES[name]
