"""The formats in which a frozen encoder computes: chosen by time, kept by the store, fixed by settings."""

import numpy as np
import pytest
import timm
import torch

from cache import open_cache
from pipeline import resources
from pipeline.backbone import encoder
from pipeline.backbone.arithmetic import Arithmetic, computes_bfloat16
from pipeline.backbone.build import encode
from pipeline.backbone.encoder import encode_in_parts, encoding_arithmetic, fastest
from pipeline.config import DumpConfig, find_config, load_config
from pipeline.dump import dump_features
from pipeline.errors import ConfigError

CPU = torch.device("cpu")
FLOAT32 = Arithmetic(torch.float32, "channels_last", 2)
NATIVE = computes_bfloat16(CPU)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("test_efficientnet", num_classes=10).eval()


def test_parts_and_formats_give_the_features_of_one_pass(network):
    images = torch.randn(7, 3, 32, 32)
    with torch.inference_mode():
        features = encode(network, images)
    for memory_format in ("contiguous", "channels_last"):
        for micro_batch in (None, 1, 3, 7, 64):
            arithmetic = Arithmetic(torch.float32, memory_format, micro_batch)
            torch.testing.assert_close(encode_in_parts(network, images, arithmetic), features, atol=1e-5, rtol=1e-4)
    assert encode_in_parts(network, images[:0], FLOAT32).shape == (0, features.shape[1])


@pytest.mark.skipif(not NATIVE, reason="this CPU has no bfloat16 units")
def test_bfloat16_features_point_where_those_in_float32_do(network):
    images = torch.randn(8, 3, 64, 64)
    both = [encode_in_parts(network, images, Arithmetic(p)).float() for p in (torch.float32, torch.bfloat16)]
    assert torch.nn.functional.cosine_similarity(*both).min() > 0.99


def test_the_candidate_that_took_the_least_time_is_taken_and_slow_ones_are_not_timed_again(network, monkeypatch):
    seconds = {"contiguous": 3.0, "channels_last": 1.0}  # one takes more than twice the other's time
    clock, calls = [0.0], []

    def encode_slowly(model, images, arithmetic):
        calls.append(arithmetic)
        clock[0] += seconds[arithmetic.memory_format] * len(images) + (arithmetic.micro_batch == 8)

    monkeypatch.setattr(encoder, "encode_in_parts", encode_slowly)
    monkeypatch.setattr(encoder.time, "thread_time", lambda: clock[0])
    candidates = [Arithmetic(torch.float32, name, 8) for name in seconds]
    assert fastest(network, (8, 8), candidates) == (candidates[1], 9 / 8)
    assert [calls.count(candidate) for candidate in candidates] == [1, 3]
    sizes = [Arithmetic(torch.float32, "channels_last", n) for n in (8, 16)]
    assert fastest(network, (8, 8), sizes)[0].micro_batch == 16


def test_what_is_emulated_is_no_candidate_and_small_networks_are_not_timed(network, monkeypatch):
    tried = []
    monkeypatch.setattr(
        encoder,
        "fastest",
        lambda model, size, candidates, images=None: tried.extend(candidates) or (candidates[0], 1.0),
    )
    assert encoding_arithmetic(network, (8, 8), CPU, DumpConfig()) == Arithmetic(torch.float32)
    monkeypatch.setattr(encoder, "SMALL_NETWORK", 0)
    for native in (False, True):
        tried.clear()
        monkeypatch.setattr(encoder, "computes_bfloat16", lambda device, native=native: native)
        encoding_arithmetic(network, (8, 8), CPU, DumpConfig())
        assert {candidate.precision for candidate in tried} == {torch.float32, *([torch.bfloat16] if native else [])}
        assert {candidate.memory_format for candidate in tried} == {"contiguous", "channels_last"}
    settings = DumpConfig(precision="float32", memory_format="channels_last", micro_batch=2)
    assert encoding_arithmetic(network, (8, 8), CPU, settings) == FLOAT32
    monkeypatch.setattr("pipeline.backbone.arithmetic.computes_bfloat16", lambda device: False)
    with pytest.raises(ConfigError, match=r"dump.precision=bfloat16: this CPU has no bfloat16 units"):
        encoding_arithmetic(network, (8, 8), CPU, DumpConfig(precision="bfloat16"))


def test_a_store_that_was_begun_is_finished_in_its_own_formats(network, monkeypatch):
    monkeypatch.setattr(encoder, "SMALL_NETWORK", 0)
    begun = {"precision": "float32", "device": "cpu", "memory_format": "channels_last", "micro_batch": 2}
    assert encoding_arithmetic(network, (8, 8), CPU, DumpConfig(), recorded=begun) == FLOAT32
    before = {"precision": "float32", "device": "cpu"}  # of version 0.1
    assert encoding_arithmetic(network, (8, 8), CPU, DumpConfig(), recorded=before) == Arithmetic(torch.float32)
    monkeypatch.setattr(encoder, "computes_bfloat16", lambda device: False)
    elsewhere = begun | {"precision": "bfloat16"}
    chosen = encoding_arithmetic(network, (8, 8), CPU, DumpConfig(), recorded=elsewhere)
    assert chosen.precision == torch.float32


def test_the_store_says_how_it_was_encoded_and_a_second_dump_takes_that(tmp_path, monkeypatch):
    settings = ["backbone.encoder=lite0", "data.image_size=32", "dump.views=1", "dump.memory_format=channels_last"]
    config = load_config(find_config("digits-lt"), [*settings, "dump.micro_batch=8", "dump.precision=float32"])
    dump_features(None, config, out=tmp_path / "features.zarr", device="cpu")
    store = open_cache(tmp_path / "features.zarr")
    assert [store.provenance[k] for k in ("precision", "memory_format", "micro_batch")] == [
        "float32",
        "channels_last",
        8,
    ]
    features = store.read("test")
    (tmp_path / "features.zarr" / "test" / "features" / "c" / "0" / "0" / "0").unlink()
    monkeypatch.setattr(
        encoder, "fastest", lambda model, size, candidates, images=None: (candidates[0], 0.0)
    )  # no trial decides again
    free = load_config(find_config("digits-lt"), settings[:-1])
    assert dump_features(None, free, out=tmp_path / "features.zarr", device="cpu").written == 1
    np.testing.assert_array_equal(open_cache(tmp_path / "features.zarr").read("test"), features)


def test_freed_memory_is_kept_but_not_against_the_users_own_word(monkeypatch):
    keep = resources.keep_freed_memory.__wrapped__
    for name, value in (("MALLOC_TOP_PAD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=4")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not keep()
    monkeypatch.setattr(resources.platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not keep()
