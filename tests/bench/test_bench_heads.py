"""The bench of heads on made stores, against the result of `rebalance` and scikit-learn called directly."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cache import open_cache
from pipeline.bench import heads as bench
from pipeline.bench import heads_figure
from pipeline.cli import invoke
from pipeline.errors import ConfigError
from pipeline.report.picture import png
from tests.small_run import made_store


def test_accuracy_lead_and_regret_by_hand():
    """Three classes of 2, 2 and 1 test images, one in each group; a rate of ½ is right with one of two seeds."""
    labels, counts = np.array([0, 0, 1, 1, 2]), np.array([200, 50, 5])
    rates = {"ours": [1, 0, 1, 1, 0.5], "sklearn": [1, 1, 1, 0, 0], "method": [1, 1, 1, 1, 1]}
    recommended, scikit_learn, method = (bench.MeasuredHead(name, "–", np.array(rate)) for name, rate in rates.items())
    store = bench.MeasuredStore("s", recommended, scikit_learn, [method], labels, counts)
    assert store.accuracy(recommended) == pytest.approx({"all": 200 / 3, "many": 50, "medium": 100, "few": 50})
    accuracy, lead, regret = store.measures()
    assert (accuracy.value, lead.value, regret.value) == (66.67, 16.67, 33.33)
    assert (accuracy.figures["few"], lead.figures["many"]["difference"], lead.met) == (50, -50, True)
    assert regret.figures["best on test"] == "method"
    assert [row["recommended less this, few"]["difference"] for row in accuracy.figures["rows"]] == [0, 50, -50]
    means = {measure.name.split(", ")[1]: measure for measure in bench.means([store, store])}
    assert {name: measure.value for name, measure in means.items()} == {
        "recommended": 66.67,
        "scikit-learn": 50.0,
        "recommended less scikit-learn": 16.67,
        "regret": 33.33,
    }
    assert [measure.met for measure in means.values()] == [None, None, True, False]


def test_the_picture_sorts_heads_by_their_mean_and_shows_the_same_points_as_the_document(monkeypatch):
    """On both stores `method` is best, the recommended head second, scikit-learn's last."""
    labels, counts = np.array([0, 0, 1, 1, 2]), np.array([200, 50, 5])
    rates = {"ours": [1, 0, 1, 1, 0.5], "scikit-learn, sklearn": [1, 1, 1, 0, 0], "method, λ = 0.3": [1, 1, 1, 1, 1]}
    heads = [bench.MeasuredHead(name, "lr = 1", np.array(rate)) for name, rate in rates.items()]
    stores = [bench.MeasuredStore(name, heads[0], heads[1], heads[2:], labels, counts) for name in "ab"]
    document = {"measures": [measure.to_dict() for store in stores for measure in store.measures()]}
    figures = []
    monkeypatch.setattr(heads_figure, "png", lambda figure: figures.append(figure) or png(figure))
    assert heads_figure.heads_figure(document).startswith(b"\x89PNG")
    first, second = figures[0].axes
    assert [axes.get_title("left") for axes in (first, second)] == ["a", "b"]
    assert [text.get_text() for text in first.get_yticklabels()] == ["method", "ours", "scikit-learn's sklearn"]
    (points,) = (line for line in second.lines if line.get_marker() == "o")
    at = dict(zip(points.get_ydata(), points.get_xdata(), strict=True))
    assert at == pytest.approx({0: 33.33, 1: 0, 2: -16.67}, abs=0.01)


def test_stores_are_named_by_what_tells_them_apart():
    assert bench.names_of(["/p/a.zarr", "/p/digits/seed-0/features.zarr"]) == ["a", "digits/seed-0"]
    assert bench.names_of(["runs/x/features.zarr"]) == ["x"]
    with pytest.raises(ConfigError, match="named twice"):
        bench.names_of(["a.zarr", "./a.zarr"])


def test_the_command_reports_what_rebalance_and_scikit_learn_give(tmp_path, capsys, monkeypatch):
    stores = [str(made_store(tmp_path / name / "features.zarr", seed=i)) for i, name in enumerate("ab")]
    results = []
    monkeypatch.setattr(
        bench, "rebalance", lambda *a, f=bench.rebalance, **k: results.append(f(*a, **k)) or results[-1]
    )
    assert invoke(["bench", "heads", "--stores", *stores, "--out", str(tmp_path / "heads.json"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "heads.json").read_text())["measures"] == document["measures"]
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    measures = {measure["name"]: measure for measure in document["measures"]}
    assert list(measures)[:6:3] == ["a, recommended", "b, recommended"]
    for name, path, result in zip("ab", stores, results, strict=True):
        measure = measures[f"{name}, recommended"]
        rows = {row["head"]: row for row in measure["figures"]["rows"]}
        assert measure["value"] == round(result.selected["all"], 2)
        assert rows["stage 1"]["all"] == round(result.baseline["all"], 2)
        for row in result.chosen:
            assert any(head.startswith("CB" if row["method"] == "cb" else row["method"]) for head in rows), row
        cache = open_cache(path)
        (x, y), (v, v_labels), (t, t_labels) = (
            (cache.read(split, 0).astype(np.float32), cache.labels(split)) for split in ("train", "val", "test")
        )
        scores = {}
        for c in bench.C:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=1000))
            model.fit(x, y)
            scores[c] = model.score(v, v_labels), 100 * model.score(t, t_labels)  # 12 images a class: balanced
        best = max(scores, key=lambda c: scores[c][0])
        row = rows[bench.SCIKIT_LEARN]
        assert (row["setting"], row["all"]) == (f"C = {best:g}", pytest.approx(scores[best][1], abs=0.01))
        lead = measures[f"{name}, recommended less scikit-learn"]["value"]
        assert lead == pytest.approx(measure["value"] - row["all"], abs=0.02)
        regret = measures[f"{name}, regret"]["value"]
        assert regret == pytest.approx(max(r["all"] for r in rows.values()) - measure["value"], abs=0.02)


def test_a_store_without_validation_is_refused_before_anything_is_fitted(tmp_path, capsys):
    store = made_store(tmp_path / "features.zarr", splits=("test",))
    assert invoke(["bench", "heads", "--stores", str(store)]) == 2
    assert "no validation images, on which scikit-learn's C is chosen" in capsys.readouterr().err
    assert invoke(["bench", "heads"]) == 2
    assert "--stores" in capsys.readouterr().err
