"""Networks of the `transformers` library, built from their configurations with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from making import Maker, Network, image, noise, ready, words
from torch import Tensor, nn

from whet.errors import TargetFailed
from whet.optional import installed


class Plain(nn.Module):
    """Such a network with tensors in and tensors out, without a cache."""

    def __init__(self, model: nn.Module, *names: str, out: str) -> None:
        super().__init__()
        self.model, self.names, self.out = model, names, out

    def forward(self, *args: Tensor) -> Tensor:
        options = {} if self.out == "encoded" else {"use_cache": False}
        found = self.model(**dict(zip(self.names, args, strict=True)), **options)
        return found["last_hidden_state" if self.out == "encoded" else self.out]


def _built(make: Callable[[Any], nn.Module], *example: Tensor) -> Network:
    """Made when asked for, so that a library that is not there is the only thing missing."""
    if not installed("transformers"):
        raise TargetFailed(
            "build this network", "transformers is not installed", "Run: pip install transformers."
        )
    library = importlib.import_module("transformers")
    return ready(lambda: make(library), *example)


def _bert(t: Any) -> nn.Module:
    config = t.BertConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
    )
    model = t.BertForSequenceClassification(config)
    return Plain(model, "input_ids", "attention_mask", out="logits")


def _gpt2(t: Any) -> nn.Module:
    config = t.GPT2Config(
        vocab_size=60,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Plain(t.GPT2LMHeadModel(config), "input_ids", out="logits")


def _llama(t: Any) -> nn.Module:
    config = t.LlamaConfig(
        vocab_size=60,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return Plain(t.LlamaForCausalLM(config), "input_ids", out="logits")


def _t5(t: Any) -> nn.Module:
    config = t.T5Config(
        vocab_size=60,
        d_model=48,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = t.T5ForConditionalGeneration(config)
    return Plain(model, "input_ids", "decoder_input_ids", out="logits")


def _whisper(t: Any) -> nn.Module:
    config = t.WhisperConfig(
        vocab_size=60,
        num_mel_bins=16,
        d_model=48,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        max_source_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    encoder = t.WhisperModel(config).get_encoder()
    return Plain(encoder, "input_features", out="encoded")


def _vit(t: Any) -> nn.Module:
    config = t.ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    return Head(t.ViTForImageClassification(config))


class Head(nn.Module):
    """A network of images whose logits are asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x)["logits"]


def _bert_example() -> tuple[Tensor, ...]:
    seen = torch.ones(2, 12, dtype=torch.long)
    seen[1, 9:] = 0
    return words(60), seen


NETWORKS: dict[str, Maker] = {
    "transformers BERT": lambda: _built(_bert, *_bert_example()),
    "transformers GPT-2": lambda: _built(_gpt2, words(60)),
    "transformers Llama": lambda: _built(_llama, words(60)),
    "transformers T5": lambda: _built(_t5, words(60), words(60, 7)),
    "transformers Whisper encoder": lambda: _built(_whisper, noise(2, 16, 40)),
    "transformers ViT": lambda: _built(_vit, image(32)),
}
