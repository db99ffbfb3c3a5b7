"""Settings of a checkpoint's files: honoured, known to have no effect, or refused; and written back."""

import json
from pathlib import Path

import pytest

import rag_jax
from rag_jax.__main__ import main
from rag_jax.errors import InputError
from rag_jax.inference import config as answer_config
from rag_jax.models.hf import SETTINGS, generation, settings
from rag_jax.pretrained.parts import generator_part
from rag_jax.runs import config as run_config

SMALL = {
    "vocab_size": 41, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 24,
}  # fmt: skip
ROTARY = {
    "vocab_size": 41, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5 = {"vocab_size": 41, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
DPR = {
    "vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4,
    "max_position_embeddings": 12,
}  # fmt: skip
MANY = {
    "decoder_start_token_id": 7, "forced_bos_token_id": 5, "forced_eos_token_id": None, "eos_token_id": [2, 6],
    "bos_token_id": 0, "pad_token_id": 1, "num_beams": 3, "max_new_tokens": 9, "min_length": 4, "length_penalty": 0.5,
    "early_stopping": True, "no_repeat_ngram_size": 2, "suppress_tokens": [8, 9], "begin_suppress_tokens": [10],
    "bad_words_ids": [[11], [12, 13]], "repetition_penalty": 1.2, "transformers_version": "5.0.0",
}  # fmt: skip
# name -> (class of the model, class of the configuration, its settings, generation_config.json)
CHECKPOINTS = {
    "bart": ("Bart", "Bart", SMALL, {}),
    "bart_forced_bos": ("Bart", "Bart", SMALL | {"forced_bos_token_id": 0, "forced_eos_token_id": None}, {}),
    "mbart": ("MBart", "MBart", SMALL | {"decoder_start_token_id": 7, "activation_dropout": 0.2}, {}),
    "t5": ("T5", "T5", T5 | {"decoder_start_token_id": 3, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, {}),
    "mt5": ("MT5", "MT5", T5, {}),
    "gpt2": ("GPT2", "GPT2", {"vocab_size": 41, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32,
             "bos_token_id": 1, "eos_token_id": [2, 3], "embd_pdrop": 0.1, "attn_pdrop": 0.3}, {}),
    "llama": ("Llama", "Llama", ROTARY | {"eos_token_id": [2, 3, 4]}, {}),
    "mistral": ("Mistral", "Mistral", ROTARY | {"sliding_window": 400}, {}),
    "qwen2": ("Qwen2", "Qwen2", ROTARY | {"bos_token_id": None}, {"temperature": 0.7, "do_sample": True}),
    "many": ("Bart", "Bart", SMALL, MANY),
}  # fmt: skip
ENDINGS = {"GPT2": "LMHeadModel", "Llama": "ForCausalLM", "Mistral": "ForCausalLM", "Qwen2": "ForCausalLM"}


def checkpoint(directory: Path, name: str) -> Path:
    """A random checkpoint, saved by transformers."""
    hf = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model, of, values, said = CHECKPOINTS[name]
    made = getattr(hf, model + ENDINGS.get(model, "ForConditionalGeneration"))(getattr(hf, f"{of}Config")(**values))
    made.save_pretrained(directory)
    if said:
        (directory / "generation_config.json").write_text(json.dumps(said))
    return directory


def encoders(directory: Path) -> list[str]:
    """Options of `rag-jax convert` for the encoders."""
    import transformers as hf

    hf.DPRQuestionEncoder(hf.DPRConfig(**DPR)).save_pretrained(directory / "q")
    hf.DPRContextEncoder(hf.DPRConfig(**DPR)).save_pretrained(directory / "c")
    return ["--question-encoder", str(directory / "q"), "--context-encoder", str(directory / "c")]


def same_files(a: Path, b: Path) -> None:
    """Checks that two directories have the same configuration files, except for versions and dtype."""
    for file in ("config.json", "generation_config.json"):
        if file == "config.json" or (a / file).is_file():
            old, new = (json.loads((d / file).read_text()) for d in (a, b))
            for one in (old, new, *(v for c in (old, new) for v in c.values() if isinstance(v, dict))):
                for key in ("transformers_version", "dtype", "torch_dtype"):
                    one.pop(key, None)
            assert old == new, file


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_key_that_a_table_does_not_have_is_refused_by_name(name):
    with pytest.raises(InputError, match=r"file: warp_factor=9 is not known here.*--ignore-setting warp_factor"):
        settings.Account().read({"warp_factor": 9}, SETTINGS[name], "file")
    account = settings.Account(["warp_factor"])
    assert account.read({"warp_factor": 9}, SETTINGS[name], "file") == {}
    assert account.ignored == [("file: warp_factor", 9)]
    account.check()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_refused_has_values_that_are_not(name):
    for key, fate in SETTINGS[name].items():
        assert fate.text
        if fate.kind == "refused":
            for value in (None, *fate.values):
                assert settings.Account().read({key: value}, SETTINGS[name], "file") == {key: value}
            with pytest.raises(InputError, match=rf"file: {key}='other' is not supported"):
                settings.Account().read({key: "other"}, SETTINGS[name], "file")


def test_no_key_of_transformers_is_missing():
    """Every key that transformers' configuration classes write is in our tables."""
    hf = pytest.importorskip("transformers")
    of = {"bert": "Bert", "dpr": "DPR", "bart": "Bart", "mbart": "MBart", "t5": "T5", "mt5": "MT5", "gpt2": "GPT2",
          "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}  # fmt: skip
    for name, cls in of.items():
        keys = set(getattr(hf, f"{cls}Config")().to_dict())
        assert not keys - set(SETTINGS[f"config.json of {name}"]), name
    whole = hf.RagConfig.from_question_encoder_generator_configs(hf.DPRConfig(), hf.BartConfig()).to_dict()
    assert not set(whole) - set(SETTINGS["config.json of rag"])
    for table in (generation.GENERATION, generation.GENERATION_LM):
        assert not set(hf.GenerationConfig().to_dict()) - set(table)
    old = hf.GenerationConfig()._get_default_generation_params()  # keys of config.json before transformers 5
    for name in SETTINGS:
        if name.startswith("config.json of"):
            assert not set(old) - set(SETTINGS[name]), name


def test_the_documented_table_is_that_of_the_code():
    file = Path(__file__).resolve().parents[1] / "docs/settings.md"
    assert file.read_text() == settings.document(SETTINGS), "write it again: python scripts/settings_table.py"


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_settings_go_there_and_back(tmp_path, name):
    source = checkpoint(tmp_path / "theirs", name)
    words = encoders(tmp_path)
    assert main(["convert", *words, "--generator", str(source), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), "--part", "generator", "--out", str(tmp_path / "back")]) == 0
    same_files(source, tmp_path / "back")
    report = json.loads((tmp_path / "ours/report.json").read_text())
    assert report["settings"]["model.generator.vocab_size"].endswith("config.json: vocab_size")


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["Sequence", "Token"])
def test_settings_of_a_composite_go_there_and_back(tmp_path, variant):
    hf = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    generator = hf.BartConfig(**SMALL, decoder_start_token_id=7, forced_eos_token_id=None)
    whole = hf.RagConfig.from_question_encoder_generator_configs(hf.DPRConfig(**DPR), generator, n_docs=3)
    model = getattr(hf, f"Rag{variant}ForGeneration")(whole)
    model.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")]) == 0
    same_files(tmp_path / "theirs", tmp_path / "back")
    made = run_config.read(tmp_path / "ours/config.json")
    assert made.model.n_docs == 3 and made.model.reader.start_id == 7 and made.model.reader.forced_eos_id == -1


@pytest.mark.parity
def test_generation_settings_are_a_runs_defaults(tmp_path):
    source = checkpoint(tmp_path / "theirs", "many")
    assert main(["convert", *encoders(tmp_path), "--generator", str(source), "--out", str(tmp_path / "ours")]) == 0
    made = run_config.read(tmp_path / "ours/config.json")
    cfg, reader = answer_config.answering(made), made.model.reader
    assert (cfg.num_beams, cfg.max_length, cfg.min_length, cfg.length_penalty) == (3, 10, 4, 0.5)
    assert cfg.early_stopping is True and cfg.no_repeat_ngram_size == 2 and cfg.repetition_penalty == 1.2
    assert (cfg.suppress_ids, cfg.begin_suppress_ids) == ((8, 9), (10,)) and cfg.bad_word_ids == ((11,), (12, 13))
    assert (reader.start_id, reader.forced_bos_id, reader.forced_eos_id) == (7, 5, -1) and reader.ends == (2, 6)


def test_what_is_drawn_is_drawn_as_transformers_does():
    """As there, top_k is 50 where a file has none; a temperature of 0 stands for no sampling."""
    assert generation.answering({"do_sample": True}, False) == {"do_sample": True, "top_k": 50}
    assert generation.answering({"do_sample": False, "temperature": 0.0}, False) == {"do_sample": False}
    assert generation.answering({"min_new_tokens": 3, "min_length": 9}, True) == {"min_length": 4}
    with pytest.raises(InputError, match=r"repetition_penalty=1\.1 is not supported.*counts the prompt"):
        settings.Account().read({"repetition_penalty": 1.1}, generation.GENERATION_LM, "file")


@pytest.mark.parity
def test_a_window_that_inputs_do_not_fit_is_refused(tmp_path, capsys):
    source = checkpoint(tmp_path / "theirs", "mistral")
    words = ["convert", *encoders(tmp_path), "--generator", str(source), "--source-length", "500"]
    assert main([*words, "--out", str(tmp_path / "ours")]) == 2
    assert "window of 400 tokens" in capsys.readouterr().err


@pytest.mark.parity
def test_an_export_changes_what_the_user_changed_and_no_more(tmp_path):
    source = checkpoint(tmp_path / "theirs", "many")
    assert main(["convert", *encoders(tmp_path), "--generator", str(source), "--out", str(tmp_path / "ours")]) == 0
    file = tmp_path / "ours/config.json"
    run = json.loads(file.read_text())
    run["answering"]["num_beams"], run["answering"]["max_length"] = 5, 21
    run["model"]["generator"] |= {"forced_bos_id": 6, "dropout": 0.25}
    file.write_text(json.dumps(run))
    (tmp_path / "ours/manifest.json").unlink()  # which has the checksum of what convert wrote
    assert main(["export", str(tmp_path / "ours"), "--part", "generator", "--out", str(tmp_path / "back")]) == 0
    for name, changes in (
        ("config.json", {"forced_bos_token_id": 6, "dropout": 0.25}),
        ("generation_config.json", {"forced_bos_token_id": 6, "num_beams": 5, "max_new_tokens": 20}),
    ):
        old, new = (json.loads((d / name).read_text()) for d in (source, tmp_path / "back"))
        assert old | changes == new, name


@pytest.mark.parity
def test_a_refused_setting_can_be_left_out(tmp_path, capsys):
    source = checkpoint(tmp_path / "theirs", "bart")
    written = json.loads((source / "config.json").read_text()) | {"warp_factor": 9}
    (source / "config.json").write_text(json.dumps(written))
    words = ["convert", *encoders(tmp_path), "--generator", str(source), "--out", str(tmp_path / "ours")]
    assert main(words) == 2 and "--ignore-setting warp_factor" in capsys.readouterr().err
    assert main([*words, "--ignore-setting", "warp_faktor"]) == 2
    assert "warp_factor" in capsys.readouterr().err
    assert main([*words, "--ignore-setting", "warp_factor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["ignored_settings"].values()) == [9]
    assert printed["settings"]["model.generator.width"].endswith("config.json: d_model")
    with pytest.raises(InputError, match="warp_factor"):
        generator_part(source)
    assert rag_jax.from_pretrained(tmp_path / "ours")[0].config.reader.width == 8
