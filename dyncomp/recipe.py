"""Recipes: named pass lists, with the active fraction left open."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from dyncomp.errors import RequestError
from dyncomp.passes import QuantizeCache  # importing the package registers the passes by name
from dyncomp.passes.quantize import PRECISIONS, quantize_of
from dyncomp.pipeline import Pass, parse_passes


class Recipe(BaseModel):
    """A pass list; ``{active}`` and ``{experts}`` in it stand for the values the user gives, ``{shared}`` for a
    third of the experts that a token has.

    Args:
        name: for people.
        passes: as in ``carve-experts{experts=16}, fit-router{active=75%}``.
        active: what to use when the user gives none.
        experts: the same; None is what suits the model's FFNs, see :func:`suitable_experts`.
        made: of a preset, how its experts are made: carved (parts of each FFN) or upcycled (copies of it, with noise).
        otherwise: its passes where they are made in the other way; ``NAME:carved`` or ``NAME:upcycled`` asks for it.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "custom"
    passes: str
    active: float = 0.75
    experts: int | None = None
    made: Literal["", "carved", "upcycled"] = ""
    otherwise: str = ""

    def made_as(self, made: str) -> Recipe:
        """This preset with its experts ``carved`` or ``upcycled``.

        Raises:
            RequestError: it has only one way, or there is no such way.
        """
        if made not in MADE or not self.otherwise:
            what = f"is {self.made} only" if self.made and made in MADE else f"cannot be {made!r}"
            both = ", ".join(r.name for r in RECIPES.values() if r.otherwise)
            raise RequestError(f"the recipe {self.name!r} {what}", hint=f"carved or upcycled, as in mixtral-8x2:upcycled: {both}")
        passes = self.passes if made == self.made else self.otherwise
        return self.model_copy(update={"name": f"{self.name}:{made}", "passes": passes, "made": made, "otherwise": ""})

    def resolve(
        self, *, active: float | None = None, experts: int | None = None, quantize: str | None = None, kv_cache: str | None = None,
        widths: Sequence[int] = (),
    ) -> list[Pass]:  # fmt: skip
        """The passes with every placeholder filled in.

        Args:
            widths: of the model's FFNs, where they are known.
            quantize: a name in :data:`~dyncomp.passes.quantize.PRECISIONS`; its passes are added at the end.
            kv_cache: a name in :data:`CACHES`; its pass is added after that.

        Raises:
            RequestError: an unknown pass or option.
        """
        for option, value in (("active", active), ("experts", experts)):
            if value is not None and f"{{{option}}}" not in self.passes and self.passes:
                raise RequestError(f"the recipe {self.name!r} fixes what --{option} says", hint=f"leave out --{option}: {self.passes}")
        count = experts or self.experts or suitable_experts(widths)
        spec = self.passes.replace("{active}", f"{active or self.active:g}").replace("{experts}", str(count))
        spec = spec.replace("{shared}", str(int(count * (active or self.active) / 3)))
        passes = parse_passes(spec)
        if quantize is None and kv_cache is None and not passes:
            raise RequestError(f"the recipe {self.name!r} changes nothing by itself", hint="add --quantize int8, int4 or mixed")
        if quantize is not None:
            if quantize not in PRECISIONS:
                raise RequestError(f"unknown precision {quantize!r}", hint=f"precisions: {', '.join(PRECISIONS)}")
            if quantize_of(passes) is not None:
                raise RequestError(f"the recipe {self.name!r} quantizes already", hint="leave out --quantize")
            passes += PRECISIONS[quantize]
        if kv_cache is not None:
            if kv_cache not in CACHES:
                raise RequestError(f"unknown precision {kv_cache!r} of a KV cache", hint=f"precisions: {', '.join(CACHES)}")
            if any(p in passes for p in CACHES.values()):
                raise RequestError(f"the recipe {self.name!r} quantizes the KV cache already", hint="leave out --kv-cache")
            passes.append(CACHES[kv_cache])
        return passes


MADE = ("carved", "upcycled")
CACHES: dict[str, Pass] = {"int8": QuantizeCache()}
"""What ``--kv-cache`` takes."""


def most_experts(widths: Iterable[int], numbers: Iterable[int], block: int = 1) -> int | None:
    """The largest of ``numbers`` that divides FFNs of all these widths into experts of whole blocks of neurons; None when there is none."""
    width = math.gcd(*widths)
    return max((n for n in numbers if width % (n * block) == 0), default=None)


def suitable_experts(widths: Sequence[int]) -> int:
    """How many experts FFNs of these widths are best carved into: many lose less, kernels and blocks of quantized weights want a
    multiple of 32 neurons in each. 16 where nothing fits; at most 64."""
    if not widths:
        return 16
    return most_experts(widths, range(16, 65), block=32) or most_experts(widths, range(2, 17)) or 16


_STOCK = "fit-router{active={active} gates=topk bias=false temper=4}, refit-down{bias=false}"


def _preset(
    name: str, *, experts: int, k: int, shared: int = 0, keep_dense: str = "", copies: str = "", made: str = "carved", temper: int = 0
) -> Recipe:
    """Experts in the numbers of a system people know: ``k`` of ``experts`` run, ``shared`` of them for every token.

    Args:
        temper: of ``fit-router``, for carved ones: where the stock class that holds them cannot tell scores apart that it makes colder.
        copies: options of ``upcycle``, where its experts and those that run are not as many as carved ones.
    """
    carve = f"carve-experts{{experts={experts} shared={shared} keep-dense={keep_dense}}}"
    carved = f"{carve}, fit-router{{gates=topk k={k} bias=false temper={temper}}}, refit-down{{bias=false}}"
    both = {"carved": carved, "upcycled": f"upcycle{{{copies or f'experts={experts} k={k}'}}}"}
    passes = both.pop(made)
    return Recipe.model_validate({"name": name, "passes": passes, "made": made, "otherwise": next(iter(both.values()))})


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="experts", passes="carve-experts{experts={experts} shared={shared}}, fit-router{active={active}}, refit-down"),
        Recipe(
            name="experts-topk",
            passes="carve-experts{experts={experts} shared={shared}}, fit-router{active={active} gates=topk}, refit-down",
        ),
        Recipe(name="depth", passes="skip-depth{active={active}}", active=0.875),
        Recipe(name="dense", passes=""),
        Recipe(name="sparse", passes="sparsify{active={active}}"),
        Recipe(name="static", passes="prune-static{active={active}}"),
        # What checkpoints of stock architectures hold as it is (`dyncomp export --backend hf`): top-k, gates by softmax, no biases.
        Recipe(name="granite-moe", passes="carve-experts{experts={experts} shared={shared} keep-dense=}, " + _STOCK),
        Recipe(name="qwen-moe", passes="carve-experts{experts={experts} shared={shared}}, " + _STOCK),
        _preset("mixtral-8x2", experts=8, k=2),
        _preset("gpt4-16x2", experts=16, k=2),
        # Upcycled, fine-grained experts are eighths of an FFN, some of them shared and the others copied: a token runs an FFN's worth.
        _preset("qwen-moe-64x8", experts=64, shared=4, k=8, copies="experts=64 k=8 parts=8 shared=4"),
        _preset("ds-moe", experts=64, shared=2, k=8, keep_dense="0", copies="experts=62 k=8 parts=8 shared=2 keep-dense=0", temper=4),
        # 1 shared and 7 of 56 experts, from 4 of 8 groups; carved, 8 of 56 beside 8 shared ones. Sigmoid scores, normalised weights and a
        # bias that chooses, which `heal` moves with balance-rate=0.001.
        Recipe(
            name="deepseek-v3",
            passes="upcycle{experts=57 k=8 parts=8 shared=1 gates=deepseek-v3 groups=8 kept=4 keep-dense=0}",
            made="upcycled",
            otherwise="carve-experts{experts=64 shared=8 keep-dense=0}, fit-router{gates=deepseek-v3 k=16 groups=8 kept=4}, refit-down",
        ),
        # An eighth of the tokens in every other layer (2404.02258).
        Recipe(name="mod-12.5", passes="skip-depth{blocks=alternate active=56.25%}"),
        # For `dyncomp heal`, with balance=0.01 and capacity=1.25 there.
        _preset("switch", experts=8, k=1, made="upcycled"),
        Recipe(name="soft-moe", passes="soft-moe{experts=8 slots=4}", made="upcycled"),
    )
}
DEFAULT = "experts"


def load_recipe(name: str | None) -> Recipe:
    """A recipe by name, or from a TOML file with the fields of :class:`Recipe`. A preset's name may end in ``:carved`` or ``:upcycled``.

    Raises:
        RequestError: no such recipe, or the file is not one.
    """
    if name is None or name in RECIPES:
        return RECIPES[name or DEFAULT]
    preset, colon, made = name.rpartition(":")
    if colon and preset in RECIPES:
        return RECIPES[preset].made_as(made)
    path = Path(name).expanduser()
    known = f'recipes: {", ".join(RECIPES)}; or a TOML file with passes = "…"'
    if not path.is_file():
        raise RequestError(f"there is no recipe {name!r}, and no such file", hint=known)
    try:
        return Recipe.model_validate({"name": path.stem} | tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise RequestError(f"{path} is not a recipe: {str(error).splitlines()[0]}", hint=known) from error
