"""The native operator SparseLinear, held to an emulation of its arithmetic on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from dyncomp.backends.native import ACTIVATION_CODES, pack_input_scales, pack_inputs, unavailable_reason
from dyncomp.backends.native.build import available
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import Array, Native, Quantized, isas

from dyncomp.activations import ACTIVATIONS
from dyncomp.interpret import round_activations
from dyncomp.ops import keep_large

pytestmark = pytest.mark.skipif(not available(), reason=unavailable_reason() or "")


@pytest.fixture(scope="module", params=isas())
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Native:
    return Native(request.param, tmp_path_factory.mktemp("native"))


def run(native: Native, x: Array, thresholds: Array, w: Quantized, bias: Array | None, *, activation: int = -1, threads: int = 1) -> Array:
    rows, columns = w.codes.shape
    constants = {
        "thresholds": thresholds, "codes": pack_inputs(w.codes, w.bits), "scales": pack_input_scales(w.scales),
        "offsets": None if w.offsets is None else pack_input_scales(w.offsets), "bias": bias,
    }  # fmt: skip
    attributes = {"rows": rows, "columns": columns, "bits": w.bits, "block": w.block, "activation": activation}
    return native.run("SparseLinear", {"x": x}, constants, threads, **attributes)


def expected(x: Array, thresholds: Array, w: Quantized, bias: Array | None) -> torch.Tensor:
    kept = round_activations(keep_large(torch.from_numpy(x), torch.from_numpy(thresholds))).double()
    y = kept @ torch.from_numpy(w.values).T
    return y if bias is None else y + torch.from_numpy(bias)


def deviation(actual: Array, wanted: torch.Tensor) -> float:
    assert actual.shape == tuple(wanted.shape)
    return float((torch.from_numpy(actual).double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)) if wanted.numel() else 0.0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sparse_linear_equals_its_emulation(native: Native, data: st.DataObject) -> None:
    """One token gathers, several do not; any number of rows, blocks with no input left, biases, offsets."""
    bits, block = data.draw(st.sampled_from([8, 4])), data.draw(st.sampled_from([32, 64, 128]))
    rows = data.draw(st.one_of(st.integers(1, 400), st.sampled_from([576, 3072])))
    columns = block * data.draw(st.integers(1, 3))
    lead = data.draw(st.sampled_from([(1,), (1,), (0,), (2,), (7,), (1, 50), (3, 17)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    w = Quantized(rng, (rows, columns), bits, block, data.draw(st.booleans()))
    x = rng.standard_normal((*lead, columns), dtype=np.float32)
    thresholds = rng.uniform(0, data.draw(st.sampled_from([0.0, 1.0, 3.0])), columns).astype(np.float32)
    thresholds[: data.draw(st.sampled_from([0, 32, columns]))] = np.inf
    bias = rng.standard_normal(rows, dtype=np.float32) if data.draw(st.booleans()) else None
    actual = run(native, x, thresholds, w, bias, threads=data.draw(st.sampled_from([1, 2])))
    assert deviation(actual, expected(x, thresholds, w, bias)) < 2e-5


def test_an_activation_between_two_codes_is_rounded_as_the_graph_rounds_it(native: Native) -> None:
    rng = np.random.default_rng(5717)
    w = Quantized(rng, (576, 192), 8, 64, False)
    x, thresholds = rng.standard_normal((1, 192), dtype=np.float32), np.zeros(192, np.float32)
    assert deviation(run(native, x, thresholds, w, None), expected(x, thresholds, w, None)) < 2e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_the_first_half_of_the_rows_is_activated_and_multiplied(native: Native, bits: int) -> None:
    rng = np.random.default_rng(bits)
    w = Quantized(rng, (2 * 96, 64), bits, 32, bits == 4)
    thresholds = np.full(64, 0.6, np.float32)
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, 64), dtype=np.float32)
        up = expected(x, thresholds, w, None)
        wanted = ACTIVATIONS["silu"](up[:, :96]) * up[:, 96:]
        actual = run(native, x, thresholds, w, None, activation=ACTIVATION_CODES["silu"])
        assert deviation(actual, wanted) < 2e-5


def test_nan_and_infinite_inputs_are_not_skipped(native: Native) -> None:
    w = Quantized(np.random.default_rng(0), (70, 64), 8, 32, False)
    for value in (np.nan, np.inf):
        x = np.zeros((1, 64), np.float32)
        x[0, 40] = value
        assert np.isnan(run(native, x, np.ones(64, np.float32), w, None)).all()


def test_weights_of_small_inputs_are_not_read(native: Native) -> None:
    """With codes of other inputs changed, one token's result stays the same bit for bit."""
    rng = np.random.default_rng(1)
    w = Quantized(rng, (200, 96), 4, 32, True)
    x, thresholds = rng.standard_normal((1, 96), dtype=np.float32), np.full(96, 0.7, np.float32)
    before = run(native, x, thresholds, w, None)
    w.codes[:, np.abs(x[0]) <= 0.7] = rng.integers(0, 16, (200, int((np.abs(x[0]) <= 0.7).sum())), dtype=np.uint8)
    np.testing.assert_array_equal(run(native, x, thresholds, w, None), before)


@pytest.mark.parametrize(
    ("change", "message"), [({"activation": 15}, "activation"), ({"columns": 64}, "last dimension"), ({"rows": 300}, "codes")]
)
def test_what_does_not_fit_is_refused(native: Native, change: dict[str, Any], message: str) -> None:
    rng = np.random.default_rng(2)
    w = Quantized(rng, (64, 96), 8, 32, False)
    constants = {
        "thresholds": np.zeros(change.get("columns", 96), np.float32),
        "codes": pack_inputs(w.codes, 8),
        "scales": pack_input_scales(w.scales),
    }
    attributes = {"rows": 64, "columns": 96, "bits": 8, "block": 32, "activation": -1} | change
    with pytest.raises(Exception, match=message):
        native.run("SparseLinear", {"x": np.zeros((1, 96), np.float32)}, constants, **attributes)
