"""The native operators, held to PyTorch on the decoded weights and to an emulation of their arithmetic."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from dyncomp.backends.attention import reaching_back
from dyncomp.backends.native import (
    ACTIVATION_CODES,
    pack_codes,
    pack_floats,
    pack_lower,
    pack_scales,
    unavailable_reason,
    unpack_codes,
)
from dyncomp.backends.native.build import available
from dyncomp.backends.ort.native import library
from hypothesis import given, settings
from hypothesis import strategies as st

from dyncomp import quantized
from dyncomp.activations import ACTIVATIONS
from dyncomp.errors import BackendError
from dyncomp.interpret import round_activations, screened
from dyncomp.ops import cached_attention, decode_entries, encode_entries, rotary, routed_ffn_reference, threshold_gates, topk_gates

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
Array = np.ndarray[Any, Any]
Tensors = dict[str, Array | None]
_TYPES = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10}
pytestmark = pytest.mark.skipif(not available(), reason=unavailable_reason() or "")


# ---- what the tests run ------------------------------------------------------------------------------------------
def isas() -> list[str]:
    """The kernels this processor can run."""
    cpu = Path("/proc/cpuinfo")
    flags = set(cpu.read_text().split()) if cpu.exists() else set()
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= flags
    return ["portable", *(["avx2"] if {"avx2", "fma", "f16c"} <= flags else []), *(["avx512"] if wide else [])]


class Native:
    """The library with one kind of kernels. They are chosen when it is loaded: each kind needs a copy of the file."""

    def __init__(self, isa: str, folder: Path) -> None:
        self.path = folder / f"{isa}.so"
        shutil.copy(library(), self.path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DYNCOMP_NATIVE_ISA", isa)
            self.handle = ctypes.CDLL(str(self.path))
        self.handle.dyncomp_native_isa.restype = ctypes.c_char_p

    def run(self, op: str, inputs: Tensors, constants: Tensors, threads: int = 1, **attributes: int) -> Array:
        """Run one operator: ``inputs`` are fed, ``constants`` are in the model, None is an absent input."""
        result: Array = self.session(op, inputs, constants, threads, ["y"], attributes).run(None, feeds(inputs))[0]
        return result

    def session(
        self, op: str, inputs: Tensors, constants: Tensors, threads: int, outputs: list[str], attributes: Mapping[str, float],
        later: Sequence[Any] = (),
    ) -> Any:  # fmt: skip
        """A model of one operator. ``later``: the types of the outputs after the first, where they are not all floats."""
        types = [1, *(_TYPES[np.dtype(t).name] for t in later), *[1] * len(outputs)]
        helper, numpy_helper = onnx.helper, onnx.numpy_helper
        given = {k: v for k, v in {**inputs, **constants}.items() if v is not None}
        names = [n if n in given else "" for n in [*inputs, *constants]]
        values = {k: v if isinstance(v, float) else int(v) for k, v in attributes.items()}
        node = helper.make_node(op, names, outputs, domain="dyncomp", **values)
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info(k, _TYPES[v.dtype.name], [None] * v.ndim) for k, v in feeds(inputs).items()],
            [helper.make_tensor_value_info(k, t, None) for k, t in zip(outputs, types, strict=False)],
            [numpy_helper.from_array(v, k) for k, v in constants.items() if v is not None],
        )  # fmt: skip
        imports = [helper.make_opsetid("", 20), helper.make_opsetid("dyncomp", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        options.register_custom_ops_library(str(self.path))
        model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
        return ort.InferenceSession(model, options)


def feeds(inputs: Tensors) -> dict[str, Array]:
    return {k: v for k, v in inputs.items() if v is not None}


@pytest.fixture(scope="module", params=isas())
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(request.param, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(isas()[-1], tmp_path_factory.mktemp("native"))


class Quantized:
    """Random quantized matrices [*lead, rows, columns]: as the operators take them, and decoded."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], bits: int, block: int, asymmetric: bool) -> None:
        *lead, rows, columns = shape
        self.bits, self.block = bits, block
        self.codes = rng.integers(0 if asymmetric or bits == 4 else 1, 2**bits, shape, dtype=np.uint8)
        if asymmetric:
            self.codes[..., 0, :] = 0 if rows % 2 else 2**bits - 1  # the extremes
        groups = (*lead, rows, columns // block)
        self.scales = (rng.uniform(0.5, 2.0, groups) / (2**bits * columns**0.5)).astype(np.float16)
        middle = 2 ** (bits - 1)
        self.offsets = (self.scales * -rng.uniform(0, 2 * middle, groups)).astype(np.float16) if asymmetric else None
        self.integers = self.codes.astype(np.int32) - (0 if asymmetric else middle)
        self.values = self.integers * self.scales.astype(np.float64).repeat(block, -1)
        if self.offsets is not None:
            self.values += self.offsets.astype(np.float64).repeat(block, -1)

    def packed(self, prefix: str = "") -> Tensors:
        return {
            f"{prefix}codes": pack_codes(self.codes, self.bits),
            f"{prefix}scales": pack_scales(self.scales),
            f"{prefix}offsets": None if self.offsets is None else pack_scales(self.offsets),
        }

    def halves(self) -> Tensors:
        """Upper halves of 8-bit codes, and the lower ones."""
        value = self.value.upper()
        packed = {"codes": pack_codes(value.codes.numpy(), 4), "scales": pack_scales(value.scales.numpy())}
        assert value.offsets is not None
        return packed | {"offsets": pack_scales(value.offsets.numpy())}

    @property
    def value(self) -> quantized.Quantized:
        offsets = None if self.offsets is None else torch.from_numpy(self.offsets)
        return quantized.Quantized(torch.from_numpy(self.codes), torch.from_numpy(self.scales), offsets, self.bits)

    def __getitem__(self, e: int) -> Quantized:
        one = object.__new__(Quantized)
        one.block, one.integers, one.scales = self.block, self.integers[e], self.scales[e]
        one.offsets = None if self.offsets is None else self.offsets[e]
        return one


def emulate(x: Array, w: Quantized) -> Array:
    """x [T, K] -> [T, N] with activations as the kernels quantize them, the sums in float64."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 32)
    peak = np.abs(blocks).max(-1, keepdims=True)
    safe = np.where(peak > 0, peak, np.float32(1))
    codes = np.rint(blocks * (np.float32(127) / safe)) * (peak > 0)
    dots = np.einsum("tbk,nbk->tnb", codes.astype(np.float64), w.integers.reshape(len(w.integers), -1, 32).astype(np.float64))
    scales, steps = w.scales.astype(np.float64).repeat(w.block // 32, -1), (peak[..., 0] / np.float32(127)).astype(np.float64)
    y: Array = np.einsum("tnb,tb,nb->tn", dots, steps, scales)
    if w.offsets is not None:
        y += np.einsum("tb,nb->tn", codes.sum(-1, dtype=np.float64) * steps, w.offsets.astype(np.float64).repeat(w.block // 32, -1))
    return y


def error(actual: Array, expected: Array) -> Array:
    """[..]: each deviation over the largest expected magnitude."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    assert np.isfinite(actual).all()
    return np.abs(actual - expected) / np.abs(expected).max(initial=1e-30)


def mean_error(actual: Array, expected: Array) -> float:
    """Root mean square of the deviations over that of the expected values."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    return float(np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean()))


# ---- layout ------------------------------------------------------------------------------------------------------
@given(st.data())
@settings(max_examples=30, deadline=None)
def test_codes_unpack_to_what_was_packed(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    shape = (*data.draw(st.sampled_from([(), (1,), (3,), (2, 2)])), data.draw(st.integers(1, 40)), 32 * data.draw(st.integers(1, 4)))
    codes = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2**bits, shape, dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (*shape[:-2], -(-shape[-2] // 16), shape[-1] // 32, 64 * bits)
    assert np.array_equal(unpack_codes(packed, shape[-2], bits), codes)


def test_a_tile_is_16_rows_of_4_columns_after_the_other() -> None:
    codes = (np.arange(16 * 32) % 251).astype(np.uint8).reshape(16, 32)
    assert np.array_equal(pack_codes(codes, 8)[0, 0].reshape(8, 16, 4), codes.reshape(16, 8, 4).transpose(1, 0, 2))
    small = codes & 15
    pairs = small.reshape(16, 4, 2, 4).transpose(1, 2, 0, 3)
    assert np.array_equal(pack_codes(small, 4)[0, 0].reshape(4, 16, 4), pairs[:, 0] | pairs[:, 1] << 4)
    assert pack_scales(np.ones((17, 3))).shape == (2, 3, 16)
    assert pack_scales(np.ones((17, 3)))[1, :, 1:].max() == 0


@pytest.mark.parametrize(("columns", "bits", "top"), [(33, 8, 255), (32, 5, 1), (32, 4, 16)])
def test_what_cannot_be_packed_is_refused(columns: int, bits: int, top: int) -> None:
    with pytest.raises(ValueError):
        pack_codes(np.full((16, columns), top, np.uint8), bits)
    with pytest.raises(ValueError, match="float16"):
        pack_scales(np.full((16, 1), 1e6))


# ---- QuantizedLinear ---------------------------------------------------------------------------------------------
def linear(native: Native, x: Array, w: Quantized, bias: Array | None = None, threads: int = 1, terms: int = 1) -> Array:
    rows, columns = w.values.shape
    constants = {**w.packed(), "bias": bias}
    attributes = {"rows": rows, "columns": columns, "bits": w.bits, "block": w.block, "terms": terms}
    return native.run("QuantizedLinear", {"x": x}, constants, threads, **attributes)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear(native: Native, bits: int, block: int, asymmetric: bool) -> None:
    rng = np.random.default_rng(bits + block)
    for tokens, rows in [(1, 1), (2, 16), (3, 17), (7, 33), (8, 32), (9, 100), (33, 48), (100, 40)]:
        w = Quantized(rng, (rows, 256), bits, block, asymmetric)
        x = rng.standard_normal((tokens, 256), np.float32) * 10.0 ** rng.integers(-4, 4, (tokens, 1)).astype(np.float32)
        bias = rng.standard_normal(rows, np.float32) if rows % 2 else None
        y = linear(native, x, w, bias)
        plus = 0 if bias is None else bias
        scale = np.abs(x).max(1)[:, None]  # tokens differ in size
        assert error((y - plus) / scale, emulate(x, w) / scale).max() < (1e-5 if bias is None else 1e-3)
        assert error(y, emulate(x, w) + plus).max() < 1e-5
        if rows >= 16:
            assert mean_error((y - plus) / scale, (x.astype(np.float64) @ w.values.T) / scale) < 2e-2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_in_two_terms(native: Native, bits: int, threads: int) -> None:
    rng = np.random.default_rng(bits)
    for tokens, rows in [(1, 16), (2, 17), (1, 2000), (65, 33), (130, 100)]:  # more than are computed together
        w = Quantized(rng, (rows, 256), bits, 32, True)
        x, bias = rng.standard_normal((tokens, 256), np.float32), rng.standard_normal(rows, np.float32)
        y, exact = linear(native, x, w, bias, threads, terms=2), x.astype(np.float64) @ w.values.T + bias
        assert error(y, exact).max() < 1e-4
        assert error(y, exact).max() < 0.02 * error(linear(native, x, w, bias, threads), exact).max()
        assert np.array_equal(linear(native, x[:1], w, bias, terms=2), y[:1])


def screened_linear(native: Native, x: Array, w: Quantized, margin: float, bias: Array | None = None, threads: int = 1) -> Array:
    rows, columns = w.values.shape
    constants = {**w.halves(), "bias": bias, "lower": pack_lower(w.codes, w.scales)}
    attributes: dict[str, Any] = {"rows": rows, "columns": columns, "bits": 4, "block": w.block, "terms": 1, "margin": margin}
    return native.run("QuantizedLinear", {"x": x}, constants, threads, **attributes)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_lower_halves_count_where_products_are_large(native: Native, block: int, asymmetric: bool) -> None:
    rng = np.random.default_rng(block)
    for tokens, rows, columns in [(1, 1, 256), (1, 17, 128), (2, 48, 640), (3, 1000, 384), (70, 100, 128), (1, 9000, 128)]:
        w = Quantized(rng, (rows, columns), 8, block, asymmetric)
        x, bias = rng.standard_normal((tokens, columns), np.float32), rng.standard_normal(rows, np.float32)
        decoded, rounded = torch.from_numpy(w.values).float(), round_activations(torch.from_numpy(x))
        spread = float((x @ w.values.T).std())
        for margin in (0.0, spread, 1e9):
            y = screened_linear(native, x, w, margin, bias)
            expected = screened(rounded, w.value, decoded, torch.from_numpy(bias), margin).numpy()
            assert error(y, expected).max() < 2e-3  # of the offsets, in float16
            assert np.array_equal(y, screened_linear(native, x, w, margin, bias, threads=2))
        whole, rough = linear(native, x, w, bias), screened_linear(native, x, w, 0.0, bias)
        assert error(y, whole).max() < 2e-3
        if rows >= 48:
            assert error(rough, whole).max() > 1e-2


def test_lower_halves_with_what_is_no_number_and_without_their_matrix(native: Native) -> None:
    w = Quantized(np.random.default_rng(0), (40, 64), 8, 32, False)
    x = np.random.default_rng(1).standard_normal((2, 64), np.float32)
    x[0, 3] = np.nan
    y = screened_linear(native, x, w, 1e9)
    assert np.isnan(y[0]).all()
    assert error(y[1:], linear(native, x[1:], w)).max() < 2e-3
    rest = {"bias": None, "lower": pack_lower(w.codes, w.scales)}
    with pytest.raises(Exception, match="QuantizedLinear: lower halves belong to 4 bits with offsets"):
        native.run("QuantizedLinear", {"x": x}, {**w.packed(), **rest}, rows=40, columns=64, bits=8, block=32, terms=1)
    rest["lower"] = pack_lower(w.codes, w.scales)[:-1]
    with pytest.raises(Exception, match="the input lower has"):
        native.run("QuantizedLinear", {"x": x}, {**w.halves(), **rest}, rows=40, columns=64, bits=4, block=32, terms=1)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_linear_of_any_shape(best: Native, data: st.DataObject) -> None:
    bits, block = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([32, 64, 128]))
    rows, columns, tokens = data.draw(st.integers(1, 70)), block * data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    w = Quantized(rng, (rows, columns), bits, block, data.draw(st.booleans()))
    x = rng.standard_normal((tokens, columns), np.float32)
    assert error(linear(best, x, w), emulate(x, w)).max() < 1e-5


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_linear_under_gates_of_any_rows(native: Native, data: st.DataObject) -> None:
    """Gates of the first rows, or of all; what is computed under closed gates shows nowhere, and no weight is read where all are closed."""
    bits, block = data.draw(st.sampled_from([4, 8])), data.draw(st.sampled_from([32, 64]))
    rows, columns = data.draw(st.integers(1, 150)), block * data.draw(st.integers(1, 3))
    tokens, threads = data.draw(st.one_of(st.integers(1, 9), st.integers(90, 110))), data.draw(st.integers(1, 2))
    gated = 16 * data.draw(st.integers(0, rows // 16))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    w, x = Quantized(rng, (rows, columns), bits, block, data.draw(st.booleans())), rng.standard_normal((tokens, columns), np.float32)
    bias = rng.standard_normal(rows, np.float32) if data.draw(st.booleans()) else None
    values = np.array(data.draw(st.sampled_from([(0,), (1,), (0, 1), (0, 0, 1, 1, 0.3, -0.7)])), np.float32)
    gates = rng.choice(values, (tokens, 1))
    expected, end = emulate(x, w) + (0 if bias is None else bias), gated or rows
    expected[:, :end] *= gates
    if end == rows:
        x[gates[:, 0] == 0] = np.nan
    inputs: Tensors = {"x": x, **w.packed(), "bias": bias, "lower": None, "gates": gates}
    if not gates.any():
        inputs["scales"][: -(-end // 16)] = np.nan  # type: ignore[index]
    y = native.run("QuantizedLinear", inputs, {}, threads, rows=rows, columns=columns, bits=bits, block=block, terms=1, gated=gated)
    assert error(y, expected).max(initial=0) < 1e-5
    assert not y[gates[:, 0] == 0, :end].any()


def test_linear_keeps_leading_dimensions_and_takes_no_tokens(native: Native) -> None:
    rng = np.random.default_rng(0)
    w = Quantized(rng, (20, 64), 8, 32, False)
    x = rng.standard_normal((2, 3, 64), np.float32)
    y = linear(native, x, w)
    assert y.shape == (2, 3, 20)
    assert np.array_equal(y.reshape(6, 20), linear(native, x.reshape(6, 64), w))
    assert np.array_equal(y[1, 2], linear(native, x[1, 2], w))
    assert linear(native, x[:, :0], w).shape == (2, 0, 20)


def test_scales_below_the_normal_half_floats(native: Native) -> None:
    w = Quantized(np.random.default_rng(0), (16, 64), 8, 32, False)
    w.scales = np.full_like(w.scales, 3e-7)
    x = np.ones((1, 64), np.float32)
    assert error(linear(native, x, w), emulate(x, w)).max() < 1e-5
    w.scales[1] = 0
    assert linear(native, x, w)[0, 1] == 0


def test_zeros_stay_zero_and_what_is_no_number_shows(native: Native) -> None:
    w = Quantized(np.random.default_rng(0), (16, 64), 8, 32, False)
    x = np.zeros((5, 64), np.float32)
    x[1, 3], x[2, 3], x[3, 40], x[4, 3] = np.nan, np.inf, -np.inf, 1e-40
    y = linear(native, x, w)
    assert (y[0] == 0).all()
    assert np.isnan(y[1:4]).all()
    assert (np.abs(y[4]) < 1e-37).all()


def test_threads_change_nothing(native: Native) -> None:
    rng = np.random.default_rng(0)
    w = Quantized(rng, (1000, 256), 4, 32, True)
    for tokens in (1, 5, 200):
        x = rng.standard_normal((tokens, 256), np.float32)
        assert np.array_equal(linear(native, x, w, threads=2), linear(native, x, w))


# ---- QuantizedFFN ------------------------------------------------------------------------------------------------
class Experts:
    """Random experts, how to run them, and what they should give."""

    def __init__(
        self, rng: np.random.Generator, *, experts: int = 3, d: int = 128, neurons: int = 128, rows: int = 72, gated: bool = True,
        activation: str = "silu", bits: int = 8, block: int = 32, asymmetric: bool = False, biased: bool = False,
    ) -> None:  # fmt: skip
        self.gated, self.activation, self.neurons = gated, activation, neurons
        self.up = Quantized(rng, (experts, neurons * (2 if gated else 1), d), bits, block, asymmetric)
        self.down = Quantized(rng, (experts, rows, neurons), bits, block, asymmetric)
        self.bias = rng.standard_normal(self.up.values.shape[:2], np.float32) if biased else None

    def run(self, native: Native, x: Array, gates: Array | None, threads: int = 1, k: int = 0, **more: Array) -> Array:
        experts, rows, neurons = self.down.values.shape
        code = ACTIVATION_CODES.get(self.activation, 99)
        constants = {**self.up.packed("up_"), "up_bias": self.bias, **self.down.packed("down_")}
        constants |= {name: more.get(name) for name in ("router", "router_bias", "down_bias", "base")} if more else {}
        return native.run(
            "QuantizedFFN", {"x": x, "gates": gates}, constants, threads, experts=experts, columns=self.up.values.shape[2],
            neurons=neurons, rows=rows, gated=self.gated, activation=code, bits=self.up.bits, block=self.up.block,
            k=k,
        )  # fmt: skip

    def reference(self, x: Array, gates: Array | None) -> Array:
        gates = np.ones((len(x), len(self.up.values))) if gates is None else gates
        tensors = [torch.from_numpy(np.asarray(a, np.float64)) for a in (x, gates, self.up.values, self.down.values)]
        bias = None if self.bias is None else torch.from_numpy(self.bias.astype(np.float64))
        return routed_ffn_reference(*tensors[:3], bias, tensors[3], self.activation).numpy()

    def emulation(self, x: Array, gates: Array | None) -> Array:
        gates = np.ones((len(x), len(self.up.values))) if gates is None else gates
        y = np.zeros((len(x), self.down.values.shape[1]))
        for e in range(gates.shape[1]):
            h = emulate(x, self.up[e]) + (0 if self.bias is None else self.bias[e])
            active = ACTIVATIONS[self.activation](torch.from_numpy(h[:, : self.neurons])).numpy()
            y += emulate(active * (h[:, self.neurons :] if self.gated else 1) * gates[:, e : e + 1], self.down[e])
        return y

    def check(self, native: Native, x: Array, gates: Array | None) -> None:
        y = self.run(native, x, gates)
        if self.down.values.shape[1] >= 64:
            assert mean_error(y, self.reference(x, gates)) < 2e-2
        off = error(y, self.emulation(x, gates))
        assert np.median(off) < 1e-5  # a hidden activation halfway between two codes may go the other way
        assert off.max() < 5e-3


def random_gates(rng: np.random.Generator, tokens: int, experts: int) -> Array:
    """Zero, one, negative and other gates; the second token has none."""
    gates = rng.choice(np.array([0, 0, 1, 1, 0.3, -0.7], np.float32), (tokens, experts))
    gates[0, 0] = 1
    if tokens > 1:
        gates[1] = 0
    return gates


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_ffn(native: Native, bits: int, block: int, asymmetric: bool) -> None:
    rng = np.random.default_rng(bits + block)
    for tokens, gated, biased in [(1, True, False), (2, False, True), (3, True, True), (8, True, False), (33, False, False)]:
        ffn = Experts(rng, gated=gated, biased=biased, bits=bits, block=block, asymmetric=asymmetric)
        x = rng.standard_normal((tokens, 128), np.float32)
        gates = random_gates(rng, tokens, 3) if tokens % 2 or biased else None
        ffn.check(native, x, gates)


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_ffn_of_any_shape(best: Native, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    block = data.draw(st.sampled_from([32, 64]))
    experts, tokens, d = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20)), block * data.draw(st.integers(1, 3))
    ffn = Experts(
        rng, experts=experts, d=d, neurons=block * data.draw(st.integers(1, 3)), rows=data.draw(st.integers(1, 40)), block=block,
        gated=data.draw(st.booleans()), activation=data.draw(st.sampled_from(["silu", "gelu", "relu"])),
        bits=data.draw(st.sampled_from([4, 8])), asymmetric=data.draw(st.booleans()), biased=data.draw(st.booleans()),
    )  # fmt: skip
    ffn.check(best, rng.standard_normal((tokens, d), np.float32), random_gates(rng, tokens, experts) if data.draw(st.booleans()) else None)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_router_inside_chooses_as_gates_would(native: Native, tokens: int) -> None:
    rng = np.random.default_rng(0)
    ffn, x = Experts(rng, experts=5), rng.standard_normal((tokens, 128), np.float32)
    router, bias, down = (
        rng.standard_normal((5, 128), np.float32),
        rng.standard_normal(5, np.float32) * 5,
        rng.standard_normal(72, np.float32),
    )
    gates = (x.astype(np.float64) @ router.T + bias > 0).astype(np.float32)
    y = ffn.run(native, x, None, 2, router=router, router_bias=bias, down_bias=down)
    assert error(y, ffn.run(native, x, gates) + down).max() < 1e-6
    assert (ffn.run(native, x, None, router=router, router_bias=bias * 0 - 1e9, down_bias=down) == down).all()


# ---- FloatFFN ----------------------------------------------------------------------------------------------------
class FloatExperts:
    """Random experts with float weights, how to run them, and what they should give."""

    def __init__(
        self, rng: np.random.Generator, *, experts: int = 3, d: int = 100, neurons: int = 72, rows: int = 60, gated: bool = True,
        activation: str = "silu", biased: bool = False,
    ) -> None:  # fmt: skip
        self.gated, self.activation, self.neurons = gated, activation, neurons
        self.up = rng.standard_normal((experts, neurons * (2 if gated else 1), d), np.float32) / np.float32(d**0.5)
        self.down = rng.standard_normal((experts, rows, neurons), np.float32) / np.float32(neurons**0.5)
        self.bias = rng.standard_normal(self.up.shape[:2], np.float32) if biased else None

    def run(self, native: Native, x: Array, gates: Array | None, threads: int = 1, k: int = 0, **more: Array) -> Array:
        experts, rows, neurons = self.down.shape
        up = pack_floats(self.up.reshape(experts, -1, neurons, self.up.shape[2]))
        constants = {"up": up, "up_bias": self.bias, "down": pack_floats(self.down)}
        constants |= {name: more.get(name) for name in ("router", "router_bias", "down_bias", "base")}
        return native.run(
            "FloatFFN", {"x": x, "gates": gates}, constants, threads, experts=experts, columns=self.up.shape[2], neurons=neurons,
            rows=rows, gated=self.gated, activation=ACTIVATION_CODES.get(self.activation, 99), k=k,
        )  # fmt: skip

    def reference(self, x: Array, gates: Array | None) -> Array:
        gates = np.ones((len(x), len(self.up))) if gates is None else gates
        tensors = [torch.from_numpy(np.asarray(a, np.float64)) for a in (x, gates, self.up, self.down)]
        bias = None if self.bias is None else torch.from_numpy(self.bias.astype(np.float64))
        return routed_ffn_reference(*tensors[:3], bias, tensors[3], self.activation).numpy()

    def check(self, native: Native, x: Array, gates: Array | None, threads: int = 1) -> None:
        assert error(self.run(native, x, gates, threads), self.reference(x, gates)).max() < 5e-6


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_float_ffn(native: Native, gated: bool, biased: bool) -> None:
    rng = np.random.default_rng(0)
    for tokens, d, neurons, rows in [
        (1, 576, 96, 576),
        (1, 5, 3, 1),
        (2, 33, 17, 40),
        (7, 16, 64, 100),
        (13, 300, 65, 31),
        (120, 260, 40, 72),
    ]:
        ffn = FloatExperts(rng, d=d, neurons=neurons, rows=rows, gated=gated, biased=biased)
        x = rng.standard_normal((tokens, d), np.float32)
        ffn.check(native, x, random_gates(rng, tokens, 3) if tokens != 2 else None)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_float_ffn_of_any_shape(best: Native, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sizes = {name: data.draw(st.integers(1, 150)) for name in ("d", "neurons", "rows")}
    experts, tokens = data.draw(st.integers(1, 6)), data.draw(st.one_of(st.integers(1, 8), st.integers(40, 110)))
    ffn = FloatExperts(
        rng, experts=experts, **sizes, gated=data.draw(st.booleans()), activation=data.draw(st.sampled_from(["silu", "gelu", "relu"])),
        biased=data.draw(st.booleans()),
    )  # fmt: skip
    x = rng.standard_normal((tokens, sizes["d"]), np.float32)
    ffn.check(best, x, random_gates(rng, tokens, experts) if data.draw(st.booleans()) else None, data.draw(st.integers(1, 2)))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_float_ffn_with_each_activation(best: Native, activation: str) -> None:
    rng = np.random.default_rng(0)
    FloatExperts(rng, activation=activation, gated=len(activation) % 2 == 0, biased=True).check(
        best, rng.standard_normal((9, 100), np.float32), None
    )


def test_float_ffn_with_a_router_and_a_bias(native: Native) -> None:
    rng = np.random.default_rng(0)
    for tokens in (1, 50):
        ffn, router, bias = FloatExperts(rng, experts=9), Router(rng, tokens, 9, 100), rng.standard_normal(60, np.float32)
        for k in (0, 2, 9):
            y = ffn.run(native, router.x, None, 2, k, router=router.router, router_bias=router.bias, down_bias=bias)
            assert error(y, ffn.reference(router.x, router.gates(k)) + bias).max() < 5e-6
        assert (ffn.run(native, router.x, np.zeros((tokens, 9), np.float32), down_bias=bias) == bias).all()


def test_float_ffn_threads_and_neighbours_change_nothing(native: Native) -> None:
    rng = np.random.default_rng(0)
    ffn = FloatExperts(rng, experts=8, rows=200)
    for tokens in (1, 70):
        x, gates = rng.standard_normal((tokens, 100), np.float32), random_gates(rng, tokens, 8)
        y = ffn.run(native, x, gates)
        assert np.array_equal(ffn.run(native, x, gates, threads=2), y)
        assert np.array_equal(ffn.run(native, x[None, :1], gates[None, :1]), y[None, :1])
    x[2], gates[2] = np.nan, 0
    assert (ffn.run(native, x, gates)[2] == 0).all()
    assert ffn.run(native, x[:0], gates[:0]).shape == (0, 200)


def test_wrong_float_ffns_are_refused(best: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, x = FloatExperts(rng), np.zeros((2, 100), np.float32)
    with pytest.raises(Exception, match="FloatFFN: the input gates has 8 elements; it should have 6"):
        ffn.run(best, x, np.ones((2, 4), np.float32))
    with pytest.raises(Exception, match="the last dimension of x is 64; it should be 100"):
        ffn.run(best, x[:, :64], None)
    with pytest.raises(Exception, match="a router comes with its bias"):
        ffn.run(best, x, None, router=np.zeros((3, 100), np.float32))
    ffn.gated = False
    with pytest.raises(Exception, match="the input up has 48000 elements; it should have 24000"):
        ffn.run(best, x, None)
    ffn.activation = "other"
    with pytest.raises(Exception, match="the activation has no function of that code"):
        ffn.run(best, x, None)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_an_ffn_is_added_to(native: Native, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kind, rows = data.draw(st.sampled_from([Experts, FloatExperts])), data.draw(st.integers(1, 70))
    tokens, experts = data.draw(st.one_of(st.integers(1, 8), st.integers(40, 60))), data.draw(st.integers(1, 3))
    ffn = kind(rng, experts=experts, d=64, neurons=32, rows=rows, gated=data.draw(st.booleans()), biased=data.draw(st.booleans()))
    x, base = rng.standard_normal((tokens, 64), np.float32), 1e3 * rng.standard_normal((tokens, rows), np.float32)
    gates = random_gates(rng, tokens, experts) * data.draw(st.sampled_from([0, 1]))
    bias = rng.standard_normal(rows, np.float32) if data.draw(st.booleans()) else np.zeros(rows, np.float32)
    more: Any = {"down_bias": bias} if bias.any() else {}
    alone, y = ffn.run(native, x, gates, **more), ffn.run(native, x, gates, data.draw(st.integers(1, 2)), base=base, **more)
    assert error(y, base + alone).max() < 1e-6
    assert np.array_equal(y[~gates.any(1)], (base + bias)[~gates.any(1)])
    with pytest.raises(Exception, match=f"the input base has {(tokens + 1) * rows} elements; it should have {tokens * rows}"):
        ffn.run(native, x, gates, base=np.zeros((tokens + 1, rows), np.float32))


# ---- routers inside ----------------------------------------------------------------------------------------------
class Router:
    """A router whose scores are exact in float32, and no two of which are equal for a token."""

    def __init__(self, rng: np.random.Generator, tokens: int, experts: int, d: int) -> None:
        self.x = rng.integers(-4, 5, (tokens, d)).astype(np.float32)
        self.router = rng.integers(-4, 5, (experts, d)).astype(np.float32)
        self.bias = rng.permutation(experts).astype(np.float32) / experts

    def gates(self, k: int) -> Array:
        scores = torch.nn.functional.linear(*(torch.from_numpy(a).double() for a in (self.x, self.router, self.bias)))
        gates = topk_gates(scores, k) if k else threshold_gates(scores)
        return gates.float().numpy()

    def check(self, native: Native, ffn: Any, k: int, threads: int = 1) -> None:
        y = ffn.run(native, self.x, None, threads, k, router=self.router, router_bias=self.bias)
        assert np.array_equal(y, ffn.run(native, self.x, self.gates(k), threads))


@pytest.mark.parametrize(("tokens", "experts"), [(1, 16), (2, 5), (7, 9), (13, 64), (100, 256)])
def test_a_router_inside_opens_the_best_as_torch_would(native: Native, tokens: int, experts: int) -> None:
    rng = np.random.default_rng(experts)
    ffn, router = Experts(rng, experts=experts, d=64, neurons=32, rows=16), Router(rng, tokens, experts, 64)
    for k in sorted({0, 1, experts // 4, experts - 1, experts}):
        router.check(native, ffn, k, threads=2)


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_a_router_of_any_shape(best: Native, data: st.DataObject) -> None:
    rng, experts, d = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.integers(1, 40)), 32 * data.draw(st.integers(1, 4))
    ffn = Experts(rng, experts=experts, d=d, neurons=32, rows=16)
    Router(rng, data.draw(st.integers(1, 30)), experts, d).check(best, ffn, data.draw(st.integers(0, experts)))


def test_equal_scores_open_as_many_experts_the_first_of_them(native: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, x, router = Experts(rng, experts=6), rng.standard_normal((3, 128), np.float32), np.zeros((6, 128), np.float32)
    for bias, k, opened in [
        ([0, 0, 0, 0, 0, 0], 4, [0, 1, 2, 3]),
        ([0, 2, -0.0, 2, 0, 1], 3, [1, 3, 5]),
        ([-0.0, -1, 0, 5, -0.0, 0], 3, [0, 2, 3]),
        ([1, np.nan, np.inf, 3, -np.inf, 2], 2, [1, 2]),  # a NaN is the highest, as in torch.topk
        ([np.nan, 1, np.nan, np.nan, 2, 3], 2, [0, 2]),
        ([-np.inf] * 6, 1, [0]),
    ]:
        gates = np.zeros((3, 6), np.float32)
        gates[:, opened] = 1
        y = ffn.run(native, x, None, k=k, router=router, router_bias=np.array(bias, np.float32))
        assert np.array_equal(y, ffn.run(native, x, gates)), (bias, k)


def test_a_score_that_is_no_number_is_not_positive(native: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, x, router = Experts(rng), rng.standard_normal((2, 128), np.float32), np.zeros((3, 128), np.float32)
    y = ffn.run(native, x, None, router=router, router_bias=np.array([np.nan, 1, -1], np.float32))
    assert np.array_equal(y, ffn.run(native, x, np.array([[0, 1, 0]] * 2, np.float32)))


@pytest.mark.parametrize("k", [-1, 4])
def test_a_k_that_cannot_be_is_refused(best: Native, k: int) -> None:
    with pytest.raises(Exception, match="k is negative, or there are not so many experts"):
        Experts(np.random.default_rng(0)).run(best, np.zeros((2, 128), np.float32), None, k=k)


def test_a_router_beside_gates_or_without_bias_is_refused(best: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, x, router, bias = Experts(rng), np.zeros((2, 128), np.float32), np.zeros((3, 128), np.float32), np.zeros(3, np.float32)
    for gates, more in ((np.ones((2, 3), np.float32), {"router": router, "router_bias": bias}), (None, {"router": router})):
        with pytest.raises(Exception, match="a router comes with its bias, and in place of gates"):
            ffn.run(best, x, gates, **more)


def test_a_token_without_experts_gives_zeros_and_others_do_not_see_it(native: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, x = Experts(rng), rng.standard_normal((4, 128), np.float32)
    assert (ffn.run(native, x, np.zeros((4, 3), np.float32)) == 0).all()
    x[2] = np.nan
    gates = np.ones((4, 3), np.float32)
    gates[2] = 0
    y = ffn.run(native, x, gates)
    assert (y[2] == 0).all()
    assert np.array_equal(y[3:], ffn.run(native, x[3:], gates[3:]))
    assert np.array_equal(ffn.run(native, x[None, :2], gates[None, :2]), y[None, :2])


def test_ffn_threads_change_nothing(native: Native) -> None:
    rng = np.random.default_rng(0)
    ffn = Experts(rng, experts=8, neurons=64, rows=200, bits=4)
    for tokens in (1, 64):
        x, gates = rng.standard_normal((tokens, 128), np.float32), random_gates(rng, tokens, 8)
        assert np.array_equal(ffn.run(native, x, gates, threads=2), ffn.run(native, x, gates))


def test_sessions_in_several_threads_do_not_disturb_each_other(native: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, sizes = Experts(rng), [1, 40, 3, 17, 8, 33, 2, 25]
    inputs = [(rng.standard_normal((n, 128), np.float32), random_gates(rng, n, 3)) for n in sizes]
    expected = [ffn.run(native, x, gates) for x, gates in inputs]
    with ThreadPoolExecutor(4) as pool:
        for y, right in zip(pool.map(lambda i: ffn.run(native, *i), inputs * 5), expected * 5, strict=True):
            assert np.array_equal(y, right)


def test_activation_codes_cover_the_table() -> None:
    assert set(ACTIVATION_CODES) == set(ACTIVATIONS)
    assert sorted(ACTIVATION_CODES.values()) == list(range(len(ACTIVATIONS)))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_are_exact_to_a_few_units(native: Native, activation: str) -> None:
    """One neuron of one: act(x[0]) * x[32] with both the largest of their blocks, so that quantizing changes nothing."""
    ffn = Experts(np.random.default_rng(0), experts=1, d=64, neurons=32, rows=1, activation=activation)
    for w, ones in ((ffn.up, [(0, 0), (32, 32)]), (ffn.down, [(0, 0)])):
        w.codes[:], w.scales[:] = 128, 1
        for row, column in ones:
            w.codes[0, row, column] = 129
    x = np.zeros((4001, 64), np.float32)
    x[:, 0], x[:, 32] = np.linspace(-20, 20, len(x)), 1
    v = x[:, 0].astype(np.float64)
    expected = ACTIVATIONS[activation](torch.from_numpy(v)).numpy()
    if activation == "gelu":  # PyTorch's formulas cancel for negative numbers, even in float64
        expected = v * scipy.special.ndtr(v)
    if activation == "gelu_tanh":
        expected = v * scipy.special.expit(2 * (2 / np.pi) ** 0.5 * (v + 0.044715 * v**3))
    y = ffn.run(native, x, None)[:, 0]
    normal = np.abs(expected) > 1e-30
    assert (np.abs(y - expected)[normal] / np.abs(expected[normal])).max() < 2e-5  # v itself is off by 6e-8
    assert np.abs(y - expected)[~normal].max(initial=0) < 1e-30
    near = np.abs(v) < 4
    assert (np.abs(y - expected)[normal & near] / np.abs(expected[normal & near])).max() < 2e-6


# ---- QuantizedEmbedding ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_embedding(native: Native, bits: int, asymmetric: bool) -> None:
    w = Quantized(np.random.default_rng(0), (50, 128), bits, 64, asymmetric)
    for ids in (np.arange(50), np.array([[49, 0, 3], [7, 7, 48]]), np.array(5), np.zeros((2, 0), np.int64)):
        y = native.run("QuantizedEmbedding", {"ids": ids}, w.packed(), rows=50, columns=128, bits=bits, block=64)
        assert np.array_equal(y, w.values[ids].astype(np.float32))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("block", "columns"), [(32, 576), (64, 128), (128, 2176)])
def test_embedding_of_halves(native: Native, block: int, columns: int, asymmetric: bool) -> None:
    w = Quantized(np.random.default_rng(0), (50, columns), 8, block, asymmetric)
    ids, constants = np.array([[49, 0, 3], [7, 7, 48]]), {**w.halves(), "lower": pack_lower(w.codes, w.scales)}
    y = native.run("QuantizedEmbedding", {"ids": ids}, constants, rows=50, columns=columns, bits=4, block=block)
    assert error(y, w.values[ids]).max() < 5e-4


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_ids_out_of_range_are_refused(best: Native, bad: int) -> None:
    w = Quantized(np.random.default_rng(0), (50, 128), 8, 32, False)
    with pytest.raises(Exception, match=f"QuantizedEmbedding: the id {bad} is not in 0 .. 49"):
        best.run("QuantizedEmbedding", {"ids": np.array([3, bad])}, w.packed(), rows=50, columns=128, bits=8, block=32)


# ---- CachedAttention ---------------------------------------------------------------------------------------------
class Attention:
    """Random queries, keys, values and caches; what the operator makes of them, and PyTorch. Beyond their entries caches hold NaNs.

    ``caches`` have an entry at each position, the operator's only those of tokens that are present, side by side."""

    def __init__(
        self, rng: np.random.Generator, *, past: Sequence[int] = (0,), length: int = 1, group: int = 3, kv_heads: int = 2,
        head_dim: int = 32, capacity: int = 0, rotated: int = 32, interleaved: bool = False, packed: bool = True, window: int = 0,
        softcap: float = 0.0, absent: float = 0.0, coded: bool = False, biased: bool = False, closed: float = 0.0,
    ) -> None:  # fmt: skip
        self.coded, self.op = coded, "QuantizedCachedAttention" if coded else "CachedAttention"
        self.past, self.length, self.packed = np.array(past, np.int64), length, packed
        self.capacity = capacity or max(past) + length
        self.shapes = [(len(past), length, n, head_dim) for n in (kv_heads * group, kv_heads, kv_heads)]
        self.new = [rng.standard_normal(s, np.float32) * 2 for s in self.shapes]
        self.caches = [rng.standard_normal((len(past), kv_heads, self.capacity, head_dim), np.float32) for _ in range(2)]
        for cache in self.caches:
            for row, n in enumerate(past):
                cache[row, :, n:] = np.nan
        if coded:
            self.caches = [encode_entries(torch.from_numpy(c)).numpy() for c in self.caches]
        self.bias = rng.standard_normal((kv_heads * group, self.capacity), np.float32) * 2 if biased else None
        marks = rng.random((len(past), 1, self.capacity, 1)) >= absent
        self.present = marks.astype(np.float32) if absent else None
        self.gates = np.where(rng.random((len(past), length, 1)) < closed, 0, rng.standard_normal()).astype(np.float32) if closed else None
        angles = np.arange(self.capacity)[:, None] * 100.0 ** -(np.arange(rotated // 2) / max(rotated // 2, 1))
        self.tables = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
        self.attributes: dict[str, float] = {
            "heads": kv_heads * group, "kv_heads": kv_heads, "interleaved": interleaved, "window": window, "scale": 0.21,
            "softcap": float(softcap),
        }  # fmt: skip

    def inputs(self) -> Tensors:
        flat = [t.reshape(*t.shape[:2], t.shape[2] * t.shape[3]) for t in self.new]
        query, key, value = (np.concatenate(flat, -1), None, None) if self.packed else flat
        cos, sin = self.tables if self.tables[0].size else (None, None)
        return {
            "query": query, "key": key, "value": value, **self._side_by_side(),
            "past_length": self.past, "cos": cos, "sin": sin, "present": self.present,
            "bias": None if self.bias is None else reaching_back(torch.from_numpy(self.bias)).numpy(), "gates": self.gates,
        }  # fmt: skip

    def run(self, native: Native, threads: int = 1, in_place: bool = False) -> list[Array]:
        inputs, outputs = self.inputs(), ["out", "new_key_cache", "new_value_cache"]
        session = native.session(self.op, inputs, {}, threads, outputs, self.attributes, (self.caches[0].dtype,) * 2)
        if not in_place:
            return self._at_positions(*session.run(None, feeds(inputs)))
        arrays = {k: v.copy() for k, v in feeds(inputs).items()}
        binding, values = session.io_binding(), {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in arrays.items()}  # share the memory
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("out")
        for name in ("key_cache", "value_cache"):
            binding.bind_ortvalue_output(f"new_{name}", values[name])
        session.run_with_iobinding(binding)
        return self._at_positions(binding.get_outputs()[0].numpy(), arrays["key_cache"], arrays["value_cache"])

    def kept(self, row: int, first: int, last: int) -> Array:
        """The positions first … last - 1 of a row whose tokens are present."""
        every = np.arange(first, last)
        return every if self.present is None else every[self.present[row, 0, first:last, 0] != 0]

    def _side_by_side(self) -> dict[str, Array]:
        caches = [self._empty() for _ in self.caches]
        for cache, full in zip(caches, self.caches, strict=True):
            for row, n in enumerate(self.past):
                kept = self.kept(row, 0, n)
                cache[row, :, : len(kept)] = full[row][:, kept]
        return {"key_cache": caches[0], "value_cache": caches[1]}

    def _at_positions(self, out: Array, *caches: Array) -> list[Array]:
        result, untouched = [c.copy() for c in self.caches], self._empty()
        for full, cache in zip(result, caches, strict=True):
            for row, n in enumerate(self.past):
                kept = self.kept(row, 0, n + self.length)
                full[row][:, kept] = cache[row, :, : len(kept)]
                assert np.array_equal(cache[row, :, len(kept) :].view(np.uint8), untouched[row, :, len(kept) :].view(np.uint8))
        return [out, *result]

    def _empty(self) -> Array:
        nothing = np.full((len(self.past), self.shapes[1][2], self.capacity, self.shapes[1][3]), np.nan, np.float32)
        return encode_entries(torch.from_numpy(nothing)).numpy() if self.coded else nothing

    def reference(self) -> list[Array]:
        positions = torch.from_numpy(self.past[:, None] + np.arange(self.length))
        q, k, v = (torch.from_numpy(t.astype(np.float64)).transpose(1, 2) for t in self.new)
        cos, sin = (torch.from_numpy(t.astype(np.float64)) for t in self.tables)
        q, k = (rotary(t, cos, sin, positions, bool(self.attributes["interleaved"])) for t in (q, k))
        caches = [torch.from_numpy(np.nan_to_num(c).astype(np.float64)) for c in self.caches]  # PyTorch multiplies what it masks
        settings = 0.21, int(self.attributes["window"]), self.attributes["softcap"]
        present = torch.from_numpy(self.present) if self.present is not None else None
        bias = None if self.bias is None else torch.from_numpy(self.bias).double()
        out, *caches = cached_attention(q, k, v, *caches, torch.from_numpy(self.past), *settings, present, bias)
        flat = out.transpose(1, 2).flatten(2).numpy()
        return [flat if self.gates is None else flat * (self.gates != 0), *(c.numpy() for c in caches)]

    def check(self, native: Native, threads: int = 1, in_place: bool = False) -> None:
        actual = self.run(native, threads, in_place)
        if self.coded:
            return self._check_coded(*actual)
        expected = self.reference()
        assert error(actual[0], expected[0]).max() < 1e-5
        for i in (1, 2):
            for row, n in enumerate(self.past):
                new = self.kept(row, n, n + self.length)
                assert np.array_equal(actual[i][row, :, :n], self.caches[i - 1][row, :, :n])
                assert error(actual[i][row][:, new], expected[i][row][:, new]).max(initial=0) < 1e-6
                assert np.isnan(actual[i][row, :, n + self.length :]).all()

    def _check_coded(self, out: Array, *caches: Array) -> None:
        """New entries are rounded as ``encode_entries`` does, and the output is the attention over what the caches then hold."""
        positions = torch.from_numpy(self.past[:, None] + np.arange(self.length))
        new = [torch.from_numpy(t).transpose(1, 2) for t in self.new[1:]]
        new[0] = rotary(new[0], *(torch.from_numpy(t) for t in self.tables), positions, bool(self.attributes["interleaved"]))
        floats = [np.nan_to_num(decode_entries(torch.from_numpy(c)).double().numpy()) for c in caches]
        for before, after, fresh in zip(self.caches, caches, new, strict=True):
            for row, n in enumerate(self.past):
                new_at = self.kept(row, n, n + self.length)
                written, made = after[row][:, new_at], fresh[row][:, new_at - n]
                scales = made.abs().amax(-1, keepdim=True).numpy() / 127
                assert error(written[..., -4:].view(np.float32), scales).max(initial=0) < 1e-6
                # Kernels round their own keys, which are off the graph's by a few ulps: a near tie may fall to either side.
                assert (np.abs(written[..., :-4].view(np.int8) - made.numpy() / scales) < 0.5 + 1e-3).all()
                after[row, :, n : n + self.length] = before[row, :, n : n + self.length]
            assert np.array_equal(after, before)  # nothing else was written
        self.caches = floats
        self.new[1:] = [np.stack([v[row, :, n : n + self.length] for row, n in enumerate(self.past)]).transpose(0, 2, 1, 3) for v in floats]
        tables, self.tables = self.tables, [t[:, :0] for t in self.tables]
        self.new[0] = rotary(torch.from_numpy(self.new[0]).double().transpose(1, 2), *(torch.from_numpy(t).double() for t in tables),
                             positions, bool(self.attributes["interleaved"])).transpose(1, 2).numpy()  # fmt: skip
        assert error(out, self.reference()[0]).max(initial=0) < 1e-5


@pytest.mark.parametrize("group", range(1, 9))
def test_attention_of_groups(native: Native, group: int) -> None:
    rng = np.random.default_rng(group)
    for length in (1, 2, 70):
        Attention(rng, past=(5, 0, 61), length=length, group=group, capacity=140).check(native)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(16, 0), (16, 16), (64, 64), (80, 20), (96, 6), (256, 128)])
def test_attention_with_rotary_embeddings(native: Native, head_dim: int, rotated: int, interleaved: bool, packed: bool) -> None:
    rng = np.random.default_rng(head_dim)
    for past, length in [((0,), 33), ((40, 3), 1)]:
        Attention(
            rng, past=past, length=length, head_dim=head_dim, rotated=rotated, interleaved=interleaved, packed=packed, capacity=64
        ).check(native)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 1, 17, 300])
def test_attention_with_a_window_and_a_soft_cap(native: Native, window: int, softcap: float) -> None:
    rng = np.random.default_rng(window)
    for past, length in [((0,), 150), ((3, 130), 90), ((200, 7, 64), 1), ((500,), 1), ((400, 270), 5)]:
        Attention(rng, past=past, length=length, window=window, softcap=softcap).check(native, 2)


@pytest.mark.parametrize("group", [1, 3])
def test_attention_with_a_bias_by_distance(native: Native, group: int) -> None:
    rng = np.random.default_rng(group)
    for past, length, more in [
        ((0,), 150, {}),
        ((3, 130), 90, {"window": 17}),
        ((200, 7, 64), 1, {"softcap": 5.0}),
        ((500,), 1, {"absent": 0.3}),
        ((400, 270), 5, {"coded": True}),
    ]:
        Attention(rng, past=past, length=length, group=group, rotated=0, biased=True, **more).check(native, 2)


@pytest.mark.parametrize("absent", [0.2, 0.9, 1.0])
def test_attention_without_absent_tokens(native: Native, absent: float) -> None:
    rng = np.random.default_rng(int(10 * absent))
    for past, length in [((0,), 150), ((3, 130), 90), ((200, 7, 64), 1), ((900,), 1)]:
        attention = Attention(rng, past=past, length=length, absent=absent, window=50 if length == 90 else 0, softcap=5.0 * (length == 1))
        attention.check(native, 2)
        assert np.isfinite(attention.run(native)[0]).all()


@pytest.mark.parametrize("closed", [0.3, 0.9, 1.0])
def test_attention_computes_nothing_for_closed_queries(native: Native, closed: float) -> None:
    """Their keys and values are appended all the same; whatever their queries hold shows nowhere."""
    rng = np.random.default_rng(int(10 * closed))
    for past, length, more in [
        ((0,), 150, {}), ((3, 130), 90, {"window": 17}), ((200, 7, 64), 1, {"softcap": 5.0}), ((900,), 1, {"absent": 0.3}),
        ((400, 270), 5, {"coded": True}), ((40,), 60, {"biased": True}),
    ]:  # fmt: skip
        attention = Attention(rng, past=past, length=length, closed=closed, **more)
        attention.check(native, 2)
        assert attention.gates is not None
        attention = Attention(rng, past=past, length=length, closed=closed, **more)
        whole, attention.new[0] = attention.run(native), attention.new[0].copy()
        attention.new[0][(attention.gates == 0)[:, :, 0]] = np.nan
        for a, b in zip(attention.run(native, 2), whole, strict=True):
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
def test_attention_over_int8_caches(native: Native, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    for past, length, more in [
        ((0,), 90, {}),
        ((3, 130), 20, {"window": 17}),
        ((400, 7), 1, {"absent": 0.3}),
        ((500,), 1, {"softcap": 5.0}),
    ]:
        Attention(rng, past=past, length=length, head_dim=head_dim, rotated=16, coded=True, **more).check(native, 2, length == 1)


def test_an_int8_entry_with_what_is_no_number_shows_and_spoils_no_other(native: Native) -> None:
    attention = Attention(np.random.default_rng(0), past=(3, 3), length=4, coded=True, packed=False)
    attention.new[2][0, 3, 0, 5], attention.new[2][0, 2, 1] = np.inf, 0.0
    out, _, values = attention.run(native)
    assert np.isnan(out.reshape(2, 4, 2, 3, 32)[0, 3, 0]).all()
    assert np.isfinite(out.reshape(2, 4, 2, 3, 32)[0, :, 1]).all()
    assert np.isfinite(out[1]).all()
    assert not values[0, 1, 5].any()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_attention_of_any_shape(best: Native, data: st.DataObject) -> None:
    head_dim = 16 * data.draw(st.integers(1, 9))
    past = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    length = data.draw(st.one_of(st.integers(1, 5), st.integers(6, 200)))
    Attention(
        np.random.default_rng(data.draw(st.integers(0, 99))), past=past, length=length, head_dim=head_dim,
        group=data.draw(st.integers(1, 8)), kv_heads=data.draw(st.integers(1, 3)),
        capacity=max(past) + length + data.draw(st.integers(0, 20)),
        rotated=2 * data.draw(st.integers(0, head_dim // 2)), interleaved=data.draw(st.booleans()), packed=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([0, 0, 2, 40, 1000])), softcap=data.draw(st.sampled_from([0.0, 0.0, 20.0])),
        absent=data.draw(st.sampled_from([0.0, 0.0, 0.5])), coded=data.draw(st.booleans()),
        biased=data.draw(st.booleans()), closed=data.draw(st.sampled_from([0.0, 0.0, 0.3, 0.8])),
    ).check(best, data.draw(st.integers(1, 2)), data.draw(st.booleans()))  # fmt: skip


@pytest.mark.parametrize("length", [1, 100])
def test_attention_updates_caches_in_place_when_they_are_the_outputs(native: Native, length: int) -> None:
    attention = Attention(np.random.default_rng(0), past=(20, 3), length=length, capacity=130)
    attention.check(native, in_place=True)
    for a, b in zip(attention.run(native, in_place=True), attention.run(native), strict=True):
        assert np.array_equal(a, b, equal_nan=True)


def test_attention_threads_change_nothing(native: Native) -> None:
    rng = np.random.default_rng(0)
    for past, length in [((2000,), 1), ((10, 700), 1), ((0,), 300)]:
        attention = Attention(rng, past=past, length=length)
        for a, b in zip(attention.run(native, 2), attention.run(native), strict=True):
            assert np.array_equal(a, b, equal_nan=True)


def test_attention_rows_and_padding_do_not_spoil_others(native: Native) -> None:
    rng = np.random.default_rng(0)
    both = Attention(rng, past=(7, 30), length=12, capacity=50)
    clean = both.run(native)[0]
    both.new[0][0, 9:], both.new[1][1], both.new[2][1] = 1e30, np.nan, np.inf
    spoilt = both.run(native)[0]
    assert np.array_equal(spoilt[0, :9], clean[0, :9])
    assert np.isnan(spoilt[1]).any()


def test_attention_weighs_very_different_scores(native: Native) -> None:
    rng = np.random.default_rng(0)
    attention = Attention(rng, past=(300,), length=3)
    attention.new[0] *= 100
    attention.check(native)


def test_attention_of_no_tokens(native: Native) -> None:
    attention = Attention(np.random.default_rng(0), past=(4,), length=0, capacity=9)
    out, *caches = attention.run(native)
    assert out.shape == (1, 0, 192)
    assert np.array_equal(caches[1], attention.caches[1], equal_nan=True)


def test_wrong_attentions_are_refused(best: Native) -> None:
    def refused(message: str, *, change: Mapping[str, float] | None = None, inputs: Tensors | None = None, **options: Any) -> None:
        attention = Attention(np.random.default_rng(0), **{"past": (3,), "length": 2, **options})
        attention.attributes |= change or {}
        wrong = {**attention.inputs(), **(inputs or {})}
        outputs, caches = ["a", "b", "c"], (wrong["key_cache"].dtype,) * 2
        with pytest.raises(Exception, match=f"dyncomp.{attention.op}: {message}"):
            best.session(attention.op, wrong, {}, 1, outputs, attention.attributes, caches).run(None, feeds(wrong))

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, np.float32)

    refused("3 entries and 2 new ones exceed the cache's capacity of 4", capacity=4)
    refused("present should have a number for each of 1 rows and 5 entries", inputs={"present": zeros(1, 1, 4, 1)})
    refused("gates should have a number for each of 2 tokens", inputs={"gates": zeros(1, 3, 1)})
    refused("bias should have for each of 6 heads", inputs={"bias": zeros(5, 69)})
    refused("5 positions; the bias reaches over 4", inputs={"bias": zeros(6, 68)})
    refused("-1 entries and 2 new ones", inputs={"past_length": np.array([-1])})
    refused("5 positions; the tables have 4", inputs={"cos": zeros(4, 16), "sin": zeros(4, 16)})
    refused("the input past_length has 2 elements; it should have 1", inputs={"past_length": np.array([1, 1])})
    refused("cos and sin should both be there", inputs={"sin": None})
    refused("cos and sin .* at most 16", inputs={"cos": zeros(9, 17), "sin": zeros(9, 17)})
    refused("the query should have 3 dimensions", inputs={"value_cache": zeros(1, 2, 6, 32)})
    refused("the last dimension of query is 320; it should be 384", change={"heads": 8})
    refused("caches of 1 rows and 2 heads; there should be 1 and 1", change={"kv_heads": 1})
    refused(r"key and value .* shape \[1, 2, 64\]", packed=False, inputs={"value": zeros(1, 2, 32)})
    refused(r"key and value .* shape \[1, 2, 64\]", packed=False, inputs={"value": None})
    refused("heads of 24 features; a multiple of 16 up to 256", head_dim=24, rotated=0)
    refused("heads of 272 features", head_dim=272, rotated=0)
    refused("heads is no multiple of kv_heads", change={"heads": 5})
    refused("the window is negative", change={"window": -1})
    refused("heads of 24 features; a multiple of 16 up to 256", head_dim=24, rotated=0, coded=True)
    few = {name: np.zeros((1, 2, 6, 3), np.uint8) for name in ("key_cache", "value_cache")}
    refused("heads of 0 features", inputs=few, coded=True)


# ---- requests that cannot be served ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": 96}, "the last dimension of x is 64; it should be 96"),
        ({"rows": 40}, "the input codes has 2048 elements; it should have 3072"),
        ({"bits": 4}, "the input codes has 2048 elements; it should have 1024"),
        ({"bits": 3}, "bits is 3; it should be 4 or 8"),
        ({"block": 64}, "the input scales has 64 elements; it should have 32"),
        ({"block": 48}, "block is 48; it should be 32, 64 or 128"),
        ({"block": 128}, "64 columns are no multiple of the block, 128"),
        ({"rows": 0}, "a matrix of 0 rows and 64 columns"),
        ({"terms": 3}, "terms should be 1 or 2"),
        ({"gated": 24}, "gated is no multiple of 16, or there are not so many rows"),
        ({"gated": 32}, "gated is no multiple of 16, or there are not so many rows"),
    ],
)
def test_wrong_linears_are_refused(best: Native, change: dict[str, int], message: str) -> None:
    w = Quantized(np.random.default_rng(0), (20, 64), 8, 32, False)
    x, attributes = np.zeros((2, 64), np.float32), {"rows": 20, "columns": 64, "bits": 8, "block": 32, "terms": 1, **change}
    with pytest.raises(Exception, match=f"dyncomp.QuantizedLinear: {message}"):
        best.run("QuantizedLinear", {"x": x}, {**w.packed(), "bias": None}, **attributes)


def test_wrong_biases_offsets_and_missing_attributes_are_refused(best: Native) -> None:
    w = Quantized(np.random.default_rng(0), (20, 64), 8, 32, False)
    x, attributes = np.zeros((2, 64), np.float32), {"rows": 20, "columns": 64, "bits": 8, "terms": 1}
    with pytest.raises(Exception, match="the input bias has 19 elements; it should have 20"):
        best.run("QuantizedLinear", {"x": x}, {**w.packed(), "bias": np.zeros(19, np.float32)}, **attributes, block=32)
    with pytest.raises(Exception, match="the input offsets has 3 elements; it should have 64"):
        best.run("QuantizedLinear", {"x": x}, {**w.packed(), "offsets": np.zeros(3, np.float16)}, **attributes, block=32)
    with pytest.raises(Exception, match="block"):
        best.run("QuantizedLinear", {"x": x}, w.packed(), **attributes)


def test_wrong_ffns_are_refused(best: Native) -> None:
    rng = np.random.default_rng(0)
    ffn, x = Experts(rng), np.zeros((2, 128), np.float32)
    with pytest.raises(Exception, match="QuantizedFFN: the input gates has 8 elements; it should have 6"):
        ffn.run(best, x, np.ones((2, 4), np.float32))
    with pytest.raises(Exception, match="the last dimension of x is 64; it should be 128"):
        ffn.run(best, x[:, :64], None)
    ffn.gated = False
    with pytest.raises(Exception, match="the input up_codes has 98304 elements; it should have 49152"):
        ffn.run(best, x, None)
    ffn.activation = "other"
    with pytest.raises(Exception, match="the activation has no function of that code"):
        ffn.run(best, x, None)


# ---- the library -------------------------------------------------------------------------------------------------
def test_the_library_names_its_kernels(native: Native, request: pytest.FixtureRequest) -> None:
    assert native.handle.dyncomp_native_isa().decode() == request.node.callspec.params["native"]


def test_unknown_kernels_are_refused(tmp_path: Path) -> None:
    wrong = Native("sse9", tmp_path)
    assert wrong.handle.dyncomp_native_isa() == b""
    with pytest.raises(Exception, match="DYNCOMP_NATIVE_ISA is none of portable, avx2, avx512"):
        ort.SessionOptions().register_custom_ops_library(str(wrong.path))


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert not available()
    assert unavailable_reason() == "the C++ compiler that CXX names is not there: no-such-compiler --fast"
    with pytest.raises(BackendError, match="install g\\+\\+"):
        library(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unavailable_reason() == "there is no C++ compiler on this machine"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BackendError, match="cannot be written to") as caught:
        library(tmp_path / "file")
    assert "DYNCOMP_CACHE" in str(caught.value.hint)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "cc"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "note: something" >&2; echo "x.cc:1: error: no" >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BackendError, match=r"cannot compile the native operators: x.cc:1: error: no"):
        library(tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_stands_in_for_a_layer(native: Native, data: st.DataObject) -> None:
    """To the last bit what two operators give: the layer, and a linear expert under the opposite gates."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    bits, block = data.draw(st.sampled_from([(8, 32), (8, 64), (4, 32)]))
    rows, columns, neurons = 32 * data.draw(st.integers(1, 5)), block * data.draw(st.integers(1, 3)), block * data.draw(st.integers(1, 3))
    width, rank = 32 * data.draw(st.integers(1, 4)), 32 * data.draw(st.integers(1, 4))
    shape, threads = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20))), data.draw(st.integers(1, 2))
    x, z = (rng.standard_normal((*shape, d), np.float32) for d in (columns, width))
    gates = rng.choice(np.array(data.draw(st.sampled_from([[0], [1], [0, 1], [0, 0.5, 1]])), np.float32), (*shape, 1))
    asymmetric, offsets = data.draw(st.booleans()), data.draw(st.booleans())
    up, down = Quantized(rng, (1, rank, width), 8, 32, offsets), Quantized(rng, (1, rows, rank), 8, 32, offsets)
    bias = rng.standard_normal((1, rank), np.float32) if data.draw(st.booleans()) else None
    plain: dict[str, int] = {"gated": 0, "activation": ACTIVATION_CODES["identity"]}
    other = {"columns": width, "neurons": rank, "bits": 8, "block": 32}
    stand_in = {**up.packed("up_"), "up_bias": bias, **down.packed("down_")}
    if data.draw(st.booleans()):
        op, w = "QuantizedLinear", Quantized(rng, (rows, columns), bits, block, asymmetric)
        layer: Tensors = {**w.packed(), "bias": rng.standard_normal(rows, np.float32), "lower": None, "gates": gates}
        settings_of: dict[str, int] = {"rows": rows, "columns": columns, "bits": bits, "block": block, "terms": 1}
        rest: Tensors = {}
    else:
        op, inner = "QuantizedFFN", Quantized(rng, (1, 2 * neurons, columns), bits, block, asymmetric)
        outer = Quantized(rng, (1, rows, neurons), bits, block, asymmetric)
        layer = {"gates": gates, **inner.packed("up_"), "up_bias": None, **outer.packed("down_"), "router": None, "router_bias": None}
        rest = {"down_bias": rng.standard_normal(rows, np.float32), "base": rng.standard_normal((*shape, rows), np.float32)}
        settings_of = {"experts": 1, "rows": rows, "columns": columns, "neurons": neurons, "bits": bits, "block": block, "gated": 1,
                       "activation": ACTIVATION_CODES["silu"]}  # fmt: skip
    base = native.run(op, {"x": x, **layer, **rest}, {}, threads, **settings_of)
    closed = (gates == 0).astype(np.float32)
    nothing = dict.fromkeys(("router", "router_bias", "down_bias"))
    expected = native.run("QuantizedFFN", {"x": z, "gates": closed, **stand_in, **nothing, "base": base}, {}, threads,
                          experts=1, rows=rows, **other, **plain)  # fmt: skip
    together = {"x": x, **layer, **rest, "standin_x": z, **{f"standin_{k}": v for k, v in stand_in.items()}}
    attributes = settings_of | {f"standin_{k}": v for k, v in other.items()}
    assert np.array_equal(native.run(op, together, {}, threads, **attributes), expected)
    if (gates == 0).any():
        assert not np.array_equal(expected, base)
        with pytest.raises(Exception, match="the input standin_x has"):
            native.run(op, together | {"standin_x": z[..., :-1]}, {}, threads, **attributes)
    with pytest.raises(Exception, match="what stands in for skipped tokens needs gates"):
        native.run(op, together | {"gates": None}, {}, threads, **attributes)


def test_a_stand_in_of_one_of_several_experts_is_refused(best: Native) -> None:
    rng = np.random.default_rng(0)
    up, down = Quantized(rng, (2, 64, 64), 8, 32, False), Quantized(rng, (2, 64, 64), 8, 32, False)
    inputs = {"x": np.zeros((1, 64), np.float32), "gates": np.ones((1, 2), np.float32), **up.packed("up_"), "up_bias": None,
              **down.packed("down_")}  # fmt: skip
    with pytest.raises(Exception, match="something stands in for one of several experts"):
        best.run("QuantizedFFN", inputs, {}, experts=2, rows=64, columns=64, neurons=64, bits=8, block=32, gated=0, activation=0,
                 standin_neurons=32, standin_columns=64, standin_bits=8, standin_block=32)  # fmt: skip


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_gates_of_tokens_by_a_norm(native: Native, data: st.DataObject) -> None:
    columns, shape = data.draw(st.integers(1, 200)), (data.draw(st.integers(1, 3)), data.draw(st.integers(0, 40)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    a, b = (rng.standard_normal((*shape, columns), np.float32) * 3 for _ in range(2))
    scale, weight, bias = (rng.standard_normal(s, np.float32) for s in ((columns,), (1, columns), (1,)))
    first = np.zeros((shape[1], 1), np.float32) if data.draw(st.booleans()) else None
    if first is not None:
        first[:1] = 1e4
    epsilon = data.draw(st.sampled_from([1e-5, 0.5]))
    inputs: Tensors = {"a": a, "b": b, "scale": scale, "weight": weight, "bias": bias, "first": first}
    names, threads = ["gates", "normed", "sum", "closed"], data.draw(st.integers(1, 2))
    session = native.session("NormGates", inputs, {}, threads, names, {"columns": columns, "epsilon": epsilon})
    gates, normed, total, closed = session.run(None, feeds(inputs))
    session = native.session("NormGates", inputs, {}, threads, names[:-1], {"columns": columns, "epsilon": epsilon})
    assert all(map(np.array_equal, session.run(None, feeds(inputs)), (gates, normed, total)))  # closed is left out
    assert np.array_equal(total, a + b)
    expected = torch.nn.functional.rms_norm(torch.from_numpy(a + b), (columns,), torch.from_numpy(scale), epsilon).numpy()
    np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-6)
    scores = normed.astype(np.float64) @ weight.T + bias + (0 if first is None else first)
    clear = np.abs(scores) > 1e-4
    assert np.array_equal(gates[clear], (scores > 0)[clear])
    assert np.array_equal(closed, 1 - gates)
    assert first is None or gates[:, :1].all()
    wrong = inputs | {"b": b[..., :-1]}
    if b.size and columns > 1:
        with pytest.raises(Exception, match=f"the input b has {wrong['b'].size} elements; it should have {b.size}"):  # type: ignore[union-attr]
            native.session("NormGates", wrong, {}, 1, names, {"columns": columns}).run(None, feeds(wrong))


@pytest.mark.parametrize("columns", [1, 16, 100])
@pytest.mark.parametrize("positions", [None, (5, 1), (3, 5, 1)])
def test_gates_of_tokens(native: Native, columns: int, positions: tuple[int, ...] | None) -> None:
    generator = np.random.default_rng(columns)
    x, weight = generator.standard_normal((3, 5, columns), np.float32), generator.standard_normal((1, columns), np.float32)
    bias, first = np.array([0.25], np.float32), None
    x[1, 2] = np.nan
    if positions is not None:
        first = np.zeros(positions, np.float32)
        first[..., 0, :] = 1e4
    inputs: Tensors = {"x": x, "weight": weight, "bias": bias, "first": first}
    session = native.session("TokenGates", inputs, {}, 1, ["gates", "closed"], {"columns": columns})
    gates, closed = session.run(None, feeds(inputs))
    scores = torch.from_numpy(x @ weight.T + bias + (0 if first is None else first))
    assert np.array_equal(gates, threshold_gates(scores).numpy())
    assert np.array_equal(closed, 1 - gates)
    assert gates[1, 2] == 0
    assert first is None or gates[:, 0].all()
    wrong = inputs | {"first": np.zeros((4, 1), np.float32)}
    with pytest.raises(Exception, match="first has 4 elements for 15 tokens"):
        native.session("TokenGates", wrong, {}, 1, ["gates", "closed"], {"columns": columns}).run(None, feeds(wrong))
