"""One SGLang engine with or without an MTP assistant, told what to answer by `quality_mtp.py`."""

from __future__ import annotations

import os
from typing import Any

from bench.models import small_tasks
from bench.workers.engine import main
from bench.workers.mtp import MtpWorker
from bench.workers.quality import ended


class QualityMtpWorker(MtpWorker):
    """With greedy answers of several lengths."""

    def continued(
        self, ids: list[list[int]], new: list[int], batch: int, to_eos: bool
    ) -> dict[str, Any]:
        """Greedy tokens after prompts, so many prompts at a time, and the verify steps that they took.

        ``new``: tokens of each at most; ``to_eos``: an answer ends with EOS, which is kept.
        """
        rows = []
        for start in range(0, len(ids), batch):
            sampling = [
                {
                    "temperature": 0,
                    "max_new_tokens": count,
                    **({"stop_token_ids": [small_tasks.EOS]} if to_eos else {"ignore_eos": True}),
                }
                for count in new[start : start + batch]
            ]
            answers = self.engine.generate(
                input_ids=ids[start : start + batch], sampling_params=sampling
            )
            for answer in answers:
                meta, tokens = answer["meta_info"], answer["output_ids"]
                if to_eos:
                    tokens = ended(tokens, meta["finish_reason"])
                rows.append({"ids": tokens, "verified": meta.get("spec_verify_ct", 0)})
        return {"rows": rows}


if __name__ == "__main__":  # SGLang's spawned processes import this file again
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(QualityMtpWorker)
