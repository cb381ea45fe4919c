"""Schemas as fields, and options as their values."""

from __future__ import annotations

import json
import random
from enum import Enum
from typing import Annotated, Literal

import pytest
from test_inference import QUESTIONS

from hybrid.inference import answer_batch
from hybrid.schema import MAX_INTEGERS, MAX_VALUES, read_schema

DIGIT = {"type": "integer", "minimum": 1, "maximum": 4}
ROLE = {"enum": ["knight", "knave"]}


def options_of(schema) -> dict[str, tuple[str, ...]]:
    return {field.name: tuple(field.options) for field in read_schema(schema).fields}


def of_property(schema) -> dict:
    return {"type": "object", "properties": {"x": schema}}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (ROLE, ["knight", "knave"]),
        ({"type": "boolean"}, [True, False]),
        (DIGIT, [1, 2, 3, 4]),
        ({"type": "integer", "exclusiveMinimum": -1, "exclusiveMaximum": 2}, [0, 1]),
        ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, [1, 2]),
        ({"type": "integer", "minimum": 1, "maximum": 10**30, "multipleOf": 5 * 10**29}, [5 * 10**29, 10**30]),
        ({"type": "integer", "minimum": -5, "maximum": 9, "multipleOf": 4.0}, [-4, 0, 4, 8]),
        ({"enum": ["a", 1, True, None, 1.5], "type": ["string", "integer", "null"]}, ["a", 1, None]),
        ({"anyOf": [ROLE, {"type": "null"}, ROLE]}, ["knight", "knave", None]),
        ({"type": "string", "oneOf": [{"const": "a", "title": "first"}, {"const": "b"}, {"const": 3}]}, ["a", "b"]),
        ({"oneOf": [{"enum": [1, 1, 2, 3]}, {"enum": [3, 4]}]}, [1, 2, 4]),
        ({"oneOf": [{"const": 1}, {"const": 1.0}, {"enum": [2, 3]}]}, [2, 3]),  # equal numbers match two branches
        ({"enum": [1, 1.0, 1.5]}, [1, 1.5]),
        ({"type": ["boolean", "null"]}, [True, False, None]),
        ({"type": ["integer", "null"], "minimum": 1, "maximum": 2}, [1, 2, None]),
        ({"enum": [1, True, [1], {"a": 1}]}, [1, True, [1], {"a": 1}]),
    ],
)  # fmt: skip
def test_values_keep_their_types(schema, values):
    form = read_schema(of_property(schema))
    (field,) = form.fields
    got = [form.value({"x": option})["x"] for option in field.options]
    assert [json.dumps(value) for value in got] == [json.dumps(value) for value in values]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
    assert list(field.options) == texts


def test_names_are_paths_and_single_values_are_no_fields():
    person = {"type": "object", "properties": {"role": ROLE, "kind": {"const": "islander"}}, "required": ["role"]}
    schema = {
        "$defs": {"a/b": person},
        "properties": {
            "people": {"type": "array", "items": {"$ref": "#/$defs/a~1b"}, "minItems": 2, "maxItems": 2},
            "pair": {"type": "array", "prefixItems": [DIGIT, {"type": "boolean"}]},
            "none": {"type": "array", "minItems": 0, "maxItems": 0},
        },
    }
    form = read_schema(schema)
    assert [field.name for field in form.fields] == ["people.0.role", "people.1.role", "pair.0", "pair.1"]
    value = form.value({"people.0.role": "knave", "people.1.role": "knight", "pair.0": "3", "pair.1": "false"})
    people = [{"role": "knave", "kind": "islander"}, {"role": "knight", "kind": "islander"}]
    assert value == {"people": people, "pair": [3, False], "none": []}
    assert options_of(ROLE) == {"answer": ("knight", "knave")}
    assert list(options_of({"type": "array", "items": ROLE, "minItems": 2, "maxItems": 2})) == ["0", "1"]


def test_values_of_two_answers_share_nothing():
    form = read_schema({"enum": [[1], [2]]})
    form.value({"answer": "[1]"}).append(3)
    assert form.value({"answer": "[1]"}) == [1]


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}, "x": ROLE}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integer"}, "property 'x' is an unbounded integer: give minimum and maximum"),
        ({"type": "integer", "minimum": 1, "maximum": float("inf")}, "unbounded integer"),
        ({"type": "integer", "minimum": 0, "maximum": MAX_INTEGERS}, f"allows {MAX_INTEGERS + 1} integers"),
        ({"type": "integer", "minimum": 0, "maximum": 10**400}, "narrow minimum and maximum"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "property 'x' allows no value"),
        (DIGIT | {"multipleOf": 0.5}, "multipleOf 0.5: expected a whole number"),
        (DIGIT | {"exclusiveMinimum": True}, "exclusiveMinimum True"),
        ({"type": "string"}, "property 'x' is a free text: list its values as an enum"),
        ({"type": "string", "pattern": "a|b"}, "free text"),
        (ROLE | {"pattern": "a|b"}, "has 'pattern', which is not read"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "is a number without a finite list"),
        ({"enum": [1, "1"]}, r"read the same, as text and not as text: \['1'\]"),
        ({"enum": "ab"}, "has enum 'ab'"),
        ({}, "can be anything: give it a type"),
        ({"type": "int"}, "has type int: expected boolean"),
        (True, "is True: expected a schema"),
        ({"type": "array", "items": ROLE}, "list of any length: give minItems and maxItems"),
        ({"type": "array", "items": ROLE, "minItems": 1, "maxItems": 2}, "list of any length"),
        ({"type": "array", "prefixItems": [ROLE], "minItems": 2, "maxItems": 2}, "of which 1 are described"),
        ({"type": "array", "items": ROLE, "minItems": 10**9, "maxItems": 10**9}, "list of 1000000000 items"),
        ({"type": "array", "items": ROLE, "minItems": 2, "maxItems": 2, "uniqueItems": True}, "has 'uniqueItems'"),
        ({"type": "object", "additionalProperties": ROLE}, "object without properties"),
        ({"type": "object", "properties": {"y": ROLE}, "required": ["z"]}, "requires 'z'"),
        ({"anyOf": [of_property(ROLE), {"type": "null"}]}, "object beside other possibilities"),
        ({"allOf": [ROLE]}, "can be anything"),
        ({"$ref": "#/$defs/Other"}, "refers to '#/\\$defs/Other', which is not there"),
        ({"$ref": "other.json"}, "refers to 'other.json', which is not there"),
        ({"$ref": "#/$defs/Role", "maximum": 3}, "has 'maximum'"),
        ({"$ref": "#/$defs/Node"}, "'x.next' refers to itself through '#/\\$defs/Node'"),
        ({"const": 1}, "nothing to choose"),
    ],
)  # fmt: skip
def test_what_is_no_finite_choice_is_refused_by_name(schema, message):
    with pytest.raises(ValueError, match=message):
        read_schema({"$defs": {"Role": ROLE, "Node": NODE}} | of_property(schema))


def test_whole_schemas_that_are_refused():
    side = {"type": "array", "minItems": 40, "maxItems": 40}
    with pytest.raises(ValueError, match=f"value number {MAX_VALUES + 1}"):
        read_schema(side | {"items": side | {"items": ROLE}})
    with pytest.raises(ValueError, match="same path as another property, 'a.b'"):
        read_schema({"properties": {"a.b": ROLE, "a": {"type": "object", "properties": {"b": ROLE}}}})
    with pytest.raises(ValueError, match="expected a Pydantic model, or a JSON schema"):
        read_schema("schema.json")
    with pytest.raises(ValueError, match="the schema refers to itself"):
        read_schema({"$ref": "#"})


def random_schema(generator: random.Random, depth: int) -> dict:
    kind = generator.choice(["enum", "boolean", "integer", *(["object", "array", "tuple"] if depth else [])])
    low, high = generator.randint(-3, 0), generator.randint(2, 5)
    inner = [random_schema(generator, depth - 1) for _ in range(generator.randint(1, 3))] if depth else []
    return {
        "enum": {"enum": generator.sample(["a", "b", 3, None, True], 3)},
        "boolean": {"type": "boolean"},
        "integer": {"type": "integer", "minimum": low, "exclusiveMaximum": high},
        "object": {"type": "object", "properties": {f"p{n}": each for n, each in enumerate(inner)}},
        "array": {"type": "array", "items": inner[0] if inner else {}, "minItems": 2, "maxItems": 2},
        "tuple": {"type": "array", "prefixItems": inner, "items": False},
    }[kind]


def conforms(value, schema) -> bool:
    """What JSON Schema says of a value, for the schemas above."""
    if "enum" in schema:
        return any(json.dumps(value) == json.dumps(each) for each in schema["enum"])
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value < schema["exclusiveMaximum"]
    if schema["type"] == "object":
        return set(value) == set(schema["properties"]) and all(
            conforms(value[k], s) for k, s in schema["properties"].items()
        )
    schemas = schema.get("prefixItems") or [schema["items"]] * 2
    return len(value) == len(schemas) and all(map(conforms, value, schemas))


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_chosen_is_valid(seed):
    generator = random.Random(seed)
    schema = of_property(random_schema(generator, depth=3))
    form = read_schema(schema)
    for _ in range(5):
        assert conforms(form.value({field.name: generator.choice(field.options) for field in form.fields}), schema)


def test_answers_have_the_shape_of_a_json_schema(model):
    schema = {"type": "object", "properties": {"relation": {"enum": ["left", "right"]}, "digit": DIGIT}}
    answer = model.answer(QUESTIONS[0], schema=schema)
    assert answer.value["relation"] in ("left", "right") and answer.value["digit"] in (1, 2, 3, 4)
    assert set(answer.trace[-1]["digit"]) == {"1", "2", "3", "4"}
    best = [max(options.values()) for options in answer.trace[-1].values()]
    assert answer.probability == pytest.approx(best[0] * best[1])
    assert [each.value for each in answer_batch(model, QUESTIONS[:1] * 2, schema=schema)] == [answer.value] * 2


@pytest.mark.parametrize("other", [{"choices": ["a", "b"]}, {"fields": []}])
def test_a_schema_stands_alone(model, other):
    with pytest.raises(ValueError, match="leave out choices and fields"):
        model.answer(QUESTIONS[0], schema=ROLE, **other)


# -- Pydantic, where it is installed ---------------------------------------------------------------------------------


class Color(Enum):
    RED = "red"
    GREEN = "green"


def pydantic_models():
    """A model that takes every answer, and one that takes none."""
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        role: Literal["knight", "knave"]
        hat: Color | None = pydantic.Field(default=None, description="colour of the hat")

    class Island(pydantic.BaseModel):
        people: Annotated[list[Person], pydantic.Field(min_length=2, max_length=2)]
        pair: tuple[bool, Annotated[int, pydantic.Field(ge=1, lt=4)]]
        place: Literal["island"] = "island"

    class Contradiction(Island):
        @pydantic.model_validator(mode="after")
        def refuse(self):
            raise ValueError("nobody lives there")

    for model in (Person, Island, Contradiction):
        model.model_rebuild(_types_namespace={**globals(), **locals()})
    return Island, Contradiction


def test_answers_are_instances_of_a_pydantic_model(model):
    island, contradiction = pydantic_models()
    assert list(options_of(island)) == [
        "people.0.role", "people.0.hat", "people.1.role", "people.1.hat", "pair.0", "pair.1"
    ]  # fmt: skip
    assert options_of(island)["people.0.hat"] == ("red", "green", "null")
    answer = model.answer(QUESTIONS[0], schema=island)
    assert isinstance(answer.value, island) and answer.value.place == "island"
    assert answer.value.people[1].hat in (Color.RED, Color.GREEN, None) and isinstance(answer.value.pair[0], bool)
    with pytest.raises(ValueError, match=r"(?s)Contradiction refuses the answer \{.*nobody lives there"):
        model.answer(QUESTIONS[0], schema=contradiction)
    with pytest.raises(ValueError, match="expected a Pydantic model"):
        model.answer(QUESTIONS[0], schema=answer.value)


def test_unbounded_parts_of_a_pydantic_model_are_named():
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Person", role=(Literal["knight", "knave"], ...), age=(int, ...))
    with pytest.raises(ValueError, match="schema property 'age' is an unbounded integer: give minimum and maximum"):
        read_schema(model)
