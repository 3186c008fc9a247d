"""YAML as plain data: small, shallow, finite; whatever the text, the answer or the refusal comes at once."""

from typing import Any

import yaml

MOST_CHARACTERS, MOST_SCALAR = 1 << 17, 4_000  # of a text, and of one value in it
MOST_VALUES, DEEPEST = 100_000, 40  # once every alias is written out


class PlainLoader(yaml.SafeLoader):
    """yaml's loader of plain values, which gives up where they are nested too deep."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def plain_yaml(text: str) -> Any:
    """Return the tree of a YAML text: dictionaries, lists, texts, numbers, dates and None.

    Raises: YAMLError: whatever is wrong, a text too long, too deep, with too much behind its aliases, or that holds itself.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"{len(text):,} characters, more than {MOST_CHARACTERS:,}")
    loader = PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _values(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError:
        raise
    except Exception as error:  # of values that look like dates or numbers and are none
        raise yaml.YAMLError(f"a value cannot be read: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


def _values(node: yaml.Node, sizes: dict[int, int], depth: int) -> int:
    """Return the number of values in a node with every alias written out; raise YAMLError where it is beyond the limits."""
    if depth > DEEPEST:
        raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > MOST_SCALAR:
            raise yaml.YAMLError(f"a value of {len(node.value):,} characters, more than {MOST_SCALAR:,}")
        return 1
    key = id(node)
    if key not in sizes:
        sizes[key] = -1  # until it is known
        inside = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else [pair])]
        sizes[key] = 1 + sum(_values(part, sizes, depth + 1) for part in inside)
    if sizes[key] < 0:
        raise yaml.YAMLError("a value holds itself")
    if sizes[key] > MOST_VALUES:
        raise yaml.YAMLError(f"more than {MOST_VALUES:,} values once every alias is written out")
    return sizes[key]
