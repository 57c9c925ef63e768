"""The inputs of a run: its models, and its data, which runs/own_data.py reads. Both are checked together.

Errors in them are found here, before anything is computed. The data goes to `inputs/` in the run folder, as artifacts
with keys, and so does a copy of the synthetic world.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dice_py.config.extras import TRAINING, require
from dice_py.evaluation.judges.registry import build_judges
from dice_py.models.own_template import FILE as TEMPLATE_FILE
from dice_py.models.own_template import with_own_template
from dice_py.models.sources import needs_conversion, resolve_model
from dice_py.models.template_time import FILE, with_template_time
from dice_py.runs.given import own_generations
from dice_py.runs.measured_costs import recall_lengths
from dice_py.runs.measured_lengths import lengths_key
from dice_py.runs.own_data import own_copies
from dice_py.stages.convert import ConvertJob
from dice_py.stages.preflight import PreflightJob
from dice_py.stages.world import WorldJob
from dice_py.storage.cache import cache_folder
from dice_py.storage.files import atomic, read_sealed, write_sealed
from dice_py.storage.integrity import damaged_in, is_kept, read_stamp, set_aside
from dice_py.storage.keys import digest, seed_for
from dice_py.storage.parquet import parquet_key, read_parquet, write_parquet
from dice_py.storage.schemas import PLACE, PROMPTS, PROMPTS_READ
from dice_py.synthetic.world import WORLD_STAMP, World, find_world, world_key

if TYPE_CHECKING:
    from dice_py.runs.folder import Run


@dataclass(frozen=True)
class Inputs:
    """The models and data that every round reads."""

    policy: Path
    """π_1. With model.sft, before round 0: the SFT model."""
    reference: Path
    prompts: Path
    offline: Path | None
    eval_prompts: Path | None
    eval_pairs: Path | None
    buffers: dict[str, Path] = field(default_factory=dict)
    """The named buffers of replay.buffers, as `offline`."""
    given: tuple[Path, Path] | None = None
    """The responses that take the place of round 1's sampling, and the prompts that they answer (runs/given.py)."""


def _world(run: Run) -> World:
    """The run's own copy of the world, so that it does not depend on what happens to the cache."""
    own, key = World(run.folder / "inputs" / "world"), world_key(run.config.world)
    if own.is_intact(key):
        return own
    stamp = read_stamp(own.folder, WORLD_STAMP)
    if own.folder.exists() and (stamp is None or stamp.get("key") == key):
        damaged = damaged_in(own.folder, WORLD_STAMP)[0]
        set_aside(own.folder, run.report, f"cannot be used: {damaged.name} is damaged or missing")
    world = find_world(run.config.world)
    if world is None:
        run.report("note", text=f"making the synthetic world in {cache_folder()} (once)")
        world = World(run.spawn(WorldJob(run.config.world), run.folder / "inputs").files[0][0])
    with atomic(own.folder) as temporary:
        shutil.copytree(world.folder, temporary)
    return own


def prepare(run: Run) -> Inputs:
    """Resolves the models, reads and checks the data, and splits held-out parts off, into `inputs/`."""
    config, folder = run.config, run.folder / "inputs"
    require(*TRAINING, extra="train")
    if config.is_world:
        world = _world(run)
        inputs = Inputs(
            policy=world.policy,
            reference=world.reference,
            prompts=world.prompts,
            offline=world.offline_pairs,
            eval_prompts=world.eval_prompts,
            eval_pairs=world.eval_pairs,
        )
        _check(run, inputs, digest("world", config.world.model_dump()))
        return inputs
    buffers = list(config.replay.buffers)
    outputs = {name: folder / f"{name}.parquet" for name in ("prompts", "offline", "eval_prompts", "eval_pairs")}
    outputs |= {f"buffer {name}": folder / f"buffer-{name}.parquet" for name in buffers}
    # The data first: the models may be a long download.
    key = own_copies(run, outputs)

    def made(name: str) -> Path | None:
        return outputs[name] if parquet_key(outputs[name]) == key else None

    policy, reference = _models(run)
    known = run.manifest.data.get("template_time")
    own = with_own_template(config.model, folder / TEMPLATE_FILE)
    models = with_template_time(own, policy, folder / FILE, run.report, copy=known)
    if models.template_time is not None:
        run.manifest.data["template_time"] = models.template_time
    run.config = config.model_copy(update={"model": models})
    inputs = Inputs(
        policy=policy,
        reference=reference,
        prompts=outputs["prompts"],
        offline=made("offline"),
        eval_prompts=made("eval_prompts"),
        eval_pairs=made("eval_pairs"),
        buffers={name: outputs[f"buffer {name}"] for name in buffers},
    )
    inputs = replace(inputs, given=own_generations(run, inputs.prompts, inputs.eval_prompts, inputs.eval_pairs))
    _check(run, inputs, key)
    return inputs


def check_judges(run: Run) -> None:
    """Finds the judges of the evaluation, whose errors would otherwise come after the first round.

    Raises:
        DataError: a judge's model or template is not there.
        UsageError: a package that a judge needs is not installed, or a function cannot be imported.
    """
    judges = run.config.evaluate.judges
    if judges.implicit is not None:
        for role in ("policy", "reference"):
            name, revision = (getattr(judges.implicit, key) for key in (role, f"{role}_revision"))
            _model(run, name, revision, f"evaluate.judges.implicit.{role}")
    build_judges(judges, run.config.model, run.config.is_world)


def _models(run: Run) -> tuple[Path, Path]:
    """The folders of the policy and the reference; before round 0 both are the SFT model."""
    model = run.config.model
    if model.sft is not None:
        sft = _model(run, model.sft, model.sft_revision, "model.sft (--sft)")
        return sft, sft
    assert model.policy is not None
    assert model.reference is not None
    return (
        _model(run, model.policy, model.policy_revision, "model.policy (--policy)"),
        _model(run, model.reference, model.reference_revision, "model.reference (--reference)"),
    )


def _model(run: Run, name: str, revision: str | None, role: str) -> Path:
    """The folder of a model. What has to be converted is so in a process of its own, since that imports torch."""
    if needs_conversion(name, revision, role):
        return run.spawn(ConvertJob(name, revision, role), run.folder / "inputs").files[0][0]
    return resolve_model(name, revision, role=role, report=run.report)


def _check(run: Run, inputs: Inputs, data_key: str) -> None:
    """Checks models and data together, once. Its errors would otherwise come after hours."""
    sampled = recall_lengths(lengths_key(run.config, inputs.policy, inputs.prompts))
    job = PreflightJob(
        config=run.config,
        longest_response=max(sampled.lengths, default=1) if sampled else 1,
        policy=inputs.policy,
        reference=inputs.reference,
        prompts=[file for file in (_sampled_on(run, inputs), inputs.eval_prompts) if file],
        pairs=[file for file in (inputs.offline, *inputs.buffers.values(), inputs.eval_pairs) if file],
        data_key=data_key,
        force=run.force,
    )
    key = job.key()
    stamp = run.folder / "inputs" / "checked.json"
    if read_sealed(stamp, key) is not None:
        return
    run.spawn(job, stamp.parent, following="replay" if run.config.has_round_zero else None)
    write_sealed(stamp, {}, key)


def _sampled_on(run: Run, inputs: Inputs) -> Path:
    """The prompts of the rounds; those of the given responses where no round samples."""
    return inputs.given[1] if inputs.given is not None and run.config.rounds.count == 1 else inputs.prompts


def round_prompts(run: Run, inputs: Inputs, number: int, folder: Path) -> tuple[Path, str]:
    """The prompts of round `number` (from 1): all of them, or the next slice of the shuffled ones, cyclically.

    Those of given responses are all of them.
    """
    given = inputs.given[1] if number == 1 and inputs.given is not None else None
    prompts = read_parquet(given or inputs.prompts)
    per_round = None if given else run.config.data.prompts_per_round
    if per_round is not None and per_round < prompts.height:
        order = list(range(prompts.height))
        random.Random(seed_for(run.config.seed, "prompts")).shuffle(order)
        start = (number - 1) * per_round
        rows = sorted(order[at % prompts.height] for at in range(start, start + per_round))
        prompts = prompts[rows]
    key = digest("prompts", prompts.select("prompt_id", "messages").to_dict(as_series=False))
    path = folder / "prompts.parquet"
    if not is_kept(path, key, run.report):
        write_parquet(path, prompts, key=key, schema=PROMPTS_READ if PLACE in prompts.columns else PROMPTS)
    return path, key
