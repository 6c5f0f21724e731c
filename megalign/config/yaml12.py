"""YAML by the rules of version 1.2, in which `1e-4` is a number and `no` is a word; a key given twice is refused.

PyYAML follows 1.1, where 1e-4 is a string, `no` is false, 12:30 a number and 010 eight.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

# The core schema (yaml.org/spec/1.2.2, section 10.3.2): tag -> (pattern, first characters).
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_PLAIN_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (_FLOAT, list("-+0123456789.")),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above, which refuses a key given twice."""

    yaml_implicit_resolvers: ClassVar = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A key given twice is an error: PyYAML would silently keep the last."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # other keys are refused below
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        f"key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper with the same table, so that the string "1e-4" is quoted and comes back a string."""

    yaml_implicit_resolvers: ClassVar = {}


for _name, (_pattern, _first) in _PLAIN_SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError, with the place in `problem_mark` where there is one."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except ValueError as error:  # Python reads no number of more than 4300 digits
        raise yaml.YAMLError(str(error)) from None


def write_yaml(data: Any) -> str:
    """YAML that `read_yaml` reads back equal."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
