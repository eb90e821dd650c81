"""What a model that hears writes, and how many of its words are wrong."""

from __future__ import annotations

from typing import Any

import torch

from dyncomp.backends.torch.decoder import decoder_for
from dyncomp.deploy import with_cache
from dyncomp.evaluate import Quality
from dyncomp.examples import Examples
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel
from dyncomp.pipeline import Progress, no_progress
from dyncomp.rows import SpeechRows
from dyncomp.runtime.generate import Seq2SeqGenerator
from dyncomp.runtime.sampling import Sampling
from dyncomp.wer import word_errors, words

BATCH = 8


def transcribe(graph: Graph, rows: SpeechRows, loaded: LoadedModel) -> list[str]:
    """What a graph writes for each recording, greedily, at most twice the tokens of the longest right transcript.

    Args:
        loaded: its tokenizer, and how texts begin.

    Raises:
        BackendError: no KV cache can be added to it.
    """
    assert loaded.decoding is not None
    rules, session = loaded.decoding, decoder_for(with_cache(graph)[0])
    tokenizer: Any = loaded.tokenizer
    generator = Seq2SeqGenerator(session, tokenizer, rules.begin, never=rules.never, never_first=rules.never_first)
    sampling, texts = Sampling(max_tokens=2 * rows.written.shape[1]), list[str]()
    with torch.no_grad():
        for part in rows.features.split(BATCH):
            sources = [{graph.inputs[0].name: recording.numpy()} for recording in part]
            texts += [written.text for written in generator.generate(sources, sampling)]
    return texts


def compare_transcripts(
    quality: Quality, models: dict[str, Graph], examples: Examples, loaded: LoadedModel, progress: Progress = no_progress
) -> None:
    """Add the word error rate to the figures of models: wrong words over those that are said, in all recordings together."""
    assert isinstance(examples.rows, SpeechRows)
    mean = sum(len(words(text)) for text in examples.said) / len(examples.said)
    rates: dict[str, torch.Tensor] = {}
    for done, (name, graph) in enumerate(models.items(), start=1):
        texts = transcribe(graph, examples.rows, loaded)
        rates[name] = torch.tensor([word_errors(said, text) / mean for said, text in zip(examples.said, texts, strict=True)])
        progress("transcribe", done, len(models))
    quality.by_item["wer"] = rates
    quality.wer = {name: float(values.double().mean()) for name, values in rates.items()}
