"""Each private name and patch in finetune/compat.py does what its callers rely on."""

import contextlib
import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.wandb_runs import connected

from finetune.compat import (
    attention_implementation,
    begin_triton_key,
    bitsandbytes_has_native_library,
    compile_and_launch,
    datasets_offline,
    fast_imports,
    gguf_bar_on_terminal_only,
    hub_network_error,
    hydra_argument_parser,
    keep_4bit_layers_trainable,
    on_wandb_upload_failure,
    pause_collections,
    set_train_sampler,
    wandb_record_class,
)
from finetune.tracking.wandb_file import read_records
from finetune.tracking.wandb_fragments import wait_until_complete


@pytest.mark.parametrize("before", [False, True])
def test_datasets_is_offline_only_within_the_block(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", before)
    with contextlib.suppress(KeyError), datasets_offline():
        assert datasets.config.HF_HUB_OFFLINE
        raise KeyError
    assert datasets.config.HF_HUB_OFFLINE is before


def test_a_gguf_conversion_shows_no_bar_without_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    def shown() -> str:
        assert list(gguf_utils.tqdm([1, 2], desc="Converting")) == [1, 2]
        return capsys.readouterr().err

    with gguf_bar_on_terminal_only():
        assert shown() == ""
    assert "Converting" in shown()


def test_threads_that_are_offline_at_the_same_time_leave_no_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    inside = [threading.Event(), threading.Event()]
    may_leave = [threading.Event(), threading.Event()]

    def read(number: int) -> None:
        with datasets_offline():
            inside[number].set()
            may_leave[number].wait(10)

    first, second = (threading.Thread(target=read, args=(number,)) for number in (0, 1))
    first.start()
    assert inside[0].wait(10)
    second.start()
    inside[1].wait(0.3)  # in vain: the second waits for the first
    may_leave[0].set()
    first.join(10)
    may_leave[1].set()
    second.join(10)
    assert not datasets.config.HF_HUB_OFFLINE


def test_datasets_reads_the_flag_when_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown data set is refused at once, with the library's words for its offline mode."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with datasets_offline(), pytest.raises(ConnectionError, match=r"[Oo]ffline"):
        datasets.load_dataset("owner/name", split="train")


def test_a_wandb_file_holds_records_of_this_class(tmp_path: Path) -> None:
    import wandb

    run = wandb.init(mode="offline", dir=str(tmp_path), reinit="create_new")
    run.log({"eval/loss": 1.0}, step=1, commit=True)
    run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    wait_until_complete(file)
    records = read_records(file)
    assert {type(record) for record in records} == {wandb_record_class()}
    kinds = [record.WhichOneof("record_type") for record in records]
    assert {"header", "run", "history", "summary", "exit"} <= set(kinds)


@pytest.mark.fault
def test_an_upload_that_wandb_gives_up_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import wandb
    from wandb.errors import term

    monkeypatch.setattr(term, "termwarn", term.termwarn)
    told = threading.Event()
    with connected(monkeypatch) as server:
        on_wandb_upload_failure(told.set)
        settings = wandb.Settings(silent=True, finish_timeout=5)
        run = wandb.init(
            mode="online",
            project="p",
            dir=str(tmp_path),
            reinit="create_new",
            settings=settings,
        )
        assert not told.is_set()
        server.behaviour = "refuse"
        run.log({"eval/loss": 1.0}, step=1, commit=True)
        run.finish()
        assert told.is_set()
    assert "Fatal" not in capfd.readouterr().err


def test_layers_of_a_model_look_up_the_attention_implementation_at_each_call() -> None:
    import torch
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    calls: list[int] = []

    def counting(
        module: Any, query: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        calls.append(module.layer_idx)
        return query.transpose(1, 2), None

    AttentionInterface.register("counting", counting)
    shapes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=2, **shapes))
    ids = torch.tensor([[1, 2, 3]])
    before = model.config._attn_implementation
    with attention_implementation(model.config, "counting"):
        model(input_ids=ids)
    assert calls == [0, 1]
    model(input_ids=ids)
    assert calls == [0, 1]
    assert model.config._attn_implementation == before
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        attention_implementation(model.config, "counting"),
    ):
        raise RuntimeError("out of memory")
    assert model.config._attn_implementation == before


def test_a_launch_by_compat_runs_the_kernel() -> None:
    """By Triton's interpreter here; tests marked gpu launch compiled kernels a second time."""
    import torch

    from finetune.engine.packed.gpu import gated_product

    gate, up = torch.randn(2, 1, 16)
    output = torch.empty(1, 16)
    arguments = (gate, up, output, 16, 16, 16)
    kernel = gated_product._gated_product_kernel
    compile_and_launch(kernel, (1, 1, 1), arguments, (0, 32), 4, 3)
    assert torch.allclose(
        output, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6
    )


def test_hydra_argument_parser_reads_overrides_and_flags() -> None:
    arguments = hydra_argument_parser().parse_intermixed_args(
        ["a=1", "--cfg", "job", "b=2", "-m"]
    )

    assert arguments.overrides == ["a=1", "b=2"]
    assert (arguments.cfg, arguments.help, arguments.info) == ("job", False, None)
    assert arguments.multirun
    assert arguments.config_dir is None


def test_4bit_layers_train_on_a_cpu_after_an_evaluation() -> None:
    """On every CPU the layer is made to believe in AVX512_BF16."""
    import torch
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(
        64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32
    ).to("cpu")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    layer.support_avx512bf16_for_cpu = True
    model = torch.nn.Sequential(layer)
    keep_4bit_layers_trainable(model)

    weight = layer.weight.data.clone()
    model.eval()(torch.ones(1, 64))
    rows = torch.ones(1, 64, requires_grad=True)
    model.train()(rows).sum().backward()

    assert torch.equal(layer.weight.data, weight)
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


@pytest.mark.parametrize("usable", [False, True])
def test_a_missing_native_library_is_noticed(
    usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import cextension

    real = cextension.lib
    mock = cextension.ErrorHandlerMockBNBNativeLibrary("no library")
    monkeypatch.setattr(cextension, "lib", real if usable else mock)

    assert bitsandbytes_has_native_library() == usable


def test_a_trainer_draws_rows_in_the_samplers_order(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    rows = datasets.Dataset.from_dict({"x": list(range(8))})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=3,
        report_to="none",
    )

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    trainer = Trainer(model=Model(), args=arguments, train_dataset=rows)
    order = [5, 1, 7, 0, 2, 6, 3, 4]
    set_train_sampler(trainer, order)  # type: ignore[arg-type]

    batches = [batch["x"].tolist() for batch in trainer.get_train_dataloader()]

    assert batches == [[5, 1, 7], [0, 2, 6], [3, 4]]


def test_hub_network_errors_are_of_one_class() -> None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    assert issubclass(HfHubHTTPError, hub_network_error())
    with pytest.raises(hub_network_error()):
        get_session().get("http://127.0.0.1:9")  # nothing listens there


def test_the_model_libraries_are_imported_without_torchs_compiler() -> None:
    code = """
import gc, sys
from finetune.compat import import_model_libraries

import_model_libraries()
assert {"torch", "transformers.modeling_utils", "peft", "bitsandbytes"} <= set(sys.modules)
assert not {"torch._inductor.compile_fx", "scipy", "sklearn"} & set(sys.modules)
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 100_000
import_model_libraries()
assert gc.get_freeze_count() == frozen

import torch
import transformers.utils

assert transformers.utils.is_scipy_available()
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

assert torch.compile.__module__ == "torch"
row = torch.linspace(-1, 1, 512)
packed, state = quantize_blockwise(row)
assert (dequantize_blockwise(packed, state) - row).abs().max() < 0.05
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_study_begins_without_scipy() -> None:
    code = """
import sys
from finetune.compat import import_transformers

import_transformers()
import sweeps.study.opening

assert "transformers.modeling_utils" in sys.modules
assert not {"scipy", "sklearn", "bitsandbytes"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_have_the_distributions_that_python_says() -> None:
    expected = importlib.metadata.packages_distributions()
    with fast_imports():
        listed = importlib.metadata.packages_distributions()
    assert importlib.metadata.packages_distributions() == expected
    for package, distributions in expected.items():
        assert sorted(listed[package]) == sorted(distributions), package


def test_triton_computes_its_key_once() -> None:
    cache = pytest.importorskip("triton.runtime.cache")
    begin_triton_key().join()
    assert cache.triton_key.cache_info().currsize == 1
    assert begin_triton_key() is begin_triton_key()


@pytest.mark.parametrize("collects", [True, False])
def test_a_pause_of_collections_ends_as_it_began(collects: bool) -> None:
    import gc

    (gc.enable if collects else gc.disable)()
    try:
        with contextlib.suppress(KeyError), pause_collections():
            with pause_collections():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is collects
    finally:
        gc.enable()
