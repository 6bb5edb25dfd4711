"""What of a database's address is secret, which secrets are refused, and what is shown of the
rest."""

import builtins
import importlib
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from finetune.config.addresses import hide_secrets, show_address
from finetune.config.secrets import refuse_secrets_in
from finetune.errors import ConfigError
from sweeps.study.storage import open_storage

SECRET = "hunter2horse"
KEY = "hydra.sweeper.storage"


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql+psycopg2://host/db?user=me&password={SECRET}",
        f"postgresql+psycopg2://host/db?pass%77ord={SECRET}",
        f"postgresql://host/db?sslpassword={SECRET}",
        f"mysql+pymysql://host/db?passwd={SECRET}",
        f"mssql+pyodbc://?odbc_connect=DRIVER%3Dx;PWD%3D{SECRET}",
        f"postgresql://host/db?access_token={SECRET}",
        f"postgresql://host/db?options=-c%20app.token%3D{SECRET}",
        f"postgresql://me:a/{SECRET}@host/db",
        f"postgresql://me:a@{SECRET}@host/db",
        f"postgresql://me:a:{SECRET}@host/db",
        f"postgresql://me:a%2F{SECRET}@host/db",
        f"postgresql://me:a@b/{SECRET}@host/db",
        f"postgresql://m/e:{SECRET}@host/db",
        f"postgresql://me:{SECRET}",
        f"postgresql://me:{SECRET}@${{oc.env:HOST}}/db",
        f"postgresql://me:a${{oc.env:PASSWORD}}{SECRET}@host/db",
        f"${{oc.env:DATABASE,postgresql://me:{SECRET}@host/db}}",
        f"postgresql//me:{SECRET}@host/db",
        f"me:{SECRET}@host",
        f"'postgresql://me:{SECRET}@host/db'",
        f"postgresql://host/db?user\\=me&password\\={SECRET}",
        f"postgresql://me:{SECRET},x@host/db",
        f"postgresql://me:({SECRET}@host/db",
    ],
)
@pytest.mark.parametrize("override", ["{}", "hydra.sweeper={{storage:{}}}"])
def test_a_secret_in_an_address_is_refused_without_being_shown(
    address: str, override: str
) -> None:
    in_mapping = override.format(f'"{address}"' if "'" not in address else address)
    with pytest.raises(ConfigError) as refused:
        refuse_secrets_in(f"{KEY}={address}" if override == "{}" else in_mapping)

    assert str(refused.value).startswith(f"{KEY}: ")
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "null",
        "foo",
        "sqlite:///trials.db",
        "sqlite:////home/me@work/trials.db",
        "postgresql://me@host/db",
        "postgresql://host:5432/db?sslmode=require&passfile=/home/me/.pgpass&sslkey=key.pem",
        "postgresql://host/db?options=-c%20search_path%3Doptuna",
        "${oc.env:DATABASE}",
        "${oc.env:DATABASE,null}",
        "'${oc.env:DATABASE}'",
        "postgresql://me:${oc.env:PASSWORD}@${oc.env:HOST}:${oc.env:PORT}/db",
        "postgresql://host/db?user=me&password=${oc.env:PASSWORD}",
    ],
)
def test_an_address_without_a_secret_is_taken(address: str) -> None:
    refuse_secrets_in(f"{KEY}={address}")


@pytest.mark.parametrize("password", [SECRET, f"{SECRET}/%40:?", f"a b&{SECRET}"])
def test_what_is_shown_of_an_address_and_of_errors_has_no_secret(password: str) -> None:
    url = (
        make_url("postgresql+psycopg2://me@host:5/db")
        .set(password=password)
        .update_query_dict({"sslpassword": SECRET})
    )
    address = url.render_as_string(hide_password=False)

    assert show_address(KEY, address) == "postgresql+psycopg2://me@host:5/db"
    assert SECRET not in hide_secrets(
        f"no connection to {address} with {password!s}, {SECRET}", KEY, address
    )


@pytest.mark.parametrize(
    ("address", "installed", "expected"),
    [
        ("postgresql://host/db", ["psycopg2"], "postgresql+psycopg2"),
        ("postgresql://host/db", ["psycopg", "psycopg2"], "postgresql+psycopg"),
        ("postgresql://host/db", ["pg8000"], "postgresql+pg8000"),
        (
            "postgresql+psycopg2://host/db",
            ["psycopg", "psycopg2"],
            "postgresql+psycopg2",
        ),
        ("mysql://host/db", ["MySQLdb", "pymysql"], "mysql+mysqldb"),
        ("mysql://host/db", ["pymysql"], "mysql+pymysql"),
        ("mariadb://host/db", ["mysql.connector"], "mariadb+mysqlconnector"),
        ("sqlite:///x.db", [], "sqlite"),
        (
            "postgresql://host/db",
            [],
            "no driver for postgresql is installed (…): pip install 'psycopg2-binary'",
        ),
        (
            "postgresql+psycopg://host/db",
            ["psycopg2"],
            "no driver … (psycopg): pip install 'psycopg[binary]'",
        ),
        (
            "mysql://host/db",
            [],
            "no driver for mysql is installed (…): pip install 'mysqlclient'",
        ),
        (
            "postgresql+asyncpg://host/db",
            ["asyncpg"],
            "postgresql+asyncpg can't be used; allowed: …psycopg2…",
        ),
        (
            "postgres://host/db",
            ["psycopg2"],
            "postgres is no database; allowed: postgresql, mysql, sqlite",
        ),
    ],
)
def test_the_driver_is_one_that_is_installed(
    address: str, installed: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweeps.study import database

    def importing(name: str) -> Any:
        if name not in installed:
            raise ImportError(name)
        return builtins

    monkeypatch.setattr(importlib, "import_module", importing)
    try:
        chosen = database.choose_driver(make_url(address)).drivername
    except ConfigError as error:
        chosen = str(error)

    beginning, _, end = expected.partition("…")
    assert chosen.removeprefix(f"{KEY}: ").startswith(beginning)
    assert all(piece in chosen for piece in end.split("…"))
    assert "\n" not in chosen


def test_an_error_at_opening_has_no_secret(tmp_path: Any) -> None:
    address = f"sqlite:///{tmp_path}/no/such/folder/x.db?password={SECRET}"
    with pytest.raises(ConfigError) as refused:
        open_storage(address, tmp_path)

    assert "can't be opened" in str(refused.value)
    assert SECRET not in str(refused.value)
