"""What a model that hears is calibrated and evaluated on: recordings with their transcripts, or text that is spoken."""

from __future__ import annotations

import collections
import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyncomp import text
from dyncomp.errors import SoundError
from dyncomp.espeak import speak
from dyncomp.wav import Samples, read_wav, resample
from dyncomp.wer import words

HELD_OUT = 0.25
"""Fraction of the recordings that is held out; more than of text, for there are fewer of them than sentences."""
MOST = 256
"""At most so many examples are drawn when no number is named: one takes a megabyte."""
VOICES = ("en-us", "en-us+f3")
"""Of the passages that are spoken, in turn."""
WORDS_A_SECOND = 1.85
"""At most so many of a passage's words to a second of sound: eSpeak says 150 a minute, and pauses between sentences."""
FREQUENT = 20
"""Occurrences in a packaged text, in lower case, that make a word one that eSpeak is trusted to pronounce: names are not among them."""
_SENTENCE = re.compile(r"[A-Z][A-Za-z',;: -]*[.!?]")


@dataclass(frozen=True)
class Recording:
    """One recording.

    Args:
        name: of its file.
        digest: SHA-256 of its bytes and its transcript: equal ones are equal, whatever their name.
        text: what is said.
        open: (samples, samples a second) of it.
    """

    name: str = field(compare=False)
    digest: str
    text: str = field(compare=False)
    open: Callable[[], tuple[Samples, int]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Recordings:
    """Recordings under one name."""

    name: str
    documents: tuple[Recording, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the recordings."""
        return hashlib.sha256("\n".join(r.digest for r in self.documents).encode()).hexdigest()


def load_sound(source: str | None = None) -> Recordings | text.Corpus:
    """Recordings, or a text to be spoken.

    Recordings are a folder of .wav files, each with its transcript in a .txt file of the same name, or a ``.jsonl`` file of
    ``{"audio": "a.wav", "text": "…"}`` a line, paths relative to the file. Everything else is what :func:`dyncomp.text.load_text` takes,
    less the sentences that :func:`speakable` leaves out.

    Raises:
        SoundError: a folder without recordings, or one without its transcript; nothing can be spoken.
        TextError: the text is unsuitable.
    """
    path = Path(source or "").expanduser()
    if source and path.is_dir():
        return Recordings(source, tuple(_folder(path)))
    if source and path.suffix == ".jsonl" and path.is_file():
        records = list(text.read_records(path))
        if records and "audio" in records[0][1]:
            return Recordings(source, tuple(_listed(path, records)))
    corpus = text.load_text(source)
    return speakable(corpus, frequent=FREQUENT if corpus.name in text.PACKAGED else 0)


def speakable(corpus: text.Corpus, *, frequent: int = 0) -> text.Corpus:
    """The sentences whose spoken form is certain: of 5 to 20 words, in letters and plain punctuation.

    Args:
        frequent: how often each word must occur in lower case.

    Raises:
        SoundError: there is none.
    """
    counts = collections.Counter(word for document in corpus.documents for word in re.findall(r"\b[a-z][a-z']*\b", document))

    def suits(sentence: str) -> bool:
        found = re.findall(r"[a-z']+", sentence.lower())
        return bool(5 <= len(found) <= 20 and _SENTENCE.fullmatch(sentence) and all(counts[word] >= frequent for word in found))

    documents = (" ".join(s for s in re.split(r"(?<=[.!?])\s+", d.replace("\n", " ")) if suits(s)) for d in corpus.documents)
    kept = tuple(d for d in documents if d)
    if not kept:
        raise SoundError(
            f"the text {corpus.name!r} has no sentence of 5 to 20 words in letters and plain punctuation that could be spoken",
            hint=_HINT,
        )
    return text.Corpus(corpus.name, kept)


def split(recordings: Recordings, *, held_out: float = HELD_OUT, seed: int = 0) -> tuple[Recordings, Recordings]:
    """Divide recordings into some to calibrate on and some to evaluate on, which share none.

    Returns:
        (calibration, held out), in their order.

    Raises:
        SoundError: there are fewer than two different ones.
    """
    documents = list(dict.fromkeys(recordings.documents))
    if len(documents) < 2:
        raise SoundError(f"{recordings.name!r} has no two recordings to divide into calibration and held-out ones", hint=_HINT)
    chosen = set(random.Random(seed).sample(range(len(documents)), max(1, round(held_out * len(documents)))))
    kept, out = (tuple(d for i, d in enumerate(documents) if (i in chosen) is side) for side in (False, True))
    return Recordings(f"{recordings.name} (calibration)", kept), Recordings(f"{recordings.name} (held out)", out)


def heard(
    collection: Recordings | text.Corpus, processor: Any, *, count: int | None = None, seed: int = 0
) -> tuple[Tensor, tuple[str, ...]]:
    """Draw examples: recordings, or passages of a text, spoken.

    Args:
        processor: a feature extractor of transformers; what it makes of a sound must always have the same size.
        count: how many are wanted; fewer where there are fewer. None is as many as there are, at most :data:`MOST`.
        seed: which, in which order.

    Returns:
        (features ``[n, mel bins, frames]``, what is said in each).

    Raises:
        SoundError: a recording is damaged or too long, or there are no passages.
    """
    wanted = MOST if count is None else count
    if isinstance(collection, Recordings):
        drawn = list(collection.documents)
        random.Random(seed).shuffle(drawn)
        drawn = drawn[:wanted]
        return torch.stack([features(processor, *r.open(), name=r.name) for r in drawn]), tuple(r.text for r in drawn)
    passages = list(_passages(collection, most=max(5, int((limit(processor) or 30.0) * WORDS_A_SECOND))))
    random.Random(seed).shuffle(passages)
    passages = passages[:wanted]
    sounds, rate = speak([(VOICES[i % len(VOICES)], passage) for i, passage in enumerate(passages)])
    rows = [
        features(processor, sound, rate, name=f"the passage {passage[:40]!r}…") for sound, passage in zip(sounds, passages, strict=True)
    ]
    return torch.stack(rows), tuple(passages)


def limit(processor: Any) -> float | None:
    """Seconds of sound that a feature extractor takes; None where it takes any."""
    samples = getattr(processor, "n_samples", None)
    return None if samples is None else samples / processor.sampling_rate


def features(processor: Any, samples: Samples, rate: int, *, name: str) -> Tensor:
    """What a model takes of a sound: ``[mel bins, frames]``, silence after its end.

    Raises:
        SoundError: it is longer than the model hears at a time.
    """
    longest = limit(processor)
    if longest is not None and len(samples) > longest * rate:
        raise SoundError(
            f"{name} lasts {len(samples) / rate:.1f} s, and the model hears {longest:g} s at a time",
            hint="divide it, best where nobody speaks, with the transcripts of the parts",
        )
    made = processor(resample(samples, rate, processor.sampling_rate), sampling_rate=processor.sampling_rate, return_tensors="np")
    return torch.from_numpy(np.asarray(made[processor.model_input_names[0]][0], np.float32))


def _passages(corpus: text.Corpus, most: int) -> Iterator[str]:
    """Sentences that follow each other, as many as have so many words."""
    for document in corpus.documents:
        taken: list[str] = []
        for sentence in re.split(r"(?<=[.!?])\s+", document):
            if taken and len(" ".join([*taken, sentence]).split()) > most:
                yield " ".join(taken)
                taken = []
            taken.append(sentence)
        yield " ".join(taken)


def _folder(folder: Path) -> Iterator[Recording]:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() == ".wav" and f.is_file())
    if not files:
        raise SoundError(f"{folder} holds no .wav file", hint=_HINT)
    for file in files:
        said = file.with_suffix(".txt")
        if not said.is_file():
            raise SoundError(f"{file} has no transcript: there is no {said.name} beside it", hint=_HINT)
        yield _recording(file, text.read_utf8(said), said)


def _listed(path: Path, records: Sequence[tuple[int, dict[str, Any]]]) -> Iterator[Recording]:
    for number, record in records:
        for key in ("audio", "text"):
            if not isinstance(record.get(key), str):
                raise SoundError(f'{path}, line {number}: no string under the key "{key}"', hint=_HINT)
        yield _recording(path.parent / record["audio"], record["text"], f"{path}, line {number}")


def _recording(file: Path, said: str, where: object) -> Recording:
    said = " ".join(said.split())
    if not words(said):
        raise SoundError(f"{where} says no word of what {file.name} holds", hint=_HINT)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise SoundError(f"{file} cannot be read: {error.strerror or error}", hint=_HINT) from error
    return Recording(str(file), hashlib.sha256(data + said.encode()).hexdigest(), said, lambda: read_wav(file))


_HINT = 'give a .jsonl file of {"audio": "a.wav", "text": "…"} a line, a folder of .wav files with transcripts in .txt files, or a text'
