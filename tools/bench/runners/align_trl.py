"""`align_trl.py grpo|dpo LESSON.json RESULT.json`: TRL's trainers, on transformers' model.

Texts are the numbers of tokens, so that TRL reads the tokens that megachat reads.
"""

import sys
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from tools.bench.ask import Ask
from tools.bench.lesson import Lesson
from tools.bench.runners.write_transformers import build


class Clock(TrainerCallback):  # type: ignore[misc]
    """When steps end, and what they cost."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Of an optimizer step."""
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """After each step."""
        if "loss" in logs:
            self.losses.append(logs["loss"])


def tokenizer(lesson: Lesson) -> PreTrainedTokenizerFast:
    """`"5 6"` -> tokens 5 and 6."""
    words = models.WordLevel({str(token): token for token in range(lesson.vocab)}, unk_token=str(lesson.pad))
    made = Tokenizer(words)
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=str(lesson.end), pad_token=str(lesson.pad), unk_token=str(lesson.pad)
    )


def text(tokens: list[int]) -> str:
    """What the tokenizer reads as these tokens."""
    return " ".join(map(str, tokens))


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with some spread: whether the second token is even."""
    return [float(len(tokens) > 1 and tokens[1] % 2 == 0) for tokens in completion_ids]


def main() -> None:
    """Trains."""
    stage, lesson = sys.argv[1], Lesson.read(sys.argv[2])
    ask = Ask(
        weights=lesson.weights, model=lesson.model, vocab=lesson.vocab, precision="float32", prompts=[],
        new=0, temperature=1.0, stop=[], rounds=0,
    )  # fmt: skip
    model = build(ask)
    model.generation_config.eos_token_id = lesson.end
    model.generation_config.pad_token_id = lesson.pad
    folder = sys.argv[3] + ".model"  # TRL reads the reference from where the model is from
    model.save_pretrained(folder)
    watch = Clock()
    common = {
        "output_dir": sys.argv[3] + ".trl", "max_steps": lesson.steps + 1, "learning_rate": lesson.lr,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": lesson.micro_batch,
        "gradient_accumulation_steps": lesson.batch // lesson.micro_batch,
        "bf16": lesson.precision == "bfloat16", "fp16": False, "use_cpu": True, "save_strategy": "no",
        "report_to": [], "logging_steps": 1, "beta": lesson.beta, "gradient_checkpointing": False,
        "disable_tqdm": True, "dataloader_pin_memory": False,
        "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    trainer: Any
    if stage == "grpo":
        settings = GRPOConfig(
            **common, num_generations=lesson.group, max_completion_length=lesson.new, temperature=1.0,
            top_k=0, top_p=1.0, loss_type="grpo", use_vllm=False,
        )  # fmt: skip
        rows = Dataset.from_list([{"prompt": text(prompt)} for prompt in lesson.prompts])
        trainer = GRPOTrainer(
            model=folder, reward_funcs=even, args=settings, train_dataset=rows,
            processing_class=tokenizer(lesson), callbacks=[watch],
        )  # fmt: skip
    else:
        three = zip(lesson.prompts, lesson.chosen, lesson.rejected, strict=True)
        rows = Dataset.from_list(
            [
                {"prompt": text(prompt) + " ", "chosen": text(good), "rejected": text(bad)}
                for prompt, good, bad in three
            ]
        )
        trainer = DPOTrainer(
            model=folder, args=DPOConfig(**common, max_length=lesson.model["context"]), train_dataset=rows,
            processing_class=tokenizer(lesson), callbacks=[watch],
        )  # fmt: skip
    torch.manual_seed(0)
    trainer.train()
    lesson.taken(watch.ends, watch.losses, sys.argv[3])


if __name__ == "__main__":
    main()
