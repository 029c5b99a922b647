"""An MTP assistant for a model of `train_small.py`, trained on that model's own hidden states.

    python bench/train_assistant.py small-models/moe --minutes 2

Transformers' own ``Gemma4AssistantForCausalLM``, which reads the target's keys and values: four layers, the
last of which attends to everything. Of a row of T tokens every position is a draft at once: it has the
embedding of the token that follows, the target's last hidden state, and the target's KV up to the position
itself, as SGLang hands them over; the position is the last one with KV. The second and third token are
drafted from the assistant's own hidden states, at the same position. The loss is the cross-entropy of the
target's distribution, whose likeliest token a greedy draft must meet.

Writes FOLDER-assistant, and how many drafted tokens a greedy target would accept. Needs transformers 5.8.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import typer  # noqa: E402

from bench.models import small_models, small_tasks  # noqa: E402
from bench.models.training import (  # noqa: E402
    TIMED,
    Data,
    Masters,
    Settings,
    console,
    experts_that_run,
    schedule,
    stoppable,
)

DRAFTS = 3
LAYERS = "sssf"


def config(target: dict[str, Any], hidden: int = 256, mlp: int = 512) -> dict[str, Any]:
    """The config.json of an assistant for a target with this one; see `bench.models.assistant`.

    SGLang renames the head's fields of an assistant's config itself: they stand as published.
    """
    fields = small_models.unrenamed(target)
    text = {
        "model_type": "gemma4_text",
        "dtype": "bfloat16",
        **fields,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": len(LAYERS),
        "layer_types": [
            "full_attention" if kind == "f" else "sliding_attention" for kind in LAYERS
        ],
        "num_kv_shared_layers": len(LAYERS),
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        text.pop(name, None)
    return {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "bfloat16",
        "backbone_hidden_size": target["hidden_size"],
        "use_ordered_embeddings": False,
        "tie_word_embeddings": True,
        "text_config": text,
    }


def build(fields: dict[str, Any]) -> Any:
    """Transformers' assistant with attention in plain products and sums."""
    try:
        from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM
    except ImportError as error:
        raise SystemExit(f"train_assistant.py: needs transformers 5.8: {error}") from error
    given = {key: value for key, value in fields.items() if key not in ("architectures", "dtype")}
    return Gemma4AssistantForCausalLM._from_config(
        Gemma4AssistantConfig(**given), attn_implementation="eager"
    )


@torch.no_grad()
def target_states(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Of every position: the hidden state behind the last norm, the logits, and the KV by layers' kind."""
    mask = small_models.masks(ids.shape[1], model.config.sliding_window, model.dtype, ids.device)
    inner = model.model(
        input_ids=ids, attention_mask=mask, use_cache=False, return_shared_kv_states=True
    )
    cap = model.config.final_logit_softcapping
    logits = torch.tanh(model.lm_head(inner.last_hidden_state).float() / cap) * cap
    return inner.last_hidden_state, logits, inner.shared_kv_states


def drafts(
    assistant: Any, target: Any, ids: torch.Tensor, hidden: torch.Tensor, kv: Any
) -> list[torch.Tensor]:
    """Logits ``[rows, T, vocabulary]`` of each drafted token, after the tokens that ``ids`` has there.

    At position t: the first draft follows token t + 1, the second token t + 2, and so on. Rows end
    where tokens do; what is beyond has no meaning.
    """
    text = assistant.model
    length = ids.shape[1]
    mask = small_models.masks(length, text.config.sliding_window, hidden.dtype, ids.device)
    positions = torch.arange(length, device=ids.device)[None]
    found = []
    for step in range(1, DRAFTS + 1):
        tokens = torch.nn.functional.pad(ids[:, step:], (0, step))
        both = torch.cat([target.model.embed_tokens(tokens).to(hidden.dtype), hidden], dim=-1)
        last = text(
            inputs_embeds=assistant.pre_projection(both),
            attention_mask=mask,
            position_ids=positions,
            shared_kv_states=kv,
            use_cache=False,
        ).last_hidden_state
        found.append(assistant.lm_head(last))
        hidden = assistant.post_projection(last)
    return found


def distillation(
    found: list[torch.Tensor], logits: torch.Tensor, counted: torch.Tensor
) -> list[torch.Tensor]:
    """Cross-entropy of the target's distributions by the drafts', for each; nats a counted token.

    ``counted``: ``[rows, T]``, the tokens whose prediction counts.
    """
    wanted = logits.softmax(-1)
    losses = []
    for step, draft in enumerate(found, 1):
        # The draft of step s at position t predicts token t + s + 1, as the target does at t + s.
        ours = draft[:, : -step - 1].float().log_softmax(-1)
        theirs = wanted[:, step:-1]
        weight = counted[:, step + 1 :].float()
        nats = -(theirs * ours).sum(-1)
        losses.append((nats * weight).sum() / weight.sum().clamp(min=1))
    return losses


@torch.no_grad()
def accepted(
    found: list[torch.Tensor], logits: torch.Tensor, counted: torch.Tensor
) -> tuple[float, list[float]]:
    """Tokens a verify step, and how often each draft is the target's likeliest token.

    On given text: the drafts follow its tokens, a target that generates would follow its own.
    """
    said = logits.argmax(-1)
    longest = ids_length = said.shape[1] - DRAFTS - 1
    weight = counted[:, DRAFTS + 1 :]
    right = [
        draft[:, :longest].argmax(-1) == said[:, step : step + ids_length]
        for step, draft in enumerate(found, 1)
    ]
    chain, tokens = torch.ones_like(right[0]), torch.ones_like(right[0], dtype=torch.float32)
    for one in right:
        chain = chain & one
        tokens += chain
    share = [float(one[weight].float().mean()) for one in right]
    return float(tokens[weight].mean()), share


def main(
    folder: Annotated[Path, typer.Argument(help="The target, a folder of train_small.py")],
    minutes: Annotated[float, typer.Option(help="Data and start included")] = 2.0,
    steps: Annotated[int, typer.Option(help="So many steps instead; 0: by the minutes")] = 0,
    seed: Annotated[int, typer.Option()] = 1,
    batch: Annotated[int, typer.Option(min=2)] = 16,
    rate: Annotated[float, typer.Option(help="Highest learning rate")] = 2e-3,
    rows: Annotated[int, typer.Option(help="Of questions, made beforehand")] = 16_384,
    most_text: Annotated[int, typer.Option(help="Bytes of text at most; 0: all")] = 0,
) -> None:
    """Train an assistant and write its folder beside the target's."""
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    notes = json.loads((folder / "training.json").read_text())
    written = json.loads((folder / "config.json").read_text())
    settings = Settings(
        minutes, steps, seed, batch, notes["length"], rate, rows=rows, most_text=most_text
    )
    corpus = small_tasks.corpus(most=most_text)
    data = Data(settings, corpus, device)
    target = small_models.load(folder, dtype, device, experts_that_run(device))
    target.requires_grad_(False)
    fields = config(written)
    assistant = build(fields)
    small_models.initialise(assistant, seed)
    assistant = assistant.to(device=device, dtype=dtype)
    masters = Masters(assistant, rate)
    count = steps or 10_000_000
    begun = told = time.monotonic()
    step = 0
    with stoppable() as stopped:
        while step < count and not stopped():
            if not steps and step in (TIMED.start, TIMED.stop):
                if device == "cuda":
                    torch.cuda.synchronize()
                if step == TIMED.start:
                    begun = time.monotonic()
                else:
                    each = (time.monotonic() - begun) / len(TIMED)
                    count = step + int((60 * minutes - time.monotonic() + started) / each)
                    console.print(f"{1e3 * each:.1f} ms a step, so {count:,} steps")
            ids, counted, _ = data.batch()
            hidden, logits, kv = target_states(target, ids)
            found = drafts(assistant, target, ids, hidden, kv)
            losses = distillation(found, logits, counted)
            torch.stack(losses).mean().backward()
            masters.step(schedule(step, count, rate))
            step += 1
            if time.monotonic() - told > 10 or step == count:
                told = time.monotonic()
                tokens, share = accepted(found, logits, counted)
                told_ = ", ".join(
                    f"{loss.item():.3f} ({p:.2f})" for loss, p in zip(losses, share, strict=True)
                )
                console.print(
                    f"step {step:,}: nats (right) {told_}; {tokens:.2f} tokens a verify step"
                )
    assistant.eval()
    small_models.as_saved(assistant)
    pieces = small_tasks.windows((folder / "held_out.txt").read_bytes(), 16, settings.length - 1)
    ids = torch.tensor(pieces, device=device)
    with torch.no_grad():
        hidden, logits, kv = target_states(target, ids)
        found = drafts(assistant, target, ids, hidden, kv)
    tokens, share = accepted(found, logits, torch.ones_like(ids, dtype=torch.bool))
    out = folder.with_name(f"{folder.name}-assistant")
    small_models.write(
        out,
        assistant,
        {
            "config.json": fields,
            "training.json": {
                "target": notes["model"],
                "steps": step,
                "seed": seed,
                "seconds": round(time.monotonic() - started, 1),
                "right on held-out text": share,
                "tokens a verify step on held-out text": tokens,
            },
        },
    )
    console.print(
        f"{out}: on held-out text {tokens:.2f} tokens a verify step, drafts right {share}"
    )


if __name__ == "__main__":
    typer.run(main)
