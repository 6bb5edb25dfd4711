"""Bad arguments of generate, evaluate and merge end in one line."""

import json
import shlex

import pytest
from support.bad_input import ANY_FILE, ROWS, Case, Workplace, each, matches
from support.configs import compose

COMMANDS = [
    Case(
        "generate-no-run",
        "generate nowhere --prompt Hi",
        "RUN=nowhere: no such run; allowed: the folder of a run that has begun, as …",
    ),
    Case(
        "evaluate-no-run",
        "evaluate nowhere --data d.jsonl",
        "RUN=nowhere: no such run; allowed: the folder of a run that has begun, as …",
    ),
    Case(
        "merge-no-run",
        "merge nowhere --to new",
        "RUN=nowhere: no such run; allowed: the folder of a run that has begun, as …",
    ),
    Case(
        "generate-no-adapter",
        "generate run --prompt Hi",
        "run: the run has no adapter yet; python -m finetune resume=run resumes it",
    ),
    Case(
        "generate-no-adapter-odd",
        "generate 'un fin' --prompt Hi",
        "un fin: the run has no adapter yet; python -m finetune 'resume=un fin' resumes it",
    ),
    Case(
        "evaluate-empty-data",
        "evaluate run --data ''",
        "--data=: must be a file, a folder or a hub id",
    ),
    Case(
        "merge-no-adapter",
        "merge run --to new",
        "run: the run has no adapter yet; python -m finetune resume=run resumes it",
    ),
    Case(
        "evaluate-no-data",
        "evaluate run --data no.jsonl",
        f"--data=no.jsonl: no such file or folder; {ANY_FILE}",
    ),
    Case(
        "generate-flag",
        "generate run --prompt Hi --frobnicate",
        "unrecognized arguments: --frobnicate; see --help",
    ),
    Case(
        "evaluate-flag",
        "evaluate run --data d.jsonl --frobnicate",
        "unrecognized arguments: --frobnicate; see --help",
    ),
    Case(
        "merge-flag",
        "merge run --to new --frobnicate",
        "unrecognized arguments: --frobnicate; see --help",
    ),
    Case(
        "generate-no-prompt",
        "generate run",
        "one of the arguments --prompt --prompts --chat is required; see --help",
    ),
    Case("evaluate-no-data-flag", "evaluate run", "…required: --data; see --help"),
    Case("merge-no-target", "merge run", "…required: --to; see --help"),
    Case("generate-nothing", "generate", "…required: RUN; see --help"),
    Case(
        "generate-system-empty",
        "generate run --prompt Hi --system=",
        "--system=: must be a text that is not empty",
    ),
    Case(
        "generate-length-text",
        "generate run --prompt Hi --max-length long",
        "--max-length=long: must be a whole number",
    ),
    Case(
        "generate-length-zero",
        "generate run --prompt Hi --max-length 0",
        "…--max-length…0…at least 1…",
    ),
    Case(
        "generate-new-tokens-zero",
        "generate run --prompt Hi --max-new-tokens 0",
        "--max-new-tokens=0: must be a whole number, at least 1",
    ),
    Case(
        "merge-dtype",
        "merge run --to new --dtype int4",
        "--dtype=int4: allowed: bfloat16, float16, float32",
    ),
    Case(
        "merge-to-a-full-folder",
        "merge run --to run",
        "--to=run: exists already; must be a new or an empty folder",
    ),
    Case(
        "export-no-run",
        "export nowhere --to new",
        "RUN=nowhere: no such run; allowed: the folder of a run that has begun, as …",
    ),
    Case(
        "export-format",
        "export run --to new --format onnx",
        "--format=onnx: allowed: gguf",
    ),
    Case(
        "export-quantize",
        "export run --to new --quantize q5_0",
        "--quantize=q5_0: did you mean q8_0? allowed: q4_k_m, q8_0",
    ),
    Case(
        "export-no-llama-cpp",
        "export run --to new --llama-cpp nowhere",
        "--llama-cpp=nowhere: must be llama.cpp's folder; it has no convert_hf_to_gguf.py",
    ),
    Case(
        "export-no-quantiser",
        "export run --to new --quantize q4_k_m",
        "--quantize=q4_k_m: needs llama.cpp's program llama-quantize, which is not in PATH; …",
    ),
    Case(
        "merge-to-a-file",
        "merge run --to d.jsonl",
        "--to=d.jsonl: exists already; must be a new or an empty folder",
    ),
]


@each(COMMANDS, kind=lambda case: (case.arguments.split()[0], case.kind))
def test_a_command_refuses_in_one_line(case: Case, workplace: Workplace) -> None:
    identity = json.dumps({"config": compose().to_dict()})
    folders = {f"{folder}/run.json": identity for folder in ("run", "un fin")}
    workplace.write({"d.jsonl": ROWS, **folders})
    before = workplace.files()
    command, *arguments = shlex.split(case.arguments)

    outcome = workplace.call(*arguments, module=f"finetune.{command}")

    assert matches(case.says, outcome.error), outcome.error
    assert outcome.stderr == f"error: {outcome.error}\n"
    assert outcome.stdout == ""
    assert workplace.files() == before
    assert not outcome.torch_imported


@pytest.mark.parametrize("flags", [("--prompt",), ("--chat", "--system")])
def test_bytes_that_are_no_text_are_refused(
    flags: tuple[str, ...], workplace: Workplace
) -> None:
    # The byte E9 of the command line, as Python decodes it.
    outcome = workplace.call("run", *flags, "caf\udce9", module="finetune.generate")
    assert outcome.error == f"{flags[-1]}=caf\\udce9: must be valid UTF-8 text"
