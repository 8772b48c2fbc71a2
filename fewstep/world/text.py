"""The world's own tokenizer (CLIP's byte-level BPE, trained on its captions) and small CLIP text encoder."""

from __future__ import annotations

from collections import Counter

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.world.pictures import Picture

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus(pictures: list[Picture]) -> list[str]:
    """Every caption of every drawn picture, in a fixed order."""
    seen = Counter(text for p in pictures if p.drawn for text in p.captions())
    return sorted(seen)


def make_tokenizer(pictures: list[Picture]) -> CLIPTokenizer:
    """BPE over the captions, so that their words are single tokens; any other text still has byte tokens."""
    bpe = Tokenizer(models.BPE(unk_token=END, end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[START, END], initial_alphabet=sorted(alphabet),
                                  end_of_word_suffix="</w>", show_progress=False)  # fmt: skip
    bpe.train_from_iterator(corpus(pictures), trainer)
    import json

    model = json.loads(bpe.to_str())["model"]
    vocab = dict(model["vocab"])
    for symbol in sorted(alphabet):  # CLIP's vocabulary holds each byte also as the end of a word
        vocab.setdefault(symbol + "</w>", len(vocab))
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def text_config(tokenizer: CLIPTokenizer, *, width: int = 128, layers: int = 3) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attention_dropout=0.0,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(text_config(tokenizer))
