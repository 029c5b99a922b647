"""A target and an MTP assistant whose tokens, and so whose accept length, are known beforehand.

Even token ids are words, odd ones are decoys. The words form one cycle: the target's next token is
the word that follows the last one. Its layers add nothing, its head has the embedding of each
word's predecessor. The assistant proposes the same word for a chosen part of the words, and the
decoy beside the last word for the others.

It does so from both of its inputs. Half of its width carries the last token, the other half the
hidden state, which is the embedding of the token before. The follower of a word scores 1 for each of
the two that fits, the word's decoy 1.5 for the token alone: with a wrong hidden state the decoy
wins. Where the assistant shall disagree, the decoy has 3.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

DECOY, STRONG_DECOY = 1.5, 3.0
LOGIT = 10.0  # of what fits with both inputs; the target's and the assistant's
SHARE = 0.5  # of a target's embedding, squared, that the assistant sees


class Agreement:
    """Which token follows which, and where the assistant agrees.

    Args:
        vocab: size of the vocabulary.
        fraction: of the words for which the assistant proposes the target's token.
        seed: of everything that is drawn.
    """

    def __init__(self, vocab: int, fraction: float, seed: int) -> None:
        self.vocab, self.fraction, self.seed = vocab, fraction, seed
        self.words = vocab // 2
        order = torch.randperm(self.words, generator=self._generator(0))
        self.following = torch.empty_like(order)
        self.following[order] = order.roll(-1)
        # Models are made with another default dtype, which would draw other numbers.
        drawn = torch.rand(self.words, generator=self._generator(1), dtype=torch.float32)
        self.agrees = drawn < fraction

    def _generator(self, what: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 100 + what)

    @cached_property
    def _lists(self) -> tuple[list[int], list[bool]]:
        return self.following.tolist(), self.agrees.tolist()

    def tokens(self, last: int, new: int) -> list[int]:
        """What the target says after the word ``last``."""
        following, _ = self._lists
        word, made = last // 2, []
        for _ in range(new):
            word = following[word]
            made.append(2 * word)
        return made

    def verifications(self, last: int, new: int, steps: int) -> int:
        """How many verify steps ``new`` tokens take, with ``steps`` proposals in each."""
        following, agrees = self._lists
        word, made, count = following[last // 2], 1, 0
        while made < new:
            count += 1
            for _ in range(steps):
                right = agrees[word]
                if not right:
                    break
                word, made = following[word], made + 1
            word, made = following[word], made + 1
        return count

    def seen(self, width: int) -> torch.Tensor:
        """A direction for each word: ``[words, width]``."""
        drawn = torch.randn(self.words, width, generator=self._generator(2), dtype=torch.float32)
        length: torch.Tensor = drawn.norm(dim=1, keepdim=True)
        return drawn / length

    def previous(self, rows: torch.Tensor) -> torch.Tensor:
        """For each word the row of its predecessor."""
        moved = torch.empty_like(rows)
        moved[self.following.to(rows.device)] = rows
        return moved


def fill_target(model: Any, agreement: Agreement, seen_width: int) -> None:
    """Weights of a ``Gemma4ForCausalLM`` that has a head of its own; the others stay as they are."""
    silence_layers(model)
    embedding = model.model.embed_tokens.weight.data
    hidden = embedding.shape[1]
    device = embedding.device
    generator = torch.Generator(device).manual_seed(agreement.seed)
    size = agreement.words, hidden - seen_width
    rest = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
    rest *= (1 - SHARE) ** 0.5 / rest.norm(dim=1, keepdim=True)
    seen = agreement.seen(seen_width).to(device) * SHARE**0.5
    words = torch.cat([seen, rest], dim=1).to(embedding.dtype)
    embedding[1::2] = words[: len(embedding[1::2])]  # a decoy's own meaning does not matter
    embedding[::2] = words
    head = model.lm_head.weight.data
    head.zero_()
    head[: agreement.vocab : 2] = agreement.previous(words) * (LOGIT / hidden**0.5)


def fill_assistant(model: Any, agreement: Agreement) -> None:
    """Weights of a ``Gemma4AssistantForCausalLM`` whose head is its embedding."""
    silence_layers(model)
    backbone, width = model.backbone_hidden_size, model.hidden_size
    half = width // 2
    head = model.lm_head.weight.data
    eye = torch.eye(half, dtype=head.dtype, device=head.device)
    project = model.pre_projection.weight.data  # of the token's embedding, then the hidden state
    project.zero_()
    project[:half, :half] = eye
    project[half:, backbone : backbone + half] = eye
    # The token's half becomes the next hidden state, as long as in the target's.
    back = model.post_projection.weight.data
    back.zero_()
    back[:half, :half] = eye * ((backbone * SHARE) ** 0.5 / half**0.5)
    seen = agreement.seen(half).to(head.device)
    strength = torch.where(agreement.agrees, DECOY, STRONG_DECOY).to(head.device)[:, None]
    scale = LOGIT / 2 / half**0.5
    head.zero_()
    head[1 : agreement.vocab : 2, :half] = (seen * strength * scale).to(head.dtype)
    fits = torch.cat([seen, agreement.previous(seen)], dim=1) * scale
    head[: agreement.vocab : 2] = agreement.previous(fits).to(head.dtype)


def silence_layers(model: Any) -> None:
    """Layers pass on what they get; the last norm changes no direction."""
    ends = (
        "post_attention_layernorm.weight",
        "post_feedforward_layernorm.weight",
        "post_per_layer_input_norm.weight",
    )
    for name, tensor in model.state_dict().items():
        if name.endswith(ends):
            tensor.zero_()
        elif name.endswith("layer_scalar") or name == "model.norm.weight":
            tensor.fill_(1)
