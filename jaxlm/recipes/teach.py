"""A teacher read once: its likeliest tokens at every place of a run's rows, written to files before the run.

    jaxlm data teach configs/finetune/distill.toml distill.cache=runs/thoughts
    jaxlm train configs/finetune/distill.toml distill.cache=runs/thoughts

Shapes: B rows, T tokens, K likeliest tokens, E width of the teacher, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm import config
from jaxlm.data.rows.teacher_cache import COLUMNS, Batch, TaughtRows, TeacherCache
from jaxlm.errors import UserError
from jaxlm.train.recipe import Column, DataSource


def columns(cfg: config.Config, teacher: config.Model) -> dict[str, Column]:
    """The columns of a batch that come from a cache; its ids are of tokens that teacher and student share."""
    dtype, places = _dtype(cfg), ("batch", "seq")
    tokens = min(cfg.model.vocab_size or teacher.vocab_size, teacher.vocab_size)
    made = {
        "logps": Column(dtype, (*places, None), cfg.distill.cache_size),
        "ids": Column("int32", (*places, None), cfg.distill.cache_size, tokens),
        "rest": Column(dtype, places),
    }
    return {name: made[array] for array, name in COLUMNS.items()}


def with_cache(cfg: config.Config, source: DataSource, teacher: config.Model) -> TaughtRows:
    """The rows of a source with the columns of `distill.cache`, whose files are read when the run begins.

    Raises:
        UserError: the cache would be of more tokens than there are, or the student has tokens that the teacher lacks.
    """
    from jaxlm.recipes.init_from import base_digest, function_digest, read_params

    options, size = cfg.distill, cfg.model.vocab_size or source.tokenizer.vocab_size
    if size > teacher.vocab_size:
        message = f"distill.cache: the teacher has {teacher.vocab_size} tokens, the student {size}"
        raise UserError(message, f"model.vocab_size={teacher.vocab_size}")
    if options.cache_size > size:
        raise UserError(f"distill.cache_size = {options.cache_size}: the vocabulary has {size} tokens")
    about = {
        "teacher": base_digest(read_params(options.teacher, teacher, _dtype(cfg)), teacher),
        "temperature": options.temperature,
        "size": options.cache_size,
        "tokens": size,
        "dtype": _dtype(cfg),
        "function": function_digest(teacher),
        "numerics": f"{cfg.numerics.compute}, matmul {cfg.numerics.matmul}",
    }
    cache = TeacherCache(options.cache, about)
    return TaughtRows(source, cache, cfg.train.steps, cfg.eval.batches, cfg.train.batch_size)


def teach(cfg: config.Config) -> dict[str, int]:
    """Write what `distill.cache` lacks of the rows of a run; returns the number of rows of each set.

    Raises:
        UserError: the recipe has no cache, or what is in its folder belongs to something else.
    """
    from rich.console import Console
    from rich.progress import Progress

    from jaxlm.numerics import precision
    from jaxlm.processes.compile_cache import enable_compilation_cache
    from jaxlm.recipes import make_recipe
    from jaxlm.run.directory import with_vocabulary

    source = make_recipe(cfg).data(None)
    if not isinstance(source, TaughtRows):
        raise UserError(f"recipe = {cfg.recipe!r} reads no cache of a teacher", "recipe=distill distill.cache=FOLDER")
    cfg = with_vocabulary(cfg, source.tokenizer)
    enable_compilation_cache(cfg.data.cache_dir)
    console = Console(stderr=True)
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with precision(cfg.numerics), shown:
        task = shown.add_task("rows", total=None)
        return source.teach(_teacher(cfg), lambda rows: shown.advance(task, rows))


def _teacher(cfg: config.Config) -> Any:
    """The likeliest tokens of the rows of a batch, by one compiled program."""
    import jax

    from jaxlm.convert.open_model import open_model
    from jaxlm.models.decoder import Decoder
    from jaxlm.numerics import Policy
    from jaxlm.objectives.teacher import Teacher, likeliest_tokens
    from jaxlm.recipes.forward import forward
    from jaxlm.recipes.init_from import read_params

    options = cfg.distill
    model = open_model(options.teacher).config.model
    decoder = Decoder(model, Policy.from_config(cfg.numerics))
    params = jax.device_put(read_params(options.teacher, model, cfg.numerics.params))

    @jax.jit
    def likeliest(params: Any, rows: Mapping[str, Any]) -> Any:
        hidden_BTE, (kernel_EV, bias_V), _ = forward(decoder, params, rows, None)
        size = cfg.model.vocab_size  # ids that only fill up the teacher's vocabulary are left out
        taught = Teacher(hidden_BTE, kernel_EV[:, :size], None if bias_V is None else bias_V[:size])
        return likeliest_tokens(taught, options.cache_size, temperature=options.temperature, block=cfg.train.loss_block)

    def of_batch(batch: Batch) -> dict[str, np.ndarray]:
        rows = {name: batch[name] for name in ("tokens", "positions", "segments")}
        found = jax.device_get(likeliest(params, rows))
        dtype = np.dtype(_dtype(cfg))
        logps, rest = found.logps_BTK.astype(dtype), found.rest_BT.astype(dtype)
        return {"ids": found.ids_BTK.astype(np.int32), "logps": logps, "rest": rest}

    return of_batch


def _dtype(cfg: config.Config) -> str:
    return "float64" if cfg.numerics.params == "float64" else "float32"
