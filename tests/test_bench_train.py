"""`rag-jax bench train --load` on a tiny load: its figures, and that both sides do the same step."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rag_jax.aot.operation_count import matmul_flops
from rag_jax.bench import largest_batch, machine_limits, synthetic_load, train
from rag_jax.bench.synthetic_load import StepLoad
from rag_jax.system import sharding
from rag_jax.training import train_step

TINY = StepLoad(
    questions=2, docs=2, source=24, target=6, question=8, passages=64, width=16, encoder_layers=1, decoder_layers=1,
    heads=2, hidden=32, vocabulary=96, bert_width=16, bert_layers=1, bert_heads=2, bert_hidden=32, bert_vocabulary=64,
)  # fmt: skip
ONE = sharding.make_mesh({"data": 1}, jax.devices()[:1])


def words(load=TINY):
    changed = {f.name: getattr(load, f.name) for f in dataclasses.fields(load)}
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", value)]


def run(capsys, *more, load=TINY):
    """The JSON of a run with a mesh of all eight devices on `data`, and a batch that divides over them."""
    capsys.readouterr()
    load = dataclasses.replace(load, questions=8)
    assert tiny.rag_jax("bench", "train", "--load", "small", *words(load), "--repeats", 2, *more, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def jaxpr_of(load):
    ours = train.prepare(load, ONE)
    given = train.first_state(ours), synthetic_load.batch(load, ONE, 0), ours.rows, ours.passages, ours.key
    return jax.make_jaxpr(train_step.make_step(ours.setting, 0))(*given).jaxpr


@pytest.mark.slow
def test_one_line_says_everything(capsys):
    found = run(capsys, "--alone", load=dataclasses.replace(TINY, remat="dots", variant="sequence"))
    median = found["seconds"]["median_ms"] / 1e3
    assert found["questions_per_second"] == pytest.approx(8 / median, rel=1e-3)
    assert found["tokens_per_second"] == pytest.approx(8 * 2 * (24 + 5) / median, rel=1e-3)
    assert found["model_flops"] == pytest.approx(sum(found["model_flops_by_part"].values()))
    assert found["hardware_flops"] > found["model_flops"]
    limit = found["matmul_limit_flops_per_second"]
    assert found["fraction_of_limit"] == pytest.approx(found["model_flops"] / median / limit, rel=1e-3)
    assert found["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1} and found["devices"] == 8
    assert found["versions"]["jax"] == jax.__version__ and found["load"]["remat"] == "dots"
    assert found["peak_process_bytes"] > 1e7 and "transformers" not in found


@pytest.mark.slow
def test_the_work_is_that_of_the_program():
    """FLOPs against the jaxpr, which also has q.d with its gradient and, with chunks, the logits a second time."""
    load = dataclasses.replace(TINY, logit_chunk=TINY.vocabulary)
    work = synthetic_load.model_flops(load)
    asked = 2 * load.questions * load.docs * load.bert_width  # q.d of the retrieved passages
    gold = 2 * load.questions * load.docs * load.target * load.width * load.vocabulary
    counted = matmul_flops(jaxpr_of(load))
    target = 2 * load.questions * load.docs * load.target * load.width
    bias = gold // load.width  # its gradient
    assert counted - sum(work.values()) - gold - bias in {asked * n + target * m for n in range(5) for m in range(5)}
    kept = matmul_flops(jaxpr_of(dataclasses.replace(load, logit_chunk=0)))
    assert counted - kept == gold
    again = matmul_flops(jaxpr_of(dataclasses.replace(load, remat="full")))
    layers = sum(work[name] for name in ("question_encoder", "generator_encoder", "generator_decoder")) / 3
    assert 0.5 * layers < again - counted <= layers  # a layer's last matmul need not be recomputed


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("variant", ["token", "sequence"])
def test_transformers_has_the_same_loss(capsys, variant):
    load = dataclasses.replace(TINY, variant=variant, dtype="bfloat16")  # compared in float32 all the same
    found = run(capsys, load=load)
    assert found["loss_difference"] < 1e-5
    assert found["times_faster"] > 0 and found["transformers"]["seconds"]["median_ms"] > 0


@pytest.mark.slow
@pytest.mark.parity
def test_an_update_of_transformers_is_an_update_of_ours(tmp_path):
    """Losses are equal in three steps on one batch, without dropout and clipping; the learning rate changes them.

    The corpus has only the passages that are read, so that both read the same in every step. transformers does not
    train the bias of the logits, so ours is reset.
    """
    replace = dataclasses.replace
    load = replace(TINY, dropout=0.0, passages=TINY.docs)
    setting = synthetic_load.setting(load, ONE)
    changed = replace(setting.stage.optimizer, learning_rate=3e-3, clip_norm=1e9)
    stage = replace(setting.stage, optimizer=changed)
    ours = train.prepare(load, ONE)._replace(setting=setting._replace(stage=stage))
    batch, state = synthetic_load.batch(load, ONE, 0), train.first_state(ours)
    program, _ = train.compiled_step(ours, state, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_load, "stage", lambda _: stage)
        their_step, compared = train.rival(load, ours, [batch], tmp_path)
    their_losses, losses = [their_step(0) for _ in range(3)], []
    for _ in range(3):
        state, _, metrics = program(state, batch, ours.rows, ours.passages, ours.key)
        losses.append(float(metrics["loss"]))
        generator = state.params["generator"] | {"logits_bias": jnp.copy(ours.params["generator"]["logits_bias"])}
        state = state._replace(params=state.params | {"generator": generator})
    assert compared["loss_difference"] < 1e-5
    np.testing.assert_allclose(losses, their_losses, rtol=1e-4)
    assert abs(losses[2] - losses[0]) > 1e-2 * losses[0]


@pytest.mark.slow
def test_a_profile_is_written(capsys, tmp_path):
    run(capsys, "--alone", "--profile", tmp_path)
    assert list(tmp_path.rglob("*.xplane.pb")) and list(tmp_path.rglob("*.trace.json.gz"))


@pytest.mark.parametrize("most", [0, 1, 2, 3, 13, 64, 100, 200])
def test_largest_by_a_limit_that_is_known(most):
    asked = []

    def fits(n):
        asked.append(n)
        return n <= most

    assert machine_limits.largest(fits, most=100) == min(most, 100)
    assert len(asked) == len(set(asked)) <= 14 and max(asked) <= 100


def test_the_search_for_the_largest_batch_says_where_it_ran(monkeypatch):
    limits = {"ours": 37, "transformers": 12}
    monkeypatch.setattr(
        largest_batch, "in_process", lambda side, load, shape: (load.questions <= limits[side], {"device": "fake"})
    )
    load = dataclasses.replace(TINY, questions=4, accumulate=2)
    assert largest_batch.search(load, "ours", {}) == (36, {"device": "fake"})  # a multiple of the micro-batches
    assert largest_batch.search(load, "transformers", {})[0] == 12


def test_errors_of_a_trial_are_not_taken_for_a_lack_of_memory(monkeypatch):
    def fails(load, shape):
        raise jax.errors.JaxRuntimeError(load)

    monkeypatch.setattr(largest_batch, "try_ours", fails)
    assert largest_batch.trial("ours", "RESOURCE_EXHAUSTED: Out of memory allocating", {}) == (False, {})
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        largest_batch.trial("ours", "INTERNAL: something else", {})


@pytest.mark.parametrize(
    "more, message",
    [
        (["--heads", 3], "multiple of the heads"),
        (["--dtype", "int8"], "float32 or bfloat16"),
        (["--remat", "some"], "--remat some: one of none, full, dots"),
        (["--source", 9], "no room for a passage"),
        (["--docs", 65], "--docs 65 of --passages 64"),
        (["--accumulate", 3], "multiple of --accumulate"),
        (["--questions", 0], "--questions 0: at least 1"),
        (["--optimizer", "adafactor", "--moments", "int8"], "adafactor has no moments"),
        (["--mesh", "data"], "write AXIS=N"),
        (["--config", "configs/world.py"], "give --config"),
    ],
)
def test_bad_loads_are_refused(capsys, more, message):
    assert tiny.rag_jax("bench", "train", "--load", "small", *words(), "--alone", *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_largest_needs_an_accelerator(capsys):
    assert tiny.rag_jax("bench", "train", "--load", "small", *words(), "--alone", "--largest") == 2
    assert "asks for an accelerator" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decoder_only_load(capsys):
    """Its report, its FLOPs against the jaxpr, and its memory against XLA's figure."""
    load = dataclasses.replace(
        TINY, generator="lm", encoder_layers=0, decoder_layers=3, docs=1, groups=1, dropout=0.0, logit_chunk=96
    )
    found = run(capsys, load=load)
    assert found["load"]["generator"] == "lm" and "transformers" not in found
    assert found["xla_bytes"] > 0 and 0 < found["resident_bytes"] <= 1.01 * found["peak_process_bytes"]
    assert found["peak_compiling_bytes"] <= found["peak_process_bytes"]
    counted, work = matmul_flops(jaxpr_of(load)), synthetic_load.model_flops(load)
    gold = 2 * load.questions * load.docs * load.target * load.width * load.vocabulary  # the logits are recomputed
    # the jaxpr still has the forward pass of what the last layer's prefix does not need, which XLA drops
    assert counted - gold == pytest.approx(sum(work.values()), rel=0.1) and counted - gold > sum(work.values())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--groups", 2], "--groups 2: of a decoder-only model"),
        (["--generator", "lm"], "--encoder-layers 1: a bart has some, an lm 0"),
        (["--encoder-layers", 0], "--encoder-layers 0: a bart has some"),
        (["--generator", "lm", "--encoder-layers", 0, "--heads", 4, "--groups", 3], "a divisor of --heads 4"),
    ],
)
def test_bad_generators_are_refused(capsys, more, message):
    assert tiny.rag_jax("bench", "train", "--load", "small", *words(), "--alone", *more) == 2
    assert message in capsys.readouterr().err


def test_smollm2_is_a_load_of_its_size():
    rag = synthetic_load.model(synthetic_load.LOADS["smollm2-135m"])
    params = jax.eval_shape(lambda: rag.init(jax.random.key(0)))["generator"]
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008  # as in its checkpoint
