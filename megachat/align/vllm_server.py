"""vLLM for `megachat/align/vllm.py`: a process of its own, in the Python environment that has vLLM.

It imports nothing of megachat. A request is a line of JSON on the standard input, its answer a line on the
standard output; what vLLM prints goes to the standard error. It ends with its input, whatever it is doing,
and takes the weights in memory with it: the trainer may have been killed.
"""

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from queue import SimpleQueue
from typing import Any


class Writer:
    """A model in vLLM."""

    def __init__(self) -> None:
        self.model: Any = None
        self.folder = ""
        """Where the weights are."""

    def load(self, folder: str, **settings: Any) -> dict[str, Any]:
        """Takes the weights in a folder; what was computed with the ones before is forgotten."""
        self.folder = folder
        from vllm import LLM

        if self.model is None:
            self.model = LLM(
                model=folder,
                skip_tokenizer_init=True,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",  # at the temperature that is sampled at
                enable_prefix_caching=True,
                **settings,
            )
            return {}
        self.model.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        if not self.model.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        return {}

    def write(
        self, prompts: list[list[int]], seeds: list[int], temperature: float, most: int, end: int
    ) -> dict[str, Any]:
        """An answer to each prompt from the whole distribution, and the log-probability of each token."""
        from vllm import SamplingParams

        chosen = [
            SamplingParams(
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                max_tokens=most,
                stop_token_ids=[end],
                seed=seed,
                logprobs=0,
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = [one.outputs[0] for one in self.model.generate(asked, chosen, use_tqdm=False)]
        return {
            "tokens": [[*answer.token_ids] for answer in answers],
            "logps": [
                [place[token].logprob for token, place in zip(answer.token_ids, answer.logprobs, strict=True)]
                for answer in answers
            ],
        }


def main() -> None:
    """Answers requests, one after the other."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # for the trainer, which ends this one
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    writer, lines = Writer(), SimpleQueue[str]()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        if writer.folder:
            shutil.rmtree(os.path.dirname(writer.folder), ignore_errors=True)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        line = lines.get()
        asked = json.loads(line)
        number, verb = asked.pop("number"), asked.pop("do")
        try:
            reply = writer.load(**asked) if verb == "load" else writer.write(**asked)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps({"number": number, **reply}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
