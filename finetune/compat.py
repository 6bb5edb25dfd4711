"""Every private name, patch and trick on another library: one function each.

Each function's docstring gives the reason, the version of the library in which it was read, and the
upstream thread, if there is one.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from lm_eval.api.task import Task
    from peft import LoraConfig
    from torch.utils.data import Sampler
    from transformers import PreTrainedModel, Trainer
    from wandb.proto.wandb_internal_pb2 import Record


def import_transformers_without_torch() -> None:
    """Import transformers without the seconds that it takes to import torch, for tokenizers alone.

    For a process that loads no model afterwards: transformers finds out once whether there is
    torch. Nothing is done if either is imported already.

    Reason: transformers imports torch with its first module, and has no setting against it
    (transformers 5.23, `transformers/utils/generic.py`). Upstream: none.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    # It would say that models are not available.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    without_torch: dict[str, Any] = sys.modules
    without_torch["torch"] = None
    try:
        importlib.import_module("transformers")
    finally:
        del sys.modules["torch"]


def accept_negative_numbers(parser: argparse.ArgumentParser) -> None:
    """Let all negative numbers be values of flags: `--min-gain -1e-3` and `-inf` too.

    Reason: argparse takes those with an exponent for flags (CPython 3.11, `argparse.py`).
    Upstream: none.
    """
    numbers = r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-inf|-nan"
    parser._negative_number_matcher = re.compile(rf"(?i)^({numbers})$")


@contextlib.contextmanager
def fast_imports() -> Iterator[None]:
    """Import torch and transformers within the block in less time.

    The garbage collector is paused: it would visit the many new objects again and again. What
    transformers asks for when it is imported, which distributions the packages come from, is
    answered without a look at each of their files.

    Reason: each takes half a second or more (CPython 3.11 and 3.12; transformers 5.17 and 5.23,
    `utils/import_utils.py`). Upstream: none.
    """
    packages_distributions = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = _packages_distributions
    try:
        with pause_collections():
            yield
    finally:
        importlib.metadata.packages_distributions = packages_distributions


@contextlib.contextmanager
def pause_collections() -> Iterator[None]:
    """Pause Python's garbage collector within the block; not in two threads at a time.

    Reason: it may start at any allocation, visits all objects, and frees those that nothing refers
    to. With many new objects that takes most of the time; and where a CUDA graph is recorded,
    freeing an older one makes the recording fail (CUDA 13, `cudaGraphExecDestroy`). Upstream: none.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _packages_distributions() -> dict[str, list[str]]:
    """Return the distributions of each package, as the function of `importlib.metadata` does."""
    distributions: dict[str, list[str]] = {}
    for distribution in importlib.metadata.distributions():
        names = (distribution.read_text("top_level.txt") or "").split()
        if not names:
            lines = (distribution.read_text("RECORD") or "").splitlines()
            # Folders of packages, and files of modules.
            first_parts = {line.split(",")[0].split("/")[0] for line in lines}
            names = [inspect.getmodulename(part) or part for part in first_parts]
        for name in names:
            distributions.setdefault(name, []).append(distribution.metadata["Name"])
    return distributions


def import_transformers() -> None:
    """Import torch and what of transformers loads models, in less time. Neither looks for GPUs."""
    with fast_imports(), _without_scipy():
        importlib.import_module("transformers.models.auto.modeling_auto")
        # Its classes of models, which some versions import late.
        importlib.import_module("transformers.modeling_utils")
        importlib.import_module("transformers.generation.utils")


@contextlib.contextmanager
def _without_scipy() -> Iterator[None]:
    """Let transformers import neither SciPy nor scikit-learn within the block.

    What is imported in it never uses them: losses of object detection, and the threshold that
    assisted generation adapts, neither of which is done here.

    Reason: each takes half a second (transformers 5.17 and 5.23,
    `loss/loss_for_object_detection.py`, `generation/candidate_generator.py`). Upstream: none.
    """
    import transformers.utils as utils

    names = ("is_scipy_available", "is_sklearn_available")
    before = {name: getattr(utils, name) for name in names}
    for name in names:
        setattr(utils, name, lambda: False)
    try:
        yield
    finally:
        for name, is_available in before.items():
            setattr(utils, name, is_available)


def import_model_libraries() -> None:
    """Import torch, transformers, peft and bitsandbytes, in half of the time that it takes.

    What bitsandbytes compiles when it is imported, for which torch imports its compiler, is
    compiled when it is first called. bitsandbytes looks for GPUs: choose one before. The garbage
    collector visits the imported objects no more.

    Reason: bitsandbytes has no setting for it (0.50, `bitsandbytes/backends/default/ops.py`).
    Upstream: none.
    """
    # The last import of an earlier call: what runs have left since then must not be frozen too.
    if "peft" in sys.modules:
        return
    # What the program has left would never be collected once it is frozen.
    gc.collect()
    with fast_imports():
        import_transformers()
        torch: Any = importlib.import_module("torch")
        if torch.cuda.is_available():
            begin_triton_key()
        compile_now = torch.compile

        def compile_later(function: Any = None, **options: Any) -> Any:
            if function is None:
                return functools.partial(compile_later, **options)
            compiled = functools.cache(lambda: compile_now(function, **options))
            return functools.wraps(function)(
                lambda *args, **named: compiled()(*args, **named)
            )

        torch.compile = compile_later
        try:
            with _without_scipy():
                # It imports bitsandbytes, where that is installed.
                importlib.import_module("peft")
        finally:
            torch.compile = compile_now
        # They live as long as the process: half a second of collections.
        gc.freeze()


@contextlib.contextmanager
def hidden_log_handlers() -> Iterator[None]:
    """Keep the process's log handlers open although the block calls `logging.config.dictConfig`.

    Reason: the function closes all handlers of the process, not only those that it replaces, and
    Hydra calls it for each run. A closed `FileHandler` of mode "w" writes no further line (CPython
    3.11, `logging.config._clearExistingHandlers`). Upstream: none.
    """
    handlers = list(logging._handlerList)  # type: ignore[attr-defined]
    named = dict(logging._handlers)  # type: ignore[attr-defined]
    logging._handlerList.clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logging._handlerList[:0] = handlers  # type: ignore[attr-defined]
        logging._handlers.update(named)  # type: ignore[attr-defined]


@contextlib.contextmanager
def hide_main_module() -> Iterator[None]:
    """Let processes that are spawned within the block not import the main module.

    Reason: `multiprocessing` imports it in each new process, so that what it defines can be
    pickled. That costs time, and a script without `if __name__ == "__main__"` would start
    everything again. CPython 3.11, `multiprocessing.spawn.get_preparation_data`. Upstream:
    https://github.com/python/cpython/issues/87115
    """
    main_module = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main_module


_DATASETS_OFFLINE = threading.Lock()
"""The flag is one for the process, and the runs of a pack read their data in several threads."""


@contextlib.contextmanager
def datasets_offline() -> Iterator[None]:
    """Make `datasets.load_dataset` read only its cache within the block.

    Reason: the environment variable HF_HUB_OFFLINE is read once, when the library is imported, and
    `load_dataset` has no such argument; without it a hub that can't be reached costs minutes of
    retries. datasets 5.2, `datasets.config.HF_HUB_OFFLINE`.
    Upstream: https://github.com/huggingface/datasets/issues/6837
    """
    import datasets

    with _DATASETS_OFFLINE:
        before = datasets.config.HF_HUB_OFFLINE
        datasets.config.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            datasets.config.HF_HUB_OFFLINE = before


def wandb_record_class() -> "type[Record]":
    """Return the class of the records in W&B's `.wandb` files.

    Reason: no public function reads such a file, or writes one. wandb 0.31, `wandb.proto`, whose
    module chooses the classes for the installed protobuf. Upstream: none.
    """
    from wandb.proto import wandb_internal_pb2

    record_class: type[Record] = wandb_internal_pb2.Record
    return record_class


def on_wandb_upload_failure(callback: Callable[[], None]) -> None:
    """Call a function whenever W&B gives up to upload a run's data; the run itself goes on.

    Reason: W&B's process then sends a text, which is printed, and nothing else: `run.finish` ends
    as if all were uploaded. wandb 0.31, `wandb.sdk.lib.run_messages`. Upstream: none.
    """
    from wandb.errors import term

    print_warning = term.termwarn

    def termwarn(text: str, *arguments: Any, **options: Any) -> None:
        if "Fatal error while uploading data" in text:
            callback()
        else:
            print_warning(text, *arguments, **options)

    term.termwarn = termwarn


@contextlib.contextmanager
def attention_implementation(config: Any, name: str) -> Iterator[None]:
    """Let a transformers model use another registered attention function for a while.

    The public `model.set_attn_implementation(name)` checks the name, may look for kernels on the
    hub, and goes through all submodules; this is done twice in each training step. Layers look
    the name up in `config._attn_implementation` at each call (transformers 5.23,
    `models/llama/modeling_llama.py`: `LlamaAttention.forward`).

    Args:
        config: The model's config; its layers share it.
        name: As registered with `transformers.AttentionInterface`.
    """
    previous = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = previous


def attention_implementation_of(config: Any) -> str:
    """Return the name of the attention function that a transformers model uses.

    Reason: `from_pretrained` chooses one where none is given, and no public attribute has the
    choice. transformers 5.23, `PreTrainedConfig._attn_implementation`. Upstream: none.
    """
    return str(config._attn_implementation)


def caches_nothing(layer: Any) -> bool:
    """Return whether a layer of a transformers cache never holds anything.

    Reason: layers that use the keys and values of another one have a layer without any, which has
    no public mark. transformers 5.23, `DummyLayer`; 5.17 has none. Upstream: none.
    """
    from transformers import cache_utils

    return isinstance(layer, getattr(cache_utils, "DummyLayer", ()))


def views_like(
    vector: "torch.Tensor", tensors: "Sequence[torch.Tensor]"
) -> "Sequence[torch.Tensor]":
    """Return consecutive views of a vector, one in the shape of each tensor.

    Reason: views that Python makes one by one take three times as long, which a trial waits for
    (torch 2.13, `torch/_utils.py`). Upstream: none.
    """
    from torch._utils import _unflatten_dense_tensors

    views: Sequence[torch.Tensor] = _unflatten_dense_tensors(vector, tensors)  # type: ignore[no-untyped-call]
    return views


def fused_adamw(
    vector: "torch.Tensor",
    gradient: "torch.Tensor",
    state: "dict[str, torch.Tensor]",
    group: dict[str, Any],
    learning_rate: float,
) -> None:
    """Take the step of `torch.optim.AdamW(..., fused=True)` for one tensor.

    Reason: `AdamW.step` calls this kernel too, after checks and groups that take a small update's
    host ten times as long (torch 2.11 and 2.13, `torch/optim/adam.py`: `_fused_adam`). Upstream:
    none.

    Args:
        vector: The weights; updated in place.
        gradient: Of the same shape.
        state: As AdamW has it: `step`, `exp_avg`, `exp_avg_sq`; updated in place.
        group: AdamW's settings; their learning rate is not read.
        learning_rate: Of this step.
    """
    import torch

    beta1, beta2 = group["betas"]
    state["step"].add_(1)
    torch._fused_adamw_(
        [vector],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def compute_norms(tensors: "list[torch.Tensor]") -> "list[torch.Tensor]":
    """Return the 2-norm of each tensor [], all by one kernel on a GPU.

    Reason: the public functions compute one norm at a time, or that of all tensors together (torch
    2.11 and 2.13, `torch/nn/utils/clip_grad.py`). Upstream: none.
    """
    import torch

    norms: list[torch.Tensor] = list(torch._foreach_norm(tensors))
    return norms


def end_failed_recording(gpu: int, pool: tuple[int, int]) -> None:
    """Let PyTorch's allocator go on as usual after a recording that failed.

    Reason: `capture_end` raises before it tells the allocator, which then never gives cached memory
    back when memory is short. PyTorch 2.13, `CUDAGraph::capture_end`. Upstream: none.

    Args:
        gpu: Its number.
        pool: That of the recording.
    """
    from torch.cuda import memory

    # The recording may have ended for the allocator too.
    with contextlib.suppress(RuntimeError):
        memory._cuda_endAllocateToPool(gpu, pool)  # type: ignore[attr-defined]
        memory._cuda_releasePool(gpu, pool)  # type: ignore[attr-defined]


@functools.cache
def begin_triton_key() -> threading.Thread:
    """Begin to compute what Triton computes of its own files before its first kernel.

    Reason: it takes half a second, in which a run can plan and read files (Triton 3.6 and 3.7,
    `runtime/cache.py`). Upstream: none.

    Returns:
        The thread that computes it; where Triton has no such function, it ends at once.
    """
    cache: Any = None
    # Whatever is wrong with Triton, the first kernel says it.
    with contextlib.suppress(Exception):
        cache = importlib.import_module("triton.runtime.cache")

    def compute() -> None:
        with contextlib.suppress(Exception):
            cache.triton_key()

    thread = threading.Thread(target=compute, name="triton key", daemon=True)
    thread.start()
    return thread


def compile_and_launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> Any:
    """Compile a Triton kernel for the kinds of its arguments and launch it.

    `kernel[grid](...)` returns the compiled kernel, which no documentation says (Triton 3.9,
    `runtime/jit.py`: `JITFunction.run`). `compiled[grid](*arguments, *constants)` launches it
    without Triton's inspection of every argument, which takes longer than a small kernel runs.

    Returns:
        The compiled kernel; None from Triton's interpreter.
    """
    return kernel[grid](
        *arguments,
        *constants,
        num_warps=warps,
        num_stages=stages,
    )


def hydra_argument_parser() -> argparse.ArgumentParser:
    """Return the parser of Hydra's command line.

    Reason: `resume=FOLDER` and wrong flags are handled before Hydra starts, and a second list of
    its flags would go out of date. hydra-core 1.4.0rc3, `hydra._internal.utils.get_args_parser`.
    Upstream: none; `hydra.main` has no hook between parsing and composing.
    """
    from hydra._internal.utils import get_args_parser

    return get_args_parser()


@contextlib.contextmanager
def gguf_bar_on_terminal_only() -> Iterator[None]:
    """Show the progress bar of a GGUF conversion within the block only if stderr is a terminal.

    Reason: `transformers.utils.logging.disable_progress_bar` does not reach this bar, and in a log
    file it fills hundreds of lines. transformers 5.23, `modeling_gguf_pytorch_utils.tqdm`; its
    argument `disable=None` means what this function does. Upstream: none.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_utils

    bar = gguf_utils.tqdm
    gguf_utils.tqdm = functools.partial(bar, disable=None)
    try:
        yield
    finally:
        gguf_utils.tqdm = bar


def keep_4bit_layers_trainable(model: "torch.nn.Module") -> None:
    """Keep bitsandbytes from repacking 4-bit weights of a model on a CPU with AVX512_BF16.

    Reason: the first evaluation would repack the weights for inference; from then on training uses
    a matrix product without a gradient, and learns nothing, without any error. bitsandbytes 0.50.2,
    `bitsandbytes.nn.Linear4bit.forward` and its attribute `support_avx512bf16_for_cpu`.
    Upstream: none.
    """
    attribute = "support_avx512bf16_for_cpu"
    for module in model.modules():
        if hasattr(module, attribute):
            setattr(module, attribute, False)


def compute_on_one_gpu(arguments: Any) -> None:
    """Keep transformers' Trainer from spreading a run over all visible GPUs.

    Reason: a process with several GPUs may have other runs whose base is spread over them; the
    Trainer would copy the model to each, and has no setting against it (transformers 5.23,
    `training_args.py`, `n_gpu`). Upstream: none.

    Args:
        arguments: The Trainer's.
    """
    # Counted when it is first asked for, and not again.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def remove_device_hooks(model: "torch.nn.Module") -> None:
    """Remove what accelerate adds to a model whose modules are on several GPUs.

    Reason: its hooks copy all inputs of each block, of each pass anew, and transformers 5.23 has no
    setting against them (`modeling_utils.py`, `accelerate_dispatch`). `hf_device_map` says that
    they are there. accelerate 1.15. Upstream: none.
    """
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for name in ("hf_device_map", "to", "cuda"):
        model.__dict__.pop(name, None)


@contextlib.contextmanager
def replaced_4bit_quantizer(quantizer: Callable[..., Any]) -> Iterator[None]:
    """Let transformers quantise by another class than its own in 4 bits within the block.

    Reason: `register_quantizer` takes new names only, and PEFT, TRL and transformers itself ask
    for the name of bitsandbytes. transformers 5.23, `quantizers.auto.AUTO_QUANTIZER_MAPPING`.
    Upstream: https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849
    """
    from transformers.quantizers import auto

    name = "bitsandbytes_4bit"
    before = auto.AUTO_QUANTIZER_MAPPING[name]
    auto.AUTO_QUANTIZER_MAPPING[name] = quantizer
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[name] = before


@contextlib.contextmanager
def record_loading_keys() -> Iterator[dict[str, set[str]]]:
    """Record which names of weights differ while models are loaded within the block.

    Reason: the loading info of `from_pretrained` leaves out the names that the model's class tells
    transformers to ignore, and they are to be logged. Only loads of the same thread are recorded.
    transformers 5.23, `PreTrainedModel._adjust_missing_and_unexpected_keys`, which removes them.
    Upstream: none.

    Yields:
        `missing` and `unexpected` names; filled when the block ends.
    """
    from transformers import PreTrainedModel

    names: dict[str, set[str]] = {"missing": set(), "unexpected": set()}
    thread = threading.get_ident()
    method = PreTrainedModel._adjust_missing_and_unexpected_keys

    def adjust(model: "PreTrainedModel", info: Any) -> None:
        if threading.get_ident() == thread:
            names["missing"] |= info.missing_keys
            names["unexpected"] |= info.unexpected_keys
        method(model, info)

    PreTrainedModel._adjust_missing_and_unexpected_keys = adjust
    try:
        yield names
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = method


def peft_refuses_layer(
    config: "LoraConfig", model: "torch.nn.Module", name: str
) -> bool:
    """Return whether PEFT refuses to adapt a layer because of the base's architecture.

    Reason: PEFT raises an error only once the base is loaded, for `all-linear` too, which a user
    has not chosen. peft 0.21, `tuners.tuners_utils._check_lora_target_modules_mamba`: the output
    projection of Mamba's blocks, whose kernels read its weight directly.
    Upstream: https://github.com/huggingface/peft/pull/2562

    Args:
        config: PEFT's config of the adapter.
        model: The base, with or without weights.
        name: The last part of the layer's name.
    """
    from peft.tuners import tuners_utils

    try:
        tuners_utils._check_lora_target_modules_mamba(config, model, name)
    except ValueError:
        return True
    return False


def peft_names_of_experts(model: "torch.nn.Module") -> set[str]:
    """Return the names of layers that PEFT takes for those of a base's experts and routers.

    Reason: transformers 4 had linear layers by these names. PEFT turns them, and `all-linear`, into
    targets on all experts and on the router, also where a layer outside of the experts has such a
    name. peft 0.21, `utils.transformers_weight_conversion._convert_peft_config_moe`.
    Upstream: none.
    """
    from peft.utils import transformers_weight_conversion as conversion

    model_type = getattr(model.config, "model_type", None)
    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    if conversion.get_checkpoint_conversion_mapping(model_type) is None:
        return set()
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(kind, {}))


def replace_parameter_adapter(wrapper: Any, activate: Callable[..., Any]) -> None:
    """Let PEFT's adapter of a parameter be active by another context manager.

    Reason: its own one adds the adapter to the whole parameter, which 4-bit experts do not allow.
    peft 0.21, `tuners.lora.layer.ParamWrapper._activate_lora`, called in its `forward` with the
    names of the active adapters. Upstream: none.
    """
    wrapper._activate_lora = activate


def gate_of_experts(experts: Any) -> Callable[["torch.Tensor"], "torch.Tensor"]:
    """Return the gated activation of a layer's experts.

    Reason: functions that are registered with transformers' `ExpertsInterface` call it, and it has
    a private name. transformers 5.23, `integrations.moe.use_experts_implementation`.
    Upstream: none.

    Returns:
        From the outputs of the first product [pairs, 2 · inner] to [pairs, inner].
    """
    gate: Callable[[torch.Tensor], torch.Tensor] = experts._apply_gate
    return gate


def norm_of_experts(experts: Any) -> Callable[["torch.Tensor"], "torch.Tensor"] | None:
    """Return the norm of each expert's output; None where there is none.

    Reason: transformers before 5.18 has no such norm, and no attribute that says so. transformers
    5.23, `integrations.moe.use_experts_implementation`. Upstream: none.

    Returns:
        From the outputs of the last product [pairs, hidden] to the same shape.
    """
    if not getattr(experts, "has_post_expert_norm", False):
        return None
    norm: Callable[[torch.Tensor], torch.Tensor] = experts.post_expert_norm
    return norm


def forget_quantized_format(model: "PreTrainedModel") -> None:
    """Make a dequantised model savable whose files were quantised by bitsandbytes.

    Reason: a model remembers how its files' tensors became its weights, and saving does the same
    backwards, which bitsandbytes' steps do not support: `NotImplementedError`, after dequantization
    too. transformers 5.23, `core_model_loading.revert_weight_conversion` and the attribute
    `_weight_conversions`. Upstream: none.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        return
    reversible = []
    for conversion in conversions:
        with contextlib.suppress(NotImplementedError):
            conversion.reverse_transform()
            reversible.append(conversion)
    model._weight_conversions = reversible


def forget_renamed_weights(model: "PreTrainedModel") -> None:
    """Make a text model savable that was loaded out of a published model with other modalities.

    Reason: a model remembers how its weights were renamed when it was loaded, and saving renames
    them back, to names that the text model's class does not have. transformers 5.23,
    `core_model_loading.revert_weight_conversion` and the attribute `_weight_conversions`.
    Upstream: none.
    """
    from transformers.core_model_loading import WeightRenaming

    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        conversion
        for conversion in conversions
        if not isinstance(conversion, WeightRenaming)
    ]


def set_base_model_prefix(model: "PreTrainedModel") -> None:
    """Let a text model's prefix name its decoder, where its class has the published model's prefix.

    Reason: `get_decoder`, and so TRL's fused head, finds the decoder by the prefix, and of
    `Llama4ForCausalLM` gets the whole model. transformers 5.23,
    `Llama4ForCausalLM.base_model_prefix`. Upstream: none.
    """
    from transformers import PreTrainedModel

    if hasattr(model, model.base_model_prefix):
        return
    for name, module in model.named_children():
        if isinstance(module, PreTrainedModel):
            model.base_model_prefix = name


def bitsandbytes_has_native_library() -> bool:
    """Return whether bitsandbytes found its compiled library for this machine.

    Reason: without one, importing it succeeds and the first quantization raises an error that names
    no config key. bitsandbytes 0.50.2, `bitsandbytes.cextension.lib`, then an
    `ErrorHandlerMockBNBNativeLibrary`. Upstream: none.

    Raises:
        ImportError: bitsandbytes can't be imported.
    """
    from bitsandbytes import cextension

    return "Mock" not in type(cextension.lib).__name__


def set_train_sampler(trainer: "Trainer", sampler: "Sampler[int]") -> None:
    """Make a Trainer draw its training rows in the order of a sampler.

    Reason: the Trainer creates its sampler itself, from `train_sampling_strategy` and the global
    seed, and accepts no other; overriding `get_train_dataloader`, the public method, would mean to
    copy what it does about collators, workers and accelerate. transformers 5.23,
    `Trainer._get_train_sampler`, looked up on the trainer by `get_train_dataloader`.
    Upstream: none.
    """
    trainer._get_train_sampler = lambda train_dataset=None: sampler


def hub_network_error() -> type[Exception]:
    """Return the base class of all network errors that huggingface_hub lets through.

    Reason: it is the class of the hub's HTTP library, which is no dependency of this project and
    has changed before (requests, httpx, httpx2). huggingface_hub 2.4, its `errors.HTTPError`,
    which that module imports for its own classes. Upstream: none.
    """
    from huggingface_hub import errors

    error: type[Exception] = vars(errors)["HTTPError"]
    return error


def silence_harness() -> None:
    """Let lm-evaluation-harness show no bar while it prepares its requests.

    `lm_eval.api.task` (0.4.13) shows it on every process of rank 0, and has no argument for it.
    """
    import lm_eval.api.task
    from tqdm import tqdm

    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)


def harness_filters(task: "Task") -> list[str]:
    """Return the names of the filters that a task of lm-evaluation-harness passes answers through.

    `lm_eval.api.task` (0.4.13): a task has them as `_filters` alone; the config names no filter
    where it leaves the default.
    """
    return [ensemble.name for ensemble in task._filters]
