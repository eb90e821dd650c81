"""Questions: against what a model says by definition, and files that are no questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.tiny import VOCAB, trace_tiny
from dyncomp.errors import TextError
from dyncomp.tasks import Item, Task, load_task, run_task


class Characters:
    """One token a character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCAB for c in text]}


def test_choices_are_ranked_by_the_likelihood_of_their_tokens() -> None:
    graph, other = trace_tiny("llama"), trace_tiny("gpt2")
    items = tuple(Item(f"question {i}", (" a", " longer one", " bc"), i % 3) for i in range(9))
    figures = run_task({"dense": graph, "converted": other}, Task("t", "multiple-choice", items), Characters(), length=64)
    for name, model in (("dense", graph), ("converted", other)):
        right = {"accuracy": 0, "accuracy_normalised": 0}
        for item in items:
            totals = []
            for choice in item.choices:
                ids = torch.tensor([Characters()(item.context + choice)["input_ids"]])
                logp = model(ids)[0].log_softmax(-1)
                totals.append(sum(float(logp[t - 1, ids[0, t]]) for t in range(len(item.context), ids.shape[1])))
            right["accuracy"] += max(range(3), key=lambda c: totals[c]) == item.answer
            right["accuracy_normalised"] += max(range(3), key=lambda c: totals[c] / len(item.choices[c].strip())) == item.answer
        for figure, count in right.items():
            assert figures[figure][name] == pytest.approx(count / len(items))
    assert figures["difference"]["converted"] == pytest.approx(figures["accuracy"]["converted"] - figures["accuracy"]["dense"])
    low, high = figures["intervals"]["difference"]["converted"]
    assert low <= figures["difference"]["converted"] <= high
    assert figures["chance"] == pytest.approx(1 / 3)


def test_an_exact_match_is_what_greedy_generation_says() -> None:
    graph, prompt = trace_tiny("llama"), "a prompt"
    ids = Characters()(prompt)["input_ids"]
    for _ in range(3):
        ids.append(int(graph(torch.tensor([ids]))[0, -1].argmax()))
    said = "".join(map(chr, ids[len(prompt) :]))
    wrong = said[:2] + chr((ord(said[2]) + 1) % VOCAB)
    task = Task("t", "exact-match", (Item(prompt, (said,)), Item(prompt, (wrong,))))
    figures = run_task({"dense": graph}, task, Characters(), length=64)
    assert figures["accuracy"]["dense"] == 0.5
    assert "chance" not in figures


def test_long_questions_lose_their_beginning_not_their_end() -> None:
    graph = trace_tiny("llama")
    choices = (" a", " b")
    long, short = Item("x" * 40 + "the end", choices), Item("xxxxxthe end", choices)
    scores = [run_task({"dense": graph}, Task("t", "multiple-choice", (i,)), Characters(), length=13) for i in (long, short)]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]


def test_files_are_read_and_bad_lines_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    good = {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good) + "\n")
    task = load_task(str(file))
    assert (task.kind, len(task.items), task.items[0]) == ("multiple-choice", 2, Item("2 + 2 =", (" 3", " 4"), 1))
    file.write_text(json.dumps({"prompt": "two plus two is\n", "answer": "4"}))
    assert load_task(str(file)).items[0] == Item("two plus two is\n", ("4",))
    wrong = [{"question": "q"}, {"choices": ["a", "b"], "answer": 0}, {"question": "q", "choices": ["a"], "answer": 0}, []]
    wrong += [{"question": "q", "choices": ["a", "b"], "answer": answer} for answer in (2, True, "a")]
    for bad in ("nonsense", *map(json.dumps, wrong)):
        file.write_text(json.dumps(good) + "\n" + bad)
        with pytest.raises(TextError, match="line 2"):
            load_task(str(file))
    file.write_text("\n")
    with pytest.raises(TextError, match="no question"):
        load_task(str(file))
    with pytest.raises(TextError, match="topics"):
        load_task("nonexistent")


def test_topics_are_stories_with_their_labels() -> None:
    task = load_task("topics", count=50)
    assert len(task.items) == 50
    assert load_task("topics", count=50) == task
    assert len({item.answer for item in load_task("topics", count=200).items}) == 5
    assert all(len(item.choices) == 5 and item.context.endswith("is") for item in task.items)
