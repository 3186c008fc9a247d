"""Configuration: typed, frozen, read once from YAML; an unknown key is an error that names the nearest key that exists."""

from pipeline.config.backbone import RESERVED_MODEL_ARGS, BackboneConfig, WeakenConfig
from pipeline.config.data import DataConfig
from pipeline.config.experiment import Config, DumpConfig, RebalanceOnly
from pipeline.config.load import (
    DEFAULT,
    apply_setting,
    find_config,
    is_rebalance_only,
    load_config,
    make_config,
    make_rebalance_config,
    read_tree,
)
from pipeline.config.rebalance import RebalanceConfig, Variant, parse_bytes
from pipeline.config.section import Section, nearest
from pipeline.shipped import shipped_configs

__all__ = [
    "DEFAULT",
    "RESERVED_MODEL_ARGS",
    "BackboneConfig",
    "Config",
    "DataConfig",
    "DumpConfig",
    "RebalanceConfig",
    "RebalanceOnly",
    "Section",
    "Variant",
    "WeakenConfig",
    "apply_setting",
    "find_config",
    "is_rebalance_only",
    "load_config",
    "make_config",
    "make_rebalance_config",
    "nearest",
    "parse_bytes",
    "read_tree",
    "shipped_configs",
]
