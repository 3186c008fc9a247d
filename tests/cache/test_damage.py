"""Whatever happens to a file of a store, its reader and `verify` find it, and dumping again mends just that."""

import json

import numpy as np
import pytest
import zarr

from cache import CacheError, open_cache, store, verify
from cache.chunks import checksum
from cache.layout import canonical


def flip(path, position=3):
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path):
    other = path.parent.parent / ("1" if path.parent.name == "0" else "0") / path.name
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


CHUNK = "train/features/c/1/1/0"
SMALL = ["train/labels/c/0", "train/ids/c/0", "val/labels/c/0", "classifier/weight/c/0/0", "classifier/bias/c/0"]


def read_everything(path):
    cache = open_cache(path)
    for split in cache.splits:
        assert [cache.labels(split), cache.ids(split)]
        for view in range(cache.views(split)):
            cache.read(split, view)
    return cache.classifier


def mend(small):
    """Chunks written again until the store is sealed."""
    with small.create() as writer:
        missing = writer.missing()
        small.fill(writer, missing)
        writer.seal()
    return missing


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, swap, lambda p: p.unlink(), lambda p: flip(p, -1)])
def test_damaged_features_are_found_and_mended(small, damage):
    before = (small.sealed(), small.files())[1]
    damage(small.path / CHUNK)
    with pytest.raises(CacheError, match=r"train/features/c/1/[01]/0 \(view 1, rows .* repair it: run"):
        read_everything(small.path)
    found = verify(small.path)
    assert "train/features" in {d.array for d in found}
    assert all(d.rows.startswith("view 1, rows ") for d in found)
    missing = mend(small)
    assert [c.key for c in missing] == [d.chunk for d in found]
    assert small.files() == before
    assert verify(small.path) == []


def test_a_chunk_of_another_store_is_found(small, tmp_path):
    """A stale chunk: whole, the right size, its own checksum right."""
    small.sealed()
    other = type(small)(tmp_path / "other.zarr")
    other.features = lambda split, view: np.ones((23, 5), np.float32)
    (small.path / CHUNK).write_bytes((other.sealed() / CHUNK).read_bytes())
    with pytest.raises(CacheError, match=r"view 1, rows 4–7\) holds other content than was sealed"):
        open_cache(small.path).read("train", 1)
    assert [d.chunk for d in verify(small.path)] == ["c/1/1/0"]
    open_cache(small.path).read("train", 0)
    mend(small)
    assert verify(small.path) == []


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("damage", [flip, truncate, lambda p: p.unlink()])
def test_damaged_labels_ids_and_classifier_are_found_and_mended(small, name, damage):
    before = (small.sealed(), small.files())[1]
    damage(small.path / name)
    with pytest.raises(CacheError, match=name):
        read_everything(small.path)
    assert [f"{d.array}/{d.chunk}" for d in verify(small.path)] == [name]
    assert mend(small) == []
    assert small.files() == before


@pytest.mark.parametrize("name", ["train", "train/features", "val/labels", "classifier/bias"])
@pytest.mark.parametrize("damage", [lambda p: flip(p, 30), truncate, lambda p: p.unlink()])
def test_damaged_array_metadata_are_found_and_mended(small, name, damage):
    before = (small.sealed(), small.files())[1]
    damage(small.path / name / "zarr.json")
    with pytest.raises(CacheError, match=f"{name}/zarr.json"):
        open_cache(small.path)
    assert [d.array for d in verify(small.path)] == [name]
    assert mend(small) == []
    assert small.files() == before


def test_every_changed_byte_of_the_root_metadata_is_found(small):
    file = small.sealed() / "zarr.json"
    good = file.read_bytes()
    for position in range(0, len(good), 7):
        flip(file, position)
        for use in (open_cache, verify, lambda _: small.create()):
            with pytest.raises(CacheError, match=r"zarr\.json is damaged|not a feature store"):
                use(small.path)
        file.write_bytes(good)
    assert verify(small.path) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("counts", [7, 8, 8]), ("class_names", ["bee", "ant", "çat"]), ("state", "open"), ("digest", "0")],
)
def test_edited_attributes_are_found(small, key, value):
    file = small.sealed() / "zarr.json"
    document = json.loads(file.read_text())
    document["attributes"][key] = value
    file.write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"damaged; dump again: .* --overwrite"):
        open_cache(small.path)
    with pytest.raises(CacheError, match="damaged"):
        verify(small.path)


@pytest.mark.parametrize(
    "change",
    [
        {"comment": "added by hand"},
        {"must_understand": False},
        {"zarr_format": 2},
        {"zarr_format": None},
        {"node_type": "array"},
        {"node_type": None},
    ],
)
def test_a_root_with_other_fields_than_a_group_of_zarr_3_is_refused(small, change):
    """The checksum covers the attributes alone; what stands beside them decides how other zarr clients read the store."""
    file = small.sealed() / "zarr.json"
    document = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    for use in (open_cache, verify, lambda path: small.create()):
        with pytest.raises(CacheError, match=r"the metadata in zarr\.json is damaged; dump again"):
            use(small.path)


def test_a_root_without_a_field_is_damaged_though_its_checksum_holds(small):
    file = small.sealed() / "zarr.json"
    document = json.loads(file.read_text())
    for name in ("layout", "class_names", "counts", "fingerprint", "provenance", "state", "manifest", "metadata"):
        attributes = {key: value for key, value in document["attributes"].items() if key not in (name, "check")}
        attributes["check"] = checksum(canonical(attributes))
        file.write_text(json.dumps(document | {"attributes": attributes}))
        with pytest.raises(CacheError, match=rf"zarr\.json: {name}: "):
            open_cache(small.path)


def test_another_format_version_is_named(small, monkeypatch):
    monkeypatch.setattr("cache.root.FORMAT", 2)
    small.sealed()
    monkeypatch.undo()
    with pytest.raises(CacheError, match="format_version is 2, this program reads 1"):
        open_cache(small.path)


def test_an_unsealed_or_absent_store_is_refused(small):
    for use in (open_cache, verify):
        with pytest.raises(CacheError, match="no such feature store; make it: pipeline dump-features"):
            use(small.path)
    small.create().close()
    for use in (open_cache, verify):
        with pytest.raises(CacheError, match="did not finish; run the same pipeline dump-features command again"):
            use(small.path)


def test_a_store_with_a_chunk_missing_is_not_sealed(small):
    with small.create() as writer:
        small.fill(writer, writer.chunks[:-1])
        with pytest.raises(CacheError, match=r"cannot be sealed: val/features/c/0/1/0 \(view 0, rows 4–6\) is missing"):
            writer.seal()
        assert not writer.sealed
    assert mend(small) == [writer.chunks[-1]]


def test_labels_that_do_not_give_the_counts_are_not_sealed(small):
    with small.create() as writer:
        small.fill(writer)
        zarr.open_array(small.path / "train/labels", mode="r+")[:] = 1
        with pytest.raises(CacheError, match="train/labels/c/0 does not give the class counts"):
            writer.seal()
    mend(small)
    np.testing.assert_array_equal(open_cache(small.path).labels("train"), small.labels)


def test_resuming_writes_what_is_torn_or_missing_and_nothing_else(small, tmp_path):
    whole = type(small)(tmp_path / "whole.zarr")
    whole.sealed()
    with small.create() as writer:
        small.fill(writer, writer.chunks[:9])
        torn = [writer.chunks[4], writer.chunks[5]]  # a full one and a last, partly filled one
        assert (torn[0].rows, torn[1].rows) == (4, 3)
        expected = [*torn, *writer.chunks[9:]]
    for chunk in torn:
        truncate(small.path / chunk.array / chunk.key)
    (small.path / torn[0].array / "c/1/0" / ".0.x.tmp").write_bytes(b"left by a kill")
    (small.path / "train/features/0.partial").write_bytes(b"left by a kill")
    (small.path / "train/labels/c/0").unlink()
    assert mend(small) == expected
    assert small.files() == whole.files()


def test_a_sealed_store_comes_back_sealed_with_nothing_to_do(small):
    before = (small.sealed(), small.files())[1]
    with small.create() as writer:
        assert writer.sealed
        assert writer.missing() == []
        assert writer.seal() == open_cache(small.path).digest
        with pytest.raises(CacheError, match="is sealed"):
            small.fill(writer, writer.chunks[:1])
    assert small.files() == before


def test_a_repair_that_was_killed_goes_on_even_where_the_new_bytes_differ(small):
    """Another machine may round otherwise: the old checksum must not condemn the new chunk for ever."""
    small.sealed()
    flip(small.path / CHUNK)
    small.features = lambda split, view: np.ones((23, 5), np.float32)
    with small.create() as writer:
        assert len(writer.missing()) == 1
        small.fill(writer)
    assert mend(small) == []
    assert verify(small.path) == []
    np.testing.assert_array_equal(open_cache(small.path).read("train", 1)[4:8], np.ones((4, 5)))


def test_the_store_does_not_depend_on_how_zarr_formats_its_metadata(small, tmp_path):
    """Another version of zarr may write other bytes that say the same."""
    store.metadata.cache_clear()  # made once a process, by its one version
    with zarr.config.set({"json_indent": None}):
        small.sealed()
    store.metadata.cache_clear()
    usual = type(small)(tmp_path / "usual.zarr")
    usual.sealed()
    assert small.files()["train/zarr.json"] != usual.files()["train/zarr.json"]
    assert verify(small.path) == []
    assert open_cache(small.path).digest == open_cache(usual.path).digest
    truncate(small.path / "train/features/zarr.json")
    flip(small.path / CHUNK)
    assert [c.key for c in mend(small)] == ["c/1/1/0"]
    assert small.files() == usual.files()


def test_an_open_store_has_the_arrays_of_its_layout_when_it_is_resumed(small, tmp_path):
    whole = type(small)(tmp_path / "whole.zarr")
    whole.sealed()
    small.create().close()
    file = small.path / "train/features/zarr.json"
    document = json.loads(file.read_text())
    document["chunk_grid"]["configuration"]["chunk_shape"][1] = 5
    file.write_text(json.dumps(document))
    mend(small)
    assert small.files() == whole.files()


def test_an_open_store_that_is_being_repaired_still_finds_stale_chunks(small, tmp_path):
    small.sealed()
    flip(small.path / CHUNK)
    small.create().close()
    other = type(small)(tmp_path / "other.zarr")
    other.features = lambda split, view: np.ones((23, 5), np.float32)
    stale = "train/features/c/2/0/0"
    (small.path / stale).write_bytes((other.sealed() / stale).read_bytes())
    assert [c.key for c in mend(small)] == ["c/1/1/0", "c/2/0/0"]
