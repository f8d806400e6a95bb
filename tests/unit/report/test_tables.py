"""Tables of a report: pruning, verification, most sensitive units."""

from __future__ import annotations

from dataclasses import replace

from cptq.cli.output import MANY, make_leader_table
from cptq.report import Summary, VerificationFacts
from cptq.report.protocol import IN_DOMAIN
from cptq.report.speed import build_speed_table
from cptq.report.tables import (
    build_evaluation_table,
    build_pruning_tables,
    build_tables,
    describe_samples,
    describe_verification,
)
from cptq.types import SensitivityTable, SpeedReport
from tests.unit.artifact.builders import RECORD
from tests.unit.report import synthetic


def pruned(**details: object) -> SensitivityTable:
    units = synthetic.make_units(2)
    names = [unit.name for unit in units]
    found = {
        "sparsities": [0.1, 0.3, 0.5],
        "curve": {name: [0.001, 0.02, 0.5] for name in names},
        "area": dict.fromkeys(names, 0.0542),
        "whole_model_curve": {"0.1": 0.01, "0.45": 1.5, "0.9": 11.0},
        "essential_sparsity": 0.45,
    }
    return replace(synthetic.make_table("pruning", units, 1.0, 0), details=found | details)


def test_curves_areas_and_the_knee_are_in_the_report() -> None:
    summary = replace(synthetic.make_summary(blocks=2), sensitivity={"pruning": pruned()})
    whole, units = build_pruning_tables(summary)
    assert whole.rows == (("10%", "0.01"), ("45%", "1.5"), ("90%", "11"))
    assert "45% of the weights" in whole.note
    assert units.columns == ("unit", "10%", "30%", "50%", "area")
    assert units.rows[0][1:] == ("0.001", "0.02", "0.5", "0.0542")
    assert len(units.rows) == len(summary.units)
    assert {whole.title, units.title} <= {table.title for table in build_tables(summary)}


def test_a_straight_curve_and_other_metrics_say_so() -> None:
    summary = synthetic.make_summary(blocks=2)
    straight = {"pruning": pruned(essential_sparsity=None)}
    assert "no knee" in build_pruning_tables(replace(summary, sensitivity=straight))[0].note
    assert build_pruning_tables(replace(summary, sensitivity={})) == []


def test_an_interrupted_measurement_shows_the_units_that_were_scored() -> None:
    table = pruned(whole_model_curve={}, essential_sparsity=None)
    first = next(iter(table.per_unit))
    partial = replace(table, per_unit={first: table.per_unit[first]})
    summary = replace(synthetic.make_summary(blocks=2), sensitivity={"pruning": partial})
    assert [row[0] for row in build_pruning_tables(summary)[1].rows] == [first]
    assert "All units pruned together" not in {table.title for table in build_tables(summary)}


def test_many_metrics_have_a_line_each() -> None:
    units = synthetic.make_units(2)
    tables = [synthetic.make_table(f"m{i}", units, 1.0, i) for i in range(MANY + 1)]
    rows = make_leader_table(tables).rows
    assert [row[0] for row in rows] == [table.metric for table in tables]
    for row, table in zip(rows, tables, strict=True):
        assert row[1] == max(table.per_unit, key=lambda name: table.per_unit[name])
    assert rows[3][2] == "24 s"
    nothing = replace(tables[0], per_unit={})
    assert make_leader_table([nothing]).rows[0][1] == "-"


def test_verification_in_words() -> None:
    facts = VerificationFacts(missing=("a", "b", "c", "d"), max_abs_difference=0.5)
    assert not facts.clean
    assert describe_verification(facts) == "4 missing: a, b, c; outputs differ by at most 0.5"
    assert "not compared" in describe_verification(VerificationFacts())
    assert VerificationFacts().clean


def test_the_protocol_and_in_domain_calibration_stand_beside_the_numbers() -> None:
    summary = synthetic.make_summary(blocks=2)
    plain = build_evaluation_table(summary)
    assert plain is not None
    assert IN_DOMAIN not in plain.columns
    protocol = "windows: 10 of 2,048 tokens, BOS in each"
    rows = summary.comparison.rows
    perplexity = replace(rows[0].result, protocol=protocol, in_domain=True)
    other = replace(rows[1].result, protocol=protocol)
    joined = (replace(rows[0], result=perplexity), replace(rows[1], result=other), *rows[2:])
    table = build_evaluation_table(
        replace(summary, comparison=replace(summary.comparison, rows=joined))
    )
    assert table is not None
    place = table.columns.index(IN_DOMAIN)
    assert [row[place] for row in table.rows] == [IN_DOMAIN, *[""] * (len(rows) - 1)]
    assert table.note.count(f"wikitext: {protocol}") == 1
    assert f"{IN_DOMAIN}: in-domain, calibrated on text of the same corpus" in table.note
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_calibration_sample_in_words() -> None:
    record = replace(RECORD, documents="joined")
    assert describe_samples(RECORD) is None  # of an earlier artifact
    assert describe_samples(record) == "windows have no BOS and cross the borders of documents"
    apart = replace(record, bos=True, documents="apart")
    assert describe_samples(apart) == (
        "windows begin with the BOS and do not cross the borders of documents"
    )
    assert describe_samples(replace(RECORD, pairs=True)) == "pairs of sentences"


def test_speed_and_memory_are_beside_the_dense_models(summary: Summary) -> None:
    table = build_speed_table(summary)
    assert table is not None
    assert table.columns == ("model", "weights", "prefill", "decode", "way")
    dense, compressed, stock = table.rows
    assert dense[1:] == ("538.1 MB 1.00x", "250 1.00x", "12 1.00x", "generate")
    assert compressed[1:] == ("112 MB 0.21x", "400 1.60x", "60 5.00x", "own loop")
    assert stock[1:] == ("538.1 MB 1.00x", "-", "-", "-")
    assert "cptq bench smollm2-135m out" in table.note
    assert "differ by up to 10%" in table.note


def test_what_was_not_measured_names_the_command(summary: Summary) -> None:
    report = SpeedReport(command="cptq bench a b", why="--no-eval")
    table = build_speed_table(replace(summary, speed=report))
    assert table is not None
    assert table.rows == (("not measured", "--no-eval"), ("to measure them", "cptq bench a b"))
    assert build_speed_table(replace(summary, speed=None)) is None
