"""BERTScore F1 (Zhang et al., ICLR 2020) with an encoder from a local folder.

Greedy matching of contextual token embeddings of the last layer by cosine; no idf weights, no rescaling; special
tokens left out. Figures compare only under one encoder. None ships with this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flrc_edge.errors import UsageError


class BertScore:
    """An encoder that scores answers.

    Args:
        folder: A Hugging Face encoder with its tokenizer (``config.json``, safetensors, ``tokenizer.json``).

    Raises:
        UsageError: The folder holds no such model.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import AutoModel, PreTrainedTokenizerFast
        from transformers.utils import logging as transformers_logging

        self.name = Path(folder).resolve().name
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self._model: Any = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            ).eval()
            self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception
            first = str(error).strip().partition("\n")[0]
            raise UsageError(f"{folder} holds no encoder for BERTScore: {first}") from None
        finally:
            if shown:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        self._most = int(getattr(self._model.config, "max_position_embeddings", 512))

    def __call__(self, reference: str, answer: str) -> float:
        """Return F1; 0 for an empty answer."""
        return greedy_f1(self._embed(reference), self._embed(answer))

    @torch.no_grad()
    def _embed(self, text: str) -> Tensor:
        """Return the embeddings ``[tokens, d]`` of a text, cut to what the encoder reads."""
        encoded = self._tokenizer(
            text,
            truncation=True,
            max_length=self._most,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        special = encoded.pop("special_tokens_mask")[0].bool()
        hidden: Tensor = self._model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).last_hidden_state[0]
        return hidden[~special]


def greedy_f1(reference: Tensor, answer: Tensor) -> float:
    """Return the F1 of greedy matching.

    Recall is the mean over the reference's tokens of the largest cosine with any token of the answer, precision the
    same from the answer's side (equations 1 to 3 of the paper).

    Args:
        reference: ``[n, d]``.
        answer: ``[m, d]``.
    """
    if not len(reference) or not len(answer):
        return 0.0
    unit = torch.nn.functional.normalize
    cosine = unit(reference, dim=-1) @ unit(answer, dim=-1).T  # (n, m)
    recall, precision = cosine.max(dim=1).values.mean().item(), cosine.max(dim=0).values.mean().item()
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0
