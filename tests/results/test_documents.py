"""Documents that were damaged or changed by hand are refused with the file and the field that is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import DATA, DataError
from pipeline.info import describe
from pipeline.results import documents
from pipeline.results.differences import read_hits
from pipeline.results.files import write_artefact
from pipeline.results.heads import read_scorers

KEPT = Path(__file__).parents[1] / "golden" / "format-0.1"
READERS = {
    "one/rebalance/results.json": documents.read_results,
    "three/results.json": documents.read_results,
    "one/rebalance/selection.json": documents.read_choice,
    "ablation/selection.json": documents.read_choice,
    "ablation/ablation.json": documents.read_ablation,
    "one/run.json": documents.read_record,
    "exported/config.json": documents.read_export,
}


def altered(document, field, value):
    *parents, last = field.split(".")
    place = document
    for key in parents:
        place = place[int(key) if key.isdigit() else key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize("name", READERS)
def test_documents_of_format_0_1_have_the_shape(name):
    assert READERS[name](KEPT / name)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("one/rebalance/results.json", "store", None),
        ("one/rebalance/results.json", "selected", None),
        ("one/rebalance/results.json", "selected.method", 3),
        ("one/rebalance/results.json", "results.0.lam", "0.1"),
        ("one/rebalance/results.json", "results.1.all", float("nan")),
        ("one/rebalance/results.json", "notes", "one"),
        ("three/results.json", "baseline.few", "many"),
        ("one/rebalance/selection.json", "within_one_se", None),
        ("ablation/ablation.json", "rows", []),
        ("ablation/ablation.json", "rows.0.n", "5"),
        ("ablation/ablation.json", "heads.0.variant", None),
        ("exported/config.json", "class_names", "cat"),
        ("exported/config.json", "head.lam", True),
    ],
)
def test_a_wrong_field_is_named_with_its_file(name, field, value, tmp_path):
    path = tmp_path / Path(name).name
    path.write_text(json.dumps(altered(json.loads((KEPT / name).read_text()), field, value)))
    with pytest.raises(DataError) as caught:
        READERS[name](path)
    assert caught.value.exit_code == DATA
    assert str(path) in str(caught.value)
    assert field in str(caught.value)


def test_a_document_begins_with_its_kind_and_one_of_a_newer_version_is_refused(tmp_path):
    document = json.loads((KEPT / "one/rebalance/results.json").read_text())
    path = write_artefact(tmp_path / "mine.json", "results", document)
    written = json.loads(path.read_text())
    assert next(iter(written)) == "header"
    assert written["header"]["kind"] == "results"
    assert {key: value for key, value in written.items() if key != "header"} == document
    assert describe(path).kind == "rebalancing results"
    path.write_text(json.dumps(altered(written, "header.format", 3)))
    with pytest.raises(DataError, match=r"mine\.json: header\.format: 3 is of a newer version"):
        documents.read_results(path)


@pytest.mark.parametrize(("file", "read"), [("heads.safetensors", read_scorers), ("test_hits.safetensors", read_hits)])
def test_metadata_of_tensors_is_checked_too(file, read, tmp_path):
    source = KEPT / "one" / "rebalance" / file
    path = tmp_path / file
    shutil.copy(source, path)
    assert read(path)
    save_file(load_file(source), path, {"heads": json.dumps([{"method": "iwb", "lam": "high"}])})
    with pytest.raises(DataError, match=rf"{file}: (heads\.)?0\.lam"):
        read(path)


def test_a_record_of_what_made_files_may_be_missing_but_not_damaged(tmp_path):
    path = tmp_path / "run.json"
    assert documents.read_record(path) == {}
    record = {"argv": ["pipeline"], "stages": {"report": {"seconds": 1.5}}}
    write_artefact(path, "record", record)
    assert documents.read_record(path) == record
    path.write_text(json.dumps(altered(record, "stages.report.seconds", "long")))
    with pytest.raises(DataError, match=r"run\.json: stages\.report\.seconds: "):
        documents.read_record(path)
    path.write_text(json.dumps(record)[:-1])
    with pytest.raises(DataError, match=r"run\.json: not a readable JSON file"):
        documents.read_record(path)


def test_metrics_without_a_last_line_that_was_cut_off_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "lo')
    assert documents.read_epochs(path) == [{"epoch": 1, "loss": 2.0}]
    path.write_text('{"epoch": 1}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: 0\.loss"):
        documents.read_epochs(path)
