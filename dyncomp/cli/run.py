"""``dyncomp run``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dyncomp.cli import options

if TYPE_CHECKING:
    from dyncomp.runtime.generate import Completion, Generator, Seq2SeqGenerator
    from dyncomp.runtime.sampling import Sampling
    from dyncomp.runtime.speculate import Draft, Speculation


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", "prompts", multiple=True, help="Text to complete, or of an encoder–decoder to read; may be repeated.")
@click.option("--input", "file", type=click.Path(path_type=Path), help="A file with one prompt a line.")
@click.option("--image", "pictures", multiple=True, type=click.Path(path_type=Path), help="An image to embed; may be repeated.")
@click.option("--audio", "sounds", multiple=True, type=click.Path(path_type=Path), help="A .wav file to transcribe; may be repeated.")
@click.option("--chat", is_flag=True, help="Take each prompt as a user's message, through the tokenizer's chat template.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, min_open=True, max=1), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Only the k likeliest tokens. [default: all]")
@click.option("--stop", multiple=True, help="End before this string; may be repeated.")
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts at work at a time.")
@click.option("--speculate", is_flag=True, help="Guess tokens that repeat earlier text and check them in one pass; the text is the same.")
@click.option(
    "--draft",
    type=click.Path(path_type=Path),
    help="A cheaper bundle of the same vocabulary whose guesses --speculate checks, in place of repeated text.",
)
@click.option("--backend", type=click.Choice(["ort", "tvm", "torch"]), default="ort", show_default=True)
@options.device
@options.threads
@options.seed
@options.as_json
def command(
    bundle: Path, prompts: tuple[str, ...], file: Path | None, pictures: tuple[Path, ...], sounds: tuple[Path, ...], backend: str,
    device: str, slots: int, speculate: bool, draft: Path | None, threads: int | None, json_: bool, chat: bool,
    **sampling: Any,
) -> None:  # fmt: skip
    """Complete prompts with BUNDLE; one prompt streams as it is generated. Models of images give embeddings (--image), models of sound
    transcripts (--audio).

    Several prompts run together, each joining and leaving between two tokens; each gives what it would give alone. An encoder–decoder
    reads a prompt once and writes a text for it; several prompts follow each other, those of one length together.

    --speculate gives the text that there would be without it. How many tokens are guessed follows from what guesses and passes cost and
    how often guesses are right; when they do not pay they are turned off for a while. A report on standard error says how it went.
    """
    from dyncomp.bundle import open_bundle
    from dyncomp.deploy import hear, open_generator, require_device
    from dyncomp.errors import RequestError
    from dyncomp.runtime.generate import Seq2SeqGenerator
    from dyncomp.runtime.sampling import Sampling

    require_device(device, bundle, backend)
    texts = list(prompts) + (_lines(file) if file is not None else [])
    if bool(texts) + bool(pictures) + bool(sounds) > 1:
        what = "--image asks for embeddings, --audio for transcripts, --prompt and --input for text that follows a text"
        raise RequestError(what, hint="give one of them")
    if pictures:
        _embed(bundle, pictures, backend, threads, device, json_=json_)
        return
    if not (texts or sounds):
        raise RequestError("there is nothing to complete", hint="give --prompt TEXT, --input FILE, --image FILE or --audio FILE")
    speculation: Speculation | None = None
    choice = Sampling(**sampling)
    opened = open_bundle(bundle)
    requests: list[Any] = [[{"role": "user", "content": t}] for t in texts] if chat else texts
    if sounds:
        texts, requests = list(map(str, sounds)), hear(opened, sounds)
    generator: Any = open_generator(opened, backend, threads=threads, device=device)
    reads = isinstance(generator, Seq2SeqGenerator)
    if reads and (chat or speculate or draft is not None):
        option = "--chat" if chat else "--speculate" if speculate else "--draft"
        raise RequestError(f"{option}: {bundle} holds an encoder–decoder, which does not continue a text", hint="leave it out")
    if reads and not sounds and opened.processor() is not None:
        raise RequestError(f"{bundle} holds a model that hears, and does not read text", hint="give --audio FILE")
    if speculate or draft is not None:
        drafting = None if draft is None else _draft(draft, generator.tokenizer, backend, threads, device)
        generator.session = speculation = _speculation(generator.session, len(requests), drafting)
    if not generator.session.cached:
        click.echo("note: this model has no KV cache (see dyncomp inspect); every step computes the whole sequence", err=True)
    if len(texts) == 1 and not json_:
        if not (chat or reads):
            click.echo(texts[0], nl=False)
        for piece in generator.stream(requests[0], choice):
            click.echo(piece, nl=False)
        click.echo()
        if speculation is not None:
            click.echo(speculation.report, err=True)
        return
    completions = _complete(generator, requests, choice, slots, backend)
    if json_:
        guesses = {} if speculation is None else {"speculation": dataclasses.asdict(speculation.report)}
        options.print_json([_as_dict(t, c) | guesses for t, c in zip(texts, completions, strict=True)])
        return
    for text, completion in zip(texts, completions, strict=True):
        click.echo(f"--- {text}\n{completion.text}")


def _embed(bundle: Path, files: tuple[Path, ...], backend: str, threads: int | None, device: str, *, json_: bool) -> None:
    """Embeddings with ``--json``, else how alike the images are."""
    from dyncomp.bundle import open_bundle
    from dyncomp.deploy import embed_images

    found = embed_images(open_bundle(bundle), files, backend, threads=threads, device=device)
    if json_:
        options.print_json([{"image": str(f), "embedding": e.tolist()} for f, e in zip(files, found, strict=True)])
        return
    for file, vector in zip(files, found, strict=True):
        likeness = "" if len(files) == 1 else ", cosine to the first " + f"{float(vector @ found[0]):.4f}"
        click.echo(f"{file}: an embedding of {len(vector)} numbers (--json prints them){likeness}")


def _complete(
    generator: Generator | Seq2SeqGenerator, requests: list[Any], sampling: Sampling, slots: int, backend: str
) -> list[Completion]:
    """All requests: over slots of one KV cache where there is one on the CPU, else as one batch."""
    from dyncomp.backends.decoder import CachedDecoder
    from dyncomp.deploy import backend_of
    from dyncomp.runtime.batching import Batcher
    from dyncomp.runtime.generate import Generator

    session = generator.session
    if len(requests) == 1 or not isinstance(generator, Generator) or not isinstance(session, CachedDecoder):
        return generator.generate(requests, sampling)
    if session.model.device != "cpu":
        return generator.generate(requests, sampling)
    longest = max(len(generator.encode(r)) for r in requests)
    capacity = min(longest + sampling.max_tokens, session.context_length)
    shared = backend_of(backend).slots(session.model, slots=min(slots, len(requests)), capacity=capacity)
    return Batcher(shared, generator.tokenizer).complete(requests, sampling)


def _speculation(session: Any, requests: int, draft: Draft | None) -> Speculation:
    from dyncomp.errors import RequestError
    from dyncomp.runtime.speculate import Speculation

    _require_extend(session, "--speculate")
    if requests > 1:
        raise RequestError("--speculate is for one prompt at a time", hint="several prompts share their passes already")
    return Speculation(session, drafter=draft)


def _draft(bundle: Path, tokenizer: Any, backend: str, threads: int | None, device: str) -> Draft:
    """What guesses with another bundle.

    Raises:
        RequestError: its tokens are not those of ``tokenizer``, or it cannot take several tokens at once.
    """
    from dyncomp.bundle import open_bundle
    from dyncomp.deploy import open_session
    from dyncomp.errors import RequestError
    from dyncomp.runtime.speculate import Draft

    opened = open_bundle(bundle)
    other = opened.tokenizer()
    if other is None or other.get_vocab() != tokenizer.get_vocab():
        raise RequestError(f"--draft {bundle}: its tokens are not those of the model", hint="give a bundle made from the same model")
    session: Any = open_session(opened, backend, threads=threads, device=device)
    _require_extend(session, f"--draft {bundle}")
    return Draft(session)


def _require_extend(session: Any, option: str) -> None:
    from dyncomp.errors import RequestError

    if not hasattr(session, "extend"):
        raise RequestError(
            f"{option}: {session.engine} cannot check several tokens in one pass here",
            hint="use --backend ort or tvm on a model with a KV cache",
        )


def _as_dict(prompt: str, completion: Any) -> dict[str, Any]:
    return {
        "prompt": prompt, "text": completion.text, "tokens": len(completion.tokens), "finish": completion.finish,
        "prompt_tokens": completion.prompt_tokens, "engine": completion.engine, "kv_cache": completion.cached,
        "prefill_seconds": completion.seconds[0], "decode_seconds": completion.seconds[1],
    }  # fmt: skip


def _lines(file: Path) -> list[str]:
    from dyncomp.errors import RequestError

    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read prompts from {file}: {error}", hint="a UTF-8 text file with one prompt a line") from error
