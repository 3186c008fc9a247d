"""Rows beside the paper's: pure functions on small documents."""

import pytest

from pipeline.config import find_config, load_config, read_tree, shipped_configs
from pipeline.reproduce.backbone import ABLATIONS, StepProgress, settings_of
from pipeline.reproduce.page import with_section
from pipeline.reproduce.paper import IF50, IF100, deviations, published_of, variant_accuracies
from pipeline.reproduce.rows import difference, merged, over_backbones
from pipeline.reproduce.run import PLAN


def a_row(config="a", name="IWB + CB", **ours):
    four = {"many": 70.0, "medium": 50.0, "few": None, "all": 50.0} | ours
    return {
        "table": "table3", "row": name, "config": config, "command": "c", "time_s": 2.0, "n": 5, "n_of": "batch orders",
        "chosen": {"lam": 0.1}, "ours": four, "ours_std": dict.fromkeys(four), "paper": {"all": 54.8}, "difference": None,
        "less_cb": {g: {"difference": 1.0, "low": 0.5, "high": 1.5} for g in four}, "less_cb_of": "CB alone",
    }  # fmt: skip


def test_difference_is_ours_less_the_papers_where_both_are():
    assert difference({"many": 60.0, "medium": None, "few": 20.0, "all": 43.0}, {"medium": 54.2, "all": 54.8}) == {
        "many": None,
        "medium": None,
        "few": None,
        "all": pytest.approx(-11.8),
    }
    assert difference({"many": 1.0, "medium": 1.0, "few": 1.0, "all": 1.0}, None) is None


def test_several_backbones_become_mean_and_sample_deviation():
    first, second = a_row(all=50.0), a_row(all=54.0) | {"chosen": {"lam": 0.2}}
    (row,) = over_backbones([[first, a_row(name="only here")], [second]], command="all of it")
    assert (row["ours"]["all"], row["ours"]["few"], row["n"], row["n_of"]) == (52.0, None, 2, "backbones")
    assert row["ours_std"]["all"] == pytest.approx(8**0.5, abs=1e-4)
    assert (row["chosen"], row["time_s"], row["command"]) == ({"lam": "0.1 | 0.2"}, 4.0, "all of it")
    assert row["difference"]["all"] == pytest.approx(-2.8)
    assert row["less_cb"]["all"] == {"difference": 1.0, "low": None, "high": None}
    assert over_backbones([[first]], command="one") == [first]


def test_a_table_of_one_configuration_replaces_its_own_alone():
    known = [a_row("a"), a_row("b"), a_row("b", "gone"), a_row("b", "stays") | {"table": "table4"}]
    now = merged(known, [a_row("b", "new")])
    assert [(r["config"], r["row"]) for r in now] == [("a", "IWB + CB"), ("b", "stays"), ("b", "new")]


def test_a_section_is_replaced_in_its_place():
    text = with_section("# Title\n", "a", "first \\1")
    text = with_section(text, "b", "second")
    again = with_section(text, "a", "third")
    assert again == "# Title\n\n<!-- a -->\nthird\n<!-- /a -->\n\n<!-- b -->\nsecond\n<!-- /b -->\n"


def test_the_papers_numbers_stand_beside_their_own_data_alone():
    sizes = {
        100: load_config(find_config("reproduce/cifar100-if100")),
        50: load_config(find_config("reproduce/cifar100-if50")),
    }
    assert [c.data.imbalance_factor for c in sizes.values()] == [100, 50]
    assert published_of([500] * 10) is None
    variant = {"name": "IWB + CB", "method": "iwb", "paper": {"all": 54.8}}
    assert variant_accuracies(IF100, variant) == {"all": 54.8}
    assert variant_accuracies(IF50, variant) == {"all": 57.82}
    assert variant_accuracies(None, variant) is None
    everything = [
        v["name"] for t in ABLATIONS for v in read_tree(find_config(f"ablations/{t}"))["rebalance"]["variants"]
    ]
    assert set(IF50.rows) <= set(everything)  # a name that no variant has would never find its row


def test_deviations_name_every_setting_that_is_not_the_papers():
    same = deviations(load_config(find_config("reproduce/cifar100-if100")), IF100)
    assert not [told for told in same if told.startswith(("Stage 1: batch", "Stage 2"))]
    small = load_config(find_config("reproduce/cifar100-resnet32"), ["rebalance.lr=0.1"])
    network = {"network": "cifar_resnet32", "parameters": 470_004, "feature_width": 64}
    told = deviations(small, IF100, network)
    for sentence in (
        "Stage 1: epochs 120, paper 200.",
        "Stage 1: lr 0.1, paper 0.01.",
        "Stage 2: lr 0.1, paper 0.005.",
        "The networks differ 45-fold in parameters, so differences to the paper say nothing of the method.",
    ):
        assert sentence in told


BEYOND = [name for name in shipped_configs() if name.startswith("reproduce/beyond-")]


@pytest.mark.parametrize("name", BEYOND)
def test_what_goes_beyond_the_paper_says_in_what_and_that_it_was_not_run(name):
    path, plain = find_config(name), deviations(load_config(find_config("reproduce/cifar100-if100")), IF100)
    assert "# Not run." in path.read_text(encoding="utf-8")
    more = [told for told in deviations(load_config(path), IF100) if told not in plain]
    assert more
    assert all(told.startswith(("Stage 1: ", "Augmentation: ")) for told in more)


def test_the_plan_names_shipped_configurations_in_the_order_of_their_worth():
    assert {name for name, _ in PLAN} <= set(shipped_configs())
    assert [(name.rpartition("-")[2], seeds) for name, seeds in PLAN] == [
        ("if100", (0,)), ("if100", (0, 1, 2)), ("if50", (0,)), ("resnet32", (0,)),
    ]  # fmt: skip


def test_tables_are_made_with_the_configurations_training_of_heads():
    own = load_config(find_config("reproduce/cifar100-if100"), ["rebalance.lr=0.25"]).rebalance
    for table in ("methods", *ABLATIONS):
        settings = settings_of(table, own)
        assert (settings.lr, settings.epochs, settings.batch_size, settings.seeds) == (0.25, 10, 64, (0, 1, 2, 3, 4))
    assert settings_of("methods", own).method == ("all",)
    assert settings_of("table3", own).variants[0].name == "CE (stage 1)"


def test_remaining_time_is_told_once_every_kind_of_step_was_timed():
    from pipeline.console import Talk

    progress = StepProgress(["train", "table", "train", "table"], Talk(quiet=True))
    progress.begin("train", "one")
    assert progress.remaining() is None
    progress.end("train", 10)
    progress.begin("table", "one")
    progress.end("table", 2)
    progress.begin("train", "two")
    assert progress.remaining() == 12
