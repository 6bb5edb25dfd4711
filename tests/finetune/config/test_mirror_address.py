"""Secrets in the address of a mirror are refused; folders and addresses without one are not."""

from pathlib import Path

import pytest
from support.commands import run_cli
from support.configs import compose

from finetune.config.mirror_address import refuse_secrets_in_mirror
from finetune.config.secrets import refuse_secrets_in
from finetune.errors import ConfigError

SECRET = "hunter22"


@pytest.mark.parametrize(
    "address",
    [
        f"ftp://me:{SECRET}@host/x",
        f"simplecache::ftp://me:{SECRET}@host/x",
        f"ftp://me:{SECRET}/more@host/x",
        f"ftp://me:{SECRET}#more@host/x",
        f"s3://bucket/x?secret={SECRET}",
        f"abfs://box@host/x?sig={SECRET}",
        "ftp://me:${oc.env:PASSWORD}@host/x",
    ],
)
def test_an_address_with_a_secret_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_secrets_in(f"mirror={address}")
    line = str(refused.value)
    assert line.startswith("mirror: a password in an address")
    assert "come from the environment" in line
    assert SECRET not in line


@pytest.mark.parametrize(
    "address",
    [
        "/mnt/run=1/x",
        "/mnt/me@corp/x",
        "/mnt/a:b",
        "simplecache::s3://b/x",
        "s3://bucket/a@b/x",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/name/x",
        "ftp://me@host:21/x?timeout=3",
        "${oc.env:MIRROR}",
        "s3://${oc.env:BUCKET}/x",
    ],
)
def test_others_are_taken(address: str) -> None:
    refuse_secrets_in(f"mirror={address}")
    refuse_secrets_in_mirror(address)


def test_a_secret_from_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MIRROR", f"ftp://me:{SECRET}@host/x")
    with pytest.raises(ConfigError, match=r"^mirror: a password") as refused:
        compose("mirror=${oc.env:MIRROR}")
    assert SECRET not in str(refused.value)


def test_the_command_shows_no_secret_from_the_environment(tmp_path: Path) -> None:
    words = ("mirror=${oc.env:MIRROR}", "hydra.run.dir=r")
    address = f"ftp://me:{SECRET}@host/x"
    refused = run_cli(*words, cwd=tmp_path, MIRROR=address)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: mirror: a password in an address")
    assert SECRET not in refused.stderr
    assert not (tmp_path / "r").exists()
