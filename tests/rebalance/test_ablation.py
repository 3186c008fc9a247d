"""Variants side by side: each is what `rebalance` of it alone gives, and the test split comes after all choices."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import cache
from pipeline.cli import invoke
from pipeline.config import RebalanceConfig, find_config, load_config, make_config, read_tree, shipped_configs
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.paths import read_document
from pipeline.rebalance import ablate, rebalance
from pipeline.rebalance.candidates import penalty_of
from pipeline.rebalance.prepare import prepare_ablation
from pipeline.rebalance.sweep import Sweep
from pipeline.report.ablation import write_accuracy_figure
from tests.conftest import digits_tree
from tests.small_run import made_store

VARIANTS = [
    {"name": "stage 1", "set": {"method": ["baseline"]}, "paper": {"few": 13.3, "all": 47.4}},
    {"name": "cb", "set": {"method": ["cb"]}},
    {"name": "all of it"},
    {"name": "no HC", "set": {"hardness": "none", "lam": "0.1,0.5,0.9"}},
    {"name": "code", "set": {"formulation": "code", "lam": 0.3, "seeds": [5]}},
]
COMMON: dict = {"lam": "0.2,1", "seeds": (0, 1), "epochs": 2, "lr": 0.02, "variants": VARIANTS}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("store") / "features.zarr")


@pytest.fixture(scope="module")
def ablated(store, tmp_path_factory):
    result = ablate(store, RebalanceConfig(**COMMON), out=tmp_path_factory.mktemp("out") / "two")
    write_accuracy_figure(result.to_dict(), Path(result.out))
    return result


def test_each_row_is_what_rebalancing_that_variant_alone_gives(ablated, store, tmp_path):
    config = RebalanceConfig(**COMMON)
    for variant, row in zip(config.variants, ablated.rows, strict=True):
        alone = rebalance(store, config.with_variant(variant), out=tmp_path / variant.name).selected
        assert {key: row[key] for key in ("method", "loss", "lam", "chosen_on", "n")} == {
            key: alone[key] for key in ("method", "loss", "lam", "chosen_on", "n")
        }
        for measure in ("all", "few", "all_std", "ece"):
            assert row[measure] == pytest.approx(alone[measure]), (variant.name, measure)
    assert [row["chosen_on"] for row in ablated.rows] == [None, None, "val", "val", None]
    assert [row["n"] for row in ablated.rows] == [1, 2, 2, 2, 1]


def test_few_steps_are_told_once_not_by_every_variant(ablated):
    assert sum("may be under-fitted" in note for note in ablated.notes) == 1


def test_differences_are_to_the_loss_alone(ablated):
    assert ablated.against == "cb"
    alone = next(row for row in ablated.rows if row["name"] == "cb")
    for row in ablated.rows:
        if row is alone:
            assert row["less_alone"] is None
        else:
            assert row["less_alone"]["few"]["difference"] == pytest.approx(row["few"] - alone["few"])


def test_a_row_is_held_against_the_loss_alone_in_its_own_form_and_on_its_own_views(store, tmp_path):
    variants = [
        {"name": "stage 1", "set": {"method": ["baseline"]}},
        {"name": "cb", "set": {"method": ["cb"]}},
        {"name": "cb bce", "set": {"method": ["cb"], "cb": "bce"}},
        {"name": "cb bce clean", "set": {"method": ["cb"], "cb": "bce", "views": "clean"}},
        {"name": "softmax"},
        {"name": "bce", "set": {"cb": "bce"}},
        {"name": "code", "set": {"formulation": "code"}},
        {"name": "code clean", "set": {"formulation": "code", "views": "clean"}},
        {"name": "softmax clean", "set": {"views": "clean"}},
        {"name": "without cb", "set": {"loss": "ce"}},
    ]
    config = RebalanceConfig(lam="0.2", formulation="paper", seeds=(0,), epochs=1, variants=variants)
    result = ablate(store, config, out=tmp_path / "a")
    assert [row["against"] for row in result.rows] == [
        "cb", None, "cb", "cb", "cb", "cb bce", "cb bce", "cb bce clean", "cb", "cb",
    ]  # fmt: skip
    rows = {row["name"]: row for row in result.rows}
    assert rows["code"]["less_alone"]["all"]["difference"] == pytest.approx(rows["code"]["all"] - rows["cb bce"]["all"])
    assert re.search(r"code clean +cb bce clean +[+−]", _printed(result))


def test_what_is_written_agrees(ablated):
    out = Path(ablated.out)
    document = json.loads((out / "ablation.json").read_text())
    assert document.pop("header")["kind"] == "ablation"
    assert (document["out"], Path(document["store"]).is_absolute()) == (".", False)
    assert read_document(document, out) == json.loads(json.dumps(ablated.to_dict()))
    with open(out / "table.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [v["name"] for v in VARIANTS]
    assert float(lines[2]["all"]) == ablated.rows[2]["all"]
    assert (lines[0]["paper_all"], lines[0]["paper_many"], lines[0]["less_alone_all_low"]) == (
        "47.4",
        "",
        str(ablated.rows[0]["less_alone"]["all"]["low"]),
    )
    with open(out / "accuracy-lambda.csv", encoding="utf-8", newline="") as file:
        drawn = {(line["variant"], line["lam"]): line for line in csv.DictReader(file)}
    kinds = {("stage 1", ""), ("cb", ""), ("all of it", "0.2"), ("all of it", "1.0")}
    assert set(drawn) == kinds | {("no HC", lam) for lam in ("0.1", "0.5", "0.9")}  # a single given λ is no curve
    for row in ablated.rows[2:4]:
        point = drawn[row["name"], str(row["lam"])]
        assert point["chosen"] == "True"
        assert float(point["few"]) == pytest.approx(row["few"], abs=1e-4)
    assert (out / "accuracy-lambda.png").read_bytes().startswith(b"\x89PNG")
    heads = [h for h in ablated.heads if h["variant"] == "no HC"]
    assert len(heads) == 3 * 2 * 2  # λ, seeds, splits


def test_the_table_says_what_it_is(ablated):
    text = " ".join(str(part) for part in _printed(ablated).split())
    assert f"{ablated.rows[3]['lam']:g}*" in text
    assert "–/–/13.3/47.4" in text
    assert "* λ of each row selected on validation; no row was selected on the test split" in text
    assert "as published, on another, far larger network" in text
    assert "Less cb, in points, with 95 % intervals" in text
    assert "n = 2 batch orders of one backbone" in text


def _printed(result):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(result)
    return console.file.getvalue()


def test_where_the_test_split_cannot_be_read_all_choices_are_there(tmp_path):
    store = made_store(tmp_path / "features.zarr")
    chunk = store / "test/features/c/0/0/0"
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(DataError, match="test/features"):
        ablate(store, RebalanceConfig(**COMMON), out=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "selection.json",
        "unfinished",
    ]  # what was fitted stays
    assert [c["name"] for c in json.loads((tmp_path / "out/selection.json").read_text())["variants"]] == [
        v["name"] for v in VARIANTS
    ]


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ([{"name": "a", "set": {"hardnes": "none"}}], "variant a: unknown key hardnes; did you mean hardness"),
        ([{"name": "a", "set": {"hardness": "all"}}], "variant a: hardness: Input should be"),
        ([{"name": "a"}, {"name": "a"}], "different names"),
        ([{"nam": "a"}], "did you mean name"),
        ([{"name": "a", "paper": {"tail": 3}}], "'many', 'medium', 'few' or 'all'"),
        ([{"name": "a", "set": {"lam": "2"}}], None),
    ],
)
def test_a_wrong_variant_is_named(variants, says, store, tmp_path):
    tree = digits_tree()
    tree["rebalance"]["variants"] = variants
    if says is None:  # λ is read when it is used, still before the store
        with pytest.raises(ConfigError, match="--lam"):
            ablate(tmp_path / "none.zarr", make_config(tree, "here").rebalance, out=tmp_path)
        return
    with pytest.raises(ConfigError) as error:
        make_config(tree, "here")
    assert says in str(error.value)


SHIPPED = [name for name in shipped_configs() if name.startswith("ablations/")]


def test_the_papers_ablations_are_shipped():
    assert {"ablations/table3", "ablations/table4", "ablations/figure5"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_ablation_says_how_to_run_it_and_is_for_stage_2(name):
    path = find_config(name)
    head = path.read_text().split("name:")[0]
    assert f"--config {name}" in head
    assert "Expected" in head
    tree = read_tree(path)
    assert f"ablations/{tree['name']}" == name
    config = RebalanceConfig.model_validate(tree["rebalance"])
    assert config.seeds == (0, 1, 2, 3, 4)
    with pytest.raises(ConfigError, match="pipeline rebalance STORE --config"):
        load_config(path)


def test_every_switch_in_which_the_formulations_differ_has_a_row():
    config = RebalanceConfig.model_validate(read_tree(find_config("ablations/table4"))["rebalance"])
    rules = {v.name: penalty_of(config.with_variant(v)) for v in config.variants}
    paper, code = rules["IWB + CB"], rules["code's formulation"]
    for switch in ("log_base", "direction", "kl_weight", "detach_target"):
        assert getattr(paper, switch) != getattr(code, switch)
        assert any(getattr(rule, switch) == getattr(code, switch) for name, rule in rules.items() if "code" not in name)
    assert any(config.with_variant(v).cb == "bce" for v in config.variants)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_ablation_runs_on_any_store(name, store, tmp_path, monkeypatch, capsys):
    """Quick settings laid over it; the store's own configuration is not there, as in a store of another program."""
    monkeypatch.chdir(tmp_path)
    words = ["--seeds", "0", "--epochs", "1", "--lam", "0.1,0.9", "--batch-size", "64", "--json"]
    assert invoke(["rebalance", str(store), "--config", name, *words]) == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert document["out"] == str(store.parent / name)
    assert len(document["rows"]) == len(read_tree(find_config(name))["rebalance"]["variants"])
    assert {row["name"]: row["lam"] for row in document["rows"]}["CE (stage 1)"] is None
    assert "variants" in told.err


def test_a_stores_own_settings_lie_under_the_ablation(tmp_path, monkeypatch, capsys):
    """What trains a head stays as it was for this store; what the ablation says and what is typed come over it."""
    store = made_store(tmp_path / "features.zarr", config=digits_tree() | {"rebalance": {"epochs": 3, "lr": 0.5}})
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"rebalance": {"lam": 0.1, "lr": 0.25, "variants": [{"name": "a"}, {"name": "b"}]}})
    )
    words = ["rebalance", str(store), "--config", str(tmp_path / "mine.yaml"), "--seeds", "3", "--json"]
    assert invoke(words) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["epochs"], settings["lr"], settings["seeds"]) == (3, 0.25, [3])
    assert (tmp_path / "ablations/mine/ablation.json").is_file()


def test_clean_and_augmented_variants_share_one_store(store, tmp_path):
    variants = [{"name": "clean", "set": {"views": "clean"}}, {"name": "augmented"}]
    config = RebalanceConfig(lam="0.2", seeds=(0,), epochs=1, lr=0.5, variants=variants)
    result = ablate(store, config, out=tmp_path)
    clean, augmented = ([h["ece"] for h in result.heads if h["variant"] == v["name"]] for v in variants)
    assert not np.allclose(clean, augmented)
    assert cache.open_cache(store).views("train") == 2


def test_a_dry_run_of_an_ablation_names_the_folder_of_the_command_and_refuses_what_it_refuses(store, tmp_path):
    variants = [{"name": "a"}, {"name": "b", "set": {"hardness": "none"}}]
    config = RebalanceConfig(lam="0.2", seeds=(0,), epochs=1, variants=variants)
    plan = prepare_ablation(store, config)
    assert plan.description.numbers["heads"] == 2
    assert str(plan.out) == ablate(store, config).out
    (tmp_path / "results.json").write_text("of something else; no ablation writes it")
    assert str(prepare_ablation(store, config, out=tmp_path).out) == ablate(store, config, out=tmp_path).out
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    for attempt in (prepare_ablation, ablate):
        with pytest.raises(PipelineError, match="--out"):
            attempt(store, config, out=blocked / "below")


@pytest.mark.parametrize(
    ("changes", "splits", "reason"),
    [
        ({"lam": "0:1:lin:100000000000"}, ("val", "test"), "at most .* λ fit"),
        ({"lam": "0.1,0.2"}, ("test",), "no validation split to choose on"),
        ({"views": "augmented"}, ("val", "test"), "has the clean view alone"),
    ],
)
def test_nothing_is_fitted_where_a_later_variant_is_refused(changes, splits, reason, tmp_path, monkeypatch):
    store = made_store(tmp_path / "features.zarr", views=1 if "views" in changes else 2, splits=splits)
    variants = [{"name": "a"}, {"name": "b"}, {"name": "c", "set": changes}]
    config = RebalanceConfig(lam="0.2", seeds=(0,), epochs=1, variants=variants)
    fitted = []
    monkeypatch.setattr(Sweep, "add", lambda self, heads: fitted.append(heads))
    for attempt in (prepare_ablation, ablate):
        with pytest.raises(ConfigError, match=reason):
            attempt(store, config, out=tmp_path / "out")
    assert not fitted
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--method", "--loss", "--formulation"])
def test_what_the_variants_say_themselves_cannot_be_said_for_all(option, store, capsys):
    value = {"--method": "iwb", "--loss": "ce", "--formulation": "code"}[option]
    assert invoke(["rebalance", str(store), "--config", "ablations/table3", option, value]) == 2
    assert f"{option}: the variants of --config ablations/table3 set this themselves" in capsys.readouterr().err


def test_a_dry_run_imports_no_networks(store, tmp_path):
    """timm and torchvision would more than double its time; stage 2 needs neither."""
    words = ["rebalance", str(store), "--lam", "0.1", "--seeds", "0", "--out", str(tmp_path / "out"), "--dry-run"]
    code = (
        "import sys; from pipeline.cli import invoke; assert invoke(sys.argv[1:]) == 0; "
        "print([m for m in ('timm', 'torchvision') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
