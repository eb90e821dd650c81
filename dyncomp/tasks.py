"""Questions with known answers: multiple choice by log-likelihood, and answers that must come out word for word."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncomp.bootstrap import interval
from dyncomp.errors import TextError
from dyncomp.graph import Graph
from dyncomp.text import labelled_news

_HINT = '{"question": "…", "choices": ["…", "…"], "answer": 0} or {"prompt": "…", "answer": "…"}, one object a line'
_TOPICS = {"business": "business", "entertainment": "entertainment", "politics": "politics", "sports": "sport", "tech": "technology"}
_WORDS = 60  # of an article: its beginning says what it is about


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        context: what stands before the answer.
        choices: what may follow; one choice: it must be what the model says.
        answer: position of the right choice.
    """

    context: str
    choices: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True)
class Task:
    """Questions of one kind: ``multiple-choice`` or ``exact-match``."""

    name: str
    kind: str
    items: tuple[Item, ...]


def load_task(name: str, *, count: int | None = None, seed: int = 0) -> Task:
    """A packaged task (``topics``: which of five topics is a BBC story about?) or a JSONL file.

    Args:
        count: at most this many questions, drawn from all of them.

    Raises:
        TextError: no such task or file, or a line that is no question: named by its number.
    """
    if name == "topics":
        task = Task(name, "multiple-choice", tuple(_topics()))
    else:
        path = Path(name).expanduser()
        if not path.is_file():
            raise TextError(f"there is no task {name!r}, and no such file", hint=f"topics, or a file of {_HINT}")
        task = _read(path)
    order = random.Random(seed).sample(range(len(task.items)), len(task.items))[:count]
    return Task(task.name, task.kind, tuple(task.items[i] for i in order))


def _topics() -> list[Item]:
    choices = tuple(f" {topic}" for topic in _TOPICS.values())
    return [
        Item(f"{' '.join(text.split()[:_WORDS])} …\n\nThe topic of this news story is", choices, list(_TOPICS).index(label))
        for label, text in labelled_news()
    ]


def _read(path: Path) -> Task:
    items: list[Item] = []
    kinds: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TextError(f"{where}: not JSON ({error})", hint=_HINT) from error
        item, kind = _item(record, where)
        items.append(item)
        kinds.add(kind)
        if len(kinds) > 1:
            raise TextError(f"{where}: the lines before are of another kind of question", hint="one kind a file")
    if not items:
        raise TextError(f"{path} has no question", hint=_HINT)
    return Task(path.stem, kinds.pop(), tuple(items))


def _item(record: Any, where: str) -> tuple[Item, str]:
    if not isinstance(record, dict):
        raise TextError(f"{where}: not an object", hint=_HINT)
    context = next((record[k] for k in ("question", "context", "prompt") if k in record), None)
    if not isinstance(context, str) or not context:
        raise TextError(f'{where}: no string under "question", "context" or "prompt"', hint=_HINT)
    choices, answer = record.get("choices"), record.get("answer")
    if "choices" not in record:
        if not isinstance(answer, str) or not answer.strip():
            raise TextError(f'{where}: no string under "answer"', hint=_HINT)
        return Item(context, (_spaced(context, answer),)), "exact-match"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise TextError(f'{where}: "choices" is no list of two or more strings', hint=_HINT)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise TextError(f'{where}: "answer" is no position in "choices" (0 to {len(choices) - 1})', hint=_HINT)
    return Item(context, tuple(_spaced(context, c) for c in choices), answer), "multiple-choice"


def _spaced(context: str, answer: str) -> str:
    return answer if context[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def run_task(
    models: dict[str, Graph],
    task: Task,
    tokenizer: Any,
    *,
    length: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Accuracy of every model on the same questions.

    A choice's likelihood is the sum of log p of its tokens after the context, and, normalised, that over its characters (as
    lm-evaluation-harness's ``acc`` and ``acc_norm``). An exact match is an answer whose every token is the model's likeliest next one:
    what greedy generation would begin with.

    Args:
        models: decoders by name, ``"dense"`` among them.
        length: tokens a model may see; longer contexts lose their beginning.

    Returns:
        ``kind``, ``items``, ``accuracy`` (and ``accuracy_normalised``, ``chance`` of multiple choice): model -> share of right answers;
        ``difference``: model -> that less the dense model's; ``intervals``: of ``accuracy``, ``accuracy_normalised`` and
        ``difference``, the last paired by question.
    """
    right: dict[str, dict[str, list[bool]]] = {}
    for position, item in enumerate(task.items):
        pairs = [_encode(tokenizer, item.context, choice, length) for choice in item.choices]
        for name, graph in models.items():
            scores = _score(graph, pairs)
            marks = right.setdefault(name, {"accuracy": [], "accuracy_normalised": []})
            if task.kind == "exact-match":
                marks["accuracy"].append(scores[0][1])
                continue
            totals = torch.tensor([total for total, _ in scores])
            lengths = torch.tensor([max(len(c.strip()), 1) for c in item.choices])
            marks["accuracy"].append(int(totals.argmax()) == item.answer)
            marks["accuracy_normalised"].append(int((totals / lengths).argmax()) == item.answer)
        if progress is not None:
            progress(f"task {task.name}", position + 1, len(task.items))
    values = {n: {f: torch.tensor(v, dtype=torch.float64) for f, v in marks.items() if v} for n, marks in right.items()}
    figures: dict[str, Any] = {"kind": task.kind, "items": len(task.items), "intervals": {}}
    if task.kind == "multiple-choice":
        figures["chance"] = sum(1 / len(i.choices) for i in task.items) / len(task.items)
    for figure in values["dense"]:
        figures[figure] = {n: float(v[figure].mean()) for n, v in values.items()}
        figures["intervals"][figure] = {n: interval(v[figure]) for n, v in values.items()}
    others = {n: v["accuracy"] - values["dense"]["accuracy"] for n, v in values.items() if n != "dense"}
    figures["difference"] = {n: float(v.mean()) for n, v in others.items()}
    figures["intervals"]["difference"] = {n: interval(v) for n, v in others.items()}
    figures["intervals"] = {f: kept for f, v in figures["intervals"].items() if (kept := {n: i for n, i in v.items() if i is not None})}
    return figures


def _encode(tokenizer: Any, context: str, choice: str, length: int) -> tuple[list[int], list[int]]:
    """(tokens before, tokens of the answer): where the answer changes how the context's end is cut, that end belongs to it."""
    before, whole = (tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (context, context + choice))
    common = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole) - 1))
    if common < 1:
        raise TextError(f"the question {context[:40]!r} has no token of its own before the answer")
    answer = whole[common:]
    if len(answer) >= length:
        raise TextError(f"an answer of {len(answer)} tokens does not fit into {length}")
    return whole[:common][-(length + 1 - len(answer)) :], answer


@torch.no_grad()
def _score(graph: Graph, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(log-likelihood, whether every token is the likeliest) of each answer; answers of one token share the pass over their context."""
    found: list[tuple[float, bool]] = []
    known: dict[tuple[int, ...], Tensor] = {}
    for before, answer in pairs:
        ids = tuple(before + answer[:-1])
        if ids not in known:
            known[ids] = graph(**{graph.inputs[0].name: torch.tensor([ids])})[0, len(before) - 1 :].float().log_softmax(-1)
        logp, target = known[ids], torch.tensor(answer)
        found.append((float(logp.gather(1, target[:, None]).sum()), bool((logp.argmax(1) == target).all())))
    return found
