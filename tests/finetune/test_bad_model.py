"""A bad base model, an unreachable hub and arguments that the libraries refuse end in one line."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.bad_input import (
    ROWS,
    Case,
    Outcome,
    Workplace,
    assert_the_result_says,
    each,
    lines,
    matches,
)
from support.commands import Station

from finetune.files.atomic import read_json

WEIGHTS_LOAD = "no GPU: training on the CPU"
"""Logged on a CPU right before a base's weights load."""
BASE = [
    Case(
        "no-folder",
        "model.name_or_path=./nowhere",
        "model.name_or_path=./nowhere: no such folder; allowed: smollm2_135m, gemma3_270m, a hub id (owner/name), a folder",
    ),
    Case(
        "no-model-of-that-name",
        "model.name_or_path=smollm2",
        "model.name_or_path=smollm2: no such folder; allowed: smollm2_135m, gemma3_270m, a hub id…",
    ),
    Case(
        "folder-that-is-no-model",
        "model.name_or_path=base",
        "model.name_or_path=base: is no model folder: it has no config.json",
        {"base/notes.txt": ""},
    ),
    Case(
        "file",
        "model.name_or_path=d.jsonl",
        "model.name_or_path=d.jsonl: is no model folder…",
    ),
    Case(
        "adapter",
        "model.name_or_path=base",
        "model.name_or_path=base: is a LoRA adapter, not a base; python -m finetune.merge…",
        {"base/adapter_config.json": "{}", "base/adapter_model.safetensors": ""},
    ),
    Case(
        "only-pickles",
        "model.name_or_path=base",
        "model.name_or_path=base: has no *.safetensors weights (pickled ones are not loaded)",
        {"base/config.json": "{}", "base/pytorch_model.bin": ""},
    ),
]


@each(BASE)
def test_a_bad_base_is_one_line_before_torch_loads(
    case: Case, workplace: Workplace
) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})
    before = workplace.files()

    outcome = workplace.call("dataset.path=d.jsonl", *case.arguments.split())

    assert matches(case.says, outcome.error), outcome.error
    lines = [line for line in outcome.stderr.splitlines() if ": format " not in line]
    assert lines == [f"error: {outcome.error}"]
    assert not outcome.torch_imported
    assert workplace.files() == before


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """The address of a server that accepts connections and never answers (it hangs up after 60
    seconds)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()

        def hang_up() -> None:
            for connection in held:
                connection.close()

        patience = threading.Timer(60, hang_up)
        patience.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            patience.cancel()
            server.shutdown(socket.SHUT_RDWR)  # ends the thread that accepts
            hang_up()


HUB = {
    "model.name_or_path": (
        "model.name_or_path=FOLDER takes a model folder from this machine",
        ["dataset.path=d.jsonl"],
    ),
    "dataset.path": (
        "dataset.path=FILE takes a file from this machine",
        [],
    ),
}


@pytest.mark.parametrize("key", list(HUB))
@pytest.mark.parametrize(
    "hub",
    ["real", "refusing", pytest.param("silent", marks=pytest.mark.slow), "offline"],
)
def test_a_hub_id_out_of_reach_is_said_within_15_seconds(
    key: str, hub: str, workplace: Workplace
) -> None:
    workplace.write({"d.jsonl": ROWS})
    instead, others = HUB[key]
    # The real hub, where there is one, says that there is no such repository.
    reason = {
        "real": "the hub …",
        "offline": f"HF_HUB_OFFLINE is set and nothing of it is cached; {instead}",
    }.get(hub, f"the hub can't be reached (…) and nothing of it is cached; {instead}")
    with silent_server() as silent:
        environment = {
            "refusing": {"HF_ENDPOINT": "http://127.0.0.1:9"},
            "silent": {"HF_ENDPOINT": silent},
            "offline": {"HF_HUB_OFFLINE": "1"},
        }.get(hub, {})
        outcome = workplace.call(
            f"{key}=nobody-at-all/nothing-of-it", *others, **environment
        )

    assert matches(f"{key}=nobody-at-all/nothing-of-it: {reason}", outcome.error), (
        outcome.error
    )
    lines = [line for line in outcome.stderr.splitlines() if ": format " not in line]
    assert lines == [f"error: {outcome.error}"]
    assert outcome.seconds < 15
    assert not outcome.torch_imported


TINY = "model.name_or_path=base dataset.path=d.jsonl tracker=none trainer.max_steps=1 sample_max_new_tokens=1"
LINEAR = "down_proj, gate_proj, k_proj, …o_proj, q_proj, up_proj, v_proj"
LIBRARIES = [
    Case(
        "trainer-key-in-extra",
        "trainer.extra.max_steps=3",
        "trainer.extra.max_steps=3: has a key of its own…",
    ),
    Case("lora-key-in-extra", "lora.extra.r=2", "lora.extra.r=2: has a key of its own"),
    Case(
        "argument-in-a-group",
        "trainer.extra={frobnicate:1}",
        "trainer.extra=…frobnicate…",
    ),
    Case(
        "targets",
        "lora.target_modules=[query]",
        f"lora.target_modules=…query…: matches no linear layer; allowed: {LINEAR}",
    ),
    Case(
        "target-pattern",
        "lora.target_modules=query",
        f"lora.target_modules=query: …{LINEAR}",
    ),
    Case(
        "length",
        "dataset.max_length=2",
        "dataset.max_length=2: leaves no train row…",
        {
            "d.jsonl": lines(
                *({"prompt": f"What is {n}?", "completion": "It."} for n in range(20))
            )
        },
    ),
    Case("lora-argument", "+lora.extra.frobnicate=1", "lora.extra…frobnicate…"),
    Case(
        "trainer-argument", "+trainer.extra.frobnicate=1", "trainer.extra…frobnicate…"
    ),
]
LOADING = [
    Case("model-argument", "+model.extra.frobnicate=1", "model.extra…frobnicate…"),
    Case("damaged-weights", "", "model.name_or_path=base: can't be loaded: …"),
]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["none", "both"])
@each(LIBRARIES)
def test_what_the_libraries_refuse_is_one_line_and_leaves_nothing(
    case: Case, tracker: str, workplace: Workplace, station: Station, tiny_base: Path
) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})
    (workplace.cwd / "base").symlink_to(tiny_base)
    before = workplace.files()

    outcome = replace(workplace, station=station).call(
        *TINY.split(), *case.arguments.split(), f"tracker={tracker}"
    )

    assert matches(case.says, outcome.error), outcome.error
    assert WEIGHTS_LOAD not in outcome.stderr
    assert outcome.torch_imported  # the observer sees it where it is
    assert workplace.files() == before


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slots", "basic"])
@each(LIBRARIES)
def test_a_job_that_the_libraries_refuse_leaves_its_result_alone(
    case: Case, launcher: str, workplace: Workplace, station: Station, tiny_base: Path
) -> None:
    workplace.write({"d.jsonl": ROWS, **case.files})
    (workplace.cwd / "base").symlink_to(tiny_base)

    outcome = replace(workplace, station=station).call(
        *("-m", *TINY.split(), *case.arguments.split()),
        *("tracker=both", f"hydra/launcher={launcher}", "hydra.sweep.dir=jobs"),
    )

    expected = f"1 failed; job 0: {case.says}"
    assert matches(expected, outcome.error), outcome.error
    assert WEIGHTS_LOAD not in outcome.stderr
    folder = workplace.cwd / "jobs" / "trials" / "0"
    names = {path.name for path in folder.iterdir()}
    assert names == {".hydra", ".lock", "result.json", "train.log"}
    assert read_json(folder / "result.json")["status"] == "failed"


@pytest.mark.slow
@each(LOADING)
def test_what_only_loading_can_tell_is_one_line_too(
    case: Case, workplace: Workplace, station: Station, tiny_base: Path
) -> None:
    workplace.write({"d.jsonl": ROWS})
    shutil.copytree(tiny_base, workplace.cwd / "base")
    if case.id == "damaged-weights":
        os.truncate(workplace.cwd / "base" / "model.safetensors", 1000)

    outcome = replace(workplace, station=station).call(
        *TINY.split(), *case.arguments.split()
    )

    assert matches(case.says, outcome.error), outcome.error
    assert (
        WEIGHTS_LOAD in outcome.stderr
    )  # else the other tests' absence of it proves nothing
    assert_the_result_says(workplace, outcome.error)


@pytest.mark.slow
def test_4_bit_without_bitsandbytes_says_so_and_what_works_here(
    workplace: Workplace, tiny_base: Path
) -> None:
    workplace.write({"d.jsonl": ROWS})
    (workplace.cwd / "base").symlink_to(tiny_base)

    outcome = workplace.call(
        *TINY.split(), "quantization=nf4", TEST_WITHOUT_BITSANDBYTES="1"
    )

    expected = "quantization.load_in_4bit=true: …libcudart is broken…; allowed here: quantization=none"
    assert matches(expected, outcome.error), outcome.error
    assert WEIGHTS_LOAD not in outcome.stderr


def can_mount() -> bool:
    """Whether this user may mount a file system of their own."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"],
            capture_output=True,
        ).returncode
        == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not can_mount(), reason="needs a small disk to fill: Linux with user namespaces"
)
def test_a_full_disk_is_one_line_that_names_the_file(
    workplace: Workplace, tiny_base: Path
) -> None:
    workplace.write({"d.jsonl": ROWS, "run/": b""})
    (workplace.cwd / "base").symlink_to(tiny_base)
    mount = "mount -t tmpfs -o size=400k none run"  # enough to begin, too little for the first checkpoint
    command = [sys.executable, "-m", "finetune", *TINY.split(), "hydra.run.dir=run"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *command],
        cwd=workplace.cwd, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 1
    outcome = Outcome(done.returncode, done.stdout, done.stderr, True, 0)
    assert matches("…No space left on device…run/…", outcome.error), outcome.error
    assert not re.search("Traceback|Logging error|Error executing job", done.stderr), (
        done.stderr
    )
