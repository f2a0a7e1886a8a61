"""The release manifest: one content, one id; and nothing of a release runs before all of it is checked."""

from __future__ import annotations

import compileall
import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from releases import CASES, COLOURS, python, store  # noqa: F401  (a fixture)

import agentkit as ak
from agentkit.errors import ReleaseError
from agentkit_tracking import loading, registry
from agentkit_tracking.manifest import MANIFEST, WEIGHTS, Manifest, build, read_release, write_release
from agentkit_tracking.source import load_entry, parse_entry

Files = dict[str, str]
PROJECT: Files = {
    "pyproject.toml": "",
    "colours.py": COLOURS + "\nimport words\n",
    "words.py": "WORDS = ['lava']\n",
    "facts.jsonl": '{"a": 1}\n',
    "requirements.lock": "dspy==3.4.0\n",
    "agentkit.toml": '[models]\nfast = "openai/x"\n[options."openai/x"]\ntemperature = 0.2\napi_key = "mine"\n',
}


def release_of(folder: Path, files: Files = PROJECT) -> Manifest:
    """The manifest of a project with these files, made at this place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    entry = parse_entry(folder / "colours.py")
    system = load_entry(entry)
    system.files = (Path("facts.jsonl"),)
    with contextlib.chdir(folder):  # where the settings are
        return build(system, entry)[0]


# ---- one content, one id


def test_the_same_content_has_the_same_id_at_another_place_and_in_another_process(tmp_path: Path) -> None:
    here = release_of(tmp_path / "here")
    assert release_of(tmp_path / "a longer path" / "there").release_id == here.release_id
    script = (
        "import sys; from pathlib import Path; from test_manifest import release_of;"
        "print(release_of(Path(sys.argv[1])).release_id)"
    )
    said = python(script, tmp_path / "elsewhere", PYTHONHASHSEED="7", HOME="/nonexistent")
    assert said.split() == [here.release_id]


CHANGES: dict[str, Callable[[Files], Files]] = {
    "source": lambda f: f | {"colours.py": f["colours.py"] + "# a comment\n"},
    "prompt": lambda f: f | {"colours.py": f["colours.py"].replace("- warm: red", "- warm: pink")},
    "helper": lambda f: f | {"words.py": "WORDS = ['fire']\n"},
    "data file": lambda f: f | {"facts.jsonl": '{"a": 2}\n'},
    "lock": lambda f: f | {"requirements.lock": "dspy==3.4.1\n"},
    "model": lambda f: f | {"agentkit.toml": f["agentkit.toml"].replace("openai/x", "openai/y")},
    "parameter": lambda f: f | {"agentkit.toml": f["agentkit.toml"].replace("0.2", "0.3")},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_makes_another_id(tmp_path: Path, change: Callable[[Files], Files]) -> None:
    before, after = release_of(tmp_path / "a"), release_of(tmp_path / "b", change(PROJECT))
    assert before.release_id != after.release_id


@pytest.mark.parametrize(
    "change",
    [
        lambda s: setattr(s.program, "demos", [dspy.Example(text="lava", label="warm", confidence=1.0)]),
        lambda s: s.use(ak.fit(s, [{"text": text, "label": label} for text, label in CASES])),
        lambda s: setattr(s, "budget", ak.Budget(model_calls=3)),
    ],
    ids=["demonstrations", "weights", "budget"],
)
def test_tuning_makes_another_id(project: Path, change: Callable[[ak.System], Any]) -> None:
    (project / "colours.py").write_text(COLOURS)
    entry = parse_entry("colours.py")
    bare, tuned = load_entry(entry), load_entry(entry)
    change(tuned)
    assert build(bare, entry)[0].release_id != build(tuned, entry)[0].release_id


def test_the_order_of_settings_is_no_part_of_it(tmp_path: Path) -> None:
    plain = PROJECT["agentkit.toml"].replace("temperature = 0.2\n", "temperature = 0.2\ntop_p = 0.9\n")
    turned = PROJECT["agentkit.toml"].replace("temperature = 0.2\n", "top_p = 0.9\ntemperature = 0.2\n")
    first, second = (release_of(tmp_path / n, PROJECT | {"agentkit.toml": t}) for n, t in (("a", plain), ("b", turned)))
    assert list(first.parameters) != list(second.parameters)
    assert first.release_id == second.release_id


def test_git_is_no_part_of_it(tmp_path: Path) -> None:
    before = release_of(tmp_path / "repo")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=tmp_path / "repo", check=True)
    assert release_of(tmp_path / "repo") == before


def test_keys_and_other_secrets_are_no_part_of_it(tmp_path: Path) -> None:
    plain = release_of(tmp_path / "plain")
    secrets = 'api_key = "other"\nauth_token = "t"\nextra_headers = {Authorization = "s"}\n'
    settings = PROJECT["agentkit.toml"].replace('api_key = "mine"\n', secrets)
    keyed = release_of(tmp_path / "keyed", PROJECT | {"agentkit.toml": settings})
    assert keyed.release_id == plain.release_id
    assert keyed.parameters == {"temperature": 0.2}


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(demo=st.dictionaries(st.text(), _json, max_size=4))
def test_a_manifest_read_back_has_the_id_it_was_written_with(demo: dict[str, Any]) -> None:
    state = {"signature": {"instructions": "", "fields": []}, "demos": [demo]}
    manifest = Manifest(
        system="s", entry="a.py:system", model="m", parameters={}, spec={}, prompts={"p": state}, weights=None,
        files={"a.py": "0"}, lock=None, packages={},
    )  # fmt: skip
    again = Manifest.model_validate_json(manifest.to_bytes())
    assert (again, again.release_id) == (manifest, manifest.release_id)


# ---- nothing runs unchecked


@pytest.fixture
def release(project: Path) -> Path:
    """A release folder whose source leaves a mark when it is executed."""
    (project / "colours.py").write_text(COLOURS + "\nimport words\nfrom pathlib import Path\nPath('ran').touch()\n")
    (project / "words.py").write_text("WORDS = ['lava']\n")
    entry = parse_entry("colours.py")
    system = load_entry(entry)
    system.use(ak.fit(system, [{"text": text, "label": label} for text, label in CASES]))
    write_release(project / "release", *build(system, entry))
    (project / "ran").unlink()
    return project / "release"


def altered(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def with_cached_bytecode(folder: Path) -> None:
    compileall.compile_dir(folder, quiet=1)


def replaced_by_a_link(path: Path) -> None:
    path.symlink_to(path.rename(path.parents[2] / "moved.py"))


TAMPERINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "altered source": (lambda r: altered(r / "source" / "colours.py"), "altered: source/colours.py"),
    "altered helper": (lambda r: altered(r / "source" / "words.py"), "altered: source/words.py"),
    "altered weights": (lambda r: altered(r / WEIGHTS), "altered: weights.safetensors"),
    "missing file": (lambda r: (r / "source" / "words.py").unlink(), "missing: source/words.py"),
    "missing weights": (lambda r: (r / WEIGHTS).unlink(), "missing: weights.safetensors"),
    "extra module": (lambda r: (r / "source" / "dspy.py").write_text(""), "not in the manifest: source/dspy.py"),
    "extra file beside": (lambda r: (r / "notes.txt").write_text(""), "not in the manifest: notes.txt"),
    "cached bytecode": (lambda r: with_cached_bytecode(r / "source"), "not in the manifest: source/__pycache__/words"),
    "linked folder": (lambda r: (r / "source" / "words").symlink_to(r.parent), "not in the manifest: source/words"),
    "linked file": (lambda r: replaced_by_a_link(r / "source" / "words.py"), "altered: source/words.py"),
    "no manifest": (lambda r: (r / MANIFEST).unlink(), "is no release: manifest.json cannot be read"),
    "broken manifest": (
        lambda r: altered_manifest(r, lambda m: m.pop("model")),
        "is not a release manifest: Field req",
    ),
    "unknown key": (lambda r: altered_manifest(r, lambda m: m.update(x=1)), "is not a release manifest: Extra"),
    "entry elsewhere": (lambda r: altered_manifest(r, lambda m: m.update(entry="../x.py:f")), "none of its files"),
}


def altered_manifest(release: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((release / MANIFEST).read_text())
    change(content)
    (release / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize(("tamper", "message"), TAMPERINGS.values(), ids=TAMPERINGS)
def test_a_release_that_is_not_intact_is_refused_before_its_source_runs(
    release: Path, tamper: Callable[[Path], Any], message: str
) -> None:
    tamper(release)
    with pytest.raises(ReleaseError, match=message):
        loading.load(release, trust=True)
    assert not Path("ran").exists()


def test_an_intact_release_loads_and_leaves_nothing_behind(release: Path) -> None:
    assert loading.load(release, trust=True).run(text="lava").output["label"] == "warm"
    assert Path("ran").exists()
    read_release(release)  # no bytecode beside the source


def test_a_manifest_that_fits_its_files_but_not_the_asked_id_is_refused(release: Path) -> None:
    asked = read_release(release).release_id
    altered_manifest(release, lambda m: m.update(model="openai/another"))
    with pytest.raises(ReleaseError, match=f"expected {asked[:12]}: it was altered"):
        read_release(release, asked)


# ---- no pickle


@pytest.mark.usefixtures("store")
def test_no_artifact_of_a_release_is_a_pickle(release: Path, own_home: Path) -> None:
    entry = parse_entry("colours.py")
    system = load_entry(entry)
    system.use(ak.fit(system, [{"text": text, "label": label} for text, label in CASES]))
    version = registry.store(system, entry)
    registry.fetch_version(version)
    files = [p for p in own_home.rglob("*") if p.is_file() and p.parent != own_home]
    assert {p.name for p in files} == {"manifest.json", "weights.safetensors", "colours.py", "words.py"}
    for file in files:
        assert not is_pickle(file.read_bytes()), file


def is_pickle(data: bytes) -> bool:
    """Pickles of protocol 2 and later begin with PROTO and end with STOP; torch and joblib wrap them in a zip."""
    return (data[:1] == b"\x80" and data[-1:] == b".") or data[:4] == b"PK\x03\x04" or b"\x80\x04\x95" in data


def test_the_scan_for_pickles_would_find_one() -> None:
    import pickle

    assert is_pickle(pickle.dumps({"a": 1}))
    assert is_pickle(b"header" + pickle.dumps([1], protocol=4))
