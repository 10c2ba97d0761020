"""Bugs planted one at a time into a copy of megachat: which test notices?

    python tools/bench/mutations.py                          # all of them, some minutes
    python tools/bench/mutations.py --only sign "wrong temperature"
    python tools/bench/mutations.py --list

Each is a mistake that an alignment library has made, or nearly; most of them still learn. README.md beside
this file says more.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("megachat", "conf", "tests", "tools", "pyproject.toml")
ALIGN = "megachat/align/"


@dataclass(frozen=True)
class Mutation:
    """A bug."""

    name: str
    path: str
    """Of the file it is planted in."""
    right: str
    """What stands there, once."""
    wrong: str
    """What it becomes."""
    tests: str
    """Where it should be noticed: files under `tests/`. If it is not, all of `tests/align` run."""
    learns: bool = False
    """Whether a model that is trained with it learns all the same, so that its reward shows nothing."""


MUTATIONS = (
    Mutation(
        "sign", ALIGN + "policy.py",
        "    return -gain\n", "    return gain\n",
        "align/test_policy.py",
    ),
    Mutation(
        "max instead of min in the clip", ALIGN + "policy.py",
        "gain = torch.minimum(", "gain = torch.maximum(",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "one clip for both sides", ALIGN + "policy.py",
        "ratio.clamp(1 - clip.low, 1 + clip.high) * adv", "ratio.clamp(1 - clip.low, 1 + clip.low) * adv",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "the ratio is always 1", ALIGN + "policy.py",
        "    moved = torch.where(mask, new - old, 0.0)\n", "    moved = torch.where(mask, new - new, 0.0)\n",
        "align/test_policy.py",
    ),
    Mutation(
        "a mask that multiplies", ALIGN + "policy.py",
        "    drift = torch.where(mask, new - reference, 0.0)\n", "    drift = mask * (new - reference)\n",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "k3 where k1 belongs", ALIGN + "policy.py",
        "coefficient * (logps - reference), 0.0)",
        "coefficient * (torch.expm1(reference - logps) + logps - reference), 0.0)",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "KL is maximised", ALIGN + "policy.py",
        "paid - coefficient * (logps - reference), 0.0)", "paid + coefficient * (logps - reference), 0.0)",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "the exact estimator forgets what comes after", ALIGN + "policy.py",
        ".cumsum(-1).clamp(-20.0, 20.0).exp()", ".clamp(-20.0, 20.0).exp()",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "the reward is paid on a pad", ALIGN + "policy.py",
        "last = torch.where(mask, positions, -1)", "last = 1 + torch.where(mask, positions, -1)",
        "align/test_policy.py align/test_ppo.py",
    ),
    Mutation(
        "no baseline", ALIGN + "policy.py",
        "scores - scores.mean(-1, keepdim=True), 0.0)", "scores, 0.0)",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "the batch's baseline instead of the group's", ALIGN + "policy.py",
        "scores - scores.mean(-1, keepdim=True), 0.0)", "scores - scores.mean(), 0.0)",
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "a mean of answers where one of tokens belongs", ALIGN + "policy.py",
        'if mean == "token":\n        return mask.float()',
        'if mean == "constant":\n        return mask.float()',
        "align/test_policy.py", learns=True,
    ),
    Mutation(
        "labels are not shifted", ALIGN + "rows.py",
        "zip(tokens[1:], mask[1:], strict=True)", "zip(tokens[:-1], mask[:-1], strict=True)",
        "align/test_rows.py",
    ),
    Mutation(
        "the first token of an answer is masked", ALIGN + "rows.py",
        "zip(tokens[1:], mask[1:], strict=True)", "zip(tokens[1:], mask[:-1], strict=True)",
        "align/test_rows.py", learns=True,
    ),
    Mutation(
        "the loss is on pads", ALIGN + "rows.py",
        "Rows(torch.full(shape, pad), torch.full(shape, IGNORE)",
        "Rows(torch.full(shape, pad), torch.full(shape, pad)",
        "align/test_rows.py", learns=True,
    ),
    Mutation(
        "packed conversations see each other", ALIGN + "rows.py",
        "out.documents[row, start:stop] = document", "out.documents[row, start:stop] = 0",
        "align/test_rows.py align/test_sft.py", learns=True,
    ),
    Mutation(
        "wrong temperature", ALIGN + "logprobs.py",
        "-F.cross_entropy(_wide(logits) / temperature,", "-F.cross_entropy(_wide(logits),",
        "align/test_logprobs.py",
    ),
    Mutation(
        "log-probabilities in bf16", ALIGN + "logprobs.py",
        "return logits.to(wide(logits))", "return logits",
        "align/test_logprobs.py", learns=True,
    ),
    Mutation(
        "answers are averaged", ALIGN + "logprobs.py",
        "return torch.where(mask, logps, 0.0).sum(-1)",
        "return torch.where(mask, logps, 0.0).sum(-1) / mask.sum(-1)",
        "align/test_logprobs.py align/test_dpo.py", learns=True,
    ),
    Mutation(
        "GAE starts again behind a gap", ALIGN + "advantages.py",
        "surprise + gamma * lam * running, running)", "surprise + gamma * lam * running, 0.0)",
        "align/test_advantages.py", learns=True,
    ),
    Mutation(
        "values are read in a gap", ALIGN + "advantages.py",
        "next_value = torch.where(here, value, next_value)", "next_value = value",
        "align/test_advantages.py", learns=True,
    ),
    Mutation(
        "pads are whitened", ALIGN + "advantages.py",
        "total(mask.sum().to(x.dtype))", "total(torch.ones_like(mask).sum().to(x.dtype))",
        "align/test_advantages.py", learns=True,
    ),
    Mutation(
        "the reward is read at a pad", ALIGN + "rm.py",
        "last = torch.where(real, positions, 0)", "last = torch.where(real, positions, positions)",
        "align/test_rm.py", learns=True,
    ),
    Mutation(
        "the reward is read in the prompt", ALIGN + "rm.py",
        "last = torch.where(real, positions, 0)", "last = torch.where(real, positions // 2, 0)",
        "align/test_rm.py",
    ),
    Mutation(
        "IPO sums", ALIGN + "preference.py",
        "ipo_loss(_mean(policy), _mean(reference)", "ipo_loss(_summed(policy), _summed(reference)",
        "align/test_preference.py", learns=True,
    ),
    Mutation(
        "chosen and rejected are exchanged", ALIGN + "preference.py",
        "return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)",
        "return (policy.rejected - policy.chosen) - (reference.rejected - reference.chosen)",
        "align/test_preference.py align/test_dpo.py",
    ),
    Mutation(
        "DPO without its reference", ALIGN + "preference.py",
        "return (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)",
        "return policy.chosen - policy.rejected",
        "align/test_preference.py align/test_dpo.py", learns=True,
    ),
    Mutation(
        "KTO's baseline may be negative", ALIGN + "kto.py",
        "return torch.tensor(max(0.0, run.mesh.sum(total) / self.batch), device=run.mesh.device)",
        "return torch.tensor(run.mesh.sum(total) / self.batch, device=run.mesh.device)",
        "align/test_kto.py", learns=True,
    ),
    Mutation(
        "SFT does not train on the stop token", "megachat/tokenizer/chat_format.py",
        "mask += [0, *[says] * len(content)]", "mask += [0, *[says] * (len(content) - 1), 0]",
        "tokenizer/test_chat_format.py",
    ),
    Mutation(
        "SFT masks the first token", "megachat/tokenizer/chat_format.py",
        "mask += [0, *[says] * len(content)]", "mask += [0, 0, *[says] * (len(content) - 1)]",
        "tokenizer/test_chat_format.py", learns=True,
    ),
    Mutation(
        "SFT trains on what a tool says", "megachat/tokenizer/chat_format.py",
        'message.role == "assistant"', 'message.role in ("assistant", "tool")',
        "tokenizer/test_chat_format.py", learns=True,
    ),
    Mutation(
        "the stop token is no action", ALIGN + "answers.py",
        "mask = [1] * len(self.tokens)\n", "mask = [1] * (len(self.tokens) - 1) + [0]\n",
        "align/test_rollout.py align/test_ppo.py",
    ),
    Mutation(
        "what a tool says is trained on", ALIGN + "answers.py",
        "mask[part.start : part.stop] = [0] * len(part)", "mask[part.start : part.stop] = [1] * len(part)",
        "align/test_environments.py",
    ),
    Mutation(
        "the role after a tool is trained on", ALIGN + "answers.py",
        "mask[part.start : part.stop] = [0] * len(part)",
        "mask[part.start : part.stop - 1] = [0] * (len(part) - 1)",
        "align/test_environments.py", learns=True,
    ),
    Mutation(
        "a call is the answer that is judged", ALIGN + "answers.py",
        "return self.tokens[self.told[-1].stop :] if self.told else self.tokens", "return self.tokens",
        "align/test_environments.py",
    ),
    Mutation(
        "every turn draws as the first", ALIGN + "answers.py",
        'seed_of(seeds[row], "turn", turn) if turn else seeds[row]', "seeds[row]",
        "align/test_environments.py", learns=True,
    ),
    Mutation(
        "groups are interleaved", ALIGN + "grpo.py",
        "[question for question in questions for _ in range(self.group)]", "[*questions] * self.group",
        "align/test_grpo.py",
    ),
    Mutation(
        "groups without spread stay in the denominator", ALIGN + "grpo.py",
        "some = [row for row in chosen if keep[row]] or chosen[:1]", "some = [*chosen]",
        "align/test_grpo.py", learns=True,
    ),
    Mutation(
        "spread is looked for in what only shapes", ALIGN + "grpo.py",
        "mixed((right @ by_reward)", "mixed((weights @ by_reward)",
        "align/test_grpo.py", learns=True,
    ),
    Mutation(
        "a number in a sentence is the truth", ALIGN + "rewards.py",
        "result(answer.prompt.answer, self.after, number=False)",
        "result(answer.prompt.answer, self.after, number=True)",
        "align/test_rewards.py", learns=True,
    ),
    Mutation(
        "pass@k as if answers were drawn twice", ALIGN + "rewards.py",
        "1 - math.comb(samples - right, k) / math.comb(samples, k)", "1 - (1 - right / samples) ** k",
        "align/test_rewards.py", learns=True,
    ),
    Mutation(
        "micro-batches are divided by their own tokens", "megachat/train/loop.py",
        "counts * loss / weight,", "counts * loss / max(batch.weight, 1.0),",
        "train/test_loop.py align/test_sft.py", learns=True,
    ),
    Mutation(
        "a text gets its neighbour's cache", "megachat/model/generate.py",
        "            self._cache.move(len(self._texts), slot)\n", "            pass\n",
        "model/test_generate.py",
    ),
    Mutation(
        "the sampler knows no temperature", "megachat/model/generate.py",
        "truncate(logits.float() / self.temperature,", "truncate(logits.float(),",
        "model/test_generate.py align/test_written.py",
    ),
    Mutation(
        "another reference after a restart", ALIGN + "start.py",
        "if began.setdefault(stage, mark) != mark:", "if began.setdefault(stage, mark) is None:",
        "align/test_start.py align/test_dpo.py align/test_ppo.py", learns=True,
    ),
)  # fmt: skip


def main() -> None:
    """Plants, tests, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--list", action="store_true", help="their names")
    given = parser.parse_args()
    if given.list:
        print(*(mutation.name for mutation in MUTATIONS), sep="\n")
        return
    names = [mutation.name for mutation in MUTATIONS]
    if unknown := set(given.only or []) - set(names):
        parser.error(f"no such bug: {', '.join(sorted(unknown))}; --list names them")
    chosen = [mutation for mutation in MUTATIONS if not given.only or mutation.name in given.only]
    with tempfile.TemporaryDirectory() as temporary:
        copy = copied(Path(temporary))
        sound(copy, chosen)
        missed = report(copy, chosen)
    sys.exit(1 if missed else 0)


def copied(folder: Path) -> Path:
    """The code and its tests, to be spoilt."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def sound(copy: Path, chosen: Sequence[Mutation]) -> None:
    """Ends the program unless the tests pass as long as nothing is planted."""
    files = sorted({file for mutation in chosen for file in mutation.tests.split()})
    if failed := first_failure(copy, [f"tests/{file}" for file in files]):
        sys.exit(f"{failed} fails though nothing is planted; see to that first")


def report(copy: Path, chosen: Sequence[Mutation]) -> int:
    """Prints a line for each; how many were not noticed."""
    width = max(len(mutation.name) for mutation in chosen)
    print(f"{'bug':{width}} | learns | seconds | noticed by")
    print(f"{'-' * width}-+--------+---------+-----------")
    missed = 0
    for mutation in chosen:
        began = time.monotonic()
        plant(copy, mutation)
        try:
            by = first_failure(copy, [f"tests/{file}" for file in mutation.tests.split()])
            by = by or first_failure(copy, ["tests/align"])
        finally:
            shutil.copy2(ROOT / mutation.path, copy / mutation.path)
        missed += not by
        learns = "yes" if mutation.learns else "no"
        seconds = time.monotonic() - began
        print(f"{mutation.name:{width}} | {learns:6} | {seconds:7.0f} | {by or 'NOBODY'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return missed


def plant(folder: Path, mutation: Mutation) -> None:
    """Puts the bug into the file."""
    path = folder / mutation.path
    text = path.read_text()
    if text.count(mutation.right) != 1:
        held = text.count(mutation.right)
        sys.exit(f"{mutation.name}: {mutation.path} holds {mutation.right!r} {held} times, not once")
    path.write_text(text.replace(mutation.right, mutation.wrong))


def first_failure(copy: Path, tests: Sequence[str]) -> str:
    """The test that fails first, "" if none does."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=no",
        "-rfE",
        *tests,
    ]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, cwd=copy, env=own | {"PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


if __name__ == "__main__":
    main()
