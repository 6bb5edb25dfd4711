"""What tests share: a tiny random base with a real tokenizer, configs composed as Hydra does, whole commands."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("WANDB_API_KEY", None)

from finetune.cli import CONF, quiet_libraries
from finetune.config import RunConfig

quiet_libraries()

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, where runs repeat bit for bit, but for those marked gpu: pytest -m gpu."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # the GPU's kernels run on the CPU; Triton reads it when it is imported


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests leave stays out of the user's folders; the packaged model, fetched once, is looked for there."""
    os.environ.setdefault("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    os.environ["WANDB_DATA_DIR"] = str(tmp_path_factory.mktemp("wandb"))  # copies of artifacts' files


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is served tokens that another one, or older code, has left."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models of a few thousand weights gain nothing by threads, and lose much where other work runs beside them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and a byte-level BPE tokenizer with a ChatML template; pad is eos."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from finetune.python_docs import question_answer_pairs

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for row in question_answer_pairs() for text in row.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    folder = tmp_path_factory.mktemp("tiny") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compose(*overrides: str) -> RunConfig:
    """The checked config of a command line."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF)):
        return RunConfig.from_hydra(hydra_compose("config", list(overrides)))


@pytest.fixture
def tiny(tiny_base: Path) -> Callable[..., RunConfig]:
    """Composes a config of seconds: the tiny base, few short rows, no tracker; further overrides win."""

    def make(*overrides: str) -> RunConfig:
        return compose(*tiny_overrides(tiny_base), *overrides)

    return make


def wide_base(tiny_base: Path, folder: Path) -> Path:
    """The tiny base, said to have the shapes of a large one: a plan believes its config."""
    place = folder / "wide"
    place.mkdir()
    for file in tiny_base.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((place / "config.json").read_text())
    config |= {"num_hidden_layers": 8, "hidden_size": 4096, "intermediate_size": 16384, "head_dim": 1024}
    (place / "config.json").write_text(json.dumps(config))
    return place


def tiny_overrides(tiny_base: Path) -> list[str]:
    """The command line of a run of seconds."""
    return [
        f"model.name_or_path={tiny_base}",
        "tracker=none",
        "dataset.limit=24",
        "dataset.eval_fraction=0.02",
        "dataset.test_fraction=0.02",
        "sample_max_length=64",
        "trainer.logging_steps=1",
    ]


def run_cli(
    *arguments: str, cwd: Path, module: str = "finetune", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command as a user runs it: a process of its own."""
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


STATION = """
import json, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started behind a script's `&` ignores it
import finetune.packed_engine, finetune.samples, finetune.trl_engine
import sweeps.conclusion, sweeps.launcher, sweeps.pack, sweeps.sweeper, sweeps.worker
for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        print(json.dumps(os.waitpid(order["poll"], os.WNOHANG)), flush=True)
        continue
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
else:
    sys.exit()
os.setsid()
os.chdir(order["cwd"])
os.environ.clear()
os.environ.update(order["env"])
for number, path in enumerate((os.devnull, order["log"] + ".out", order["log"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
sys.argv = [order["module"], *order["arguments"]]
exec(order["before"])
runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
"""


SLOW_STEPS = """
import time
from finetune.progress import Reporter
step = Reporter.step
def slow_step(*arguments, **more):
    time.sleep(0.5)
    return step(*arguments, **more)
Reporter.step = slow_step
"""
"""A step takes long enough to be met in the middle of a run, also on a busy machine."""


class Forked:
    """A command that runs, in a process and a process group of its own."""

    def __init__(self, station: "Station", pid: int, log: Path) -> None:
        self._station, self.pid, self._log = station, pid, log
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, as subprocess has it; None while it runs."""
        if self._returncode is None:
            pid, status = self._station.ask({"poll": self.pid})
            if pid:
                self._returncode = os.waitstatus_to_exitcode(status)
        return self._returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """The whole group, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self, seconds: float = 240) -> subprocess.CompletedProcess[str]:
        """Till its end, and what it has said."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                pytest.fail(f"not ended after {seconds} s: {self.said()}")
            time.sleep(0.02)
        out = Path(f"{self._log}.out").read_text()
        return subprocess.CompletedProcess([], self.poll() or 0, out, self.said())

    def said(self) -> str:
        """What it has written to stderr till now."""
        return self._log.read_text() if self._log.exists() else ""


class Station:
    """Starts commands by forking a process that has imported everything: as real as new ones, seconds sooner."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._count = logs, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-c", STATION], env=environment, **pipes)
        assert self._process.stdout is not None
        lines = iter(self._process.stdout)
        self._answers = (line for line in lines if not line.startswith("[INFO]"))  # transformers' remark on W&B

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(next(self._answers))

    def start(self, *arguments: str, cwd: Path, module: str = "finetune", before: str = "") -> Forked:
        """Begin a command; `before` is Python that its process runs first."""
        self._count += 1
        log = self._logs / f"{self._count}.log"
        cwd.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        order = {"arguments": arguments, "cwd": str(cwd), "module": module, "before": before}
        return Forked(self, self.ask({**order, "env": environment, "log": str(log)}), log)

    def run(self, *arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """A command till its end."""
        return self.start(*arguments, cwd=cwd, **more).wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def wait_until(true: Callable[[], bool], process: Forked | subprocess.Popen[str], seconds: float = 300) -> None:
    """The process must live till then."""
    end = time.monotonic() + seconds
    while not true():
        lives = process.poll() is None
        assert lives or true(), getattr(process, "said", lambda: "ended")()
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def station(tmp_path_factory: pytest.TempPathFactory, _own_cache: None) -> Iterator[Station]:
    """One for all tests of studies."""
    made = Station(tmp_path_factory.mktemp("station"))
    yield made
    made.close()


def study_overrides(tiny_base: Path, name: str) -> list[str]:
    """The command line of a study whose trials take about a second."""
    return [
        "-m",
        "hydra/sweeper=optuna",
        f"hydra.sweeper.study_name={name}",
        *tiny_overrides(tiny_base),
        "quantization=none",
        "dataset.max_length=64",
        "sample_prompts=[]",
        "trainer.max_steps=3",
    ]


def losses(folder: Path) -> list[float]:
    """Of each step of a run that logs every step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/grad_norm" in row]


def final(folder: Path) -> dict[str, Any]:
    """A run's `result.json`."""
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content


def train_in_slots(
    configs: list[RunConfig],
    folder: Path,
    slots: int,
    supplies: Any = None,
    observers: dict[int, Any] | None = None,
    errors: dict[int, Exception] | None = None,
) -> list[Path]:
    """Train runs in so many slots of one process, each in a folder of its own; errors are taken where asked for."""
    from finetune.progress import Observer
    from finetune.records import RunFolder
    from finetune.run import Part, take_turns
    from finetune.supplies import Supplies
    from sweeps.pack import Lane, train_together

    shared = supplies or Supplies()
    places = [folder / str(number) for number in range(len(configs))]

    def work(number: int, companions: set[str]) -> Any:
        observer = (observers or {}).get(number, Observer())
        part = Part(observer, shared, alone=False, slots=slots, companions=companions)
        try:
            yield from take_turns(configs[number], RunFolder(places[number]), part)
        except Exception as error:
            if errors is None:
                raise
            errors[number] = error

    def lanes() -> Iterator[Any]:
        for number, place in enumerate(places):
            place.mkdir(parents=True)
            companions: set[str] = set()
            yield Lane(place.name, work(number, companions), place / "train.log", companions)

    waiting = lanes()
    assert train_together(lambda: next(waiting, None), slots) == len(configs)
    return places


def made_study(folder: Path, trials: Sequence[Any], *objectives: str, direction: str = "minimize") -> Any:
    """A study of trials that are written down, not run."""
    import optuna

    from sweeps.storage import open_storage
    from sweeps.study import Study

    folder.mkdir(parents=True)
    names = list(objectives) or ["eval/loss"]
    study = optuna.create_study(
        study_name=folder.name, storage=open_storage(None, folder), directions=[direction] * len(names)
    )
    study.set_user_attr("uid", "made")
    study.set_user_attr("terms", {"objective": names[0] if len(names) == 1 else names})
    study.add_trials(trials)
    (folder / "study.json").write_text(json.dumps({"name": folder.name, "storage": None}))
    return Study.load(folder)


def _wandb_file(file: Path) -> Iterator[Any]:
    """The records of a W&B file: a 7-byte header, then 32 KiB blocks of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # no chunk's header fits in what is left of the block
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):
            return  # it is being written
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last chunk of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_files(folder: Path) -> list[list[Any]]:
    """The records of each offline W&B run below a run's folder, the oldest first.

    W&B writes the last of them from a process of its own, a moment after the run has finished.
    """
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns)
    end = time.monotonic() + 120
    while True:
        found = [list(_wandb_file(file)) for file in files]
        if all(any(record.HasField("exit") for record in records) for records in found) or time.monotonic() > end:
            return found
        time.sleep(0.05)


def wandb_items(items: Any) -> dict[str, Any]:
    """What a record of a W&B file says, by name."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def wandb_summary(records: list[Any]) -> dict[str, Any]:
    """What the records of a W&B file say of a run in the end."""
    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= wandb_items(record.summary.update)
    return summary


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """The rows of metrics among the records of a W&B file."""
    return [wandb_items(record.history.item) for record in records if record.HasField("history")]
