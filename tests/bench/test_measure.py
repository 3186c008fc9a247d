import time

import pytest

from pipeline.bench.measure import Benchmark, Measure, Seconds, interleaved, machine, ratio


def test_a_missed_target_stands_there_with_its_reason():
    missed = Measure("a", 0.7, "×", 0.8, why="the disk")
    assert (missed.met, missed.to_dict()["why"]) == (False, "the disk")
    assert str(missed).endswith("target ≥ 0.8  MISSED: the disk")
    met = Measure("a", 0.8, "×", 0.8, why="the disk")
    assert (met.met, met.to_dict()["why"]) == (True, None)
    assert Measure("a", 9.0, "MiB", 8.0, at_most=True).met is False
    assert Measure("a", 8.0, "MiB", 8.0, at_most=True).met is True
    assert Measure("a", 8.0, "MiB").met is None


def test_ways_take_turns_and_the_first_call_of_each_is_not_counted():
    calls = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    taken = interleaved(ways, repeat=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}


def test_a_way_that_took_its_own_time_is_believed():
    taken = interleaved({"told": lambda: Seconds(7), "timed": lambda: time.sleep(0.01)}, repeat=2)
    assert taken["told"] == [7, 7]
    assert all(0.01 <= t < 1 for t in taken["timed"])


def test_a_ratio_is_of_medians_and_keeps_what_it_was_made_of():
    seconds = {"ours": [1.0, 100.0, 2.0], "theirs": [1.0, 1.0, 50.0]}
    measure = ratio("x", seconds, "ours", "theirs", work=4.0, unit="GB", target=0.5)
    assert (measure.value, measure.met) == (0.5, True)
    assert measure.figures["ours, GB/s"] == 2.0
    assert measure.figures["ours, all s"] == [1.0, 100.0, 2.0]


def test_a_result_names_the_machine():
    facts = Benchmark("x", machine(device="cpu"), {"rows": 1}, (Measure("a", 1.0, "×"),), 2.0).to_dict()
    assert facts["machine"]["cpus"] >= 1
    assert facts["machine"]["threads"] >= 1
    assert {"torch", "zarr", "numpy", "python"} <= facts["machine"]["versions"].keys()
    assert facts["measures"][0]["met"] is None
    with pytest.raises(TypeError):
        machine("cpu")
