"""Addresses of databases: how they are read, what in them is secret, and what of them may be shown.

Everything is decided on the address as SQLAlchemy reads it. SQLAlchemy is imported when an address is given.
"""

import re
from typing import TYPE_CHECKING

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


EXAMPLE = "postgresql+psycopg2://user@host/name"
"""An address as it is documented; its driver comes with `pip install psycopg2-binary`."""


ENVIRONMENT = "907261548"
"""Stands for the value of an environment variable while an address is read; digits, as it may be a port."""


_SECRET_NAME = r"passw|passphrase|passcode|pwd|secret|token|api_?key|credential"


_SECRET_KEY = re.compile(rf"(?i){_SECRET_NAME}")


_SECRET_SETTING = re.compile(rf"(?i)\w*({_SECRET_NAME})\w*\s*=\s*\S")
"""A secret in a query's value, as in `options=-c app.token=…`."""


def parse_address(key: str, address: str) -> "URL":
    """Read an address. Raises ConfigError, which does not show the address, where it can't be read.

    Args:
        key: the config key that the address belongs to.
        address: the address, without interpolations.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address)
    except (ArgumentError, ValueError):  # the messages repeat pieces of the address, passwords among them
        raise ConfigError(
            f"{key}: is no database's address, as {EXAMPLE} (not shown: it may hold a password); "
            "write : / @ ? in a user's name or password as %3A %2F %40 %3F"
        ) from None
    is_file = url.drivername.startswith("sqlite") and not url.host
    if not is_file and "@" in f"{url.host}{url.database}":
        raise ConfigError(
            f"{key}: the address has an @ too many (not shown: it may hold a password); "
            "write / and @ in a user's name or password as %2F and %40"
        )
    return url


def refuse_secrets_in_address(key: str, written: str) -> None:
    """Refuse an address, as the user wrote it, with a secret that does not come from an environment variable.

    Raises:
        ConfigError: it holds a secret, or can't be read. Its text is not repeated.
    """
    text = _without_interpolations(written)
    if "://" not in text and not re.search(r"[@:?=]", text):
        return  # a name, which is refused by the name
    if any(secret.replace(ENVIRONMENT, "") for secret in secrets_in(parse_address(key, text))):
        raise ConfigError(
            f"{key}: a password in an address would be written to files; "
            f"{key}='${{oc.env:NAME}}' takes the address from an environment variable"
        )


def secrets_in(url: "URL") -> list[str]:
    """An address's secret pieces: its password, and what its query has of that kind."""
    pieces = [str(url.password)] if url.password else []
    for name, values in url.normalized_query.items():
        secret = bool(_SECRET_KEY.search(name))
        pieces += [value for value in values if value and (secret or _SECRET_SETTING.search(value))]
    return pieces


def show_address(key: str, address: str) -> str:
    """An address as it may be shown: without password and query."""
    url = parse_address(key, address)
    return url.create(url.drivername, url.username, None, url.host, url.port, url.database).render_as_string()


def hide_secrets(text: str, key: str, address: str) -> str:
    """A foreign error's text, with the address and its secrets replaced."""
    from urllib.parse import quote, quote_plus

    url = parse_address(key, address)
    shown = show_address(key, address)
    for whole in (address, url.render_as_string(hide_password=False)):
        text = text.replace(whole, shown)
    for secret in sorted(secrets_in(url), key=len, reverse=True):
        for form in {secret, quote(secret, safe=""), quote(secret, safe=" +"), quote_plus(secret)}:
            text = text.replace(form, "***")
    return text


def _without_interpolations(written: str) -> str:
    """Written text with each interpolation replaced by its default, or by a stand-in for its value."""

    def value(match: re.Match[str]) -> str:
        _, comma, default = match[1].partition(",")
        return default.strip(" '\"") if comma else ENVIRONMENT

    while True:
        replaced = re.sub(r"\$\{([^{}]*)\}", value, written)
        if replaced == written:
            return written
        written = replaced
