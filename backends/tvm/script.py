"""TVMScript's parser, without its reading of sources.

The parser looks up the stack of Python's frames at every macro it expands, for a variable of one of them, and asks :mod:`inspect` for it:
that finds the module and the source of each frame, half of the time it takes to make a kernel. Here are the same frames without.
"""

from __future__ import annotations

import inspect
import linecache
from types import FrameType, SimpleNamespace

from tvm.script.parser.core.parser import ScriptMacro
from tvm.tirx.script.parser import entry


class Frame:
    """What the parser asks of an :class:`inspect.FrameInfo`."""

    def __init__(self, frame: FrameType) -> None:
        self.frame, self.lineno = frame, frame.f_lineno

    @property
    def code_context(self) -> list[str] | None:
        line = linecache.getline(self.frame.f_code.co_filename, self.lineno, self.frame.f_globals)
        return [line] if line else None


def stack() -> list[Frame]:
    """As :func:`inspect.stack`: the caller's frame first."""
    frames, frame = [], inspect.currentframe()
    while frame is not None and (frame := frame.f_back) is not None:
        frames.append(Frame(frame))
    return frames


def find_parser(macro: ScriptMacro) -> object:
    """The parser that expands a macro: a global of one of the frames that called it."""
    for found in stack():
        if (parser := found.frame.f_globals.get(ScriptMacro.parser_object_name)) is not None:
            return parser
    raise RuntimeError(f"{ScriptMacro.parser_object_name} not available")


ScriptMacro._find_parser_def = find_parser
entry.inspect = SimpleNamespace(**vars(inspect) | {"stack": stack})
