"""The same attacks on PostgreSQL, with users; and what a plain MLflow server leaves to those who load."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import evidence as prepared
import httpx
import pytest
from attacks import (
    ATTACKS,
    GRACE,
    MALLORY,
    PROMPT,
    Site,
    add_neighbours,
    entry,
    guarded_by,
    served,
    trusting,
    with_served_artifacts,
)
from evidence import Store, agentkit
from postgres import postgresql
from red_team import one_of_many_wins, promote_at_once, refused
from servers import mlflow_server

from agentkit.errors import TrustError
from agentkit_tracking.history import KEY

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*registry stages:FutureWarning")]
ADMIN = ("admin", "correct-horse-battery")


# ---- PostgreSQL, with users


def test_on_postgresql_admins_are_refused_too(tmp_path: Path, project: Path) -> None:
    home = tmp_path / "server"
    home.mkdir()
    (home / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = MANAGE\ndatabase_uri = sqlite:///{home / 'auth.db'}\n"
        f"admin_username = {ADMIN[0]}\nadmin_password = {ADMIN[1]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    settings = {
        **trusting(home),
        "MLFLOW_AUTH_CONFIG_PATH": str(home / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret",
    }  # fmt: skip
    with postgresql() as database:
        arguments = guarded_by(database, "agentkit-basic-auth")
        with mlflow_server(home, *arguments, workers=1, **settings) as url:
            quicken_passwords(home / "auth.db")
            site = Site(url, home, database, auth=ADMIN)
            promote_two(site, project)
            add_neighbours(site)
            for attack in ATTACKS:
                refused(site, attack, every_route=False)
            assert site.load() == site.release(2)
            alias = {"name": "colours", "alias": "production", "version": "3"}
            for who, status in ((ADMIN, 403), (None, 401), (("admin", "wrong"), 401)):
                answer = httpx.post(f"{url}/api/2.0/mlflow/registered-models/alias", json=alias, auth=who)
                assert answer.status_code == status
            promote_at_once(site, 3, site.newest(), tmp_path)
            one_of_many_wins(site, 4)


def quicken_passwords(database: Path) -> None:
    """MLflow takes a sixth of a second to check one, with every request."""
    from werkzeug.security import generate_password_hash

    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE users SET password_hash = ?", (generate_password_hash(ADMIN[1], "pbkdf2:sha256:1"),))


def promote_two(site: Site, project: Path) -> None:
    """As the prepared home: versions 1 and 2 of `colours` promoted in turn, 3 registered."""
    from agentkit_pipelines import promotion
    from agentkit_tracking import registry

    given = prepared._prepared() / "given"
    (site.home / "given").mkdir()
    for name in ("golden.jsonl", "colours.yaml"):
        (site.home / "given" / name).write_bytes((given / name).read_bytes())
    with site.used_by():
        for number in (1, 2, 3):
            (project / "colours.py").write_text(prepared.source(number))
            assert registry.register_file("colours.py").number == number
        for number in (1, 2):
            promotion.commit(Store(site.home).evaluate(f"colours/{number}", GRACE.key), GRACE.key, why="ж" * 500)
        assert site.consistent() == 2


# ---- a plain MLflow server


def test_on_a_plain_server_it_is_enforced_at_load_only(tmp_path: Path) -> None:
    home = tmp_path / "server"
    with_served_artifacts(prepared.promoted(home))
    trusting(home)
    with served(home, workers=1) as site, site.used_by(MALLORY) as client:
        assert "enforced at load only" in " ".join(agentkit("doctor").out.split())
        assert site.load() == site.release(2)
        with site.used_by():
            done = Store(home).evaluate("colours/3", GRACE.key)
            from agentkit_pipelines import promotion

            promotion.commit(done, GRACE.key)
        assert site.consistent() == 3
        assert site.load() == site.release(3)
        client.set_registered_model_alias("colours", "production", "1")  # nobody objects
        with pytest.raises(
            TrustError, match=r"the alias points to version 1, but the signed history says version 3.*agentkit promote"
        ):
            site.load()
        client.set_registered_model_alias("colours", "production", "3")
        client.set_registered_model_alias("colours", "Production", "1")
        with pytest.raises(TrustError, match="was set without evidence"):
            site.load()
        client.delete_registered_model_alias("colours", "Production")
        client.set_prompt_version_tag(PROMPT, "3", "mlflow.prompt.text", "Say warm.")
        with pytest.raises(TrustError, match="was changed in MLflow"):
            site.load()
        forged_entry = entry(site, MALLORY, version=1, release=site.release(1))
        client.set_registered_model_tag("colours", f"{KEY}{len(site.history.entries) + 1:06}", forged_entry)
        with pytest.raises(TrustError, match="not trusted here"):
            site.load()
