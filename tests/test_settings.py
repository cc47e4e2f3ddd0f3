"""Settings checked by pydantic: what they hold, how they are refused, what editors know of them."""

import dataclasses
import json
import re
import typing
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cli import done

from nulledit.cli.methods import field_docs
from nulledit.cli.recipe import recipe_schema
from nulledit.config import Recipe, load_recipe, shipped_recipes
from nulledit.errors import ConfigError
from nulledit.io.settings import (
    Count,
    Number,
    OneSlot,
    Several,
    checked,
    load_settings,
    read_settings,
    shipped,
)
from nulledit.methods import METHODS
from nulledit.runs.limits import Limits
from nulledit.studies.scale import Scale


@checked
@dataclass(frozen=True)
class Inner:
    count: Count = 1
    share: Number = 0.5
    text: OneSlot = "{}"


@checked
@dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    several: Several[Inner] = ()
    kind: Literal["a", "b"] = "a"
    on: bool = False
    may: Inner | None = None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"inner": {"count": 0}}, "inner.count is 0; expected a whole number from 1, below 2^63"),
        ({"inner": {"count": True}}, "inner.count is True; expected a whole number"),
        ({"inner": {"count": "5"}}, "inner.count is '5'; expected a whole number"),
        ({"inner": {"count": 5.0}}, "inner.count is 5.0; expected a whole number"),
        ({"inner": {"count": 2**63}}, "inner.count is a number of 64 bits; expected"),
        ({"inner": {"count": 10**5000}}, "inner.count is a number of 16610 bits; expected"),
        ({"inner": {"share": True}}, "inner.share is True; expected a number"),
        ({"inner": {"share": "5"}}, "inner.share is '5'; expected a number"),
        ({"inner": {"share": "nan"}}, "inner.share is 'nan'; expected a number"),
        ({"inner": {"share": 10**400}}, "inner.share is a number of 1329 bits; expected a number"),
        ({"inner": {"text": "x" * 999}}, "expected a text with exactly one {}"),
        ({"inner": {"cuont": 1}}, "unknown setting 'inner.cuont'; did you mean 'count'?"),
        ({"inner": {"zzz": 1}}, "unknown setting 'inner.zzz'; known: count, share, text"),
        ({"inner": {7: 1}}, "unknown setting 'inner.7'; known: count, share, text"),
        ({"may": {"cuont": 1}}, "unknown setting 'may.cuont'; did you mean 'count'?"),
        ({"several": [{}, {"cuont": 1}]}, "unknown setting 'several.cuont'; did you mean"),
        ({"several": "x"}, "several is 'x'; expected a list"),
        ({"inner": [1]}, "inner is [1]; expected named settings"),
        ({"kind": "c"}, "kind is 'c'; expected one of a, b"),
        ({"on": 1}, "on is 1; expected true or false"),
        ([1], "what is given is [1]; expected named settings"),
        (None, "what is given is None; expected named settings"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data, said):
    with pytest.raises(ConfigError) as caught:
        read_settings(Outer, data)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 150
    assert "\n" not in str(caught.value)
    if isinstance(data, dict):
        with pytest.raises(ConfigError, match=re.escape(said)):
            Outer(**data)


def test_settings_stay_dataclasses():
    one = Outer(Inner(3), [{"share": "2e-2"}], on=True)
    assert one == Outer(inner={"count": 3}, several=(Inner(share=0.02),), on=True)
    assert hash(one) == hash(dataclasses.replace(one))
    assert isinstance(one.several, tuple)
    assert isinstance(Inner(share=1).share, float), "whole numbers are numbers"
    assert read_settings(Outer, dataclasses.asdict(one)) == one
    assert read_settings(Outer, one) is one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.on = False
    with pytest.raises(ConfigError, match=r"inner\.count is 0"):
        dataclasses.replace(one, inner={"count": 0})


def test_a_plain_dataclass_of_another_package_is_checked_as_well():
    @dataclass(frozen=True)
    class Plain:
        share: float = 0.5

    assert read_settings(Plain, {"share": 1}, "method.") == Plain(1.0)
    with pytest.raises(ConfigError, match=r"method\.share is True; expected a number"):
        read_settings(Plain, {"share": True}, "method.")
    with pytest.raises(ConfigError, match=r"unknown setting 'method\.shar'; did you mean 'share'"):
        read_settings(Plain, {"shar": 1}, "method.")


@pytest.mark.parametrize("cls", [Recipe, Limits, Scale])
def test_settings_are_read_by_name_and_by_file(cls, tmp_path):
    assert shipped(cls)
    for name in shipped(cls):
        assert load_settings(cls, name).from_dict({}) if cls is Recipe else load_settings(cls, name)
    with pytest.raises(ConfigError, match=f"^no {cls.kind} 'nowhere': expected a YAML file, or"):
        load_settings(cls, "nowhere")
    (tmp_path / "file.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"file\.yaml: .*expected"):
        load_settings(cls, tmp_path / "file.yaml")


# -- what editors know ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema():
    return json.loads(done("recipe", "schema").stdout)


def fits(value, part, whole):
    """Whether JSON fits a schema, as far as that of recipes goes."""
    part = part | whole["$defs"].get(part.get("$ref", "").removeprefix("#/$defs/"), {})
    kinds = {"integer": int, "number": int | float, "string": str, "boolean": bool}
    kinds |= {"array": list, "object": dict, "null": type(None)}
    kind = part.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (value is True and kind != "boolean")):
        return False
    if "anyOf" in part and not any(fits(value, p, whole) for p in part["anyOf"]):
        return False
    if isinstance(value, dict) and "properties" in part:
        known = part["properties"]
        named = set(part.get("required", ())) <= set(value)
        extra = set(value) - set(known) and not part.get("additionalProperties", True)
        inside = all(fits(v, known[k], whole) for k, v in value.items() if k in known)
        return named and not extra and inside
    if isinstance(value, list):
        return all(fits(v, part["items"], whole) for v in value)
    return (
        value in part.get("enum", [value])
        and value == part.get("const", value)
        and (value is None or kind not in ("integer", "number") or within(value, part))
    )


def within(value, part):
    return (
        part.get("minimum", value) <= value <= part.get("maximum", value)
        and value > part.get("exclusiveMinimum", value - 1)
        and value < part.get("exclusiveMaximum", value + 1)
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_schema_takes_shipped_recipes(name, schema):
    plain = load_recipe(name).to_dict()
    assert fits(plain, schema, schema)
    assert not fits(plain | {"layer": [1]}, schema, schema)
    assert not fits(plain | {"batch_size": 0}, schema, schema)
    assert not fits(plain | {"method": {"name": "memit", "softness": 1}}, schema, schema)


@pytest.mark.parametrize("method", [m.name for m in METHODS])
def test_the_schema_knows_each_methods_constants(method, schema):
    found = next(m for m in METHODS if m.name == method)
    plain = {"method": {"name": method, "projection": "none"} | found.constants()}
    assert fits(plain, schema, schema)
    assert Recipe.from_dict(plain).method.constants == found.constants()
    assert not fits({"method": {"name": method, "no_such": 1}}, schema, schema)


def test_every_setting_says_what_it_is(schema):
    assert schema == json.loads(json.dumps(recipe_schema()))
    described = {}
    for section in (schema, *schema["$defs"].values()):
        for part in (section, *section.get("anyOf", ())):
            described |= {k: p["description"] for k, p in part.get("properties", {}).items()}
    hints = typing.get_type_hints(Recipe)
    for cls in (Recipe, *(k for k in hints.values() if dataclasses.is_dataclass(k))):
        for name in (f.name for f in dataclasses.fields(cls)):
            assert name == "constants" or described[name], name
    assert all(described.values())
    assert field_docs(Recipe)["same_key"] in described.values()


@given(
    st.dictionaries(
        st.sampled_from(["layers", "method", "values", "same_key", "batch_size", "chat", "other"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["name", "steps", "l2", "system", "clamp", "x"]),
                    inner,
                    max_size=3,
                )
            ),
            max_leaves=5,
        ),
        max_size=3,
    )
)
def test_any_plain_data_is_a_recipe_or_refused_in_one_line(data):
    said = ""
    try:
        recipe = Recipe.from_dict(data)
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
