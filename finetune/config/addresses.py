"""Database addresses: parsed, refused if they hold a secret, and shown without secrets.

Addresses are parsed by SQLAlchemy, which is imported only when an address is given.
"""

import re
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL


EXAMPLE = "postgresql+psycopg2://user@host/name"
"""An address as documented; its driver comes with `pip install psycopg2-binary`."""


ENVIRONMENT = "907261548"
"""Stands for the value of an environment variable while an address is parsed. Digits, because the
variable may hold a port."""


_SECRET_NAME = r"passw|passphrase|passcode|pwd|secret|token|api_?key|credential"


SECRET_KEY = re.compile(rf"(?i){_SECRET_NAME}")
"""A key of an address's query that holds a secret."""


_SECRET_SETTING = re.compile(rf"(?i)\w*({_SECRET_NAME})\w*\s*=\s*\S")
"""A secret in the value of a query parameter, as in `options=-c app.token=…`."""


def parse_address(key: str, address: str) -> "URL":
    """Parse a database address.

    Args:
        key: the config key of the address, for the error message.
        address: the address, without interpolations.

    Raises:
        ConfigError: the address can't be parsed. The message does not show it.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(address)
    # Not chained: the messages of these errors repeat pieces of the address.
    except (ArgumentError, ValueError):
        raise ConfigError(
            f"{key}: is no database's address, as {EXAMPLE} (not shown: it may hold a password); "
            "write : / @ ? in a user's name or password as %3A %2F %40 %3F"
        ) from None
    # An @ that is not escaped splits a password, and the parser takes its end for the host.
    is_file = url.drivername.startswith("sqlite") and not url.host
    if not is_file and "@" in f"{url.host}{url.database}":
        raise ConfigError(
            f"{key}: the address has an @ too many (not shown: it may hold a password); "
            "write / and @ in a user's name or password as %2F and %40"
        )
    return url


def refuse_secrets_in_address(key: str, written: str) -> None:
    """Refuse an address with a secret that does not come from an environment variable.

    Args:
        key: the config key of the address.
        written: the address as the user wrote it, with interpolations.

    Raises:
        ConfigError: the address holds a secret, or can't be parsed. The message does not show it.
    """
    address = without_interpolations(written)
    # A plain word holds no secret; the opening of the storage refuses it.
    if "://" not in address and not re.search(r"[@:?=]", address):
        return
    secrets = secrets_in(parse_address(key, address))
    # Whatever is left of a secret without the environment's variables was written out.
    if any(secret.replace(ENVIRONMENT, "") for secret in secrets):
        raise ConfigError(
            f"{key}: a password in an address would be written to files; "
            f"{key}='${{oc.env:NAME}}' takes the address from an environment variable"
        )


def secrets_in(url: "URL") -> list[str]:
    """Return the secrets of an address: its password, and secret values in its query."""
    secrets = [str(url.password)] if url.password else []
    for name, values in url.normalized_query.items():
        is_secret = bool(SECRET_KEY.search(name))
        for value in values:
            if value and (is_secret or _SECRET_SETTING.search(value)):
                secrets.append(value)
    return secrets


def show_address(key: str, address: str) -> str:
    """Return an address without password and query."""
    url = parse_address(key, address)
    public = url.create(
        url.drivername, url.username, None, url.host, url.port, url.database
    )
    return public.render_as_string()


def hide_secrets(text: str, key: str, address: str) -> str:
    """Replace an address and its secrets in another library's error message.

    Args:
        text: the message.
        key: the config key of the address.
        address: the address, without interpolations.
    """
    url = parse_address(key, address)
    public = show_address(key, address)
    for full_address in (address, url.render_as_string(hide_password=False)):
        text = text.replace(full_address, public)
    # The longest first: a secret that is a part of another one would leave the rest readable.
    for secret in sorted(secrets_in(url), key=len, reverse=True):
        # As drivers and SQLAlchemy write it into their messages.
        encodings = {
            secret,
            quote(secret, safe=""),
            quote(secret, safe=" +"),
            quote_plus(secret),
        }
        for encoded in encodings:
            text = text.replace(encoded, "***")
    return text


def without_interpolations(written: str) -> str:
    """Replace each interpolation by its default, or by `ENVIRONMENT`."""

    def stand_in(match: re.Match[str]) -> str:
        _, comma, default = match[1].partition(",")
        return default.strip(" '\"") if comma else ENVIRONMENT

    # The innermost first, because interpolations may be nested.
    while True:
        replaced = re.sub(r"\$\{([^{}]*)\}", stand_in, written)
        if replaced == written:
            return written
        written = replaced
