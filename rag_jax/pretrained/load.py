"""`from_pretrained`: the model and the parameters of a run, a converted checkpoint or a Hugging Face directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from rag_jax.pretrained.combine import open_source
from rag_jax.pretrained.hub import find, is_hugging_face
from rag_jax.pretrained.parts import choose_variant
from rag_jax.pretrained.weights import LazyParams, WeightReport, in_type
from rag_jax.rag import Params, Rag, RagConfig
from rag_jax.runs import checkpoint
from rag_jax.runs import directory as runs
from rag_jax.system import sharding


def in_dtype(model: RagConfig, dtype: str) -> RagConfig:
    """The configuration of the model with the computation of its encoder and generator in `dtype`."""
    generator = model.generator and dataclasses.replace(model.generator, dtype=dtype)
    return dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, dtype=dtype), generator=generator)


def open_pretrained(
    path: str | Path,
    variant: str | None = None,
    change_variant: bool = False,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Rag, LazyParams]:
    """As `from_pretrained`, but the parameters are read only when they are asked for, one part after another."""
    directory = find(path)
    if is_hugging_face(directory):
        source = open_source(directory, variant, change_variant, ignore=ignore)
        model = in_dtype(source.model, dtype) if dtype != "float32" else source.model
        return Rag(model), source.params(mesh or sharding.make_mesh(), WeightReport(), dtype)
    config = runs.read_config(directory)
    rag = runs.run_model(directory, config)
    chosen = choose_variant(directory, rag.variant, variant, change_variant)
    stored = runs.param_places(rag, mesh or sharding.mesh_here(config.mesh))
    checkpoint.check_params(directory / "params", stored)
    places = in_type(stored, dtype)
    model = dataclasses.replace(rag.config, variant=chosen)  # type: ignore[arg-type]
    model = in_dtype(model, dtype) if dtype != "float32" else model
    return Rag(model), LazyParams(places, lambda side: checkpoint.read_part(directory / "params", side, places[side]))


def from_pretrained(
    path: str | Path,
    variant: str | None = None,
    change_variant: bool = False,
    dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
    ignore: Sequence[str] = (),
) -> tuple[Rag, Params]:
    """The model and the parameters of a run, a converted checkpoint, or a Hugging Face directory or hub name.

    variant: "sequence" or "token", to make sure of it: InputError if the checkpoint is the other one, unless
        `change_variant`. None takes the stored one.
    dtype: of parameters and computation.
    mesh: where the parameters lie; by default, all devices (for a run, `sharding.mesh_here`).
    ignore: keys of a Hugging Face directory's files to leave out that would be an InputError otherwise.
    InputError for any other directory, and for an unfinished run.
    """
    rag, params = open_pretrained(path, variant, change_variant, dtype, mesh, ignore)
    return rag, dict(params.items())
