import pytest

from pipeline.config import find_config, load_config, make_config, shipped_configs
from pipeline.errors import ConfigError
from tests.conftest import digits_tree


def write(path, text):
    path.write_text(text)
    return path


def test_the_default_is_digits_unless_there_is_a_pipeline_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(None) == shipped_configs()["digits-lt"]
    (tmp_path / "pipeline.yaml").write_text("data: {source: digits}")
    assert find_config(None).resolve() == tmp_path / "pipeline.yaml"


@pytest.mark.parametrize("name", ["cifar100-lt", "configs/cifar100-lt.yaml", "cifar100-lt.yaml"])
def test_a_shipped_configuration_has_many_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == shipped_configs()["cifar100-lt"]


@pytest.mark.parametrize("name", sorted(n for n in shipped_configs() if not n.startswith("ablations/")))
def test_every_shipped_configuration_loads_and_says_how_to_run_it(name):
    path = shipped_configs()[name]
    config = load_config(path)
    head = path.read_text().split("name:")[0]
    assert config.name == name.rpartition("/")[2]
    assert f"pipeline run {name}" in head
    assert "Expected" in head


def test_settings_lie_over_the_file_and_types_are_kept(tmp_path):
    path = write(tmp_path / "a.yaml", "data: {source: digits}\n")
    config = load_config(
        path, ["backbone.lr=1e-3", "backbone.epochs=7", "rebalance.lam=[0.1, 0.2]", "rebalance.number=false"]
    )
    assert (config.name, config.backbone.lr, config.backbone.epochs) == ("a", 0.001, 7)
    assert (config.rebalance.lam, config.rebalance.number) == ("0.1,0.2", False)


@pytest.mark.parametrize(
    ("typed", "meant"), [("0,1,2", (0, 1, 2)), ("[3, 4]", (3, 4)), ("5", (5,)), ("'6, 7'", (6, 7))]
)
def test_seeds_are_set_as_they_are_typed_elsewhere(tmp_path, typed, meant):
    path = write(tmp_path / "a.yaml", "data: {source: digits}\n")
    assert load_config(path, [f"rebalance.seeds={typed}"]).rebalance.seeds == meant


def test_methods_are_set_as_a_list_with_commas(tmp_path):
    path = write(tmp_path / "a.yaml", "data: {source: digits}\n")
    assert load_config(path, ["rebalance.method=iwb,crt"]).rebalance.method == ("iwb", "crt")


def test_paths_in_a_file_are_relative_to_it(tmp_path):
    path = write(tmp_path / "a.yaml", "data: {source: folder, path: images}\n")
    assert load_config(path).data.path == tmp_path / "images"


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("data: {source: digits}\nbackbone: {epocs: 3}", [], ["backbone.epocs", "did you mean epochs"]),
        ("data: {source: digit}", [], ["data.source", "'digit'"]),
        ("data: {source: folder}", [], ["needs data.path"]),
        ("data: {source: list}", [], ["needs data.train_list"]),
        ("backbone: {}", [], ["data is missing"]),
        ("data: {source: digits}", ["backbone.lr"], ["--set backbone.lr", "KEY=VALUE"]),
        ("data: {source: digits}", ["backbone.lr=-1"], ["backbone.lr", "greater than 0"]),
        (
            "data: {source: digits}",
            ["backbone.accumulate=2", "backbone.compile=reduce-overhead"],
            ["backbone: accumulate 2", "take compile default"],
        ),
        ("data: {source: digits}", ["rebalance.seeds=[0, 0]"], ["rebalance.seeds", "different seeds"]),
        ("data: {source: digits}", ["rebalance.kl_weight=-1"], ["kl_weight", "0 or more"]),
        ("[1, 2]", [], ["expected keys"]),
        ("a: [", [], ["not YAML"]),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path, text, settings, words):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_config(path, settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_configuration_survives_json():
    config = make_config(digits_tree(), "tiny")
    assert make_config(config.model_dump(mode="json"), "again") == config
