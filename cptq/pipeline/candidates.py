"""The ways to store a unit that the options of a run name."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import get_weight
from cptq.compression.vocabulary import list_candidates as list_vocabulary_candidates
from cptq.config import AnalyzeSettings, CompressSettings, find_runtime, parse_sparsity
from cptq.config.runtimes import Runtime
from cptq.errors import UsageError
from cptq.layouts.gguf import GGUF_LAYOUT, SUPER_BLOCK
from cptq.pipeline.grids import choose_grids
from cptq.types import SUPER_SCALES, Candidate


def list_asymmetric_widths(settings: AnalyzeSettings | CompressSettings) -> tuple[int, ...]:
    """Return the widths that --asymmetric puts on asymmetric grids, by what the runtime takes."""
    return find_runtime(settings.runtime).asymmetric if settings.asymmetric else ()


def build_candidates(
    settings: AnalyzeSettings | CompressSettings,
    model: LoadedModel,
    bits: Sequence[int] | None = None,
) -> tuple[Candidate, ...]:
    """Return the candidates that the options name, at other `bits` where given.

    Widths with `k` scales are left out with --scales 16bit; those that no layer can have are, if
    the runtime names them and not the user.
    """
    runtime = find_runtime(settings.runtime)
    named = list_candidates(
        bits or settings.bits,
        settings.group_size,
        asymmetric=list_asymmetric_widths(settings),
        sparsity=settings.sparsity if bits is None else (),
    )
    narrow, uneven = settings.scales == "auto", settings.levels == "auto"
    if not narrow:
        named = tuple(c for c in named if runtime.choose_grid(c) == c)
    grids = choose_grids(model, named, runtime, scales=narrow, levels=uneven)
    chosen = map(runtime.choose_grid, grids)
    usual = bits is None and settings.bits == runtime.default_bits
    return tuple(c for c in chosen if not usual or _is_of_use(c, model))


def check_of_use(candidates: Sequence[Candidate], model: LoadedModel, runtime: Runtime) -> None:
    """Refuse widths of which no layer can have any.

    Raises:
        UsageError: names them.
    """
    packed = [candidate for candidate in candidates if not candidate.dense]
    if packed and not any(_is_of_use(candidate, model) for candidate in packed):
        widths = ", ".join(str(candidate.bits) for candidate in packed)
        others = ", ".join(map(str, runtime.list_16bit_widths()[:-1]))
        raise UsageError(
            f"--bits names {widths}, which --runtime {runtime.name} takes in layers whose inputs "
            f"{SUPER_BLOCK} divides, and this model has none",
            allowed=f"--bits with one of {others}",
        )


def _is_of_use(candidate: Candidate, model: LoadedModel) -> bool:
    """Whether some layer can have `k` scales, if the candidate has them."""
    if candidate.scales != SUPER_SCALES:
        return True
    specs = (spec for unit in model.all_units for spec in unit.layers)
    return any(GGUF_LAYOUT.explain_refusal(spec, candidate) is None for spec in specs)


def offer_vocabulary(
    model: LoadedModel, candidates: Sequence[Candidate]
) -> dict[str, tuple[Candidate, ...]]:
    """Return what each unit of the vocabulary may get of the candidates, in whatever runtime."""
    return {
        unit.name: list_vocabulary_candidates(
            get_weight(model.linear(unit.layers[0].name)), candidates
        )
        for unit in model.vocabulary
    }


def list_candidates(
    bits: Sequence[int],
    group_size: int,
    *,
    asymmetric: Collection[int] = (),
    sparsity: Sequence[str] = (),
) -> tuple[Candidate, ...]:
    """Return ways to store a unit, fewest bits first, each width dense and then at every sparsity.

    The widths in `asymmetric` lie on asymmetric grids; 16 bits keep a unit as it is.
    """
    kinds = [(0.0, "none"), *map(parse_sparsity, sparsity)]
    return tuple(
        Candidate(bits=16)
        if width == 16
        else Candidate(
            bits=width,
            group_size=group_size,
            symmetric=width not in asymmetric,
            sparsity=share,
            pattern=pattern,
        )
        for width in sorted(set(bits))
        for share, pattern in (kinds if width < 16 else kinds[:1])
    )
