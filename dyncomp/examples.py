"""What a model is calibrated and evaluated on: rows of its main input, read from whatever it takes.

A decoder or a text encoder takes windows of tokens, an encoder–decoder pairs of them, or of sound and text, an image encoder takes
pixels. Which of them is a :class:`Reader`; behind it everything is a row (:mod:`dyncomp.rows`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dyncomp import images, sound, text
from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel
from dyncomp.models.loaded import WRITES
from dyncomp.regions import find_regions
from dyncomp.rows import Rows, SpeechRows, row_lengths, tensors_of

CALIBRATION = 40_960
"""Tokens to calibrate on."""


@dataclass(frozen=True)
class Examples:
    """Rows that a model runs on.

    Args:
        rows: [n, ...] its main input, and what it writes: see :data:`dyncomp.rows.Rows`.
        labels: [n] which class each belongs to, where somebody says.
        said: [n] what is said in each, of recordings.
    """

    rows: Rows
    labels: Tensor | None = None
    said: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


class Collection(Protocol):
    """Documents, pictures or recordings under one name: :class:`dyncomp.text.Corpus`, :class:`dyncomp.images.Album`,
    :class:`dyncomp.sound.Recordings`."""

    name: str
    documents: tuple[Any, ...]

    @property
    def fingerprint(self) -> str: ...


class Reader(Protocol):
    """How examples for one model are read.

    Attributes:
        tokens: of each example, as the model sees it.
        other: the packaged collection that is evaluated on besides what is calibrated on.
        count: examples of each collection to evaluate on, where nobody says how many.
        calibration: tokens to calibrate on, where nobody says how many.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def other(self) -> str: ...
    @property
    def count(self) -> int: ...
    @property
    def calibration(self) -> int: ...

    def load(self, source: str | None) -> Any:
        """A collection: packaged, or the user's; None is the packaged one to calibrate on."""

    def split(self, collection: Any, *, seed: int) -> tuple[Any, Any]:
        """(to calibrate on, held out); they share no document."""

    def draw(self, collection: Any, *, count: int | None = None, seed: int) -> Examples:
        """At most ``count`` examples, drawn from the whole collection; None is all of them."""


@dataclass(frozen=True)
class TextReader:
    """Windows of tokens that do not overlap. ``write`` gives text that the model writes of itself, where it can be asked to."""

    tokenizer: Any
    tokens: int
    other: str = "news"
    count: int = 16
    calibration: int = CALIBRATION
    write: Callable[[], text.Corpus] | None = None

    def load(self, source: str | None) -> text.Corpus:
        if source != text.GENERATED:
            return text.load_text(source)
        if self.write is None:
            raise RequestError(
                f"{source!r} is text that a decoder writes of itself: for dyncomp convert and heal", hint="give a packaged text or a file"
            )
        return self.write()

    def split(self, collection: text.Corpus, *, seed: int) -> tuple[text.Corpus, text.Corpus]:
        return text.split(collection, seed=seed)

    def draw(self, collection: text.Corpus, *, count: int | None = None, seed: int) -> Examples:
        tokens = None if count is None else count * self.tokens
        return Examples(text.windows(collection, self.tokenizer, length=self.tokens, tokens=tokens, seed=seed))


@dataclass(frozen=True)
class PairReader:
    """Pairs of what is read and what is written, or halves of windows of a text.

    ``count`` examples are as many pairs as have the tokens of so many windows; ``begin`` is what the decoder begins with.
    """

    tokenizer: Any
    tokens: int
    begin: tuple[int, ...]
    other: str = "news"
    count: int = 16
    calibration: int = CALIBRATION

    def load(self, source: str | None) -> text.Pairs | text.Corpus:
        return text.load_pairs(source)

    def split(self, collection: Any, *, seed: int) -> tuple[Any, Any]:
        return text.split(collection, seed=seed)

    def draw(self, collection: text.Pairs | text.Corpus, *, count: int | None = None, seed: int) -> Examples:
        tokens = None if count is None else count * self.tokens
        return Examples(text.pairs(collection, self.tokenizer, begin=self.begin, length=self.tokens, tokens=tokens, seed=seed))


@dataclass(frozen=True)
class ImageReader:
    """Images as the model's processor makes them, all of one size; ``tokens`` is what the model cuts one into."""

    processor: Any
    tokens: int
    other: str = "digits"
    count: int = 256
    calibration: int = CALIBRATION

    def load(self, source: str | None) -> images.Album:
        return images.load_images(source)

    def split(self, collection: images.Album, *, seed: int) -> tuple[images.Album, images.Album]:
        return images.split(collection, seed=seed)

    def draw(self, collection: images.Album, *, count: int | None = None, seed: int) -> Examples:
        return Examples(*images.pixels(collection, self.processor, count=count, seed=seed))


@dataclass(frozen=True)
class SpeechReader:
    """Recordings, or passages of a text that are spoken, and what is said in each; ``tokens`` is what the encoder makes of one.

    ``begin`` is what the decoder begins with, ``longest`` how many tokens it may write, with these.
    """

    tokenizer: Any
    processor: Any
    tokens: int
    begin: tuple[int, ...]
    longest: int
    other: str = "news"
    count: int = 32

    @property
    def calibration(self) -> int:
        return RECORDINGS * self.tokens

    def load(self, source: str | None) -> sound.Recordings | text.Corpus:
        return sound.load_sound(source)

    def split(self, collection: Any, *, seed: int) -> tuple[Any, Any]:
        divide = sound.split if isinstance(collection, sound.Recordings) else text.split
        return divide(collection, seed=seed)

    def draw(self, collection: sound.Recordings | text.Corpus, *, count: int | None = None, seed: int) -> Examples:
        heard, said = sound.heard(collection, self.processor, count=count, seed=seed)
        return Examples(SpeechRows(heard, text.written(said, self.tokenizer, begin=self.begin, length=self.longest)), said=said)


RECORDINGS = 96
"""To calibrate on: each is many tokens to an encoder, and few to a decoder."""


def reader_of(loaded: LoadedModel, graph: Graph) -> Reader:
    """How examples for a model are read.

    Args:
        graph: the dense one.

    Raises:
        RequestError: the model came without what makes text, sound or images into its input, or takes neither text, nor sound, nor images.
    """
    main = graph.inputs[0]
    hears = loaded.task == "seq2seq" and main.dtype.is_floating_point
    if not main.dtype.is_floating_point or hears:
        if loaded.tokenizer is None:
            raise RequestError(
                f"{loaded.name} came without a tokenizer, so no text can calibrate it", hint="convert from a directory or file that has one"
            )
        length = window_length(loaded.task, loaded.context_length)
        if loaded.task != "seq2seq":
            return TextReader(loaded.tokenizer, length)
        if loaded.decoding is None:
            raise RequestError(
                f"{loaded.name} does not say which token its texts begin with",
                hint="set decoder_start_token_id in its config.json or generation_config.json (in a factory: decoding)",
            )
        if not hears:
            return PairReader(loaded.tokenizer, length, loaded.decoding.begin)
        if not hasattr(loaded.processor, "sampling_rate"):
            raise RequestError(
                f"{loaded.name} reads {main} and came without a feature extractor, so no sound can calibrate it",
                hint="convert from a directory that has a preprocessor_config.json (in a factory: processor)",
            )
        return SpeechReader(loaded.tokenizer, loaded.processor, encoder_tokens(graph), loaded.decoding.begin, length)
    if len(main.shape) != 4:
        raise RequestError(
            f"{loaded.name} takes {main.name!r} of {len(main.shape)} dimensions, neither text nor images: nothing can calibrate it"
        )
    if loaded.processor is None:
        raise RequestError(
            f"{loaded.name} came without an image processor, so no images can calibrate it",
            hint="convert from a directory that has a preprocessor_config.json",
        )
    return ImageReader(loaded.processor, example_tokens(graph) or 1)


def packaged_text(loaded: LoadedModel, graph: Graph) -> Tensor | None:
    """A few windows of the packaged text that is not calibrated on, to time a model on; None for models that read no text."""
    reader = reader_of(loaded, graph) if loaded.tokenizer is not None else None
    if not isinstance(reader, TextReader):
        return None
    rows = reader.draw(reader.load(reader.other), count=4, seed=0).rows
    assert isinstance(rows, Tensor)
    return rows


def window_length(task: str, context_length: int | None) -> int:
    """512 tokens for decoders, 256 for each side of an encoder–decoder, 128 for encoders (sentences), less when the model's context is
    shorter."""
    return min({"causal-lm": 512, "seq2seq": 256}.get(task, 128), context_length or 1 << 30)


def example_tokens(graph: Graph) -> int | None:
    """How many tokens a graph makes of each example; None where its input, or a decoder's, is tokens already, as many as there are ids.

    Read from the output [batch, tokens, width]; one where it has no such dimension.
    """
    if not graph.inputs[0].dtype.is_floating_point or graph.info.get("task") in WRITES:
        return None
    shape = graph.shape(graph.output_nodes[0]) or ()
    return shape[1] if len(shape) == 3 and isinstance(shape[1], int) else 1


def row_tokens(graph: Graph, rows: Rows) -> int:
    """How many tokens a graph sees of the longest row."""
    return example_tokens(graph) or int(row_lengths(rows).max())


def encoder_tokens(graph: Graph) -> int:
    """How many tokens an encoder of fixed size makes of what it takes: those that its first FFN sees; one where it has none."""
    shapes = (graph.shape(ffn.output) or () for ffn in find_regions(graph).ffns)
    return next((shape[1] for shape in shapes if len(shape) == 3 and isinstance(shape[1], int)), 1)


@dataclass
class Prepared:
    """Examples: to calibrate on, to evaluate on by name of the collection, and to train on."""

    calibration: Rows
    evaluation: dict[str, Examples] = dataclasses.field(default_factory=dict)
    training: Rows | None = None

    def evaluation_data(self) -> list[Tensor]:
        """Everything that figures depend on."""
        return [t for e in self.evaluation.values() for t in (*tensors_of(e.rows), e.labels) if t is not None]


def prepare_examples(
    reader: Reader, calibrate: str | None, other: str | None, *, tokens: int | None, count: int | None, seed: int, training: bool = False,
    source: str | None = None,
) -> Prepared:  # fmt: skip
    """Load, split and draw examples.

    Args:
        calibrate: what to calibrate on; a part of its documents is held out for evaluation.
        other: another collection to evaluate on as well, or None; ``"default"`` is the reader's packaged one.
        tokens: calibration tokens; None is the reader's number.
        count: evaluation examples of each collection; None is the reader's number.
        training: examples to train on are wanted, of ``source`` or else of what is calibrated on; none of a document that is
            evaluated on.

    Raises:
        RequestError: a collection is unsuitable.
    """
    count = reader.count if count is None else count
    tokens = reader.calibration if tokens is None else tokens
    other = reader.other if other == "default" else other
    whole = reader.load(calibrate)
    calibration, held_out = reader.split(whole, seed=seed)
    made = Prepared(reader.draw(calibration, count=-(-tokens // reader.tokens), seed=seed).rows)
    made.evaluation["held out"] = reader.draw(held_out, count=count, seed=seed)
    evaluated = set(held_out.documents)
    if other and other != calibrate:
        second = reader.load(other)
        evaluated.update(second.documents)
        made.evaluation["other source"] = reader.draw(second, count=count, seed=seed)
    if training:
        trained = calibration if source is None else _without(reader.load(source), evaluated, whole, calibration)
        made.training = reader.draw(_shuffled(trained, seed), seed=seed).rows
    return made


def _shuffled(collection: Any, seed: int) -> Any:
    """Its documents in random order: what is set apart at the end (``heal``) is then of every kind, and of documents of its own."""
    documents = list(collection.documents)
    random.Random(seed).shuffle(documents)
    return dataclasses.replace(collection, documents=tuple(documents))


def _without(collection: Any, evaluated: set[Any], whole: Collection, calibration: Collection) -> Any:
    """What of a collection may be trained on: no document that is evaluated on; of what is calibrated on, the part to calibrate on."""
    if collection.fingerprint == whole.fingerprint:
        return calibration
    kept = tuple(d for d in collection.documents if d not in evaluated)
    if not kept:
        raise RequestError(f"every document of {collection.name!r} is one that the model is evaluated on", hint="train on another text")
    return dataclasses.replace(collection, name=f"{collection.name} (training)", documents=kept)
