"""Proof for anyone: what is saved of a release stands for itself, and says what was changed in it; done again, it holds."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from evidence import Store, agentkit, as_user, promoted, without_kernel
from tampering import append, artifacts, by_a_stranger, put, tag, text_of

from agentkit.errors import TrustError, UsageError
from agentkit.examples import sha256_of
from agentkit_pipelines import promotion, verification
from agentkit_pipelines.recording import download
from agentkit_tracking import history as histories
from agentkit_tracking import keys, registry
from agentkit_tracking.history import KEY
from agentkit_tracking.home import connect
from agentkit_tracking.keys import SigningKey, Trust
from agentkit_tracking.production import Check, history_of

FILES = ("results.parquet", "production.parquet", "evidence.json", "verdict.json", "thresholds.yaml", "evaluate.ipynb")


@dataclass(frozen=True)
class Proof:
    """A folder as `verify --save` wrote it, and the public key of who signed."""

    folder: Path
    pem: Path

    @property
    def trust(self) -> Trust:
        return Trust(keys=(keys.public_key_from(self.pem.read_bytes(), "somebody"),))

    def wrong(self) -> list[str]:
        return problems(verification.verify_folder(self.folder, self.trust))


def problems(checks: list[Check]) -> list[str]:
    return [c.problem for c in checks if c.problem and c.blocks]


def proof_of(store: Store, folder: Path, reference: str = "colours@production") -> Proof:
    found = verification.verify(reference, save=folder)
    assert problems(found) == []
    pem = folder.with_suffix(".pem")
    pem.write_text(keys.signing_key().public.pem)
    return Proof(folder, pem)


@pytest.fixture
def store(own_home: Path) -> Store:
    return promoted(own_home)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    folder = tmp_path_factory.mktemp("saved")
    store = promoted(folder / "home")
    with as_user(store.home, "Ada"):
        yield proof_of(store, folder / "proof")


@pytest.fixture
def proof(saved: Proof, tmp_path: Path) -> Proof:
    """A copy of the saved proof of version 2, for this test to change; the store that it comes from is elsewhere."""
    return Proof(Path(shutil.copytree(saved.folder, tmp_path / "proof")), saved.pem)


# ---- the folder stands for itself


def test_a_stranger_needs_the_folder_and_the_public_key(proof: Proof, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTKIT", "MLFLOW_TRACKING"))}
    environment["AGENTKIT_HOME"] = str(tmp_path / "strangers")
    command = [Path(sys.executable).with_name("agentkit"), "verify", proof.folder, "--key", proof.pem]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = text_of(done.stdout)
    for line in ("history: 2 entries", "in production since", "the gate, judged again from the recorded results: pass"):
        assert line in said
    assert "registered" in said
    assert "(local key)" in said
    assert not (tmp_path / "strangers").exists()


def test_what_is_saved_is_the_release_the_signed_evidence_and_the_signatures(proof: Proof) -> None:
    found = {p.relative_to(proof.folder).as_posix() for p in proof.folder.rglob("*") if p.is_file()}
    evidence = {f"evidence/{name}" for name in FILES}
    assert found == {"history.json", "statements.json", "release/manifest.json", "release/source/colours.py"} | evidence
    assert proof.wrong() == []


def test_the_chain_can_be_checked_by_the_specifications_alone(proof: Proof) -> None:
    """Without any of our code: envelopes by DSSE, hashes by SHA-256, one entry after the other."""
    public: Any = load_pem_public_key(proof.pem.read_bytes())
    before, body = None, {}
    for envelope in map(json.loads, json.loads((proof.folder / "history.json").read_text())):
        payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"].encode()
        signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
        public.verify(base64.b64decode(envelope["signatures"][0]["sig"]), signed)
        body = json.loads(payload)["predicate"]
        assert body["before"] == before
        before = hashlib.sha256(payload).hexdigest()
    assert body["release"] == sha256_of(proof.folder / "release" / "manifest.json")
    said = body["evidence"]
    names = {"sha256": "evidence.json", "verdict_file": "verdict.json", "results": "results.parquet"}
    names |= {"notebook": "evaluate.ipynb", "thresholds": "thresholds.yaml"}
    for field, name in names.items():
        assert said[field] == sha256_of(proof.folder / "evidence" / name)


def test_the_right_key_is_needed(proof: Proof, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    other.write_text(keys.create("Eve").public.pem)
    assert any("which is not trusted here" in p for p in Proof(proof.folder, other).wrong())
    said = agentkit("verify", str(proof.folder))  # by this machine's trust.json, which holds Eve's alone
    assert (said.code, "which is not trusted here" in text_of(said.out)) == (3, True)
    assert agentkit("verify", str(proof.folder), "--key", str(proof.pem)).code == 0
    assert agentkit("verify", str(proof.folder), "--key", str(other), "--key", str(proof.pem)).code == 0


PARTS = ("release/manifest.json", "release/source/colours.py", *(f"evidence/{n}" for n in FILES), "history.json", "statements.json")  # fmt: skip
HARM: dict[str, Callable[[Path], Any]] = {
    "one bit": lambda f: f.write_bytes((b := f.read_bytes())[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :]),
    "missing": lambda f: f.unlink(),
    "an object": lambda f: f.write_text("{}"),
    "a number": lambda f: f.write_text("7"),
}  # fmt: skip


JSON = [part for part in PARTS if part.endswith(".json")]


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        *((part, harm) for part in PARTS for harm in ("one bit", "missing")),
        *((p, h) for p in JSON for h in ("an object", "a number")),
    ],
)
def test_a_file_that_was_changed_or_is_missing_is_named(proof: Proof, part: str, harm: str) -> None:
    HARM[harm](proof.folder / part)
    said = agentkit("verify", str(proof.folder), "--key", str(proof.pem))
    if part == "statements.json" and harm == "an object":  # says less, and claims nothing
        assert (said.code, "registered by nobody who signed" in text_of(said.out)) == (0, True)
        return
    assert said.code in (2, 3), said
    if part == "release/manifest.json" and "signed for another release" in text_of(said.out):
        return  # the bit was in a value: a whole manifest, of a release that nobody signed
    assert Path(part).name in text_of(said.out + said.err) or part in ("history.json", "statements.json")
    if part == "history.json" and harm == "one bit":
        assert "history" in said.out or "signature" in said.out


@pytest.mark.parametrize("name", ["notes.md", "evidence/plot.png", "evidence/settings.json", "release/source/more.py"])
def test_nothing_lies_in_a_proof_that_was_not_signed(proof: Proof, name: str) -> None:
    (proof.folder / name).write_text("it is very good")
    assert any(Path(name).name in p for p in proof.wrong())


@pytest.mark.parametrize("part", ["release", "evidence"])
def test_a_part_that_is_missing_is_said(proof: Proof, part: str) -> None:
    shutil.rmtree(proof.folder / part)
    assert proof.wrong()
    shutil.rmtree(proof.folder)
    assert agentkit("verify", str(proof.folder)).code == 2


def history(proof: Proof, change: Callable[[list[str]], list[str]]) -> Proof:
    path = proof.folder / "history.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return proof


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[1:], "it is entry 2 of colours"),
        (lambda h: [h[1], h[0]], "it is entry 2 of colours"),
        (lambda h: [*h, h[1]], "entry 3: it is entry 2 of colours"),
        (lambda h: [h[0], "x"], "cannot be read"),
        (lambda h: [h[0], 7], "cannot be read"),
    ],
)
def test_a_history_that_was_changed_is_said(proof: Proof, change: Any, message: str) -> None:
    assert [message in p for p in history(proof, change).wrong()] == [True]


def test_a_proof_without_its_last_entries_claims_no_more_than_it_proves(proof: Proof) -> None:
    """A stranger cannot know of newer entries; what is left says by itself what is in production."""
    found = verification.verify_folder(history(proof, lambda h: h[:1]).folder, proof.trust)
    assert "in production since" not in str(found)
    assert any(c.blocks and c.problem.startswith("it is not in production: ") for c in found)
    found = verification.verify_folder(history(proof, lambda h: []).folder, proof.trust)
    assert any(c.blocks and c.problem == "it is not in production: there is no history of it" for c in found)


def test_proofs_of_two_versions_cannot_be_mixed(proof: Proof, store: Store, tmp_path: Path) -> None:
    older = proof_of(store, tmp_path / "older", "colours/1")
    for part in ("release", "evidence", "statements.json"):
        mixed = Proof(Path(shutil.copytree(proof.folder, tmp_path / f"mixed-{part}")), proof.pem)
        target = mixed.folder / part
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        copy: Any = shutil.copytree if (older.folder / part).is_dir() else shutil.copy
        copy(older.folder / part, target)
        assert mixed.wrong() != []


def test_a_proof_made_anew_from_end_to_end_by_somebody_else_is_refused(
    store: Store, tmp_path: Path, saved: Proof
) -> None:
    """Consistent in itself, release, evidence and history; signed with another key."""
    for name in ("mlflow.db", "trust.json", "signing_key.pem"):
        (store.home / name).unlink()
    for name in ("artifacts", "seen", "releases"):
        shutil.rmtree(store.home / name)
    with as_user(store.home, "Ada"):  # whatever it calls itself
        registry.register_file(store.home / "given" / "colours.py")
        store.promote("colours/1")
        forged = proof_of(store, tmp_path / "forged")
    assert forged.wrong() == []  # by the forger's own key
    found = Proof(forged.folder, saved.pem).wrong()
    assert len(found) == 3  # who promoted, who registered, who evaluated
    assert all("which is not trusted here" in p for p in found)


def test_a_verdict_that_the_signed_results_do_not_give_is_found_out(proof: Proof, saved: Proof) -> None:
    """By a holder of the key, who signs it all the same: the gate is judged again."""
    folder = proof.folder / "evidence"
    results = pl.read_parquet(folder / "results.parquet").with_columns(success=pl.lit(False))
    results.write_parquet(folder / "results.parquet")
    sign_again(proof, saved, results_sha256=sha256_of(folder / "results.parquet"))
    assert proof.wrong() == ["the recorded results give fail, recorded was pass"]


def test_a_signed_comparison_without_the_results_of_production_is_found_out(proof: Proof, saved: Proof) -> None:
    """Rules `versus: production` would not apply."""
    (proof.folder / "evidence" / "production.parquet").unlink()
    sign_again(proof, saved, production_results_sha256=None)
    assert proof.wrong() == ["the evidence's production.parquet is missing or not the one signed"]


def sign_again(proof: Proof, saved: Proof, **changes: Any) -> None:
    """The last promotion anew, by who holds the key, with evidence that says something else."""
    folder = proof.folder / "evidence"
    said = json.loads((folder / "evidence.json").read_text()) | changes
    (folder / "evidence.json").write_text(json.dumps(said))
    path = proof.folder / "history.json"
    texts = json.loads(path.read_text())
    trust = proof.trust
    found = histories.parse("colours", {f"{KEY}000001": texts[0]}, trust)
    with as_user(saved.folder.parent / "home", "Ada"):
        key = keys.signing_key()
    move = histories.parse("colours", {f"{KEY}{n:06}": t for n, t in enumerate(texts, 1)}, trust).entries[1].move
    assert move.evidence is not None
    hashes = {"results": sha256_of(folder / "results.parquet"), "sha256": sha256_of(folder / "evidence.json")}
    made = histories.next_entry(
        found, "promoted", SigningKey(key.private, key.public), version=2, release=move.release, prompts=move.prompts,
        evidence=move.evidence.model_copy(update=hashes), why="trust me",
    )  # fmt: skip
    path.write_text(json.dumps([texts[0], made[1]]))


def test_a_rule_of_the_trust_file_holds_for_a_proof_too(proof: Proof) -> None:
    asked = proof.trust.model_copy(update={"separate_approver": True})
    assert any("asks for two people" in p for p in problems(verification.verify_folder(proof.folder, asked)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("colours/9",), "colours has no version 9"),
        (("flowers@production",), "no system 'flowers' is registered"),
        (("colours@production", "--key", "x.pem"), "--key is for a folder"),
        (("colours@production", "--save", "."), "name a folder that does not"),
        ((".",), "is no folder that `agentkit verify NAME@production --save DIR` wrote"),
    ],
)
def test_wrong_use_of_verify_ends_with_2(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    said = agentkit("verify", *arguments)
    assert (said.code, said.out) == (2, "")
    assert message in said.err


# ---- in the store


def evidence_folder(number: int) -> Path:
    run = connect().get_run(str(history_of("colours").entries[number - 1].move.evidence.run))
    return Path(run.info.artifact_uri.removeprefix("file://")) / "evidence"


@pytest.mark.parametrize("name", FILES)
def test_stored_evidence_that_was_changed_is_named(store: Store, name: str) -> None:
    file = evidence_folder(2) / name
    for change in (lambda: file.write_bytes(file.read_bytes() + b" "), file.unlink):
        change()
        said = agentkit("verify", "colours@production")
        assert (said.code, f"the evidence's {name} is" in text_of(said.out)) == (3, True)


def test_evidence_that_is_gone_is_said(store: Store) -> None:
    shutil.rmtree(evidence_folder(2))
    said = agentkit("verify", "colours@production")
    assert (said.code, "the evidence" in text_of(said.out)) == (3, True)
    with pytest.raises(TrustError, match=r"the evidence of colours/2 (cannot be fetched|is not as it was signed)"):
        verification.reproduce("colours@production", run=False)


def test_a_version_that_nobody_evaluated_is_not_proven(store: Store) -> None:
    said = agentkit("verify", "colours/3")
    assert (said.code, "there is no signed evidence" in text_of(said.out)) == (3, True)


def test_an_evaluated_version_is_proven_and_said_to_be_in_no_production(store: Store) -> None:
    store.evaluate("colours/3")
    said = agentkit("verify", "colours/3")
    assert said.code == 0
    assert "not in production: " in said.out
    assert "evaluated" in said.out
    put(store, "agentkit.evaluation", "x", 3)
    said = agentkit("verify", "colours/3")
    assert (said.code, "cannot be read" in text_of(said.out)) == (3, True)


def test_a_rolled_back_release_is_proven_by_its_promotion(store: Store) -> None:
    promotion.rollback("colours", why="rude")
    assert problems(verification.verify("colours@production")) == []
    promotion.withdraw("colours", why="worse")
    said = agentkit("verify", "colours@production")
    assert (said.code, "alias `production`: nothing" in said.out) == (0, True)


def test_another_text_in_mlflow_is_remarked(store: Store) -> None:
    store.sql("UPDATE model_versions SET description = 'all is well' WHERE name = 'colours' AND version = 2")
    said = agentkit("verify", "colours@production")
    assert (said.code, "the text that colours/2 shows in MLflow is not the one signed" in text_of(said.out)) == (
        0,
        True,
    )


def test_an_altered_store_is_not_saved_as_a_proof(store: Store, tmp_path: Path) -> None:
    append(artifacts(2) / "source" / "colours.py", "#")
    said = agentkit("verify", "colours@production", "--save", str(tmp_path / "proof"))
    assert said.code == 3
    pem = tmp_path / "ada.pem"
    pem.write_text(keys.signing_key().public.pem)
    assert Proof(tmp_path / "proof", pem).wrong() != []


def test_a_forged_entry_in_the_past_is_remarked(store: Store) -> None:
    """One that was built upon cannot be taken out; what stands on it is signed."""
    by_a_stranger(store, 3)
    promotion.rollback("colours", why="forged")
    found = verification.verify("colours@production")
    assert problems(found) == []
    assert any("entry 3 of the history: signed with key" in c.problem for c in found)
    assert "Eve?" in agentkit("history", "colours").out


# ---- history


def test_the_history_is_a_table_with_what_was_signed(store: Store) -> None:
    promotion.rollback("colours", why="it was rude")
    out = text_of(agentkit("history", "colours").out)
    for part in ("promoted", "colours/1", "colours/2", "rolled back", "it was rude", "now", "(local key)"):
        assert part in out
    assert history_of("colours").entries[0].move.evidence.sha256[:12] in out


def test_a_system_without_a_history_is_said(store: Store) -> None:
    said = agentkit("history", "flowers")
    assert (said.code, "no system 'flowers' is registered" in said.err) == (2, True)
    registry.register_file(store.home / "given" / "colours.py")
    for n in (1, 2):
        put(store, f"{KEY}{n:06}", None, version=None)
    shutil.rmtree(store.home / "seen")
    said = agentkit("history", "colours")
    assert (said.code, "nothing was ever in production of colours" in said.err) == (2, True)


# ---- done again


def test_the_recorded_results_give_the_recorded_verdict(store: Store) -> None:
    said = agentkit("reproduce", "colours@production", "--recorded-only")
    assert said.code == 0
    assert "colours/2: recorded verdict pass; from the recorded results: the same, rule by rule" in said.out


def test_recorded_results_that_were_changed_are_not_judged(store: Store) -> None:
    path = evidence_folder(2) / "results.parquet"
    pl.read_parquet(path).with_columns(success=pl.lit(False)).write_parquet(path)
    said = agentkit("reproduce", "colours/2", "--recorded-only")
    assert said.code == 1
    assert (
        "the evidence of colours/2 is not as it was signed: the evidence's results.parquet is not the one signed"
        in said.err
    )


def test_an_evaluation_done_again_gives_the_same_outputs_and_logs_nothing(store: Store) -> None:
    before = store.sql("SELECT count(*) FROM runs")
    with without_kernel():
        found = verification.reproduce("colours/2", store.golden)
    assert (found.holds, found.runs, found.same_output, found.same_success) == (True, 44, 1.0, 1.0)
    assert found.success == (1.0, 1.0)
    assert found.changed_cases == ()
    assert store.sql("SELECT count(*) FROM runs") == before


def test_an_evaluation_done_again_says_which_cases_changed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentkit_pipelines import evaluation

    real = evaluation.evaluate

    def worse(*arguments: Any, **options: Any) -> pl.DataFrame:
        found = real(*arguments, **options)
        return found.with_columns(success=pl.when(pl.col("case_id") < "30").then(False).otherwise("success"))

    monkeypatch.setattr(evaluation, "evaluate", worse)
    with without_kernel():
        said = agentkit("reproduce", "colours@production", "--golden", str(store.golden))
    assert said.code == 3
    assert "evaluated again, 44 runs: verdict fail, success 0.318 (was 1.000)" in said.out
    assert "cases that changed: 00, 01, 02," in said.out
    assert "and 10 more" in said.out


def test_another_golden_set_or_no_evidence_is_said_before_anything_runs(store: Store, tmp_path: Path) -> None:
    other = Path(shutil.copy(store.golden, tmp_path / "golden.jsonl"))
    append(other, other.read_text().splitlines()[0].replace('"00"', '"x"') + "\n")
    with pytest.raises(UsageError, match=r"is not the golden set that colours/2 was evaluated on \(SHA-256 \w{12}…\)"):
        verification.reproduce("colours/2", other)
    with pytest.raises(UsageError, match="colours/3 has no signed evidence; evaluate it with --thresholds, or promote"):
        verification.reproduce("colours/3", store.golden)


@pytest.mark.slow
def test_it_is_done_again_in_a_kernel(store: Store) -> None:
    said = agentkit("reproduce", "colours@production", "--golden", str(store.golden))
    assert said.code == 0, said.err
    assert "the same output in 100.0% of the runs, the same success in 100.0%" in text_of(said.out)
    assert download(history_of("colours").entries[1].move.evidence.run).is_dir()
    assert tag(store, "agentkit.last_verdict") == "pass"
