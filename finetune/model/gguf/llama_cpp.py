"""llama.cpp's own converter and quantiser, each as a process of its own.

The converter has its own copy of the package gguf, newer than that of the package index, and may
have a Python environment of its own.
"""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import ConfigError, refusal

log = logging.getLogger(__name__)

CONVERTER = "convert_hf_to_gguf.py"

QUANTIZER = "llama-quantize"

OUTPUT_TYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "q8_0": "q8_0",
}
"""The converter's names of the types of a file, by ours."""

FLAG = "--llama-cpp"

WROTE_NOTHING = "it ended without an error, and wrote no file"


def require_converter(folder: str) -> Path:
    """Return llama.cpp's folder.

    Raises:
        ConfigError: It has no converter.
    """
    path = Path(folder).expanduser().absolute()
    if not (path / CONVERTER).is_file():
        raise refusal(
            FLAG, folder, f"must be llama.cpp's folder; it has no {CONVERTER}"
        )
    return path


def find_quantizer(folder: Path | None, quantization: str) -> Path:
    """Return the path of `llama-quantize`: in llama.cpp's folder, or on PATH.

    Args:
        folder: llama.cpp's folder; None: none was given.
        quantization: What it is needed for, for the error.

    Raises:
        ConfigError: It is in neither.
    """
    places = (
        [] if folder is None else [folder / "build" / "bin", folder / "bin", folder]
    )
    for place in places:
        program = shutil.which(QUANTIZER, path=str(place))
        if program is not None:
            return Path(program)
    program = shutil.which(QUANTIZER)
    if program is not None:
        return Path(program)
    where = "PATH" if folder is None else f"{folder}, its build/bin, or PATH"
    reason = f"needs llama.cpp's program {QUANTIZER}, which is not in {where}"
    advice = (
        f"{FLAG} FOLDER names its folder"
        if folder is None
        else f"cmake -B build && cmake --build build --target {QUANTIZER} builds it"
    )
    raise refusal("--quantize", quantization, f"{reason}; {advice}, q8_0 needs none")


def convert(folder: Path, model: Path, file: Path, file_type: str, name: str) -> None:
    """Write a model folder as a GGUF file with llama.cpp's converter.

    Args:
        folder: llama.cpp's folder. Its `.venv` or `venv` is the converter's environment, otherwise
            it runs in this one.
        model: The model folder.
        file: The file.
        file_type: A key of `OUTPUT_TYPES`.
        name: What the file calls the model.

    Raises:
        ConfigError: The converter fails.
    """
    log.info("converting with %s", folder / CONVERTER)
    command = [
        _python(folder), str(folder / CONVERTER), str(model),
        "--outfile", str(file), "--outtype", OUTPUT_TYPES[file_type], "--model-name", name,
    ]  # fmt: skip
    environment = dict(os.environ)
    environment.pop("NO_LOCAL_GGUF", None)
    # The folder's gguf before the installed one, also in modules that the converter imports.
    paths = [str(folder / "gguf-py"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    problem = _write(file, command, environment)
    if problem is None:
        return
    advice = ""
    if "ModuleNotFoundError" in problem:
        advice = (
            f"; pip install -r {folder / 'requirements.txt'} installs what it needs"
        )
    raise refusal(FLAG, folder, f"{CONVERTER} failed: {problem}{advice}")


def _python(folder: Path) -> str:
    """Return the interpreter that runs the converter."""
    for environment in (".venv", "venv"):
        interpreter = folder / environment / "bin" / "python"
        if interpreter.is_file():
            return str(interpreter)
    return sys.executable


def quantize(program: Path, source: Path, file: Path, quantization: str) -> None:
    """Quantise a GGUF file with `llama-quantize`.

    Args:
        program: Its path.
        source: The file with 16 or 32 bits.
        file: The quantised file.
        quantization: For example q4_k_m.

    Raises:
        ConfigError: The program fails.
    """
    log.info("quantising with %s", program)
    command = [str(program), str(source), str(file), quantization.upper()]
    problem = _write(file, command, dict(os.environ))
    if problem is not None:
        raise refusal("--quantize", quantization, f"{program} failed: {problem}")


def _write(
    file: Path, command: Sequence[str], environment: dict[str, str]
) -> str | None:
    """Let a program write a file; return None, or the last line that it printed if it fails.

    Raises:
        ConfigError: It can't be started.
    """
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise ConfigError(f"{command[0]}: {error.strerror}") from error
    if done.returncode == 0:
        return None if file.is_file() else WROTE_NOTHING
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"
