"""WAV files: PCM of 8 to 64 bits and floating point, of any rate and number of channels, as float32 samples of one channel."""

from __future__ import annotations

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.errors import SoundError

Samples = np.ndarray[Any, np.dtype[np.float32]]
RATES = (1_000, 768_000)
"""Samples a second that are believed."""
_HINT = "give a .wav file; others are converted by, for example, `ffmpeg -i FILE -ar 16000 a.wav`"


def read_wav(path: Path) -> tuple[Samples, int]:
    """The mean of a file's channels.

    Returns:
        (float32 [samples], full scale is 1; samples a second).

    Raises:
        SoundError: it is missing, no WAV file, truncated, empty, at a rate beyond :data:`RATES`, or holds what is no number.
    """
    from scipy.io import wavfile

    try:
        data = path.read_bytes()
    except OSError as error:
        raise SoundError(f"{path} cannot be read: {error.strerror or error}", hint=_HINT) from error
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise SoundError(f"{path} is not a WAV file", hint=_HINT)
    (size,) = struct.unpack_from("<I", data, 4)
    if len(data) < size + 8:
        raise SoundError(f"{path} is truncated: it has {len(data)} of {size + 8} bytes", hint=_HINT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no sound
            rate, values = wavfile.read(io.BytesIO(data))
    except Exception as error:  # damage has many forms
        raise SoundError(f"{path} is damaged, or of a kind that is not read: {error}", hint=_HINT) from error
    if not RATES[0] <= rate <= RATES[1]:
        raise SoundError(f"{path} is damaged: {rate} samples a second", hint=_HINT)
    if not values.size:
        raise SoundError(f"{path} holds no samples", hint=_HINT)
    samples = values.astype(np.float32)
    if values.dtype == np.uint8:  # the only integers without a sign
        samples = (samples - 128) / 128
    elif values.dtype.kind == "i":
        samples /= -float(np.iinfo(values.dtype).min)
    if not np.isfinite(samples).all():
        raise SoundError(f"{path} is damaged: it holds samples that are no numbers", hint=_HINT)
    return samples.reshape(len(samples), -1).mean(1), rate


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """Samples at another rate, by a polyphase filter (``scipy.signal.resample_poly``), which lets no frequency through that the lower
    rate cannot hold."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(samples, wanted // common, rate // common), np.float32)
