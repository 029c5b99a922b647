"""One SGLang engine on a trained model, told what to answer by `quality.py`: see `bench.workers.engine`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from bench.models import small_tasks
from bench.workers.engine import Worker, main


class QualityWorker(Worker):
    """With the commands that compare answers. Arrays go through files of ``.npy``."""

    def answers(self, count: int, seed: int, group: int, longest: int) -> dict[str, Any]:
        """Greedy answers to `small_tasks.questions`, with EOS where they ended by it.

        None is longer than the right answer, which is enough to tell whether it is right.

        ``group``: 0 sends all at once; otherwise so many at a time, the last ones first, so that they
        meet others in their batches.
        """
        asked = [question.tokens() for question in small_tasks.questions(count, seed, longest)]
        order = list(range(count)) if not group else list(range(count))[::-1]
        found: list[list[int]] = [[] for _ in asked]
        for start in range(0, count, group or count):
            chosen = order[start : start + (group or count)]
            answers = self.engine.generate(
                input_ids=[asked[i][0] for i in chosen],
                sampling_params=[
                    {
                        "temperature": 0,
                        "max_new_tokens": len(asked[i][1]),
                        "stop_token_ids": [small_tasks.EOS],
                    }
                    for i in chosen
                ],
            )
            for i, answer in zip(chosen, answers, strict=True):
                found[i] = ended(answer["output_ids"], answer["meta_info"]["finish_reason"])
        return {"rows": found}

    def text(self, pieces: list[list[int]], out: str) -> dict[str, Any]:
        """Nats of each token of pieces after their first, ``[pieces, length - 1]``."""
        answers = self.generate(pieces, 1, return_logprob=True, logprob_start_len=0)
        rows = [
            [-value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]]
            for answer in answers
        ]
        np.save(out, np.array(rows, np.float32))
        return {}

    def distributions(
        self, pieces: list[list[int]], tail: int, new: int, group: int, out: str
    ) -> dict[str, Any]:
        """Log-probabilities of the whole vocabulary, ``[pieces, positions, vocabulary]``.

        Positions: those of the prompt's ``tail`` last tokens, then of the ``new`` generated ones. With
        ``tail`` 0 prompts are prefilled as when nobody asks for logprobs, which `yoco` needs.
        ``group``: so many pieces at a time, 0: all at once.
        """
        everything = list(range(small_tasks.VOCABULARY))
        answers = []
        for start in range(0, len(pieces), group or len(pieces)):
            batch = pieces[start : start + (group or len(pieces))]
            answers += self.generate(
                batch,
                new,
                return_logprob=True,
                token_ids_logprob=[everything] * len(batch),
                logprob_start_len=[len(one) - tail - 1 if tail else -1 for one in batch],
            )
        rows = []
        for answer in answers:
            meta = answer["meta_info"]
            # SGLang has no distribution before the first token that it is asked for.
            before = [step for step in meta.get("input_token_ids_logprobs") or [] if step]
            steps = [*before, *meta["output_token_ids_logprobs"]]
            if len(steps) != tail + new:
                raise ValueError(f"SGLang answered for {len(steps)} positions, not {tail + new}")
            rows.append([[value for value, *_ in step] for step in steps])
        np.save(out, np.array(rows, np.float32))
        return {"ids": [answer["output_ids"] for answer in answers]}


def ended(tokens: list[int], reason: dict[str, Any] | None) -> list[int]:
    """An answer with one EOS where it stopped by it; releases differ in whether they keep the token."""
    if small_tasks.EOS in tokens:
        tokens = tokens[: tokens.index(small_tasks.EOS)]
        return [*tokens, small_tasks.EOS]
    return [*tokens, small_tasks.EOS] if (reason or {}).get("type") == "stop" else tokens


if __name__ == "__main__":  # SGLang's spawned processes import this file again
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(QualityWorker)
