"""Tiny models with a tokenizer, as Hugging Face directories: what the command line is tried on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from bench.tiny import enliven

_WORDS = [
    "the", "of", "a", "river", "stone", "light", "under", "over", "quick", "slow", "small", "great",
    "runs", "sings", "falls", "grows", "and", "while", "because", "old", "new", "door", "water",
]  # fmt: skip


def prose(words: int, seed: int = 0) -> str:
    """Sentences of a small made-up language, in paragraphs."""
    pick = random.Random(seed)
    sentences, left = [], words
    while left > 0:
        length = pick.randint(4, 12)
        sentences.append(" ".join(pick.choice(_WORDS) for _ in range(length)).capitalize() + ".")
        left -= length
    return "\n\n\n".join(" ".join(sentences[i : i + 12]) for i in range(0, len(sentences), 12))


def write_text(file: Path, words: int = 6000, seed: int = 0) -> Path:
    file.write_text(prose(words, seed))
    return file


def _tokenizer() -> Tokenizer:
    """Bytes as an alphabet, merged over :func:`prose` to 320 tokens; ``<eos>`` is 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([prose(2000, 7)], trainer)
    return tokenizer


def write_encoder_decoder(folder: Path, seed: int = 4) -> Path:
    """A gated T5 of one layer on each side, 32 features, 64 hidden neurons; it may write 64 tokens."""
    config = T5Config(
        vocab_size=320, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu", n_positions=64,
        eos_token_id=0, pad_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config)
    enliven(model, seed)
    model.save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", pair="$A $B <eos>", special_tokens=[("<eos>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def write_whisper(folder: Path, seed: int = 2) -> Path:
    """A Whisper of one layer on each side, 32 features, 64 hidden neurons; it hears 1 s at 16 kHz and may write 64 tokens."""
    begin, plain = "<|startoftranscript|>", "<|notimestamps|>"
    tokenizer = _tokenizer()
    tokenizer.add_special_tokens([begin, plain])
    ids = [(token, tokenizer.token_to_id(token)) for token in (begin, plain, "<eos>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} {plain} $A <eos>", special_tokens=ids)
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
             {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()}  # fmt: skip
    config = WhisperConfig(
        vocab_size=322, d_model=32, num_mel_bins=8, max_source_positions=50, max_target_positions=64, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=ids[0][1], begin_suppress_tokens=[0], suppress_tokens=[ids[0][1], ids[1][1]], **sizes,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    enliven(model, seed)
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)
    return folder


def write_encoder(folder: Path, seed: int = 3) -> Path:
    """A BERT of two layers, 32 features, 64 hidden neurons, context 128."""
    config = BertConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = BertModel(config)
    enliven(model, seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="<eos>").save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, seed: int = 0, heads: int = 4, ffn: int = 64) -> Path:
    """A Llama of two layers, 32 features, ``ffn`` hidden neurons, context 128."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    enliven(model, seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder
