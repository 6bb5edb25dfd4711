"""Answers of several runs in slots, against the same runs one after the other with transformers'
`generate` and PEFT.

    python benchmarks/generation.py [--base smollm2|llama] [--slots 1,2,4,8] [--prompts N]
                                    [--tokens N] [--turns 3] [--dequantized] [--device cpu]

Each run has an adapter of its own (r 16 on all linear layers) on one base in NF4. All runs answer
the same prompts, greedily, with at most so many tokens. `one after the other` is a PEFT model with
all adapters: for each run its adapter is set, and `generate` answers all of the run's prompts in
one batch. `in slots` is one request of each run to the bank. A turn is one of each, so that a
machine whose speed drifts treats both alike; the ratio is the median of the turns' ratios, and the
first turn is not counted.

This project dequantises a base once where memory allows it, bitsandbytes at each token. With
`--dequantized` the other side has a dequantised base too: what is left is what slots gain.

`smollm2` is the packaged base with questions on Python, `llama` has Llama-2-7B's shapes, random
weights and prompts of 100 random words (small ones with `--tiny`). In float32 the answers of both
sides are equal; in 16 bits, products of other shapes round otherwise, so near ties differ.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.engine.packed.bank import Bank
    from finetune.engine.packed.slot import Slot

CHANGE = 0.02
"""Standard deviation of the adapters' weights: random ones, as after training."""


def main() -> None:
    """Measure each number of slots, and print one line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", choices=["smollm2", "llama"], default="smollm2")
    parser.add_argument("--slots", default="1,2,4,8")
    parser.add_argument(
        "--prompts", type=int, help="of each run; default 16, on a CPU 4"
    )
    parser.add_argument(
        "--tokens", type=int, help="of an answer; default 128, on a CPU 16"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dequantized", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small llama")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        # Before torch is imported.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from finetune.console import quiet_libraries

    quiet_libraries()
    on_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not on_gpu:
        parser.error("--device cuda: there is no GPU")
    prompts = arguments.prompts or (16 if on_gpu else 4)
    tokens = arguments.tokens or (128 if on_gpu else 16)
    slot_counts = [int(count) for count in arguments.slots.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(arguments, prompts, tokens, max(slot_counts), Path(folder))
        device = torch.cuda.get_device_name() if on_gpu else "CPU"
        other = "dequantised" if arguments.dequantized else "NF4"
        print(f"{device}, {arguments.base}, the other side's base: {other}")
        print(f"{prompts} prompts a run, at most {tokens} tokens an answer\n")
        print(
            "| slots | one after the other, s | in slots, s | ratio (median, range) | equal answers |"
        )
        print("|---|---|---|---|---|", flush=True)
        for slots in slot_counts:
            print(measure(sides, slots, arguments.turns), flush=True)


class Sides:
    """The same runs' adapters in the slots of a bank, and in a PEFT model."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        prompts: int,
        tokens: int,
        runs: int,
        folder: Path,
    ) -> None:
        from finetune.app import compose_run
        from finetune.model.quantization import compute_dtype

        overrides = ["tracker=none", "optimizer.learning_rate=1e-3"]
        self.config = compose_run(overrides)
        self.dtype = compute_dtype(self.config.quantization)
        self.tokens = tokens
        self.tokenizer, self.texts = self._questions(arguments.base, prompts)
        self.bank, self.slots = self._open_bank(arguments, runs)
        self.peft_model = self._open_peft_model(arguments, folder)

    def _questions(self, base: str, count: int) -> tuple[Any, list[str]]:
        """Return the tokenizer and the prompts."""
        if base == "llama":
            from random_base import tokenizer

            draw = random.Random(0)
            texts = []
            for _ in range(count):
                words = [f"w{draw.randrange(3, 32000)}" for _ in range(100)]
                texts.append(" ".join(words))
            return tokenizer(), texts
        from finetune.data.python_docs import question_answer_pairs
        from finetune.run.resources import SharedResources

        pairs = list(question_answer_pairs())
        texts = [pair["prompt"] for pair in pairs[:count]]
        return SharedResources().tokenizer(self.config.model), texts

    def _load_base(self, arguments: argparse.Namespace, dequantized: bool) -> Any:
        from finetune.model.quantization import dequantize_base

        if arguments.base == "llama":
            from random_base import make_base

            base = make_base("tiny" if arguments.tiny else "llama2_7b", double=False)
        else:
            from finetune.model.loading import load_base
            from finetune.run.resources import SharedResources

            source = SharedResources().source(self.config.model)
            base = load_base(source, self.config)
        if dequantized:
            dequantize_base(base, self.config)
        return base

    def _open_bank(
        self, arguments: argparse.Namespace, runs: int
    ) -> tuple["Bank", list["Slot"]]:
        """Create the slots, each with a changed adapter."""
        import torch

        from finetune.engine.packed.bank import Bank

        bank = Bank(self._load_base(arguments, dequantized=True), self.config)
        slots = []
        for seed in range(runs):
            slot = bank.slots.create(self.config.lora, seed)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(slot.vector.shape, generator=generator)
            slot.vector.copy_(noise * CHANGE)
            slots.append(slot)
        return bank, slots

    def _open_peft_model(self, arguments: argparse.Namespace, folder: Path) -> Any:
        """Load the slots' adapters into a PEFT model on a base of its own."""
        from peft import PeftModel

        base = self._load_base(arguments, arguments.dequantized)
        model = None
        for run, slot in enumerate(self.slots):
            path = folder / str(run)
            slot.model.save_pretrained(path)
            if model is None:
                model = PeftModel.from_pretrained(base, str(path), adapter_name="0")
            else:
                model.load_adapter(str(path), adapter_name=str(run))
        assert model is not None
        # In the base's dtype, as it is fastest: PEFT would compute with float32 adapters.
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.dtype)
        return model.eval()

    def answer_in_slots(self, runs: int) -> list[list[str]]:
        """Answer the prompts of so many runs together."""
        from finetune.engine.encoded_prompts import decode_answers, encode_prompts
        from finetune.engine.packed.requests import Generate

        requests = []
        for slot in self.slots[:runs]:
            encoded = encode_prompts(
                self.bank.base,
                self.tokenizer,
                self.texts,
                max_new_tokens=self.tokens,
                max_length=None,
                variables={},
                sampling=None,
            )
            requests.append(Generate(slot, encoded))
        answers = []
        for response in self.bank.execute(requests):
            if isinstance(response, Exception):
                raise response
            assert isinstance(response, list)
            answers.append(decode_answers(self.tokenizer, response))
        return answers

    def answer_in_turn(self, runs: int) -> list[list[str]]:
        """Answer the prompts of so many runs one after the other, with transformers alone."""
        import torch

        from finetune.data.encoding import Encoder
        from finetune.data.types import Prompt

        encoder = Encoder(self.tokenizer, {})
        ids = [encoder.encode_prompt(Prompt(text)) for text in self.texts]
        self.tokenizer.padding_side = "left"
        answers = []
        for run in range(runs):
            self.peft_model.set_adapter(str(run))
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            batch = batch.to(self.peft_model.device)
            with torch.inference_mode():
                output = self.peft_model.generate(
                    **batch,
                    max_new_tokens=self.tokens,
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=encoder.ends,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            answers.append([text.strip() for text in texts])
        return answers


def measure(sides: Sides, slots: int, turns: int) -> str:
    """Return the line of the table for a number of slots."""
    one_after_other = []
    in_slots = []
    ratios = []
    for turn in range(turns + 1):
        began = time.perf_counter()
        expected = sides.answer_in_turn(slots)
        between = time.perf_counter()
        answers = sides.answer_in_slots(slots)
        ended = time.perf_counter()
        seconds = (between - began, ended - between)
        line = f"{slots} slots, turn {turn}: {seconds[0]:.2f} s, in slots {seconds[1]:.2f} s"
        print(line, file=sys.stderr, flush=True)
        # The first turn loads kernels and probes the base.
        if turn > 0:
            one_after_other.append(seconds[0])
            in_slots.append(seconds[1])
            ratios.append(seconds[0] / seconds[1])
    equal = 0
    for expected_texts, texts in zip(expected, answers, strict=True):
        pairs = zip(expected_texts, texts, strict=True)
        equal += sum(text == expected_text for expected_text, text in pairs)
    times = (
        f"{statistics.median(one_after_other):.2f} | {statistics.median(in_slots):.2f}"
    )
    span = f"{min(ratios):.2f} to {max(ratios):.2f}"
    ratio = f"{statistics.median(ratios):.2f} ({span})"
    return f"| {slots} | {times} | {ratio} | {equal} of {slots * len(sides.texts)} |"


if __name__ == "__main__":
    main()
