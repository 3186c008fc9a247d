"""docs/training.md: its table has the defaults."""

import re

import yaml

from pipeline.config import BackboneConfig
from tests.markdown import prose


def test_the_defaults_are_those_of_the_configuration():
    rows = re.findall(r"^\| `backbone\.(\w+)` \| ([^|]+) \|", prose("docs/training.md"), re.M)
    assert len(rows) == 11
    defaults = BackboneConfig()
    for key, told in rows:
        assert getattr(defaults, key) == yaml.safe_load(told), key
