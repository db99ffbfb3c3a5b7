"""Checkpoints with tensor names of other releases: LayerNorm's gamma and beta, tied tables saved once under any of
their names, torch's file format from before 1.6.
"""

import json
from functools import partial

import jax
import numpy as np
import pytest
from test_pretrained import ENCODERS, RAGS, READERS, golden, read, write

import rag_jax
from rag_jax.errors import InputError
from rag_jax.pretrained.combine import combine
from rag_jax.pretrained.parts import encoder_part, generator_part

TIED = {
    "bart": ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"],
    "mbart": ["model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"],
    "t5": ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
    "gpt2": ["transformer.wte", "lm_head"],
}
UNTIED = {"t5_gated": ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]}  # its lm_head is not tied


def renamed(arrays, rename):
    return {rename(k.removeprefix("tensor/")) if k.startswith("tensor/") else k: v for k, v in arrays.items()}


def kept_as(arrays, names, base=""):
    """The checkpoint with its tied table saved only under the given names."""
    group = [n for n in arrays if n.startswith("tensor/") and n.removesuffix(".weight").split("/")[1] in names["all"]]
    table = arrays[group[0]]
    left = {k: v for k, v in arrays.items() if k not in group}
    return left | {f"tensor/{base}{name}.weight": table for name in names["kept"]}


def part_of(name, directory):
    open_part = generator_part if name in READERS else partial(encoder_part, side=ENCODERS[name])
    return open_part(directory)


@pytest.mark.parametrize("name", ENCODERS)
def test_gamma_and_beta_are_weight_and_bias(tmp_path, name):
    """Like bert-base-uncased on the hub: the prefix "bert." before all names, and the heads of pretraining as well."""
    arrays, count = golden(name), 0
    prefix = "bert." if name == "bert" else ""

    def older(tensor):
        nonlocal count
        new = tensor.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        count += new != tensor
        return f"tensor/{prefix}{new}"

    old = renamed(arrays, older)
    if name == "bert":
        old["tensor/cls.predictions.transform.LayerNorm.gamma"] = np.ones(12, "f4")
        old["tensor/cls.seq_relationship.weight"] = np.ones((2, 12), "f4")
        old["tensor/bert.embeddings.token_type_ids"] = np.zeros((1, 16), int)
    assert count >= 6
    a, b = (read(part_of(name, write(tmp_path / str(i), x))) for i, x in enumerate((arrays, old)))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("name", "kept"), [(name, kept) for name in TIED for kept in TIED[name]])
def test_a_tied_table_is_found_under_any_of_its_names(tmp_path, name, kept):
    arrays = golden(name)
    changed = kept_as(arrays, {"all": TIED[name], "kept": [kept]})
    a, b = (read(part_of(name, write(tmp_path / str(i), x))) for i, x in enumerate((arrays, changed)))
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kept", UNTIED["t5_gated"])
def test_a_table_beside_a_head_of_its_own(tmp_path, kept):
    arrays = golden("t5_gated")
    changed = kept_as(arrays, {"all": UNTIED["t5_gated"], "kept": [kept]})
    a, b = (read(part_of("t5_gated", write(tmp_path / str(i), x))) for i, x in enumerate((arrays, changed)))
    assert "lm_head" in a
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_tied_unscaled_t5_saved_under_its_head_alone(tmp_path):
    arrays = golden("t5")
    config = json.loads(str(arrays["config"])) | {"scale_decoder_outputs": False, "tie_word_embeddings": True}
    whole = kept_as(arrays, {"all": TIED["t5"], "kept": ["shared"]})
    head = kept_as(arrays, {"all": TIED["t5"], "kept": ["lm_head"]})
    parts = [generator_part(write(tmp_path / str(i), x, config)) for i, x in enumerate((whole, head))]
    assert all(part.config.tied for part in parts)
    jax.tree.map(np.testing.assert_array_equal, *map(read, parts))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_tied_decoder_saved_under_its_head(tmp_path, name):
    arrays = golden(name)
    config = json.loads(str(arrays["config"])) | {"tie_word_embeddings": True}
    both = ["model.embed_tokens", "lm_head"]
    sources = [kept_as(arrays, {"all": both, "kept": kept}) for kept in (both[:1], both[1:], both)]
    found = [read(part_of(name, write(tmp_path / str(i), x, config))) for i, x in enumerate(sources)]
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


@pytest.mark.parametrize("name", RAGS)
def test_a_composite_with_its_tables_under_other_names(tmp_path, name):
    arrays = golden(name)
    base = "rag.generator."
    names = [base + n for n in TIED["t5" if "t5" in name else "bart"]]

    def older(tensor):
        new = tensor.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return f"tensor/{new}"

    changed = renamed(kept_as(arrays, {"all": names, "kept": [names[3]]}), older)
    a, b = (rag_jax.from_pretrained(write(tmp_path / str(i), x)) for i, x in enumerate((arrays, changed)))
    assert a[0].config == b[0].config
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def test_copies_that_differ_from_the_one_that_stands_for_them_are_refused(tmp_path):
    arrays = golden("bart")
    changed = kept_as(arrays, {"all": TIED["bart"], "kept": ["lm_head", "model.encoder.embed_tokens"]})
    changed["tensor/lm_head.weight"] = changed["tensor/lm_head.weight"] + 1
    with pytest.raises(InputError, match=r"lm_head.weight differs from model.encoder.embed_tokens.weight"):
        read(generator_part(write(tmp_path, changed)))


def test_the_error_names_what_is_missing_and_what_is_there_in_its_stead(tmp_path):
    arrays = renamed(golden("bert"), lambda name: f"tensor/{name.replace('attention.self.query', 'attn.q')}")
    with pytest.raises(InputError, match=r"self.query.weight.* missing, and .*attn.q.* that it does not name"):
        read(encoder_part(write(tmp_path, arrays), "question_encoder"))


# --- torch's files ----------------------------------------------------------------------------------------------------


def as_bin(directory, shards=1, zipped=False):
    """Saves the safetensors file of a directory with torch.save, in one file or several."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        where |= dict.fromkeys(names[i::shards], file)
        some = {name: tensors[name] for name in names[i::shards]}
        torch.save(some, directory / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_of_every_age(tmp_path, shards, zipped):
    arrays = golden("bart")
    a = read(generator_part(write(tmp_path / "safe", arrays)))
    b = read(generator_part(as_bin(write(tmp_path / "bin", arrays), shards, zipped)))
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_runs_no_code(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    directory = as_bin(write(tmp_path / "bin", golden("bart")))
    file, mark = directory / "pytorch_model.bin", tmp_path / "mark"
    torch.save({"a": torch.ones(2), "b": Touch(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"pytorch_model.bin: not a checkpoint of plain weights"):
        generator_part(directory)
    assert not mark.exists()
    for other in (torch.ones(2), {"model": {"a": 1}}, [1]):
        torch.save(other, file, _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="holds no tensors by name"):
            generator_part(directory)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="not a checkpoint of plain weights"):
        generator_part(directory)


# --- two encoders -----------------------------------------------------------------------------------------------------


def test_encoders_that_differ_in_dropout_alone_are_one_model(tmp_path, capsys):
    question, context = golden("dpr_question"), golden("dpr_context")
    write(tmp_path / "q", question)
    config = json.loads(str(context["config"])) | {"hidden_dropout_prob": 0.37, "attention_probs_dropout_prob": 0.21}
    write(tmp_path / "c", context, config)
    model = combine(tmp_path / "q", tmp_path / "c").model
    assert model.encoder.dropout == json.loads(str(question["config"]))["hidden_dropout_prob"]
    said = capsys.readouterr().err
    assert "dropout" in said and "0.37" in said
    write(tmp_path / "c", context, config | {"layer_norm_eps": 1e-3})
    with pytest.raises(InputError, match=r"the context encoder's eps is 0.001"):
        combine(tmp_path / "q", tmp_path / "c")
