"""Captions as the conditions that a target's denoiser takes: text states, pooled text, class numbers, or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from mia import models
from mia.errors import UserError

Rows = dict[str, np.ndarray]  # n_tokens int32[n] and, where the family has them, states, pooled (float16), label
T5_TOKENS = 256  # `max_sequence_length` of diffusers' StableDiffusion3Pipeline


class Captions:
    """No condition at all: the model is told nothing of the image. The base of all others.

    Attributes:
        has_null: whether there is a condition that says nothing, which guidance needs.
        limit: number of tokens above which a caption is cut.
        width: length of one token's state, 0 without text.
    """

    has_null = False
    limit = 0
    width = 0

    def encode(self, captions: list[str], batch_size: int) -> Rows:
        """The conditions of `captions`, one row each."""
        return {"n_tokens": np.zeros(len(captions), np.int32)}

    def null(self, batch_size: int) -> Rows:
        """The null condition, one row: the empty prompt's, where the family does not say otherwise."""
        return self.encode([""], batch_size)


class ClassNumbers(Captions):
    """Class-conditional models: the caption is the number of a class; the null class is the one behind the last.

    An empty caption is the null class.
    """

    has_null = True

    def __init__(self, classes: int):
        self.classes = classes

    def encode(self, captions: list[str], batch_size: int) -> Rows:
        """`label`, int32[n].

        Raises:
            UserError: a caption is no class number.
        """
        label = [self._number(caption) for caption in captions]
        return super().encode(captions, batch_size) | {"label": np.array(label, np.int32)}

    def _number(self, caption: str) -> int:
        text = caption.strip()
        if not text:
            return self.classes
        if not (text.isascii() and text.isdigit() and int(text) < self.classes):
            fix = f"this model takes the number of a class, 0 to {self.classes - 1}"
            raise UserError(f"caption '{caption}' is no class number", "caption", fix)
        return int(text)


class ClipText(Captions):
    """Stable Diffusion 1.x and 2.x: the last hidden states of one CLIP text encoder."""

    has_null = True

    def __init__(self, tokenize: Any, encoder: Any):
        self.tokenize, self.encoder = tokenize, encoder
        self.limit, self.width = _limit(tokenize, encoder), encoder.config.hidden_size

    def encode(self, captions: list[str], batch_size: int) -> Rows:
        """`states`, float16[n, tokens, width]."""
        states, counts = models.text_states(self.tokenize, self.encoder, captions, batch_size)
        return {"n_tokens": counts, "states": states.astype(np.float16)}


class ClipPair(Captions):
    """SDXL: the last but one hidden states of two CLIP text encoders side by side, and the second's pooled output.

    `zeros` makes the null condition all zeros, as SDXL's own `force_zeros_for_empty_prompt` asks, and not the empty
    prompt's. Source: diffusers 0.42, `StableDiffusionXLPipeline.encode_prompt`.
    """

    has_null = True

    def __init__(self, tokenizers: list[Any], encoders: list[Any], zeros: bool = False):
        self.tokenizers, self.encoders, self.zeros = tokenizers, encoders, zeros
        self.limit = min(_limit(t, e) for t, e in zip(tokenizers, encoders, strict=True))
        self.width = sum(encoder.config.hidden_size for encoder in encoders)

    def encode(self, captions: list[str], batch_size: int) -> Rows:
        """`states` float16[n, tokens, width], `pooled` float16[n, w]."""
        parts: list[Rows] = []
        for run, real in models.batches(len(captions), batch_size):
            states, pooled = self._run([captions[i] for i in run])
            kept = {"states": states, "pooled": pooled}
            parts.append({k: v[:real].float().cpu().numpy().astype(np.float16) for k, v in kept.items()})
        counts = np.array([len(ids) for ids in self.tokenizers[0](captions).input_ids], dtype=np.int32)
        return {"n_tokens": counts} | {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def null(self, batch_size: int) -> Rows:
        """Zeros, or the empty prompt's condition."""
        rows = super().null(batch_size)
        return rows if not self.zeros else {name: np.zeros_like(value) for name, value in rows.items()}

    def _run(self, captions: list[str]) -> tuple[Any, Any]:
        import torch

        found = [self._clip(i, captions) for i in range(2)]
        return torch.cat([states for states, _ in found], -1), found[1][1]

    def _clip(self, which: int, captions: list[str]) -> tuple[Any, Any]:
        """Last but one hidden states and the first output of one of the encoders."""
        import torch

        ids = _tokens(self.tokenizers[which], captions, self.limit)
        with torch.inference_mode():
            out = self.encoders[which](ids.to(self.encoders[which].device), output_hidden_states=True)
        return out.hidden_states[-2], out[0]


class ClipPairAndT5(ClipPair):
    """Stable Diffusion 3: two CLIP text encoders, both with pooled output, and below them the states of T5.

    Without T5, zeros stand in its place. Source: diffusers 0.42, `StableDiffusion3Pipeline.encode_prompt`.
    """

    def __init__(self, tokenizers: list[Any], encoders: list[Any], width: int):
        super().__init__(tokenizers[:2], encoders[:2])
        self.t5 = (tokenizers[2], encoders[2]) if len(encoders) > 2 else None
        self.width = width

    def _run(self, captions: list[str]) -> tuple[Any, Any]:
        import torch

        found = [self._clip(i, captions) for i in range(2)]
        clip = torch.cat([states for states, _ in found], -1)
        clip = torch.nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if self.t5 is None:
            below = clip.new_zeros(len(clip), T5_TOKENS, self.width)
        else:
            tokenize, encoder = self.t5
            with torch.inference_mode():
                below = encoder(_tokens(tokenize, captions, T5_TOKENS).to(encoder.device))[0]
        return torch.cat([clip, below], 1), torch.cat([pooled for _, pooled in found], -1)


def _limit(tokenize: Any, encoder: Any) -> int:
    """Tokens that fit in: what the tokenizer says, which may be nothing, and at most the encoder's positions."""
    return min(tokenize.model_max_length, encoder.config.max_position_embeddings)


def _tokens(tokenize: Any, captions: list[str], length: int) -> Any:
    return tokenize(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
