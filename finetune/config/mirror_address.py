"""The address of a mirror, which may hold no secret: the config is written to files and trackers.

It is a folder or an address of fsspec, where several may be chained, as `simplecache::s3://…`.
"""

import re
from urllib.parse import parse_qsl, urlsplit

from finetune.config.addresses import SECRET_KEY, without_interpolations
from finetune.errors import ConfigError

_SIGNATURE = re.compile(r"(?i)(x-\w+-)?(sig|signature|key)")
"""Further keys of a query that hold secrets: of presigned addresses."""


def refuse_secrets_in_mirror(address: str) -> None:
    """Refuse an address of a mirror that holds a secret.

    Args:
        address: The address, with or without interpolations. A secret from an environment variable
            is refused too: the config has its value.

    Raises:
        ConfigError: The address holds a secret. The message does not show it.
    """
    links = without_interpolations(address).split("::")
    if any(_holds_secret(link) for link in links):
        raise ConfigError(
            "mirror: a password in an address would be written to files (not shown); credentials "
            "come from the environment, as s3fs, gcsfs, … read it, of others as fsspec does, from "
            "FSSPEC_FTP_PASSWORD"
        )


def _holds_secret(link: str) -> bool:
    # A folder may have any name.
    if "://" not in link:
        return False
    try:
        parts = urlsplit(link)
        # Raises ValueError where a password has a / ? # that is not escaped: it is taken for one.
        _ = parts.port
    except ValueError:
        return "@" in link
    if parts.password:
        return True
    query = parse_qsl(parts.query)
    return any(SECRET_KEY.search(key) or _SIGNATURE.fullmatch(key) for key, _ in query)
