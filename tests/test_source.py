"""Notebooks and modules as source, and live objects held against the disk."""

from __future__ import annotations

import json
import linecache
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import dspy
import pytest
from releases import COLOURS, store  # noqa: F401  (a fixture)

from agentkit.errors import SourceError
from agentkit_tracking import loading, registry
from agentkit_tracking.live import differences
from agentkit_tracking.source import adopt_from, collect_files, load_entry, parse_entry

SHOP = '''
import re
from functools import cache
from pathlib import Path
from typing import Literal

import agentkit as ak
import dspy
from pydantic import BaseModel

import prices
from texts import polite

LIMIT = 50.0
AMOUNT = re.compile(r"\\d+")
REASONS = {"refund": "money back", "answer": "an answer"}


class Decide(dspy.Signature):
    """Decide what a customer wants.

    - refund: money back, paid twice
    - answer: a question
    """

    ticket: str = dspy.InputField()
    action: Literal["refund", "answer"] = dspy.OutputField()


class Reply(BaseModel):
    text: str
    action: str


class Catalogue:
    def find(self, ticket):
        return [word for word in ticket.split() if len(word) > 3]


@cache
def catalogue():
    return Catalogue()


@ak.tool(permission="write", human_at={"amount": 20.0})
def pay(amount: float) -> str:
    """Pay money back."""
    return f"paid {amount:.2f}"


class Refunds(ak.Agent):
    name = "refunds"
    result = Reply
    tools = (pay,)
    most_words = 9

    def __init__(self, patience=3):
        super().__init__()
        self.patience = patience
        self.decide = dspy.Predict(Decide)

    @staticmethod
    def amount(ticket):
        return prices.less_discount(float(AMOUNT.search(ticket)[0]))

    def plan(self, run, ticket):
        return self.decide(ticket=ticket).action

    def execute(self, run, plan, ticket):
        if plan == "refund" and self.amount(ticket) < LIMIT:
            return run.call(pay, amount=self.amount(ticket))
        return " ".join(catalogue().find(ticket)[: self.most_words])

    def reflect(self, run, plan, facts, ticket):
        return Reply(text=polite(f"{REASONS[plan]}: {facts}"), action=plan)


def success(example, prediction, trace=None):
    return prediction.action == example["action"]


def system() -> ak.System:
    return ak.System("shop", [Refunds()], success=success, metrics=[ak.metrics.exact("action")])
'''
PRICES = "DISCOUNT = 0.1\n\n\ndef less_discount(amount):\n    return amount * (1 - DISCOUNT)\n"
TEXTS = "def polite(text):\n    return f'Dear customer, {text}'\n"


@pytest.fixture
def shop(project: Path) -> Path:
    """A project of an entry and two helper modules."""
    (project / "shop.py").write_text(SHOP)
    (project / "prices.py").write_text(PRICES)
    (project / "texts.py").write_text(TEXTS)
    return project / "shop.py"


_cells = count()


def run_cell(text: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Execute text as a notebook server does: in the user's namespace, from no file, its lines kept for inspect."""
    name = f"<cell {next(_cells)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec", dont_inherit=True), namespace)  # noqa: S102  (as a notebook server does)
    return namespace


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The user's namespace of a notebook server: the module `__main__`, which has no file."""
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module.__dict__


@pytest.fixture
def live(shop: Path, namespace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A notebook in which the source's text has been run, its helpers imported the ordinary way."""
    monkeypatch.syspath_prepend(str(shop.parent))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield run_cell(SHOP, namespace)
    for name in ("prices", "texts"):
        sys.modules.pop(name, None)


# ---- entries


def test_an_entry_is_a_file_and_a_name_below_the_project_root(project: Path) -> None:
    (project / "agents").mkdir()
    (project / "agents" / "triage.py").write_text("")
    named = parse_entry("agents/triage.py:build")
    assert (str(named), named.root) == ("agents/triage.py:build", project)
    assert str(parse_entry(project / "agents" / "triage.py")) == "agents/triage.py:system"


@pytest.mark.parametrize(
    ("target", "message"),
    [("nowhere.py", "there is no file nowhere.py; give FILE.py"), ("notes.txt", "neither a Python file nor a Jupyter")],
)
def test_what_is_no_source_is_refused_by_name(project: Path, target: str, message: str) -> None:
    (project / "notes.txt").write_text("")
    with pytest.raises(SourceError, match=message):
        parse_entry(target)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        (COLOURS, "system", "colours"),
        ("import dspy\nclassify = dspy.Predict('text -> label')", "classify", "classify"),
        ("import dspy\ndef system():\n    return dspy.Predict('text -> label')", "system", "entry"),
        ("import dspy\nclass Mine(dspy.Module):\n    def forward(self, text): return {'a': text}", "Mine", "Mine"),
        ("def shout(text):\n    return text.upper()", "shout", "shout"),
        ("import agentkit as ak\nmade = ak.adopt(len, name='length')", "made", "length"),
    ],
    ids=["factory of a system", "predictor", "factory of a program", "module class", "function", "system"],
)
def test_systems_programs_and_functions_that_make_them_are_entries(
    project: Path, text: str, name: str, expected: str
) -> None:
    (project / "entry.py").write_text(text)
    assert load_entry(parse_entry(f"entry.py:{name}")).name in (expected, f"{expected}_")


def test_a_marimo_notebook_is_an_entry_and_its_cells_do_not_run(project: Path) -> None:
    (project / "book.py").write_text(
        "import marimo\napp = marimo.App()\n\nwith app.setup:\n    import agentkit as ak\n    import dspy\n\n"
        "@app.cell\ndef _():\n    raise RuntimeError('shown in the notebook only')\n    return\n\n"
        "@app.function\ndef system() -> ak.System:\n    return ak.adopt(dspy.Predict('text -> label'), name='book')\n"
    )
    assert load_entry(parse_entry("book.py")).name == "book"


def test_a_source_is_compiled_as_python_would_compile_it(project: Path) -> None:
    (project / "entry.py").write_text(
        "class A:\n    x: int\ndef system(n=A.__annotations__['x']):\n    return n('3')\n"
    )
    assert load_entry(parse_entry("entry.py")).run().output == {"value": 3}  # the annotation is `int`, not "int"


def notebook(path: Path, *cells: tuple[str, list[str]]) -> Path:
    rows = [
        {"cell_type": "code", "metadata": {"tags": tags}, "source": text.splitlines(keepends=True)}
        for text, tags in cells
    ]
    path.write_text(json.dumps({"cells": rows, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def test_of_a_jupyter_notebook_the_cells_tagged_agent_are_the_source(project: Path) -> None:
    notebook(
        project / "nb.ipynb",
        ("%pip install x\nraise RuntimeError", []),
        ("import dspy", ["agent"]),
        (COLOURS, ["agent"]),
    )
    assert load_entry(parse_entry("nb.ipynb")).run(text="the red sun").state == "DONE"


def test_a_jupyter_notebook_without_tagged_cells_says_what_to_tag(project: Path) -> None:
    notebook(project / "nb.ipynb", (COLOURS, []))
    with pytest.raises(SourceError, match="no cell tagged `agent`; tag the cells that define the system"):
        load_entry(parse_entry("nb.ipynb"))


# ---- errors


def test_a_missing_name_suggests_the_nearest_one(project: Path) -> None:
    (project / "colours.py").write_text(COLOURS)
    with pytest.raises(
        SourceError, match=r"colours.py defines no 'sistem' at top level; did you mean colours.py:system\?"
    ):
        load_entry(parse_entry("colours.py:sistem"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a = 1\nb = 1 / 0\n", "entry.py:2 cannot be run: ZeroDivisionError"),
        ("a = 1\ndef system(:\n", "entry.py:2 cannot be run: SyntaxError"),
        ("def system():\n    a = 1\n    return {}['key']\n", "entry.py:3 cannot be run: KeyError"),
        ("import sys\nsys.exit('no key')\n", "entry.py:2 cannot be run: SystemExit: no key"),
        ("import helper\n", "helper.py:3 cannot be run: ValueError"),
        ("import json\njson.loads('{')\n", "entry.py:2 cannot be run: JSONDecodeError"),
    ],
    ids=["top level", "syntax", "factory", "exit", "helper", "library"],
)
def test_errors_name_file_and_line_of_the_project(project: Path, text: str, place: str) -> None:
    (project / "entry.py").write_text(text)
    (project / "helper.py").write_text("\n\nraise ValueError\n")
    with pytest.raises(SourceError, match=place):
        load_entry(parse_entry("entry.py"))


def test_errors_in_a_jupyter_notebook_count_the_lines_of_its_agent_cells(project: Path) -> None:
    notebook(project / "nb.ipynb", ("raise RuntimeError", []), ("a = 1\nraise ValueError", ["agent"]))
    with pytest.raises(SourceError, match=r"nb\.ipynb, line 2 of its agent cells, cannot be run: Val"):
        load_entry(parse_entry("nb.ipynb"))


# ---- files


def test_modules_imported_from_the_project_belong_to_the_release(project: Path) -> None:
    package = project / "tools"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "search.py").write_text("from . import index\nfrom .index import build\nimport json, numpy\n")
    (package / "index.py").write_text("import constants\ndef build(): return constants.SIZE\n")
    (project / "constants.py").write_text("SIZE = 3\n")
    (project / "unused.py").write_text("")
    (project / "facts.jsonl").write_text("{}")
    (project / "entry.py").write_text(
        "import marimo as mo\nfrom tools.search import build\ndef system(x): return build()\n"
    )
    found = collect_files(parse_entry("entry.py"), (Path("facts.jsonl"),))
    assert list(found) == [
        "constants.py", "entry.py", "facts.jsonl", "tools/__init__.py", "tools/index.py", "tools/search.py",
    ]  # fmt: skip


def test_a_declared_file_that_is_missing_or_elsewhere_is_refused(project: Path, tmp_path: Path) -> None:
    (project / "entry.py").write_text("")
    (tmp_path / "outside.txt").write_text("")
    for given in (Path("missing.txt"), tmp_path / "outside.txt"):
        with pytest.raises(SourceError, match=f"release file {given} must be a file below"):
            collect_files(parse_entry("entry.py"), (given,))


def test_a_project_module_imported_inside_a_function_is_refused(shop: Path) -> None:
    shop.write_text(SHOP.replace("        return self.decide", "        import texts\n        return self.decide"))
    line = shop.read_text().splitlines().index("        import texts") + 1
    with pytest.raises(SourceError, match=f"shop.py:{line} imports texts inside a function"):
        collect_files(parse_entry(shop), ())


@pytest.mark.usefixtures("store")
def test_releases_keep_their_own_helpers_of_the_same_name(shop: Path) -> None:
    first = registry.register_file(shop)
    (shop.parent / "texts.py").write_text(TEXTS.replace("Dear customer", "Hello"))
    second = registry.register_file(shop)
    systems = [loading.load(str(version)) for version in (first, second)]
    texts = [system.run(ticket="a question about order 12").output["text"] for system in systems]
    assert [text.split(",")[0] for text in texts] == ["Dear customer", "Hello"]
    assert {"texts", "prices"} & sys.modules.keys() == set()  # nobody else gets them by chance


@pytest.mark.usefixtures("store", "live")
def test_a_release_uses_its_own_helpers_where_a_draft_of_them_is_imported(shop: Path) -> None:
    import texts

    version = registry.register_file(shop)
    texts.polite = lambda text: "the draft in this process"
    assert loading.load(str(version)).run(ticket="a question about order 12").output["text"].startswith("Dear")
    assert sys.modules["texts"] is texts  # and the draft has kept its own


# ---- live objects against the disk


def test_unchanged_live_objects_differ_in_nothing(shop: Path, live: dict[str, Any]) -> None:
    live |= {"action": "a variable of the notebook", "tickets": [1], "decide": 3, "amount": 5}  # names of attributes
    assert differences(live["system"](), parse_entry(shop)) == []


CHANGES = {
    "function body": (
        "return self.decide(ticket=ticket)",
        "return self.decide(ticket=ticket * 2)",
        "refunds.plan (live)",
    ),
    "tool body": ("paid {amount:.2f}", "sent {amount:.2f}", "sent {amount"),
    "tool limit": ('"amount": 20.0', '"amount": 99.0', "tools.pay.human_at.amount: live 99.0, on disk 20.0"),
    "constant": ("LIMIT = 50.0", "LIMIT = 60.0", "LIMIT: live 60.0, on disk 50.0"),
    "pattern": ('r"\\d+"', 'r"\\d+[.]"', "AMOUNT: live '"),
    "dictionary": ('"money back"', '"your money"', "REASONS: live {'refund': 'your money'"),
    "class constant": ("most_words = 9", "most_words = 5", "refunds.most_words: live 5, on disk 9"),
    "static method": ("prices.less_discount(float(", "(float(", "-        return prices.less_discount(float("),
    "instance": ("[Refunds()]", "[Refunds(patience=9)]", "refunds.patience (attribute): live 9, on disk 3"),
    "default": ("patience=3", "patience=4", "patience"),
    "helper class behind a cache": ("> 3]", "> 3 or True]", "or True"),
    "metric": ('== example["action"]', '== example["action"] or True', "metric success"),
    "ready metric": ('exact("action")', 'exact("text", name="action")', "metric action → field: live 'text'"),
    "result type": ("    text: str\n    action", "    text: str = ''\n    action", "agents.refunds.result"),
    "label of a prompt": ('Literal["refund", "answer"]', 'Literal["refund", "reply"]', "outputs.action.enum"),
}


@pytest.mark.parametrize(("old", "new", "shown"), CHANGES.values(), ids=CHANGES)
def test_a_change_in_the_notebook_that_is_not_saved_is_shown(
    shop: Path, live: dict[str, Any], old: str, new: str, shown: str
) -> None:
    assert SHOP.count(old) >= 1
    run_cell(SHOP.replace(old, new), live)
    assert shown in "\n".join(differences(live["system"](), parse_entry(shop)))


@pytest.mark.parametrize(
    ("file", "old", "new", "shown"),
    [
        ("prices.py", "0.1", "0.2", "prices.less_discount → DISCOUNT: live 0.1, on disk 0.2"),
        (
            "prices.py",
            "1 - DISCOUNT",
            "2 - DISCOUNT",
            "prices.less_discount: the live code is not what prices.py now says",
        ),
        ("texts.py", "Dear customer, ", "Hello, ", "constants only live: 'Dear customer, ', only on disk: 'Hello, '"),
    ],
)
def test_a_helper_edited_since_it_was_imported_is_shown(
    shop: Path, live: dict[str, Any], file: str, old: str, new: str, shown: str
) -> None:
    helper = shop.parent / file
    helper.write_text(helper.read_text().replace(old, new))
    assert shown in "\n".join(differences(live["system"](), parse_entry(shop)))


def test_prompts_demonstrations_and_what_an_optimiser_leaves_are_state(shop: Path, live: dict[str, Any]) -> None:
    system = live["system"]()
    predictor = system.agents["refunds"].decide
    predictor.signature = predictor.signature.with_instructions("Decide at once.")
    predictor.demos = [dspy.Example(ticket="paid twice", action="refund").with_inputs("ticket")]
    system.agents["refunds"].trial_logs = {"score": 0.9}
    assert differences(system, parse_entry(shop)) == []


def test_what_is_changed_on_the_instance_is_found(shop: Path, live: dict[str, Any]) -> None:
    system = live["system"]()
    agent = system.agents["refunds"]
    agent.cutoff = 0.9
    agent.execute = lambda run, plan, **inputs: None
    agent.decide.config = {"temperature": 1.5}
    found = "\n".join(differences(system, parse_entry(shop)))
    for name in ("cutoff", "execute", "temperature"):
        assert name in found


def test_a_model_pinned_in_the_notebook_only_is_shown(shop: Path, live: dict[str, Any]) -> None:
    system = live["system"]()
    system.agents["refunds"].decide.lm = dspy.LM("openai/gpt-4.1-mini", api_key="x")
    assert differences(system, parse_entry(shop)) == [
        "predictor.refunds.decide.model: live 'openai/gpt-4.1-mini', on disk None"
    ]


def test_many_differences_are_cut_short(project: Path, namespace: dict[str, Any]) -> None:
    names = [f"V{i}" for i in range(40)]
    lines = [f"{name} = {{}}" for name in names]
    text = "\n".join([*lines, "def system(x):", f"    return [{', '.join(names)}]", ""])
    (project / "entry.py").write_text(text.format(*[0] * 40))
    entry = parse_entry("entry.py")
    found = differences(adopt_from(run_cell(text.format(*[1] * 40), namespace)["system"], entry), entry)
    assert (len(found), found[-1]) == (21, "… and 20 more")


@pytest.mark.usefixtures("store")
def test_registering_a_differing_live_object_is_refused_with_the_difference(shop: Path, live: dict[str, Any]) -> None:
    run_cell(SHOP.replace("paid {amount:.2f}", "sent {amount:.2f}"), live)
    with pytest.raises(SourceError) as refused:
        registry.register(live["system"](), shop)
    assert "the live shop is not what shop.py on disk defines; save the notebook" in str(refused.value)
    assert '-    return f"paid {amount:.2f}"\n+    return f"sent {amount:.2f}"' in str(refused.value)
    assert registry.versions("shop") == []


@pytest.mark.usefixtures("store")
def test_a_live_program_nobody_named_registers_under_its_name_in_the_source(
    project: Path, namespace: dict[str, Any]
) -> None:
    text = COLOURS + "\nclassify = dspy.Predict(Colour)\n"
    (project / "colours.py").write_text(text)
    classify = run_cell(text, namespace)["classify"]
    classify.demos = [dspy.Example(text="lava", label="warm", confidence=1.0)]
    version = registry.register(classify, "colours.py:classify")
    assert (str(version), len(loading.load("classify").program.demos)) == ("classify/1", 1)


@pytest.mark.usefixtures("store")
def test_objects_that_come_from_no_file_have_to_name_one(live: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match=r"pass source='notebooks/….py'"):
        registry.register(live["system"]())
