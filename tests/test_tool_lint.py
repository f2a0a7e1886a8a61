"""The schema linter: each rule on a schema that has the fault and on one that does not; odd schemas; the command."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import agentkit as ak
from agentkit.errors import DataError, UsageError
from agentkit.tool_lint import Finding, lint, lint_tools
from agentkit.tool_schemas import ToolSchema
from agentkit_pipelines import tools_cli

TEXT = "Pays back what an order cost; the customer is told by mail."


def tool(properties: dict[str, Any] | None = None, required: tuple[str, ...] = (), **options: Any) -> ToolSchema:
    parameters = {"type": "object", "properties": properties or {}, "required": list(required)}
    return ToolSchema(**{"name": "refund", "description": TEXT, "parameters": parameters, **options})


def rules(*schemas: ToolSchema) -> list[str]:
    return [f.rule for f in lint(schemas)]


def of_property(required: bool = False, **schema: Any) -> list[str]:
    """Rules that one property, called `name`, breaks."""
    name = schema.pop("name")
    return rules(tool({name: {"description": "What it is for.", **schema}}, (name,) if required else ()))


def test_a_good_schema_has_no_findings():
    order = {"type": "string", "pattern": r"^ORD-\d{5}$", "description": "The order's number."}
    amount = {"type": "number", "exclusiveMinimum": 0, "maximum": 500, "description": "US dollars."}
    why = {"type": "string", "enum": ["damaged", "late"]}
    assert lint([tool({"order_id": order, "amount_usd": amount, "why": why}, ("order_id",), permission="write")]) == []
    assert lint([]) == []
    assert lint([tool(parameters={})]) == []


# ---- schemas that are none


@pytest.mark.parametrize(
    ("parameters", "where", "said"),
    [
        ({"type": "dict"}, "arguments.type", "'dict' is not valid"),
        ({"type": "object", "properties": {"a": {"type": "float"}}}, "arguments.a.type", "'float' is not valid"),
        ({"type": "object", "required": "a"}, "arguments.required", "'a' is not of type 'array'"),
        ({"type": "string"}, "arguments", "the type is 'string'"),
        ([], "arguments", "give a JSON schema of an object"),
        (None, "arguments", "give a JSON schema of an object"),
        ({"properties": {"a": {"$ref": "#/$defs/Order"}}}, "arguments", "'#/$defs/Order' leads to no schema"),
        ({"properties": {"a": {"$ref": "https://example.com/order"}}}, "arguments", "leads to no schema"),
    ],
)
def test_what_is_no_schema_of_an_object_is_the_only_finding(parameters, where, said):
    [found] = lint([tool(parameters=parameters)])
    assert (found.rule, found.severity, found.where) == ("invalid-schema", "error", where)
    assert said in found.message


def test_a_schema_nested_too_deep_is_a_finding():
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(5_000):
        schema = {"type": "object", "properties": {"a": schema}}
    [found] = lint([tool(parameters=schema)])
    assert "nested too deep" in found.message


def test_required_must_name_properties():
    population = {"type": "object", "description": "How many.", "required": ["adults"]}
    assert rules(tool({"population": population})) == ["required-unknown"]
    [found] = lint([tool({"a": {"type": "boolean", "description": "On."}}, ("a", "colour"))])
    assert (found.rule, found.where, found.severity) == ("required-unknown", "arguments", "error")
    assert "['colour']" in found.message


# ---- required and defaults


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "description": "The store's branch. Default is the nearest."},
        {"type": "integer", "description": "Pages, defaults to 3.", "minimum": 1},
        {"type": "boolean", "description": "Optional flag for archived ones."},
        {"type": "string", "description": "The league. If not specified, all of them."},
        {"type": "boolean", "description": "Also those archived.", "default": False},
    ],
)
def test_what_may_be_left_out_must_not_be_required(schema):
    assert of_property(name="filter", required=True, **schema) == ["required-mismatch"]
    assert of_property(name="filter", **schema) == []


@pytest.mark.parametrize("text", ["Required. The account.", "The account (required)", "This field is required."])
def test_what_calls_itself_required_must_be_so(text):
    assert of_property(name="account", type="string", description=text) == ["required-mismatch"]
    assert of_property(name="account", type="string", description=text, required=True) == []


@pytest.mark.parametrize(
    "text", ["Whether a visa is required.", "Include default settings.", "An optional services list"]
)
def test_those_words_in_another_sense_are_no_findings(text):
    assert of_property(name="visa", type="boolean", description=text, required="settings" in text) == []


def test_null_is_a_way_to_leave_out_what_is_required():
    schema = {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "Optional remark."}
    assert of_property(name="remark", required=True, **schema) == []


@pytest.mark.parametrize(
    ("schema", "default", "fits"),
    [
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, False, True),
        ({"type": "integer"}, "5 years", False),
        ({"type": "string", "enum": ["asc", "desc"]}, "ascending", False),
        ({"type": "string", "enum": ["asc", "desc"]}, "asc", True),
        ({"type": "number", "minimum": 1, "maximum": 9}, 0, False),
        ({"type": "array", "items": {"type": "string"}}, "None", False),
        ({"type": "string"}, None, True),
    ],
)
def test_a_default_fits_its_own_schema(schema, default, fits):
    assert of_property(name="order", default=default, **schema) == ([] if fits else ["default-mismatch"])


# ---- shape


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({}, True),
        ({"type": "object"}, True),
        ({"type": "object", "additionalProperties": True}, True),
        ({"type": "object", "additionalProperties": {"type": "number"}}, False),
        ({"type": "object", "additionalProperties": False}, False),
        ({"type": "array"}, True),
        ({"type": "array", "items": {"type": "string"}}, False),
        ({"type": "array", "items": {"type": "object"}}, True),
        ({"enum": ["a", "b"]}, False),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, False),
    ],
)
def test_every_value_has_a_shape(schema, fault):
    assert of_property(name="grades", **schema) == (["untyped"] if fault else [])


# ---- texts


def test_a_tool_without_a_text():
    assert rules(tool(description=" ")) == ["missing-description"]


@pytest.mark.parametrize(
    ("name", "text", "vague"),
    [
        ("refund", "TODO", True),
        ("book_reservation", "Book a reservation.", True),
        ("get_data", "Gets the data", True),
        ("string_reverse", "Reverses a string.", False),  # there is no more to say
        ("book_reservation", "Book a table; the card on file is charged.", False),
        ("bestellen", "下单", False),
    ],
)
def test_a_text_says_more_than_the_name(name, text, vague):
    assert rules(tool(name=name, description=text)) == (["vague-description"] if vague else [])


def test_a_parameter_with_a_cryptic_name_needs_more_than_that_name():
    assert of_property(name="data", type="string", description="The data.") == ["vague-description"]
    assert of_property(name="city", type="string", description="The city.") == []
    assert of_property(name="city", type="string", description="n/a") == ["vague-description"]


def test_bare_parameters_of_an_object_are_one_finding():
    point = {"type": "object", "properties": {"east": {"type": "number"}}}
    first, second = lint([tool({"a": {"type": "string"}, "b": {"type": "string"}, "point": point})])
    assert (first.rule, first.where, second.where) == ("missing-description", "arguments", "arguments.point")
    assert "no description of a, b, point;" in first.message


def test_a_text_elsewhere_will_do():
    assert rules(tool({"order": {"type": "string"}}, description="Pay back `order`.")) == []
    assert rules(tool({"mode": {"type": "string", "enum": ["on", "off"]}})) == []
    assert (
        rules(tool({"at": {"type": "object", "properties": {"x": {"type": "number", "description": "East."}}}})) == []
    )


# ---- values


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("The unit, 'miles' or 'kilometers'.", True),
        ("The unit, either metric or imperial.", True),
        ("Options are: economy, business, first.", True),
        ('The mode to set. [Enum]: ["engage", "release"]', True),
        ("'asc' for ascending or 'desc' for descending; one of asc, desc.", True),
        ("The platform, such as 'PC' or 'Xbox'.", False),
        ("The genre, e.g. 'jazz', 'pop'.", False),
        ("Possible values: 'bug', 'fish', etc.", False),
        ("The city. Default is 'Paris'.", False),
    ],
)
def test_a_closed_list_in_the_text_is_an_enum(text, closed):
    expected = ["missing-enum"] if closed else []
    assert of_property(name="choice", type="string", description=text) == expected
    assert of_property(name="choice", type="array", items={"type": "string"}, description=text) == expected
    assert of_property(name="choice", type="string", description=text, enum=["a"]) == []


@pytest.mark.parametrize(
    ("name", "text", "bounds"),
    [
        ("fan", "The fan's speed, from 0 to 100.", {"minimum": 0, "maximum": 100}),
        ("priority", "Urgency (1-5).", {"minimum": 1, "maximum": 5}),
        ("factor", "Must be positive.", {"exclusiveMinimum": 0}),
        ("discount_percent", "What is taken off.", {"minimum": 0, "maximum": 100}),
        ("latitude", "Where.", {"minimum": -90, "maximum": 90}),
        ("limit", "The most to return.", {"minimum": 1, "maximum": 50}),
        ("amount_usd", "What is paid.", {"minimum": 0}),
        ("refundAmount", "What is paid.", {"exclusiveMinimum": 0}),
    ],
)
def test_numbers_with_a_natural_range_have_bounds(name, text, bounds):
    assert of_property(name=name, type="number", description=text) == ["unbounded-number"]
    assert of_property(name=name, type="number", description=text, **bounds) == []


def test_numbers_that_may_be_anything_need_no_bounds():
    for name in ("x_offset", "net_income", "balance", "year", "upper_limit", "max_price"):
        assert of_property(name=name, type="number", description="As the report has it.") == []


def test_a_count_is_a_note():
    [found] = lint([tool({"rooms": {"type": "integer", "description": "Number of rooms."}})])
    assert (found.rule, found.severity) == ("unbounded-count", "note")
    assert of_property(name="rooms", type="integer", description="Number of rooms.", minimum=1) == []


@pytest.mark.parametrize("name", ["check_in_date", "startTime", "base_currency", "order_id", "phone", "timezone"])
def test_a_string_with_a_written_form_says_which(name):
    text = {"description": "As the customer said."}
    assert of_property(name=name, type="string", **text) == ["unbounded-string"]
    assert of_property(name=name, type="string", pattern="^x", **text) == []
    assert of_property(name=name, type="string", format="date", **text) == []
    assert of_property(name=name, type="string", description="Such as A-17.") == []
    assert of_property(name=name, type="string", description="In YYYY-MM-DD.") == []


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("duration", "How long to play.", False),
        ("duration", "How long to play, in minutes.", True),
        ("duration_s", "How long to play.", True),
        ("duration", "How many nights.", True),
        ("initial_velocity", "The speed it begins with.", False),
        ("interest_rate", "The yearly interest rate.", False),
        ("interest_rate", "The yearly interest rate, as a decimal.", True),
        ("interest_rate", "The yearly interest rate, e.g. 0.05.", True),
        ("sampling_rate", "How often to look.", True),
    ],
)
def test_a_quantity_has_a_unit(name, text, told):
    assert of_property(name=name, type="number", description=text) == ([] if told else ["missing-unit"])


def test_a_parameter_for_the_unit_is_a_unit():
    distance = {"type": "number", "description": "How far."}
    unit = {"type": "string", "enum": ["km", "mi"]}
    assert rules(tool({"distance": distance, "unit": unit})) == []


# ---- permission, and several tools


def test_a_tool_that_reads_is_not_called_delete():
    for name in ("delete_order", "orders.delete", "cancelBooking"):
        assert rules(tool(name=name, permission="read")) == ["permission-mismatch"]
        assert rules(tool(name=name, permission="write")) == []
    assert rules(tool(name="booking_details", permission="read")) == []


def test_two_tools_of_one_name():
    [found] = lint([tool(), tool(description="Something else altogether.")])
    assert (found.rule, found.severity) == ("duplicate-name", "error")


def two(first: tuple[str, str], second: tuple[str, str]) -> list[str]:
    city = {"city": {"type": "string", "description": "A city."}}
    return rules(*(tool(city, name=name, description=text) for name, text in (first, second)))


def test_tools_that_nothing_sets_apart_overlap():
    assert two(("find_hotels", "Find hotels in a city."), ("search_hotels", "Search for hotels in a city.")) == [
        "overlap"
    ]
    assert two(("direct", "Search flights by date."), ("one_stop", "Search flights by date.")) == ["overlap"]


def test_tools_that_one_word_sets_apart_do_not_overlap():
    assert two(("find_hotels", "Find hotels in a city."), ("find_bars", "Find bars in a city.")) == []
    assert two(("to_litres", "Convert gallons to litres."), ("to_gallons", "Convert litres to gallons.")) == []
    assert two(("core", "Add a key to the short-term memory."), ("archive", "Add a key to the long-term memory.")) == []


def test_what_a_whole_suite_begins_with_sets_no_tool_apart():
    suite = "This tool belongs to the trading system, which lets users trade and view their account. "
    names = ("stock price", "account balance", "order history", "watch list")
    assert rules(*(tool(name=n.replace(" ", "_"), description=f"{suite}Show the {n}.") for n in names)) == []


def test_one_parameter_with_two_types():
    number = tool({"user": {"type": "integer", "description": "Who."}}, name="a", description="Lists the friends.")
    text = tool({"user": {"type": "string", "description": "Who."}}, name="b", description="Blocks somebody.")
    real = tool({"user": {"type": "number", "description": "Who."}}, name="c", description="Counts visits.")
    [found] = lint([number, text])
    assert (found.rule, found.tool, found.where) == ("type-conflict", "b", "arguments.user")
    assert rules(number, real) == []


# ---- where schemas come from


class Line(BaseModel):
    article: Annotated[str, Field(description="Such as 'A-12'.")]
    discount_percent: Annotated[float, Field(description="Off the price.")] = 0.0
    parts: list[Line] = []


@ak.tool(permission="write", human_at={"amount_usd": 50})
def issue_credit(
    order_id: Annotated[str, Field(description="The order.")],
    amount_usd: float,
    lines: Annotated[list[Line], Field(description="What of it.")],
    why: Annotated[Literal["damaged", "late"] | None, Field(description="Known reasons.")] = None,
) -> str:
    """Credit part of an order to the customer; `amount_usd` is paid out at once."""
    return order_id


def test_schemas_of_tools_are_read_through_references_and_null():
    found = {(f.rule, f.where) for f in lint_tools([issue_credit])}
    assert found == {
        ("unbounded-string", "arguments.order_id"),
        ("unbounded-number", "arguments.amount_usd"),
        ("unbounded-number", "arguments.lines[].discount_percent"),
        ("missing-description", "arguments.lines[]"),
    }


def test_a_definition_that_holds_itself_ends():
    many = {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#"}] * 12, "description": "Again."}}}
    assert lint([tool(parameters=many)]) == []


def test_the_tools_of_our_own_system_have_no_errors():
    import support_triage

    found = lint_tools(support_triage.system())
    assert [f for f in found if f.severity == "error"] == []
    assert {f.tool for f in found} <= {"search_knowledge_base", "lookup_order", "issue_refund"}


OPENAI = {"type": "function", "function": {"name": "a", "description": "Adds.", "parameters": {"type": "object"}}}
BFCL = {
    "name": "b",
    "description": "Breaks a bone, gently.",
    "parameters": {
        "type": "dict",
        "properties": {
            "force": {"type": "float", "description": "Newton."},
            "bones": {"type": "tuple", "items": {"type": "String"}, "description": "Which."},
            "how": {"type": "any", "description": "As you like."},
            "map": {"type": "HashMap", "properties": {"n": {"type": "long", "description": "Which."}}},
        },
        "required": ["force"],
    },
}
MCP = {
    "name": "delete_c",
    "description": "Cuts something off, for good.",
    "inputSchema": {"type": "object"},
    "annotations": {"readOnlyHint": True},
}


def test_schemas_are_told_apart_by_their_keys():
    a, b, c, d = (ToolSchema.from_json(raw) for raw in (OPENAI, BFCL, MCP, issue_credit.spec()))
    assert (a.name, a.parameters, a.permission) == ("a", {"type": "object"}, None)
    assert (c.permission, rules(c)) == ("read", ["permission-mismatch"])
    assert (d.permission, d) == ("write", ToolSchema.from_tool(issue_credit))
    assert lint([a, b]) == []
    assert b.parameters["properties"]["map"]["properties"]["n"]["type"] == "integer"


def test_the_dialect_of_bfcl_is_no_json_schema_elsewhere():
    assert rules(ToolSchema.from_openai(BFCL)) == ["invalid-schema"]


@pytest.mark.parametrize("raw", ["text", 7, None, {}, {"name": 3}, {"name": " "}, {"function": {"name": None}}])
def test_what_is_no_tool_is_said(raw):
    with pytest.raises(DataError, match="a tool"):
        ToolSchema.from_json(raw)


# ---- anything at all


def names() -> st.SearchStrategy[str]:
    words = ["amount", "limit", "order_id", "date", "rate", "duration", "unit", "data", "é", "", "a.b", "[", "$ref"]
    return st.sampled_from(words) | st.text(max_size=5)


TEXTS = st.sampled_from(["", "Optional.", "'a' or 'b'", "from 1 to 5", "(required)", "one of a, b", "等"]) | st.text(
    max_size=30
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names(), inner, max_size=3),
    max_leaves=8,
)
KIND = st.sampled_from(["array", "boolean", "integer", "null", "number", "object", "string"])


def schemas() -> st.SearchStrategy[Any]:
    """Mostly valid schemas of all shapes, now and then anything."""

    def holding(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        few = st.lists(inner, min_size=1, max_size=3)
        return st.fixed_dictionaries(
            {},
            optional={
                "type": KIND | st.lists(KIND, min_size=1, max_size=3, unique=True),
                "description": TEXTS,
                "properties": st.dictionaries(names(), inner, max_size=3),
                "required": st.lists(names(), max_size=3, unique=True),
                "items": inner,
                "anyOf": few,
                "oneOf": few,
                "allOf": few,
                "additionalProperties": inner,
                "$ref": st.sampled_from(["#", "#/properties/a", "#/properties", "#/anyOf/0", "#x", "//"]),
                "enum": st.lists(JSON, max_size=2),
                "default": JSON,
                "minimum": st.integers() | st.floats(),
                "maximum": st.integers(),
            },
        )

    return st.recursive(st.booleans() | JSON, holding, max_leaves=12)


TOOLS = st.builds(ToolSchema, names().filter(str.strip), TEXTS, schemas(), st.sampled_from([None, "read", "write"]))


@given(st.lists(TOOLS, max_size=4))
def test_no_schema_makes_the_linter_fail(tools):
    for found in lint(tools):
        assert isinstance(found, Finding)
        assert found.severity in ("error", "warning", "note")
        assert found.message
        assert found.tool in {t.name for t in tools}


@given(JSON)
def test_reading_a_tool_succeeds_or_says_that_it_is_none(raw):
    for given_raw in (raw, {"name": "a", "parameters": raw}, {"name": "a", "inputSchema": raw}, {"function": raw}):
        with suppress(DataError):
            lint([ToolSchema.from_json(given_raw)])


# ---- the command


def run(source: Any, *, strict: bool = False) -> int:
    with pytest.raises(typer.Exit) as stopped:
        tools_cli.lint_tools(str(source), strict=strict)
    return int(stopped.value.exit_code)


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"tools": t}], ids=["list", "tools"])
def test_the_command_reads_files_and_shows_what_to_do(tmp_path, capsys, wrap):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(wrap([OPENAI, BFCL, MCP])))
    assert run(file) == 0
    out = capsys.readouterr().out
    assert "delete_c" in out
    assert "permission-mismatch" in out
    assert "3 tools: 1 warning" in out
    assert run(file, strict=True) == 1


def test_errors_are_exit_code_1_and_come_first(tmp_path, capsys):
    file = tmp_path / "tools.json"
    file.write_text("\n".join(json.dumps({**raw, "name": "same"}) for raw in (BFCL, MCP)))  # lines, as BFCL has them
    assert run(file) == 1
    assert "2 tools: 1 error" in capsys.readouterr().out


def test_nothing_found_is_said(tmp_path, capsys):
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(OPENAI))
    assert run(file, strict=True) == 0
    assert capsys.readouterr().out == "1 tool: nothing found\n"


@pytest.mark.parametrize("text", ["{", "3", '"a"', "[1]", '{"tools": 3}', "\xff"])
def test_a_file_without_tools_is_wrong_use(tmp_path, text):
    file = tmp_path / "tools.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(DataError):
        tools_cli.read_schemas(str(file))
    with pytest.raises(UsageError):
        tools_cli.read_schemas(str(tmp_path / "nowhere.json"))


def test_the_command_reads_drafts_and_releases(project, capsys):
    (project / "credit.py").write_text(
        "import agentkit as ak\n\n\n"
        "@ak.tool(permission='write')\n"
        "def credit(amount: float) -> str:\n    '''Pay back amount.'''\n    return 'done'\n\n\n"
        "def pay(text: str) -> dict:\n    return {'text': text}\n\n\n"
        "system = ak.adopt(pay, name='pay', tools=[credit])\n"
    )
    assert run("credit.py") == 0
    assert "arguments.amount" in capsys.readouterr().out
    from agentkit_tracking import registry

    version = registry.register_file("credit.py")
    assert run(version, strict=True) == 1
    assert "arguments.amount" in capsys.readouterr().out


def test_registration_shows_no_notes():
    @ak.tool
    def roll(dice: Annotated[int, Field(description="Number of dice.")], limit: int) -> int:
        """Roll dice up to a `limit`."""
        return dice

    def play(text: str) -> dict[str, str]:
        return {"text": text}

    system = ak.adopt(play, name="play", tools=[roll])
    assert [f.rule for f in tools_cli.registration_findings(system.spec())] == ["unbounded-number"]
    assert len(lint_tools(system)) == 2
