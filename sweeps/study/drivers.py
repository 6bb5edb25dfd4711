"""The Python driver with which a database is opened."""

import importlib
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy.exc import NoSuchModuleError

from finetune.config.secrets import STORAGE_KEY
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


class Driver(NamedTuple):
    """A driver: its name in an address, the module to import, and the package to install."""

    name: str
    module: str
    package: str


_POSTGRESQL = (
    Driver("psycopg2", "psycopg2", "psycopg2-binary"),
    Driver("psycopg", "psycopg", "psycopg[binary]"),
    Driver("pg8000", "pg8000", "pg8000"),
)

_MYSQL = (
    Driver("mysqldb", "MySQLdb", "mysqlclient"),
    Driver("pymysql", "pymysql", "pymysql"),
    Driver("mysqlconnector", "mysql.connector", "mysql-connector-python"),
)

DRIVERS = {"postgresql": _POSTGRESQL, "mysql": _MYSQL, "mariadb": _MYSQL}
"""The drivers of each kind of database; the first one is suggested for installation."""


def choose_driver(url: "URL") -> "URL":
    """Return an address with an installed driver.

    Args:
        url: the address. A driver that it names is the only candidate; otherwise SQLAlchemy's
            default comes first, then any other that is installed.

    Raises:
        ConfigError: no such driver is installed, or SQLAlchemy knows no such database.
    """
    backend = url.get_backend_name()
    try:
        default = url.get_driver_name()
    except NoSuchModuleError:
        allowed = "allowed: postgresql, mysql, sqlite"
        raise ConfigError(
            f"{STORAGE_KEY}: {url.drivername} is no database; {allowed}"
        ) from None
    drivers = DRIVERS.get(backend)
    if drivers is None:
        return url
    is_named = "+" in url.drivername
    candidates = [
        driver for driver in drivers if driver.name == default or not is_named
    ]
    if not candidates:
        names = ", ".join(f"{backend}+{driver.name}" for driver in drivers)
        raise ConfigError(
            f"{STORAGE_KEY}: {url.drivername} can't be used; allowed: {names}"
        )
    # SQLAlchemy's default first; sorting keeps the order of the others.
    candidates.sort(key=lambda driver: driver.name != default)
    for driver in candidates:
        if _is_installed(driver):
            return url.set(drivername=f"{backend}+{driver.name}")
    names = ", ".join(driver.name for driver in candidates)
    package = candidates[0].package if is_named else drivers[0].package
    raise ConfigError(
        f"{STORAGE_KEY}: no driver for {backend} is installed ({names}): pip install '{package}'"
    )


def _is_installed(driver: Driver) -> bool:
    try:
        importlib.import_module(driver.module)
    # The driver is missing, or a system library that it needs: only an import shows the latter.
    except ImportError:
        return False
    return True
