"""A Pydantic model or a JSON schema as fields, and the chosen options as its value.

A value that has several possibilities is a field, named by its path (`people.0.role`). Objects and lists of fixed
length hold fields; every property is asked, required or not. Whatever else JSON Schema can say is refused by name, so
that a value put together from chosen options is valid.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from hybrid.decoder import Field

MAX_INTEGERS = 1000  # options that a bounded integer may have
MAX_VALUES = 1000  # values of one schema
ROOT_NAME = "answer"  # field name of a schema that is no object or list

# What is read of each form of a schema, beside annotations (`title`, `default`, ...).
FORMS = {
    "$ref": {"$ref"},
    "const": {"const", "type"},
    "enum": {"enum", "type"},
    "anyOf": {"anyOf", "type"},
    "oneOf": {"oneOf", "type"},
    "object": {"type", "properties", "required", "additionalProperties", "unevaluatedProperties"},
    "array": {"type", "items", "prefixItems", "minItems", "maxItems"},
    "integer": {"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
    "boolean": {"type"},
    "null": {"type"},
}
# Keywords of JSON Schema that can make a value invalid.
ASSERTIONS = set().union(*FORMS.values()) | set(
    "$dynamicRef $recursiveRef allOf not if contains uniqueItems additionalItems unevaluatedItems pattern minLength "
    "maxLength patternProperties propertyNames minProperties maxProperties dependentRequired dependentSchemas "
    "dependencies".split()
)
UNBOUNDED = {
    "string": "is a free text: list its values as an enum (a Literal in Python)",
    "number": "is a number without a finite list of values: list them as an enum, or make it an integer with minimum "
    "and maximum",
    "object": "is an object beside other possibilities: keep one",
    "array": "is a list beside other possibilities: keep one",
    "anything": "can be anything: give it a type, or an enum",
}


@dataclass(frozen=True)
class Form:
    """What a schema asks, and how the answers make its value.

    Attributes:
        fields: A field for each value with several possibilities.
        options: Field name → option → value; values with a single possibility are here, too.
        template: The value, with names in the places of values.
        model: The Pydantic model, `None` for a JSON schema.
    """

    fields: tuple[Field, ...]
    options: Mapping[str, Mapping[str, Any]]
    template: Any
    model: Any = None

    def value(self, chosen: Mapping[str, str]) -> Any:
        """The value of the schema for a chosen option of each field: plain Python, or an instance of the model.

        Raises:
            ValueError: The model's own validators refuse it.
        """
        values = {name: options[chosen.get(name, next(iter(options)))] for name, options in self.options.items()}
        value = _fill(self.template, values)
        if self.model is None:
            return value
        try:
            return self.model.model_validate_json(json.dumps(value))  # strict models take JSON's texts and lists
        except ValueError as error:
            reason = f"{self.model.__name__} refuses the answer {json.dumps(value, ensure_ascii=False)}: {error}"
            raise ValueError(reason) from error


def read_schema(schema: Any) -> Form:
    """Find the fields of a schema.

    A boolean has the options `true` and `false`, an integer its digits, an absent value `null`.

    Args:
        schema: A JSON schema as a mapping, or any class with Pydantic's `model_json_schema` and `model_validate_json`.

    Raises:
        ValueError: A part of the schema is no finite choice; the message names it and the fix.
    """
    is_model = (
        isinstance(schema, type) and hasattr(schema, "model_json_schema") and hasattr(schema, "model_validate_json")
    )
    root = schema.model_json_schema() if is_model else schema
    if not isinstance(root, Mapping):
        raise ValueError(f"schema={schema!r}: expected a Pydantic model, or a JSON schema as a mapping")
    options: dict[str, dict[str, Any]] = {}
    template = _template(_follow(_Place(root, root, options)))
    fields = tuple(Field(name, tuple(texts)) for name, texts in options.items() if len(texts) > 1)
    if not fields:
        raise ValueError("the schema has nothing to choose: give a value at least two possibilities")
    return Form(fields, options, template, schema if is_model else None)


@dataclass(frozen=True)
class _Place:
    """A place in a schema: what is said there, the whole schema, the options found so far, and how it was reached."""

    schema: Any
    root: Mapping[str, Any]
    options: dict[str, dict[str, Any]]
    path: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()

    def at(self, schema: Any, *path: str) -> _Place:
        """A place below this one; `$ref` is followed."""
        return _follow(replace(self, schema=schema, path=(*self.path, *path)))

    def error(self, reason: str) -> ValueError:
        where = f"schema property {'.'.join(self.path)!r}" if self.path else "the schema"
        return ValueError(f"{where} {reason}")

    def get(self, keyword: str, kind: Any, default: Any = None) -> Any:
        """The value of a keyword, checked to be of a kind."""
        value = self.schema.get(keyword, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.error(f"has {keyword} {value!r}: that is not what JSON Schema expects there")
        return value

    def forms(self) -> list[str]:
        """The keys of `FORMS` that the schema is of, or its types."""
        for form in ("$ref", "const", "enum", "anyOf", "oneOf"):
            if form in self.schema:
                return [form]
        types = self.schema.get("type", "object" if "properties" in self.schema else "anything")
        return [str(each) for each in types] if isinstance(types, list) else [str(types)]

    def check_keywords(self) -> None:
        """Refuse what is not read."""
        read = set().union(*(FORMS[form] for form in self.forms()))
        if unread := sorted(ASSERTIONS & set(self.schema) - read):
            raise self.error(f"has {unread[0]!r}, which is not read here: leave it out, or list the values as an enum")


def _follow(place: _Place) -> _Place:
    if not isinstance(place.schema, Mapping):
        raise place.error(f"is {place.schema!r}: expected a schema, such as {{'type': 'boolean'}}")
    if "$ref" not in place.schema:
        return place
    place.check_keywords()
    ref = place.get("$ref", str)
    if ref in place.refs:
        raise place.error(f"refers to itself through {ref!r}: a recursive schema has no finite list of fields")
    target: Any = place.root if ref == "#" or ref.startswith("#/") else None
    for part in unquote(ref).split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        target = target.get(part) if isinstance(target, Mapping) else None
    if target is None:
        raise place.error(f"refers to {ref!r}, which is not there: define it in $defs")
    return _follow(replace(place, schema=target, refs=(*place.refs, ref)))


def _template(place: _Place) -> Any:
    """The value at a place with names in the places of values, whose options are noted in `place.options`."""
    if place.forms() == ["object"]:
        return _object(place)
    if place.forms() == ["array"]:
        return _list(place)
    values: dict[str, Any] = {}
    for value in _values(place):
        values.setdefault(_text(value), value)
    texts = [value if isinstance(value, str) else text for text, value in values.items()]
    name = ".".join(place.path) or ROOT_NAME
    if not values:
        raise place.error("allows no value")
    if len(set(texts)) < len(texts):
        twice = sorted({text for text in texts if texts.count(text) > 1})
        raise place.error(f"has values that read the same, as text and not as text: {twice}; keep one of each")
    if name in place.options:
        raise place.error(f"has the same path as another property, {name!r}: rename one")
    if len(place.options) == MAX_VALUES:
        raise place.error(f"is value number {MAX_VALUES + 1}: a schema may have {MAX_VALUES}; split it")
    place.options[name] = dict(zip(texts, values.values(), strict=True))
    return name


def _object(place: _Place) -> dict[str, Any]:
    place.check_keywords()
    properties = place.get("properties", Mapping, {})
    if not properties:
        raise place.error("is an object without properties: list them")
    if missing := [name for name in place.get("required", list, []) if name not in properties]:
        raise place.error(f"requires {missing[0]!r}, which is not among its properties: describe it there")
    return {name: _template(place.at(schema, name)) for name, schema in properties.items()}


def _list(place: _Place) -> list[Any]:
    place.check_keywords()
    first = place.get("prefixItems", list, [])
    default = len(first) or None
    low, high = place.get("minItems", int, default), place.get("maxItems", int, default)
    if low is None or low != high:
        raise place.error("is a list of any length: give minItems and maxItems, the same number")
    if low > MAX_VALUES:
        raise place.error(f"is a list of {low} items: a schema may have {MAX_VALUES} values; split it")
    if low > len(first) and "items" not in place.schema:
        raise place.error(f"is a list of {low} items, of which {len(first)} are described: give items")
    schemas = [first[number] if number < len(first) else place.schema["items"] for number in range(low)]
    return [_template(place.at(schema, str(number))) for number, schema in enumerate(schemas)]


def _text(value: Any) -> str:
    """A value as JSON, the same for 1 and 1.0, which JSON Schema takes for equal; in Python 1 equals True, too."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number))


def _number(digits: str) -> float | int:
    number = float(digits)
    return int(number) if number.is_integer() else number


def _values(place: _Place) -> list[Any]:
    """The values that a schema allows, if they are finitely many."""
    schema, forms = place.schema, place.forms()
    if forms[0] not in ("const", "enum", "anyOf", "oneOf"):
        values = [value for kind in forms for value in _values_of_type(place, kind)]
        place.check_keywords()
        return values
    place.check_keywords()
    if forms == ["const"]:
        values = [schema["const"]]
    elif forms == ["enum"]:
        values = place.get("enum", list)
    else:
        branches = [_values(place.at(branch)) for branch in place.get(forms[0], list)]
        values = [value for branch in branches for value in branch]
        if forms == ["oneOf"]:
            counts = Counter(text for branch in branches for text in set(map(_text, branch)))
            values = [value for value in values if counts[_text(value)] == 1]
    types = schema.get("type", [])
    types = set(types if isinstance(types, list) else [types])
    return [value for value in values if not types or types & _types_of(value)]


def _values_of_type(place: _Place, kind: str) -> list[Any]:
    if kind == "integer":
        return _integers(place)
    if kind in ("boolean", "null"):
        return [True, False] if kind == "boolean" else [None]
    reason = f"has type {kind}: expected boolean, integer, object, array or null, or an enum"
    raise place.error(UNBOUNDED.get(kind, reason))


def _integers(place: _Place) -> list[int]:
    lowest = [math.ceil(bound) for bound in _bound(place, "minimum")]
    lowest += [math.floor(bound) + 1 for bound in _bound(place, "exclusiveMinimum")]
    highest = [math.floor(bound) for bound in _bound(place, "maximum")]
    highest += [math.ceil(bound) - 1 for bound in _bound(place, "exclusiveMaximum")]
    if not lowest or not highest:
        raise place.error("is an unbounded integer: give minimum and maximum")
    step = place.get("multipleOf", int | float, 1)
    if step < 1 or step % 1:
        raise place.error(f"has multipleOf {step!r}: expected a whole number > 0")
    step = int(step)
    first, stop = -(-max(lowest) // step), min(highest) // step + 1  # in steps
    if stop - first > MAX_INTEGERS:
        raise place.error(f"allows {stop - first} integers: at most {MAX_INTEGERS}; narrow minimum and maximum")
    return [number * step for number in range(first, stop)]


def _bound(place: _Place, keyword: str) -> list[float]:
    """The bound, if there is one."""
    bound = place.get(keyword, int | float)
    return [bound] if bound is not None and -math.inf < bound < math.inf else []


def _types_of(value: Any) -> set[str]:
    """The names that JSON Schema has for the type of a value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"number"} if value % 1 else {"number", "integer"}
    names = {str: "string", bool: "boolean", type(None): "null", dict: "object", list: "array"}
    return {name for kind, name in names.items() if isinstance(value, kind)}


def _fill(template: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(template, dict):
        return {name: _fill(part, values) for name, part in template.items()}
    if isinstance(template, list):
        return [_fill(part, values) for part in template]
    return copy.deepcopy(values[template])
